"""Finding stop strings in text that arrives in pieces, whatever the pieces are.

A Knuth-Morris-Pratt automaton for each string: constant work a character, and its states tell how
much of the text's end could still become a stop string and must be held back.

Source: Knuth, Morris, Pratt 1977.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string was found.

    Attributes:
        text: the text since the last push up to the stop string, with it if it is to be included.
        stop: the string found.
    """

    text: str
    stop: str


class StopStringFinder:
    """Watches one sequence's text for several stop strings.

    The string that is complete first wins; of several that end at the same character, the longest.
    """

    def __init__(self, stops: Sequence[str], *, is_included: bool) -> None:
        """Watch for `stops`, each not empty; `is_included` keeps a found one in the text."""
        self._stops = sorted(set(stops), key=lambda s: (-len(s), s))
        self._failures = [_failure_table(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._is_included = is_included
        self._held = ""

    def push(self, text: str, *, may_match: bool = True) -> str | StopMatch:
        """Add text; return what is safe to show now, or the match.

        Args:
            text: what is new.
            may_match: False lets strings that end in this text pass.
        """
        buffer = self._held + text
        seen = len(self._held)
        for place, char in enumerate(text, seen + 1):
            for number, stop in enumerate(self._stops):
                state = self._states[number]
                failure = self._failures[number]
                while state and stop[state] != char:
                    state = failure[state]
                if stop[state] == char:
                    state += 1
                if state == len(stop):
                    if may_match:
                        end = place if self._is_included else place - len(stop)
                        return StopMatch(buffer[:end], stop)
                    state = failure[state]
                self._states[number] = state
        hold = max(self._states)
        safe = len(buffer) - hold
        self._held = buffer[safe:]
        return buffer[:safe]

    def finish(self) -> str:
        """The text still held back: no stop string will complete it."""
        held, self._held = self._held, ""
        return held


def _failure_table(stop: str) -> list[int]:
    """failure[k]: length of the longest proper prefix of stop[:k] that is also its end."""
    failure = [0] * (len(stop) + 1)
    state = 0
    for k in range(1, len(stop)):
        while state and stop[state] != stop[k]:
            state = failure[state]
        if stop[state] == stop[k]:
            state += 1
        failure[k + 1] = state
    return failure
