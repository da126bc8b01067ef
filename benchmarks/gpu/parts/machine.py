"""The device of a run: what it is, what it can do at most, and how long things take on it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

Function = Callable[[], Any]
MILLISECOND = 2_000_000
"""About as long in cycles of the device; see `device_seconds`."""


@dataclass(frozen=True, slots=True)
class Setup:
    """How the parts run.

    Attributes:
        device: where.
        quick: tiny sizes, to test the script itself.
        table: the kernels; see DeviceOptions.kernels.
        model: a GGUF file whose text is compared, if there is one.
        warm: run each step with one layer, to have Triton compile what the timed run needs.
    """

    device: torch.device
    quick: bool = False
    table: Literal["auto", "plain", "triton"] = "auto"
    model: Path | None = None
    warm: bool = False

    @property
    def is_gpu(self) -> bool:
        """Whether there is anything to time."""
        return self.device.type == "cuda"

    @property
    def has_targets(self) -> bool:
        """Whether speed is held against targets."""
        return self.is_gpu and not self.quick and not self.warm

    def met(self, holds: bool) -> bool | None:
        """The verdict on a target of speed."""
        return bool(holds) if self.has_targets else None


@dataclass(frozen=True, slots=True)
class Limits:
    """What the device does at most, as measured.

    Attributes:
        bandwidth: bytes a second, read and written, of a large copy.
        bf16: operations a second of a large product.
        fp8: the same of FP8, 0 if torch has none here.
    """

    bandwidth: float
    bf16: float
    fp8: float


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give back what is no longer held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Memory that can be taken."""
    if device.type != "cuda":
        return 1 << 28
    release(device)
    return int(torch.cuda.mem_get_info(device)[0])


def wall_seconds(function: Function, device: torch.device) -> float:
    """Time of one call, the device's work included."""
    synchronize(device)
    began = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - began


def device_seconds(function: Function, device: torch.device, head_start: int = 0) -> float:
    """Time of the device's work in one call; with a head start, without waiting for the host.

    The head start is how many cycles the device is kept busy while the host calls `function`.
    """
    if device.type != "cuda":
        return wall_seconds(function, device)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    if head_start:
        torch.cuda._sleep(head_start)
    first.record()
    function()
    last.record()
    torch.cuda.synchronize(device)
    return float(first.elapsed_time(last)) / 1e3


def best_seconds(function: Function, device: torch.device, count: int, repeats: int = 3) -> float:
    """Time of a call, the best of some repeats of `count` calls; the first is not counted."""
    function()

    def several() -> None:
        for _ in range(count):
            function()

    return min(device_seconds(several, device) for _ in range(repeats)) / count


def captured_seconds(
    functions: Sequence[Function], device: torch.device, repeats: int = 5
) -> float:
    """Time of a call, of some that run one after another without the host in between."""
    for function in functions:
        function()

    def all_of_them() -> None:
        for function in functions:
            function()

    if device.type != "cuda":
        return wall_seconds(all_of_them, device) / len(functions)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_of_them()
    graph.replay()
    times = [device_seconds(graph.replay, device, MILLISECOND) for _ in range(repeats)]
    del graph
    return min(times) / len(functions)


def measure_limits(setup: Setup) -> Limits:
    """Copy and multiply."""
    small = setup.quick or setup.warm or not setup.is_gpu
    bandwidth = _copy_rate(setup.device, 1 << 20 if small else 1 << 30, 2 if small else 10)
    size, count = (64, 2) if small else (8192, 20)
    dtype = torch.bfloat16 if setup.is_gpu else torch.float32
    a, b = (torch.randn((size, size), dtype=dtype, device=setup.device) for _ in range(2))
    seconds = best_seconds(lambda: torch.nn.functional.linear(a, b), setup.device, count)
    fp8 = _fp8_rate(a, b, count) if setup.is_gpu else 0.0
    return Limits(bandwidth, 2 * size**3 / seconds, fp8)


def _copy_rate(device: torch.device, num_bytes: int, count: int) -> float:
    source = torch.ones(num_bytes // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / best_seconds(lambda: target.copy_(source), device, count)


def _fp8_rate(a: torch.Tensor, b: torch.Tensor, count: int) -> float:
    one = torch.ones((), dtype=torch.float32, device=a.device)
    x, y = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()

    def multiply() -> None:
        torch._scaled_mm(x, y, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    try:
        seconds = best_seconds(multiply, a.device, count)
    except RuntimeError:
        return 0.0
    return 2 * a.shape[0] ** 3 / seconds


def describe(setup: Setup) -> dict[str, str]:
    """What a report says of the machine."""
    about = {"torch": torch.__version__, "device": "CPU"}
    if setup.is_gpu:
        facts = torch.cuda.get_device_properties(setup.device)
        about["device"] = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"
        about["free before"] = f"{free_bytes(setup.device) / 2**30:.0f} GiB"
        about["CUDA of torch"] = str(torch.version.cuda)
        reduced = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        about["bf16 sums of products in reduced precision"] = str(reduced)
    return about
