"""AsyncEngine and the engine process: real processes with the tiny model."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from octavo.config import EngineConfig
from octavo.engine.async_engine import AsyncEngine
from octavo.errors import (
    ConfigError,
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    OverloadedError,
)
from octavo.tokenizer.tokenizer import Tokenizer
from octavo.types import OPEN_CACHE, CacheParams, OutputDelta, SamplingParams

MakeConfig = Callable[..., EngineConfig]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def with_engine(
    config: EngineConfig, tokenizer: Tokenizer, use: Callable[[AsyncEngine], Awaitable[None]]
) -> None:
    """Launch an engine, use it, and see that it ends at once and leaves no process."""

    async def run() -> None:
        engine = AsyncEngine.launch(config, tokenizer)
        try:
            await asyncio.wait_for(use(engine), 60)
        finally:
            began = time.monotonic()
            await engine.close()
            assert time.monotonic() - began < 2
            assert not is_alive(engine.pid)

    asyncio.run(run())


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but is not yet reaped does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


async def collect(
    engine: AsyncEngine,
    prompt: list[int],
    params: SamplingParams,
    name: str = "a",
    pin_s: float = 0.0,
) -> list[OutputDelta]:
    stream = engine.generate(prompt, params, request_id=name, cache=CacheParams(pin_s=pin_s))
    return [d async for d in stream]


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.005)


def test_a_life_of_an_engine(tiny_config: MakeConfig, tiny_tokenizer: Tokenizer) -> None:
    async def use(engine: AsyncEngine) -> None:
        assert engine.phase == "starting"
        assert engine.capacity is None
        await asyncio.gather(engine.connect(), engine.connect())
        capacity = await engine.wait_ready()
        assert engine.phase == "ready"
        assert capacity.model == "tiny"
        assert capacity.max_model_len == 512
        assert engine.stats.generation_tokens == 0, "the warm-up is no request"

        first = await collect(engine, [1, 2, 3], GREEDY)
        ids = [i for d in first for i in d.token_ids]
        assert len(ids) == 8
        assert first[-1].finish_reason == "length"
        assert "".join(d.text for d in first) == tiny_tokenizer.decode(ids)
        assert {d.request_id for d in first} == {"a"}

        many = await asyncio.gather(*(collect(engine, [1, 2, 3], GREEDY) for _ in range(5)))
        assert [[i for d in one for i in d.token_ids] for one in many] == [ids] * 5
        await until(lambda: engine.stats.cache.num_blocks_used == 0)
        assert engine.num_requests == 0

    with_engine(tiny_config(), tiny_tokenizer, use)


def test_n_sequences_and_a_stop_string(tiny_config: MakeConfig, tiny_tokenizer: Tokenizer) -> None:
    async def use(engine: AsyncEngine) -> None:
        params = SamplingParams(n=3, seed=5, max_tokens=40, ignore_eos=True, logprobs=1)
        deltas = await collect(engine, [9, 9], params)
        texts = ["".join(d.text for d in deltas if d.index == i) for i in range(3)]
        assert len(set(texts)) == 3
        assert sorted(d.index for d in deltas if d.finish_reason) == [0, 1, 2]

        stop = texts[0][4:7]
        stopping = SamplingParams(seed=5, max_tokens=400, ignore_eos=True, stop=(stop,), logprobs=1)
        stopped = await collect(engine, [9, 9], stopping)
        assert "".join(d.text for d in stopped) == texts[0][: texts[0].index(stop)]
        assert (stopped[-1].finish_reason, stopped[-1].stop_reason) == ("stop", stop)
        assert sum(len(d.token_ids) for d in stopped) == sum(len(d.logprobs) for d in stopped)
        await until(lambda: engine.stats.cache.num_blocks_used == 0)
        assert engine.stats.generation_tokens < 400

    with_engine(tiny_config(), tiny_tokenizer, use)


def test_leaving_frees_the_blocks(tiny_config: MakeConfig, tiny_tokenizer: Tokenizer) -> None:
    async def use(engine: AsyncEngine) -> None:
        long = SamplingParams(temperature=0, max_tokens=480, ignore_eos=True)
        stream = engine.generate([1], long, request_id="closed")
        await anext(stream)
        assert engine.stats.num_running == 1
        await stream.aclose()  # type: ignore[attr-defined]
        await until(lambda: engine.stats.cache.num_blocks_used == 0)

        task = asyncio.create_task(collect(engine, [1], long, "cancelled"))
        await until(lambda: engine.stats.num_running == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: engine.stats.cache.num_blocks_used == 0)
        assert engine.num_requests == 0
        assert len(await collect(engine, [1], GREEDY)) > 0

    with_engine(tiny_config(), tiny_tokenizer, use)


def test_many_that_leave_at_any_moment_leave_nothing(
    tiny_config: MakeConfig, tiny_tokenizer: Tokenizer
) -> None:
    """B24: requests cancelled while they wait, compute their prompt, or stream; also n > 1."""

    async def use(engine: AsyncEngine) -> None:
        await engine.wait_ready()
        dice = random.Random(3)
        params = [
            SamplingParams(n=dice.choice([1, 1, 4]), max_tokens=300, ignore_eos=True)
            for _ in range(80)
        ]
        tasks = [
            asyncio.create_task(collect(engine, [number] * dice.randint(1, 200), its))
            for number, its in enumerate(params)
        ]
        for task in dice.sample(tasks, len(tasks)):
            await asyncio.sleep(dice.random() * 0.01)
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert any(isinstance(result, asyncio.CancelledError) for result in results)
        assert engine.num_requests == 0
        await until(lambda: engine.stats.cache.num_blocks_used == 0)
        assert engine.stats.num_running == engine.stats.num_waiting == 0
        answer = await collect(engine, [1, 2, 3], GREEDY)
        assert sum(len(d.token_ids) for d in answer) == 8

    with_engine(tiny_config(max_num_seqs=16), tiny_tokenizer, use)


def test_a_slow_consumer_gets_everything(
    tiny_config: MakeConfig, tiny_tokenizer: Tokenizer
) -> None:
    async def use(engine: AsyncEngine) -> None:
        params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
        quick = [i for d in await collect(engine, [4, 5], params) for i in d.token_ids]
        slow: list[OutputDelta] = []
        async for delta in engine.generate([4, 5], params, request_id="slow"):
            slow.append(delta)
            await asyncio.sleep(0.1)
        assert len(slow) < 40
        assert [i for d in slow for i in d.token_ids] == quick
        assert "".join(d.text for d in slow) == tiny_tokenizer.decode(quick)

    with_engine(tiny_config(), tiny_tokenizer, use)


def test_a_reset_forgets_what_was_cached(
    tiny_config: MakeConfig, tiny_tokenizer: Tokenizer
) -> None:
    async def use(engine: AsyncEngine) -> None:
        prompt = list(range(40))

        async def num_cached(cache: CacheParams = OPEN_CACHE) -> int:
            stream = engine.generate(prompt, GREEDY, request_id="a", cache=cache)
            return [d async for d in stream][-1].usage.num_cached_tokens

        assert [await num_cached(), await num_cached()] == [0, 32]
        assert [
            await num_cached(CacheParams(salt="a")),
            await num_cached(CacheParams(scope="a")),
        ] == [0, 0]
        assert await num_cached(CacheParams(pin_s=60)) == 32
        assert engine.stats.cache.num_blocks_pinned == 2
        assert await engine.reset_prefix_cache() == 6
        await until(lambda: engine.stats.cache.num_blocks_pinned == 0)
        assert await num_cached() == 0
        long = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
        running = asyncio.create_task(collect(engine, prompt, long, "running"))
        await until(lambda: engine.stats.num_running == 1)
        resets = await asyncio.gather(*(engine.reset_prefix_cache() for _ in range(3)))
        assert resets[1:] == [0, 0]
        assert sum(len(d.token_ids) for d in await running) == 200

    with_engine(tiny_config(), tiny_tokenizer, use)


def test_a_reset_of_a_dead_engine_fails(tiny_config: MakeConfig, tiny_tokenizer: Tokenizer) -> None:
    async def use(engine: AsyncEngine) -> None:
        await engine.wait_ready()
        os.kill(engine.pid, signal.SIGSTOP)
        waiting = asyncio.create_task(engine.reset_prefix_cache())
        await asyncio.sleep(0.05)
        assert not waiting.done()
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="signal 9"):
            await waiting
        with pytest.raises(EngineDeadError):
            await engine.reset_prefix_cache()

    with_engine(tiny_config(), tiny_tokenizer, use)


def test_refusals_reach_their_request_alone(
    tiny_config: MakeConfig, tiny_tokenizer: Tokenizer
) -> None:
    async def use(engine: AsyncEngine) -> None:
        with pytest.raises(InvalidRequestError, match="top_p"):
            await collect(engine, [1], SamplingParams(top_p=2))
        with pytest.raises(ContextLengthError, match="512"):
            await collect(engine, [1] * 512, GREEDY)
        with pytest.raises(InvalidRequestError, match="cache_pin_s"):
            await collect(engine, [1] * 300, GREEDY, pin_s=5000)
        assert engine.capacity is not None
        most = engine.capacity.kv_pool.num_blocks // 2 * 16
        with pytest.raises(OverloadedError, match="may be pinned") as full:
            await asyncio.gather(
                collect(engine, [1] * (most - 16), GREEDY, pin_s=9),
                collect(engine, [2] * 32, GREEDY, pin_s=9),
            )
        assert full.value.code == "cache_pins_full"
        long = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
        results = await asyncio.gather(
            *(collect(engine, [1], long) for _ in range(6)), return_exceptions=True
        )
        refused = [r for r in results if isinstance(r, OverloadedError)]
        assert refused
        assert all(r.retry_after_s > 0 for r in refused)
        answered = [r for r in results if isinstance(r, list)]
        assert len(answered) + len(refused) == 6
        assert {sum(len(d.token_ids) for d in one) for one in answered} == {200}
        assert engine.num_requests == 0

    with_engine(tiny_config(max_num_seqs=1, max_num_waiting=2), tiny_tokenizer, use)


def test_a_killed_engine_is_noticed_by_every_request(
    tiny_config: MakeConfig, tiny_tokenizer: Tokenizer
) -> None:
    async def use(engine: AsyncEngine) -> None:
        await engine.wait_ready()
        long = SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)
        tasks = [asyncio.create_task(collect(engine, [1], long)) for _ in range(3)]
        await until(lambda: engine.stats.num_running == 3)
        os.kill(engine.pid, signal.SIGKILL)
        began = time.monotonic()
        for task in tasks:
            with pytest.raises(EngineDeadError, match="signal 9"):
                await task
        assert time.monotonic() - began < 1
        assert engine.phase == "failed"
        assert engine.failure is not None
        with pytest.raises(EngineDeadError, match="signal 9"):
            await collect(engine, [1], GREEDY)

    with_engine(tiny_config(), tiny_tokenizer, use)


def test_closing_ends_running_requests(tiny_config: MakeConfig, tiny_tokenizer: Tokenizer) -> None:
    async def use(engine: AsyncEngine) -> None:
        long = SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)
        task = asyncio.create_task(collect(engine, [1], long))
        await until(lambda: engine.stats.num_running == 1)
        await engine.close()
        with pytest.raises(EngineDeadError, match="closed"):
            await task
        assert engine.phase == "closed"
        await engine.close()

    with_engine(tiny_config(), tiny_tokenizer, use)


def test_a_model_that_cannot_be_loaded_is_one_sentence(
    tiny_config: MakeConfig,
    tiny_tokenizer: Tokenizer,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    async def use(engine: AsyncEngine) -> None:
        with pytest.raises(EngineDeadError) as caught:
            await engine.wait_ready()
        assert str(tmp_path) in caught.value.message
        assert "\n" not in caught.value.message
        assert engine.phase == "failed"
        await until(lambda: engine.exit_code is not None)
        assert engine.exit_code == 1

    with_engine(tiny_config(model=str(tmp_path / "nothing.gguf")), tiny_tokenizer, use)
    assert capfd.readouterr().err == ""


def test_an_engine_that_is_closed_before_it_is_used(
    tiny_config: MakeConfig, tiny_tokenizer: Tokenizer
) -> None:
    async def use(engine: AsyncEngine) -> None:
        await engine.close()
        with pytest.raises(EngineDeadError, match="closed"):
            await collect(engine, [1], GREEDY)

    with_engine(tiny_config(), tiny_tokenizer, use)


def test_a_wrong_configuration_starts_nothing(tiny_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="--threads"):
        AsyncEngine.launch(tiny_config(num_threads=0))


PARENT = """
import asyncio, sys, msgspec
from octavo.config import EngineConfig
from octavo.engine.async_engine import AsyncEngine
from octavo.tokenizer.load import load_tokenizer
from octavo.types import SamplingParams

async def main():
    config = msgspec.json.decode(sys.argv[1], type=EngineConfig)
    engine = AsyncEngine.launch(config)
    print(engine.pid, flush=True)
    if sys.argv[2] == "loading":
        await asyncio.sleep(60)
    engine.tokenizer = load_tokenizer(config.model)
    await engine.wait_ready()
    if sys.argv[2] == "idle":
        print("there", flush=True)
        await asyncio.sleep(60)
    params = SamplingParams(max_tokens=500, ignore_eos=True, n=4)
    async for delta in engine.generate([1], params, request_id="a"):
        print("there", flush=True)
        await asyncio.sleep(60)  # reads no more: the engine's frames pile up

asyncio.run(main())
"""


@pytest.mark.parametrize("state", ["loading", "idle", "stepping"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_engine_does_not_outlive_its_parent(
    tiny_config: MakeConfig, state: str, number: signal.Signals
) -> None:
    config = msgspec.json.encode(tiny_config()).decode()
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, config, state],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        if state == "loading":
            time.sleep(0.1)
        else:
            assert parent.stdout.readline() == b"there\n"
        assert is_alive(pid)
        parent.send_signal(number)
        began = time.monotonic()
        while is_alive(pid):
            assert time.monotonic() - began < 2
            time.sleep(0.01)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("octavo", {"msgspec", "asyncio", "numpy"}),
        ("octavo.engine.launch", {"asyncio", "numpy", "tokenizers", "jinja2"}),
        ("octavo.engine.async_engine", {"numpy", "tokenizers", "jinja2"}),
        ("octavo.engine.process", {"asyncio", "tokenizers", "jinja2", "starlette"}),
    ],
)
def test_imports_stay_light(module: str, absent: set[str]) -> None:
    code = "import importlib, sys; importlib.import_module(sys.argv[1]); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, module], check=True, capture_output=True, text=True
    )
    assert not absent & set(done.stdout.split())
