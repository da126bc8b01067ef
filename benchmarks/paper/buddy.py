"""A buddy allocator (Knuth, The Art of Computer Programming 1, section 2.5)."""

from __future__ import annotations


class BuddyAllocator:
    """Hands out contiguous ranges whose lengths are powers of two, each aligned to its length.

    A range too long is halved until it fits; a freed one joins its other half if that is free.
    A pool that is no power of two begins as the largest ranges that fit into it.
    """

    def __init__(self, num_slots: int) -> None:
        """Start with everything free."""
        self._free: list[set[int]] = [set() for _ in range(num_slots.bit_length())]
        self._length_of: dict[int, int] = {}
        at = 0
        for order in reversed(range(num_slots.bit_length())):
            if num_slots >> order & 1:
                self._free[order].add(at)
                at += 1 << order

    def allocate(self, num_slots: int) -> int | None:
        """The start of a range of at least so many slots, or None if no free one is long enough."""
        wanted = (num_slots - 1).bit_length()
        for order in range(wanted, len(self._free)):
            if self._free[order]:
                break
        else:
            return None
        start = min(self._free[order])  # The lowest one, so that a run can be repeated.
        self._free[order].remove(start)
        while order > wanted:
            order -= 1
            self._free[order].add(start + (1 << order))
        self._length_of[start] = 1 << wanted
        return start

    def free(self, start: int) -> None:
        """Give back the range that starts there."""
        order = self._length_of.pop(start).bit_length() - 1
        while order + 1 < len(self._free) and start ^ (1 << order) in self._free[order]:
            self._free[order].remove(start ^ (1 << order))
            start &= ~(1 << order)
            order += 1
        self._free[order].add(start)

    @property
    def num_free(self) -> int:
        """Slots in no range."""
        return sum(len(starts) << order for order, starts in enumerate(self._free))

    def ranges(self) -> list[tuple[int, int]]:
        """Start and length of every range in use, by start."""
        return sorted(self._length_of.items())
