"""What the tokenizer tests share: our texts, the default tokenizer, small vocabularies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octavo.tokenizer.gguf_vocabulary import gguf_vocabulary
from octavo.tokenizer.load import load_tokenizer
from octavo.tokenizer.tokenizer import Tokenizer

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Any]:
    """Read golden_NAME.json: what llama.cpp made of the texts (see make_golden.py)."""
    return lambda name: json.loads((HERE / f"golden_{name}.json").read_text())


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Our own texts in many scripts, code, emoji, spaces and odd characters."""
    return list(json.loads((HERE / "texts.json").read_text())["texts"])


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Tokenizer:
    """The default model's tokenizer."""
    return load_tokenizer(smollm2_path)


@pytest.fixture(scope="session")
def sentencepiece_metadata(golden: Callable[[str], Any]) -> dict[str, Any]:
    """A small SentencePiece vocabulary, as a GGUF file describes it."""
    return dict(golden("tiny")["shared"]["sentencepiece"])


@pytest.fixture(scope="session")
def byte_level_metadata(golden: Callable[[str], Any]) -> dict[str, Any]:
    """A small byte-level vocabulary, as a GGUF file describes it."""
    return {**golden("tiny")["shared"]["byte level"], "tokenizer.ggml.pre": "qwen2"}


@pytest.fixture(scope="session")
def byte_level(byte_level_metadata: dict[str, Any]) -> Tokenizer:
    """A small byte-level tokenizer; the default model's lacks a few bytes, this one none."""
    return Tokenizer(gguf_vocabulary(byte_level_metadata))


@pytest.fixture(scope="session")
def sentencepiece(sentencepiece_metadata: dict[str, Any]) -> Tokenizer:
    """A small SentencePiece tokenizer with byte fallback and a space before each text."""
    return Tokenizer(gguf_vocabulary(sentencepiece_metadata))
