"""A file of KV blocks: a header, a table of slots, and the blocks.

    0            header: format, number of slots, bytes of a block, digest of the key; checked
    64           one entry a slot: the block's hash, its checksum, a checksum of the entry itself
    data_start   the blocks, slot after slot

The table stands in front so that one read tells what a file holds. A block is written before its
entry, so a process that is killed at any point leaves a file in which every valid entry has its
block; what a loss of power tears is found by the checksums. Knows hashes and bytes, no tokens.
"""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from octavo.errors import OctavoError

Buffer = bytes | bytearray | memoryview

HASH_BYTES = 32
_HEADER = struct.Struct("<8sIIQ32s")  # magic, version, slots, bytes of a block, digest of the key
_CHECKSUM = struct.Struct("<I")
_ENTRY = struct.Struct("<32sI")  # hash, checksum of the block
_MAGIC, _VERSION = b"octavoKV", 1
_TABLE_START = 64
_ENTRY_BYTES = _ENTRY.size + _CHECKSUM.size
_PAGE = 4096
_BLANK = bytes(_ENTRY_BYTES)


class SegmentError(OctavoError):
    """A file is no segment, or one of another key; the message says which."""


class Shape(NamedTuple):
    """What a segment is made for.

    Attributes:
        key: digest of what else must be equal for a block to be of use: the model, the format.
        block_bytes: of each block.
        num_slots: blocks a segment.
    """

    key: bytes
    block_bytes: int
    num_slots: int

    @property
    def data_start(self) -> int:
        """Where the first block lies."""
        return -(-(_TABLE_START + self.num_slots * _ENTRY_BYTES) // _PAGE) * _PAGE

    @property
    def num_bytes(self) -> int:
        """The size of a full segment."""
        return self.data_start + self.num_slots * self.block_bytes


def digest(key: bytes) -> bytes:
    """The digest of a key, for `Shape.key`."""
    return sha256(key).digest()


class Segment:
    """An open segment. Blocks are appended; only one thread may do that.

    Attributes:
        hashes: of the block in each slot that was ever filled; None where there is none any more.
    """

    def __init__(self, path: Path, fd: int, shape: Shape, hashes: list[bytes | None]) -> None:
        """Use `create` or `open`."""
        self.path = path
        self.shape = shape
        self.hashes = hashes
        self._fd = fd
        self._seed = crc32(_header(shape))

    @classmethod
    def create(cls, path: Path, shape: Shape) -> Segment:
        """Make an empty segment; it appears under its name with its header or not at all."""
        draft = path.with_suffix(".draft")
        fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            header = _header(shape)
            _write(fd, [header + _CHECKSUM.pack(crc32(header))], 0)
            draft.rename(path)
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd, shape, [])

    @classmethod
    def open(cls, path: Path, key: bytes, block_bytes: int) -> Segment:
        """Open a segment and read its table.

        Raises:
            SegmentError: it is damaged, or of another key or format.
            OSError: it cannot be read.
        """
        fd = os.open(path, os.O_RDWR)
        try:
            shape = _read_header(fd)
            if (shape.key, shape.block_bytes) != (key, block_bytes):
                raise SegmentError("belongs to another model or format")
            segment = cls(path, fd, shape, [])
            segment._read_table()
        except BaseException:
            os.close(fd)
            raise
        return segment

    @property
    def num_bytes(self) -> int:
        """How far the file reaches."""
        return self.shape.data_start + len(self.hashes) * self.shape.block_bytes

    @property
    def num_free_slots(self) -> int:
        """How many blocks can be appended."""
        return self.shape.num_slots - len(self.hashes)

    def append(self, blocks: Sequence[tuple[bytes, Buffer]]) -> None:
        """Append blocks under their hashes; there must be as many free slots.

        Raises:
            OSError: the blocks could not be written; none of them is kept.
        """
        first, size = len(self.hashes), self.shape.block_bytes
        assert len(blocks) <= self.num_free_slots
        _write(self._fd, [data for _, data in blocks], self.shape.data_start + first * size)
        entries = [
            self._entry(first + i, prefix_hash, crc32(data))
            for i, (prefix_hash, data) in enumerate(blocks)
        ]
        _write(self._fd, [b"".join(entries)], _TABLE_START + first * _ENTRY_BYTES)
        self.hashes += [prefix_hash for prefix_hash, _ in blocks]

    def read(self, slot: int, out: memoryview) -> bool:
        """Read a block; False if what the file holds is not the block that was written."""
        entry = os.pread(self._fd, _ENTRY_BYTES, _TABLE_START + slot * _ENTRY_BYTES)
        offset = self.shape.data_start + slot * self.shape.block_bytes
        if os.preadv(self._fd, [out], offset) != self.shape.block_bytes:
            return False
        prefix_hash = self.hashes[slot]
        assert prefix_hash is not None
        return entry == self._entry(slot, prefix_hash, crc32(out))

    def erase(self, slot: int) -> None:
        """Forget a block for ever."""
        self.hashes[slot] = None
        os.pwrite(self._fd, _BLANK, _TABLE_START + slot * _ENTRY_BYTES)

    def touch(self) -> None:
        """Note in the file that it was used just now."""
        now = time.time_ns()  # Finer than what the system would take.
        os.utime(self._fd, ns=(now, now))

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _entry(self, slot: int, prefix_hash: bytes, checksum: int) -> bytes:
        """A slot's entry; its own checksum tells it from one of another slot or segment."""
        entry = _ENTRY.pack(prefix_hash, checksum)
        return entry + _CHECKSUM.pack(crc32(entry, self._seed ^ slot))

    def _read_table(self) -> None:
        """Take the valid entries; what follows the last of them is a torn tail and cut."""
        size = self.shape.block_bytes
        num_written = (os.fstat(self._fd).st_size - self.shape.data_start) // size
        table = os.pread(self._fd, self.shape.num_slots * _ENTRY_BYTES, _TABLE_START)
        hashes: list[bytes | None] = []
        for slot in range(min(len(table) // _ENTRY_BYTES, num_written)):
            entry = table[slot * _ENTRY_BYTES : (slot + 1) * _ENTRY_BYTES]
            prefix_hash, checksum = _ENTRY.unpack_from(entry)
            is_valid = entry == self._entry(slot, prefix_hash, checksum)
            hashes.append(prefix_hash if is_valid else None)
        while hashes and hashes[-1] is None:
            hashes.pop()
        self.hashes = hashes


def _header(shape: Shape) -> bytes:
    return _HEADER.pack(_MAGIC, _VERSION, shape.num_slots, shape.block_bytes, shape.key)


def _read_header(fd: int) -> Shape:
    raw = os.pread(fd, _HEADER.size + _CHECKSUM.size, 0)
    if len(raw) < _HEADER.size + _CHECKSUM.size or not raw.startswith(_MAGIC):
        raise SegmentError("is no file of KV blocks")
    _, version, num_slots, block_bytes, key = _HEADER.unpack_from(raw)
    if raw[_HEADER.size :] != _CHECKSUM.pack(crc32(raw[: _HEADER.size])):
        raise SegmentError("has a damaged header")
    if version != _VERSION:
        raise SegmentError(f"is of version {version}")
    return Shape(key, block_bytes, num_slots)


def _write(fd: int, buffers: Sequence[Buffer], offset: int) -> None:
    """Write all of it, or raise OSError."""
    wanted = sum(len(memoryview(b).cast("B")) for b in buffers)
    if os.pwritev(fd, buffers, offset) != wanted:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
