"""Triton kernels run in its interpreter here: there is no device. And a tiny model."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported by anything

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from triton.runtime import interpreter

from octavo.graph.tensors import DenseTensor, StoredTensor
from octavo.graph.trace import Graph, Ops
from octavo.models.llama import llama
from octavo.models.llama_config import LlamaConfig
from octavo.models.rope import RopeConfig

CONFIG = LlamaConfig(
    vocab_size=70,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
    rope=RopeConfig(theta=300.0),
    attention_bias=True,
)
_ROUNDED = {"bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn}


@pytest.fixture(autouse=True)
def rounding_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """To bfloat16 and fp8, round to nearest even: the interpreter cuts or mistakes the carry."""
    convert = interpreter._convert_float

    def rounded(values: NDArray[Any], source: Any, target: Any, mode: Any) -> NDArray[Any]:
        if source.name != "fp32" or target.name not in _ROUNDED:
            result: NDArray[Any] = convert(values, source, target, mode)
            return result
        codes = torch.from_numpy(np.ascontiguousarray(values)).to(_ROUNDED[target.name])
        whole = {1: torch.uint8, 2: torch.uint16}[codes.itemsize]
        return codes.view(whole).numpy().reshape(values.shape)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return llama(Ops(), CONFIG)


@pytest.fixture(scope="module")
def weights(graph: Graph) -> dict[str, StoredTensor]:
    rng = np.random.default_rng(2)
    stored: dict[str, StoredTensor] = {}
    for name, shape in graph.weights.items():
        spread = 1.5 / shape[-1] ** 0.5 if len(shape) == 2 else 0.3
        values = rng.normal("norm" in name, spread, shape)
        stored[name] = DenseTensor(values.astype(np.float32), "f32")
    return stored
