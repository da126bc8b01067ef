"""Every wrong start ends with a code that is not 0 and one last line: cause and remedy."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest


def octavo(*arguments: str, home: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({"OCTAVO_HOME": str(home)} if home else {})
    return subprocess.run(
        [sys.executable, "-P", "-m", "octavo.cli.main", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment,
    )


def check(done: subprocess.CompletedProcess[str], *words: str) -> None:
    lines = done.stderr.strip().splitlines()
    assert done.returncode not in (0, None), done.stderr
    assert "Traceback" not in done.stderr
    assert all(word in lines[-1] for word in words), lines[-1]


def write_gguf(path: Path, architecture: str) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tensor("token_embd.weight", np.zeros((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_missing_file() -> None:
    check(octavo("serve", "no/such/model.gguf", "--port", "0"), "no/such/model.gguf")


def test_cut_file(tmp_path: Path, smollm2_path: Path) -> None:
    with smollm2_path.open("rb") as whole:
        (tmp_path / "cut.gguf").write_bytes(whole.read(30_000_000))
    check(octavo("serve", str(tmp_path / "cut.gguf"), "--port", "0"), "cut.gguf")


def test_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "page.gguf").write_text("<html>404</html>")
    check(octavo("serve", str(tmp_path / "page.gguf"), "--port", "0"), "page.gguf")
    check(octavo("serve", str(tmp_path), "--port", "0"), "config.json")


def test_unknown_architecture(tmp_path: Path) -> None:
    write_gguf(tmp_path / "other.gguf", "mamba9")
    check(octavo("serve", str(tmp_path / "other.gguf"), "--port", "0"), "mamba9", "llama")
    check(octavo("plan", str(tmp_path / "other.gguf")), "mamba9", "llama")


def test_taken_port(smollm2_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        check(octavo("serve", "smollm2", "--port", port), port, "--port")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "--prot", "8000"], ["--prot", "--port"]),
        (["serve", "--memory", "lots"], ["--memory", "4GiB"]),
        (["serve", "--block-size", "17"], ["--block-size", "16"]),
        (["serve", "--kv-dtype", "int4"], ["--kv-dtype", "int8"]),
        (["serve", "--max-num-seqs", "0"], ["--max-num-seqs"]),
        (["serve", "--port", "70000"], ["--port"]),
        (["sevre"], ["serve"]),
        (["pull", "smollm3"], ["smollm2"]),
        (["rm", "nothing-like-it"], ["nothing-like-it"]),
        (["bench", "latency", "--input-len", "9-2"], ["--input-len"]),
        (["bench", "serve", "--url", "http://127.0.0.1:9"], ["127.0.0.1:9"]),
    ],
)
def test_wrong_option(arguments: list[str], words: list[str]) -> None:
    check(octavo(*arguments), *words)


def test_too_little_memory(smollm2_path: Path) -> None:
    check(octavo("serve", "smollm2", "--memory", "1000", "--port", "0"), "--memory")
