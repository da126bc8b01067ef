"""Requests that have tokens in common: samples, beams, a prefix, a conversation (figures 14 to 17).

Where the prefix cache is to find them, ids matter: a request owns a range of ids, counting upwards.
"""

from __future__ import annotations

import dataclasses
import math
import random

from workload import MAX_LENGTH, Dataset, Job, Quantiles, poisson_trace

FIRST_OWN_ID = 1_000_000
"""Ids below it belong to the prefix that all share."""
SENTENCE, TRANSLATION = 28.0, 42.0
"""Mean tokens of an English sentence and of its German translation (assumed, see below)."""
SENTENCE_SPREAD = 0.55
"""Standard deviation of the logarithm of a sentence's length."""
PROMPT_CUT = MAX_LENGTH // 2
"""A chat's prompt is the last so many tokens of its history; an answer has at most as many."""
HISTORY_CUT = 8192
"""Longer conversations are not in the data that the tables come from."""
THINK_S = 60.0
"""Mean seconds from an answer to the user's next message."""
READ_TOKEN_S = 0.05
"""Seconds that an answer's token takes to be written and read."""

# Llama's tokens in 5,678 conversations of ShareGPT, without those longer than 8,192 (quantiles of
# sharegpt_8k_filtered_stats_llama2_tokenizer.csv of github.com/microsoft/sarathi-serve, Apache-2.0,
# in which each line is a turn; a prompt that does not go on from the line before begins a new one).
TURNS = Quantiles((1, 1, 1, 1, 1, 2, 3, 4, 5, 6, 7, 9, 12, 15, 19, 23, 56))
FIRST_MESSAGE = Quantiles(
    (1, 7, 11, 16, 23, 32, 45, 64, 95, 115, 150, 262, 600, 1090, 1790, 2380, 7400)
)
NEXT_MESSAGE = Quantiles((1, 2, 3, 6, 10, 15, 20, 26, 36, 42, 51, 84, 230, 711, 1450, 2130, 7000))
ANSWER = Quantiles((2, 6, 44, 84, 181, 271, 346, 415, 493, 534, 581, 683, 834, 920, 975, 998, 1020))
NUM_TURNS = 5000
"""How many turns are drawn before they are shuffled."""
MEAN_TURNS = 5.0
"""Turns of a conversation drawn from the tables above, cut at HISTORY_CUT."""


def groups(
    dataset: Dataset, width: int, is_beam_search: bool, rate: float, duration_s: float
) -> list[Job]:
    """Requests for several samples, or beams, of one length each."""
    return [
        dataclasses.replace(job, width=width, is_beam_search=is_beam_search)
        for job in poisson_trace(dataset, rate, duration_s)
    ]


def translations(num_prefix: int, rate: float, duration_s: float, seed: int = 1) -> list[Job]:
    """Sentences to translate behind an instruction with examples, the same for all.

    The paper takes WMT16 English to German (section 6.4), which is not at hand: lengths are
    log-normal, with the usual length of its news sentences in Llama's tokens.
    """
    rng = random.Random(seed)
    half = SENTENCE_SPREAD**2 / 2
    jobs: list[Job] = []
    now = rng.expovariate(1.0) / rate
    while now < duration_s:
        words = math.exp(rng.gauss(-half, SENTENCE_SPREAD))
        num_own = max(1, round(SENTENCE * words))
        num_output = max(1, round(TRANSLATION * words * math.exp(rng.gauss(-0.02, 0.2))))
        begin = FIRST_OWN_ID + len(jobs) * MAX_LENGTH
        own = range(begin, begin + num_own + num_output)
        jobs.append(Job(now, num_prefix + num_own, num_output, own, num_prefix))
        now += rng.expovariate(1.0) / rate
    return jobs


def chat_turns(rate: float, duration_s: float, seed: int = 1) -> list[Job]:
    """Turns of chats, each drawn alone from all turns of all chats, as the paper does.

    Its prompt is the end of the whole history; no two of them belong together.
    """
    rng = random.Random(seed)
    turns: list[Job] = []
    while len(turns) < NUM_TURNS:
        turns += _chat(rng, 0.0, 0)
    rng.shuffle(turns)
    jobs: list[Job] = []
    now = rng.expovariate(1.0) / rate
    while now < duration_s:
        turn = turns[len(jobs) % NUM_TURNS]
        jobs.append(Job(now, turn.num_prompt, turn.num_output))
        now += rng.expovariate(1.0) / rate
    return jobs


def conversations(rate: float, duration_s: float, seed: int = 1) -> list[Job]:
    """Whole chats: turn follows turn, `rate` turns a second on average.

    The times are part of the trace: a slow system does not slow the users down.
    """
    rng = random.Random(seed)
    jobs: list[Job] = []
    now, count = -40 * THINK_S, 0  # Chats that began before the trace have turns in it, too.
    while (now := now + rng.expovariate(1.0) * MEAN_TURNS / rate) < duration_s:
        begin = FIRST_OWN_ID + count * 2 * HISTORY_CUT
        chat = _chat(random.Random(f"{seed} {count}"), now, begin)
        jobs += [job for job in chat if 0 <= job.arrival < duration_s]
        count += 1
    return sorted(jobs, key=lambda job: job.arrival)


def _chat(rng: random.Random, now: float, begin: int) -> list[Job]:
    """All turns of one conversation, whose ids start at `begin`."""
    turns: list[Job] = []
    num_tokens = 0
    for turn in range(TURNS.draw(rng)):
        num_tokens += (NEXT_MESSAGE if turn else FIRST_MESSAGE).draw(rng)
        num_output = ANSWER.draw(rng)
        if num_tokens + num_output > HISTORY_CUT:
            break
        num_prompt = min(num_tokens, PROMPT_CUT)
        at = begin + num_tokens
        turns.append(Job(now, num_prompt, num_output, range(at - num_prompt, at + num_output)))
        num_tokens += num_output
        now += num_output * READ_TOKEN_S + rng.expovariate(1 / THINK_S)
    return turns
