"""How long a step takes: a cost model of the paper's machines, stated once for every figure.

    step = max(weights / read, 2 · parameters · tokens / arithmetic)         matrix products
         + kernel · KV bytes of the context / read                           attention, reading
         + 4 · layers · hidden · pairs / arithmetic                          attention, computing
         + 2 · layers · (latency + tokens · hidden · 2 · 2 (g - 1) / g / link)     g > 1 GPUs
         + fixed overhead + overhead a sequence · sequences

with `read` and `arithmetic` the data sheet's figures of all GPUs times the efficiencies below, and
`pairs` the sum over new tokens of the tokens that each one looks at. `kernel` is 1.25 for block
tables: the paper measured that its attention kernel takes 20 to 26 % longer than one over
contiguous memory (section 7.1), and 1 for the systems that reserve.

The efficiencies are usual ones for matrix products of these sizes. The overhead is what the paper's
own figure 13 implies by Little's law: 30.42 requests in a batch at 2 requests/s of 337.99 tokens
are 45.0 ms a step, 132.44 at 30/s of 58.45 are 75.5 ms, far more than the products and attention
take; the difference grows with the batch, as Python work for each sequence does. It was rounded and
set once. So those two cells are an input of the model, and no result; everything else is a result.
"""

from __future__ import annotations

from dataclasses import dataclass

BYTES = 2
"""Of a weight, and of each element of K and V: fp16."""
READ_EFFICIENCY = 0.8
ARITHMETIC_EFFICIENCY = 0.55
LINK_BYTES_S = 300e9 * 0.7
"""NVLink of an A100, one direction."""
LINK_LATENCY_S = 15e-6
PAGED_KERNEL = 1.25
CONTIGUOUS_KERNEL = 1.0


@dataclass(frozen=True)
class Gpu:
    """One accelerator's data sheet."""

    bytes_s: float
    flops: float


A100_40GB = Gpu(1.555e12, 312e12)
A100_80GB = Gpu(2.039e12, 312e12)


@dataclass(frozen=True)
class Model:
    """A model on its GPUs.

    Attributes:
        num_slots: tokens whose K and V the memory left for them holds (table 1 of the paper).
        trace_s: length of the paper's traces for it.
    """

    name: str
    num_parameters: float
    num_layers: int
    hidden_size: int
    gpu: Gpu
    num_gpus: int
    num_slots: int
    trace_s: float = 3600

    @property
    def kv_bytes(self) -> int:
        """Of one token."""
        return 2 * self.num_layers * self.hidden_size * BYTES


OPT_13B = Model("OPT-13B", 13e9, 40, 5120, A100_40GB, 1, 15_728)
OPT_66B = Model("OPT-66B", 66e9, 64, 9216, A100_40GB, 4, 9_696)
OPT_175B = Model("OPT-175B", 175e9, 96, 12288, A100_80GB, 8, 60_064, trace_s=900)
LLAMA_13B = Model("LLaMA-13B", 13e9, 40, 5120, A100_40GB, 1, 15_728)


@dataclass(frozen=True)
class Overhead:
    """What a step costs beside the GPUs' work."""

    fixed_s: float
    sequence_s: float


PYTHON = Overhead(4e-3, 0.3e-3)
"""Of the paper's system and its Orcas, which share its engine."""
NO_OVERHEAD = Overhead(0.0, 0.0)
"""FasterTransformer is a program in C++: it gets none, in its favour."""


class StepCost:
    """The seconds of a step of one model."""

    def __init__(self, model: Model, kernel: float, overhead: Overhead) -> None:
        """Work out what does not change from step to step."""
        read = model.gpu.bytes_s * READ_EFFICIENCY * model.num_gpus
        arithmetic = model.gpu.flops * ARITHMETIC_EFFICIENCY * model.num_gpus
        self._weights_s = model.num_parameters * BYTES / read
        self._token_s = 2 * model.num_parameters / arithmetic
        self._context_s = kernel * model.kv_bytes / read
        self._pair_s = 4 * model.num_layers * model.hidden_size / arithmetic
        others = (model.num_gpus - 1) / model.num_gpus
        sums = 2 * model.num_layers * (model.num_gpus > 1)
        self._link_token_s = sums * model.hidden_size * BYTES * 2 * others / LINK_BYTES_S
        self._fixed_s = sums * LINK_LATENCY_S + overhead.fixed_s
        self._sequence_s = overhead.sequence_s

    def seconds(self, num_sequences: int, num_tokens: int, context: int, pairs: float) -> float:
        """Of a step that computes `num_tokens`.

        Args:
            num_sequences: how many have tokens in it.
            num_tokens: all new tokens.
            context: sum over sequences of the tokens in their KV cache, new ones included.
            pairs: sum over new tokens of the tokens that each one attends to.
        """
        return (
            max(self._weights_s, self._token_s * num_tokens)
            + self._context_s * context
            + self._pair_s * pairs
            + self._link_token_s * num_tokens
            + self._fixed_s
            + self._sequence_s * num_sequences
        )
