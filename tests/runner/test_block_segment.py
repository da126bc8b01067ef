"""The file format of segments."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from octavo.runner import block_segment
from octavo.runner.block_segment import Segment, SegmentError, Shape, digest


def test_the_format_of_a_segment(tmp_path: Path) -> None:
    """What is on users' disks: a change of it needs a new version."""
    shape = Shape(digest(b"key"), 3, 2)
    segment = Segment.create(tmp_path / "1.kv", shape)
    segment.append([(b"h" * 32, b"abc")])
    segment.close()
    raw = (tmp_path / "1.kv").read_bytes()
    assert len(raw) == 4096 + 3
    assert raw[:24] == b"octavoKV" + bytes([1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0])
    assert raw[24:56] == sha256(b"key").digest()
    assert raw[64:96] == b"h" * 32
    assert raw[96:100] == (0x352441C2).to_bytes(4, "little")  # CRC-32 of "abc"
    assert raw[4096:] == b"abc"
    with pytest.raises(SegmentError, match="version 2"):
        header = bytearray(raw[:56])
        header[8] = 2
        checksum = block_segment.crc32(header).to_bytes(4, "little")
        (tmp_path / "1.kv").write_bytes(header + checksum + raw[60:])
        Segment.open(tmp_path / "1.kv", shape.key, 3)
