"""The modules of benchmarks/paper import each other by their bare names, as its scripts do."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "paper"))
