"""A Triton kernel with the types and constants that it is compiled ahead of time with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class AotCase:
    """One specialization of a kernel, as a launch on a device would make it.

    Attributes:
        name: unique, for the table: "attention bf16 head 128".
        kernel: the function under @triton.jit.
        signature: type of each argument that is no constant, as Triton writes them: "*bf16",
            "i32", "fp32"; a pointer or integer that is divisible by 16 has its name in `divisible`.
        constants: the tl.constexpr arguments.
        divisible: arguments that are divisible by 16.
        options: num_warps, num_stages and the like.
        targets: the architectures that can run it; empty: all.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=lambda: {"num_warps": 4})
    targets: tuple[str, ...] = ()
