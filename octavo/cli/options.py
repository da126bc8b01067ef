"""The options that every command with an engine shares, and the EngineConfig made of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from octavo.cli.progress import ProgressLine
from octavo.config import (
    DEFAULT_DEVICE,
    GPU_TOKEN_BUDGET,
    KV_DTYPES,
    QUANTIZATIONS,
    TOKEN_BUDGET,
    EngineConfig,
    available_cpus,
    choose_backend,
    is_on_gpu,
    parse_size,
    plan_memory,
    token_budget,
)
from octavo.errors import ConfigError
from octavo.weights import source

DEFAULT_MODEL = "smollm2"
MODEL_HELP = (
    "a folder with safetensors, a GGUF file, hf:org/repo[:file], or a known name "
    f"(default: {DEFAULT_MODEL})"
)


def human_number(text: str) -> int:
    """An argparse type: 4096, 32k, 4GiB."""
    try:
        return parse_size(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the model, a positional argument."""
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help=MODEL_HELP)


def add_quantization(parser: argparse._ActionsContainer) -> None:
    """Add --quantization."""
    parser.add_argument(
        "--quantization", choices=QUANTIZATIONS,
        help="quantize dense weights while loading (default: as the file has them)",
    )  # fmt: skip


def add_kv_dtype(parser: argparse._ActionsContainer) -> None:
    """Add how K and V are kept."""
    parser.add_argument(
        "--kv-dtype", choices=KV_DTYPES, default="fp16",
        help="how K and V are kept; int8 and, on GPUs, fp8 take about half the memory "
        "(default: %(default)s)",
    )  # fmt: skip


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add what an engine can be told."""
    group = parser.add_argument_group("engine")
    defaults = EngineConfig.__struct_defaults__
    fields = dict(zip(EngineConfig.__struct_fields__[-len(defaults) :], defaults, strict=True))
    number: Callable[[str], int] = human_number
    group.add_argument(
        "--memory", type=number, metavar="BYTES",
        help="KV cache, such as 4GiB (default: a quarter; on a GPU all that is left)",
    )  # fmt: skip
    group.add_argument(
        "--max-model-len",
        type=number,
        metavar="TOKENS",
        help="context length (default: the model's)",
    )
    group.add_argument(
        "--max-num-seqs", type=number, metavar="N", default=fields["max_num_seqs"],
        help="most sequences in a step (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--max-num-batched-tokens", type=number, metavar="TOKENS",
        help=f"token budget of a step (default: {TOKEN_BUDGET}; on a GPU {GPU_TOKEN_BUDGET})",
    )  # fmt: skip
    group.add_argument(
        "--max-num-waiting", type=number, metavar="N", default=fields["max_num_waiting"],
        help="most requests in the queue (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--block-size", type=int, choices=(8, 16, 32, 64), default=fields["block_size"],
        help="tokens a KV block (default: %(default)s)",
    )  # fmt: skip
    add_kv_dtype(group)
    group.add_argument(
        "--no-prefix-cache", action="store_true", help="compute every prompt from its beginning"
    )
    group.add_argument(
        "--kv-host", type=number, metavar="BYTES", default=fields["kv_host_bytes"],
        help="host memory for KV blocks that leave a GPU's, such as 32GiB (default: drop them)",
    )  # fmt: skip
    group.add_argument(
        "--kv-disk", metavar="DIR",
        help="a folder for KV blocks that leave the memory (default: drop them)",
    )  # fmt: skip
    group.add_argument(
        "--kv-disk-size", type=number, metavar="BYTES", default=fields["kv_disk_bytes"],
        help="the most that they may take there (default: 10GiB)",
    )  # fmt: skip
    group.add_argument(
        "--policy", choices=("fcfs", "priority", "fair"), default=fields["policy"],
        help="order of the queue (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads (default: the cores given)"
    )
    _add_backend(group, fields)
    add_quantization(group)


def _add_backend(group: argparse._ActionsContainer, fields: Mapping[str, Any]) -> None:
    group.add_argument(
        "--backend", choices=("auto", "cpu", "torch", "reference"), default="auto",
        help="torch for GPUs; reference is slow: for checks (default: torch where it and a GPU "
        "are, else cpu)",
    )  # fmt: skip
    group.add_argument(
        "--device", metavar="NAME",
        help=f"cpu, or cuda or cuda:N, AMD's too, for torch (default there: {fields['device']})",
    )  # fmt: skip
    group.add_argument(
        "--dtype", choices=("auto", "bf16", "fp16", "fp32"), default=fields["dtype"],
        help="what torch computes in (default: what the weights are in)",
    )  # fmt: skip
    group.add_argument(
        "--deterministic", action="store_true",
        help="torch: same request, same bytes, whatever runs beside it (cpu: always)",
    )  # fmt: skip


def resolve_model(name: str) -> Path:
    """The local path of a model, fetched with a progress line if it must be."""
    with ProgressLine() as line:
        return source.resolve(name, progress=line.bytes)


def engine_config(options: argparse.Namespace) -> EngineConfig:
    """The validated configuration of one engine; fetches the model if needed."""
    path = resolve_model(options.model)
    backend = choose_backend(options.backend, options.device)
    device = DEFAULT_DEVICE if options.device is None else options.device
    is_left_to_gpu = options.memory is None and is_on_gpu(backend, device)
    return EngineConfig(
        model=str(path),
        served_name=options.model,
        memory_bytes=None if is_left_to_gpu else plan_memory(options.memory),
        num_threads=options.threads if options.threads is not None else available_cpus(),
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=(
            token_budget(backend, device)
            if options.max_num_batched_tokens is None
            else options.max_num_batched_tokens
        ),
        max_num_waiting=options.max_num_waiting,
        block_size=options.block_size,
        kv_dtype=options.kv_dtype,
        use_prefix_cache=not options.no_prefix_cache,
        kv_host_bytes=options.kv_host,
        kv_disk=options.kv_disk,
        kv_disk_bytes=options.kv_disk_size,
        policy=options.policy,
        backend=backend,
        device=device,
        dtype=options.dtype,
        deterministic=options.deterministic,
        quantization=options.quantization,
    ).validate()
