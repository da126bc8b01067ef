"""The CPU backend: a graph lowered once to native stages (csrc/), replayed with a call a step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from octavo.backends.cpu import _native
from octavo.backends.cpu.lowering import lower
from octavo.backends.cpu.packing import add_matrix, add_vector, known_form
from octavo.backends.cpu.program import CpuProgram
from octavo.backends.key_scaling import key_factors
from octavo.backends.program import CompileOptions, Progress
from octavo.errors import KernelError
from octavo.graph import ops as op
from octavo.graph.tensors import GroupedTensor, StoredTensor
from octavo.graph.trace import Graph

__all__ = ["compile"]


def compile(
    graph: Graph,
    weights: Mapping[str, StoredTensor],
    options: CompileOptions,
    *,
    progress: Progress | None = None,
) -> CpuProgram:
    """Repack the weights and lower the graph; `weights` are not needed afterwards.

    Args:
        graph: what to compute.
        weights: every weight that the graph declares; each is looked up once.
        options: sizes, threads and instruction set.
        progress: called with the fraction of the weights packed.

    Raises:
        ConfigError: the graph has an operator that this backend lacks.
        KernelError: a weight is missing or of another shape than declared, an operator is outside
            this backend's contract, or the machine lacks the instruction set; the message says
            which.
    """
    try:
        native = _native.Program(
            options.isa,
            options.num_threads,
            options.block_size,
            options.max_num_tokens,
            options.max_num_rows,
            options.max_model_len,
            options.cache_dtype,
        )
    except ValueError as error:
        raise KernelError(str(error)) from None
    numbers, groups = _pack(native, graph, weights, progress)
    factors = _add_factors(native, graph, weights) if options.cache_dtype == "int8" else {}
    plan = lower(graph, groups, options)
    return CpuProgram(native, graph, plan, options, numbers, factors)


def _add_factors(
    native: _native.Program, graph: Graph, weights: Mapping[str, StoredTensor]
) -> dict[op.PagedAttention, tuple[int, int]]:
    """The native numbers of each attention's key factors and of their inverses."""
    return {
        operator: (
            native.add_vector(factors.ravel()),
            native.add_vector(np.float32(1) / factors.ravel()),
        )
        for operator, factors in key_factors(graph, weights).items()
    }


def _pack(
    native: _native.Program,
    graph: Graph,
    weights: Mapping[str, StoredTensor],
    progress: Progress | None,
) -> tuple[dict[str, int], dict[str, int]]:
    """Pack matrices, copy vectors; returns native numbers, and columns a group, by name."""
    numbers: dict[str, int] = {}
    groups: dict[str, int] = {}
    total = sum(math.prod(shape) for shape in graph.weights.values())
    done = 0
    for name, shape in graph.weights.items():
        weight = weights.get(name)
        if weight is None or tuple(weight.shape) != shape:
            raise KernelError(f"weight {name} is missing or not of shape {list(shape)}")
        weight = known_form(weight)
        if isinstance(weight, GroupedTensor):
            groups[name] = weight.group
        add = add_matrix if len(shape) == 2 else add_vector
        numbers[name] = add(native, name, weight)
        done += math.prod(shape)
        if progress is not None:
            progress(done / total)
    return numbers, groups
