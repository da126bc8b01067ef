"""A claim: one of our figures beside the paper's."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """One of our figures beside the paper's.

    Attributes:
        low, high: what the paper says: a range, or one value twice; None: nothing.
        least, most: what ours must be.
        others: ours under other circumstances, for people.
    """

    figure: str
    subject: str
    ours: float
    low: float | None = None
    high: float | None = None
    least: float | None = None
    most: float | None = None
    unit: str = ""
    others: str = ""

    @property
    def is_missed(self) -> bool:
        """Whether there is a target that ours is beside."""
        is_short = self.least is not None and self.ours < self.least
        return is_short or (self.most is not None and self.ours > self.most)

    @property
    def differs(self) -> bool:
        """Whether ours is more than a fifth beside what the paper says."""
        if self.low is None or self.high is None:
            return False
        return not 0.8 * self.low <= self.ours <= 1.2 * self.high

    def is_about(self, figure: str, part: str) -> bool:
        """Whether it belongs to a figure and has `part` in its subject."""
        return self.figure == figure and part in self.subject
