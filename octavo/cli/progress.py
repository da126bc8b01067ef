"""One progress line on a terminal, and human sizes. Nothing is drawn where nobody looks."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

BAR_WIDTH = 28
REDRAW_S = 0.08
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def human_bytes(count: float) -> str:
    """98362432 → "93.8 MiB"."""
    for unit in UNITS[:-1]:
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {UNITS[-1]}"


class ProgressLine:
    """A context manager that draws one line on stderr and wipes it at the end."""

    def __init__(self) -> None:
        """Draw only if stderr is a terminal."""
        self._is_drawn = sys.stderr.isatty()
        self._last = 0.0
        self._phase = ""

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wipe the line."""
        if self._is_drawn and self._last:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def bytes(self, phase: str, done: int, total: int) -> None:
        """Show how many bytes of a total are there (0: not known)."""
        if total:
            self._draw(phase, done / total, f"{human_bytes(done)} of {human_bytes(total)}")
        else:
            self._draw(phase, None, human_bytes(done))

    def fraction(self, phase: str, fraction: float) -> None:
        """Show how far a phase is, 0 to 1."""
        self._draw(phase, fraction, f"{fraction:4.0%}")

    def _draw(self, phase: str, fraction: float | None, text: str) -> None:
        now = time.monotonic()
        if not self._is_drawn:
            if phase != self._phase:
                sys.stderr.write(f"{phase}\n")
            self._phase = phase
            return
        if now - self._last < REDRAW_S and phase == self._phase and fraction != 1.0:
            return
        self._last, self._phase = now, phase
        bar = ""
        if fraction is not None:
            full = round(min(max(fraction, 0.0), 1.0) * BAR_WIDTH)
            bar = f" [{'=' * full}{' ' * (BAR_WIDTH - full)}]"
        sys.stderr.write(f"\r\x1b[K{phase}{bar} {text}")
        sys.stderr.flush()
