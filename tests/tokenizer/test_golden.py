"""Token for token what llama.cpp makes of the same vocabulary (see make_golden.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octavo.tokenizer.gguf_vocabulary import gguf_vocabulary
from octavo.tokenizer.load import load_tokenizer
from octavo.tokenizer.tokenizer import Tokenizer
from octavo.weights.cache import cache_home

KINDS = [
    *("smollm", "gpt-2", "llama-bpe", "qwen2", "default"),
    *("with a space before", "without a space before"),
]


def check(tokenizer: Tokenizer, cases: list[tuple[str, list[int], list[int]]]) -> None:
    assert len(cases) > 80
    for text, plain, special in cases:
        assert tokenizer.encode(text, add_special_tokens=False) == plain, text
        assert tokenizer.encode(text, parse_special=True) == special, text


def test_default_model_equals_llama_cpp(smollm2: Tokenizer, golden: Callable[[str], Any]) -> None:
    check(smollm2, golden("smollm2"))


@pytest.mark.parametrize("place", range(len(KINDS)), ids=KINDS)
def test_every_kind_of_vocabulary_equals_llama_cpp(
    place: int, golden: Callable[[str], Any]
) -> None:
    tiny = golden("tiny")
    assert len(tiny["kinds"]) == len(KINDS)
    kind = tiny["kinds"][place]
    metadata = {**tiny["shared"][kind["base"]], kind["key"]: kind["value"]}
    check(Tokenizer(gguf_vocabulary(metadata)), kind["cases"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("qwen2", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"),
        ("gemma", "gemma-3-270m-q4_k_m.gguf"),
    ],
)
def test_other_models_equal_llama_cpp(name: str, file: str, golden: Callable[[str], Any]) -> None:
    found: Path | None = next(iter(sorted(cache_home().rglob(file))), None)
    if found is None:
        pytest.skip(f"{file} is not in the cache folder")
    check(load_tokenizer(found), golden(name))
