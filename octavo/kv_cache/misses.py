"""Why a prefix was not found: what a prefix cache that explains itself remembers.

It remembers the names that the cache lost lately and the roots that tables had lately, both in
bounded memory: 16,384 names and 256 roots take 3.0 MB (tests/kv_cache/test_misses.py holds it to
that). A name is remembered by 8 of its 32 bytes: a wrong guess once in 10¹⁵ is good enough for a
log. Only a manager that was asked to explain has one of these.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Container, Iterable
from itertools import islice
from typing import Literal

from octavo.kv_cache.prefix import extend_chain

Loss = Literal["evicted", "reset", "discarded"]

MAX_NAMES = 16_384
MAX_ROOTS = 256


class MissMemory:
    """What was lost lately, and under which roots there may be the same tokens."""

    def __init__(self) -> None:
        """Start without memories."""
        self._losses: OrderedDict[int, Loss] = OrderedDict()
        self._roots: OrderedDict[bytes, None] = OrderedDict()

    def note_root(self, root: bytes) -> None:
        """A table begins at this root."""
        self._roots[root] = None
        self._roots.move_to_end(root)
        if len(self._roots) > MAX_ROOTS:
            self._roots.popitem(last=False)

    def note_loss(self, name: bytes, loss: Loss) -> None:
        """The cache no longer serves the block of this name."""
        key = _short(name)
        self._losses[key] = loss
        self._losses.move_to_end(key)
        if len(self._losses) > MAX_NAMES:
            self._losses.popitem(last=False)

    def note_losses(self, names: Iterable[bytes], count: int, loss: Loss) -> None:
        """The cache serves none of these `count` names any longer."""
        for name in islice(names, max(0, count - MAX_NAMES), None):
            self.note_loss(name, loss)

    def loss(self, name: bytes) -> Loss | None:
        """How the name was lost, as far as is remembered."""
        return self._losses.get(_short(name))

    def is_under_another_root(
        self,
        root: bytes,
        token_ids: array[int],
        block_size: int,
        num_blocks: int,
        cached: Container[bytes],
    ) -> bool:
        """Whether the first `num_blocks` blocks of tokens are cached under another root.

        A chain is followed only as far as it is cached, so that a root which has nothing in common
        with these tokens costs one hash.
        """
        for other in self._roots:
            chain: list[bytes] = []
            if other != root and all(
                _next_name(chain, other, token_ids, block_size) in cached for _ in range(num_blocks)
            ):
                return True
        return False


def _next_name(chain: list[bytes], root: bytes, token_ids: array[int], block_size: int) -> bytes:
    extend_chain(chain, root, token_ids, block_size, len(chain) + 1)
    return chain[-1]


def _short(name: bytes) -> int:
    return int.from_bytes(name[:8], "little")
