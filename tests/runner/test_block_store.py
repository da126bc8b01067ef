"""DiskBlockStore: what it gives back, after whatever has happened to its files."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from octavo.errors import ConfigError
from octavo.runner import block_segment, block_store
from octavo.runner.block_segment import Segment
from octavo.runner.block_store import DiskBlockStore

BLOCK_BYTES = 5000
KEY = b"a model, a format"
Make = Callable[..., DiskBlockStore]


def name(number: int) -> bytes:
    return sha256(b"%d" % number).digest()


def names(count: int) -> list[bytes]:
    return [name(n) for n in range(count)]


def block(number: int) -> bytes:
    return random.Random(number).randbytes(BLOCK_BYTES)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes stores over one folder; closes those that a test has left open."""
    made: list[DiskBlockStore] = []

    def make_store(**changes: Any) -> DiskBlockStore:
        values = {"folder": tmp_path / "kv", "key": KEY, "block_bytes": BLOCK_BYTES}
        store = DiskBlockStore(**{**values, "max_bytes": 1 << 20, **changes})
        made.append(store)
        return store

    yield make_store
    for store in made:
        store.close()


def settle(store: DiskBlockStore) -> None:
    """Wait until everything that was put is written."""
    deadline = time.monotonic() + 10
    while store._queue:
        assert time.monotonic() < deadline, "the writer does not write"
        time.sleep(0.001)


def put(store: DiskBlockStore, *numbers: int) -> None:
    """Put blocks one after another, each written before the next."""
    for number in numbers:
        store.put(name(number), block(number))
        settle(store)


def known(store: DiskBlockStore, numbers: range) -> set[int]:
    return {n for n in numbers if store.contains(name(n))}


def check(store: DiskBlockStore, *numbers: int) -> None:
    """The store has these blocks."""
    for number, data in zip(numbers, store.get([name(n) for n in numbers]), strict=True):
        assert data is not None, number
        assert bytes(data) == block(number), number


def segments(store: DiskBlockStore) -> list[Path]:
    return sorted(store._folder.glob("*.kv"))


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


def test_what_is_put_comes_back(make: Make) -> None:
    store = make()
    assert store.get([]) == []
    assert store.get([name(1)]) == [None]
    put(store, *range(40))
    check(store, 3, 1, 39, 3)
    assert store.get([name(1), name(99), name(2)])[1] is None
    assert known(store, range(50)) == set(range(40))
    stats = store.stats()
    assert (stats.num_blocks, stats.num_writes, stats.num_hits) == (40, 40, 6)
    assert stats.num_bytes == sum(p.stat().st_size for p in segments(store))
    assert (stats.num_drops, stats.num_corrupt) == (0, 0)
    put(store, 3, 4)
    assert store.stats().num_writes == 40, "a block that is known is not written again"


def test_blocks_survive_a_restart(make: Make) -> None:
    first = make()
    put(first, *range(30))
    first.close()
    second = make()
    assert second.stats().num_blocks == 30
    check(second, *range(30))
    # Segments that are half full are filled before new ones are made.
    put(second, *range(30, 45))
    second.close()
    third = make()
    check(third, *range(45))
    num_slots = third._shape.num_slots
    assert len(segments(third)) == -(-45 // num_slots)


def test_close_writes_what_waits(make: Make) -> None:
    store = make()
    for number in range(60):
        store.put(name(number), block(number))
    store.close()
    store.close()
    check(make(), *range(60))


def test_a_block_is_served_while_it_waits(make: Make) -> None:
    store = make()
    with store._clearing:  # The writer waits for this.
        store.put(name(1), block(1))
        assert store.contains(name(1))
        check(store, 1)
    settle(store)
    check(store, 1)


def test_too_many_waiting_blocks_are_dropped_and_counted(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_store, "QUEUE_BYTES", 4 * BLOCK_BYTES)
    store = make()
    put(store, 0)
    with store._clearing:
        # The writer may have taken none of them yet, for it waits.
        assert [*store.reserve(names(7))] == names(5)[1:]
        assert store.stats().num_drops == 2
        for number in range(1, 6):
            store.put(name(number), block(number))
        assert store.stats().num_drops == 3
        assert not store.reserve(names(6))
    settle(store)
    assert known(store, range(9)) == {0, 1, 2, 3, 4}


def test_the_bound_is_kept_and_the_oldest_segment_goes(make: Make) -> None:
    max_bytes = 300_000
    store = make(max_bytes=max_bytes)
    num_slots = store._shape.num_slots
    assert num_slots >= 3
    for number in range(100):
        put(store, number)
        on_disk = sum(p.stat().st_size for p in segments(store))
        assert store.stats().num_bytes == on_disk <= max_bytes
    kept = known(store, range(100))
    assert kept == set(range(min(kept), 100)), "the last ones are kept"
    assert len(kept) > max_bytes // BLOCK_BYTES // 2
    check(store, *kept)


@pytest.mark.parametrize("how", ["read", "evicted from the pool once more"])
def test_a_segment_that_was_used_outlives_older_ones(make: Make, how: str) -> None:
    store = make(max_bytes=300_000)
    num_slots = store._shape.num_slots
    put(store, *range(2 * num_slots))
    if how == "read":
        check(store, 0)
    else:
        assert not store.reserve([name(1)])
    number = 2 * num_slots
    while store.contains(name(num_slots)):
        put(store, number)
        number += 1
    check(store, *range(num_slots))
    while store.contains(name(0)):
        put(store, number)
        number += 1
    check(store, *range(number - num_slots, number))


def test_the_order_of_use_survives_a_restart(make: Make) -> None:
    first = make(max_bytes=300_000)
    num_slots = first._shape.num_slots
    put(first, *range(3 * num_slots))
    check(first, 0)
    first.close()
    second = make(max_bytes=300_000)
    number = 1000
    while second.contains(name(num_slots)):
        put(second, number)
        number += 1
    check(second, 0, 2 * num_slots)


def test_a_smaller_bound_drops_at_once(make: Make) -> None:
    first = make()
    put(first, *range(150))
    first.close()
    second = make(max_bytes=400_000)
    assert second.stats().num_bytes <= 400_000
    put(second, *range(200, 230))
    assert second.stats().num_bytes <= 400_000
    check(second, *range(220, 230))


def test_the_bound_holds_while_an_old_segment_is_filled(make: Make) -> None:
    first = make(max_bytes=300_000)
    num_slots = first._shape.num_slots
    put(first, *range(4 * num_slots + 1))
    first.close()
    max_bytes = first.stats().num_bytes + BLOCK_BYTES
    second = make(max_bytes=max_bytes)
    put(second, *range(100, 100 + num_slots - 1))
    assert sum(p.stat().st_size for p in segments(second)) <= max_bytes


# ---- Nothing is trusted ---------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, BLOCK_BYTES - 1, BLOCK_BYTES, 3 * BLOCK_BYTES + 17])
def test_a_torn_tail_is_cut(make: Make, cut: int, caplog: pytest.LogCaptureFixture) -> None:
    first = make()
    put(first, *range(10))
    first.close()
    [path] = segments(first)
    os.truncate(path, path.stat().st_size - cut)
    second = make()
    num_left = 10 - -(-cut // BLOCK_BYTES)
    assert known(second, range(10)) == set(range(num_left))
    check(second, *range(num_left))
    put(second, *range(20, 30))
    second.close()
    third = make()
    check(third, *range(num_left), *range(20, 30))
    assert third.stats().num_blocks == num_left + 10
    assert not caplog.records, "what a kill leaves behind is no fault"


@pytest.mark.parametrize("at", [0, 12, 30, 57, 64, 100, 140])
def test_any_flipped_byte_of_the_table_is_noticed(make: Make, at: int) -> None:
    """Header, a hash, a checksum: a block is either right or unknown."""
    first = make()
    put(first, *range(5))
    first.close()
    flip(segments(first)[0], at)
    second = make()
    found = second.get([name(n) for n in range(5)])
    assert sum(data is None for data in found) == (5 if at < 60 else 1)
    for number, data in enumerate(found):
        assert data is None or bytes(data) == block(number)


def test_a_flipped_byte_of_a_block_is_noticed(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    first = make()
    put(first, *range(8))
    start = first._shape.data_start
    flip(segments(first)[0], start + 2 * BLOCK_BYTES + 77)
    flip(segments(first)[0], start + 5 * BLOCK_BYTES)
    assert [d is None for d in first.get([name(n) for n in range(8)])] == [
        n in (2, 5) for n in range(8)
    ]
    assert first.stats().num_corrupt == 2
    assert len(caplog.records) == 1, "reported once"
    assert "damaged" in caplog.text
    assert known(first, range(8)) == {0, 1, 3, 4, 6, 7}
    put(first, 2)
    check(first, 2, 0)
    first.close()
    second = make()
    assert known(second, range(8)) == {0, 1, 2, 3, 4, 6, 7}
    check(second, 2)


def test_blocks_that_changed_places_are_noticed(make: Make) -> None:
    first = make()
    put(first, *range(4))
    first.close()
    path, size = segments(first)[0], 40
    raw = bytearray(path.read_bytes())
    # The entry of slot 1 also in slot 2, and the block of slot 0 in slot 3.
    raw[64 + 2 * size : 64 + 3 * size] = raw[64 + size : 64 + 2 * size]
    start = first._shape.data_start
    raw[start + 3 * BLOCK_BYTES : start + 4 * BLOCK_BYTES] = raw[start : start + BLOCK_BYTES]
    path.write_bytes(raw)
    second = make()
    assert known(second, range(4)) == {0, 1, 3}
    assert second.get([name(3)]) == [None]
    check(second, 0, 1)


def test_blocks_of_another_key_are_not_served(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    first = make()
    put(first, *range(20))
    first.close()
    other = make(key=b"another model")
    assert known(other, range(20)) == set()
    assert other.get([name(3)]) == [None]
    assert len(caplog.records) == 1
    assert "another model" in caplog.text
    # They count against the bound, and they are what goes first.
    assert other.stats().num_bytes == sum(p.stat().st_size for p in segments(other)) > 0
    put(other, *range(100, 110))
    other.close()
    check(make(), *range(20))


def test_blocks_of_another_size_are_not_served(make: Make) -> None:
    first = make()
    put(first, 1)
    first.close()
    assert not make(block_bytes=BLOCK_BYTES * 2).contains(name(1))


def test_segments_of_another_key_go_first(make: Make) -> None:
    first = make(max_bytes=300_000, key=b"old")
    put(first, *range(100))
    first.close()
    second = make(max_bytes=300_000)
    put(second, *range(100))
    assert second.stats().num_bytes <= 300_000
    kept = known(second, range(100))
    assert len(kept) > 300_000 // BLOCK_BYTES // 2
    second.close()
    assert not known(make(max_bytes=300_000, key=b"old"), range(100))


def test_files_of_others_are_left_alone(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    first = make(max_bytes=300_000)
    put(first, 1)
    first.close()
    folder = first._folder
    (folder / "holiday.jpeg").write_bytes(bytes(500_000))
    (folder / "00000007.kv").write_bytes(b"nonsense" * 10)
    (folder / "00000003.kv").write_bytes(b"")
    second = make(max_bytes=300_000)
    check(second, 1)
    assert len(caplog.records) == 1, "reported once"
    assert "and 2 more files" in caplog.text
    put(second, *range(100, 200))
    check(second, 199)
    assert (folder / "holiday.jpeg").stat().st_size == 500_000
    assert not (folder / "00000007.kv").exists(), "a damaged segment goes like an old one"


def test_a_draft_is_no_segment(make: Make) -> None:
    first = make()
    put(first, 1)
    first.close()
    (first._folder / "00000002.draft").write_bytes(b"half a header")
    second = make()
    check(second, 1)
    assert not list(second._folder.glob("*.draft"))


# ---- Forgetting -----------------------------------------------------------------------------


def test_discarded_blocks_never_come_back(make: Make) -> None:
    first = make()
    put(first, *range(6))
    with first._clearing:
        first.put(name(7), block(7))
    first.discard([name(2), name(5), name(7), name(99)])
    settle(first)
    assert known(first, range(9)) == {0, 1, 3, 4}
    first.close()
    assert known(make(), range(9)) == {0, 1, 3, 4}


def test_clear_forgets_all(make: Make) -> None:
    store = make()
    put(store, *range(30))
    store.put(name(50), block(50))
    store.discard(None)
    assert known(store, range(60)) == set()
    assert segments(store) == []
    put(store, 3)
    check(store, 3)


# ---- Faults of the disk ---------------------------------------------------------------------


def test_a_full_disk_turns_the_store_off(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = make()
    put(store, *range(5))
    real, left = os.pwritev, [3 * BLOCK_BYTES]

    def fill(fd: int, buffers: Any, offset: int) -> int:
        wanted = sum(map(len, buffers))
        if wanted > left[0]:
            part = b"".join(bytes(b) for b in buffers)[: left[0]]
            left[0] = 0
            if not part:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(fd, [part], offset)
        left[0] -= wanted
        return real(fd, buffers, offset)

    monkeypatch.setattr(block_segment.os, "pwritev", fill)
    for number in range(10, 20):
        store.put(name(number), block(number))
    store._writer.join(timeout=10)
    assert not store._writer.is_alive()
    assert len(caplog.records) == 1, "reported once"
    assert "No space left" in caplog.text
    store.put(name(1), block(1))
    assert not store.reserve([name(1)])
    assert store.get([name(0), name(1)]) == [None, None]
    assert not store.contains(name(0))
    store.discard([name(0)])
    store.close()
    store.close()
    monkeypatch.undo()
    again = make()
    check(again, *range(5))
    for number in known(again, range(10, 20)):
        check(again, number)


def test_what_is_turned_off_can_still_be_cleared(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make()
    put(store, *range(5))
    with store._changed:
        store._turn_off(OSError(errno.EIO, "broken"))
    store.discard(None)
    assert segments(store) == []
    assert store.stats().num_bytes == 0


def test_a_disk_that_became_read_only(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = make()
    put(store, *range(5))

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(block_segment.os, "utime", fail)
    check(store, 1)
    assert not store.contains(name(1))
    assert "Read-only file system" in caplog.text


def test_turned_off_in_the_midst_of_a_write(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = make()
    real = Segment.append

    def append(segment: Segment, blocks: Any) -> None:
        real(segment, blocks)
        with store._changed:
            store._turn_off(OSError(errno.EIO, os.strerror(errno.EIO)))

    monkeypatch.setattr(Segment, "append", append)
    store.put(name(1), block(1))
    store._writer.join(timeout=10)
    assert not store._writer.is_alive()
    assert not store.contains(name(1))
    assert "turned off until the next start: Input/output error" in caplog.text


def test_a_folder_that_cannot_be_made(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't be used"):
        make(folder=tmp_path / "file" / "kv")


def test_a_bound_below_a_block(make: Make) -> None:
    with pytest.raises(ConfigError, match="holds no block of 5,000 bytes; give it at least"):
        make(max_bytes=BLOCK_BYTES)


def test_nobody_but_us_can_read_the_blocks(make: Make) -> None:
    store = make()
    put(store, 1)
    assert store._folder.stat().st_mode & 0o077 == 0
    assert segments(store)[0].stat().st_mode & 0o077 == 0


# ---- Threads and processes ------------------------------------------------------------------


def test_reading_while_writing_and_dropping(make: Make) -> None:
    store = make(max_bytes=400_000)
    done = threading.Event()
    faults: list[str] = []

    def read() -> None:
        dice = random.Random(1)
        while not done.is_set():
            numbers = [dice.randrange(300) for _ in range(8)]
            for number, data in zip(numbers, store.get([name(n) for n in numbers]), strict=True):
                if data is not None and bytes(data) != block(number):
                    faults.append(f"{number} is another block")

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(300):
        store.put(name(number), block(number))
        if number % 60 == 59:
            store.discard([name(number)])
    settle(store)
    done.set()
    reader.join()
    assert not faults
    assert store.stats().num_corrupt == 0
    assert store.stats().num_bytes <= 400_000


CHILD = """
import sys, time
from hashlib import sha256
from pathlib import Path
import random
from octavo.errors import ConfigError
from octavo.runner.block_store import DiskBlockStore
try:
    store = DiskBlockStore(Path(sys.argv[1]), sys.argv[2].encode(), int(sys.argv[3]), 1 << 20)
except ConfigError as error:
    print(error)
    sys.exit(3)
print("open", flush=True)
number = 0
while True:
    store.put(sha256(b"%d" % number).digest(), random.Random(number).randbytes(int(sys.argv[3])))
    number += 1
    time.sleep(0)
"""


def start_child(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), KEY.decode(), str(BLOCK_BYTES)],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_killed_at_any_moment(make: Make, tmp_path: Path) -> None:
    for round_number in range(4):
        with start_child(tmp_path / "kv") as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "open\n"
            time.sleep(0.05 + 0.03 * round_number)
            child.send_signal(signal.SIGKILL)
        store = make()
        found = known(store, range(100_000))
        assert len(found) > 1
        check(store, *found)
        assert store.stats().num_corrupt == 0
        store.close()


def test_a_folder_serves_one_process(make: Make) -> None:
    store = make()
    with pytest.raises(ConfigError, match="in use by another engine; give each one a folder"):
        make()
    with start_child(store._folder) as child:
        assert child.stdout is not None
        assert "in use by another engine" in child.stdout.read()
    assert child.returncode == 3
    store.close()
    make()
