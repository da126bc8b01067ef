"""Check that this machine can build Octavo; say what is missing and the command that brings it.

Run by the Makefile before it makes the virtual environment. Standard library only.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig


def main() -> int:
    """Print one line for each thing that is missing; 0 if nothing is."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        sys.stderr.write(
            f"Octavo needs Python 3.11 to 3.13; {sys.executable} is {version}. "
            "Name another one: make PYTHON=python3.12 serve\n"
        )
        return 1
    faults, packages = [], []
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        faults.append("Python's venv module")
        packages.append(f"python{version}-venv")
    if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        faults.append("Python.h")
        packages.append(f"python{version}-dev")
    if not any(shutil.which(c) for c in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if c):
        faults.append("a C++ compiler")
        packages.append("g++")
    if faults:
        sys.stderr.write(
            f"Missing: {', '.join(faults)}. On Debian or Ubuntu: "
            f"sudo apt install {' '.join(packages)}\n"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
