"""From a JSON object to the structs of `protocol.py`; errors name the field and mend slips."""

from __future__ import annotations

import difflib
import re
from typing import TypeVar

import msgspec

from octavo.errors import InvalidRequestError
from octavo.server.fields import HARMLESS_NAMES, UNSUPPORTED_BY_NAME

T = TypeVar("T")
U = TypeVar("U")

_FAULT = re.compile(r"(?P<what>.*?)(?: - at (?:`key` in )?`\$\.?(?P<path>.*)`)?", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`")


def parse(value: dict[str, object], kind: type[T]) -> T:
    """Build one struct of a JSON object.

    Raises:
        InvalidRequestError: a field is unknown, missing or of the wrong type; `param` names it.
    """
    fields = {name: v for name, v in value.items() if v is not None}
    names = kind.__struct_fields__  # type: ignore[attr-defined]
    for name in fields:
        if name not in names:
            raise _unknown(name, names)
    return _convert(fields, kind)


def parse_generation(value: dict[str, object], shared: type[T], own: type[U]) -> tuple[T, U]:
    """Split a JSON object between the shared and the endpoint's own fields.

    Raises:
        InvalidRequestError: a field is unknown, not supported, missing or of the wrong type;
            `param` names it.
    """
    shared_names = frozenset(shared.__struct_fields__)  # type: ignore[attr-defined]
    own_names = frozenset(own.__struct_fields__)  # type: ignore[attr-defined]
    for_shared: dict[str, object] = {}
    for_own: dict[str, object] = {}
    for name, v in value.items():
        if v is None:
            continue  # a null is the default, as in OpenAI's own API
        if name in shared_names:
            for_shared[name] = v
        elif name in own_names:
            for_own[name] = v
        elif name not in HARMLESS_NAMES:
            _refuse_unless_neutral(name, v, shared_names | own_names)
    return _convert(for_shared, shared), _convert(for_own, own)


def _refuse_unless_neutral(name: str, value: object, known: frozenset[str]) -> None:
    field = UNSUPPORTED_BY_NAME.get(name)
    if field is None:
        raise _unknown(name, (*known, *HARMLESS_NAMES, *UNSUPPORTED_BY_NAME))
    for neutral in field.neutral:
        # 1 == True in Python, but not in JSON.
        if value == neutral and isinstance(value, bool) == isinstance(neutral, bool):
            return
    raise InvalidRequestError(
        f"{name} is not supported: {field.why}. Leave the field out.",
        param=name,
        code="unsupported_parameter",
    )


def _unknown(name: str, known: tuple[str, ...]) -> InvalidRequestError:
    near = difflib.get_close_matches(name[:100], sorted(known), n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return InvalidRequestError(
        f"Unknown field: {name[:100]!r}.{hint}", param=name[:100], code="unknown_parameter"
    )


def _convert(fields: dict[str, object], kind: type[T]) -> T:
    try:
        return msgspec.convert(fields, kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from None


def _explain(message: str) -> InvalidRequestError:
    """OpenAI's error for a msgspec message such as "Expected `int`, got `str` - at `$.n`"."""
    match = _FAULT.fullmatch(message)
    assert match is not None
    what, path = match["what"], match["path"] or ""
    code = "invalid_type" if "got" in what else "invalid_value"
    if unknown := _UNKNOWN.fullmatch(what):
        path, code = f"{path}.{unknown[1][:100]}".lstrip("."), "unknown_parameter"
        what = f"Unknown field: {unknown[1][:100]!r}"
    elif missing := _MISSING.fullmatch(what):
        path, code = f"{path}.{missing[1]}".lstrip("."), "missing_required_parameter"
        what = "The field is required"
    where = f"{path}: " if path else ""
    return InvalidRequestError(f"{where}{what}.", param=path or None, code=code)
