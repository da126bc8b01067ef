"""DeltaQueue: the deltas of one request between the engine's reader and the request's consumer.

Putting never waits; a consumer that falls behind gets everything of one sequence as a single delta,
so the queue is never longer than the answer.
"""

from __future__ import annotations

import asyncio
from itertools import chain

import msgspec

from octavo.errors import RequestError
from octavo.types import OutputDelta


class DeltaQueue:
    """One producer, one consumer, both in one event loop."""

    def __init__(self) -> None:
        """Start empty."""
        self._pending: dict[int, list[OutputDelta]] = {}
        self._error: RequestError | None = None
        self._wakeup = asyncio.Event()

    @property
    def is_failed(self) -> bool:
        """Whether `fail` was called: the engine knows the request no longer."""
        return self._error is not None

    def put(self, delta: OutputDelta) -> None:
        """Append a delta."""
        self._pending.setdefault(delta.index, []).append(delta)
        self._wakeup.set()

    def fail(self, error: RequestError) -> None:
        """End the queue: `get` raises the error once everything before it is taken."""
        if self._error is None:
            self._error = error
        self._wakeup.set()

    async def get(self) -> OutputDelta:
        """Everything that waits of one sequence, merged; waits while there is nothing."""
        while not self._pending:
            if self._error is not None:
                raise self._error
            self._wakeup.clear()
            await self._wakeup.wait()
        index = next(iter(self._pending))
        return merge(self._pending.pop(index))


def merge(deltas: list[OutputDelta]) -> OutputDelta:
    """One delta that says the same as these of one sequence, in order."""
    last = deltas[-1]
    if len(deltas) == 1:
        return last
    return msgspec.structs.replace(
        last,
        text="".join([d.text for d in deltas]),
        token_ids=tuple(chain.from_iterable(d.token_ids for d in deltas)),
        logprobs=tuple(chain.from_iterable(d.logprobs for d in deltas)),
    )
