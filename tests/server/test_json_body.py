"""SEC-12: JSON that readers disagree about is refused, and quickly."""

from __future__ import annotations

import json
import time

import pytest

from octavo.errors import InvalidRequestError
from octavo.server.json_body import decode_object


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not valid JSON"),
        (b"[1]", "a list"),
        (b"null", "null"),
        (b"5", "a number"),
        (b'"text"', "a string"),
        (b"true", "a boolean"),
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"a": Infinity}', "not valid JSON"),
        (b'{"a": 1e999}', "not valid JSON"),
        (b'{"a": 1} x', "not valid JSON"),
        (b'{"a": "\\ud800"}', "not valid JSON"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'\xef\xbb\xbf{"a": 1}', "not valid JSON"),
        (b'{"a": "x\\u0000"}', "U+0000"),
        (b'{"x\\u0000": 1}', "U+0000"),
        (b'{"a": "x\0"}', "not valid JSON"),
        (b'{"a": 1, "a": 2}', "'a' stands twice"),
        (b'{"x": [{"b": 1 , "c":2, "b"\n:1}]}', "'b' stands twice"),
        (b'{"a\\"": ":", "a\\u0022": 1}', "stands twice"),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "deeper"),
        (b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}", "deeper"),
        (b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", "deeper"),
    ],
)
def test_doubtful_json_is_refused(body: bytes, said: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        decode_object(body)
    assert said in caught.value.message
    assert caught.value.code == "invalid_json"


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"a": ["b", {"c": {"d": [1, 2.5, None, True]}}]},
        {"text": 'a "quoted": word, {"like": "JSON"}, \\": and \\\\'},
        {":": ": x", "b": ":"},
        {"the escape": "\\u0000 in words"},
        {"ends in a backslash\\": "\\"},
        {"smile": "\U0001f600 é"},
        {"deep": [[[[[[[[1]]]]]]]]},
    ],
)
@pytest.mark.parametrize("is_ascii", [True, False])
def test_good_json_is_read(value: dict[str, object], is_ascii: bool) -> None:
    assert decode_object(json.dumps(value, ensure_ascii=is_ascii).encode()) == value


def test_bounds_on_time() -> None:
    """A large body costs little, be it full of numbers, text that looks like JSON, or objects."""
    bodies = [
        b'{"prompt": [' + b"1," * 1_000_000 + b"1]}",
        json.dumps({"prompt": '"a": ' * 1_000_000}).encode(),
        b'{"messages": [' + b'{"a": 1},' * 200_000 + b"{}]}",
    ]
    for body in bodies:
        began = time.perf_counter()
        decode_object(body)
        assert time.perf_counter() - began < 1.0
