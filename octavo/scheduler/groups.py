"""The sequences of one request: how they share blocks, and how the beams of a search branch.

Samples: the first sequence computes the prompt, and where its last token is computed, the others
are forked from it and sample from the same logits. Beams: each round the search names which beams
go on and from which; a beam with two heirs is forked into the row of one that has none. Whoever
finds no row or no block waits, and computes again what it cannot share.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable

from octavo.kv_cache.manager import KVCacheManager, PrefixMatch
from octavo.scheduler.beams import Beam, Continuation
from octavo.scheduler.request import Request, Sequence, Status
from octavo.scheduler.rows import Rows
from octavo.types import Fork

RESERVED_BLOCKS = 1
"""How many blocks stay free for each running sequence when another one joins it
(docs/decisions/042-admission-reserve.md)."""


class Groups:
    """Forks sequences within requests."""

    def __init__(self, cache: KVCacheManager, rows: Rows, wait: Callable[[Sequence], None]) -> None:
        """Work on a scheduler's blocks and rows; `wait` puts a sequence into its queue."""
        self._cache = cache
        self._rows = rows
        self._wait = wait
        self._forks: list[Fork] = []  # Since the last plan.

    def fork_samples(self, leader: Sequence) -> list[Sequence]:
        """Let the siblings that wait for a prompt run, as far as there is room.

        Args:
            leader: all of the prompt is computed in the step that is being planned.

        Returns:
            Those that now hold a row and the leader's blocks.
        """
        forked = []
        for seq in leader.request.held:
            if not self._has_room():
                break
            self._cache.fork(leader.table, seq.table)
            self._run(seq, leader)
            forked.append(seq)
        return forked

    def find_prefix(self, seq: Sequence) -> PrefixMatch:
        """The longest prefix that the cache, or a running sibling, can share with a sequence."""
        prefix = self._cache.match_prefix(seq.table, seq.token_ids)
        for other in seq.request.sequences if seq.request.is_group else ():
            if other.status is not Status.RUNNING or not self._cache.is_current(other.table):
                continue
            count = self._num_common_blocks(seq, other)
            num_tokens = count * self._cache.block_size
            if num_tokens > prefix.num_tokens:
                shared = tuple(other.table.block_ids[:count])
                prefix = PrefixMatch(shared, num_tokens, len(seq.token_ids))
        return prefix

    def branch(self, request: Request, beams: list[Continuation]) -> None:
        """Make the live sequences of a beam search those of its next round, best first."""
        parents = [request.live[beam.parent] for beam in beams]
        spares = [seq for seq in request.sequences if seq not in parents]
        heirs: list[Sequence] = []
        tokens: list[array[int]] = []
        for parent, beam in zip(parents, beams, strict=True):
            heirs.append(parent if parent not in heirs else self._branch_off(parent, spares.pop()))
            tokens.append(parent.token_ids + array("i", [beam.token_id]))
        for parent, seq, beam, token_ids in zip(parents, heirs, beams, tokens, strict=True):
            seq.token_ids = token_ids
            seq.num_known_tokens = len(token_ids)
            seq.beam = Beam(beam.score, beam.logprobs)
            if seq.status is Status.RUNNING:
                last = len(token_ids) - 1
                self._forks.append(Fork(seq.row, parent.row, last, beam.token_id))
            else:
                self._wait(seq)
        for spare in spares:
            self.retire(spare)
        request.live = heirs

    def retire(self, seq: Sequence) -> None:
        """Take row and blocks from a sequence that runs; it is held."""
        if seq.status is Status.RUNNING:
            self.give_back(seq)
        seq.status = Status.HELD

    def give_back(self, seq: Sequence) -> None:
        """Free row and blocks of a sequence."""
        self._forks = [fork for fork in self._forks if fork.row != seq.row]
        self._rows.remove(seq)
        self._cache.free(seq.table)

    def take_forks(self) -> tuple[Fork, ...]:
        """What the runner has to be told since the last call."""
        forks, self._forks = self._forks, []
        return tuple(forks)

    def _has_room(self) -> bool:
        """Whether one more sequence may run without blocks of its own."""
        num_reserved = RESERVED_BLOCKS * (len(self._rows.running) + 1)
        return self._rows.num_free > 0 and self._cache.num_free_blocks >= num_reserved

    def _run(self, seq: Sequence, parent: Sequence) -> None:
        seq.num_computed_tokens = parent.num_computed_tokens
        seq.status = Status.RUNNING
        self._rows.insert(seq)

    def _branch_off(self, parent: Sequence, spare: Sequence) -> Sequence:
        """Let a sequence without heirs, or one never used yet, share a parent's blocks."""
        if spare.status is Status.RUNNING:
            self._cache.free(spare.table)
            self._cache.fork(parent.table, spare.table)
            spare.num_computed_tokens = parent.num_computed_tokens
        elif self._has_room():
            self._cache.fork(parent.table, spare.table)
            self._run(spare, parent)
        else:
            spare.table.hashes = parent.table.hashes[:]  # Those it had were of other tokens.
        return spare

    def _num_common_blocks(self, seq: Sequence, other: Sequence) -> int:
        """How many computed blocks of `other` hold the tokens that `seq` begins with."""
        size = self._cache.block_size
        most = min(other.table.num_committed_blocks, (len(seq.token_ids) - 1) // size)
        count = 0
        while count < most:
            place = slice(count * size, (count + 1) * size)
            if seq.token_ids[place] != other.token_ids[place]:
                break
            count += 1
        return count
