"""Blocks that come back from the disk or from host memory change no byte of any answer."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM
from octavo.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.engine.llm import engine_config
from octavo.errors import ConfigError
from octavo.runner.store_tier import Level
from octavo.types import EngineRequest, EngineStats, SamplingParams, TokenLogprob

Answer = tuple[tuple[int, ...], tuple[TokenLogprob, ...]]
BLOCK_SIZE = 8
TOKEN_BYTES = {"fp16": 2 * 2 * 2 * 16 * 2, "int8": 2 * 2 * 2 * 20}  # of the tiny model
TORCH: dict[str, Any] = {"backend": "torch", "device": "cpu", "deterministic": True}


@pytest.fixture(autouse=True)
def always_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """This model is so small that reading might not pay."""
    monkeypatch.setattr(Level, "pays", lambda self, computing_s: True)


@pytest.fixture(scope="module")
def requests() -> list[EngineRequest]:
    """Prompts of which some begin alike; together they need several times the small pool."""
    dice = random.Random(5)
    shared = [dice.randrange(200) for _ in range(60)]
    made = []
    for number in range(14):
        own = [dice.randrange(200) for _ in range(dice.randint(1, 30))]
        prompt = shared[: dice.choice([0, 24, 60])] + own
        many = {"use_beam_search": True, "best_of": 3} if number % 5 == 4 else {"logprobs": 3}
        params = SamplingParams(
            temperature=0.0 if number % 5 else 0.9, n=dice.choice([1, 1, 2]), seed=number,
            max_tokens=dice.randint(1, 12 if number % 5 == 4 else 60), ignore_eos=True, **many,
        )  # fmt: skip
        request = EngineRequest(request_id=str(number), prompt_ids=prompt, params=params)
        made.append(request)
    return made


def start(model: Path, num_blocks: int, **options: Any) -> EngineCore:
    kv_dtype = options.get("kv_dtype", "fp16")
    settings = {
        "memory_bytes": num_blocks * BLOCK_SIZE * TOKEN_BYTES[kv_dtype],
        "num_threads": 1,
        "block_size": BLOCK_SIZE,
        **options,
    }
    config = EngineConfig(model=str(model), served_name="m", **settings)
    return EngineCore.load(config.validate())


def answer(core: EngineCore, requests: list[EngineRequest]) -> dict[tuple[str, int], Answer]:
    """All at once."""
    tokens: dict[tuple[str, int], tuple[int, ...]] = {}
    logprobs: dict[tuple[str, int], tuple[TokenLogprob, ...]] = {}
    for request in requests:
        core.add(request)
    while core.has_work():
        for update in core.step():
            key = update.request_id, update.index
            tokens[key] = tokens.get(key, ()) + update.token_ids
            logprobs[key] = logprobs.get(key, ()) + update.logprobs
    assert core.stats().cache.num_blocks_used == 0
    return {key: (tokens[key], logprobs[key]) for key in tokens}


def run(
    model: Path, requests: list[EngineRequest], num_blocks: int, times: int = 1, **options: Any
) -> tuple[list[dict[tuple[str, int], Answer]], EngineStats]:
    core = start(model, num_blocks, **options)
    try:
        runs = [answer(core, requests) for _ in range(times)]
        return runs, core.stats()
    finally:
        core.close()


@pytest.mark.parametrize("kv_dtype", ["fp16", "int8"])
@pytest.mark.parametrize(("chunk", "threads"), [(7, 1), (19, 2), (512, 1)])
def test_the_same_bytes(
    tiny_model_path: Path,
    requests: list[EngineRequest],
    tmp_path: Path,
    kv_dtype: str,
    chunk: int,
    threads: int,
) -> None:
    """Cold, from the pool, from the disk, and from the disk after a restart."""
    options = {"kv_dtype": kv_dtype, "max_num_batched_tokens": chunk, "num_threads": threads}
    [expected], _ = run(tiny_model_path, requests, 400, use_prefix_cache=False, kv_dtype=kv_dtype)
    (cold, warm), stats = run(tiny_model_path, requests, 400, 2, **options)
    assert cold == warm == expected
    assert stats.cache.num_hits > 0
    disk = {"kv_disk": str(tmp_path / "kv"), "kv_disk_bytes": 8 << 20, **options}
    (first, second), stats = run(tiny_model_path, requests, 24, 2, **disk)
    assert first == second == expected
    assert stats.cache.lower.disk.num_hits > 5
    assert stats.num_preemptions > 0
    (third,), stats = run(tiny_model_path, requests, 24, **disk)
    assert third == expected
    assert stats.cache.lower.disk.num_hits > 5
    assert stats.cache.lower.disk.num_corrupt == stats.cache.lower.disk.num_drops == 0


def test_damaged_files_change_nothing(
    tiny_model_path: Path, requests: list[EngineRequest], tmp_path: Path
) -> None:
    disk = {"kv_disk": str(tmp_path), "kv_disk_bytes": 8 << 20}
    [expected], _ = run(tiny_model_path, requests, 24, **disk)
    for path in tmp_path.glob("*.kv"):
        raw = bytearray(path.read_bytes())
        for at in range(5000, len(raw), 5000):
            raw[at] ^= 4
        path.write_bytes(raw)
    [answers], stats = run(tiny_model_path, requests, 24, **disk)
    assert answers == expected
    assert stats.cache.lower.disk.num_corrupt > 0


def test_a_prompt_that_was_seen_before_the_restart(tiny_model_path: Path, tmp_path: Path) -> None:
    """What is not computed is seen in the usage."""
    prompt, other = list(range(100)), [7] * 120
    request = EngineRequest(
        request_id="a", prompt_ids=prompt, params=SamplingParams(max_tokens=1, seed=0)
    )
    evictor = EngineRequest(
        request_id="b", prompt_ids=other, params=SamplingParams(max_tokens=1, seed=0)
    )
    disk = {"kv_disk": str(tmp_path), "kv_disk_bytes": 8 << 20}
    run(tiny_model_path, [request], 16, **disk)
    core = start(tiny_model_path, 16, **disk)
    core.add(request)
    assert [u.num_cached_tokens for u in core.step()] == [0], "nothing was evicted yet"
    core.add(evictor)
    core.step()
    core.close()
    core = start(tiny_model_path, 16, **disk)
    core.add(request)
    [update] = core.step()
    assert update.num_cached_tokens == 96
    assert core.stats().prompt_tokens == 100
    core.close()


def test_another_form_of_blocks_is_not_read(
    tiny_model_path: Path, requests: list[EngineRequest], tmp_path: Path
) -> None:
    disk = {"kv_disk": str(tmp_path), "kv_disk_bytes": 8 << 20}
    run(tiny_model_path, requests, 24, **disk)
    core = start(tiny_model_path, 24, kv_dtype="int8", **disk)
    assert core.stats().cache.lower.disk.num_blocks == 0
    core.close()


@pytest.mark.parametrize(
    ("kv_dtype", "num_rooms", "has_disk"), [("fp16", 200, False), ("int8", 40, True)]
)
def test_the_same_bytes_from_host_memory(
    tiny_model_path: Path,
    requests: list[EngineRequest],
    tmp_path: Path,
    kv_dtype: str,
    num_rooms: int,
    has_disk: bool,
) -> None:
    options = {**TORCH, "kv_dtype": kv_dtype}
    [expected], _ = run(tiny_model_path, requests, 400, use_prefix_cache=False, **options)
    options["kv_host_bytes"] = num_rooms * BLOCK_SIZE * TOKEN_BYTES[kv_dtype]
    if has_disk:
        options |= {"kv_disk": str(tmp_path / "kv"), "kv_disk_bytes": 8 << 20}
    (first, second), stats = run(tiny_model_path, requests, 24, 2, **options)
    assert first == second == expected
    lower = stats.cache.lower
    assert lower.host.num_hits > 5
    assert lower.host.num_blocks <= num_rooms
    assert lower.host.num_bytes <= options["kv_host_bytes"]
    assert (lower.disk.num_writes > 5) == has_disk
    assert (lower.disk.num_hits > 0) == has_disk
    assert stats.num_preemptions > 0


def test_options_of_host_memory(tiny_model_path: Path) -> None:
    for backend in ("cpu", "reference"):
        with pytest.raises(ConfigError, match="memory already; give it more with --memory"):
            start(tiny_model_path, 24, kv_host_bytes=1 << 20, backend=backend)
    with pytest.raises(ConfigError, match="--kv-host keeps prefixes: leave out --no-prefix-cache"):
        start(tiny_model_path, 24, kv_host_bytes=1 << 20, use_prefix_cache=False, **TORCH)
    with pytest.raises(ConfigError, match="--kv-host must be at least 0"):
        start(tiny_model_path, 24, kv_host_bytes=-1, **TORCH)
    with pytest.raises(ConfigError, match="are free in the host's memory: lower it"):
        start(tiny_model_path, 24, kv_host_bytes=1 << 60, **TORCH)
    with pytest.raises(ConfigError, match="holds no block"):
        start(tiny_model_path, 24, kv_host_bytes=100, **TORCH)
    for size in ("1MiB", 1 << 20):
        config = engine_config(str(tiny_model_path), {"kv_host": size, **TORCH})
        assert config.kv_host_bytes == 1 << 20


def test_options(tiny_model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave out --no-prefix-cache"):
        start(tiny_model_path, 24, kv_disk=str(tmp_path), use_prefix_cache=False)
    with pytest.raises(ConfigError, match="--kv-disk-size must be at least 1"):
        start(tiny_model_path, 24, kv_disk=str(tmp_path), kv_disk_bytes=0)
    settings = {"memory": "1MiB", "kv_disk": str(tmp_path / "llm")}
    with LLM(str(tiny_model_path), kv_disk_size="1MiB", **settings) as llm:
        llm.generate({"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=2, seed=0))
        with pytest.raises(ConfigError, match="in use by another engine"):
            LLM(str(tiny_model_path), **settings)
    assert (tmp_path / "llm").exists()
