"""The torch backend's Program: calls of kernels over a step's arrays, on one device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from octavo.backends.program import Bytes, CompileOptions
from octavo.backends.torch.arrays import Staging, put_ids, put_rows, put_step
from octavo.backends.torch.cache import KVCache, independent
from octavo.backends.torch.device import describe, launching_on
from octavo.backends.torch.execute import GraphExecutor
from octavo.backends.torch.graphs import DecodeGraphs, is_decode
from octavo.backends.torch.kernels import Sampled
from octavo.backends.torch.memory import largest_steps, measure_spare_bytes, steps_to_load
from octavo.backends.torch.transfers import PendingRows, Transfers, host_memory
from octavo.errors import ConfigError, KernelError
from octavo.graph.batch import Batch, Float32, Int32, SamplingRows, StepOutput
from octavo.graph.trace import Graph


class Pending:
    """A step that the device computes; what it samples is on its way to the host."""

    def __init__(self, sampled: Sampled | None, device: torch.device) -> None:
        """Send what is sampled on its way.

        A step that samples nothing is waited for too: the host is never more steps ahead than its
        staging memory is there for.
        """
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            if sampled is not None:
                sampled = Sampled(*(value.to("cpu", non_blocking=True) for value in sampled))
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))
        self._sampled = sampled

    def result(self) -> StepOutput:
        """Wait for it."""
        if self._event is not None:
            self._event.synchronize()
        return _output(self._sampled)


class TorchProgram:
    """See backends.program.Program."""

    depth = 2

    def __init__(
        self,
        graph: Graph,
        options: CompileOptions,
        executor: GraphExecutor,
        cache: KVCache | None,
        device: torch.device,
    ) -> None:
        """Serve what was compiled; the cache is made by allocate_cache."""
        self._graph = graph
        self._options = options
        self._executor: GraphExecutor | None = executor
        self._cache = cache
        self._device = device
        self._transfers = None if cache is None else Transfers(cache, device)
        self._step_staging = Staging(device)
        self._rows_staging = Staging(device)
        self._last_tokens = torch.zeros(0, dtype=torch.int32, device=device)
        has_graphs = device.type == "cuda" and cache is not None
        sizes = (options.block_size, options.max_num_rows)
        self._graphs = DecodeGraphs(device, executor, *sizes) if has_graphs else None

    @property
    def description(self) -> str:
        """For people: "torch bf16 on NVIDIA H200"."""
        names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        mode = ", deterministic" if self._options.device.deterministic else ""
        return f"torch {names[self._alive().dtype]} on {describe(self._device)}{mode}"

    @property
    def weights_bytes(self) -> int:
        """Memory of the weights on the device."""
        return self._alive().weights_bytes

    def block_bytes(self) -> int:
        """Bytes of one KV block over all layers."""
        return 0 if self._cache is None else self._cache.block_bytes

    def spare_bytes(self) -> int | None:
        """Bytes that the largest step leaves free on a GPU, other processes respected."""
        if self._device.type != "cuda":
            return None
        try:
            return measure_spare_bytes(self._device, self._run_largest)
        except torch.OutOfMemoryError:
            raise ConfigError(
                "the device has no room for the largest step beside the weights: lower "
                "--max-num-batched-tokens or --max-num-seqs, or take a smaller or a quantized model"
            ) from None

    def _run_largest(self) -> None:
        """Compute steps as large as can be, over a cache of one block."""
        if self._cache is not None:
            self._cache.allocate(1)
        try:
            self._run_all(largest_steps(self._options))
        finally:
            if self._cache is not None:
                self._cache.release()

    def _run_all(self, steps: Iterable[tuple[Batch, SamplingRows]]) -> None:
        for batch, rows in steps:
            self.run(batch, rows)

    def allocate_cache(self, num_blocks: int) -> None:
        """Make the KV pool; every block reads as zero."""
        self._alive()
        if self._cache is None:
            return
        if self._cache.num_blocks:
            raise KernelError("the cache is allocated once")
        self._cache.allocate(num_blocks)
        if self._device.type == "cuda":
            self._run_all(steps_to_load(self._options))
            # Torch keeps the memory of these: whoever else is on the device cannot take it.
            self._run_all(largest_steps(self._options))

    def copy_blocks(self, pairs: Int32) -> None:
        """Copy whole blocks, one pair after another."""
        cache = self._cache_of_blocks(pairs, (2,))
        with launching_on(self._device):
            for together in independent(pairs.tolist()):
                there = put_ids(np.array(together, np.int32), self._device)
                self._alive().kernels.copy_blocks(cache.pool, there)

    def read_blocks(self, ids: Int32, out: Sequence[Bytes] | None = None) -> PendingRows:
        """Begin to read whole blocks, layer after layer."""
        self._cache_of_blocks(ids)
        if out is not None:
            self._check_rows(ids, out)
        assert self._transfers is not None
        return self._transfers.read(ids, out)

    def write_blocks(self, ids: Int32, data: Sequence[Bytes]) -> Callable[[], float]:
        """Give blocks a content that was read."""
        self._cache_of_blocks(ids)
        self._check_rows(ids, data)
        assert self._transfers is not None
        return self._transfers.write(ids, data)

    def _check_rows(self, ids: Int32, rows: Sequence[Bytes]) -> None:
        shape = (self.block_bytes(),)
        fits = all(row.dtype == np.uint8 and row.shape == shape for row in rows)
        if len(rows) != len(ids) or not fits:
            raise KernelError(f"data is not uint8 [{len(ids)}, {self.block_bytes()}]")

    def host_memory(self, num_bytes: int) -> Bytes:
        """Memory that the device copies from and to by itself."""
        return host_memory(num_bytes, self._device)

    def run(self, batch: Batch, rows: SamplingRows | None, wants: Iterable[str] = ()) -> StepOutput:
        """Compute one step.

        Raises:
            KernelError: an array is outside its contract (nothing was computed), or the program is
                closed.
        """
        wants = tuple(wants)
        for name in wants:
            if name not in self._graph.outputs:
                raise KernelError(f"the graph has no output {name}")
        values, sampled = self._begin(batch, rows, wants)
        output = Pending(sampled, self._device).result()
        return replace(output, values={name: _to_host(values[name]) for name in wants})

    def start(self, batch: Batch, rows: SamplingRows | None) -> Pending:
        """Begin one step; raises as `run` does."""
        _, sampled = self._begin(batch, rows, ())
        return Pending(sampled, self._device)

    def _begin(
        self, batch: Batch, rows: SamplingRows | None, wants: tuple[str, ...]
    ) -> tuple[Mapping[str, Tensor], Sampled | None]:
        """Have a step computed; return the outputs that are wanted, and what is sampled."""
        executor = self._alive()
        self._check(batch, rows)
        with launching_on(self._device), torch.inference_mode():
            if self._graphs is not None and rows is not None and not wants and is_decode(batch):
                logits = self._graphs.run(batch, self._last_tokens)
                return {}, self._sample(logits, rows)
            names = {*wants} | (set() if rows is None else {"logits"})
            step, ids, logits_rows = put_step(self._step_staging, batch, self._last_tokens)
            inputs = {
                name: torch.from_numpy(values).to(self._device, executor.dtype)
                for name, values in batch.inputs.items()
            }
            values = executor.run(step, ids, logits_rows, inputs, names)
            if rows is None:
                return values, None
            logits = values["logits"]
            return values, self._sample(logits.clone() if "logits" in wants else logits, rows)

    def _sample(self, logits: Tensor, rows: SamplingRows) -> Sampled:
        """Sample from logits, which may be overwritten."""
        arrays = put_rows(self._rows_staging, rows)
        sampled = self._alive().kernels.sample(logits.float(), arrays)
        self._last_tokens = sampled.tokens
        return sampled

    def close(self) -> None:
        """Free everything; the Program is unusable afterwards."""
        self._executor = None
        self._graphs = None
        self._transfers = None
        if self._device.type == "cuda":  # Copies may still be on their way to the host's memory.
            torch.cuda.synchronize(self._device)
        if self._cache is not None:
            self._cache.release()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _alive(self) -> GraphExecutor:
        if self._executor is None:
            raise KernelError("the program is closed")
        return self._executor

    def _cache_of_blocks(self, ids: Int32, row: tuple[int, ...] = ()) -> KVCache:
        """The cache, once `ids` of shape [n, *row] are found to lie inside it."""
        self._alive()
        if self._cache is None or not self._cache.num_blocks:
            raise KernelError("allocate_cache must be called before blocks are moved")
        if ids.dtype != np.int32 or ids.ndim != 1 + len(row) or ids.shape[1:] != row:
            raise KernelError("block ids are not an int32 array of the rank that the contract says")
        if ids.size and not 0 <= ids.min() <= ids.max() < self._cache.num_blocks:
            raise KernelError("a block id lies outside the KV cache")
        return self._cache

    def _check(self, batch: Batch, rows: SamplingRows | None) -> None:
        """Refuse what would make a kernel read or write elsewhere than in its arrays."""
        limits, faults = self._options, []
        starts = batch.query_start_loc
        if starts[0] != 0 or starts[-1] != len(batch.token_ids) or (np.diff(starts) < 1).any():
            faults.append("query_start_loc does not divide the tokens")
        if not 0 < len(batch.token_ids) <= limits.max_num_tokens:
            faults.append("the batch is empty or larger than the program was compiled for")
        if len(batch.logits_rows) > limits.max_num_rows:
            faults.append("more rows are sampled than the program was compiled for")
        vocabulary = self._alive().vocabulary
        ids = batch.token_ids
        faults += _outside("a token id", ids[ids >= 0], vocabulary)
        faults += _outside("a token of the step before", ~ids[ids < 0], len(self._last_tokens))
        faults += _outside("a position", batch.positions, limits.max_model_len)
        faults += _outside("a row of logits", batch.logits_rows, len(batch.token_ids))
        if batch.seq_lens.max(initial=0) > limits.max_model_len:
            faults.append("a sequence is longer than max_model_len")
        if self._cache is not None:
            num_blocks = self._cache.num_blocks
            faults += _outside("a block", batch.block_tables[0], num_blocks)
            slots = batch.slot_mapping[0]
            slots = slots[slots != -1]  # nowhere
            faults += _outside("a slot", slots, num_blocks * limits.block_size)
            if batch.block_tables[0].shape[1] * limits.block_size < batch.seq_lens.max():
                faults.append("a block table is too short")
        if rows is not None:
            if len(rows.num_logprobs) != len(batch.logits_rows):
                faults.append("sampling rows and logits_rows differ in number")
            faults += _outside("a penalized token", rows.penalties.token_ids, vocabulary)
            faults += _outside("a biased token", rows.bias.token_ids, vocabulary)
        if faults:
            raise KernelError("; ".join(faults))


def _outside(name: str, numbers: Int32, end: int | None) -> list[str]:
    if end is None or not numbers.size or 0 <= numbers.min() <= numbers.max() < end:
        return []
    return [f"{name} lies outside of 0 to {end - 1}"]


def _to_host(value: Tensor) -> Float32:
    array: Float32 = value.float().cpu().numpy()
    return array


def _output(sampled: Sampled | None) -> StepOutput:
    if sampled is None:
        none, no_floats = np.zeros(0, np.int32), np.zeros(0, np.float32)
        return StepOutput(
            tokens=none,
            logprobs=no_floats,
            top_ids=none.reshape(0, 0),
            top_logprobs=no_floats.reshape(0, 0),
        )
    return StepOutput(
        tokens=sampled.tokens.numpy(),
        logprobs=sampled.logprobs.numpy(),
        top_ids=sampled.top_ids.numpy(),
        top_logprobs=sampled.top_logprobs.numpy(),
    )
