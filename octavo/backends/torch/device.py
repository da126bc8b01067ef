"""Which device a Program runs on, and in which dtype; every fault is one sentence with its cure."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch

from octavo.backends.program import DeviceOptions
from octavo.errors import ConfigError
from octavo.graph.tensors import DenseTensor, StoredTensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_FIRST = (8, 0)
"""The first compute capability whose matrix instructions Triton knows, and that has bfloat16."""
_FIRST_FP8 = (8, 9)
"""The first that multiplies e4m3."""


def open_device(name: str) -> torch.device:
    """The device of that name: "cpu", "cuda" or "cuda:1" (of ROCm too, as in torch).

    Torch's products on it sum in float32 from then on.

    Raises:
        ConfigError: torch does not know it, or it does not answer.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: there is no such device; give cuda or cpu") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ConfigError(f"--device {name} is not supported; give cuda, cuda:N or cpu")
    if not torch.backends.cuda.is_built() and torch.version.hip is None:
        raise ConfigError(
            f"this torch ({torch.__version__}) was built without CUDA and ROCm: "
            "pip install 'octavo[cuda]' brings one that has it, or give --backend cpu"
        )
    if not torch.cuda.is_available():
        raise ConfigError(
            "no GPU answers: its driver is missing, too old for this torch "
            f"({torch.__version__}), or all GPUs are hidden (CUDA_VISIBLE_DEVICES); see what "
            "nvidia-smi or rocm-smi says, or give --backend cpu"
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: there are {torch.cuda.device_count()} GPUs")
    device = torch.device("cuda", index)
    try:
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except RuntimeError as error:
        raise ConfigError(
            f"--device {name}: {first_line(error)}; see what nvidia-smi says"
        ) from None
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < _FIRST:
        raise ConfigError(
            f"{describe(device)} is too old: Ampere (compute capability 8.0) is the first that is "
            "supported; give --backend cpu"
        )
    # Else cuBLAS may add parts of a product's columns in 16 bits.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    return device


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches where torch stands, which each thread has for itself."""
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def first_line(error: BaseException) -> str:
    """What torch says of an error, without its advice."""
    return str(error).partition("\n")[0].rstrip(".")


def choose_dtype(
    options: DeviceOptions, device: torch.device, weights: Iterable[StoredTensor]
) -> torch.dtype:
    """The dtype of activations and dense weights: the one asked for, or that of the matrices.

    Without dense matrices, and for float32 ones on a GPU, it is bfloat16; on torch's CPU device
    float32.
    """
    if options.dtype != "auto":
        return DTYPES[options.dtype]
    if device.type == "cpu":
        return torch.float32
    for weight in weights:
        if isinstance(weight, DenseTensor) and len(weight.shape) == 2 and weight.dtype == "f16":
            return torch.float16
    return torch.bfloat16


def has_fp8(device: torch.device) -> bool:
    """Whether products of e4m3 codes run there; AMD's first FP8 is of another form."""
    if device.type == "cpu":
        return True
    capability: tuple[int, int] = torch.cuda.get_device_capability(device)
    return torch.version.hip is None and capability >= _FIRST_FP8


def describe(device: torch.device) -> str:
    """For people: "NVIDIA H200"."""
    return "CPU" if device.type == "cpu" else str(torch.cuda.get_device_name(device))
