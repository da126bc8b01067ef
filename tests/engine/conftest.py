"""Fixtures of this folder: the tiny model's tokenizer, and configurations of engines for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from octavo.config import EngineConfig
from octavo.tokenizer.load import load_tokenizer
from octavo.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model_path: Path) -> Tokenizer:
    return load_tokenizer(tiny_model_path)


@pytest.fixture(scope="session")
def tiny_config(tiny_model_path: Path) -> Callable[..., EngineConfig]:
    """Makes a configuration of an engine for the tiny model."""

    def make(**values: object) -> EngineConfig:
        settings = {
            "model": str(tiny_model_path),
            "served_name": "tiny",
            "memory_bytes": 1 << 20,
            "num_threads": 1,
            **values,
        }
        return EngineConfig(**settings)  # type: ignore[arg-type]

    return make
