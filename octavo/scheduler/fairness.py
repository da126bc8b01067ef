"""Fair shares between clients: virtual token counters (Sheng et al., OSDI 2024, algorithm 2).

Each client has a counter of the service that it has had: the prompt tokens that were computed for
it and, twice as dear, the tokens that were sampled. Whoever has had least comes next. Who comes
back after a time of rest begins no lower than the lowest of those who are here: rest is no credit.
So between two clients that always have something waiting the service never differs by more than
what is in the rows at a time. Knows clients by name and sequences by what they have left.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from heapq import heapify, heappop, heapreplace
from typing import Any

from octavo.scheduler.request import Sequence as Seq
from octavo.scheduler.waiting import RankedList

PROMPT_WEIGHT = 1
OUTPUT_WEIGHT = 2
"""As in the paper: a sampled token takes about twice the time of a prompt's."""


class TokenCounters:
    """The service that each client has had."""

    def __init__(self) -> None:
        """Nobody has had anything."""
        self._counters: dict[str, float] = {}
        self._num_requests: dict[str, int] = {}

    def enter(self, client: str) -> None:
        """A request of the client arrives."""
        if client not in self._num_requests:
            lowest = min((self._counters[c] for c in self._num_requests), default=0.0)
            self._counters[client] = max(self._counters.get(client, 0.0), lowest)
            self._num_requests[client] = 0
        self._num_requests[client] += 1

    def leave(self, client: str) -> None:
        """A request of the client has ended."""
        self._num_requests[client] -= 1
        if self._num_requests[client] == 0:
            del self._num_requests[client]
            self._forget_rested()

    def charge(self, client: str, num_prompt_tokens: int = 0, num_output_tokens: int = 0) -> None:
        """Count what was computed for a client that is here."""
        service = PROMPT_WEIGHT * num_prompt_tokens + OUTPUT_WEIGHT * num_output_tokens
        self._counters[client] += service

    def merge(
        self, queues: Iterable[tuple[str, Sequence[Seq]]], count: int | None = None
    ) -> list[Seq]:
        """The first `count` of all clients' sequences, in the order in which they are served.

        Args:
            queues: each client's own, in its own order.
            count: how many are wanted; None: all.
        """
        heap = [
            (self._counters[client], queue[0].rank, number, queue)
            for number, (client, queue) in enumerate(queues)
            if queue
        ]
        heapify(heap)
        places = [0] * (1 + max((number for _, _, number, _ in heap), default=0))
        merged: list[Seq] = []
        while heap and (count is None or len(merged) < count):
            counter, _, number, queue = heap[0]
            seq = queue[places[number]]
            merged.append(seq)
            places[number] += 1
            if places[number] == len(queue):
                heappop(heap)
                continue
            counter += PROMPT_WEIGHT * seq.num_remaining_tokens
            heapreplace(heap, (counter, queue[places[number]].rank, number, queue))
        return merged

    def sort(self, prompts: Sequence[Seq], key: Callable[[Seq], Any]) -> list[Seq]:
        """Sequences in the order in which clients are served, each client's own by `key`."""
        queues: dict[str, list[Seq]] = defaultdict(list)
        for seq in sorted(prompts, key=key):
            queues[seq.request.client].append(seq)
        return self.merge(queues.items())

    def _forget_rested(self) -> None:
        """Drop the counters that `enter` would raise anyway; all of them once nobody is here."""
        lowest = min((self._counters[c] for c in self._num_requests), default=float("inf"))
        for client in [c for c, n in self._counters.items() if c not in self._num_requests]:
            if self._counters[client] <= lowest:
                del self._counters[client]


class FairList:
    """The waiting queue under the policy "fair": a list in the order of rank for each client."""

    def __init__(self, counters: TokenCounters) -> None:
        """Start empty."""
        self._counters = counters
        self._lists: dict[str, RankedList] = {}

    def __len__(self) -> int:
        """How many sequences wait."""
        return sum(map(len, self._lists.values()))

    def add(self, seq: Seq) -> None:
        """Put a sequence in its place."""
        self._lists.setdefault(seq.request.client, RankedList()).add(seq)

    def remove(self, seq: Seq) -> None:
        """Take a sequence out; it must be there."""
        own = self._lists[seq.request.client]
        own.remove(seq)
        if not len(own):
            del self._lists[seq.request.client]

    def first(self, count: int) -> list[Seq]:
        """The first `count` of them, as long as nobody is served in between."""
        queues = [(client, own.first(count)) for client, own in self._lists.items()]
        return self._counters.merge(queues, count)
