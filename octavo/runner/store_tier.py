"""StoreTier: the way of KV blocks between a Program's pool and the stores below it.

A block that is evicted from the pool is read out of it before anything overwrites it, and kept in
the first store: in host memory, or on disk. On a GPU that takes as long as it takes, while steps
are computed: the block is known once it is there. `fetch` finds blocks while a step is planned, in
whichever store has them, so that a plan only ever names blocks that are at hand, and they are
written into the pool before the step computes.

Whether reading pays is measured, store by store: the seconds that reading a block has taken of
late, against those that computing its tokens would take. And a step reads for no longer than it
would compute at most, so that a long prompt never stalls its neighbours for more than another step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

import numpy as np

from octavo.backends.program import Bytes, PendingBlocks, Program
from octavo.runner.block_segment import Buffer
from octavo.types import BlockMove, LowerStats, TierStats

CHUNK_BLOCKS = 8
"""Blocks that are read before the clock is looked at."""
FIRST_BUDGET_S = 0.1
"""How long a step may read while the speed of computing is not known."""
LEAST_TOKENS = 32
"""Steps of fewer tokens do not tell what a token of a prompt costs: weights dominate them."""
PROBE_INTERVAL = 32
"""While reading does not pay, every so many times it is measured again."""
MEMORY = 0.8
"""What is left of the weight of a measurement when the next one comes."""


class BlockStore(Protocol):
    """Blocks by their hashes, an LRU of bounded bytes."""

    def contains(self, prefix_hash: bytes) -> bool:
        """Whether `get` would most likely find the block."""
        ...

    def reserve(
        self, hashes: Sequence[bytes], keep: Container[bytes] = ()
    ) -> Mapping[bytes, Bytes | None]:
        """Which of these blocks are to be handed to `put`, those that are not known yet.

        Args:
            hashes: of blocks that are used just now.
            keep: of blocks that `get` has returned and that are still needed as they are.

        Returns:
            Where each is to lie by then; None: anywhere.
        """
        ...

    def put(self, prefix_hash: bytes, data: Buffer) -> None:
        """Keep a block that was reserved; the caller does not change it any more."""
        ...

    def get(self, hashes: Sequence[bytes]) -> Sequence[Buffer | None]:
        """The blocks; None for each that is not there."""
        ...

    def discard(self, hashes: Sequence[bytes] | None) -> None:
        """Never serve these blocks again, nor what was reserved for them; None: all of them."""
        ...

    def stats(self) -> TierStats:
        """A snapshot."""
        ...


class Rate:
    """Seconds a unit, the mean over the measurements of late."""

    def __init__(self) -> None:
        """Start without any."""
        self._seconds = 0.0
        self._units = 0.0

    def add(self, seconds: float, units: int) -> None:
        """Take in a measurement."""
        self._seconds = MEMORY * self._seconds + seconds
        self._units = MEMORY * self._units + units

    def extend(self, seconds: float) -> None:
        """The last measurement has taken so much longer."""
        self._seconds += seconds

    @property
    def seconds(self) -> float | None:
        """Seconds a unit; None while nothing was measured."""
        return self._seconds / self._units if self._units else None


class Level:
    """A store, and how long a block takes from it into the pool."""

    def __init__(self, store: BlockStore) -> None:
        """Start without measurements."""
        self.store = store
        self.read = Rate()
        self._num_refusals = 0

    def pays(self, computing_s: float | None) -> bool:
        """Whether reading a block is faster than computing it, or must be measured."""
        read_s = self.read.seconds
        if read_s is None or computing_s is None or read_s < computing_s:
            self._num_refusals = 0
            return True
        self._num_refusals += 1
        return self._num_refusals % PROBE_INTERVAL == 0


@dataclass(slots=True)
class _Reading:
    """Blocks on their way from the pool to the first store; those of `names` are still wanted."""

    names: set[bytes]
    order: Sequence[bytes]
    blocks: PendingBlocks


@dataclass(frozen=True, slots=True)
class _Load:
    """Blocks on their way into the pool, which a device may copy until their step has returned."""

    level: Level
    data: Sequence[Bytes]
    seconds: Callable[[], float]


@dataclass(frozen=True, slots=True)
class _Step:
    """A step on its way."""

    began: float
    num_tokens: int
    loads: Sequence[_Load]


class StoreTier:
    """See kv_cache.tiers.LowerTier for what the scheduler asks of it."""

    def __init__(
        self,
        program: Program,
        host: BlockStore | None,
        disk: BlockStore | None,
        block_size: int,
        max_num_tokens: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Serve `program` from stores of blocks of its size.

        Args:
            program: its cache is allocated.
            host: in memory; it hands down to `disk` what it drops.
            disk: on disk; at least one of the two is there.
            block_size: tokens a block.
            max_num_tokens: the most tokens of a step.
            clock: seconds.
        """
        self._program = program
        self._host, self._disk = host, disk
        self._levels = [Level(store) for store in (host, disk) if store is not None]
        self._block_size = block_size
        self._max_num_tokens = max_num_tokens
        self._clock = clock
        self._staged: dict[bytes, tuple[Level, Bytes]] = {}
        self._spent_s = 0.0
        self._readings: deque[_Reading] = deque()
        self._loads: list[_Load] = []
        self._begun: deque[_Step] = deque()
        self._ended = 0.0
        self._compute = Rate()  # A token.

    # ---- While a step is planned ---------------------------------------------------------------

    def fetch(self, hashes: Sequence[bytes]) -> int:
        """Bring the first of these blocks within reach of the next step's loads.

        Args:
            hashes: of blocks that follow each other, at least one.

        Returns:
            How many; fewer than the stores have if reading more takes too long or does not pay.
        """
        token_s = self._compute.seconds
        budget_s = FIRST_BUDGET_S if token_s is None else token_s * self._max_num_tokens
        computing_s = None if token_s is None else token_s * self._block_size
        paying: dict[Level, bool] = {}
        num_found = 0
        while num_found < len(hashes):
            if hashes[num_found] in self._staged:
                num_found += 1
                continue
            level = self._level_of(hashes[num_found])
            if level is None or self._spent_s >= budget_s:
                break
            if level not in paying:
                paying[level] = level.pays(computing_s)
            if not paying[level]:
                break
            chunk = hashes[num_found : num_found + CHUNK_BLOCKS]
            wanted = list(takewhile(level.store.contains, chunk))
            num_read = self._stage(level, wanted)
            num_found += num_read
            if num_read < len(wanted):
                break
        return num_found

    def discard(self, hashes: Sequence[bytes]) -> None:
        """Never serve these blocks again."""
        for reading in self._readings:
            reading.names.difference_update(hashes)
        for level in self._levels:
            level.store.discard(hashes)

    def clear(self) -> None:
        """Forget all blocks."""
        for reading in self._readings:
            reading.names.clear()
        for level in self._levels:
            level.store.discard(None)

    def stats(self) -> LowerStats:
        """A snapshot."""
        return LowerStats(
            host=TierStats() if self._host is None else self._host.stats(),
            disk=TierStats() if self._disk is None else self._disk.stats(),
        )

    def _level_of(self, prefix_hash: bytes) -> Level | None:
        return next((one for one in self._levels if one.store.contains(prefix_hash)), None)

    def _stage(self, level: Level, hashes: Sequence[bytes]) -> int:
        """Read blocks into memory until one fails; return how many are there."""
        began = self._clock()
        count = 0
        for prefix_hash, data in zip(hashes, level.store.get(hashes), strict=True):
            if data is None:
                break
            self._staged[prefix_hash] = level, np.frombuffer(data, np.uint8)
            count += 1
        seconds = self._clock() - began
        self._spent_s += seconds
        level.read.add(seconds, len(hashes))
        return count

    # ---- While it is computed ------------------------------------------------------------------

    def save(self, stores: Sequence[BlockMove]) -> None:
        """Keep the content of blocks that the step will overwrite."""
        self._settle()
        coming = {name for reading in self._readings for name in reading.names}
        wanted = {name: block_id for name, block_id in stores if name not in coming}
        if not wanted:
            return
        rooms = self._levels[0].store.reserve(list(wanted), self._staged)
        if not rooms:
            return
        ids = np.array([wanted[name] for name in rooms], np.int32)
        places = [room for room in rooms.values() if room is not None]
        blocks = self._program.read_blocks(ids, places or None)
        self._readings.append(_Reading(set(rooms), list(rooms), blocks))
        self._settle()

    def load(self, loads: Sequence[BlockMove]) -> None:
        """Give blocks the content that `fetch` has brought."""
        for level in self._levels:
            moves = [move for move in loads if self._staged[move[0]][0] is level]
            if moves:
                began = self._clock()
                ids = np.array([block_id for _, block_id in moves], np.int32)
                data = [self._staged[name][1] for name, _ in moves]
                self._loads.append(_Load(level, data, self._program.write_blocks(ids, data)))
                level.read.extend(self._clock() - began)
        self._staged.clear()
        self._spent_s = 0.0

    def begin(self, num_tokens: int) -> None:
        """A step begins; it may have to wait for one before it."""
        self._begun.append(_Step(self._clock(), num_tokens, self._loads))
        self._loads = []

    def end(self) -> None:
        """The first step that has begun has returned: take in how long it took."""
        now = self._clock()
        step = self._begun.popleft()
        loading_s = 0.0
        for load in step.loads:
            seconds = load.seconds()
            load.level.read.extend(seconds)
            loading_s += seconds
        if step.num_tokens >= LEAST_TOKENS:
            computing_s = now - max(step.began, self._ended) - loading_s
            self._compute.add(max(0.0, computing_s), step.num_tokens)
        self._ended = now
        self._settle()

    def close(self) -> None:
        """Keep what is still on its way; the stores are closed by who has opened them."""
        while self._readings:
            self._keep(self._readings.popleft())

    def _settle(self) -> None:
        """Have the stores keep what has come out of the pool; wait for nothing."""
        while self._readings and self._readings[0].blocks.is_done():
            self._keep(self._readings.popleft())

    def _keep(self, reading: _Reading) -> None:
        store = self._levels[0].store
        for prefix_hash, data in zip(reading.order, reading.blocks.result(), strict=True):
            if prefix_hash in reading.names:
                store.put(prefix_hash, data.data)
