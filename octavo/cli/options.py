"""The options that every command with an engine shares, and the EngineConfig made of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from octavo.cli.progress import ProgressLine
from octavo.config import QUANTIZATIONS, EngineConfig, available_cpus, parse_size, plan_memory
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
        "--kv-dtype", choices=("fp16", "int8"), default="fp16",
        help="how K and V are kept; int8 takes about half the memory (default: %(default)s)",
    )  # fmt: skip


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add what an engine can be told."""
    group = parser.add_argument_group("engine")
    defaults = EngineConfig.__struct_defaults__
    fields = dict(zip(EngineConfig.__struct_fields__[-len(defaults) :], defaults, strict=True))
    number: Callable[[str], int] = human_number
    group.add_argument(
        "--memory", type=number, metavar="BYTES", help="KV cache, such as 4GiB (default: a quarter)"
    )
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
        default=fields["max_num_batched_tokens"],
        help="token budget of a step (default: %(default)s)",
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
    group.add_argument(
        "--backend", choices=("cpu", "reference"), default=fields["backend"],
        help="reference is slow: for checks (default: %(default)s)",
    )  # fmt: skip
    add_quantization(group)


def resolve_model(name: str) -> Path:
    """The local path of a model, fetched with a progress line if it must be."""
    with ProgressLine() as line:
        return source.resolve(name, progress=line.bytes)


def engine_config(options: argparse.Namespace) -> EngineConfig:
    """The validated configuration of one engine; fetches the model if needed."""
    path = resolve_model(options.model)
    return EngineConfig(
        model=str(path),
        served_name=options.model,
        memory_bytes=plan_memory(options.memory),
        num_threads=options.threads if options.threads is not None else available_cpus(),
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_num_waiting=options.max_num_waiting,
        block_size=options.block_size,
        kv_dtype=options.kv_dtype,
        use_prefix_cache=not options.no_prefix_cache,
        kv_disk=options.kv_disk,
        kv_disk_bytes=options.kv_disk_size,
        policy=options.policy,
        backend=options.backend,
        quantization=options.quantization,
    ).validate()
