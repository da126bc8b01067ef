"""What a backend promises: `compile(graph, weights, options) -> Program`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from octavo.graph.batch import Batch, Int32, SamplingRows, StepOutput
from octavo.graph.tensors import StoredTensor
from octavo.graph.trace import CacheDtype, Graph


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceOptions:
    """Of the torch backend alone.

    Attributes:
        name: "cuda", "cuda:1" (ROCm's too), or "cpu" for tests.
        dtype: of activations and dense weights; "auto" takes the weights' own, but for float32 on a
            GPU.
        deterministic: a row's result does not depend on the rows beside it.
        quantization: round the dense matrices, but for the head, to codes of this form; the
            product's input is then rounded too, token by token, but with int4.
        kernels: "auto" takes Triton's on a GPU and torch's own on the CPU; tests force one.
    """

    name: str = "cpu"
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    deterministic: bool = False
    quantization: Literal["int8", "int4", "fp8"] | None = None
    kernels: Literal["auto", "plain", "triton"] = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileOptions:
    """What a Program is built for.

    Attributes:
        num_threads: threads that `run` uses, the caller's included.
        block_size: tokens a KV block.
        max_num_tokens: the most tokens of a step; buffers are planned for it.
        max_num_rows: the most sampled rows of a step.
        max_model_len: the greatest position plus one.
        isa: "scalar", "avx2" or "avx512" forces one (tests); None takes the best.
        round_activations: reference backend alone: round the inputs of grouped products to int8 as
            the contract of Linear says.
        cache_dtype: how K and V are kept; fp32, of the reference backend alone, is for comparing
            with implementations that keep no cache at all.
        device: of the torch backend alone.
    """

    num_threads: int
    block_size: int
    max_num_tokens: int
    max_num_rows: int
    max_model_len: int
    isa: str | None = None
    round_activations: bool = True
    cache_dtype: CacheDtype = "fp16"
    device: DeviceOptions = DeviceOptions()


class PendingOutput(Protocol):
    """A step on its way."""

    def result(self) -> StepOutput:
        """Wait for it."""
        ...


@dataclass(frozen=True, slots=True)
class Done:
    """A step that was computed at once."""

    output: StepOutput

    def result(self) -> StepOutput:
        """What it gave."""
        return self.output


class Program(Protocol):
    """A compiled graph with its weights and its KV cache.

    Attributes:
        depth: steps that may be started before the first of them has returned: 2 where the host
            only says what a device is to do.
    """

    depth: int

    @property
    def description(self) -> str:
        """For people: "cpu avx512, 2 threads"."""
        ...

    @property
    def weights_bytes(self) -> int:
        """Memory of the weights as this backend keeps them."""
        ...

    def block_bytes(self) -> int:
        """Bytes of one KV block over all layers."""
        ...

    def spare_bytes(self) -> int | None:
        """Bytes that the KV pool may take beside a step as large as can be, measured.

        None where it lies in the host's memory, which others use too. Asked before
        `allocate_cache`.
        """
        ...

    def allocate_cache(self, num_blocks: int) -> None:
        """Map the KV pool; every block reads as zero. Called once."""
        ...

    def copy_blocks(self, pairs: Int32) -> None:
        """Copy whole KV blocks over all layers.

        Args:
            pairs: [P, 2], (source, destination); the result is that of one copy after another.

        Raises:
            KernelError: an id is outside the pool (nothing was copied); so for all three methods.
        """
        ...

    def read_blocks(self, ids: Int32) -> NDArray[np.uint8]:
        """The content of whole KV blocks, [B, block_bytes], in a layout of this backend's own."""
        ...

    def write_blocks(self, ids: Int32, data: NDArray[np.uint8]) -> None:
        """Give blocks the content that a Program compiled alike has read."""
        ...

    def run(self, batch: Batch, rows: SamplingRows | None, wants: Iterable[str] = ()) -> StepOutput:
        """Compute one step: write K and V, sample, return the named outputs in `wants`.

        Row s of `rows` belongs to batch.logits_rows[s].
        """
        ...

    def start(self, batch: Batch, rows: SamplingRows | None) -> PendingOutput:
        """Begin a step as `run` computes it; steps are computed in the order of their beginning.

        With a depth above 1, token ids may name what the step before samples (Batch.token_ids).
        """
        ...

    def close(self) -> None:
        """Free everything; the Program is unusable afterwards."""
        ...


Progress = Callable[[float], None]
"""Called with the fraction done, 0 to 1."""

Compile = Callable[[Graph, Mapping[str, StoredTensor], CompileOptions], Program]
