"""B80: whatever a body holds, the answer is a 200 or a 4xx in OpenAI's shape."""

from __future__ import annotations

import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.server.fields import HARMLESS, UNSUPPORTED
from octavo.server.protocol import (
    ChatFields,
    ChatMessage,
    CompletionFields,
    ContentPart,
    GenerationFields,
)

KINDS = (GenerationFields, ChatFields, CompletionFields, ChatMessage, ContentPart)
NAMES = sorted({n for kind in KINDS for n in kind.__struct_fields__} - {"max_tokens", "n"})
NAMES += [field.name for field in (*HARMLESS, *UNSUPPORTED)]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64, 10**40, 1e308, -0.0, 0.5])
    | st.text(max_size=20)
    | st.sampled_from(["user", "assistant", "system", "text", "fake", "hello", "<|im_end|>"])
)
OBJECTS = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), SCALARS, max_size=4)
VALUES = st.recursive(
    SCALARS | OBJECTS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    ),
    max_leaves=12,
)
BASES = st.sampled_from(
    [
        {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
        {"prompt": "hi", "max_tokens": 2},
        {"prompt": [5, 6, 7], "max_tokens": 2, "stream": True},
        {},
    ]
)
PATHS = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]
RELAXED = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def check(response) -> None:
    if response.status_code == 200:
        return
    assert response.status_code in (400, 404), response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"] == "invalid_request_error"


@RELAXED
@given(
    path=st.sampled_from(PATHS),
    base=BASES,
    fields=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4),
)
def test_any_fields(server, path, base, fields) -> None:
    check(server.post(path, {"max_tokens": 2} | fields | base))


@RELAXED
@given(path=st.sampled_from(PATHS), data=st.data())
def test_any_bytes(server, path, data) -> None:
    good = json.dumps(data.draw(BASES | OBJECTS)).encode()
    position = data.draw(st.integers(0, len(good)))
    junk = data.draw(st.binary(max_size=8) | st.sampled_from([b"\\u0000", b'"', b"\\ud800", b"\0"]))
    body = good[:position] + junk + good[position:]
    headers = {"content-type": "application/json"}
    check(server.http.post(path, content=body, headers=headers))


def test_afterwards_the_server_is_well(server) -> None:
    assert server.post("/v1/completions", {"prompt": "hi", "max_tokens": 2}).status_code == 200
    server.wait_metric("octavo_requests_running", 0)
