"""Finding the texts of special tokens inside a string, in time linear in its length.

A model may have thousands of them (Gemma: 6,249), so no pattern lists them all: one small pattern
finds the prefixes that groups of them share, and a dictionary decides at each place found. Knows
nothing of vocabularies or models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping


class SpecialMatcher:
    """Finds special tokens from left to right, the longest at each place, without overlaps.

    Source: the order is that of tokenizers' added vocabulary; llama.cpp cuts out the longest tokens
        first, which differs only if the end of one token's text is the beginning of another's and
        both stand interlocked in a text.
    """

    def __init__(self, ids: Mapping[str, int]) -> None:
        """Prepare for these texts; empty ones are ignored."""
        self._ids = {text: token_id for text, token_id in ids.items() if text}
        lengths: dict[str, set[int]] = {}
        for prefix, texts in _group_by_prefix(self._ids):
            lengths.setdefault(prefix, set()).update(len(text) for text in texts)
        self._lengths = {prefix: sorted(found, reverse=True) for prefix, found in lengths.items()}
        prefixes = sorted(lengths, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, prefixes))) if prefixes else None
        self._heads = {text[0] for text in self._ids}
        self._longest = max(map(len, self._ids), default=0)

    def find(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Yield (start, end, token id) of each special token in the text."""
        if self._pattern is None or not any(head in text for head in self._heads):
            return
        position = 0
        while (hit := self._pattern.search(text, position)) is not None:
            start = position = hit.start()
            for length in self._lengths[hit.group()]:
                token_id = self._ids.get(text[start : start + length])
                if token_id is not None and start + length <= len(text):
                    position = start + length
                    yield start, position, token_id
                    break
            else:
                position += 1

    def dangling_start(self, text: str) -> int | None:
        """Where the text's end could begin a special token, were more text to follow; else None."""
        end = len(text)
        for start in range(max(0, end - self._longest + 1), end):
            if text[start] in self._heads:
                tail = text[start:]
                if any(special.startswith(tail) and special != tail for special in self._ids):
                    return start
        return None


def _group_by_prefix(texts: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield groups of texts with the prefix they share; no group's prefix begins another's."""
    groups: dict[str, list[str]] = {}
    for text in texts:
        groups.setdefault(text[:2], []).append(text)
    heads = {text for text in groups if len(text) == 1}
    merged: dict[str, list[str]] = {}
    for head, members in groups.items():
        merged.setdefault(head[0] if head[0] in heads else head, []).extend(members)
    for members in merged.values():
        least, greatest = min(members), max(members)
        shared = 0
        while shared < len(least) and least[shared] == greatest[shared]:
            shared += 1
        yield least[:shared], members
