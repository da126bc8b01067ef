"""The merges of a SentencePiece vocabulary, found from its scores and kept in the cache folder.

The library wants merges in order; a file of this kind holds a score for each token. Finding all
pairs takes 1 s of CPU for Gemma's 262,144 tokens, reading them back 0.1 s. A kept file is named by
a hash of all that it depends on, so it cannot be mistaken for another's; one that is broken or
cannot be written costs only time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path

from octavo.weights.cache import cache_home

_VERSION = 1
# Smaller vocabularies are built faster than a file is worth (32,000 tokens: 0.05 s).
_LEAST_KEPT = 65536


def sentencepiece_merges(ids: Mapping[str, int], scores: Sequence[float]) -> array[int]:
    """All pairs of tokens whose joined text is a token: left and right id in turn, best first.

    Neighbours are joined in the order of the joined token's score, the leftmost first, so every way
    of cutting a token in two has that token's rank.

    Args:
        ids: the tokens that may be joined or come of joining, by their text.
        scores: of each id; the greatest is the best.

    Source: Kudo and Richardson 2018 (SentencePiece), BPE; llama.cpp's tokenizer for the order.
    """
    if len(ids) < _LEAST_KEPT:
        return _find(ids, scores)
    path = cache_home() / "tokenizers" / f"{_fingerprint(ids, scores)}.merges"
    kept = _read(path, limit=max(ids.values()) + 1)
    if kept is None:
        kept = _find(ids, scores)
        with contextlib.suppress(OSError):
            _write(path, kept)
    return kept


def _find(ids: Mapping[str, int], scores: Sequence[float]) -> array[int]:
    """Try every cut of every token."""
    merges = array("I")
    find, append = ids.get, merges.append
    for text, _ in sorted(ids.items(), key=lambda entry: (-scores[entry[1]], entry[1])):
        for cut in range(1, len(text)):
            left = find(text[:cut])
            if left is not None:
                right = find(text[cut:])
                if right is not None:
                    append(left)
                    append(right)
    return merges


def _fingerprint(ids: Mapping[str, int], scores: Sequence[float]) -> str:
    """A name for everything that the merges follow from."""
    digest = hashlib.sha256(f"{_VERSION} {sys.byteorder} {len(ids)}\0".encode())
    digest.update("\0".join(ids).encode())
    digest.update(array("Q", ids.values()).tobytes())
    digest.update(array("d", scores).tobytes())
    return digest.hexdigest()


def _read(path: Path, limit: int) -> array[int] | None:
    """What `_write` wrote; None if it is missing or anything about it is wrong."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    merges = array("I")
    checksum, payload = content[:32], content[32:]
    if len(payload) % (2 * merges.itemsize) or hashlib.sha256(payload).digest() != checksum:
        return None
    merges.frombytes(payload)
    return merges if max(merges, default=0) < limit else None


def _write(path: Path, merges: array[int]) -> None:
    """Write a checksum and the pairs, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    payload = merges.tobytes()
    try:
        temporary.write_bytes(hashlib.sha256(payload).digest() + payload)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
