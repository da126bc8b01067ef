"""JSON bodies, read strictly: what readers disagree about is refused.

Refused with a 400: anything but an object, duplicate keys, NaN and Infinity, numbers out of range,
lone surrogates, U+0000, nesting deeper than `max_depth`, and bytes that are not UTF-8.
"""

from __future__ import annotations

import json
import re

import msgspec

from octavo.errors import InvalidRequestError

_POSSIBLE_KEY = re.compile(rb'"[ \t\r\n]*:')


def decode_object(body: bytes, *, max_depth: int = 64) -> dict[str, object]:
    """Decode a JSON object.

    Raises:
        InvalidRequestError: the body is not JSON, not an object, or doubtful; the message says
            where.
    """
    try:
        value = msgspec.json.decode(body)
    except RecursionError:
        raise _too_deep(max_depth) from None
    except UnicodeDecodeError:
        raise _bad("the body is not UTF-8") from None
    except msgspec.DecodeError as error:
        raise _bad(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise _bad(f"the body must be a JSON object, not {_name(value)}")
    num_keys = _count_keys(body, value, max_depth)
    if len(_POSSIBLE_KEY.findall(body)) != num_keys:
        _refuse_duplicate_keys(body)
    if b"\\u0000" in body:
        _refuse_nul(value)
    return value


def _count_keys(body: bytes, value: dict[str, object], max_depth: int) -> int:
    """How many keys the decoded objects hold together; checks the depth on the way."""
    if body.count(b"{") == 1 and body.count(b"[") < 2:
        return len(value)
    total = 0
    level: list[object] = [value]
    for _ in range(max_depth):
        below: list[object] = []
        for item in level:
            if isinstance(item, dict):
                total += len(item)
                below += [v for v in item.values() if isinstance(v, dict | list)]
            elif isinstance(item, list):
                below += [v for v in item if isinstance(v, dict | list)]
        if not below:
            return total
        level = below
    raise _too_deep(max_depth)


def _refuse_duplicate_keys(body: bytes) -> None:
    """Raise if a key stands twice in one object. Slow: only for bodies that may hold one."""

    def check(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise _bad(f"the key {twice[:100]!r} stands twice in one object")
        return found

    json.loads(body, object_pairs_hook=check)


def _refuse_nul(value: object) -> None:
    """Raise if any string holds U+0000."""
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, str):
            if "\0" in item:
                raise _bad("the body holds the character U+0000; remove it")
        elif isinstance(item, dict):
            todo += item.keys()
            todo += item.values()
        elif isinstance(item, list):
            todo += item


def _name(value: object) -> str:
    names = {type(None): "null", bool: "a boolean", list: "a list", str: "a string"}
    return names.get(type(value), "a number")


def _too_deep(max_depth: int) -> InvalidRequestError:
    return _bad(f"the body is nested deeper than {max_depth} levels")


def _bad(message: str) -> InvalidRequestError:
    return InvalidRequestError(message[:1].upper() + message[1:] + ".", code="invalid_json")
