"""Names for prefixes: a chain of hashes, one for each full block of tokens.

    root = H(what else the content depends on, who may share it)
    hash of block i = H(hash of block i - 1, its tokens)

So equal hashes mean equal tokens from the very first one on, and a shared block is found by one
name. H is SHA-256: nobody can craft a prompt that hits another user's blocks, and it costs 0.4 µs
a block of 16 tokens, no more than Python's hash of a tuple (docs/decisions/041-prefix-hash.md). A
name is the same in every process, so that blocks can be kept outside of one.
"""

from __future__ import annotations

from array import array
from hashlib import sha256


def root_hash(*parts: str) -> bytes:
    """The hash before the first block: prefixes under different parts never meet.

    Each part is hashed with its length, so that no two lists of parts look alike.
    """
    digest = sha256(b"octavo prefix 1")
    for part in parts:
        text = part.encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.digest()


def extend_chain(
    hashes: list[bytes], root: bytes, token_ids: array[int], block_size: int, num_blocks: int
) -> None:
    """Append to `hashes` until it has one for each of the first `num_blocks` full blocks.

    What it holds already is kept: tokens are only ever appended to a sequence.
    """
    parent = hashes[-1] if hashes else root
    for i in range(len(hashes), num_blocks):
        tokens = token_ids[i * block_size : (i + 1) * block_size]
        assert len(tokens) == block_size, "only a full block has a hash"
        parent = sha256(parent + tokens.tobytes()).digest()
        hashes.append(parent)
