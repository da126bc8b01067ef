"""SEC-13, B81, B82: every field on, off, null, of the wrong type and out of range."""

from __future__ import annotations

import re

import pytest

from octavo.server.fields import HARMLESS, UNSUPPORTED
from octavo.server.protocol import ChatFields, CompletionFields, GenerationFields

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BASE = {
    CHAT: {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    TEXT: {"prompt": "hi", "max_tokens": 2},
}
OWN = {CHAT: ChatFields, TEXT: CompletionFields}

# A value other than the default for every field that is not part of BASE.
VALUES: dict[str, object] = {
    "model": "fake",
    "stream": False,
    "n": 2,
    "best_of": 2,
    "use_beam_search": True,
    "length_penalty": 1.0,
    "early_stopping": False,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 2**64 - 1,
    "stop": ["x", "y"],
    "stop_token_ids": [7],
    "include_stop_str_in_output": True,
    "ignore_eos": True,
    "min_tokens": 1,
    "repetition_penalty": 1.1,
    "presence_penalty": -2,
    "frequency_penalty": 2.0,
    "logit_bias": {"7": -100, "8": 1.5},
    "skip_special_tokens": False,
    "priority": -3,
    "cache_salt": "a secret",
    "cache_pin_s": 1.5,
    "request_id": "my-id.1",
    "max_completion_tokens": 2,
    "logprobs": True,
    "add_generation_prompt": False,
    "continue_final_message": False,
    "chat_template_kwargs": {"mood": "sunny"},
    "echo": True,
    "add_special_tokens": False,
}
TEXT_VALUES = {"logprobs": 3}
NEEDS_MORE = {"stream_options", "top_logprobs"}


def post(server, path, **fields):
    return server.post(path, BASE[path] | fields)


def error_of(response) -> dict[str, object]:
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return error


def names(path: str) -> list[str]:
    return [*GenerationFields.__struct_fields__, *OWN[path].__struct_fields__]


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_every_field_on_and_null(server, path) -> None:
    for name in names(path):
        if name in BASE[path] or name in NEEDS_MORE:
            continue
        value = TEXT_VALUES.get(name, VALUES[name]) if path == TEXT else VALUES[name]
        assert post(server, path, **{name: value}).status_code == 200, name
        assert post(server, path, **{name: None}).status_code == 200, name


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_every_field_refuses_a_wrong_type(server, path) -> None:
    for name in names(path):
        for wrong in ({"a": []}, [[{}]]):
            if name == "chat_template_kwargs" and isinstance(wrong, dict):
                continue
            error = error_of(post(server, path, **{name: wrong}))
            assert re.split(r"\W", str(error["param"]))[0] == name, (name, error)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("n", [0, -1, 129, 2**31, 2**63, 2**100, 1.5, True, "1"]),
        ("max_tokens", [0, -1, 2**31, 2**63, 2**100, 1.5, 1e308, True, "1"]),
        ("temperature", [-0.1, 100.1, 1e308, True, "1"]),
        ("top_p", [0, -1, 1.01, True, "1"]),
        ("top_k", [-2, 2**31, 2**70, 0.5, False]),
        ("min_p", [-0.1, 1.1]),
        ("seed", [2**64, -(2**63) - 1, 0.5, True, "a"]),
        ("min_tokens", [-1, 2**31, 2**70, 3]),
        ("presence_penalty", [-2.1, 2.1]),
        ("frequency_penalty", [-2.1, 2.1]),
        ("repetition_penalty", [0, -1, 101]),
        ("priority", [2**31, -(2**31), 2**70, 0.5]),
        ("cache_salt", ["", "x" * 257, 5, True]),
        ("cache_pin_s", [-1, 3601, True, "1"]),
        ("stop", ["", [""], ["x"] * 17, "x" * 1025, [5], [None]]),
        ("stop_token_ids", [[-1], [10**6], [2**70], ["a"], [5] * 257, 5]),
        ("logit_bias", [{"a": 1}, {"-1": 1}, {"1000000": 1}, {"7": 101}, {"7": "x"}, {"7": None}]),
        ("logit_bias", [{str(i): 0 for i in range(1025)}]),
        ("request_id", ["", "a b", "x" * 129, "a\nb"]),
        ("stream_options", [{"include_usage": 1}, {"include_use": True}, {"include_usage": True}]),
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_out_of_range_is_a_400_that_names_the_field(server, path, name, values) -> None:
    for value in values:
        error = error_of(post(server, path, **{name: value}))
        assert str(error["param"]).startswith(name), (value, error)
        assert name in str(error["message"]), (value, error)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_an_unknown_field_is_named_with_the_nearest(server, path) -> None:
    error = error_of(post(server, path, temprature=0.5))
    assert error["param"] == "temprature"
    assert error["code"] == "unknown_parameter"
    assert "Did you mean temperature?" in str(error["message"])
    assert "Did you mean" not in str(error_of(post(server, path, zzqq=1))["message"])
    assert error_of(post(server, path, **{"x" * 5000: 1}))["param"] == "x" * 100


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_harmless_fields_are_accepted(server, path) -> None:
    plain = post(server, path, temperature=0).json()
    for field in HARMLESS:
        answer = post(server, path, temperature=0, **{field.name: {"any": "value"}}).json()
        assert answer["choices"] == plain["choices"], field.name


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_unsupported_fields_are_refused_unless_neutral(server, path) -> None:
    for field in UNSUPPORTED:
        if field.name in names(path):
            continue
        for neutral in (None, *field.neutral):
            assert post(server, path, **{field.name: neutral}).status_code == 200, field.name
        for value in ({"type": "json_object"}, 17):
            error = error_of(post(server, path, **{field.name: value}))
            assert error["param"] == field.name
            assert error["code"] == "unsupported_parameter"
            assert f"{field.name} is not supported" in str(error["message"])


def test_a_neutral_number_is_not_a_boolean(server) -> None:
    error_of(post(server, TEXT, store=0))
    error_of(post(server, TEXT, use_beam_search=0))
    error_of(post(server, TEXT, best_of=True))


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hi", "messages"),
        ([5], "messages[0]"),
        ([{"content": "hi"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "wizard", "content": "hi"}], "messages[0].role"),
        ([{"role": "tool", "content": "hi", "tool_call_id": "1"}], "messages[0].role"),
        ([{"role": "user", "content": "hi", "contents": 1}], "messages[0].contents"),
        (
            [{"role": "assistant", "content": "", "tool_calls": [{}]}],
            "messages[0].tool_calls",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content[0].type",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"kind": "text"}]}], "messages[0].content[0].kind"),
        ([{"role": "user", "content": "a"}] * 4097, "messages"),
    ],
)
def test_bad_messages_are_named(server, messages, param) -> None:
    assert error_of(server.post(CHAT, {"messages": messages}))["param"] == param


def test_missing_required_fields(server) -> None:
    assert error_of(server.post(CHAT, {}))["param"] == "messages"
    assert error_of(server.post(TEXT, {}))["param"] == "prompt"
    assert error_of(server.post(TEXT, {"prompt": None}))["code"] == "missing_required_parameter"


@pytest.mark.parametrize(
    "prompt",
    ["", [], [[]], ["a", 5], [5, [5]], [-1], [10**6], [2**40], {"a": 1}, 5, [1.5], ["a"] * 257],
)
def test_bad_prompts(server, prompt) -> None:
    fields = {"prompt": prompt, "add_special_tokens": False}
    assert str(error_of(server.post(TEXT, fields))["param"]).startswith("prompt")


def test_too_many_answers(server) -> None:
    assert error_of(server.post(TEXT, {"prompt": ["a"] * 9, "n": 128}))["param"] == "n"


def test_parts_of_text_are_joined(server) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {"messages": [{"role": "user", "content": parts}]}
    joined = {"messages": [{"role": "user", "content": "a\nb"}]}
    ids = server.post("/tokenize", body).json()["tokens"]
    assert ids == server.post("/tokenize", joined).json()["tokens"]


def test_continue_final_message(server) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I am"}]
    body = {"messages": messages, "continue_final_message": True}
    ids = server.post("/tokenize", body).json()["tokens"]
    text = server.post("/detokenize", {"tokens": ids}).json()["prompt"]
    assert text == "<user>hi\n<assistant>I am"
    body["messages"] = messages[:1]
    assert error_of(server.post("/tokenize", body))["param"] == "continue_final_message"


def test_a_model_that_is_not_served(server) -> None:
    for path in (CHAT, TEXT):
        response = post(server, path, model="gpt\r\n-4")
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
        assert response.json()["error"]["param"] == "model"


def test_context_overflow(server) -> None:
    error = error_of(post(server, TEXT, prompt="a" * 5000))
    assert error["code"] == "context_length_exceeded"
    assert "4096" in str(error["message"]) and "5001" in str(error["message"])
    error = error_of(post(server, TEXT, prompt="a" * 4090, max_tokens=100))
    assert error["code"] == "context_length_exceeded"
    error = error_of(post(server, TEXT, prompt="a" * 1_000_000))
    assert error["code"] == "context_length_exceeded"
    message = [{"role": "user", "content": "a" * 100_000}]
    assert error_of(post(server, CHAT, messages=message))["code"] == "context_length_exceeded"


def test_default_max_tokens(server) -> None:
    answer = server.post(TEXT, {"prompt": "hi"}).json()
    assert answer["usage"]["completion_tokens"] == 16
    answer = server.post(TEXT, {"prompt": "a" * 4088}).json()
    assert answer["usage"]["completion_tokens"] == 7
    answer = server.post(CHAT, {"messages": [{"role": "user", "content": "a" * 4000}]}).json()
    assert answer["usage"]["total_tokens"] == 4096


def test_wrong_content_type_is_a_415(server) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        response = server.http.post(
            TEXT, content=b'{"prompt": "a"}', headers={"content-type": kind}
        )
        assert response.status_code == 415
        assert response.json()["error"]["code"] == "unsupported_media_type"
    good = {"content-type": "application/json; charset=utf-8"}
    assert server.http.post(TEXT, content=b'{"prompt": "a"}', headers=good).status_code == 200


def test_echo_with_logprobs_is_refused(server) -> None:
    assert error_of(post(server, TEXT, echo=True, logprobs=1))["param"] == "echo"
    assert error_of(post(server, CHAT, top_logprobs=2))["param"] == "top_logprobs"
    assert error_of(post(server, TEXT, logprobs=21))["param"] == "logprobs"
    assert error_of(post(server, CHAT, logprobs=True, top_logprobs=21))["param"] == "top_logprobs"


def test_two_different_maxima_are_refused(server) -> None:
    assert post(server, CHAT, max_completion_tokens=2).status_code == 200
    error = error_of(post(server, CHAT, max_completion_tokens=3))
    assert error["param"] == "max_completion_tokens"


def test_a_template_that_refuses(server) -> None:
    error = error_of(post(server, CHAT, chat_template_kwargs={"refuse": True}))
    assert error["message"] == "the template refuses"
    error = error_of(post(server, CHAT, chat_template_kwargs={"messages": []}))
    assert error["param"] == "chat_template_kwargs"
