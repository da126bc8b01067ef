"""Part B: tokens of the torch backend on the device beside those of the reference in numpy.

Both compute the same tokens of the same sequences, those that the reference chooses. Where the
device would choose another one, the reference's two must be equal within the rounding of the dtype:
a numerical tie.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from octavo.backends import reference
from octavo.backends import torch as backend
from octavo.backends.program import CompileOptions, DeviceOptions, Program
from octavo.graph.batch import Float32, Int32
from octavo.graph.tensors import DenseTensor, StoredTensor
from octavo.graph.trace import Graph, Ops
from octavo.models import registry
from octavo.models.llama import llama
from octavo.models.llama_config import LlamaConfig
from octavo.models.rope import RopeConfig
from octavo.models.transforms import AddOne, UnpermuteRope
from octavo.weights.loader import ModelFiles, open_model
from parts.machine import Setup, release
from parts.record import Recorder
from parts.steps import decode_of, sampled_before, sampling_rows, step_of

TABLE = "Greedy tokens beside the reference"
BLOCK_SIZE = 16
PROMPTS = (5, 1, 37)
BOUNDS = {"fp32": 0.02, "bf16": 0.25, "file": 0.5}
"""Of a logit; those of the seeded model have a spread of about 1.5."""
CONFIG = LlamaConfig(
    vocab_size=1000,
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    rms_norm_eps=1e-5,
    max_position_embeddings=256,
    rope=RopeConfig(),
)


@dataclass(frozen=True, slots=True)
class Compared:
    """How two backends agree.

    Attributes:
        tokens: that were compared.
        ties: of them, those where the device chooses another one of two that are as good as equal.
        faults: those where it chooses another one that is worse.
        error: the greatest difference of logits.
        before_tie: equal tokens of the device's own text before the first tie, the fewest of a
            sequence.
        own_faults: sequences whose own text leaves the reference's where there is no tie.
    """

    tokens: int
    ties: int
    faults: int
    error: float
    before_tie: int
    own_faults: int


def seeded_weights(graph: Graph, dtype: str, seed: int = 2) -> dict[str, StoredTensor]:
    """Random weights whose logits have a spread of some units."""
    rng = np.random.default_rng(seed)
    stored: dict[str, StoredTensor] = {}
    for name, shape in graph.weights.items():
        spread = 1.5 / shape[-1] ** 0.5 if len(shape) == 2 else 0.2
        values = rng.normal("norm" in name, spread, shape).astype(np.float32)
        if dtype == "bf16":
            bits = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
            stored[name] = DenseTensor(bits, "bf16")
        else:
            stored[name] = DenseTensor(values, "f32")
    return stored


def options_of(setup: Setup, dtype: str, max_model_len: int) -> CompileOptions:
    """Sizes for both backends."""
    return CompileOptions(
        num_threads=1,
        block_size=BLOCK_SIZE,
        max_num_tokens=512,
        max_num_rows=16,
        max_model_len=max_model_len,
        round_activations=False,
        device=DeviceOptions(name=str(setup.device), dtype=dtype, kernels=setup.table),
    )


def run(setup: Setup, recorder: Recorder) -> None:
    """The seeded model in each dtype; a real one if its file is given."""
    for dtype in ("fp32", "bf16"):
        name = f"2 layers, seeded, {dtype}"
        recorder.attempt(TABLE, name, partial(of_seeded, setup, recorder, name, dtype))
    if setup.model is not None:
        case = partial(of_file, setup, recorder, setup.model)
        recorder.attempt(TABLE, setup.model.stem, case)


def of_seeded(setup: Setup, recorder: Recorder, name: str, dtype: str) -> None:
    """The text of the seeded model."""
    graph = llama(Ops(), CONFIG)
    weights = seeded_weights(graph, dtype)
    options = options_of(setup, dtype, CONFIG.max_position_embeddings)
    both = [b.compile(graph, weights, options) for b in (backend, reference)]
    steps = 6 if setup.quick else 48
    report(setup, recorder, name, compare(both, CONFIG.vocab_size, steps, BOUNDS[dtype]), dtype)


def report(setup: Setup, recorder: Recorder, name: str, found: Compared, dtype: str) -> None:
    """One row."""
    bound = BOUNDS[dtype]
    recorder.add(
        TABLE,
        name,
        {
            "tokens": found.tokens,
            "ties": found.ties,
            "faults": found.faults,
            "max difference of a logit": found.error,
            "own text equal for": found.before_tie,
            "own text leaves without a tie": found.own_faults,
        },
        ok=not found.faults and not found.own_faults and found.error <= bound,
        target=f"no faults, logits within {bound}",
    )
    release(setup.device)


def compare(both: list[Program], vocabulary: int, steps: int, bound: float) -> Compared:
    """Both along the reference's text, then the device along its own."""
    device, exact = both
    width = -(-(max(PROMPTS) + steps) // BLOCK_SIZE)
    tables = 1 + np.random.default_rng(5).permutation(len(PROMPTS) * width).astype(np.int32)
    tables = tables.reshape(len(PROMPTS), width)
    for program in both:
        program.allocate_cache(tables.size + 1)
    rng = np.random.default_rng(6)
    prompt = rng.integers(0, vocabulary, sum(PROMPTS)).astype(np.int32)
    text, gaps, ties, faults, error = along(device, exact, (tables, prompt), steps, bound)
    own = own_text(device, tables, prompt, steps)
    before, own_faults = steps, 0
    for sequence in range(len(PROMPTS)):
        differ = np.flatnonzero(own[:, sequence] != text[:, sequence])
        if len(differ):
            before = min(before, int(differ[0]))
            own_faults += bool(gaps[differ[0], sequence] > 2 * bound)
    for program in both:
        program.close()
    return Compared(text.size, ties, faults, error, before, own_faults)


def along(
    device: Program, exact: Program, start: tuple[Int32, Int32], steps: int, bound: float
) -> tuple[Int32, Float32, int, int, float]:
    """The reference's tokens, how far its two best ones are apart, ties, faults, difference."""
    tables, ids = start
    lengths = np.array(PROMPTS, np.int32)
    rows = np.arange(len(PROMPTS))
    text, gaps, ties, faults, error = [], [], 0, 0, 0.0
    batch = step_of(tables, lengths * 0, lengths, ids, BLOCK_SIZE)
    for number in range(steps):
        ours = device.run(batch, None, ("logits",)).values["logits"]
        theirs = exact.run(batch, None, ("logits",)).values["logits"]
        error = max(error, float(np.abs(ours - theirs).max()))
        best, other = theirs.argmax(1), ours.argmax(1)
        behind = theirs[rows, best] - theirs[rows, other]
        ties += int(((other != best) & (behind <= 2 * bound)).sum())
        faults += int((~(behind <= 2 * bound)).sum())
        ordered = np.sort(theirs, axis=1)
        gaps.append(ordered[:, -1] - ordered[:, -2])
        text.append(best.astype(np.int32))
        batch = decode_of(tables, lengths + np.int32(number), text[-1], BLOCK_SIZE)
    return np.stack(text), np.stack(gaps).astype(np.float32), ties, faults, error


def own_text(device: Program, tables: Int32, prompt: Int32, steps: int) -> Int32:
    """The device's own greedy tokens, fed back on the device as serving does it."""
    lengths = np.array(PROMPTS, np.int32)
    rows = sampling_rows(len(PROMPTS))
    pending = [device.start(step_of(tables, lengths * 0, lengths, prompt, BLOCK_SIZE), rows)]
    text = []
    for number in range(steps - 1):
        ids = sampled_before(len(PROMPTS))
        batch = decode_of(tables, lengths + np.int32(number), ids, BLOCK_SIZE)
        pending.append(device.start(batch, rows))
        text.append(pending.pop(0).result().tokens)
    text.append(pending.pop(0).result().tokens)
    return np.stack(text)


def of_file(setup: Setup, recorder: Recorder, path: Path) -> None:
    """A real model's text, in float16: its logits are larger and finer than the seeded ones'."""
    files = open_model(path)
    try:
        model = registry.build(
            files.kind,
            files.architecture,
            files.config,
            files.names(),
            lambda name: tuple(files.tensor(name).dequantize().ravel().tolist()),
            files.spare(),
        )
        weights = weights_of(model, files)
        options = options_of(setup, "fp16", 256)
        both = [b.compile(model.graph, weights, options) for b in (backend, reference)]
        steps = 4 if setup.quick else 48
        found = compare(both, model.vocab_size, steps, BOUNDS["file"])
        report(setup, recorder, path.stem, found, "file")
    finally:
        files.close()


def weights_of(model: registry.Model, files: ModelFiles) -> dict[str, StoredTensor]:
    """The weights as the graph wants them.

    As octavo/runner/loading.py, which cannot be imported here: its configuration needs msgspec.
    """
    stored: dict[str, StoredTensor] = {}
    for weight in model.graph.weights:
        name, transform = model.file_names(weight), model.transforms.get(weight)
        if isinstance(transform, UnpermuteRope):
            stored[weight] = files.tensor(name, np.array(transform.rows(), np.int64))
        elif isinstance(transform, AddOne):
            values = files.tensor(name).dequantize() + np.float32(1)
            stored[weight] = DenseTensor(values, "f32")
        else:
            stored[weight] = files.tensor(name)
    return stored
