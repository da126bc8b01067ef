"""From a path to a compiled Program: open files, build the graph, check weights, compile.

The only place where models, weights and backends meet.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from octavo import __version__
from octavo.backends.program import CompileOptions, DeviceOptions, Program, Progress
from octavo.config import EngineConfig, Quantization
from octavo.errors import ConfigError, ModelFileError
from octavo.graph.tensors import DenseTensor, StoredTensor
from octavo.graph.trace import Graph
from octavo.models import registry
from octavo.models.transforms import AddOne, UnpermuteRope
from octavo.runner.quantization import QuantizedWeights, choose_formats, quantized_nbytes
from octavo.weights.loader import ModelFiles, open_model

PhaseProgress = Callable[[str, float], None]
"""Called with the name of the phase of loading and the fraction of it that is done."""

BACKENDS = {
    "cpu": "octavo.backends.cpu",
    "torch": "octavo.backends.torch",
    "reference": "octavo.backends.reference",
}
"""Modules with a `compile`; the one that is used is the only one imported."""


class Compiler(Protocol):
    """`compile` of a backend."""

    def __call__(
        self,
        graph: Graph,
        weights: Mapping[str, StoredTensor],
        options: CompileOptions,
        *,
        progress: Progress | None = None,
    ) -> Program:
        """Make a Program that runs the graph; `weights` are not needed afterwards.

        Each weight is asked for once: looking it up may be what makes it.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A Program with a cache, and the numbers that describe it.

    Attributes:
        max_model_len: the most tokens of a sequence: what was asked, or the model's own cut to the
            cache.
        num_blocks: blocks of the cache.
        cache_identity: as in `types.KVPool`.
    """

    program: Program
    architecture: str
    num_parameters: int
    vocab_size: int
    max_model_len: int
    num_blocks: int
    cache_identity: str


def load(config: EngineConfig, progress: PhaseProgress) -> LoadedModel:
    """Load and compile the model that `config` names and give it a cache of at most `memory_bytes`.

    Raises:
        ModelFileError: the files are damaged, incomplete or of an unknown kind.
        ConfigError: the memory or the context length asked for cannot be had; the message has the
            numbers.
    """
    progress("files", 0.0)
    files = open_model(Path(config.model))
    try:
        model = declare(files)
        max_model_len = _plan_model_len(config, model.config.max_position_embeddings, model.graph)
        options = CompileOptions(
            num_threads=config.num_threads,
            block_size=config.block_size,
            max_num_tokens=config.max_num_batched_tokens,
            max_num_rows=min(config.max_num_seqs, config.max_num_batched_tokens),
            max_model_len=max_model_len,
            cache_dtype=config.kv_dtype,
            device=DeviceOptions(
                name=config.device,
                dtype=config.dtype,
                deterministic=config.deterministic,
                quantization=config.quantization,
            ),
        )
        compile_graph = _compiler(config)
        program = compile_graph(
            model.graph,
            _given_weights(model, files, config),
            options,
            progress=lambda fraction: progress("weights", fraction),
        )
        cache_identity = name_cache(files.digest(), config)  # The files are in memory by now.
    finally:
        files.close()
    progress("cache", 0.0)
    memory_bytes = _pool_bytes(config, program.spare_bytes())
    num_blocks = pool_blocks(config, memory_bytes, max_model_len, program.block_bytes())
    program.allocate_cache(num_blocks)
    return LoadedModel(
        program=program,
        architecture=model.architecture,
        num_parameters=model.num_parameters,
        vocab_size=model.config.vocab_size,
        max_model_len=min(max_model_len, num_blocks * config.block_size),
        num_blocks=num_blocks,
        cache_identity=cache_identity,
    )


def name_cache(weights_digest: str, config: EngineConfig) -> str:
    """A name for all that the bytes of a KV block depend on beside tokens (see `types.KVPool`).

    Octavo's version is part of it, since a kernel may sum in another order in the next one. What
    changes no bit is not: threads, instruction set, limits of a step.
    """
    parts = (
        __version__,
        weights_digest,
        config.backend,
        config.dtype,
        str(config.quantization),
        config.kv_dtype,
        str(config.block_size),
    )
    return sha256("\0".join(parts).encode()).hexdigest()


def declare(files: ModelFiles) -> registry.Model:
    """The model that the files hold, declared; reads no weight but a small table of rope divisors.

    Raises:
        ModelFileError: the files are of an unknown kind or incomplete.
    """
    return registry.build(
        files.kind,
        files.architecture,
        files.config,
        files.names(),
        lambda name: tuple(files.tensor(name).dequantize().ravel().tolist()),
        files.spare(),
    )


def _compiler(config: EngineConfig) -> Compiler:
    try:
        compiler: Compiler = importlib.import_module(BACKENDS[config.backend]).compile
    except ImportError as error:
        if error.name in ("torch", "triton"):
            raise ConfigError(
                f"--backend torch needs {error.name}: pip install 'octavo[cuda]', or give "
                "--backend cpu"
            ) from None
        if error.name == "octavo.backends.cpu":
            raise ConfigError(
                "the compiled part of Octavo is missing: install Octavo (pip install . with a C++ "
                "compiler) instead of running its sources, or give --backend torch"
            ) from None
        raise
    return compiler


def _pool_bytes(config: EngineConfig, spare_bytes: int | None) -> int:
    """What the pool may take: what was asked for, or what a device has (None: there is none).

    Raises:
        ConfigError: more was asked for than there is.
    """
    asked = config.memory_bytes
    if spare_bytes is None:
        assert asked is not None, "validate() asks for --memory where nothing else says it"
        return asked
    if asked is not None and asked > spare_bytes:
        raise ConfigError(
            f"--memory of {asked:,} bytes is more than the {spare_bytes:,} that the device has "
            "free beside the weights and the largest step: lower it, or leave it out"
        )
    return spare_bytes if asked is None else asked


def pool_blocks(
    config: EngineConfig, memory_bytes: int, max_model_len: int, block_bytes: int
) -> int:
    """How many blocks the pool has: what memory_bytes holds, but no more than can ever be used.

    Raises:
        ConfigError: the pool cannot hold one sequence of the length asked for, or not one block.
    """
    by_memory = memory_bytes // block_bytes
    a_sequence = -(-max_model_len // config.block_size)
    needed = a_sequence if config.max_model_len is not None else 1
    if by_memory < needed:
        if config.memory_bytes is None:
            raise ConfigError(
                f"the device has {memory_bytes:,} bytes free beside the weights and the largest "
                f"step; the KV cache needs at least {needed * block_bytes:,}: lower "
                "--max-num-batched-tokens, --max-num-seqs or --max-model-len, or take a smaller or "
                "a quantized model"
            )
        raise ConfigError(
            f"--memory of {memory_bytes:,} bytes holds "
            f"{by_memory * config.block_size:,} tokens of KV cache "
            f"({block_bytes // config.block_size:,} bytes a token), fewer than the "
            f"{needed * config.block_size:,} that are needed; give --memory at least "
            f"{needed * block_bytes:,} bytes or lower --max-model-len"
        )
    return min(by_memory, config.max_num_seqs * a_sequence)


def _plan_model_len(config: EngineConfig, model_len: int, graph: Graph) -> int:
    if config.max_model_len is not None:
        if config.max_model_len > model_len:
            raise ConfigError(
                f"--max-model-len {config.max_model_len:,} is more than the model's context of "
                f"{model_len:,} tokens; lower it"
            )
        return config.max_model_len
    if config.memory_bytes is None:
        return model_len  # It is cut to the pool once that is known.
    token_bytes = sum(g.bytes_per_token(config.kv_dtype) for g in graph.cache_groups)
    block_bytes = token_bytes * config.block_size
    num_blocks = pool_blocks(config, config.memory_bytes, model_len, block_bytes)
    return min(model_len, num_blocks * config.block_size)


def _given_weights(
    model: registry.Model, files: ModelFiles, config: EngineConfig
) -> Mapping[str, StoredTensor]:
    """The weights as the backend is to have them: the file's, or quantized when it asks for one."""
    weights = stored_weights(model, files)
    if config.quantization is None:
        return weights
    formats = choose_formats(model.graph, weights, config.quantization)
    if config.backend == "torch":  # It does so on the device.
        return weights
    return QuantizedWeights(weights, formats, config.num_threads)


def weights_nbytes(
    model: registry.Model, files: ModelFiles, quantization: Quantization | None
) -> int:
    """Bytes of all weights about as the CPU backend keeps them, once quantized if asked for.

    Raises:
        ConfigError: there is nothing to quantize.
    """
    formats: Mapping[str, str] = {}
    if quantization is not None:
        formats = choose_formats(model.graph, stored_weights(model, files), quantization)
    return sum(
        quantized_nbytes(shape, formats[name])
        if name in formats
        else files.outline(model.file_names(name)).widened_nbytes
        for name, shape in model.graph.weights.items()
    )


def stored_weights(model: registry.Model, files: ModelFiles) -> Mapping[str, StoredTensor]:
    """Every weight of the graph, its shape checked and made what the declaration means.

    A weight is made when it is looked up, and not kept: packed codes are unpacked one at a time.

    Raises:
        ModelFileError: a tensor is missing, or has another shape than the model declares.
    """
    for weight, shape in model.graph.weights.items():
        name = model.file_names(weight)
        found = files.outline(name).shape
        if tuple(found) != shape:
            raise ModelFileError(
                f"tensor {name} has shape {list(found)}, the configuration needs {list(shape)}: "
                "the files do not belong together"
            )
    return _StoredWeights(model, files)


class _StoredWeights(Mapping[str, StoredTensor]):
    """See stored_weights."""

    def __init__(self, model: registry.Model, files: ModelFiles) -> None:
        self._model = model
        self._files = files

    def __getitem__(self, weight: str) -> StoredTensor:
        if weight not in self._model.graph.weights:
            raise KeyError(weight)
        name = self._model.file_names(weight)
        match self._model.transforms.get(weight):
            case UnpermuteRope() as transform:
                return self._files.tensor(name, _file_rows(transform))
            case AddOne():
                values = self._files.tensor(name).dequantize()
                return DenseTensor(values + np.float32(1), "f32")
        return self._files.tensor(name)

    def __contains__(self, weight: object) -> bool:
        return weight in self._model.graph.weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._model.graph.weights)

    def __len__(self) -> int:
        return len(self._model.graph.weights)


@functools.cache
def _file_rows(transform: UnpermuteRope) -> NDArray[np.int64]:
    return np.array(transform.rows(), np.int64)
