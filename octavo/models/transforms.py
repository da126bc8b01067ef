"""What makes a file's tensor the weight that a model declares: data, applied by who loads it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class UnpermuteRope:
    """Undo the interleaving of rotary pairs in the rows of a q or k projection.

    llama.cpp's converter stores the rows of every head as (0, half), (1, half + 1), ..., so that
    the two partners of a rotation are neighbours; the graph's Rope wants the first half of a head,
    then the second.
    """

    num_heads: int
    head_dim: int

    def rows(self) -> tuple[int, ...]:
        """For each row that the graph wants, the row of the file where it lies."""
        half = self.head_dim // 2
        within = [2 * i for i in range(half)] + [2 * i + 1 for i in range(half)]
        return tuple(head * self.head_dim + row for head in range(self.num_heads) for row in within)


@dataclass(frozen=True, slots=True)
class AddOne:
    """Add 1 to every value, in float32: folders of Gemma store the weights of norms less 1."""


Transform = UnpermuteRope | AddOne
