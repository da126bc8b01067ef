"""docs/api.md tells the truth of the code: routes, fields, codes and limits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

from octavo.engine.validation import MAX_PIN_S, MAX_SALT_CHARACTERS
from octavo.server.fields import HARMLESS, UNSUPPORTED
from octavo.server.options import Limits
from octavo.server.protocol import ChatFields, CompletionFields, GenerationFields
from octavo.server.routes import ADMIN_ROUTES, ROUTES
from octavo.types import MissReason

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "api.md").read_text()
FLAT = " ".join(TEXT.split())


def test_every_route_is_named() -> None:
    for route in (*ROUTES, *ADMIN_ROUTES):
        path = route.path.replace("{model}", "{id}")
        assert f"`{route.method} {path}`" in TEXT, route.path


def test_every_field_is_named() -> None:
    tables = TEXT.partition("## Fields")[2].partition("**Accepted without")[0]
    for kind in (GenerationFields, ChatFields, CompletionFields):
        for name in kind.__struct_fields__:
            assert f"`{name}`" in tables, name


def test_the_lists_of_fields_are_those_of_the_code() -> None:
    harmless = FLAT.partition("**Accepted without effect**")[2].partition(".")[0]
    assert re.findall(r"`(\w+)`", harmless) == sorted(f.name for f in HARMLESS)
    unsupported = FLAT.partition("**Not supported yet**")[2].partition("## Answers")[0]
    assert re.findall(r"`(\w+)`", unsupported) == sorted(f.name for f in UNSUPPORTED)
    for field in UNSUPPORTED:
        if field.neutral:
            values = ", ".join(map(json.dumps, field.neutral))
            assert re.search(rf"`{field.name}`( in chat)? \({re.escape(values)}\)", unsupported)


def test_every_code_is_named() -> None:
    rooms = [ROOT / "octavo" / room for room in ("server", "engine", "scheduler")]
    source = "".join(p.read_text() for room in rooms for p in room.glob("*.py"))
    source += (ROOT / "octavo" / "errors.py").read_text()
    codes = set(re.findall(r'code="(\w+)"', source)) | set(re.findall(r'\d: "(\w+)"', source))
    assert len(codes) > 15
    table = TEXT.partition("## Errors")[2].partition("## Limits")[0]
    assert {code for code in codes if f"`{code}`" not in table} == set()


def test_every_reason_of_a_miss_is_named() -> None:
    part = TEXT.partition("**Why a prefix was not found**")[2].partition("## Errors")[0]
    assert [reason for reason in get_args(MissReason) if f"`{reason}`" not in part] == []


def test_limits_are_those_of_the_code() -> None:
    limits = Limits()
    assert f"{limits.max_body_bytes >> 20} MiB, whole or chunked" in TEXT
    assert f"{limits.max_header_bytes >> 10} KiB, {limits.max_headers} fields" in TEXT
    assert f"within {limits.header_deadline_s:g} s" in TEXT
    assert f"{limits.min_body_rate >> 10} KiB/s over any {limits.body_window_s:g} s" in TEXT
    assert f"closed after {limits.keep_alive_s:g} s" in TEXT
    assert f"cut off after {limits.write_stall_s:g} s" in TEXT
    assert f"{limits.max_json_depth} levels" in TEXT
    assert f"1 to {MAX_SALT_CHARACTERS} characters" in TEXT
    assert f"0 to {MAX_PIN_S:g}:" in TEXT
    assert f"up to {limits.max_messages};" in TEXT
    assert f"up to {limits.max_prompts} texts" in TEXT
    assert f"n up to {limits.max_sequences}" in TEXT
