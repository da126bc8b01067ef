"""The native extension's interface (csrc/bindings.cpp)."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from octavo.graph.batch import Batch, SamplingRows

PlaneTuple = tuple[int, tuple[int, int, int], NDArray[np.uint16], NDArray[np.uint8], int, int, int]
CodesTuple = tuple[Sequence[PlaneTuple], int]
ScaleTuple = tuple[int, tuple[int, int], CodesTuple, bool]
SampledArrays = tuple[
    NDArray[np.int32], NDArray[np.float32], NDArray[np.int32], NDArray[np.float32]
]
RowOpFields = dict[str, int | float | str]

def has_isa(name: str) -> bool:
    """Whether this machine can run the kernels of "scalar", "avx2", "avxvnni" or "avx512"."""

class Program:
    """A graph lowered to stages; see csrc/program.h. ValueErrors are faults of contract."""

    isa: str
    num_threads: int
    weights_bytes: int
    def __init__(
        self,
        isa: str | None,
        num_threads: int,
        block_size: int,
        max_num_tokens: int,
        max_num_rows: int,
        max_model_len: int,
        kv_dtype: str,
    ) -> None: ...
    def add_grouped(
        self,
        shape: tuple[int, int],
        sizes: tuple[int, int],
        codes: CodesTuple,
        scales: ScaleTuple,
        minimums: ScaleTuple | None,
    ) -> int: ...
    def add_dense(
        self,
        shape: tuple[int, int],
        dtype: Literal["f32", "f16", "bf16"],
        address: int,
        row_stride: int,
    ) -> int: ...
    def add_vector(self, values: NDArray[np.float32]) -> int: ...
    def add_rope_table(self, inv_freq: Sequence[float]) -> int: ...
    def add_cache_geometry(
        self,
        layer: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        window: int,
        soft_cap: float,
        factors: int,
        inverses: int,
    ) -> int: ...
    def add_quantized(
        self, codes: int, scales: int, sums: int, scaled_sums: int, features: int, group: int
    ) -> int: ...
    def add_rows_stage(self, selected: bool, ops: Sequence[RowOpFields]) -> None: ...
    def add_linear_stage(
        self, selected: bool, x: int, quantized: int, parts: Sequence[tuple[int, int, int, int]]
    ) -> None: ...
    def add_attention_stage(self, cache: int, query: int, out: int) -> None: ...
    def finish(self, arena_bytes: int, logits: int, vocab: int) -> None: ...
    def allocate_cache(self, num_layers: int, num_blocks: int) -> None: ...
    def copy_blocks(self, pairs: NDArray[np.int32]) -> None: ...
    def read_blocks(self, ids: NDArray[np.int32], out: NDArray[np.uint8]) -> None: ...
    def write_blocks(self, ids: NDArray[np.int32], data: NDArray[np.uint8]) -> None: ...
    def run(
        self,
        batch: Batch,
        inputs: list[tuple[str, int]],
        has_cache: bool,
        rows: SamplingRows | None,
        sampled: SampledArrays | None,
    ) -> None: ...
    def read_value(self, place: int, out: NDArray[np.float32]) -> None: ...
