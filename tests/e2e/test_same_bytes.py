"""The same request gives the same bytes: tokens and logprobs, whatever runs beside it.

Compared bit for bit with each request alone, its prompt computed whole, without prefix cache, on
one thread.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import safetensors.numpy

from octavo import LLM, AsyncEngine
from octavo.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.tokenizer.load import load_tokenizer
from octavo.types import EngineRequest, EngineStats, SamplingParams, TokenLogprob

Answer = tuple[tuple[int, ...], tuple[TokenLogprob, ...], str]
Answers = dict[tuple[str, int], Answer]

KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 5},
    {"temperature": 1.0, "logprobs": 0},
    {"temperature": 0.8, "top_k": 20, "logprobs": 2},
    {"temperature": 1.3, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0.7, "repetition_penalty": 1.3, "presence_penalty": 0.5, "logprobs": 1},
    {"temperature": 0.0, "frequency_penalty": 1.0, "logit_bias": {11: 3.0, 12: -5.0}},
    {"temperature": 1.0, "n": 3, "logprobs": 1},
    {"temperature": 0.9, "min_tokens": 5, "ignore_eos": False},
]
GROUPS: list[dict[str, Any]] = [
    {"temperature": 0.0, "use_beam_search": True, "best_of": 4, "n": 2, "logprobs": 1},
    {"temperature": 1.0, "n": 4, "logprobs": 0},
    {"use_beam_search": True, "n": 3, "early_stopping": True, "length_penalty": 0.5},
    {"temperature": 0.8},
]


def make_requests(
    count: int,
    vocab_size: int,
    max_prompt: int,
    max_tokens: int,
    kinds: list[dict[str, Any]] = KINDS,
) -> list[EngineRequest]:
    """Requests of every kind; some prompts share their beginning, one is repeated."""
    dice = random.Random(count)
    shared = [dice.randrange(vocab_size) for _ in range(max_prompt)]
    requests = []
    for number in range(count):
        length = dice.randint(1, max_prompt)
        own = [dice.randrange(vocab_size) for _ in range(length)]
        begin = dice.choice([0, 0, length // 2, length])
        settings = {"ignore_eos": True, **kinds[number % len(kinds)]}
        params = SamplingParams(seed=number, max_tokens=dice.randint(1, max_tokens), **settings)
        if params.min_tokens > (params.max_tokens or 0):
            params = SamplingParams(seed=number, max_tokens=max_tokens, **settings)
        prompt = shared[:begin] + own[begin:]
        requests.append(EngineRequest(request_id=f"r{number}", prompt_ids=prompt, params=params))
    return requests


def run(
    core: EngineCore, requests: Sequence[EngineRequest], *, at_once: int | None = None
) -> Answers:
    """The answers, with at most `at_once` requests in the engine at a time."""
    waiting = list(requests)[::-1]
    tokens: dict[tuple[str, int], list[int]] = {}
    logprobs: dict[tuple[str, int], list[TokenLogprob]] = {}
    answers: Answers = {}
    alive: dict[str, int] = {}
    while waiting or alive:
        while waiting and (at_once is None or len(alive) < at_once):
            request = waiting.pop()
            core.add(request)
            alive[request.request_id] = request.params.n
        for update in core.step():
            key = update.request_id, update.index
            tokens.setdefault(key, []).extend(update.token_ids)
            logprobs.setdefault(key, []).extend(update.logprobs)
            if update.finish_reason is not None:
                answers[key] = tuple(tokens[key]), tuple(logprobs[key]), update.finish_reason
                alive[key[0]] -= 1
                if alive[key[0]] == 0:
                    del alive[key[0]]
    assert core.stats().cache.num_blocks_used == 0
    return answers


def answers_of(
    path: Path, requests: Sequence[EngineRequest], *, times: int = 1, **options: Any
) -> tuple[list[Answers], EngineStats]:
    """What an engine answers to all requests at once, again and again, and its statistics."""
    at_once = options.pop("at_once", None)
    settings = {"memory_bytes": 32 << 20, "num_threads": 1, **options}
    config = EngineConfig(model=str(path), served_name="m", **settings)
    core = EngineCore.load(config.validate())
    try:
        runs = [run(core, requests, at_once=at_once) for _ in range(times)]
        return runs, core.stats()
    finally:
        core.close()


def alone(path: Path, requests: Sequence[EngineRequest], **options: Any) -> Answers:
    """The yardstick: one request after the other, each prompt in one step."""
    options = {"use_prefix_cache": False, "max_num_batched_tokens": 512, **options}
    [answers], stats = answers_of(path, requests, at_once=1, **options)
    assert stats.num_preemptions == stats.cache.num_hits == 0
    return answers


# ---- The tiny model: every batch and chunk size ----------------------------------------------

TINY_COUNT = 18


FORMATS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16")
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(scope="module")
def quantized_path(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a GGUF file, its matrices in turn in every format."""
    path = tmp_path_factory.mktemp("quantized") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    weights = safetensors.numpy.load_file(tiny_model_path / "model.safetensors")
    writer.add_token_list([f"t{i}" for i in range(len(weights["lm_head.weight"]))])
    writer.add_eos_token_id(7)
    number = 0
    for name, tensor in sorted(weights.items()):
        for ours, theirs in GGUF_NAMES.items():
            name = name.replace(ours, theirs)
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor)
            continue
        kind = gguf.GGMLQuantizationType[FORMATS[number % len(FORMATS)]]
        number += 1
        writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module", params=["dense", "quantized"])
def tiny_path(request: pytest.FixtureRequest, tiny_model_path: Path) -> Path:
    if request.param == "dense":
        return tiny_model_path
    path: Path = request.getfixturevalue("quantized_path")
    return path


@pytest.fixture(scope="module")
def tiny_requests() -> list[EngineRequest]:
    return make_requests(TINY_COUNT, vocab_size=262, max_prompt=70, max_tokens=16)


@pytest.fixture(scope="module")
def tiny_alone(tiny_path: Path, tiny_requests: list[EngineRequest]) -> Answers:
    answers = alone(tiny_path, tiny_requests)
    assert len(answers) == sum(r.params.n for r in tiny_requests)
    assert len({a[0] for a in answers.values()}) > TINY_COUNT // 2, "the answers tell apart"
    return answers


@pytest.mark.parametrize("batch", [*range(1, 13), 16, 24])
def test_every_batch_size(
    tiny_path: Path, tiny_requests: list[EngineRequest], tiny_alone: Answers, batch: int
) -> None:
    [answers], _ = answers_of(tiny_path, tiny_requests, max_num_seqs=batch, use_prefix_cache=False)
    assert answers == tiny_alone


@pytest.mark.parametrize("chunk", [*range(1, 36), 47, 48, 49, 63, 64, 65, 128, 256])
def test_every_chunk_size(
    tiny_path: Path, tiny_requests: list[EngineRequest], tiny_alone: Answers, chunk: int
) -> None:
    [answers], _ = answers_of(tiny_path, tiny_requests, max_num_batched_tokens=chunk)
    assert answers == tiny_alone


@pytest.mark.parametrize("block_size", [8, 16, 32, 64])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_warm_prefix_cache_and_any_threads(
    tiny_path: Path,
    tiny_requests: list[EngineRequest],
    tiny_alone: Answers,
    block_size: int,
    threads: int,
) -> None:
    (cold, warm), stats = answers_of(
        tiny_path, tiny_requests, times=2, block_size=block_size, num_threads=threads
    )
    assert cold == warm == tiny_alone
    assert stats.cache.num_hits > 0


INT8_CASES = [
    pytest.param(batch, chunk, block_size, threads, marks=[] if is_fast else [pytest.mark.slow])
    for batch, chunk, block_size, threads, is_fast in (
        (5, 37, 16, 2, True),
        (1, 7, 16, 1, False),
        (2, 1, 8, 2, False),
        (7, 64, 32, 1, False),
        (24, 256, 64, 2, False),
        (16, 17, 8, 1, False),
    )
]


@pytest.mark.parametrize(("batch", "chunk", "block_size", "threads"), INT8_CASES)
def test_int8_cache(
    tiny_path: Path,
    tiny_requests: list[EngineRequest],
    tiny_alone: Answers,
    batch: int,
    chunk: int,
    block_size: int,
    threads: int,
) -> None:
    expected = alone(tiny_path, tiny_requests, kv_dtype="int8")
    assert expected != tiny_alone, "K and V are rounded in another way"
    (cold, warm), stats = answers_of(
        tiny_path,
        tiny_requests,
        times=2,
        kv_dtype="int8",
        max_num_seqs=batch,
        max_num_batched_tokens=chunk,
        block_size=block_size,
        num_threads=threads,
    )
    assert cold == warm == expected
    assert stats.cache.num_hits > 0


@pytest.mark.parametrize("chunk", [5, 64])
@pytest.mark.parametrize("use_prefix_cache", [False, True])
def test_preemption(tiny_path: Path, chunk: int, use_prefix_cache: bool) -> None:
    # Sequences that begin short and grow long: the pool is full while they run.
    requests = make_requests(16, vocab_size=262, max_prompt=9, max_tokens=60)
    token_bytes = 2 * 2 * 2 * 16 * 2  # K and V, layers, heads, head_dim, fp16
    [answers], stats = answers_of(
        tiny_path,
        requests,
        memory_bytes=128 * token_bytes,
        max_num_batched_tokens=chunk,
        use_prefix_cache=use_prefix_cache,
        block_size=8,
    )
    assert answers == alone(tiny_path, requests)
    assert stats.num_preemptions > 2


# 20 blocks; a token has K and V in two layers, two heads, head_dim 16 and fp16.
SCARCE: dict[str, Any] = {"memory_bytes": 160 * 2 * 2 * 2 * 16 * 2, "block_size": 8}


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 4, "max_num_batched_tokens": 4},
        {"max_num_seqs": 5, "use_prefix_cache": False},
        {"max_num_batched_tokens": 33, "block_size": 8, "num_threads": 2},
        {"kv_dtype": "int8", "block_size": 32, "max_num_seqs": 9},
        SCARCE,
        SCARCE | {"use_prefix_cache": False, "max_num_batched_tokens": 23},
    ],
)
def test_samples_and_beams(tiny_path: Path, options: dict[str, Any]) -> None:
    """Groups that share blocks, copy them when they write and are preempted together."""
    is_scarce = "memory_bytes" in options
    lengths = (
        {"max_prompt": 9, "max_tokens": 30} if is_scarce else {"max_prompt": 40, "max_tokens": 20}
    )
    requests = make_requests(12, vocab_size=262, kinds=GROUPS, **lengths)
    [answers], stats = answers_of(tiny_path, requests, **options)
    kept = {"kv_dtype": options["kv_dtype"]} if "kv_dtype" in options else {}
    assert answers == alone(tiny_path, requests, **kept)
    assert stats.num_preemptions > 2 or not is_scarce


@pytest.fixture(scope="module")
def windowed_path(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a Mistral whose window is shorter than most of the texts."""
    folder = tmp_path_factory.mktemp("windowed") / "model"
    shutil.copytree(tiny_model_path, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["MistralForCausalLM"], "sliding_window": 21}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_sliding_windows(
    windowed_path: Path, tiny_model_path: Path, tiny_requests: list[EngineRequest]
) -> None:
    """In any batch, whole or in chunks, and from a warm prefix cache."""
    expected = alone(windowed_path, tiny_requests)
    assert expected != alone(tiny_model_path, tiny_requests), "the window shows"
    for options in (
        {"max_num_seqs": 5, "use_prefix_cache": False},
        {"max_num_batched_tokens": 1},
        {"max_num_batched_tokens": 7, "block_size": 8},
        {"max_num_batched_tokens": 33, "num_threads": 2},
        {"times": 2, "num_threads": 2},
    ):
        runs, _ = answers_of(windowed_path, tiny_requests, **options)
        assert all(answers == expected for answers in runs), options


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantized_while_loading(
    tiny_model_path: Path, tiny_requests: list[EngineRequest], quantization: str
) -> None:
    """A model that is quantized while loading answers otherwise than dense, alike in any batch."""
    options = {"quantization": quantization, "use_prefix_cache": False}
    [one_by_one], _ = answers_of(tiny_model_path, tiny_requests, at_once=1, **options)
    (batched, again), _ = answers_of(
        tiny_model_path, tiny_requests, times=2, max_num_batched_tokens=48, num_threads=2,
        **options,
    )  # fmt: skip
    assert one_by_one == batched == again
    [dense], _ = answers_of(tiny_model_path, tiny_requests, use_prefix_cache=False)
    assert dense != batched


# In torch: on its CPU device, where kernels in Triton are checked by tests of their own.
TORCH = {"backend": "torch", "device": "cpu", "deterministic": True}


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 5, "use_prefix_cache": False},
        {"max_num_batched_tokens": 7, "times": 2},
        {"kv_dtype": "int8", "max_num_batched_tokens": 33, "block_size": 32},
        {"kv_dtype": "fp8", "max_num_seqs": 3},
        {"dtype": "bf16", "max_num_batched_tokens": 48, "times": 2},
    ],
)
def test_torch(
    tiny_path: Path, tiny_requests: list[EngineRequest], options: dict[str, Any]
) -> None:
    kept = {name: options[name] for name in ("kv_dtype", "dtype") if name in options}
    expected = alone(tiny_path, tiny_requests, **TORCH, **kept)
    runs, _ = answers_of(tiny_path, tiny_requests, **TORCH, **options)
    assert all(answers == expected for answers in runs)


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_torch_quantized_while_loading(
    tiny_model_path: Path, tiny_requests: list[EngineRequest], quantization: str
) -> None:
    options = {**TORCH, "quantization": quantization}
    expected = alone(tiny_model_path, tiny_requests, **options)
    (cold, warm), _ = answers_of(
        tiny_model_path, tiny_requests, times=2, max_num_batched_tokens=40, **options
    )
    assert cold == warm == expected != alone(tiny_model_path, tiny_requests, **TORCH)


def test_torch_samples_and_beams(tiny_path: Path) -> None:
    requests = make_requests(12, vocab_size=262, max_prompt=9, max_tokens=30, kinds=GROUPS)
    [answers], _ = answers_of(tiny_path, requests, **TORCH, **SCARCE)
    assert answers == alone(tiny_path, requests, **TORCH)


def test_torch_preemption(tiny_model_path: Path) -> None:
    requests = make_requests(10, vocab_size=262, max_prompt=9, max_tokens=60)
    token_bytes = 2 * 2 * 2 * 16 * 2
    options = {"memory_bytes": 96 * token_bytes, "block_size": 8}
    [answers], stats = answers_of(tiny_model_path, requests, **TORCH, **options)
    assert answers == alone(tiny_model_path, requests, **TORCH)
    assert stats.num_preemptions > 0


def test_streamed_or_not(tiny_model_path: Path) -> None:
    """Text, ids and logprobs of a stream from the engine process are those of LLM."""
    params = [
        SamplingParams(temperature=1.0, n=2, seed=3, max_tokens=40, ignore_eos=True, logprobs=2),
        SamplingParams(temperature=0.5, seed=4, max_tokens=40, ignore_eos=True, stop=("a", "in")),
    ]
    prompts = [[5, 6, 7], list(range(100, 150))]

    async def stream() -> list[dict[int, Answer]]:
        config = EngineConfig(
            model=str(tiny_model_path), served_name="m", memory_bytes=32 << 20, num_threads=2
        )
        engine = AsyncEngine.launch(config, load_tokenizer(tiny_model_path))

        async def one(prompt: list[int], its: SamplingParams) -> dict[int, Answer]:
            answers: dict[int, Answer] = dict.fromkeys(range(its.n), ((), (), ""))
            async for delta in engine.generate(prompt, its, request_id="r"):
                ids, logprobs, text = answers[delta.index]
                answers[delta.index] = (
                    ids + delta.token_ids, logprobs + delta.logprobs, text + delta.text
                )  # fmt: skip
            return answers

        try:
            return await asyncio.gather(*map(one, prompts, params))
        finally:
            await engine.close()

    with LLM(str(tiny_model_path), memory="32MiB", threads=1) as llm:
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params)
    whole = [
        {o.index: (o.token_ids, o.logprobs or (), o.text) for o in output.outputs}
        for output in outputs
    ]
    assert asyncio.run(stream()) == whole


# ---- The default model -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_requests() -> list[EngineRequest]:
    return make_requests(50, vocab_size=49_000, max_prompt=48, max_tokens=8)


@pytest.fixture(scope="module")
def real_alone(smollm2_path: Path, real_requests: list[EngineRequest]) -> Answers:
    return alone(smollm2_path, real_requests)


def check(path: Path, requests: list[EngineRequest], expected: Answers, **options: Any) -> None:
    settings = {"num_threads": 2, "memory_bytes": 256 << 20, **options}
    runs, _ = answers_of(path, requests, **settings)
    for answers in runs:
        assert answers == expected


@pytest.mark.parametrize("batch", [1, 2, 5, 6, 7, 16, 50])
def test_batches_of_the_default_model(
    smollm2_path: Path, real_requests: list[EngineRequest], real_alone: Answers, batch: int
) -> None:
    check(smollm2_path, real_requests, real_alone, max_num_seqs=batch, use_prefix_cache=False)


@pytest.mark.parametrize("chunk", [1, 7, 16, 33, 256])
def test_chunks_of_the_default_model(
    smollm2_path: Path, real_requests: list[EngineRequest], real_alone: Answers, chunk: int
) -> None:
    check(smollm2_path, real_requests, real_alone, max_num_batched_tokens=chunk, times=2)


def test_preemption_of_the_default_model(smollm2_path: Path) -> None:
    requests = make_requests(12, vocab_size=49_000, max_prompt=9, max_tokens=50)
    block_bytes = 2 * 30 * 3 * 64 * 2 * 8  # K and V, layers, heads, head_dim, fp16, tokens
    [answers], stats = answers_of(
        smollm2_path, requests, memory_bytes=16 * block_bytes, num_threads=2, block_size=8
    )
    assert answers == alone(smollm2_path, requests)
    assert stats.num_preemptions > 1


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [3, 4, 8, 9, 15, 17, 31, 32, 33])
@pytest.mark.parametrize("chunk", [2, 5, 15, 17, 64, 127, 512])
def test_more_of_the_default_model(
    smollm2_path: Path,
    real_requests: list[EngineRequest],
    real_alone: Answers,
    threads: int,
    batch: int,
    chunk: int,
) -> None:
    check(
        smollm2_path,
        real_requests,
        real_alone,
        max_num_seqs=batch,
        max_num_batched_tokens=chunk,
        num_threads=threads,
    )
