"""Worker: OpenVINO GenAI's continuous batching pipeline, which reads GGUF files itself."""

from __future__ import annotations

import json
import statistics
import sys
import time

import numpy as np
import openvino as ov
import openvino_genai as genai


def main() -> None:
    """Run the task on stdin."""
    task = json.load(sys.stdin)
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 4
    scheduler.max_num_seqs = max(task["concurrency"], 2)
    scheduler.enable_prefix_caching = False
    pipeline = genai.ContinuousBatchingPipeline(
        task["model"], scheduler, "CPU", {"INFERENCE_NUM_THREADS": task["threads"]}
    )
    run(pipeline, task["jobs"][:1], 1)
    began = time.perf_counter()
    firsts, tokens = run(pipeline, task["jobs"], task["concurrency"])
    result = {
        "seconds": time.perf_counter() - began,
        "output_tokens": tokens,
        "first_token_seconds": statistics.median(firsts),
    }
    print(json.dumps(result))


def run(
    pipeline: genai.ContinuousBatchingPipeline, jobs: list[dict], concurrency: int
) -> tuple[list[float], int]:
    """Run all jobs, at most `concurrency` at once: times to first token and output tokens."""
    waiting = list(enumerate(jobs))[::-1]
    running: dict[int, tuple[genai.GenerationHandle, float]] = {}
    firsts: dict[int, float] = {}
    tokens = 0
    while waiting or running:
        while waiting and len(running) < concurrency:
            number, job = waiting.pop()
            config = genai.GenerationConfig(
                max_new_tokens=job["output"], ignore_eos=True, do_sample=False
            )
            ids = ov.Tensor(np.array([job["prompt_ids"]], np.int64))
            handle = pipeline.add_request(number, ids, config)
            running[number] = (handle, time.perf_counter())
        pipeline.step()
        now = time.perf_counter()
        for number, (handle, began) in list(running.items()):
            while handle.can_read():
                tokens += sum(len(o.generated_ids) for o in handle.read().values())
                firsts.setdefault(number, now - began)
            if handle.get_status() != genai.GenerationStatus.RUNNING:
                del running[number]
    return list(firsts.values()), tokens


if __name__ == "__main__":
    main()
