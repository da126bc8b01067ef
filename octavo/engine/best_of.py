"""Choosing the n most probable of `best_of` samples, which is known when all of them have ended."""

from __future__ import annotations

import msgspec

from octavo.types import OutputDelta


class BestOf:
    """Holds back the deltas of every sample of a request until the last one has ended."""

    def __init__(self, n: int, best_of: int, *, has_logprobs: bool) -> None:
        """Return `n` of `best_of`; without their log probabilities unless the user wants them."""
        self._n = n
        self._has_logprobs = has_logprobs
        self._samples: list[list[OutputDelta]] = [[] for _ in range(best_of)]
        self._num_running = best_of

    def add(self, delta: OutputDelta) -> tuple[OutputDelta, ...]:
        """Take in a delta; return the best samples with the last one, one delta each."""
        self._samples[delta.index].append(delta)
        self._num_running -= delta.finish_reason is not None
        if self._num_running:
            return ()
        best = sorted(map(_joined, self._samples), key=_rank)[: self._n]
        changes = {} if self._has_logprobs else {"logprobs": ()}
        return tuple(
            msgspec.structs.replace(sample, index=place, **changes)
            for place, sample in enumerate(best)
        )


def _joined(deltas: list[OutputDelta]) -> OutputDelta:
    return msgspec.structs.replace(
        deltas[-1],
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(t for delta in deltas for t in delta.token_ids),
        logprobs=tuple(t for delta in deltas for t in delta.logprobs),
    )


def _rank(sample: OutputDelta) -> tuple[bool, float]:
    """The smaller the better: by log probability per token, as OpenAI defines it."""
    total = sum(token.logprob for token in sample.logprobs)
    is_broken = sample.finish_reason in ("abort", "error")
    return is_broken, -total / max(1, len(sample.logprobs))
