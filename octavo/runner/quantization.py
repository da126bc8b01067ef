"""Which weights of a model are quantized while loading, and a mapping that does it one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from octavo.config import Quantization
from octavo.errors import ConfigError
from octavo.graph import ops as op
from octavo.graph.tensors import DenseTensor, StoredTensor
from octavo.graph.trace import Graph
from octavo.weights.formats import quantize as formats
from octavo.weights.formats.quantize import GROUP, can_quantize, quantize

FP8 = "FP8"
"""One byte a weight and a float32 scale a row: of the torch backend, which rounds on its device."""
SCALE_BYTES = 4


def choose_formats(
    graph: Graph, weights: Mapping[str, StoredTensor], quantization: Quantization
) -> Mapping[str, str]:
    """The format of each weight that is to be quantized; the others stay as they are.

    With int4 the embedding and the head take 8 bits, with fp8 they stay as they are: they make few
    of a model's weights and much of its error.

    Raises:
        ConfigError: no weight can be quantized.
    """
    outer = _embedding_and_head(graph)
    inner = {"int8": "Q8_0", "int4": "Q4_1", "fp8": FP8}[quantization]
    chosen = {
        name: "Q8_0" if name in outer else inner
        for name, weight in weights.items()
        if isinstance(weight, DenseTensor) and can_quantize(weight)
    }
    if quantization == "fp8":
        chosen = {name: kind for name, kind in chosen.items() if name not in outer}
    if chosen:
        return chosen
    known = {w.format for w in weights.values() if not isinstance(w, DenseTensor)}
    if known:
        reason = f"the file is quantized already ({', '.join(sorted(known))})"
    else:
        reason = f"no matrix has rows of a multiple of {GROUP} numbers"
    raise ConfigError(f"--quantization {quantization} has nothing to do: {reason}; leave it out")


def _embedding_and_head(graph: Graph) -> set[str]:
    """Weights that look tokens up or make the logits."""
    head = graph.outputs.get("logits")
    return {
        node.operator.weight
        for node in graph.nodes
        if isinstance(node.operator, op.Embed)
        or (isinstance(node.operator, op.Linear) and node.output == head)
    }


def quantized_nbytes(shape: tuple[int, ...], format_name: str) -> int:
    """Bytes of a matrix in a format of `choose_formats`."""
    if format_name == FP8:
        return shape[0] * (shape[1] + SCALE_BYTES)
    return formats.quantized_nbytes(shape, format_name)


class QuantizedWeights(Mapping[str, StoredTensor]):
    """Weights of which some are quantized at the moment they are looked up, and not kept.

    So no more than one of them is in memory beside what a backend makes of it.
    """

    def __init__(
        self, weights: Mapping[str, StoredTensor], formats: Mapping[str, str], num_threads: int
    ) -> None:
        """See `weights`, those in `formats` quantized by so many threads."""
        self._weights = weights
        self._formats = formats
        self._num_threads = num_threads

    def __getitem__(self, name: str) -> StoredTensor:
        """The weight; work is done anew each time."""
        weight = self._weights[name]
        if name not in self._formats:
            return weight
        assert isinstance(weight, DenseTensor)
        return quantize(weight, self._formats[name], self._num_threads)

    def __contains__(self, name: object) -> bool:
        """Whether there is such a weight; quantizes nothing."""
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._weights)

    def __len__(self) -> int:
        """How many weights there are."""
        return len(self._weights)
