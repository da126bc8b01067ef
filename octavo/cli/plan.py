"""Say whether a model fits: its weights, KV bytes a token, the context. Loads nothing."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from octavo.cli.options import (
    add_kv_dtype,
    add_model,
    add_quantization,
    human_number,
    resolve_model,
)
from octavo.cli.progress import human_bytes
from octavo.config import Quantization, available_memory, plan_memory
from octavo.graph.trace import CacheDtype
from octavo.runner.loading import declare, weights_nbytes
from octavo.weights.loader import open_model


def main(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Print the plan as a table or as JSON."""
    add_model(parser)
    parser.add_argument(
        "--memory", type=human_number, metavar="BYTES", help="KV cache, as of serve"
    )
    add_quantization(parser)
    add_kv_dtype(parser)
    parser.add_argument("--json", action="store_true", help="machine-readable")
    options = parser.parse_args(arguments)
    plan = make_plan(options.model, options.memory, options.quantization, options.kv_dtype)
    print(json.dumps(plan) if options.json else _table(plan))
    return 0


def make_plan(
    name: str,
    memory_bytes: int | None,
    quantization: Quantization | None = None,
    kv_dtype: CacheDtype = "fp16",
) -> dict[str, object]:
    """The figures of the plan; sizes in bytes, lengths in tokens."""
    files = open_model(resolve_model(name))
    try:
        model = declare(files)
        weights = weights_nbytes(model, files, quantization)
    finally:
        files.close()
    per_token = sum(g.bytes_per_token(kv_dtype) for g in model.graph.cache_groups)
    pool, free = plan_memory(memory_bytes), available_memory()
    longest = min(model.config.max_position_embeddings, pool // per_token)
    return {
        "model": name,
        "architecture": model.architecture,
        "parameters": model.num_parameters,
        "weights_bytes": weights,
        "kv_dtype": kv_dtype,
        "kv_bytes_per_token": per_token,
        "kv_pool_bytes": pool,
        "kv_pool_tokens": pool // per_token,
        "model_context": model.config.max_position_embeddings,
        "context": longest,
        "sequences_of_full_context": pool // per_token // max(longest, 1),
        "free_bytes": free,
        "fits": weights + per_token * longest < free,
    }


def _table(plan: dict[str, object]) -> str:
    def size(key: str) -> str:
        value = plan[key]
        assert isinstance(value, int)
        return human_bytes(value)

    rows = [
        ("model", f"{plan['model']} ({plan['architecture']}, {plan['parameters']:,} parameters)"),
        ("weights", size("weights_bytes")),
        ("KV cache a token", f"{size('kv_bytes_per_token')} ({plan['kv_dtype']})"),
        ("KV pool", f"{size('kv_pool_bytes')}, {plan['kv_pool_tokens']:,} tokens"),
        ("context", f"{plan['context']:,} of the model's {plan['model_context']:,} tokens"),
        ("at full context", f"{plan['sequences_of_full_context']:,} sequences at once"),
        ("memory free now", size("free_bytes")),
        ("fits", "yes" if plan["fits"] else "no: take a smaller model or a smaller --memory"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
