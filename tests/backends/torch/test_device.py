"""Opening a device that is not there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from octavo.backends.torch import tables
from octavo.backends.torch.device import open_device
from octavo.backends.torch.tables import choose_kernels
from octavo.errors import ConfigError


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.device]]:
    """The devices that torch was set to, of two made-up GPUs."""
    devices: list[torch.device] = []
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Made-up T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: None)
    switches = torch.backends.cuda.matmul
    names = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16")]
    before = [getattr(switches, name) for name in names]
    yield devices
    for name, value in zip(names, before, strict=True):
        setattr(switches, name, value)


def test_products_of_a_gpu_sum_in_float32(opened: list[torch.device]) -> None:
    device = torch.device("cuda", 1)
    assert open_device("cuda:1") == device
    assert opened == [device]
    switches = torch.backends.cuda.matmul
    assert not switches.allow_bf16_reduced_precision_reduction
    assert not switches.allow_fp16_reduced_precision_reduction


@pytest.mark.usefixtures("opened")
def test_a_gpu_that_is_full_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="there are 2 GPUs"):
        open_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ConfigError, match="Made-up T4 is too old: Ampere"):
        open_device("cuda:1")

    def fail(*shape: int, device: torch.device) -> None:
        raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA.")

    monkeypatch.setattr(torch, "zeros", fail)
    with pytest.raises(ConfigError, match="cuda:1: CUDA error: out of memory; see what nvidia-smi"):
        open_device("cuda:1")


def test_without_a_compiler_kernels_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="apt install gcc python3-dev"):
        choose_kernels("auto", torch.device("cuda"))
    assert choose_kernels("auto", torch.device("cpu")).attention is not None


def test_without_triton_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(tables, "_table", missing)
    with pytest.raises(ConfigError, match=r"pip install 'octavo\[cuda\]'"):
        choose_kernels("triton", torch.device("cpu"))
