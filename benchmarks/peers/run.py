"""Octavo beside llama.cpp, OpenVINO GenAI and transformers: same file, same workload, one run.

    python benchmarks/peers/run.py [--model FILE] [--concurrency 1,16,64] [--peers octavo,llama_cpp]

Each peer lives in a virtual environment of its own, made from PyPI under the cache folder on the
first run (llama-cpp-python is compiled for this machine: some minutes). A peer is a worker script
in this folder, peer_NAME.py: it reads {model, threads, concurrency, jobs} as JSON on stdin and
writes {seconds, output_tokens, first_token_seconds} as its last line. The jobs are seeded random
prompts of 180 to 330 tokens with outputs of 90 to 166, greedy, in a closed loop. Peers take turns
at each concurrency, `--rounds` times; the table shows medians and the ratio to Octavo.
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

from octavo.cli.bench.report import save
from octavo.cli.bench.workload import make_jobs
from octavo.config import available_cpus
from octavo.weights import source
from octavo.weights.cache import cache_home

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
}
REQUESTS = {1: 4, 16: 32, 64: 96}
"""Requests of a run at a concurrency; others take 1.5 a client."""


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
        environment = os.environ | {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}
        command = [str(python), "-m", "pip", "install", "-q", *REQUIREMENTS[peer]]
        subprocess.run(command, check=True, env=environment)
        marker.write_text(wanted)
    return str(python)


def run_once(peer: str, task: dict[str, object]) -> dict[str, float]:
    """One measurement of one peer; raises with the end of its output if it fails."""
    done = subprocess.run(
        [interpreter(peer), str(HERE / f"peer_{peer}.py")],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{peer}: {done.stderr[-600:]}")
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def measure(options: argparse.Namespace, concurrency: int) -> dict[str, dict[str, float]]:
    """Median output tokens a second and time to first token of each peer."""
    options.requests = REQUESTS.get(concurrency, -(-concurrency * 3 // 2))
    options.input_len, options.output_len = "180-330", "90-166"
    jobs = make_jobs(options, options.vocab_size)
    task = {
        "model": str(source.resolve(options.model)),
        "threads": available_cpus(),
        "concurrency": concurrency,
        "jobs": [{"prompt_ids": j.prompt_ids, "output": j.num_output_tokens} for j in jobs],
    }
    runs: dict[str, list[dict[str, float]]] = {}
    for _ in range(options.rounds):
        for peer in options.peers.split(","):
            try:
                runs.setdefault(peer, []).append(run_once(peer, task))
            except RuntimeError as error:
                print(error, file=sys.stderr)
    figures = {}
    for peer, results in runs.items():
        if results:
            rates = [r["output_tokens"] / r["seconds"] for r in results]
            first = [r["first_token_seconds"] for r in results]
            figures[peer] = {
                "output_tokens_per_s": round(statistics.median(rates), 1),
                "ttft_ms": round(statistics.median(first) * 1e3, 1),
            }
    return figures


def main() -> None:
    """Print the side-by-side table; write it to benchmarks/results with --save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="a GGUF file or a known name")
    parser.add_argument("--vocab-size", type=int, default=49152)
    parser.add_argument("--concurrency", default="1,16,64")
    parser.add_argument("--peers", default=",".join(REQUIREMENTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="into benchmarks/results")
    options = parser.parse_args()
    table: dict[str, dict[str, dict[str, float]]] = {}
    for concurrency in map(int, options.concurrency.split(",")):
        table[str(concurrency)] = measure(options, concurrency)
        own = table[str(concurrency)].get("octavo", {}).get("output_tokens_per_s")
        for peer, figures in table[str(concurrency)].items():
            rate = figures["output_tokens_per_s"]
            ratio = f"  octavo is {own / rate:.2f}x" if own and peer != "octavo" else ""
            print(
                f"C={concurrency:<3} {peer:<13} {rate:>8.1f} output tok/s"
                f"  first token {figures['ttft_ms']:>8.1f} ms{ratio}",
                flush=True,
            )
    if options.save:
        print(
            save(
                HERE.parent / "results", "peers", {"model": options.model, "by_concurrency": table}
            )
        )


if __name__ == "__main__":
    main()
