"""What it costs to keep KV blocks on disk, and what it saves.

    python benchmarks/kv_disk.py --model smollm2 --tokens 1024

Writes blocks of the model's size as segments and as one file each and reads them back from the
page cache, with the checksums that could guard them. Then times a prompt's first token: computed,
from the disk after other prompts have evicted it, from the pool, and from the disk after a restart;
the answers must be the same. Times are medians.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from statistics import median

from octavo.config import EngineConfig, available_cpus
from octavo.engine.core import EngineCore
from octavo.runner.block_segment import Segment, Shape, digest
from octavo.runner.block_store import BATCH_BLOCKS, SEGMENT_BYTES
from octavo.types import EngineRequest, SamplingParams
from octavo.weights import source

NUM_BLOCKS = 300
CHECKSUMS: dict[str, Callable[[bytes], object]] = {
    "crc32": zlib.crc32,
    "sha256": lambda data: hashlib.sha256(data).digest(),
    "blake2b": lambda data: hashlib.blake2b(data, digest_size=16).digest(),
}


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class Stores:
    """The two ways of keeping blocks in a folder."""

    def __init__(self, folder: Path, block_bytes: int) -> None:
        """Make up blocks."""
        self._folder = folder
        self._shape = Shape(digest(b""), block_bytes, max(1, SEGMENT_BYTES // block_bytes))
        self._blocks = [os.urandom(block_bytes) for _ in range(16)]
        self._names = [os.urandom(32) for _ in range(NUM_BLOCKS)]

    def clear(self) -> None:
        """Start with an empty folder."""
        shutil.rmtree(self._folder)
        self._folder.mkdir()

    def write_segments(self) -> None:
        """As the store does."""
        done = 0
        while done < NUM_BLOCKS:
            segment = Segment.create(self._folder / f"{done}.kv", self._shape)
            end = min(NUM_BLOCKS, done + self._shape.num_slots)
            for first in range(done, end, BATCH_BLOCKS):
                batch = range(first, min(end, first + BATCH_BLOCKS))
                segment.append([(self._names[i], self._blocks[i % 16]) for i in batch])
            segment.close()
            done = end

    def read_segments(self) -> None:
        """Open each and read all of it."""
        for path in self._folder.glob("*.kv"):
            segment = Segment.open(path, self._shape.key, self._shape.block_bytes)
            for slot in range(len(segment.hashes)):
                assert segment.read(slot, memoryview(bytearray(self._shape.block_bytes)))
            segment.close()

    def write_files(self) -> None:
        """One file a block, under its name when it is whole."""
        for i, name in enumerate(self._names):
            data = self._blocks[i % 16]
            path = self._folder / name.hex()
            fd = os.open(path.with_suffix(".draft"), os.O_WRONLY | os.O_CREAT, 0o600)
            os.writev(fd, [zlib.crc32(data).to_bytes(4, "little"), data])
            os.close(fd)
            path.with_suffix(".draft").rename(path)

    def read_files(self) -> None:
        """Open and read each."""
        for name in self._names:
            fd = os.open(self._folder / name.hex(), os.O_RDONLY)
            buffer = memoryview(bytearray(self._shape.block_bytes + 4))
            os.readv(fd, [buffer])
            os.close(fd)
            assert zlib.crc32(buffer[4:]).to_bytes(4, "little") == buffer[:4]


def measure_stores(folder: Path, block_bytes: int, rounds: int) -> dict[str, float]:
    """Microseconds a block, and GB/s of the checksums."""
    stores = Stores(folder, block_bytes)
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        for work in ("segments", "files"):
            stores.clear()
            for verb in ("write", "read"):
                seconds = timed(getattr(stores, f"{verb}_{work}"))
                times.setdefault(f"{verb} {work}, us a block", []).append(seconds)
    stores.clear()
    found = {name: median(values) / NUM_BLOCKS * 1e6 for name, values in times.items()}
    data = os.urandom(block_bytes)
    for name, checksum in CHECKSUMS.items():
        seconds = median(timed(lambda: checksum(data)) for _ in range(30))  # noqa: B023
        found[f"{name}, GB/s"] = block_bytes / seconds / 1e9
    return found


class Asker:
    """Asks one engine after the other, and checks that the same prompt has the same answer."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Make up prompts."""
        self.model = str(source.resolve(options.model))
        self._options = options
        dice = random.Random(1)
        self.prompts = [
            [dice.randrange(1000, 30000) for _ in range(options.tokens)] for _ in "123456"
        ]
        self._answer: object = None

    def start(self, folder: Path | None) -> EngineCore:
        """An engine whose pool holds little more than a prompt."""
        config = EngineConfig(
            model=self.model, served_name="m", memory_bytes=self._options.memory << 20,
            num_threads=available_cpus(), kv_disk=None if folder is None else str(folder),
        )  # fmt: skip
        return EngineCore.load(config.validate())

    def ask(self, core: EngineCore, number: int = 0) -> tuple[float, int]:
        """Seconds to the first token of a prompt, and how many of its tokens were cached."""
        params = SamplingParams(temperature=0.0, max_tokens=4, seed=0, logprobs=1)
        request = EngineRequest(request_id="r", prompt_ids=self.prompts[number], params=params)
        core.add(request)
        began = time.perf_counter()
        updates = core.step()
        while not updates:
            updates += core.step()
        seconds, num_cached = time.perf_counter() - began, updates[0].num_cached_tokens
        while core.has_work():
            updates += core.step()
        answer = [(u.token_ids, u.logprobs) for u in updates]
        if number == 0:
            assert self._answer in (None, answer), "another answer"
            self._answer = answer
        return seconds, num_cached

    def evict(self, core: EngineCore) -> None:
        """Run all other prompts."""
        for number in range(1, len(self.prompts)):
            self.ask(core, number)


def measure_first_token(asker: Asker, folder: Path, rounds: int) -> dict[str, float]:
    """Milliseconds to the first token."""
    times: dict[str, list[float]] = {}

    def note(name: str, core: EngineCore, least_cached: float) -> None:
        seconds, num_cached = asker.ask(core)
        assert num_cached >= least_cached * len(asker.prompts[0]), "it was not cached"
        times.setdefault(f"first token, {name}, ms", []).append(seconds)

    core = asker.start(folder)
    asker.ask(core, 1)  # The first step of all touches memory.
    note("computed", core, 0)
    for _ in range(rounds):
        asker.evict(core)
        note("from the disk", core, 0.9)
        note("from the pool", core, 0.9)
    asker.evict(core)
    core.close()
    for _ in range(rounds):
        core = asker.start(folder)
        note("from the disk after a restart", core, 0.9)
        core.close()
        core = asker.start(None)
        note("computed", core, 0)
        core.close()
    return {name: median(values) * 1e3 for name, values in times.items()}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=1024, help="of a prompt")
    parser.add_argument("--memory", type=int, default=64, help="MiB of the KV pool")
    parser.add_argument("--folder", help="on the disk to measure (default: the system's)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    asker = Asker(options)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        core = asker.start(None)
        pool = core.capacity.kv_pool
        core.close()
        block_bytes = pool.num_bytes // pool.num_blocks
        stores, engine = Path(name) / "stores", Path(name) / "engine"
        stores.mkdir()
        found = {"bytes of a block": float(block_bytes)}
        found |= measure_stores(stores, block_bytes, options.rounds)
        found |= measure_first_token(asker, engine, options.rounds)
    if options.json:
        print(json.dumps(found))
    else:
        print("\n".join(f"{name:<45} {value:>12,.2f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
