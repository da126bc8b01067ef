"""DiskBlockStore: KV blocks by the hashes of their prefixes, in a folder, an LRU of bounded bytes.

Blocks lie in segments (see block_segment.py) of 64 MB, or more in a large store, which are dropped
whole, the least recently used one first. A thread of its own writes them; reading is done by the
caller. Nothing that a file says is believed without its checksum, and a fault of the disk costs
hits, never an answer: it is reported once and turns the store off. Knows hashes and bytes, no
tokens.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Final

from octavo.errors import ConfigError
from octavo.runner.block_segment import Buffer, Segment, SegmentError, Shape, digest
from octavo.types import TierStats

SEGMENT_BYTES = 64 << 20
NUM_SEGMENTS = 8, 128
"""At least so many, however small they are; at most so many, for each is an open file."""
QUEUE_BYTES = 64 << 20
"""Blocks that wait to be written, in memory; what comes on top of them is not kept."""
BATCH_BLOCKS = 32
"""The most blocks of one write."""

_SEGMENT_NAME = re.compile(r"\d{8,}\.kv")
_LOCK_NAME = "lock"

Dropped = tuple[Path, Segment | None]
"""A segment that nothing refers to any more."""

_log = logging.getLogger("octavo.kv_disk")


class DiskBlockStore:
    """The blocks of one engine. `put`, `get` and the like are called from one thread."""

    def __init__(self, folder: Path, key: bytes, block_bytes: int, max_bytes: int) -> None:
        """Open a folder, and index what an earlier run has left there.

        Args:
            folder: made if it is missing; nobody else may have it open.
            key: all that must be equal for a block to be of use: the model, the format.
            block_bytes: of each block.
            max_bytes: the most that the segments in the folder may take, those of other keys and
                damaged ones included: they are what is dropped first.

        Raises:
            ConfigError: the folder cannot be used, is in use, or the bytes hold no block.
        """
        self.block_bytes: Final = block_bytes
        self._folder = folder
        self._max_bytes = max_bytes
        self._shape = _plan_shape(digest(key), block_bytes, max_bytes)
        self._lock_fd = _lock_folder(folder)
        self._changed = threading.Condition()  # Guards all below; the writer waits for it.
        self._clearing = threading.Lock()  # Held while segments are written or all dropped.
        # The least recently used first; None stands for a file that is of no use to us.
        self._segments: OrderedDict[Path, Segment | None] = OrderedDict()
        self._sizes: dict[Path, int] = {}
        self._index: dict[bytes, tuple[Segment, int]] = {}
        self._queue: dict[bytes, Buffer] = {}
        self._max_queued = max(1, QUEUE_BYTES // block_bytes)
        self._last_number = 0
        self._is_on, self._is_closing = True, False
        self._num_hits = self._num_writes = self._num_drops = self._num_corrupt = 0
        try:
            self._open_segments()
            newest = self._newest()
            growth = 0 if newest is None else newest.shape.num_bytes - newest.num_bytes
            _remove(self._drop_beyond(growth))
        except OSError as error:
            os.close(self._lock_fd)
            raise ConfigError(f"--kv-disk {folder} can't be used: {error.strerror}") from None
        self._writer = threading.Thread(target=self._write_all, name="kv-disk", daemon=True)
        self._writer.start()

    # ---- The engine's side ---------------------------------------------------------------------

    def contains(self, prefix_hash: bytes) -> bool:
        """Whether `get` would most likely find the block."""
        with self._changed:
            return prefix_hash in self._index or prefix_hash in self._queue

    def reserve(self, hashes: Sequence[bytes], keep: Container[bytes] = ()) -> dict[bytes, None]:
        """Which of these blocks should be handed to `put`: not known yet, and there is room.

        Those that are known count as used just now, and those without room as dropped. Of what
        `get` has returned there is nothing to `keep`, for it is a copy.
        """
        with self._changed:
            if not self._is_on:
                return {}
            found = []
            for prefix_hash in dict.fromkeys(hashes):
                if prefix_hash in self._index:
                    self._use(self._index[prefix_hash][0])
                elif prefix_hash not in self._queue:
                    found.append(prefix_hash)
            room = self._max_queued - len(self._queue)
            self._num_drops += max(0, len(found) - room)
            return dict.fromkeys(found[:room])

    def put(self, prefix_hash: bytes, data: Buffer) -> None:
        """Keep a block, which the caller does not change any more; it is written later on.

        It is dropped, and counted as such, when too many blocks wait already.
        """
        with self._changed:
            if not self._is_on or prefix_hash in self._index or prefix_hash in self._queue:
                return
            if len(self._queue) >= self._max_queued:
                self._num_drops += 1
                return
            self._queue[prefix_hash] = data
            self._changed.notify()

    def get(self, hashes: Sequence[bytes]) -> list[Buffer | None]:
        """The blocks; None for each that is unknown or no longer what was written."""
        with self._changed:
            buffer = memoryview(bytearray(self.block_bytes * len(hashes)))
            found: list[Buffer | None] = []
            used: dict[Path, Segment] = {}
            for i, prefix_hash in enumerate(hashes):
                data = self._queue.get(prefix_hash)
                place = self._index.get(prefix_hash)
                if data is None and place is not None:
                    out = buffer[i * self.block_bytes : (i + 1) * self.block_bytes]
                    if self._read(*place, out):
                        data = out
                        used[place[0].path] = place[0]
                self._num_hits += data is not None
                found.append(data)
            for segment in used.values():
                self._use(segment, is_read=True)
            return found

    def discard(self, hashes: Sequence[bytes] | None) -> None:
        """Forget blocks for ever: something is wrong with them. None: all, of other keys too."""
        if hashes is None:
            self._clear()
            return
        with self._clearing, self._changed:
            for prefix_hash in hashes:
                self._queue.pop(prefix_hash, None)
                place = self._index.pop(prefix_hash, None)
                if place is not None:
                    self._erase(*place)

    def _clear(self) -> None:
        with self._clearing, self._changed:
            self._queue.clear()
            try:
                _remove([self._drop_first() for _ in range(len(self._segments))])
            except OSError as error:
                self._turn_off(error)

    def stats(self) -> TierStats:
        """A snapshot."""
        with self._changed:
            return TierStats(
                num_bytes=sum(self._sizes.values()),
                num_blocks=len(self._index) + len(self._queue),
                num_hits=self._num_hits,
                num_writes=self._num_writes,
                num_drops=self._num_drops,
                num_corrupt=self._num_corrupt,
            )

    def close(self) -> None:
        """Write what waits and close the files; idempotent. Nothing else may be called then."""
        with self._changed:
            if self._is_closing:
                return
            self._is_closing = True
            self._changed.notify()
        self._writer.join()
        for segment in filter(None, self._segments.values()):
            segment.close()
        os.close(self._lock_fd)

    # ---- The writer's side ---------------------------------------------------------------------

    def _write_all(self) -> None:
        """Write what is put until the store is closed or the disk fails."""
        while True:
            with self._changed:
                while not self._queue and not self._is_closing and self._is_on:
                    self._changed.wait()
                if not self._queue or not self._is_on:
                    return
            try:
                with self._clearing:
                    if self._queue:  # Else all has just been forgotten.
                        self._write_batch()
            except OSError as error:
                with self._changed:
                    self._turn_off(error)
                return

    def _write_batch(self) -> None:
        segment = self._writable_segment()
        with self._changed:
            count = min(BATCH_BLOCKS, segment.num_free_slots)
            batch = list(self._queue.items())[:count]
            first = len(segment.hashes)
        segment.append(batch)  # Meanwhile `get` may read what was there before.
        with self._changed:
            if not self._is_on:
                return
            for i, (prefix_hash, _) in enumerate(batch):
                del self._queue[prefix_hash]
                self._index[prefix_hash] = segment, first + i
            self._sizes[segment.path] = segment.num_bytes
            self._num_writes += len(batch)

    def _writable_segment(self) -> Segment:
        """The newest segment if it has a free slot, else a new one, with room made for it."""
        with self._changed:
            newest = self._newest()
            if newest is not None and newest.num_free_slots:
                return newest
            dropped = self._drop_beyond(self._shape.num_bytes)
        _remove(dropped)  # Deleting a large file takes a while; nobody waits for it.
        self._last_number += 1
        segment = Segment.create(self._folder / f"{self._last_number:08}.kv", self._shape)
        with self._changed:
            self._segments[segment.path] = segment
            self._sizes[segment.path] = segment.num_bytes
        return segment

    # ---- Under the lock ------------------------------------------------------------------------

    def _open_segments(self) -> None:
        """Index the folder's segments, the least recently used first; report what is not ours."""
        for draft in self._folder.glob("*.draft"):
            draft.unlink()
        faults, files = [], []
        for path in self._folder.iterdir():
            if _SEGMENT_NAME.fullmatch(path.name) and path.is_file():
                files.append(path)
            elif path.name != _LOCK_NAME:
                faults.append(f"{path.name} is no file of KV blocks")
        self._last_number = max([int(p.stem) for p in files], default=0)
        for path in sorted(files, key=lambda p: (p.stat().st_mtime_ns, p)):
            segment = None
            try:
                segment = Segment.open(path, self._shape.key, self.block_bytes)
            except SegmentError as error:
                faults.append(f"{path.name} {error}")
            except OSError as error:
                faults.append(f"{path.name} can't be read ({error.strerror})")
            self._segments[path] = segment
            self._sizes[path] = path.stat().st_size
            if segment is not None:
                places = enumerate(segment.hashes)
                self._index.update({h: (segment, slot) for slot, h in places if h is not None})
        if faults:
            rest = f", and {len(faults) - 1} more files" if len(faults) > 1 else ""
            _log.warning("--kv-disk %s: %s%s: ignored", self._folder, faults[0], rest)

    def _newest(self) -> Segment | None:
        """The segment that was made last, the only one that grows, if it is of use."""
        path = max(self._segments, default=None)
        return None if path is None else self._segments[path]

    def _drop_beyond(self, num_bytes: int) -> list[Dropped]:
        """Drop segments until `num_bytes` more stay within the bound."""
        dropped = []
        while self._segments and sum(self._sizes.values()) + num_bytes > self._max_bytes:
            dropped.append(self._drop_first())
        return dropped

    def _drop_first(self) -> Dropped:
        """Forget the least recently used segment with all its blocks; its file is left."""
        path, segment = self._segments.popitem(last=False)
        del self._sizes[path]
        if segment is not None:
            for prefix_hash in filter(None, segment.hashes):
                if self._index.get(prefix_hash, (None,))[0] is segment:
                    del self._index[prefix_hash]
        return path, segment

    def _use(self, segment: Segment, is_read: bool = False) -> None:
        """A block of it was asked for: it is dropped after all others."""
        self._segments.move_to_end(segment.path)
        if is_read:  # So that the order outlives us.
            try:
                segment.touch()
            except OSError as error:
                self._turn_off(error)

    def _read(self, segment: Segment, slot: int, out: memoryview) -> bool:
        """Read a block; one that is damaged is forgotten, and reported if it is the first."""
        try:
            is_whole = segment.read(slot, out)
        except OSError:
            is_whole = False
        if not is_whole:
            if not self._num_corrupt:
                _log.warning(
                    "--kv-disk %s: a block of %s is damaged: computed anew, as all such blocks are",
                    self._folder,
                    segment.path.name,
                )
            self._num_corrupt += 1
            prefix_hash = segment.hashes[slot]
            assert prefix_hash is not None
            del self._index[prefix_hash]
            self._erase(segment, slot)
        return is_whole

    def _erase(self, segment: Segment, slot: int) -> None:
        try:
            segment.erase(slot)
        except OSError as error:
            self._turn_off(error)

    def _turn_off(self, error: OSError) -> None:
        """Stop keeping and serving blocks: the disk is full or fails."""
        if self._is_on:
            self._is_on = False
            _log.warning(
                "--kv-disk %s is turned off until the next start: %s", self._folder, error.strerror
            )
        self._index.clear()
        self._queue.clear()
        self._changed.notify()


def _remove(dropped: Iterable[Dropped]) -> None:
    """Close and delete segments."""
    for path, segment in dropped:
        if segment is not None:
            segment.close()
        path.unlink()


def _plan_shape(key: bytes, block_bytes: int, max_bytes: int) -> Shape:
    """How large segments are made."""
    fewest, most = NUM_SEGMENTS
    wanted = min(max(SEGMENT_BYTES, max_bytes // most), max_bytes // fewest)
    shape = Shape(key, block_bytes, max(1, wanted // block_bytes))
    if shape.num_bytes > max_bytes:
        raise ConfigError(
            f"--kv-disk-size of {max_bytes:,} bytes holds no block of {block_bytes:,} bytes; "
            f"give it at least {fewest * shape.num_bytes:,}"
        )
    return shape


def _lock_folder(folder: Path) -> int:
    """Make the folder ours until the process ends or the descriptor is closed."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(f"--kv-disk {folder} can't be used: {error.strerror}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise ConfigError(
            f"--kv-disk {folder} is in use by another engine; give each one a folder of its own"
        ) from None
    return fd
