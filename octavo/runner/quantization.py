"""Which weights of a model are quantized while loading, and a mapping that does it one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from octavo.config import Quantization
from octavo.errors import ConfigError
from octavo.graph import ops as op
from octavo.graph.tensors import DenseTensor, StoredTensor
from octavo.graph.trace import Graph
from octavo.weights.formats.quantize import GROUP, can_quantize, quantize


def choose_formats(
    graph: Graph, weights: Mapping[str, StoredTensor], quantization: Quantization
) -> Mapping[str, str]:
    """The format of each weight that is to be quantized; the others stay as they are.

    With int4 the embedding and the head take 8 bits: they make few of a model's weights and much
    of its error.

    Raises:
        ConfigError: no weight can be quantized.
    """
    outer = _embedding_and_head(graph)
    formats = {
        name: "Q8_0" if quantization == "int8" or name in outer else "Q4_1"
        for name, weight in weights.items()
        if isinstance(weight, DenseTensor) and can_quantize(weight)
    }
    if formats:
        return formats
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
