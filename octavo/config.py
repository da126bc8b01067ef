"""EngineConfig: all that an engine is told, validated in one place, then frozen and printable.

An engine looks nothing up by itself: how much memory it may take is decided by who starts it
    (`plan_memory`),
so that a second engine fits beside it. Imports no numpy.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from octavo.errors import ConfigError

Quantization = Literal["int8", "int4", "fp8"]
Backend = Literal["cpu", "torch", "reference"]
QUANTIZATIONS: tuple[Quantization, ...] = ("int8", "int4", "fp8")
DEFAULT_DEVICE = "cuda"
TOKEN_BUDGET = 512
"""Tokens of a step on a CPU: docs/decisions/003-token-budget.md."""
GPU_TOKEN_BUDGET = 2048
KVDtype = Literal["fp16", "int8", "fp8"]
KV_DTYPES: tuple[KVDtype, ...] = ("fp16", "int8", "fp8")


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The whole configuration of one engine.

    Attributes:
        model: a local path: a GGUF file or a folder (resolve names with `weights.source` first).
        served_name: the name that requests use.
        memory_bytes: the most that the KV pool may take; None, for a GPU alone: what a step as
            large as can be leaves there.
        max_model_len: the most tokens of a sequence; None takes the model's own, cut to what the
            pool can hold.
        max_num_seqs: the most sequences in one step.
        max_num_batched_tokens: the token budget of one step.
        max_num_waiting: the most requests in the waiting queue.
        block_size: tokens a KV block.
        kv_dtype: how K and V are kept: "fp16", or "int8" in a good half of the memory; "fp8"
            likewise, on GPUs that have it.
        use_prefix_cache: serve known prefixes from the cache.
        kv_host_bytes: the most host memory that KV blocks which leave a GPU's pool may take.
        kv_disk: a folder of its own for KV blocks that leave the pool; None drops them.
        kv_disk_bytes: the most that they may take there.
        policy: order of the waiting queue.
        num_threads: threads of the CPU backend.
        backend: "cpu" (native), "torch" (GPUs) or "reference" (numpy).
        device: of the torch backend: "cuda" or "cuda:1", ROCm's too; "cpu" is for tests.
        dtype: of the torch backend: what it computes in; "auto" takes what the weights are in.
        deterministic: of the torch backend: the same request gives the same bytes, whatever runs
            beside it. The others always keep to that.
        quantization: quantize the dense matrices of the file while loading; None keeps them.
    """

    model: str
    served_name: str
    memory_bytes: int | None
    num_threads: int
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = TOKEN_BUDGET
    max_num_waiting: int = 2048
    block_size: int = 16
    kv_dtype: KVDtype = "fp16"
    use_prefix_cache: bool = True
    kv_host_bytes: int = 0
    kv_disk: str | None = None
    kv_disk_bytes: int = 10 << 30
    policy: Literal["fcfs", "priority", "fair"] = "fcfs"
    backend: Backend = "cpu"
    device: str = DEFAULT_DEVICE
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    deterministic: bool = False
    quantization: Quantization | None = None

    def validate(self) -> EngineConfig:
        """Return self, or raise one ConfigError that lists every fault."""
        faults = [
            f"{name} must be at least {least}, not {value}"
            for name, value, least in (
                ("--memory", self.memory_bytes if self.memory_bytes is not None else 1, 1),
                ("--threads", self.num_threads, 1),
                ("--max-model-len", self.max_model_len if self.max_model_len is not None else 1, 1),
                ("--max-num-seqs", self.max_num_seqs, 1),
                ("--max-num-batched-tokens", self.max_num_batched_tokens, 1),
                ("--max-num-waiting", self.max_num_waiting, 1),
                ("--kv-host", self.kv_host_bytes, 0),
                ("--kv-disk-size", self.kv_disk_bytes, 1),
            )
            if value < least
        ]
        if self.block_size not in (8, 16, 32, 64):
            faults.append(f"--block-size must be 8, 16, 32 or 64, not {self.block_size}")
        if self.quantization not in (None, *QUANTIZATIONS):
            faults.append(
                f"--quantization must be {_either(QUANTIZATIONS)}, not {self.quantization}"
            )
        if self.kv_dtype not in KV_DTYPES:
            faults.append(f"--kv-dtype must be {_either(KV_DTYPES)}, not {self.kv_dtype}")
        if "fp8" in (self.quantization, self.kv_dtype) and self.backend != "torch":
            faults.append(
                f"fp8 needs --backend torch and a GPU; the {self.backend} backend has int8"
            )
        if self.memory_bytes is None and not is_on_gpu(self.backend, self.device):
            faults.append("--memory must be given where the KV cache lies in the host's memory")
        if self.backend != "torch" and self.dtype != "auto":
            faults.append(f"--dtype is of --backend torch; the {self.backend} backend has one form")
        if self.backend != "torch" and self.device not in (DEFAULT_DEVICE, "cpu"):
            faults.append(f"--device {self.device} needs --backend torch, not {self.backend}")
        if self.kv_disk is not None and not self.use_prefix_cache:
            faults.append("--kv-disk keeps prefixes: leave out --no-prefix-cache, or --kv-disk")
        if self.kv_host_bytes > 0:
            if not self.use_prefix_cache:
                faults.append("--kv-host keeps prefixes: leave out --no-prefix-cache, or --kv-host")
            if self.backend != "torch":
                faults.append(
                    f"--kv-host is for GPUs: the KV cache of the {self.backend} backend lies in "
                    "the host's memory already; give it more with --memory"
                )
        if faults:
            raise ConfigError("; ".join(faults))
        return self


def _either(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def available_cpus() -> int:
    """CPUs that this process may use: the affinity mask, cut by the cgroup's quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()[:2]
        if quota != "max":
            cpus = min(cpus, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return cpus


def available_memory() -> int:
    """Bytes free to this process: what the system calls available, cut by the cgroup's limit."""
    free = 1 << 62
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        try:
            limit = Path(limit_file).read_text().strip()
            used = int(Path(used_file).read_text())
            if limit != "max":
                free = min(free, max(0, int(limit) - used))
        except (OSError, ValueError):
            continue
    return free if free < 1 << 62 else 4 << 30


_GPU_DRIVERS = (
    "/dev/nvidiactl",
    "/proc/driver/nvidia/version",
    "/usr/lib/wsl/lib/libcuda.so.1",
    "/dev/kfd",
)
"""Files of the drivers of NVIDIA (the third under Windows) and AMD."""


def choose_backend(asked: Backend | Literal["auto"], device: str | None) -> Backend:
    """The backend that was asked for; "auto": torch where it and a GPU are, else cpu.

    A device that was named decides. Imports nothing: torch takes seconds.
    """
    if asked != "auto":
        return asked
    if device is not None:
        return "cpu" if device == "cpu" else "torch"
    has_gpu = any(map(os.path.exists, _GPU_DRIVERS))
    return "torch" if has_gpu and importlib.util.find_spec("torch") is not None else "cpu"


def token_budget(backend: Backend, device: str) -> int:
    """The tokens of a step, if nobody says: a GPU needs many to be busy."""
    return GPU_TOKEN_BUDGET if is_on_gpu(backend, device) else TOKEN_BUDGET


def is_on_gpu(backend: Backend, device: str) -> bool:
    """Whether the KV pool lies on a GPU, whose free memory only its backend knows."""
    return backend == "torch" and device != "cpu"


def plan_memory(asked_bytes: int | None) -> int:
    """Bytes that one engine's KV pool may take: what was asked, or a quarter of what is free."""
    return asked_bytes if asked_bytes is not None else available_memory() // 4


_SIZE_SUFFIXES = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("", 1024), ("ib", 1024), ("b", 1000))
}


def parse_size(text: str) -> int:
    """A count of bytes or tokens as people write it: "4096", "32k" (32768), "1.5GiB", "2GB".

    Raises:
        ConfigError: it is not a number with a known suffix.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _SIZE_SUFFIXES:
        raise ConfigError(f"{text!r} is not a size: write 4096, 32k or 4GiB")
    return int(float(match[1]) * _SIZE_SUFFIXES[match[2].lower()])
