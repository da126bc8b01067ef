"""Every operator of the cpu backend against the reference: ISAs, dtypes, edge shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from octavo.graph.batch import Float32
from octavo.weights.formats.layout import BlockLayout
from octavo.weights.formats.registry import BLOCKS

TOLERANCES = {  # relative to the greatest value of the output: float32 sums in another order
    "embed": 0.0,
    "rms_norm": 1e-6,
    "linear dense": 4e-6,
    "linear grouped": 4e-6,
    "rope": 1e-6,
    "attention": 4e-6,
    "silu_mul": 1e-6,
    "gelu_mul": 1e-6,
    "add": 0.0,
    "select_rows": 0.0,
}


def assert_close(operator: str, actual: Float32, expected: Float32) -> None:
    assert actual.shape == expected.shape
    bound = TOLERANCES[operator] * np.abs(expected).max(initial=1e-30)
    error = np.abs(actual - expected).max(initial=0)
    assert error <= bound, f"{operator}: {error} is more than {bound}"


def random_input(rng: np.random.Generator, tokens: int, features: int) -> Float32:
    return rng.normal(0, 1, (tokens, features)).astype(np.float32)


def step(kit: Any, **inputs: Float32) -> Any:
    tokens = len(next(iter(inputs.values())))
    return kit.batch([kit.Part(range(8), 0, tokens)], inputs=inputs)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "4 bits", "4 bits + minimums", "8 bits"])
@pytest.mark.parametrize("scale", [1.0, 96**0.5])
def test_embed(kit: Any, rng: np.random.Generator, isa: str, kind: str, scale: float) -> None:
    if kind in ("f32", "f16", "bf16"):
        weight = kit.dense(rng.normal(0, 1, (70, 96)), kind)
    else:
        weight = kit.grouped(rng, 70, 96, int(kind[0]), 32, minimums="minimums" in kind)
    graph = kit.graph(lambda ops: ops.embed("e", 70, 96, scale=scale))
    batch = kit.batch([kit.Part([0], 0, 5)], token_ids=[0, 69, 31, 32, 69])
    actual, expected = kit.both(graph, {"e.weight": weight}, kit.options(isa=isa), [batch])
    assert_close("embed", actual, expected)


@pytest.mark.parametrize("layout", BLOCKS.values(), ids=BLOCKS)
def test_embed_every_format(
    kit: Any, rng: np.random.Generator, isa: str, layout: BlockLayout
) -> None:
    """What is packed, from the places that a file's format has, is what the format says."""
    rows, per_row = 40, 3
    columns = per_row * layout.block_len
    data = rng.integers(0, 256, (rows, per_row, layout.block_bytes), np.uint8)
    for halves in (layout.scales, layout.minimums):
        if halves is not None:
            values = rng.normal(0, 1, (rows, per_row, 1)).astype("<f2")
            data[:, :, halves.start : halves.start + 2] = values.view(np.uint8)
    weight = layout.read(data.reshape(-1), (rows, columns))
    graph = kit.graph(lambda ops: ops.embed("e", rows, columns))
    batch = kit.batch([kit.Part(range(8), 0, rows)], token_ids=range(rows))
    actual, expected = kit.both(graph, {"e.weight": weight}, kit.options(isa=isa), [batch])
    assert_close("embed", actual, expected)


@pytest.mark.parametrize("features", [1, 15, 16, 64, 100, 576])
@pytest.mark.parametrize("tokens", [1, 40])
def test_rms_norm(kit: Any, rng: np.random.Generator, isa: str, features: int, tokens: int) -> None:
    graph = kit.graph(lambda ops: ops.rms_norm(ops.input("x", features), "n", 1e-5))
    weights = {"n.weight": kit.dense(rng.normal(1, 0.1, features))}
    batch = step(kit, x=random_input(rng, tokens, features))
    assert_close("rms_norm", *kit.both(graph, weights, kit.options(isa=isa), [batch]))


@pytest.mark.parametrize(("num_heads", "head_dim"), [(3, 16), (4, 100), (1, 256)])
def test_rms_norm_of_heads(
    kit: Any, rng: np.random.Generator, isa: str, num_heads: int, head_dim: int
) -> None:
    features = num_heads * head_dim
    graph = kit.graph(
        lambda ops: ops.rms_norm(ops.input("x", features), "n", 1e-5, num_heads=num_heads)
    )
    weights = {"n.weight": kit.dense(rng.normal(1, 0.1, head_dim))}
    batch = step(kit, x=random_input(rng, 40, features))
    assert_close("rms_norm", *kit.both(graph, weights, kit.options(isa=isa), [batch]))


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize(("rows", "columns"), [(32, 64), (70, 33), (1, 1)])
@pytest.mark.parametrize("tokens", [1, 7])
def test_linear_dense(
    kit: Any, rng: np.random.Generator, isa: str, dtype: str, rows: int, columns: int, tokens: int
) -> None:
    graph = kit.graph(lambda ops: ops.linear(ops.input("x", columns), "w", rows, bias=True))
    weights = {
        "w.weight": kit.dense(rng.normal(0, 1, (rows, columns)), dtype),
        "w.bias": kit.dense(rng.normal(0, 1, rows)),
    }
    batch = step(kit, x=random_input(rng, tokens, columns))
    assert_close("linear dense", *kit.both(graph, weights, kit.options(isa=isa), [batch]))


@pytest.mark.parametrize("two_level", [False, True])
@pytest.mark.parametrize("minimums", [False, True])
@pytest.mark.parametrize(
    ("bits", "group"), [(4, 32), (5, 32), (8, 32), (4, 16), (2, 16), (3, 16), (6, 16)]
)
@pytest.mark.parametrize("tokens", [1, 13])
def test_linear_grouped(
    kit: Any,
    rng: np.random.Generator,
    isa: str,
    bits: int,
    group: int,
    minimums: bool,
    two_level: bool,
    tokens: int,
) -> None:
    columns = 512 if two_level else 192 + group
    graph = kit.graph(lambda ops: ops.linear(ops.input("x", columns), "w", 70, bias=True))
    weights = {
        "w.weight": kit.grouped(
            rng, 70, columns, bits, group, minimums=minimums, two_level=two_level
        ),
        "w.bias": kit.dense(rng.normal(0, 1, 70)),
    }
    batch = step(kit, x=random_input(rng, tokens, columns))
    assert_close("linear grouped", *kit.both(graph, weights, kit.options(isa=isa), [batch]))


@pytest.mark.parametrize("head_dim", [16, 24, 64, 96, 128])
def test_rope(kit: Any, rng: np.random.Generator, isa: str, head_dim: int) -> None:
    inv_freq = tuple(float(np.float32(100.0 ** (-2 * i / head_dim))) for i in range(head_dim // 2))
    graph = kit.graph(lambda ops: ops.rope(ops.input("x", 3 * head_dim), head_dim, inv_freq))
    parts = [kit.Part(range(32), 490, 20), kit.Part(range(32), 0, 1)]
    batch = kit.batch(parts, inputs={"x": random_input(rng, 21, 3 * head_dim)})
    assert_close("rope", *kit.both(graph, {}, kit.options(isa=isa), [batch]))


def attention_graph(kit: Any, heads: int, kv_heads: int, head_dim: int, **more: Any) -> Any:
    return kit.graph(
        lambda ops: ops.paged_attention(
            ops.input("q", heads * head_dim),
            ops.input("k", kv_heads * head_dim),
            ops.input("v", kv_heads * head_dim),
            0,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            **more,
        )
    )


@pytest.mark.parametrize("cache_dtype", ["fp16", "int8"])
@pytest.mark.parametrize("block_size", [8, 16, 32, 64])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(1, 1, 16), (9, 3, 64), (4, 4, 96), (14, 2, 64), (8, 1, 128), (2, 1, 256), (32, 2, 48)],
)
def test_attention(
    kit: Any,
    rng: np.random.Generator,
    isa: str,
    cache_dtype: str,
    block_size: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> None:
    """Four sequences: a context grown in chunks, a one-token prompt, a block's edge, a decode."""
    graph = attention_graph(kit, heads, kv_heads, head_dim)
    blocks = rng.permutation(4 * (256 // block_size))
    owned = [blocks[i::4] for i in range(4)]
    lengths = [0, 0, 0, 0]
    batches = []
    for counts in ([60, 1, 0, 0], [61, 0, block_size, 3], [40, 1, 1, 0], [13, 1, 5, 1]):
        parts = [kit.Part(owned[i], lengths[i], n) for i, n in enumerate(counts) if n]
        lengths = [have + n for have, n in zip(lengths, counts, strict=True)]
        inputs = {
            "q": random_input(rng, sum(counts), heads * head_dim) * 3,
            "k": random_input(rng, sum(counts), kv_heads * head_dim),
            "v": random_input(rng, sum(counts), kv_heads * head_dim),
        }
        batches.append(kit.batch(parts, block_size, inputs=inputs))
    options = kit.options(
        isa=isa, block_size=block_size, max_num_tokens=256, cache_dtype=cache_dtype
    )
    assert_close("attention", *kit.both(graph, {}, options, batches, len(blocks)))


@pytest.mark.parametrize("cache_dtype", ["fp16", "int8"])
@pytest.mark.parametrize("block_size", [8, 16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 1, 256), (1, 1, 16)])
@pytest.mark.parametrize("window", [1, 2, 17, 64, 100, 190, 1000])
def test_attention_in_a_window(
    kit: Any,
    rng: np.random.Generator,
    isa: str,
    cache_dtype: str,
    block_size: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int,
) -> None:
    """Windows within a vector, over tiles' edges, and longer than the context."""
    graph = attention_graph(kit, heads, kv_heads, head_dim, window=window)
    batches, length = [], 0
    for count in (3, 190, 1, 6):
        inputs = {
            "q": random_input(rng, count, heads * head_dim) * 3,
            "k": random_input(rng, count, kv_heads * head_dim),
            "v": random_input(rng, count, kv_heads * head_dim),
        }
        part = kit.Part(range(256 // block_size), length, count)
        batches.append(kit.batch([part], block_size, inputs=inputs))
        length += count
    options = kit.options(
        isa=isa, block_size=block_size, max_num_tokens=256, cache_dtype=cache_dtype
    )
    for last in range(len(batches)):
        outs = kit.both(graph, {}, options, batches[: last + 1], 256 // block_size)
        assert_close("attention", *outs)


@pytest.mark.parametrize("cache_dtype", ["fp16", "int8"])
@pytest.mark.parametrize("soft_cap", [0.3, 5.0, 50.0])
@pytest.mark.parametrize("window", [None, 20])
def test_attention_with_a_soft_cap(
    kit: Any,
    rng: np.random.Generator,
    isa: str,
    cache_dtype: str,
    soft_cap: float,
    window: int | None,
) -> None:
    graph = attention_graph(kit, 4, 2, 32, soft_cap=soft_cap, window=window)
    inputs = {
        "q": random_input(rng, 90, 128) * 10,
        "k": random_input(rng, 90, 64) * 3,
        "v": random_input(rng, 90, 64),
    }
    batch = kit.batch([kit.Part(range(6), 0, 90)], inputs=inputs)
    options = kit.options(isa=isa, max_num_tokens=128, cache_dtype=cache_dtype)
    assert_close("attention", *kit.both(graph, {}, options, [batch], 6))


@pytest.mark.parametrize("cache_dtype", ["fp16", "int8"])
def test_attention_never_reads_what_lies_before_the_window(
    kit: Any, rng: np.random.Generator, isa: str, cache_dtype: str
) -> None:
    """NaN and infinity in K and V before it change no bit, in a tile, before it, in a segment."""
    graph = attention_graph(kit, 6, 2, 64, window=50)
    options = kit.options(isa=isa, max_num_tokens=600, max_model_len=700, cache_dtype=cache_dtype)
    inputs = {
        "q": random_input(rng, 8, 384),
        "k": random_input(rng, 8, 128),
        "v": random_input(rng, 8, 128),
    }
    last = kit.batch([kit.Part(range(44), 600, 8)], inputs=inputs)
    before = {n: random_input(rng, 600, x.shape[1]) for n, x in inputs.items()}
    results = []
    for poison in (None, np.nan, np.inf):
        program = kit.compile(graph, {}, options)
        program.allocate_cache(44)
        if poison is not None:
            for name in "kv":
                before[name][:551] = poison
        program.run(kit.batch([kit.Part(range(44), 0, 600)], inputs=before), None)
        results.append(program.run(last, None, ("out",)).values["out"])
    assert np.isfinite(results[0]).all()
    for result in results[1:]:
        assert result.tobytes() == results[0].tobytes()


@pytest.mark.parametrize("cache_dtype", ["fp16", "int8"])
@pytest.mark.parametrize("block_size", [8, 16, 64])
def test_attention_never_reads_what_a_block_held_before(
    kit: Any, rng: np.random.Generator, isa: str, cache_dtype: str, block_size: int
) -> None:
    """NaN and infinity left in every slot by another sequence change no bit."""
    graph = attention_graph(kit, 6, 2, 64)
    options = kit.options(
        isa=isa, block_size=block_size, max_num_tokens=256, cache_dtype=cache_dtype
    )
    num_blocks = 192 // block_size
    inputs = {
        "q": random_input(rng, 77, 384),
        "k": random_input(rng, 77, 128),
        "v": random_input(rng, 77, 128),
    }
    batch = kit.batch([kit.Part(range(num_blocks), 0, 77)], block_size, inputs=inputs)
    results = []
    for poison in (None, np.nan, np.inf, -np.inf):
        program = kit.compile(graph, {}, options)
        program.allocate_cache(num_blocks)
        if poison is not None:
            filled = {
                name: np.full((192, x.shape[1]), poison, np.float32) for name, x in inputs.items()
            }
            part = kit.Part(range(num_blocks), 0, 192)
            program.run(kit.batch([part], block_size, inputs=filled), None)
        results.append(program.run(batch, None, ("out",)).values["out"])
    assert np.isfinite(results[0]).all()
    for result in results[1:]:
        assert result.tobytes() == results[0].tobytes()


@pytest.mark.parametrize("features", [1, 16, 100])
@pytest.mark.parametrize("operator", ["silu_mul", "gelu_mul"])
def test_gated(kit: Any, rng: np.random.Generator, isa: str, operator: str, features: int) -> None:
    graph = kit.graph(
        lambda ops: getattr(ops, operator)(ops.input("a", features), ops.input("b", features))
    )
    gate = random_input(rng, 9, features) * (10 if operator == "silu_mul" else 2)
    gate[0, 0], gate[1, 0] = 200, -200  # exp overflows: x, and -0
    batch = step(kit, a=gate, b=random_input(rng, 9, features))
    with np.errstate(over="ignore"):
        assert_close(operator, *kit.both(graph, {}, kit.options(isa=isa), [batch]))


@pytest.mark.parametrize("features", [1, 16, 100])
def test_add(kit: Any, rng: np.random.Generator, isa: str, features: int) -> None:
    graph = kit.graph(lambda ops: ops.add(ops.input("a", features), ops.input("b", features)))
    batch = step(kit, a=random_input(rng, 33, features), b=random_input(rng, 33, features))
    assert_close("add", *kit.both(graph, {}, kit.options(isa=isa), [batch]))


@pytest.mark.parametrize("rows", [[], [0], [8, 0, 0, 3]])
def test_select_rows(kit: Any, rng: np.random.Generator, isa: str, rows: list[int]) -> None:
    graph = kit.graph(lambda ops: ops.select_rows(ops.input("x", 20)))
    inputs = {"x": random_input(rng, 9, 20)}
    batch = kit.batch([kit.Part([0], 0, 9)], logits_rows=rows, inputs=inputs)
    assert_close("select_rows", *kit.both(graph, {}, kit.options(isa=isa), [batch]))


@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("fault", [np.nan, np.inf, -np.inf])
def test_int8_cache_keeps_a_fault_visible(
    kit: Any, rng: np.random.Generator, isa: str, name: str, fault: float
) -> None:
    """NaN or infinity in K or V makes what sees it NaN, and nothing before it."""
    inputs = {
        "q": random_input(rng, 40, 192),
        "k": random_input(rng, 40, 64),
        "v": random_input(rng, 40, 64),
    }
    inputs[name][20, 5] = fault
    batch = kit.batch([kit.Part(range(8), 0, 40)], inputs=inputs)
    options = kit.options(isa=isa, cache_dtype="int8")
    with np.errstate(invalid="ignore"):
        graph = attention_graph(kit, 6, 2, 32)
        actual, expected = kit.both(graph, {}, options, [batch], 8)
    is_nan = np.isnan(actual.reshape(40, 6, 32))
    assert is_nan[20:, :3].all()
    assert not is_nan[:20].any()
    assert not is_nan[:, 3:].any(), "the other kv head"
    assert np.isnan(expected).reshape(40, 6, 32)[20:, :3].all()


def test_int8_cache_counts_tiny_numbers_as_zeros(
    kit: Any, rng: np.random.Generator, isa: str
) -> None:
    """As the contract of Linear says; one number of K above the limit makes the head count."""
    keys, values = np.zeros((4, 32), np.float32), random_input(rng, 4, 32)
    keys[1], keys[2], keys[2, 7] = 2.0**-121, 2.0**-121, 2.0**-119
    values[3] = -(2.0**-125)
    inputs = {"q": np.full((4, 32), 2.0**115, np.float32), "k": keys, "v": values}
    batch = kit.batch([kit.Part(range(8), 0, 4)], inputs=inputs)
    options = kit.options(isa=isa, cache_dtype="int8")
    actual, expected = kit.both(attention_graph(kit, 1, 1, 32), {}, options, [batch], 8)
    assert_close("attention", actual, expected)
    # The mean of two values: a score of the first token equals that of the second, whose key is 0.
    assert np.abs(actual[1] - values[:2].mean(axis=0)).max() < 0.02


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("normed_heads", [False, True])
def test_int8_cache_with_key_factors(
    kit: Any, rng: np.random.Generator, isa: str, bias: bool, normed_heads: bool
) -> None:
    """Both backends find the same factors, and what they compute stays near a float32 cache."""
    dim, inv_freq = 32, tuple(float(np.float32(50.0 ** (-i / 16))) for i in range(16))

    def build(ops: Any) -> Any:
        x = ops.rms_norm(ops.input("x", 96), "norm", 1e-6)
        q = ops.rope(ops.linear(x, "q", 4 * dim), dim, inv_freq)
        k = ops.linear(x, "k", 2 * dim, bias=bias)
        if normed_heads:
            k = ops.rms_norm(k, "k_norm", 1e-6)
        k = ops.rope(k, dim, inv_freq)
        v = ops.linear(x, "v", 2 * dim)
        return ops.paged_attention(q, k, v, 0, head_dim=dim, scale=dim**-0.5)

    graph = kit.graph(build)
    uneven = np.exp(rng.normal(0, 2, 2 * dim))
    weights = {
        name: kit.dense(uneven[: shape[0]])
        if len(shape) == 1
        else kit.grouped(rng, *shape, 4, 32, minimums=True)
        for name, shape in graph.weights.items()
    }
    weights["norm.weight"] = kit.dense(rng.normal(0.2, 0.02, 96))
    batch = step(kit, x=random_input(rng, 60, 96))
    outs = [
        kit.both(graph, weights, kit.options(isa=isa, cache_dtype=dtype), [batch], 8)
        for dtype in ("int8", "fp16")
    ]
    assert_close("attention", *outs[0])
    rounding = np.abs(outs[0][1] - outs[1][1]).max() / np.abs(outs[1][1]).max()
    assert 1e-4 < rounding < 0.06


@pytest.mark.parametrize("cache_dtype", ["fp16", "int8"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("window", [None, 700, 280, 5, 1307 - 1024])
def test_attention_over_a_long_context(
    kit: Any,
    rng: np.random.Generator,
    isa: str,
    threads: int,
    cache_dtype: str,
    window: int | None,
) -> None:
    """More than two segments (kernels.h), decoded one token a step, which threads share.

    The last step's windows begin in the second segment, in the third, and on its edge.
    """
    graph = attention_graph(kit, 6, 2, 32, window=window)
    counts = [500, 500, 300, 1, 1, 5]
    batches, length = [], 0
    for count in counts:
        inputs = {
            "q": random_input(rng, count, 192) * 4,
            "k": random_input(rng, count, 64),
            "v": random_input(rng, count, 64),
        }
        parts = [kit.Part(range(100), length, count)]
        batches.append(kit.batch(parts, inputs=inputs))
        length += count
    options = kit.options(
        isa=isa,
        num_threads=threads,
        max_num_tokens=512,
        max_model_len=1600,
        cache_dtype=cache_dtype,
    )
    assert_close("attention", *kit.both(graph, {}, options, batches, 100))
