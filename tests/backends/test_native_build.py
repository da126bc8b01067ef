"""The native code as a build: test programs under sanitizers and on ARM64, no weak symbols."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAMS = ["blocks_test", "kernel_test", "linear_test"]
KERNELS = ("norm", "rope", "activation", "attention", "sample", "linear", "quantize", "table")
ISA_FLAGS = {"scalar": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = ["-DOCTAVO_ISA_AVX2", "-mavx2", "-mfma", "-mf16c", "-mbmi2"]
    ISA_FLAGS["avxvnni"] = ["-DOCTAVO_ISA_AVXVNNI", *ISA_FLAGS["avx2"][1:], "-mavxvnni"]
    ISA_FLAGS["avx512"] = [
        "-DOCTAVO_ISA_AVX512",
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mavx512vnni",
        "-mfma",
        "-mf16c",
    ]


def find(program: str) -> str:
    """A build tool: beside the interpreter, where wheels put cmake and ninja, or on the path."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(program, path=places)
    assert found is not None, f"there is no {program}; make test-all brings cmake and ninja"
    return found


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test programs, built with AddressSanitizer and UndefinedBehaviorSanitizer."""
    cmake, ninja = find("cmake"), find("ninja")
    find("c++")
    folder = tmp_path_factory.mktemp("native")
    options = ["-DOCTAVO_TESTS=ON", "-DOCTAVO_SANITIZE=ON"]
    options += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    run([cmake, "-S", str(ROOT), "-B", str(folder), *options])
    run([cmake, "--build", str(folder), "--parallel", "2"])
    return folder


def run(command: list[str]) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_run_clean_under_sanitizers(build: Path, program: str) -> None:
    run([str(build / program)])


@pytest.fixture(scope="module")
def arm64_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test programs for ARM64, by a cross compiler."""
    if shutil.which("aarch64-linux-gnu-g++") is None or shutil.which("qemu-aarch64") is None:
        pytest.skip("needs Debian's g++-aarch64-linux-gnu and qemu-user")
    folder = tmp_path_factory.mktemp("arm64")
    options = ["-DOCTAVO_TESTS=ON", "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++"]
    options += ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
    options += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={find('ninja')}"]
    run([find("cmake"), "-S", str(ROOT), "-B", str(folder), *options])
    run([find("cmake"), "--build", str(folder), "--parallel", "2"])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_run_on_arm64(arm64_build: Path, program: str) -> None:
    run(["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", str(arm64_build / program)])


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISA_FLAGS)
def test_kernels_export_no_weak_symbol(tmp_path: Path, isa: str) -> None:
    """An inline function in two objects is one weak symbol: the AVX-512 copy could serve all."""
    nm, compiler = find("nm"), find("c++")
    for name in ("linear",) if isa == "avxvnni" else KERNELS:  # CMakeLists.txt
        target = tmp_path / f"{name}.o"
        flags = ["-std=c++20", "-O1", "-fno-exceptions", "-fno-rtti", *ISA_FLAGS[isa], "-c"]
        run([compiler, *flags, str(ROOT / "csrc" / f"{name}.cpp"), "-o", str(target)])
        symbols = [line.split() for line in run([nm, "--defined-only", str(target)]).splitlines()]
        weak = [symbol for *_, kind, symbol in symbols if kind in "wWvVu"]
        assert weak == [], f"{name}.cpp exports {weak}"
