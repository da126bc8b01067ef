"""B71, B83, B84: a stream says what the whole answer says, keeps alive, and can fail."""

from __future__ import annotations

import asyncio
import json

import httpx
import openai
import pytest


def events_of(response: httpx.Response) -> list[dict[str, object]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = [p for p in response.text.split("\n\n") if p and not p.startswith(":")]
    assert parts[-1] == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-1]]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "hello"},
        {"prompt": "hello STOP"},
        {"prompt": ["one", "two", "three"], "n": 2},
        {"prompt": [[70, 71, 72], [80, 81]], "echo": True},
        {"prompt": "hello", "echo": True, "n": 3},
        {"prompt": "hello", "logprobs": 2},
        {"prompt": ["a", "b"], "logprobs": 0},
    ],
)
def test_a_text_stream_equals_the_whole_answer(server, body) -> None:
    body = body | {"max_tokens": 9, "request_id": "same"}
    server.post("/v1/completions", body)  # so that both find the same in the prefix cache
    whole = server.post("/v1/completions", body).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    events = events_of(server.post("/v1/completions", body | options))
    assert events[-1]["usage"] == whole["usage"]
    assert events[-1]["choices"] == []
    assert all(e["id"] == whole["id"] == "cmpl-same" for e in events)
    choices = {c["index"]: c | {"text": "", "logprobs": None} for c in whole["choices"]}
    for event in events[:-1]:
        assert event["usage"] is None
        for choice in event["choices"]:
            found = choices[choice["index"]]
            found["text"] += choice["text"]
            for key in ("finish_reason", "stop_reason"):
                found[key] = choice[key] or found[key]
            if choice["logprobs"]:
                lists = found["logprobs"] = found["logprobs"] or {k: [] for k in choice["logprobs"]}
                for key, items in choice["logprobs"].items():
                    lists[key] += items
    assert [choices[i] for i in sorted(choices)] == whole["choices"]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("logprobs", [{}, {"logprobs": True, "top_logprobs": 2}])
def test_a_chat_stream_equals_the_whole_answer(server, n, logprobs) -> None:
    body = {"messages": [{"role": "user", "content": "STOP it"}], "max_tokens": 9, "n": n}
    body |= logprobs
    server.post("/v1/chat/completions", body)
    whole = server.post("/v1/chat/completions", body).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    events = events_of(server.post("/v1/chat/completions", body | options))
    assert events[-1]["usage"] == whole["usage"]
    for expected in whole["choices"]:
        parts = [c for e in events for c in e["choices"] if c["index"] == expected["index"]]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in p["delta"] for p in parts[1:])
        text = "".join(p["delta"].get("content", "") for p in parts)
        assert text == expected["message"]["content"]
        assert [p["finish_reason"] for p in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1]["finish_reason"] == expected["finish_reason"] == "stop"
        positions = [x for p in parts for x in (p["logprobs"] or {"content": []})["content"]]
        assert positions == (expected["logprobs"] or {"content": []})["content"]


def test_logprobs_have_bytes_and_no_infinity(server) -> None:
    body = {"messages": [{"role": "user", "content": "é"}], "max_tokens": 8, "logprobs": True}
    answer = server.post("/v1/chat/completions", body | {"top_logprobs": 2}).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == 8
    assert content[0]["bytes"] == [ord("<")] and content[0]["token"] == "<"
    assert content[0]["top_logprobs"][1]["logprob"] == -9999.0
    assert {"token", "logprob", "bytes", "top_logprobs"} == set(content[0])


def test_text_logprobs_and_offsets(server) -> None:
    answer = server.post(
        "/v1/completions", {"prompt": "abc", "max_tokens": 4, "logprobs": 1}
    ).json()
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "c", "a"]
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    assert logprobs["token_logprobs"] == [-0.5] * 4
    assert logprobs["top_logprobs"][0] == {"a": -0.5}


def test_choices_are_numbered_prompt_by_prompt(server) -> None:
    body = {"prompt": ["abc", "xyz"], "n": 2, "max_tokens": 3}
    answer = server.post("/v1/completions", body).json()
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    assert [c["text"] for c in answer["choices"]] == ["abc", "abc", "xyz", "xyz"]
    assert answer["usage"]["prompt_tokens"] == 8
    assert answer["usage"]["completion_tokens"] == 12


def test_usage_in_every_chunk(server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "abc", "max_tokens": 3, "stream": True, "stream_options": options}
    events = events_of(server.post("/v1/completions", body))
    assert [e["usage"]["completion_tokens"] for e in events] == [1, 2, 3, 3]


def test_cached_tokens_are_reported(server) -> None:
    body = {"prompt": "a prompt of more than sixteen tokens, for sure", "max_tokens": 1}
    details = [server.post("/v1/completions", body).json()["usage"] for _ in range(2)]
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in details]
    assert cached == [0, 32]


def test_a_refusal_before_the_first_token_has_its_own_status(server) -> None:
    for stream in (True, False):
        response = server.post("/v1/completions", {"prompt": "FULL", "stream": stream})
        assert response.status_code == 503
        assert response.headers["retry-after"] == "3"
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("overloaded", "queue_full")


def test_an_error_in_the_middle_of_a_stream_is_an_event(server) -> None:
    response = server.post("/v1/completions", {"prompt": "NAN", "max_tokens": 9, "stream": True})
    assert response.status_code == 200
    events = events_of(response)
    assert [e["choices"][0]["text"] for e in events[:-1]] == ["N", "A"]
    assert events[-1]["error"]["code"] == "numerical_error"


def test_the_official_client_raises_on_an_error_event(client: openai.OpenAI) -> None:
    stream = client.completions.create(model="fake", prompt="NAN", max_tokens=9, stream=True)
    with stream, pytest.raises(openai.APIError, match="finite"):
        list(stream)


def test_an_error_without_a_stream_is_a_500(server) -> None:
    response = server.post("/v1/completions", {"prompt": ["ok", "NAN"], "max_tokens": 9})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "numerical_error"
    server.wait_metric("octavo_requests_running", 0)


def test_a_silent_stream_is_kept_alive(start_server) -> None:
    server = start_server(limits={"commit_s": 0.05, "ping_s": 0.1})
    body = {"prompt": "STALL", "max_tokens": 2, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        text = "".join(response.iter_text())
    comments, rest = text.count(": ping\n\n"), text.lstrip(": ping\n")
    assert 3 <= comments <= 5
    assert rest.startswith("data: {")
    # The status line has gone out: a refusal is an event.
    body["prompt"] = "STALL NAN"
    events = events_of(server.post("/v1/completions", body | {"max_tokens": 9}))
    assert events[-1]["error"]["code"] == "numerical_error"


def test_request_ids_go_in_and_out(server) -> None:
    for path in ("/live", "/nowhere", "/v1/completions"):
        response = server.http.post(path, headers={"x-request-id": "abc-1.2_3:4"})
        assert response.headers["x-request-id"] == "abc-1.2_3:4"
        for bad in ("a b", "x" * 129, "a\tb", '"'):
            response = server.http.post(path, headers={"x-request-id": bad})
            assert response.headers["x-request-id"].startswith("req-")
    body = {"prompt": "x", "max_tokens": 1, "stream": True}
    response = server.post("/v1/completions", body, headers={"x-request-id": "mine"})
    assert response.headers["x-request-id"] == "mine"


def test_one_id_may_be_used_by_two_requests_at_once(server) -> None:
    async def both() -> list[httpx.Response]:
        body = {"prompt": "SLOW", "max_tokens": 3, "request_id": "twice"}
        async with httpx.AsyncClient(base_url=server.url) as http:
            return await asyncio.gather(*(http.post("/v1/completions", json=body) for _ in "ab"))

    assert [response.status_code for response in asyncio.run(both())] == [200, 200]


def test_two_hundred_streams_at_once(server) -> None:
    async def one(client: openai.AsyncOpenAI, number: int) -> tuple[str, str | None]:
        stream = await client.chat.completions.create(
            model="fake",
            messages=[{"role": "user", "content": f"SLOW request {number}"}],
            max_tokens=40,
            stream=True,
        )
        text, reason = "", None
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            reason = chunk.choices[0].finish_reason or reason
        return text, reason

    async def crowd() -> list[tuple[str, str | None]]:
        limits = httpx.Limits(max_connections=None)
        async with (
            httpx.AsyncClient(limits=limits, timeout=60) as transport,
            openai.AsyncOpenAI(
                base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=transport
            ) as client,
        ):
            return await asyncio.gather(*(one(client, number) for number in range(200)))

    for number, (text, reason) in enumerate(asyncio.run(crowd())):
        prompt = f"<user>SLOW request {number}\n<assistant>"
        assert text == (2 * prompt)[:40]
        assert reason == "length"
    server.wait_metric("octavo_requests_running", 0)
