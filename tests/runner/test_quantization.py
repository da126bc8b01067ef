"""Which weights are quantized while loading, and that nothing is made twice or kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from octavo.errors import ConfigError
from octavo.graph.tensors import BlockFloatTensor, DenseTensor, GroupedTensor
from octavo.graph.trace import Graph, Ops
from octavo.runner import quantization
from octavo.runner.loading import declare, stored_weights, weights_nbytes
from octavo.runner.quantization import QuantizedWeights, choose_formats
from octavo.weights.loader import open_model


def graph_of(*, tied: bool, columns: int = 64) -> Graph:
    ops = Ops()
    x = ops.embed("embed", 10, columns)
    x = ops.linear(ops.rms_norm(x, "norm", 1e-5), "inner", columns)
    logits = ops.linear(ops.select_rows(x), "embed" if tied else "head", 10)
    return ops.finish(logits=logits)


def weights_of(graph: Graph) -> dict[str, DenseTensor]:
    random = np.random.default_rng(0)
    return {
        name: DenseTensor(random.normal(size=shape).astype(np.float32), "f32")
        for name, shape in graph.weights.items()
    }


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_take_8_bits(tied: bool) -> None:
    graph = graph_of(tied=tied)
    outer = {"embed.weight": "Q8_0"} | ({} if tied else {"head.weight": "Q8_0"})
    weights = weights_of(graph)
    assert choose_formats(graph, weights, "int4") == outer | {"inner.weight": "Q4_1"}
    assert choose_formats(graph, weights, "int8") == outer | {"inner.weight": "Q8_0"}


def test_what_is_grouped_or_does_not_divide_stays() -> None:
    graph = graph_of(tied=False)
    weights = weights_of(graph)
    formats = choose_formats(graph, weights, "int8")
    grouped = QuantizedWeights(weights, formats, 1)["embed.weight"]
    narrow = DenseTensor(np.zeros((10, 48), np.float32), "f32")
    mixed = weights | {"embed.weight": grouped, "head.weight": narrow}
    assert choose_formats(graph, mixed, "int4") == {"inner.weight": "Q4_1"}


def test_nothing_to_quantize_is_refused(smollm2_path: Path) -> None:
    files = open_model(smollm2_path)
    model = declare(files)
    with pytest.raises(ConfigError, match=r"quantized already \(Q4_1, Q8_0\); leave it out"):
        choose_formats(model.graph, stored_weights(model, files), "int8")
    files.close()
    graph = graph_of(tied=True, columns=48)
    with pytest.raises(ConfigError, match=r"multiple of 32 numbers; leave it out"):
        choose_formats(graph, weights_of(graph), "int4")
    codes = np.zeros((10, 48), np.uint8)
    float8 = {name: BlockFloatTensor(codes, np.ones((1, 1), np.float32), (10, 48)) for name in "ab"}
    with pytest.raises(ConfigError, match=r"quantized already \(FP8\); leave it out"):
        choose_formats(graph, float8, "int8")


def test_a_weight_is_quantized_when_it_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of(tied=True)
    weights = weights_of(graph)
    made: list[str] = []
    original = quantization.quantize

    def spy(tensor: DenseTensor, format_name: str, num_threads: int) -> GroupedTensor:
        made.append(format_name)
        return original(tensor, format_name, num_threads)

    monkeypatch.setattr(quantization, "quantize", spy)
    lazy = QuantizedWeights(weights, choose_formats(graph, weights, "int4"), 2)
    assert set(lazy) == set(weights) and len(lazy) == len(weights)
    assert "inner.weight" in lazy and "other" not in lazy
    assert made == []
    inner = lazy["inner.weight"]
    assert made == ["Q4_1"]
    assert isinstance(inner, GroupedTensor) and inner.format == "Q4_1"
    assert lazy["norm.weight"] is weights["norm.weight"]


def test_the_planned_size_is_that_of_the_weights(tiny_model_path: Path) -> None:
    files = open_model(tiny_model_path)
    model = declare(files)
    weights = stored_weights(model, files)
    assert weights_nbytes(model, files, None) == sum(w.nbytes for w in weights.values())
    sizes = [weights_nbytes(model, files, None)]
    for name in ("int8", "int4"):
        formats = choose_formats(model.graph, weights, name)
        lazy = QuantizedWeights(weights, formats, 1)
        sizes.append(weights_nbytes(model, files, name))
        assert sizes[-1] == sum(w.nbytes for w in lazy.values())
    assert sizes == sorted(sizes, reverse=True)
    files.close()
