"""What a figure was measured on, and files that keep both."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Mapping
from pathlib import Path

from octavo.config import available_cpus


def describe_machine() -> dict[str, object]:
    """The processor's name, the CPUs given, the Python and the date."""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cpus": available_cpus(),
        "python": platform.python_version(),
    }


def save(folder: Path, name: str, figures: Mapping[str, object]) -> Path:
    """Write figures with the machine to FOLDER/NAME-DATE.json; return the path."""
    machine = describe_machine()
    path = folder / f"{name}-{machine['date']}.json"
    path.write_text(json.dumps({**machine, **figures}, indent=1) + "\n")
    return path


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()
