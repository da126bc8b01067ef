"""The tables of kernels, and which one a device gets."""

from __future__ import annotations

import importlib
from typing import Literal

import torch

from octavo.backends.torch.kernels import Kernels


def choose_kernels(asked: Literal["auto", "plain", "triton"], device: torch.device) -> Kernels:
    """The table that was asked for; "auto": Triton's on a GPU, torch's own elsewhere.

    Only the one that is used is imported.
    """
    is_plain = asked == "plain" or (asked == "auto" and device.type == "cpu")
    name = "plain" if is_plain else "triton"
    kernels: Kernels = importlib.import_module(f"octavo.backends.torch.{name}.table").KERNELS
    return kernels
