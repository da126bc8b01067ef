"""Worker: Octavo's engine in this process, the loop of `octavo bench throughput`."""

from __future__ import annotations

import json
import statistics
import sys
import time

from octavo.cli.bench.throughput import closed_loop
from octavo.cli.bench.workload import Job
from octavo.config import EngineConfig, plan_memory
from octavo.engine.core import EngineCore


def main() -> None:
    """Run the task on stdin."""
    task = json.load(sys.stdin)
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


if __name__ == "__main__":
    main()
