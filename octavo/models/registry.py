"""Which architectures there are, and how a file becomes a Model: its graph, and its weights' names.

Adding an architecture is one line in FOLDERS and one in GGUFS. Nothing of a model's repository is
ever executed: auto_map and the like are not even looked at. Imports no numpy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from octavo.errors import ModelFileError
from octavo.graph.trace import Graph, Ops
from octavo.models import gemma3, llama, llama_config, qwen2
from octavo.models.source import ConfigSource
from octavo.models.transforms import Transform

Kind = Literal["folder", "gguf"]

_LAYER = re.compile(r"\.(\d+)\.")
_UNUSED = re.compile(r"rotary_emb\.inv_freq$|rope_freqs\.weight$|attn_rot_embd\.weight$")
"""Tensors that old converters left in files and that a declaration computes by itself."""


class ModelConfig(Protocol):
    """What every architecture's configuration tells the rest of the engine."""

    @property
    def vocab_size(self) -> int:
        """Rows of the logits' weight."""
        ...

    @property
    def max_position_embeddings(self) -> int:
        """The longest context."""
        ...


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one kind of file of one architecture is read.

    Attributes:
        name: as in config.json, whatever the file.
        parse: makes the configuration; raises ModelFileError that names the key.
        declare: traces the graph.
        names: declared module → module in the file, {} for the layer; None if they are the same.
        transforms: declared module → what makes the file's tensor the declared weight.
    """

    name: str
    parse: Callable[[ConfigSource], Any]
    declare: Callable[[Ops, Any], Graph]
    names: Mapping[str, str] | None = None
    transforms: Callable[[Any], Mapping[str, Transform]] = lambda config: {}


FOLDERS: Mapping[str, Architecture] = {
    a.name: a
    for a in (
        Architecture("LlamaForCausalLM", llama_config.from_folder, llama.llama),
        Architecture("MistralForCausalLM", llama_config.mistral_from_folder, llama.llama),
        Architecture("Qwen2ForCausalLM", qwen2.from_folder, llama.llama),
        Architecture(
            "Gemma3ForCausalLM",
            gemma3.from_folder,
            gemma3.gemma3,
            transforms=gemma3.folder_transforms,
        ),
    )
}

GGUFS: Mapping[str, Architecture] = {
    "llama": Architecture(
        "LlamaForCausalLM",
        llama_config.from_gguf,
        llama.llama,
        llama.GGUF_NAMES,
        llama.gguf_transforms,
    ),
    "qwen2": Architecture("Qwen2ForCausalLM", qwen2.from_gguf, llama.llama, llama.GGUF_NAMES),
    "gemma3": Architecture("Gemma3ForCausalLM", gemma3.from_gguf, gemma3.gemma3, gemma3.GGUF_NAMES),
}

REFUSED: Mapping[str, str] = {
    "Gemma3ForConditionalGeneration": "it sees images too, which is not supported; use a GGUF file "
    "of the same model, which holds its text part alone",
}
"""Architectures whose names look supported, and what to do instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A declared model and where its weights lie in its file.

    Attributes:
        architecture: as in config.json, also for a GGUF.
        config: at least vocab_size and max_position_embeddings.
        graph: what to compute; `graph.weights` are the declared names and shapes.
        transforms: declared weight → what makes the file's tensor that weight; others are taken as
            they are.
    """

    architecture: str
    config: ModelConfig
    graph: Graph
    transforms: Mapping[str, Transform]
    _names: Mapping[str, str] | None = field(repr=False)

    def file_names(self, weight: str) -> str:
        """The tensor of the file that holds a declared weight."""
        return _file_name(self._names, weight)

    @property
    def vocab_size(self) -> int:
        """Rows of the logits' weight."""
        return self.config.vocab_size

    @property
    def max_position_embeddings(self) -> int:
        """The longest context that is computed exactly."""
        return self.config.max_position_embeddings

    @property
    def num_parameters(self) -> int:
        """Numbers in all weights; tied embeddings count once."""
        return sum(math.prod(shape) for shape in self.graph.weights.values())


def build(
    kind: Kind,
    architecture: str,
    config: Mapping[str, object],
    names: Set[str],
    read_numbers: Callable[[str], tuple[float, ...]] | None = None,
    spare: Set[str] = frozenset(),
) -> Model:
    """Declare the model of a file.

    Args:
        kind: what sort of file it is.
        architecture: config.json's architectures[0], or a GGUF's general.architecture.
        config: the parsed config.json, or the GGUF's metadata.
        names: the tensors in the file; they tell biases and tied embeddings of a GGUF.
        read_numbers: the values of a small tensor of the file; asked for `rope_freqs.weight` of a
            GGUF that has it.
        spare: tensors that the file may hold and the model not use, such as biases of zeros.

    Raises:
        ModelFileError: the architecture is unknown, a key is missing or ill-typed, a feature is
            unsupported, or the file lacks tensors or holds some that the model would not use.
    """
    known = FOLDERS if kind == "folder" else GGUFS
    found = known.get(architecture)
    if architecture in REFUSED:
        raise ModelFileError(f"{architecture}: {REFUSED[architecture]}")
    if found is None:
        raise ModelFileError(
            f"architecture {architecture!r} is not supported; known are {', '.join(sorted(known))}"
        )
    prefix = "" if kind == "folder" else f"{architecture}."
    source = ConfigSource(config, names, prefix=prefix)
    if read_numbers is not None:
        source = ConfigSource(config, names, read_numbers, prefix)
    parsed = found.parse(source)
    graph = found.declare(Ops(), parsed)
    by_module = found.transforms(parsed)
    transforms = {
        weight: by_module[module]
        for weight in graph.weights
        if (module := _LAYER.sub(".{}.", weight.rpartition(".")[0])) in by_module
    }
    model = Model(
        architecture=found.name,
        config=parsed,
        graph=graph,
        transforms=transforms,
        _names=found.names,
    )
    _check_names(model, names, spare)
    return model


def _file_name(names: Mapping[str, str] | None, weight: str) -> str:
    if names is None:
        return weight
    module, _, part = weight.rpartition(".")
    layer = _LAYER.search(module)
    pattern = names[_LAYER.sub(".{}.", module)]
    return f"{pattern.format(layer[1] if layer else '')}.{part}"


def _check_names(model: Model, names: Set[str], spare: Set[str]) -> None:
    """Refuse a file that lacks a weight, or has one that would be silently left out."""
    wanted = {model.file_names(weight) for weight in model.graph.weights}
    if missing := wanted - names:
        raise ModelFileError(
            f"the file lacks {len(missing)} of the {len(wanted)} tensors of {model.architecture}, "
            f"among them {min(missing)}: it is cut or of another kind"
        )
    # A tied model's file may repeat the embedding as lm_head.
    unused = {n for n in names - wanted - spare if not _UNUSED.search(n) and n != "lm_head.weight"}
    if unused:
        raise ModelFileError(
            f"the file holds {len(unused)} tensors that {model.architecture} does not use, among "
            f"them {min(unused)}: without them its answers would be wrong"
        )
