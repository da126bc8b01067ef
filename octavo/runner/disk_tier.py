"""DiskTier: the way of KV blocks between a Program's pool and a DiskBlockStore.

A block that is evicted from the pool is read out of it before anything overwrites it, and kept in
the store. `fetch` reads blocks back into memory while a step is planned, so that a plan only ever
names blocks that are at hand, and writes them into the pool before the step computes.

Whether reading pays is measured: the seconds that reading a block has taken of late, against those
that computing its tokens would take. And a step reads for no longer than it would compute at most,
so that a long prompt never stalls its neighbours for more than another step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import takewhile

import numpy as np

from octavo.backends.program import Program
from octavo.runner.block_segment import Buffer
from octavo.runner.block_store import DiskBlockStore
from octavo.types import BlockMove, TierStats

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


class DiskTier:
    """See kv_cache.tiers.LowerTier for what the scheduler asks of it."""

    def __init__(
        self,
        program: Program,
        store: DiskBlockStore,
        block_size: int,
        max_num_tokens: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Serve `program` from `store`.

        Args:
            program: its cache is allocated.
            store: has blocks of the program's size; it is closed with us.
            block_size: tokens a block.
            max_num_tokens: the most tokens of a step.
            clock: seconds.
        """
        self._program = program
        self._store = store
        self._block_size = block_size
        self._max_num_tokens = max_num_tokens
        self._clock = clock
        self._staged: dict[bytes, Buffer] = {}
        self._spent_s = 0.0
        self._num_refusals = 0
        self._begun: deque[tuple[float, int]] = deque()
        self._ended = 0.0
        self._compute = Rate()  # A token.
        self._read = Rate()  # A block.

    # ---- While a step is planned ---------------------------------------------------------------

    def fetch(self, hashes: Sequence[bytes]) -> int:
        """Bring the first of these blocks within reach of the next step's loads.

        Args:
            hashes: of blocks that follow each other, at least one.

        Returns:
            How many; fewer than the store has if reading more takes too long or does not pay.
        """
        if not self._is_known(hashes[0]) or not self._pays():
            return 0
        budget_s = FIRST_BUDGET_S
        if self._compute.seconds is not None:
            budget_s = self._compute.seconds * self._max_num_tokens
        num_found = 0
        while self._spent_s < budget_s:
            chunk = hashes[num_found : num_found + CHUNK_BLOCKS]
            num_read = self._stage(list(takewhile(self._is_known, chunk)))
            num_found += num_read
            if num_read < CHUNK_BLOCKS:
                break
        return num_found

    def discard(self, hashes: Sequence[bytes]) -> None:
        """Never serve these blocks again."""
        self._store.discard(hashes)

    def clear(self) -> None:
        """Forget all blocks."""
        self._store.clear()

    def stats(self) -> TierStats:
        """A snapshot."""
        return self._store.stats()

    def _is_known(self, prefix_hash: bytes) -> bool:
        return prefix_hash in self._staged or self._store.contains(prefix_hash)

    def _pays(self) -> bool:
        """Whether reading a block is faster than computing it, or must be measured."""
        read_s, token_s = self._read.seconds, self._compute.seconds
        if read_s is None or token_s is None or read_s < token_s * self._block_size:
            self._num_refusals = 0
            return True
        self._num_refusals += 1
        return self._num_refusals % PROBE_INTERVAL == 0

    def _stage(self, hashes: Sequence[bytes]) -> int:
        """Read blocks into memory until one fails; return how many are there."""
        began = self._clock()
        wanted = [h for h in hashes if h not in self._staged]
        for prefix_hash, data in zip(wanted, self._store.get(wanted), strict=True):
            if data is not None:
                self._staged[prefix_hash] = data
        seconds = self._clock() - began
        self._spent_s += seconds
        if wanted:
            self._read.add(seconds, len(wanted))
        missing = [i for i, h in enumerate(hashes) if h not in self._staged]
        return missing[0] if missing else len(hashes)

    # ---- While it is computed ------------------------------------------------------------------

    def save(self, stores: Sequence[BlockMove]) -> None:
        """Keep the content of blocks that the step will overwrite."""
        if not stores:
            return
        wanted = [stores[i] for i in self._store.missing([h for h, _ in stores])]
        if not wanted:
            return
        data = self._program.read_blocks(np.array([b for _, b in wanted], np.int32))
        for (prefix_hash, _), block in zip(wanted, data, strict=True):
            self._store.put(prefix_hash, block.data)

    def load(self, loads: Sequence[BlockMove]) -> None:
        """Give blocks the content that `fetch` has brought."""
        if loads:
            began = self._clock()
            data = np.stack([np.frombuffer(self._staged[h], np.uint8) for h, _ in loads])
            self._program.write_blocks(np.array([b for _, b in loads], np.int32), data)
            self._read.extend(self._clock() - began)
        self._staged.clear()
        self._spent_s = 0.0

    def begin(self, num_tokens: int) -> None:
        """A step begins; it may have to wait for one before it."""
        self._begun.append((self._clock(), num_tokens))

    def end(self) -> None:
        """The first step that has begun has returned: take in how long it took."""
        now = self._clock()
        began, num_tokens = self._begun.popleft()
        if num_tokens >= LEAST_TOKENS:
            self._compute.add(now - max(began, self._ended), num_tokens)
        self._ended = now

    def close(self) -> None:
        """Write what waits and close the files."""
        self._store.close()
