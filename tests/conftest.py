"""Fixtures that every room's tests share: where the default model lies."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo.weights import source


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The default model's file, fetched into the cache on the first run."""
    return source.resolve("smollm2")
