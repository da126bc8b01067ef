"""Worker: llama.cpp through llama-cpp-python's low-level interface, with continuous batching.

A step decodes one batch: the next token of every running sequence, filled up to the batch size with
prompt tokens of sequences that begin, as llama-server does. Tokens are sampled greedily by numpy.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import sys
import time

import llama_cpp
import numpy as np

BATCH = 512


class Sequence:
    """One request in flight."""

    def __init__(self, job: dict, slot: int) -> None:
        """Begin a job in a slot."""
        self.prompt, self.want, self.slot = job["prompt_ids"], job["output"], slot
        self.fed, self.out, self.last = 0, 0, -1
        self.began, self.first = time.perf_counter(), 0.0


def main() -> None:
    """Run the task on stdin."""
    task = json.load(sys.stdin)
    llama_cpp.llama_log_set(QUIET, None)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        task["model"].encode(), llama_cpp.llama_model_default_params()
    )
    if not model:
        raise SystemExit("llama.cpp cannot load this file")
    if "phases" in task:
        print(json.dumps(phases(model, task)))
        return
    concurrency = task["concurrency"]
    length = max(len(j["prompt_ids"]) + j["output"] for j in task["jobs"]) + 8
    context = make_context(model, task["threads"], concurrency, length)
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    run(context, vocab, task["jobs"][:1], 1)
    began = time.perf_counter()
    done = run(context, vocab, task["jobs"], concurrency)
    result = {
        "seconds": time.perf_counter() - began,
        "output_tokens": sum(s.out for s in done),
        "first_token_seconds": statistics.median(s.first - s.began for s in done),
    }
    print(json.dumps(result))


def make_context(model: object, threads: int, sequences: int, length: int) -> object:
    """A context for so many sequences of this length."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max = sequences * length, sequences
    params.n_batch = params.n_ubatch = BATCH
    params.n_threads = params.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise SystemExit("llama.cpp cannot make a context for this model")
    return context


def phases(model: object, task: dict) -> dict:
    """Tokens a second of a prompt alone, and of decoding so many sequences at once.

    Only llama_decode is timed: choosing tokens is not.
    """
    wanted = task["phases"]
    prompt, steps, most = wanted["prompt"], wanted["steps"], max(wanted["batches"])
    length = -(-(prompt + len(wanted["batches"]) * (steps + 1)) // 256) * 256
    context = make_context(model, task["threads"], most, length)
    memory = llama_cpp.llama_get_memory(context)
    batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def step(positions: list[tuple[int, int]], logits_from: int) -> float:
        """Decode tokens at (slot, position); the seconds it took."""
        for i, (slot, position) in enumerate(positions):
            batch.token[i], batch.pos[i] = 100 + 7 * i, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, slot
            batch.logits[i] = i >= logits_from
        batch.n_tokens = len(positions)
        began = time.perf_counter()
        if llama_cpp.llama_decode(context, batch) != 0:
            raise SystemExit("llama_decode failed")
        llama_cpp.llama_synchronize(context)
        return time.perf_counter() - began

    prefill = []
    for _ in range(4):
        llama_cpp.llama_memory_clear(memory, True)
        prefill.append(step([(0, p) for p in range(prompt)], prompt - 1))
    for slot in range(1, most):
        llama_cpp.llama_memory_seq_cp(memory, 0, slot, -1, -1)
    decode, position = {}, dict.fromkeys(range(most), prompt)
    for size in wanted["batches"]:
        times = []
        for _ in range(steps + 1):
            times.append(step([(slot, position[slot]) for slot in range(size)], 0))
            for slot in range(size):
                position[slot] += 1
        decode[size] = size / statistics.median(times[1:])
    return {"prefill": prompt / statistics.median(prefill[1:]), "decode": decode}


def run(context: object, vocab: int, jobs: list[dict], concurrency: int) -> list[Sequence]:
    """Run all jobs, at most `concurrency` at once; the finished sequences."""
    memory = llama_cpp.llama_get_memory(context)
    batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
    waiting, free = list(jobs)[::-1], list(range(concurrency))
    running: list[Sequence] = []
    done: list[Sequence] = []
    while waiting or running:
        while waiting and free:
            running.append(Sequence(waiting.pop(), free.pop()))
        sampled = fill(batch, running)
        if llama_cpp.llama_decode(context, batch) != 0:
            raise SystemExit("llama_decode failed")
        now = time.perf_counter()
        for row, sequence in sampled:
            pointer = llama_cpp.llama_get_logits_ith(context, row)
            logits = np.ctypeslib.as_array(
                ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (vocab,)
            )
            sequence.last = int(logits.argmax())
            sequence.out += 1
            sequence.first = sequence.first or now
        for sequence in [s for s in running if s.out >= s.want]:
            running.remove(sequence)
            done.append(sequence)
            free.append(sequence.slot)
            llama_cpp.llama_memory_seq_rm(memory, sequence.slot, -1, -1)
    llama_cpp.llama_batch_free(batch)
    return done


def fill(batch: object, running: list[Sequence]) -> list[tuple[int, Sequence]]:
    """Put the step's tokens into the batch; the rows whose logits are wanted."""
    count, wanted = 0, []

    def put(token: int, position: int, slot: int, is_wanted: bool) -> None:
        nonlocal count
        batch.token[count], batch.pos[count] = token, position
        batch.n_seq_id[count], batch.seq_id[count][0] = 1, slot
        batch.logits[count] = is_wanted
        count += 1

    for s in (s for s in running if s.out):
        wanted.append((count, s))
        put(s.last, len(s.prompt) + s.out - 1, s.slot, True)
    for s in (s for s in running if not s.out):
        take = min(BATCH - count, len(s.prompt) - s.fed)
        for token in s.prompt[s.fed : s.fed + take]:
            s.fed += 1
            is_last = s.fed == len(s.prompt)
            if is_last:
                wanted.append((count, s))
            put(token, s.fed - 1, s.slot, is_last)
    batch.n_tokens = count
    return wanted


@llama_cpp.llama_log_callback
def QUIET(level: int, text: bytes, data: object) -> None:  # noqa: N802
    """Drop the library's log."""


if __name__ == "__main__":
    main()
