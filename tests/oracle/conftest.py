"""The oracle tests compare through benchmarks/cpu/quality.py: both measure the same."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

QUALITY = Path(__file__).resolve().parents[2] / "benchmarks" / "cpu" / "quality.py"


@pytest.fixture(scope="session")
def quality() -> ModuleType:
    """benchmarks/cpu/quality.py as a module."""
    spec = importlib.util.spec_from_file_location("octavo_quality", QUALITY)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
