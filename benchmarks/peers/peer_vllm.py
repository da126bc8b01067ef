"""Worker: vLLM on the CPU in bf16, which it needs: the GGUF file is written out once as a folder.

Its scheduler batches continuously; the loop adds a request as one ends. Token ids go in and come
out, so no tokenizer is loaded. vLLM compiles the model before it begins: minutes, not timed.
"""

from __future__ import annotations

import json
import os
import pathlib
import statistics
import sys
import time

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from bf16_folder import bf16_folder
from vllm import LLM, SamplingParams


def main() -> None:
    """Run the task on stdin."""
    task = json.load(sys.stdin)
    jobs, concurrency = task["jobs"], task["concurrency"]
    path = pathlib.Path(task["model"])
    llm = LLM(
        model=str(path if path.is_dir() else bf16_folder(path)),
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=max(len(j["prompt_ids"]) + j["output"] for j in jobs) + 8,
        max_num_seqs=concurrency,
        enable_prefix_caching=False,
    )
    run(llm, jobs[:1], 1)
    began = time.perf_counter()
    firsts, tokens = run(llm, jobs, concurrency)
    result = {
        "seconds": time.perf_counter() - began,
        "output_tokens": tokens,
        "first_token_seconds": statistics.median(firsts),
    }
    print(json.dumps(result))


def run(llm: LLM, jobs: list[dict], concurrency: int) -> tuple[list[float], int]:
    """Run all jobs, at most `concurrency` at once: times to first token and output tokens."""
    engine = llm.llm_engine
    waiting = list(enumerate(jobs))[::-1]
    began: dict[str, float] = {}
    firsts: dict[str, float] = {}
    tokens = running = 0
    while waiting or running:
        while waiting and running < concurrency:
            number, job = waiting.pop()
            params = SamplingParams(
                temperature=0.0, max_tokens=job["output"], ignore_eos=True, detokenize=False
            )
            name = str(number)
            began[name] = time.perf_counter()
            engine.add_request(name, {"prompt_token_ids": job["prompt_ids"]}, params)
            running += 1
        for output in engine.step():
            # Tokens come one by one: the first output of a request carries the first.
            firsts.setdefault(output.request_id, time.perf_counter() - began[output.request_id])
            if output.finished:
                running -= 1
                tokens += len(output.outputs[0].token_ids)
    return list(firsts.values()), tokens


if __name__ == "__main__":
    main()
