"""What benchmarks/gpu/aot.py says of kernels that are right and wrong, and by its exit code."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu" / "aot.py"

CASES = """
import triton
import triton.language as tl
from aot_case import AotCase


@triton.jit
def double(x, y, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(y + offsets, tl.load(x + offsets) * 2)


@triton.jit
def greedy_for_registers(x, y, N: tl.constexpr):
    offsets = tl.arange(0, N)
    total = tl.cumsum(tl.load(x + offsets), 0)
    tl.store(y + offsets, total * tl.load(x + offsets + N))


@triton.jit
def wrong(x, y, N: tl.constexpr):
    tl.store(y + tl.arange(0, N), x.no_such_attribute)


def case(name, kernel, size, **changes):
    return AotCase(name, kernel, {"x": "*fp32", "y": "*fp32"}, {"N": size}, ("x", "y"), **changes)


CASES = (
    case("double", double, 1024),
    case("spilling", greedy_for_registers, 32768, targets=("sm_80",)),
    case("wrong", wrong, 16, targets=("sm_80",)),
)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of cases, and a table of those that compile, written by the script itself."""
    folder = tmp_path_factory.mktemp("aot")
    (folder / "cases").mkdir()
    (folder / "cases" / "three.py").write_text(CASES)
    for name in ("double", "spilling"):
        done = run(folder, "--only", name, "--write")
        assert done.returncode == 0, done.stderr
    return folder


def run(
    folder: Path, *arguments: str, table: str = "table.json"
) -> subprocess.CompletedProcess[str]:
    # Of the working directory and PYTHONPATH it needs nothing; the interpreter's tests set this.
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(folder / "cache")}
    environment.pop("PYTHONPATH", None)
    places = ("--cases", folder / "cases", "--table", folder / table)
    return subprocess.run(
        [sys.executable, "-P", SCRIPT, *places, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=environment,
    )


def test_table(folder: Path) -> None:
    table = json.loads((folder / "table.json").read_text())
    assert {name: [*entries] for name, entries in table.items()} == {
        "double": ["sm_80", "sm_90", "sm_100", "gfx942"],
        "spilling": ["sm_80"],
    }
    assert all(entry["spilled"] == 0 < entry["registers"] for entry in table["double"].values())
    assert table["spilling"]["sm_80"]["spilled"] > 0
    assert table["spilling"]["sm_80"]["shared"] > 0


def test_right_kernel_on_one_target(folder: Path) -> None:
    done = run(folder, "--only", "double", "--target", "gfx942")
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["case", "target"],
        ["double", "gfx942"],
    ]


def test_every_fault_is_told(folder: Path) -> None:
    """A spill over the table's, a kernel that does not compile, one unknown, one that is gone."""
    table = json.loads((folder / "table.json").read_text())
    table["spilling"]["sm_80"]["spilled"] -= 1
    table["gone"] = table.pop("double")
    (folder / "edited.json").write_text(json.dumps(table))
    done = run(folder, "--target", "sm_80", table="edited.json")
    assert done.returncode == 1
    assert "spilling, sm_80: spills" in done.stderr
    assert "wrong, sm_80: does not compile" in done.stderr
    assert "no_such_attribute" in done.stderr
    assert "double, sm_80: not in the table" in done.stderr
    assert "gone, gfx942: in the table, but no such case" in done.stderr
    assert "3 compiled" in done.stderr


@pytest.mark.parametrize(("target", "kib"), [("sm_80", 163), ("sm_90", 227), ("gfx942", 64)])
def test_more_shared_memory_than_there_is(target: str, kib: int) -> None:
    """It is a fault though the table says the same."""
    script = runpy.run_path(str(SCRIPT))
    unit = script["Unit"](SimpleNamespace(name="large"), target)
    most = {"registers": 8, "shared": kib * 1024, "spilled": 0}
    assert script["faults_of"](unit, most, most) == []
    more = most | {"shared": kib * 1024 + 1}
    (fault,) = script["faults_of"](unit, more, more)
    assert fault.startswith(f"large, {target}: {kib * 1024 + 1} bytes of shared memory")


def test_products_of_hopper_one_after_another() -> None:
    """It is a fault where the table does not say so, and may end."""
    script = runpy.run_path(str(SCRIPT))
    unit = script["Unit"](SimpleNamespace(name="slow"), "sm_90")
    figures = {"registers": 8, "shared": 0, "spilled": 0}
    serialized = figures | {"serialized": 1}
    assert script["faults_of"](unit, figures, serialized) == []
    assert script["faults_of"](unit, serialized, serialized) == []
    (fault,) = script["faults_of"](unit, serialized, figures)
    assert fault == "slow, sm_90: ptxas serializes wgmma, in the table it does not"
    assert script["row_of"](unit, serialized, figures).endswith("0->1")


def test_name_without_case(folder: Path) -> None:
    done = run(folder, "--only", "nothing of this name")
    assert done.returncode == 1
    assert "No case has" in done.stderr
