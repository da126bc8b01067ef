"""The commands that need no server, on the default model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def octavo(*arguments: str, stdin: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "octavo.cli.main", *arguments],
        capture_output=True,
        text=True,
        input=stdin,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_run(smollm2_path: Path) -> None:
    question = "What is the capital of France?"
    assert "Paris" in octavo("run", question)
    assert "Paris" in octavo("run", "-", "--max-tokens", "20", stdin=question)


def test_chat_remembers(smollm2_path: Path) -> None:
    lines = "What is the capital of France?\n/stats\n/nonsense\n/retry\n/clear\n/exit\n"
    answer = octavo("chat", "--max-tokens", "20", stdin=lines)
    assert answer.count("Paris") >= 2
    assert "tokens" in answer and "/exit" in answer


def test_plan(smollm2_path: Path) -> None:
    plan = json.loads(octavo("plan", "smollm2", "--json", "--memory", "1GiB"))
    assert plan["kv_bytes_per_token"] == 2 * 2 * 30 * 3 * 64
    assert plan["kv_pool_tokens"] == (1 << 30) // plan["kv_bytes_per_token"]
    assert 90e6 < plan["weights_bytes"] < 100e6
    assert plan["context"] == 8192 and plan["fits"] is True
    assert "8,192" in octavo("plan", "smollm2")
    int8 = json.loads(octavo("plan", "smollm2", "--json", "--memory", "1GiB", "--kv-dtype", "int8"))
    assert int8["kv_bytes_per_token"] == 2 * 30 * 3 * (64 + 4)


def test_plan_of_a_quantized_model(tiny_model_path: Path) -> None:
    sizes = [
        json.loads(octavo("plan", str(tiny_model_path), "--json", *options))["weights_bytes"]
        for options in ((), ("--quantization", "int8"), ("--quantization", "int4"))
    ]
    assert sizes[0] > 3 * sizes[1] and sizes[1] > sizes[2]


def test_list(smollm2_path: Path) -> None:
    assert str(smollm2_path) in octavo("list")


def test_bench(smollm2_path: Path) -> None:
    small = ("--requests", "4", "--input-len", "16-32", "--output-len", "4-8", "--memory", "64MiB")
    for kind in (("latency",), ("throughput", "--concurrency", "2")):
        figures = json.loads(octavo("bench", *kind, *small, "--json"))
        assert figures["requests"] == 4
        assert 16 <= figures["output_tokens"] <= 32
        assert figures["output_tokens_per_s"] > 0
        assert figures["ttft_ms_p50"] <= figures["ttft_ms_p99"]


@pytest.mark.parametrize("group", [(), ("--n", "3"), ("--beams", "4")])
def test_bench_memory(smollm2_path: Path, group: tuple[str, ...]) -> None:
    small = ("--requests", "4", "--input-len", "40-50", "--output-len", "4-8", "--memory", "64MiB")
    figures = json.loads(octavo("bench", "memory", *group, *small, "--json"))
    parts = ("tokens_bytes", "reserved_bytes", "cached_bytes", "free_bytes")
    assert sum(figures[part] for part in parts) == pytest.approx(figures["pool_bytes"], rel=1e-6)
    assert 0.5 < figures["holding_tokens_ratio"] <= 1
    assert (figures["block_copies"] > 0) == (figures["saved_by_sharing_ratio"] > 0) == bool(group)


def test_bench_startup(smollm2_path: Path) -> None:
    figures = json.loads(octavo("bench", "startup", "--runs", "1", "--json"))
    assert 0 < figures["live_s"] <= figures["ready_s"] <= figures["first_token_s"] < 20
    assert figures["kv_cache_mb"] > 200
