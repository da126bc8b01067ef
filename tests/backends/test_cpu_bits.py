"""The same request gives the same bits: any neighbours, any cuts, any threads, any ISA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from octavo.backends.cpu import _native
from octavo.backends.program import Program
from octavo.graph.batch import Float32
from octavo.graph.tensors import StoredTensor
from octavo.graph.trace import Graph, Ops

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB = 96, 6, 2, 32, 160, 300


@pytest.fixture(scope="module", params=["llama", "gemma"])
def model(kit: Any, request: pytest.FixtureRequest) -> tuple[Graph, dict[str, StoredTensor]]:
    """Two layers, grouped weights of 4 and 8 bits, the head tied to the embedding.

    A Llama, or what Gemma has beside it: windows, one shorter than a tile and one longer than a
    segment, a soft cap, norms of heads, GELU.
    """
    ops, is_gemma = Ops(), request.param == "gemma"
    extra: list[dict[str, Any]] = [{}, {}]
    if is_gemma:
        extra = [{"window": 40}, {"window": 600, "soft_cap": 5.0}]
    inv_freq = tuple(float(np.float32(1e4 ** (-2 * i / HEAD_DIM))) for i in range(HEAD_DIM // 2))
    x = ops.embed("embed", VOCAB, HIDDEN)
    for layer in ops.layers("layers", 2):
        h = ops.rms_norm(x, layer / "norm", 1e-5)
        q = ops.linear(h, layer / "q", HEADS * HEAD_DIM, bias=True)
        if is_gemma:
            q = ops.rms_norm(q, layer / "q_norm", 1e-5, num_heads=HEADS)
        q = ops.rope(q, HEAD_DIM, inv_freq)
        k = ops.rope(ops.linear(h, layer / "k", KV_HEADS * HEAD_DIM), HEAD_DIM, inv_freq)
        v = ops.linear(h, layer / "v", KV_HEADS * HEAD_DIM)
        more = extra[layer.index]
        a = ops.paged_attention(
            q, k, v, layer.index, head_dim=HEAD_DIM, scale=HEAD_DIM**-0.5, **more
        )
        x = ops.add(x, ops.linear(a, layer / "o", HIDDEN))
        h = ops.rms_norm(x, layer / "norm2", 1e-5)
        gate_mul = ops.gelu_mul if is_gemma else ops.silu_mul
        gated = gate_mul(ops.linear(h, layer / "gate", MLP), ops.linear(h, layer / "up", MLP))
        x = ops.add(x, ops.linear(gated, layer / "down", HIDDEN))
    hidden = ops.rms_norm(x, "norm", 1e-5)
    graph = ops.finish(logits=ops.linear(ops.select_rows(hidden), "embed", VOCAB), hidden=hidden)
    rng = np.random.default_rng(5)
    weights: dict[str, StoredTensor] = {}
    for name, shape in graph.weights.items():
        if len(shape) == 1:
            weights[name] = kit.dense(rng.normal(1, 0.1, shape))
        else:
            bits = 8 if name.startswith("embed") else 4
            weights[name] = kit.grouped(rng, *shape, bits, 32, minimums=bits == 4)
    return graph, weights


def compile_model(
    kit: Any, model: tuple[Graph, Mapping[str, StoredTensor]], **options: Any
) -> Program:
    program: Program = kit.compile(*model, kit.options(max_num_tokens=300, **options))
    program.allocate_cache(128 * 16 // program_block_size(options))
    return program


def program_block_size(options: Mapping[str, Any]) -> int:
    size: int = options.get("block_size", 16)
    return size


PROMPT = np.random.default_rng(3).integers(0, VOCAB, 150).astype(np.int32)


def run_whole(kit: Any, program: Program, block_size: int = 16) -> tuple[Float32, Float32]:
    """Logits and hidden states of every token of the prompt in one step, alone."""
    part = kit.Part(range(192 // block_size), 0, len(PROMPT))
    batch = kit.batch([part], block_size, token_ids=PROMPT, logits_rows=[149, 0, 77])
    values = program.run(batch, None, ("logits", "hidden")).values
    return values["logits"], values["hidden"]


@pytest.fixture(scope="module", params=["fp16", "int8"])
def cache_dtype(request: pytest.FixtureRequest) -> str:
    """How K and V are kept."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def expected(
    kit: Any, model: tuple[Graph, Mapping[str, StoredTensor]], cache_dtype: str
) -> tuple[Float32, Float32]:
    """The prompt's logits and hidden states, best instruction set, one thread."""
    return run_whole(kit, compile_model(kit, model, num_threads=1, cache_dtype=cache_dtype))


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_instruction_sets_and_threads(
    kit: Any,
    model: Any,
    expected: tuple[Float32, Float32],
    cache_dtype: str,
    isa: str,
    num_threads: int,
) -> None:
    program = compile_model(kit, model, isa=isa, num_threads=num_threads, cache_dtype=cache_dtype)
    for actual, wanted in zip(run_whole(kit, program), expected, strict=True):
        assert actual.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("block_size", [8, 32, 64])
def test_block_sizes(
    kit: Any, model: Any, expected: tuple[Float32, Float32], cache_dtype: str, block_size: int
) -> None:
    program = compile_model(kit, model, block_size=block_size, cache_dtype=cache_dtype)
    for actual, wanted in zip(run_whole(kit, program, block_size), expected, strict=True):
        assert actual.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("cuts", [[1] * 150, [149, 1], [7, 64, 79], [128, 22]])
def test_chunks(
    kit: Any, model: Any, expected: tuple[Float32, Float32], cache_dtype: str, cuts: list[int]
) -> None:
    """Prefill whole or in pieces, down to one token a step."""
    program = compile_model(kit, model, cache_dtype=cache_dtype)
    done, hidden = 0, []
    for count in cuts:
        part = kit.Part(range(3, 13), done, count)
        batch = kit.batch([part], token_ids=PROMPT[done : done + count])
        output = program.run(batch, None, ("logits", "hidden"))
        hidden.append(output.values["hidden"])
        done += count
    assert np.concatenate(hidden).tobytes() == expected[1].tobytes()
    assert output.values["logits"][0].tobytes() == expected[0][0].tobytes()


def test_neighbours(
    kit: Any, model: Any, expected: tuple[Float32, Float32], cache_dtype: str
) -> None:
    """The prompt among other sequences, in pieces of changing size, on scattered blocks."""
    program = compile_model(kit, model, cache_dtype=cache_dtype)
    rng = np.random.default_rng(9)
    blocks = rng.permutation(128)
    owned = [list(map(int, blocks[i::8][:16])) for i in range(8)]
    lengths, hidden = [0] * 8, []
    while lengths[0] < len(PROMPT):
        counts = [min(int(rng.integers(1, 30)), 256 - have) for have in lengths]
        counts[0] = min(counts[0], len(PROMPT) - lengths[0])
        order = [i for i in rng.permutation(8) if counts[i]]
        parts, ids = [], []
        for i in order:
            parts.append(kit.Part(owned[i], lengths[i], counts[i]))
            own = PROMPT[lengths[0] : lengths[0] + counts[0]]
            ids.append(own if i == 0 else rng.integers(0, VOCAB, counts[i]))
        values = program.run(kit.batch(parts, token_ids=np.concatenate(ids)), None, ("hidden",))
        before = sum(counts[i] for i in order[: order.index(0)])
        hidden.append(values.values["hidden"][before : before + counts[0]])
        lengths = [have + n for have, n in zip(lengths, counts, strict=True)]
    assert np.concatenate(hidden).tobytes() == expected[1].tobytes()


def test_programs_side_by_side(
    kit: Any, model: Any, expected: tuple[Float32, Float32], cache_dtype: str
) -> None:
    """Two Programs in one process share nothing; closing one leaves the other alive."""
    first, second = (
        compile_model(kit, model, num_threads=n, cache_dtype=cache_dtype) for n in (2, 1)
    )
    run_whole(kit, first)
    assert run_whole(kit, second)[0].tobytes() == expected[0].tobytes()
    first.close()
    assert run_whole(kit, second)[0].tobytes() == expected[0].tobytes()


def test_machine_has_a_fast_instruction_set() -> None:
    """What the tests above compare: at least the scalar kernels exist everywhere."""
    assert _native.has_isa("scalar")
    assert not _native.has_isa("mmx")


def test_long_context(kit: Any, model: Any, isa: str, cache_dtype: str) -> None:
    """Decoding over several segments of context: alone on many threads, on one, in a batch."""
    prompt = np.random.default_rng(4).integers(0, VOCAB, 1300)
    wanted: list[bytes] = []
    for num_threads, neighbours in ((1, 0), (2, 0), (6, 0), (2, 9)):
        program = compile_model(
            kit,
            model,
            isa=isa,
            num_threads=num_threads,
            max_model_len=1400,
            cache_dtype=cache_dtype,
        )
        blocks = list(range(100))
        for start in range(0, 1290, 258):
            part = kit.Part(blocks, start, 258)
            program.run(kit.batch([part], token_ids=prompt[start : start + 258]), None)
        parts = [kit.Part([110 + i], 0, 1) for i in range(neighbours)]
        parts += [kit.Part(blocks, 1290, 3)]
        ids = np.concatenate([np.zeros(neighbours, np.int64), prompt[1290:1293]])
        out = program.run(kit.batch(parts, token_ids=ids), None, ("hidden",)).values["hidden"]
        wanted.append(out[neighbours:].tobytes())
    assert len(set(wanted)) == 1
