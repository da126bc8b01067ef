"""Arrays brought through buffers in turn, as to a GPU, here on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from octavo.backends.torch import uploads as file
from octavo.backends.torch.uploads import Uploads

CPU = torch.device("cpu")


class Event:
    """Notes what is asked of it."""

    asked: list[tuple[str, Event]]

    def record(self) -> None:
        self.asked.append(("record", self))

    def synchronize(self) -> None:
        self.asked.append(("synchronize", self))


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Event]]:
    """What is asked of events, in order, with buffers of 64 bytes."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(file, "CHUNK_BYTES", 64)
    Event.asked = []
    return Event.asked


def arrays() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 255, 1 + 4 * 50, np.uint8)
    strided = rng.integers(0, 99, (9, 4, 6)).astype(np.int16)[::2, :, 1:4]
    frozen = rng.random((7, 5), np.float32)
    frozen.flags.writeable = False
    return {
        "unaligned": raw[1:].view(np.float32),
        "strided": strided,
        "read-only": frozen,
        "short": np.arange(3),
        "halves": np.linspace(-2, 2, 70).astype(np.float16),
        "empty": np.zeros((0, 4), np.uint8),
    }


@pytest.mark.parametrize("name", arrays())
def test_in_turns(events: list[tuple[str, Event]], name: str) -> None:
    data = arrays()[name]
    uploads = Uploads(CPU)
    for _ in range(2):
        there = uploads._put_in_turns(data)
        assert there.shape == data.shape
        assert there.numpy().tobytes() == data.tobytes()
    assert uploads.put(data).numpy().tobytes() == data.tobytes()


def test_a_buffer_is_filled_once_it_is_copied(events: list[tuple[str, Event]]) -> None:
    Uploads(CPU)._put_in_turns(np.zeros((5, 60), np.uint8))
    assert [what for what, _ in events] == 5 * ["synchronize", "record"]
    turns = [event for _, event in events[::2]]
    assert turns == [event for _, event in events[1::2]]
    assert turns[0] is turns[2] is turns[4] and turns[1] is turns[3] is not turns[0]


def test_uint16_is_the_same_bits() -> None:
    data = np.array([0, 0x7FFF, 0x8000, 0xFFFF], np.uint16)
    there = Uploads(CPU).put(data)
    assert there.dtype == torch.int16
    assert there.numpy().tobytes() == data.tobytes()
