"""Worker: Octavo's engine in this process, the loop of `octavo bench throughput`.

Phases are steps of its program alone, sampling included, as cpu/steps.py times them.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

from steps import batch, sampling

from octavo.cli.bench.throughput import closed_loop
from octavo.cli.bench.workload import Job
from octavo.config import EngineConfig, plan_memory
from octavo.engine.core import EngineCore
from octavo.runner import loading


def main() -> None:
    """Run the task on stdin."""
    task = json.load(sys.stdin)
    if "phases" in task:
        print(json.dumps(phases(task)))
        return
    config = EngineConfig(
        model=task["model"],
        served_name="octavo",
        memory_bytes=plan_memory(None),
        num_threads=task["threads"],
        use_prefix_cache=False,
    )
    core = EngineCore.load(config)
    jobs = [Job(job["prompt_ids"], job["output"]) for job in task["jobs"]]
    closed_loop(core, jobs[:2], 2)
    began = time.perf_counter()
    timings = closed_loop(core, jobs, task["concurrency"])
    seconds = time.perf_counter() - began
    core.close()
    result = {
        "seconds": seconds,
        "output_tokens": sum(len(t.token_times_s) for t in timings),
        "first_token_seconds": statistics.median(t.token_times_s[0] for t in timings),
    }
    print(json.dumps(result))


def phases(task: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second of a prompt alone, and of decoding so many sequences at once."""
    wanted = task["phases"]
    prompt, block_size = wanted["prompt"], 16
    width = (prompt + 1) // block_size + 1
    config = EngineConfig(
        model=task["model"],
        served_name="octavo",
        memory_bytes=plan_memory(None),
        num_threads=task["threads"],
        max_num_seqs=max(wanted["batches"]),
        max_num_batched_tokens=prompt,
        max_model_len=width * block_size,
        block_size=block_size,
    )
    program = loading.load(config, lambda phase, fraction: None).program

    def rate(starts: list[int], counts: list[int], repetitions: int) -> float:
        step, rows = batch(starts, counts, block_size, width), sampling(len(starts), 0, 1)
        times = []
        for _ in range(repetitions + 1):
            began = time.perf_counter()
            program.run(step, rows)
            times.append(time.perf_counter() - began)
        return sum(counts) / statistics.median(times[1:])

    result = {
        "prefill": rate([0], [prompt], 3),
        "decode": {n: rate([prompt] * n, [1] * n, wanted["steps"]) for n in wanted["batches"]},
    }
    program.close()
    return result


if __name__ == "__main__":
    main()
