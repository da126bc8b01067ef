"""How close a backend's logits come to an independent implementation of the same weights.

    python benchmarks/cpu/quality.py --text FILE[.gz] [--tokens N] [--model SPEC]
        [--no-transformers] [--int8-cache] [--quick]

Runs one text through the reference backend (float32), transformers on the dequantized weights, and
the CPU backend, in lockstep chunk by chunk, and prints mean KL divergence, share of equal top
tokens and perplexities of each pair; with --int8-cache only the reference backend, unrounded but
for its KV cache of fp16 and int8, and the CPU backend with both; with --quick transformers and the
CPU backend with both caches, for long texts. A long text is taken in windows,
each with a context of its own. The oracle tests use the same functions.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import itertools
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.backends.program import CompileOptions, Program
from octavo.backends.reference.operators import round_to_int8
from octavo.config import available_cpus
from octavo.graph import ops as op
from octavo.graph.batch import Batch
from octavo.graph.tensors import GroupedTensor, StoredTensor
from octavo.graph.trace import Graph, Node
from octavo.models import registry
from octavo.models.gemma3 import Gemma3Config
from octavo.models.rope import LinearScaling, Llama3Scaling
from octavo.runner.loading import declare, stored_weights
from octavo.runner.quantization import QuantizedWeights, choose_formats
from octavo.tokenizer.load import load_tokenizer
from octavo.weights import source
from octavo.weights.loader import open_model

Float32 = NDArray[np.float32]
Weights = Mapping[str, StoredTensor]
Parts = Sequence[tuple[int, Sequence[int]]]

BLOCK_SIZE = 16
CHUNK = 200
WINDOW = 2000

SHARED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "max_position_embeddings",
    "tie_word_embeddings",
)


def load(path: Path) -> tuple[registry.Model, Weights]:
    """Declare the model of a file or folder and read its weights."""
    files = open_model(path)
    model = declare(files)
    return model, stored_weights(model, files)


@dataclass(frozen=True, slots=True)
class Stream:
    """A Program that sequences are fed to; sequence b owns the blocks b * num_blocks and following.

    Attributes:
        program: with a cache for all of them.
        num_blocks: blocks a sequence.
    """

    program: Program
    num_blocks: int

    @classmethod
    def compile(
        cls,
        backend: str,
        model: registry.Model,
        weights: Weights,
        *,
        num_sequences: int = 1,
        max_len: int,
        max_tokens: int | None = None,
        **options: Any,
    ) -> Stream:
        """Compile the model on a backend ("reference" or "cpu") with room for the sequences.

        A step takes up to max_tokens; None: the sequences whole.
        """
        num_blocks = -(-max_len // BLOCK_SIZE)
        max_tokens = max_len * num_sequences if max_tokens is None else max_tokens
        settings = CompileOptions(
            num_threads=available_cpus(),
            block_size=BLOCK_SIZE,
            max_num_tokens=max_tokens,
            max_num_rows=max_tokens,
            max_model_len=max_len,
        )
        module = importlib.import_module(f"octavo.backends.{backend}")
        program = module.compile(model.graph, weights, replace(settings, **options))
        program.allocate_cache(num_blocks * num_sequences)
        return cls(program, num_blocks)

    def logits(self, parts: Parts, last_only: bool = False) -> Float32:
        """Feed (tokens already fed, new tokens) of each sequence; return the new tokens' logits."""
        return self.values(parts, ["logits"], last_only=last_only)["logits"]

    def values(
        self,
        parts: Parts,
        wants: Iterable[str],
        *,
        inputs: Mapping[str, Float32] | None = None,
        last_only: bool = False,
    ) -> Mapping[str, Float32]:
        """Feed as `logits` does; return the named outputs of the graph."""
        lengths = [len(ids) for _, ids in parts]
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        owner = np.repeat(np.arange(len(parts)), lengths)
        positions = np.concatenate([np.arange(s, s + len(ids)) for s, ids in parts])
        table = np.arange(len(parts) * self.num_blocks).reshape(len(parts), -1)
        slots = table[owner, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        batch = Batch(
            token_ids=np.concatenate([np.asarray(ids) for _, ids in parts]).astype(np.int32),
            positions=positions.astype(np.int32)[None],
            query_start_loc=starts,
            seq_lens=np.array([s + len(ids) for s, ids in parts], np.int32),
            block_tables=(table.astype(np.int32),),
            slot_mapping=(slots.astype(np.int32),),
            logits_rows=starts[1:] - 1 if last_only else np.arange(starts[-1], dtype=np.int32),
            inputs=inputs or {},
        )
        return self.program.run(batch, None, wants).values

    def chunks(self, token_ids: Sequence[int], chunk: int) -> Iterator[Float32]:
        """The logits of one text, chunk after chunk."""
        for start in range(0, len(token_ids), chunk):
            yield self.logits([(start, token_ids[start : start + chunk])])

    def greedy(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """The most probable continuation of each prompt."""
        logits = self.logits([(0, prompt) for prompt in prompts], last_only=True)
        answers: list[list[int]] = [[int(row.argmax())] for row in logits]
        while len(answers[0]) < num_tokens:
            parts = [(len(p) + len(a) - 1, a[-1:]) for p, a in zip(prompts, answers, strict=True)]
            for answer, row in zip(answers, self.logits(parts, last_only=True), strict=True):
                answer.append(int(row.argmax()))
        return answers


class SameRounding:
    """The CPU backend, and the reference backend that rounds as that run of the CPU backend did.

    Rounding activations to int8 is chaotic: a sum that differs in its last bit flips a code here
    and there, which moves the next layer's inputs by far more, and after a few layers most codes
    differ. Two backends that round on their own agree no better than rounded with unrounded (two
    runs of the reference in other chunks: KL 2.7e-3). So the reference is given the rounding
    errors: to the input of each grouped product it adds what the contract's rounding adds to the
    CPU backend's value of that input, and likewise to K and V, which the cache rounds to float16.
    Everything else it computes by itself in float32.
    """

    def __init__(self, model: registry.Model, weights: Weights, **sizes: Any) -> None:
        """Compile both; sizes as in Stream.compile."""
        graph = model.graph
        self._groups: dict[str, int | None] = {}  # None: rounded to float16
        taps: dict[str, int] = {}
        for node in graph.nodes:
            values, group = _rounded_inputs(node, weights)
            for value in values:
                self._groups[f"rounded {value}"] = group
                taps[f"rounded {value}"] = value
        tapped = replace(graph, outputs={**graph.outputs, **taps})
        self.cpu = Stream.compile("cpu", replace(model, graph=tapped), weights, **sizes)
        self._reference = Stream.compile(
            "reference",
            replace(model, graph=_add_to_inputs(graph, taps)),
            weights,
            round_activations=False,
            cache_dtype="fp32",
            **sizes,
        )

    def logits(self, parts: Parts) -> tuple[Float32, Float32]:
        """Feed both; the CPU backend's logits, and the reference's."""
        values = self.cpu.values(parts, ["logits", *self._groups])
        errors = {name: _rounding_error(values[name], g) for name, g in self._groups.items()}
        theirs = self._reference.values(parts, ["logits"], inputs=errors)
        return values["logits"], theirs["logits"]

    def chunks(
        self, token_ids: Sequence[int], chunk: int
    ) -> tuple[Iterator[Float32], Iterator[Float32]]:
        """The logits of one text, chunk after chunk: the CPU backend's, and the reference's."""
        both = (
            self.logits([(start, token_ids[start : start + chunk])])
            for start in range(0, len(token_ids), chunk)
        )
        first, second = itertools.tee(both)
        return (cpu for cpu, _ in first), (reference for _, reference in second)


def _rounded_inputs(node: Node, weights: Weights) -> tuple[tuple[int, ...], int | None]:
    """The values that an operator rounds, and in which groups to int8, or None for float16."""
    if isinstance(node.operator, op.PagedAttention):
        return node.inputs[1:], None
    if isinstance(node.operator, op.Linear):
        weight = weights[node.operator.weight]
        if isinstance(weight, GroupedTensor):
            return node.inputs, weight.group
    return (), None


def _add_to_inputs(graph: Graph, names: Mapping[str, int]) -> Graph:
    """The graph where a named input is added to each of the given values before it is rounded."""
    fresh = itertools.count(max(node.output for node in graph.nodes) + 1)
    name_of = {value: name for name, value in names.items()}
    sums: dict[int, int] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        if isinstance(node.operator, op.Linear | op.PagedAttention):
            node = replace(node, inputs=tuple(sums.get(i, i) for i in node.inputs))
        nodes.append(node)
        if node.output in name_of:
            error, total = next(fresh), next(fresh)
            name = name_of[node.output]
            nodes.append(Node(op.Input(name, node.features), (), error, node.features))
            nodes.append(Node(op.Add(), (node.output, error), total, node.features))
            sums[node.output] = total
    return replace(graph, nodes=tuple(nodes))


def _rounding_error(x: Float32, group: int | None) -> Float32:
    if group is None:
        return x.astype(np.float16).astype(np.float32) - x
    codes, scales = round_to_int8(x, group)
    return (codes * scales).transpose(1, 0, 2).reshape(x.shape) - x


def build_transformers(model: registry.Model, weights: Weights) -> Any:
    """The same model in transformers, float32, holding the dequantized weights."""
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    config: Any = model.config
    gemma = config if isinstance(config, Gemma3Config) else None
    sizes = config if gemma is None else gemma.sizes
    settings = {key: getattr(sizes, key) for key in SHARED_KEYS}
    if sizes.windows:
        raise SystemExit("models with windows are compared in tests/oracle/test_tiny_models.py")
    if gemma is None:
        settings["rope_parameters"] = _rope_parameters(sizes.rope)
    else:
        settings |= _gemma_settings(gemma)
    if model.architecture == "LlamaForCausalLM":
        settings |= {"attention_bias": sizes.attention_bias, "mlp_bias": sizes.mlp_bias}
    made_by = getattr(transformers, model.architecture)
    oracle = made_by(made_by.config_class(**settings, head_dim=sizes.head_dim)).eval()
    state = {name: torch.from_numpy(w.dequantize()) for name, w in weights.items()}
    if gemma is not None:  # it adds 1 to norms
        state = {n: w - 1 if "norm" in n else w for n, w in state.items()}
    missing, unexpected = oracle.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if sizes.tie_word_embeddings else set()
    if unexpected or not set(missing) <= tied:
        raise SystemExit(f"transformers wants other weights: {missing} {unexpected}")
    oracle.tie_weights()
    return oracle


def _gemma_settings(config: Gemma3Config) -> dict[str, object]:
    return {
        "query_pre_attn_scalar": round(config.attention_scale**-2),
        "attn_logit_softcapping": config.soft_cap,
        "sliding_window": config.window,
        "layer_types": _layer_types(config.slides),
        "rope_parameters": {
            "full_attention": _rope_parameters(config.sizes.rope),
            "sliding_attention": _rope_parameters(config.local_rope),
        },
    }


def _layer_types(slides: Iterable[bool]) -> list[str]:
    return ["sliding_attention" if s else "full_attention" for s in slides]


def _rope_parameters(rope: Any) -> dict[str, object]:
    match rope.scaling:
        case None:
            return {"rope_type": "default", "rope_theta": rope.theta}
        case LinearScaling(factor):
            return {"rope_type": "linear", "rope_theta": rope.theta, "factor": factor}
        case Llama3Scaling(factor, low, high, original):
            return {
                "rope_type": "llama3",
                "rope_theta": rope.theta,
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
        case other:
            raise SystemExit(f"transformers has no counterpart of {type(other).__name__}")


def transformers_chunks(oracle: Any, token_ids: Sequence[int], chunk: int) -> Iterator[Float32]:
    """The logits of one text from transformers, chunk after chunk through its own cache."""
    torch: Any = importlib.import_module("torch")
    cache: Any = importlib.import_module("transformers").DynamicCache(config=oracle.config)
    for start in range(0, len(token_ids), chunk):
        ids = torch.tensor([list(token_ids[start : start + chunk])])
        with torch.no_grad():
            out = oracle(ids, cache=cache, use_cache=True)
        yield out.logits[0].numpy()


@dataclass(slots=True)
class Agreement:
    """Sums over positions of how two streams of logits compare: p is the truth, q is judged."""

    positions: int = 0
    same_top: int = 0
    kl_sum: float = 0.0
    predicted: int = 0
    nll_p: float = 0.0
    nll_q: float = 0.0

    def add(self, p: Float32, q: Float32, next_ids: Sequence[int]) -> None:
        """Count a chunk of log probabilities; next_ids follow its positions."""
        self.positions += len(p)
        self.same_top += int((p.argmax(1) == q.argmax(1)).sum())
        self.kl_sum += float((np.exp(p) * (p - q)).sum())
        rows = np.arange(len(next_ids))
        self.predicted += len(rows)
        self.nll_p -= float(p[rows, next_ids].sum())
        self.nll_q -= float(q[rows, next_ids].sum())

    @property
    def kl(self) -> float:
        """Mean KL(p || q) in nats."""
        return self.kl_sum / self.positions

    @property
    def same_top_share(self) -> float:
        """Share of positions where both find the same token most probable."""
        return self.same_top / self.positions

    @property
    def perplexity_change(self) -> float:
        """Perplexity of q over that of p, minus 1."""
        return math.exp((self.nll_q - self.nll_p) / self.predicted) - 1

    @property
    def perplexity(self) -> float:
        """Perplexity of q."""
        return math.exp(self.nll_q / self.predicted)


def compare(
    streams: Mapping[str, Iterable[Float32]],
    pairs: Sequence[tuple[str, str]],
    token_ids: Sequence[int],
    *,
    progress: bool = False,
    found: dict[tuple[str, str], Agreement] | None = None,
) -> dict[tuple[str, str], Agreement]:
    """Run streams of logits in lockstep and judge the pairs (truth, judged).

    The sums go on from those `found` in earlier windows of the text.
    """
    found = found or {pair: Agreement() for pair in pairs}
    started, done = time.monotonic(), 0
    for chunks in zip(*streams.values(), strict=True):
        logs = {name: _log_softmax(c) for name, c in zip(streams, chunks, strict=True)}
        rows = len(chunks[0])
        next_ids = token_ids[done + 1 : done + rows + 1]
        for (p, q), agreement in found.items():
            agreement.add(logs[p], logs[q], next_ids)
        done += rows
        if progress:
            seconds = time.monotonic() - started
            print(f"\r{done}/{len(token_ids)} positions, {seconds:.0f} s", end="", file=sys.stderr)
    if progress:
        print(file=sys.stderr)
    return found


def _log_softmax(logits: Float32) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def read_text(path: Path, most_bytes: int) -> str:
    """The beginning of a UTF-8 text, which may be compressed."""
    with path.open("rb") as file:
        source_file = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
        return source_file.read(most_bytes).decode("utf-8", "ignore")


Pairs = list[tuple[str, str]]


def cache_streams(
    model: registry.Model, weights: Weights, token_ids: Sequence[int]
) -> tuple[dict[str, Iterable[Float32]], Pairs]:
    """An int8 KV cache against fp16: the rest unrounded, and on the CPU backend."""
    streams: dict[str, Iterable[Float32]] = {}
    for name, backend, options in (
        ("fp32", "reference", {"round_activations": False}),
        ("cpu", "cpu", {}),
    ):
        for dtype in ("fp16", "int8"):
            streams[f"{name}, {dtype} cache"] = Stream.compile(
                backend, model, weights, max_len=len(token_ids), max_tokens=CHUNK,
                cache_dtype=dtype, **options,
            ).chunks(token_ids, CHUNK)  # fmt: skip
    return streams, [
        ("fp32, fp16 cache", "fp32, int8 cache"),
        ("cpu, fp16 cache", "cpu, int8 cache"),
        ("fp32, fp16 cache", "cpu, fp16 cache"),
        ("fp32, fp16 cache", "cpu, int8 cache"),
    ]


def quick_streams(
    model: registry.Model, weights: Weights, token_ids: Sequence[int], oracle: Any
) -> tuple[dict[str, Iterable[Float32]], Pairs]:
    """The CPU backend with both KV caches against transformers: the numpy reference takes long."""
    streams = {
        f"cpu, {dtype} cache": Stream.compile(
            "cpu", model, weights, max_len=len(token_ids), max_tokens=CHUNK, cache_dtype=dtype
        ).chunks(token_ids, CHUNK)
        for dtype in ("fp16", "int8")
    }
    fp16, int8 = streams
    pairs = [("transformers", fp16), ("transformers", int8), (fp16, int8)]
    return {"transformers": transformers_chunks(oracle, token_ids, CHUNK), **streams}, pairs


def all_streams(
    model: registry.Model, weights: Weights, token_ids: Sequence[int], oracle: Any
) -> tuple[dict[str, Iterable[Float32]], Pairs]:
    """The reference backend, the CPU backend, and transformers unless `oracle` is None."""
    sizes = {"max_len": len(token_ids), "max_tokens": CHUNK}
    settings: dict[str, dict[str, Any]] = {
        "fp32": {"round_activations": False, "cache_dtype": "fp32"},
        "fp32, fp16 cache": {"round_activations": False},
    }
    streams: dict[str, Iterable[Float32]] = {
        name: Stream.compile("reference", model, weights, **sizes, **options).chunks(
            token_ids, CHUNK
        )
        for name, options in settings.items()
    }
    both = SameRounding(model, weights, **sizes)
    streams["cpu"], streams["same rounding"] = both.chunks(token_ids, CHUNK)
    pairs = [("fp32", "fp32, fp16 cache"), ("same rounding", "cpu"), ("fp32", "cpu")]
    if oracle is not None:
        streams["transformers"] = transformers_chunks(oracle, token_ids, CHUNK)
        pairs = [("transformers", "fp32"), *pairs, ("transformers", "cpu")]
    return streams, pairs


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text of at least N tokens")
    parser.add_argument("--tokens", type=int, default=2000, metavar="N", help="default 2000")
    parser.add_argument("--model", default="smollm2", help="file, folder or name of the model")
    parser.add_argument("--no-transformers", action="store_true", help="leave transformers out")
    parser.add_argument("--int8-cache", action="store_true", help="compare KV caches alone")
    parser.add_argument(
        "--quantization", choices=("int8", "int4"), help="with --quick: judge dense weights so"
    )
    parser.add_argument("--quick", action="store_true", help="leave the reference backend out")
    args = parser.parse_args()
    path = source.resolve(args.model)
    text = read_text(args.text, 16 * args.tokens)
    token_ids = load_tokenizer(path).encode(text)[: args.tokens]
    model, weights = load(path)
    judged = weights
    if args.quantization is not None:
        formats = choose_formats(model.graph, weights, args.quantization)
        judged = QuantizedWeights(weights, formats, available_cpus())
    oracle = None
    if not (args.int8_cache or args.no_transformers):
        oracle = build_transformers(model, weights)
    found: dict[tuple[str, str], Agreement] = {}
    for start in range(0, len(token_ids), WINDOW):
        window = token_ids[start : start + WINDOW]
        if args.int8_cache:
            streams, pairs = cache_streams(model, weights, window)
        elif args.quick:
            streams, pairs = quick_streams(model, judged, window, oracle)
        else:
            streams, pairs = all_streams(model, weights, window, oracle)
        found = compare(streams, pairs, window, progress=True, found=found)
    print(f"{path.name}, {len(token_ids)} positions of {args.text.name}")
    print(f"{'truth':18} {'judged':18} {'mean KL':>9} {'same top':>9} {'perplexity':>10} change")
    for (p, q), a in found.items():
        print(
            f"{p:18} {q:18} {a.kl:9.2e} {a.same_top_share:9.2%} {a.perplexity:10.4f} "
            f"{a.perplexity_change:+.3%}"
        )


if __name__ == "__main__":
    main()
