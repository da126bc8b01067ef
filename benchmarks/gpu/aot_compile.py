"""Compiles a Triton kernel for a device that need not be there, and reads what it takes."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from aot_case import AotCase
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from octavo.backends.torch.triton.launch import FP_FUSION

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def measure(case: AotCase, target: str) -> dict[str, int]:
    """Compile a case for a target.

    Returns:
        `registers` of a thread, bytes of `shared` memory of a program, bytes `spilled` of a thread
        (its stack, which holds nothing else in these kernels); 1 as `serialized`, where ptxas says
        that each wgmma waits for the one before.
    """
    names = case.kernel.arg_names
    unknown = {*case.signature, *case.constants, *case.divisible} - {*names}
    missing = {*names} - {*case.signature, *case.constants}
    if unknown or missing:
        raise ValueError(f"arguments unknown: {sorted(unknown)}, missing: {sorted(missing)}")
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    divisible: dict[Any, Any] = {
        (names.index(name),): [["tt.divisibility", 16]] for name in case.divisible
    }
    source = ASTSource(case.kernel, signature, dict(case.constants), divisible)
    compiled = triton.compile(source, TARGETS[target], {**FP_FUSION, **case.options})
    if "cubin" in compiled.asm:
        registers, spilled = _of_cubin(compiled.asm["cubin"])
    else:
        registers, spilled = _of_assembly(compiled.asm["amdgcn"])
    figures = {"registers": registers, "shared": compiled.metadata.shared, "spilled": spilled}
    if is_serialized(compiled.asm.get("ptx", "")):
        figures["serialized"] = 1
    return figures


def _of_cubin(cubin: bytes) -> tuple[int, int]:
    """Registers and stack, as Triton's copy of cuobjdump says."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [os.fspath(tool), "-res-usage", os.fspath(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def is_serialized(ptx: str) -> bool:
    """Whether ptxas cannot keep matrix instructions of Hopper in flight (its message C7512)."""
    if "wgmma" not in ptx:
        return False
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", os.fspath(file)]
        command += ["-o", os.devnull]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return "C7512" in text


def _of_assembly(text: str) -> tuple[int, int]:
    """The same of AMD's assembly, whose metadata says it."""
    found = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text))
    return int(found["vgpr_count"]), int(found["private_segment_fixed_size"])
