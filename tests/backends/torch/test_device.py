"""Opening a device that is not there."""

from __future__ import annotations

import pytest
import torch

from octavo.backends.torch.device import open_device


def test_products_of_a_gpu_sum_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    opened: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", opened.append)
    switches = torch.backends.cuda.matmul
    names = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16")]
    before = [getattr(switches, name) for name in names]
    try:
        assert open_device("cuda:1") == torch.device("cuda", 1)
        assert opened == [1]
        assert not any(getattr(switches, name) for name in names)
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(switches, name, value)
