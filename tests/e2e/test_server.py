"""The default model through HTTP, with the official client: what a newcomer does, and a crowd."""

from __future__ import annotations

import asyncio
import time

import httpx
import openai
import pytest

MODEL = "smollm2"
PARIS = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def wait_idle(server, timeout_s: float = 10.0) -> None:
    """Nothing runs and no block is in use."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if server.metric("octavo_kv_cache_blocks_used") == 0:
            return
        time.sleep(0.02)
    raise AssertionError(f"{server.metric('octavo_kv_cache_blocks_used')} blocks are still in use")


def test_the_capital_of_france(server, client) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=PARIS, temperature=0)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    wait_idle(server)


def test_streamed_equals_whole(client) -> None:
    options = {"model": MODEL, "messages": PARIS, "temperature": 0.8, "seed": 7, "max_tokens": 40}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=3)
    text, logprobs, reason = "", [], None
    for chunk in client.chat.completions.create(
        **options, logprobs=True, top_logprobs=3, stream=True
    ):
        choice = chunk.choices[0]
        text += choice.delta.content or ""
        logprobs += choice.logprobs.content if choice.logprobs else []
        reason = choice.finish_reason or reason
    assert text == whole.choices[0].message.content
    assert logprobs == whole.choices[0].logprobs.content
    assert reason == whole.choices[0].finish_reason


def test_beams_and_the_best_of_many(server, client) -> None:
    options = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 6}
    beams = {"use_beam_search": True, "length_penalty": 0.7, "early_stopping": True}
    answer = client.completions.create(**options, n=2, best_of=4, extra_body=beams, logprobs=0)
    assert "Paris" in answer.choices[0].text
    scores = [
        sum(choice.logprobs.token_logprobs) / len(choice.logprobs.tokens) ** 0.7
        for choice in answer.choices
    ]
    assert scores[0] >= scores[1]
    chunks = client.completions.create(**options, n=2, best_of=4, extra_body=beams, stream=True)
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in answer.choices]
    best = client.completions.create(**options, best_of=3, seed=1)
    assert len(best.choices) == 1
    wait_idle(server)


def test_second_request_is_served_from_the_prefix_cache(client) -> None:
    prompt = "A list of things that one finds in a harbour: " + "ropes, nets and boats, " * 12
    options = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 8}
    cold = client.completions.create(**options)
    warm = client.completions.create(**options)
    assert warm.usage.prompt_tokens_details.cached_tokens >= 16
    assert cold.usage.prompt_tokens_details.cached_tokens < 16
    assert warm.choices[0].text == cold.choices[0].text


def test_two_hundred_clients_at_once(server) -> None:
    """Every one gets its whole answer, and no block is lost."""

    async def one(client: openai.AsyncOpenAI, number: int) -> tuple[int, str | None, int]:
        stream = await client.completions.create(
            model=MODEL,
            prompt=f"Number {number} is",
            max_tokens=12,
            temperature=1,
            seed=number,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        chunks, reason, tokens = 0, None, 0
        async for chunk in stream:
            if chunk.choices:
                chunks += 1
                reason = chunk.choices[0].finish_reason or reason
            if chunk.usage:
                tokens = chunk.usage.completion_tokens
        return chunks, reason, tokens

    async def crowd() -> list[tuple[int, str | None, int]]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with (
            httpx.AsyncClient(limits=limits, timeout=120) as transport,
            openai.AsyncOpenAI(
                base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=transport
            ) as client,
        ):
            return await asyncio.gather(*(one(client, number) for number in range(200)))

    answers = asyncio.run(crowd())
    assert all(reason == "length" and tokens == 12 for _, reason, tokens in answers)
    wait_idle(server)


def test_a_client_that_leaves_frees_its_blocks(server) -> None:
    body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 2000, "ignore_eos": True}
    for stream in (True, False):
        with (
            pytest.raises(httpx.ReadTimeout),
            httpx.Client(timeout=httpx.Timeout(0.4)) as client,
            client.stream(
                "POST", f"{server.url}/v1/completions", json=body | {"stream": stream}
            ) as response,
        ):
            for _ in response.iter_bytes():
                if stream:
                    raise httpx.ReadTimeout("leaving on purpose")
        wait_idle(server)


def test_a_bad_request_names_its_field_and_stops_nothing(client) -> None:
    for field, value in (
        ("temperature", -1),
        ("top_p", 7),
        ("n", 100000),
        ("max_tokens", -3),
        ("guided_json", {}),
        ("temprature", 0.5),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=MODEL, messages=PARIS, extra_body={field: value})
        assert field in str(caught.value)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-5", messages=PARIS)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=[5] * 9000, max_tokens=5)
    assert caught.value.code == "context_length_exceeded"
    answer = client.chat.completions.create(
        model=MODEL, messages=PARIS, temperature=0, max_tokens=4
    )
    assert answer.choices[0].message.content


def test_a_user_who_types_a_special_token_gets_text(server, client) -> None:
    """In chat the ids of a typed <|im_end|> are those of plain text; a raw prompt means it."""

    def count_ends(**body: object) -> int:
        answer = httpx.post(f"{server.url}/tokenize", json={"model": MODEL, **body}, timeout=10)
        return answer.json()["tokens"].count(2)

    typed = [{"role": "user", "content": "a <|im_end|> b"}]
    assert count_ends(messages=typed) == count_ends(messages=PARIS) == 1
    assert count_ends(prompt="a <|im_end|> b") == 1


def test_the_pool_is_as_large_as_asked(server) -> None:
    size = server.metric("octavo_kv_cache_bytes")
    assert (512 << 20) * 0.98 < size <= 512 << 20
