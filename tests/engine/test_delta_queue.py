"""DeltaQueue: order, merging for a slow consumer, and the end."""

from __future__ import annotations

import asyncio

import pytest

from octavo.engine.delta_queue import DeltaQueue
from octavo.errors import EngineDeadError
from octavo.types import OutputDelta, PromptUsage, TokenLogprob


def delta(index: int, token_id: int, finish: bool = False) -> OutputDelta:
    return OutputDelta(
        request_id="a",
        index=index,
        text=f"<{token_id}>",
        token_ids=(token_id,),
        logprobs=(TokenLogprob(token_id, -1.0),),
        finish_reason="length" if finish else None,
        usage=PromptUsage(num_prompt_tokens=3),
    )


def test_a_prompt_consumer_gets_each_delta() -> None:
    async def run() -> None:
        queue = DeltaQueue()
        for number in range(3):
            queue.put(delta(0, number))
            assert await queue.get() == delta(0, number)

    asyncio.run(run())


def test_a_slow_consumer_gets_them_merged_by_sequence() -> None:
    async def run() -> None:
        queue = DeltaQueue()
        for number in range(4):
            queue.put(delta(number % 2, number, finish=number == 3))
        first, second = await queue.get(), await queue.get()
        assert (first.index, first.text, first.token_ids) == (0, "<0><2>", (0, 2))
        assert first.finish_reason is None
        assert (second.index, second.text, second.token_ids) == (1, "<1><3>", (1, 3))
        assert second.finish_reason == "length"
        assert [entry.token_id for entry in second.logprobs] == [1, 3]
        assert second.usage.num_prompt_tokens == 3

    asyncio.run(run())


def test_get_waits_for_put() -> None:
    async def run() -> None:
        queue = DeltaQueue()
        getting = asyncio.create_task(queue.get())
        await asyncio.sleep(0)
        assert not getting.done()
        queue.put(delta(0, 1))
        assert (await getting).token_ids == (1,)

    asyncio.run(run())


def test_an_error_comes_after_what_was_there() -> None:
    async def run() -> None:
        queue = DeltaQueue()
        queue.put(delta(0, 1))
        queue.fail(EngineDeadError("gone"))
        queue.fail(EngineDeadError("again"))
        assert (await queue.get()).token_ids == (1,)
        for _ in range(2):
            with pytest.raises(EngineDeadError, match="gone"):
                await queue.get()
        assert queue.is_failed

    asyncio.run(run())
