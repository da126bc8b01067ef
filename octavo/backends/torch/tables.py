"""The tables of kernels, and which one a device gets."""

from __future__ import annotations

import importlib
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Literal

import torch

from octavo.backends.torch.kernels import Kernels
from octavo.errors import ConfigError


def choose_kernels(asked: Literal["auto", "plain", "triton"], device: torch.device) -> Kernels:
    """The table that was asked for; "auto": Triton's on a GPU, torch's own elsewhere.

    Only the one that is used is imported.

    Raises:
        ConfigError: Triton, or what it needs to compile kernels, is missing.
    """
    if asked == "plain" or (asked == "auto" and device.type == "cpu"):
        return _table("plain")
    if device.type != "cpu":
        _check_compiler()
    try:
        return _table("triton")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ConfigError(
            "--backend torch needs triton: pip install 'octavo[cuda]', or give --backend cpu"
        ) from None


def _table(name: str) -> Kernels:
    kernels: Kernels = importlib.import_module(f"octavo.backends.torch.{name}.table").KERNELS
    return kernels


def _check_compiler() -> None:
    """Triton builds the launcher of each kernel with a C compiler and Python's header files."""
    has_compiler = "CC" in os.environ or any(map(shutil.which, ("gcc", "clang")))
    has_headers = (Path(sysconfig.get_path("include")) / "Python.h").exists()
    if not (has_compiler and has_headers):
        raise ConfigError(
            "on a GPU Triton compiles kernels with gcc and Python's header files, and one of them "
            "is missing: install them (Debian, Ubuntu: apt install gcc python3-dev)"
        )
