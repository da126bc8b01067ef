"""Triton kernels run in its interpreter here: there is no device."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported by anything

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from triton.runtime import interpreter

_ROUNDED = {"bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn}


@pytest.fixture(autouse=True)
def rounding_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """To bfloat16 and fp8, round to nearest even: the interpreter cuts or mistakes the carry."""
    convert = interpreter._convert_float

    def rounded(values: NDArray[Any], source: Any, target: Any, mode: Any) -> NDArray[Any]:
        if source.name != "fp32" or target.name not in _ROUNDED:
            result: NDArray[Any] = convert(values, source, target, mode)
            return result
        codes = torch.from_numpy(np.ascontiguousarray(values)).to(_ROUNDED[target.name])
        whole = {1: torch.uint8, 2: torch.uint16}[codes.itemsize]
        return codes.view(whole).numpy().reshape(values.shape)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
