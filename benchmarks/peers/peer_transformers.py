"""Worker: transformers in fp32 (faster than bf16 without AMX), static batches, padded left."""

from __future__ import annotations

import json
import pathlib
import statistics
import sys
import time

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer


class FirstToken(BaseStreamer):
    """Remembers when the first token came."""

    def __init__(self) -> None:
        """Count the calls: the first one carries the prompt."""
        self.calls, self.time = 0, 0.0

    def put(self, value: object) -> None:
        """Take one step's tokens."""
        self.calls += 1
        if self.calls == 2:
            self.time = time.perf_counter()

    def end(self) -> None:
        """Nothing to flush."""


def main() -> None:
    """Run the task on stdin."""
    task = json.load(sys.stdin)
    torch.set_num_threads(task["threads"])
    path = pathlib.Path(task["model"])
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    began, firsts, tokens = time.perf_counter(), [], 0
    jobs, size = task["jobs"], task["concurrency"]
    for start in range(0, len(jobs), size):
        batch = jobs[start : start + size]
        tokens += sum(job["output"] for job in batch)
        firsts += generate(model, batch)
    result = {
        "seconds": time.perf_counter() - began,
        "output_tokens": tokens,
        "first_token_seconds": statistics.median(firsts),
    }
    print(json.dumps(result))


def generate(model: torch.nn.Module, batch: list[dict]) -> list[float]:
    """One static batch, to its longest output; the times to first token."""
    width = max(len(job["prompt_ids"]) for job in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, job in enumerate(batch):
        ids[row, width - len(job["prompt_ids"]) :] = torch.tensor(job["prompt_ids"])
        mask[row, width - len(job["prompt_ids"]) :] = 1
    longest = max(job["output"] for job in batch)
    began = time.perf_counter()
    streamer = FirstToken() if len(batch) == 1 else None
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=longest,
            min_new_tokens=longest,
            do_sample=False,
            pad_token_id=0,
            streamer=streamer,
        )
    waited = (streamer.time if streamer else time.perf_counter()) - began
    return [waited] * len(batch)


if __name__ == "__main__":
    main()
