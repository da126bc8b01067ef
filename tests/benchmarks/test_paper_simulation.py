from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import mean

import pytest
import sharing
import simulate
import workload
from beams import next_tokens
from cost import A100_40GB, OPT_13B, OPT_66B, PYTHON, Model, StepCost
from simulate import Simulation, System
from sweep import rate_at, sweep
from workload import Job

from octavo.types import SchedulerOutput, TokenUpdate

SYSTEMS = [
    simulate.OCTAVO,
    simulate.OCTAVO_CACHED,
    simulate.ORCA_ORACLE,
    simulate.ORCA_POW2,
    simulate.ORCA_MAX,
    simulate.ORCA_CHAT,
    simulate.FASTER_TRANSFORMER,
]
SMALL = dataclasses.replace(OPT_13B, num_slots=5000)
"""So small that Octavo preempts and the others wait."""


def traces() -> dict[str, list[Job]]:
    datasets = workload.synthetic()
    return {
        "independent": workload.poisson_trace(datasets["ShareGPT"], 4.0, 10.0),
        "prefix": sharing.translations(80, 8.0, 10.0),
        "chats": sharing.conversations(1.0, 60.0)[:25],
    }


@pytest.mark.parametrize("kind", ["independent", "prefix", "chats"])
@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_every_request_ends_with_its_tokens_in_the_pools_slots(system: System, kind: str) -> None:
    jobs = traces()[kind]
    simulation = Simulation(system, SMALL, jobs)
    tokens: dict[str, list[int]] = defaultdict(list)
    num_ended: Counter[str] = Counter()

    def observe(plan: SchedulerOutput, updates: Sequence[TokenUpdate]) -> None:
        for update in updates:
            at = update.request_id.partition(".")[0]
            tokens[at] += update.token_ids
            num_ended[at] += update.finish_reason == "length"
        cache = simulation.cache
        num_taken = cache.num_referenced_blocks * cache.block_size
        assert 0 <= num_taken <= SMALL.num_slots
        simulation.scheduler.check_invariants()

    result = simulation.run(observe=observe)
    for at, job in enumerate(jobs):
        answer = [simulate.TOKEN] * job.num_output
        if job.tokens is not None:
            answer = [*job.tokens[job.num_prompt - job.shared :]]
        assert tokens[str(at)] == answer
        assert num_ended[str(at)] == 1
    assert len(tokens) == len(jobs) and result.is_complete
    assert simulation.cache.num_referenced_blocks == 0
    if not system.use_prefix_cache:
        assert 0 < result.memory.held <= result.memory.taken


@pytest.mark.parametrize("is_beam_search", [False, True])
def test_sequences_of_one_request_share_its_prompts_blocks(is_beam_search: bool) -> None:
    dataset = workload.synthetic()["ShareGPT"]
    jobs = sharing.groups(dataset, 3, is_beam_search, rate=1.0, duration_s=20.0)
    simulation = Simulation(simulate.OCTAVO, OPT_13B, jobs)
    num_ended: Counter[str] = Counter()

    def observe(plan: SchedulerOutput, updates: Sequence[TokenUpdate]) -> None:
        for update in updates:
            num_ended[update.request_id] += update.finish_reason == "length"
        simulation.scheduler.check_invariants()

    result = simulation.run(observe=observe)
    assert num_ended == {str(at): 3 for at in range(len(jobs))}
    assert result.num_copies > 0 and simulation.cache.num_referenced_blocks == 0
    saved = 1 - result.memory.taken / result.memory.unshared
    assert saved > (0.45 if is_beam_search else 0.1)
    apart = simulate.simulate(simulate.ORCA_ORACLE, OPT_13B, jobs)
    assert apart.normalized_latency > result.normalized_latency and apart.num_copies == 0


def test_the_chance_of_candidates_falls_with_their_rank() -> None:
    rng = random.Random(1)
    drawn = [next_tokens(rng, place, 8) for place in range(500)]
    for candidates in drawn:
        logprobs = [logprob for _, logprob in candidates.top]
        assert logprobs == sorted(logprobs, reverse=True) and len(logprobs) == 8
        assert candidates.logprob == logprobs[0] and sum(map(math.exp, logprobs)) < 1
    assert mean(math.exp(c.logprob) for c in drawn) == pytest.approx(0.67, abs=0.05)


def test_paging_under_pressure_preempts_and_reservation_never_does() -> None:
    jobs = traces()["independent"]
    assert simulate.simulate(simulate.OCTAVO, SMALL, jobs).num_preemptions > 0
    assert simulate.simulate(simulate.ORCA_ORACLE, SMALL, jobs).num_preemptions == 0


def test_the_latency_of_a_request_alone_is_the_sum_of_its_steps() -> None:
    job = Job(arrival=3.0, num_prompt=100, num_output=3)
    cost = StepCost(OPT_13B, kernel=1.0, overhead=PYTHON)
    pairs = [100 * 100 / 2, (100 + 101) / 2, (101 + 102) / 2]
    lengths = [(100, 100), (1, 101), (1, 102)]
    seconds = [
        cost.seconds(1, new, context, at) for (new, context), at in zip(lengths, pairs, strict=True)
    ]
    result = simulate.simulate(simulate.ORCA_MAX, OPT_13B, [job])
    assert math.isclose(result.normalized_latency, sum(seconds) / 3)
    assert result.num_steps == 3


def test_a_static_batch_answers_when_its_last_one_ends() -> None:
    jobs = [Job(0.0, 10, 2), Job(0.0, 10, 50)]
    result = simulate.simulate(simulate.FASTER_TRANSFORMER, OPT_13B, jobs)
    alone = simulate.simulate(simulate.FASTER_TRANSFORMER, OPT_13B, jobs[1:])
    total = alone.normalized_latency * 50
    assert result.normalized_latency > (total / 2 + total / 50) / 2


def test_the_prefix_cache_serves_a_shared_prefix_and_a_chats_history() -> None:
    jobs = sharing.translations(341, 4.0, 10.0)
    result = simulate.simulate(simulate.OCTAVO_CACHED, OPT_13B, jobs)
    served = (len(jobs) - 1) * (341 // 16) * 16
    assert result.hit_rate == pytest.approx(served / sum(job.num_prompt for job in jobs), rel=0.05)
    first = Job(0.0, 40, 24, range(10_000, 10_064))
    second = Job(50.0, 80, 4, range(10_000, 10_084))
    hit_rate = simulate.simulate(simulate.OCTAVO_CACHED, OPT_13B, [first, second]).hit_rate
    assert hit_rate == 48 / (40 + 80), "63 computed tokens are three full blocks"


def test_a_step_costs_what_the_formula_says() -> None:
    model = Model("tiny", 1e9, 10, 1000, A100_40GB, 1, 1000)
    cost = StepCost(model, kernel=2.0, overhead=PYTHON)
    read, arithmetic = 1.555e12 * 0.8, 312e12 * 0.55
    weights, context = 2e9 / read, 2.0 * 40_000 * 300 / read
    expected = weights + context + 40_000 * 20 / arithmetic + PYTHON.fixed_s + 3 * PYTHON.sequence_s
    assert math.isclose(cost.seconds(3, 4, 300, 20), expected)
    products = 2e9 * 5000 / arithmetic
    assert math.isclose(cost.seconds(3, 5000, 300, 20) - expected, products - weights)
    one, four = (StepCost(m, 1.0, PYTHON).seconds(1, 100, 0, 0) for m in (OPT_13B, OPT_66B))
    assert four > one, "more GPUs sum over their link"


def test_lengths_have_the_papers_means_at_every_rate() -> None:
    for name, dataset in workload.synthetic().items():
        jobs = workload.poisson_trace(dataset, 10.0, 1000.0)
        means = mean(j.num_prompt for j in jobs), mean(j.num_output for j in jobs)
        assert means == pytest.approx(workload.MEANS[name], rel=0.03)
        faster = workload.poisson_trace(dataset, 20.0, 100.0)
        assert [(j.num_prompt, j.num_output) for j in jobs[:500]] == [
            (j.num_prompt, j.num_output) for j in faster[:500]
        ]
        assert faster[100].arrival == pytest.approx(jobs[100].arrival / 2)
    jobs = sharing.conversations(2.0, 2000.0)
    assert len(jobs) / 2000 == pytest.approx(2.0, rel=0.1)
    assert max(j.num_prompt for j in jobs) == sharing.PROMPT_CUT


def test_curves_bracket_the_latency_and_rates_are_read_off_them() -> None:
    points = sweep(
        simulate.ORCA_MAX,
        OPT_13B,
        lambda rate: workload.poisson_trace(workload.synthetic()["ShareGPT"], rate, 60.0),
        first_rate=0.3,
        latencies=(0.2,),
        precision=1.2,
    )
    rate = rate_at(points, 0.2)
    below = max(at for at, latency in points if latency <= 0.2)
    above = min(at for at, latency in points if latency > 0.2)
    assert below <= rate <= above <= 1.2 * below
    assert rate_at([(1.0, 0.1), (4.0, 0.4)], 0.2) == pytest.approx(2.0)
    assert rate_at([(1.0, 0.3), (4.0, 0.4)], 0.2) == 1.0
