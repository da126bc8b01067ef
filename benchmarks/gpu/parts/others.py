"""Part D: what transformers' own generate does on the same device, with a model of the same shape.

Whatever it stumbles over is reported and is no failure.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import partial
from typing import Any

import torch

from octavo.models.llama_config import LlamaConfig
from parts import dummy
from parts.machine import Setup, wall_seconds
from parts.paging import title_of, workload_of
from parts.record import Recorder
from parts.serving import Request

FEW, MANY = 2, 48
"""Tokens that it generates for each request; the difference is that of decode steps alone."""
OTHER_BATCH = 32


def run(setup: Setup, recorder: Recorder, name: str) -> None:
    """One batch of the same requests."""
    config = dummy.shape_of(name, setup)
    title, requests = title_of(name), workload_of(setup)[:OTHER_BATCH]
    if not setup.is_gpu or importlib.util.find_spec("transformers") is None:
        recorder.add(title, "transformers", {"left out": "not installed, or no GPU"})
        return
    try:
        first, step = transformers_seconds(setup, config, requests)
    except Exception as error:
        recorder.add(title, "transformers", {"left out": f"{type(error).__name__}: {error}"[:200]})
        return
    outputs = [request.output for request in requests]
    cells = {
        "tok/s of answers": sum(outputs) / (first + (max(outputs) - FEW) * step),
        "tokens": sum(outputs),
        "steps": max(outputs),
        "mean batch": len(requests),
        "ms a step": 1e3 * step,
        "useful part of a static batch": sum(outputs) / (len(outputs) * max(outputs)),
    }
    recorder.add(title, f"transformers, a batch of {len(requests)}", cells)


def transformers_seconds(
    setup: Setup, config: LlamaConfig, requests: list[Request]
) -> tuple[float, float]:
    """Time of the prompts, padded to the left, with FEW tokens of each; of a further step."""
    library = importlib.import_module("transformers")
    other = library.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        max_position_embeddings=config.max_position_embeddings,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(setup.device):
            model = library.LlamaForCausalLM(other).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    longest = max(request.prompt for request in requests)
    ids = torch.ones((len(requests), longest), dtype=torch.long, device=setup.device)
    mask = torch.zeros_like(ids)
    for row, request in zip(mask, requests, strict=True):
        row[longest - request.prompt :] = 1
    with torch.inference_mode():
        generate(model, ids, mask, FEW)
        few, many = (
            wall_seconds(partial(generate, model, ids, mask, steps), setup.device)
            for steps in (FEW, MANY)
        )
    return few, (many - few) / (MANY - FEW)


def generate(model: Any, ids: torch.Tensor, mask: torch.Tensor, steps: int) -> None:
    """So many tokens for each row, whatever they are."""
    sizes = {"max_new_tokens": steps, "min_new_tokens": steps}
    model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **sizes)
