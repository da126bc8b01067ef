"""Triton kernels run in its interpreter here: there is no device."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported by anything
