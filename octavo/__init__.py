"""Octavo serves language models: paged KV cache, continuous batching, the OpenAI API.

Names are imported when they are first used, so `import octavo` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octavo.engine.async_engine import AsyncEngine
    from octavo.engine.llm import LLM
    from octavo.types import (
        BeamSearchOutput,
        BeamSearchParams,
        CompletionOutput,
        RequestOutput,
        SamplingParams,
    )

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncEngine",
    "BeamSearchOutput",
    "BeamSearchParams",
    "CompletionOutput",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]

_HOMES = {
    "LLM": "octavo.engine.llm",
    "AsyncEngine": "octavo.engine.async_engine",
    "BeamSearchOutput": "octavo.types",
    "BeamSearchParams": "octavo.types",
    "CompletionOutput": "octavo.types",
    "RequestOutput": "octavo.types",
    "SamplingParams": "octavo.types",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return __all__
