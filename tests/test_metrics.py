"""B85: names of metrics are a contract: a change is a break for every board that reads them."""

from __future__ import annotations

import re

import pytest

from octavo.metrics import METRICS, Metrics
from octavo.types import BlockUse, CacheStats, Capacity, EngineStats, KVPool, LowerStats, TierStats

NAMES = {
    "octavo_build_info": "",
    "octavo_e2e_request_latency_seconds": "vllm:e2e_request_latency_seconds",
    "octavo_engine_step_seconds_total": "",
    "octavo_engine_steps_total": "",
    "octavo_generation_tokens_total": "vllm:generation_tokens_total",
    "octavo_http_refused_total": "",
    "octavo_http_requests_total": "",
    "octavo_inter_token_latency_seconds": "vllm:inter_token_latency_seconds",
    "octavo_kv_cache_blocks": "",
    "octavo_kv_cache_tokens": "",
    "octavo_kv_cache_empty_slots": "",
    "octavo_kv_cache_blocks_shared": "",
    "octavo_kv_cache_blocks_saved": "",
    "octavo_kv_cache_block_copies_total": "",
    "octavo_kv_cache_blocks_cached": "",
    "octavo_kv_cache_blocks_pinned": "",
    "octavo_kv_cache_blocks_used": "",
    "octavo_kv_cache_bytes": "",
    "octavo_kv_cache_usage_ratio": "vllm:kv_cache_usage_perc",
    "octavo_kv_host_blocks": "",
    "octavo_kv_host_bytes": "",
    "octavo_kv_host_drops_total": "",
    "octavo_kv_host_hits_total": "",
    "octavo_kv_host_writes_total": "",
    "octavo_kv_disk_blocks": "",
    "octavo_kv_disk_bytes": "",
    "octavo_kv_disk_corrupt_total": "",
    "octavo_kv_disk_drops_total": "",
    "octavo_kv_disk_hits_total": "",
    "octavo_kv_disk_writes_total": "",
    "octavo_preemptions_total": "vllm:num_preemptions_total",
    "octavo_prefix_cache_hits_total": "vllm:prefix_cache_hits_total",
    "octavo_prefix_cache_queries_total": "vllm:prefix_cache_queries_total",
    "octavo_prompt_tokens_total": "vllm:prompt_tokens_total",
    "octavo_ready": "",
    "octavo_request_generation_tokens": "vllm:request_generation_tokens",
    "octavo_request_prompt_tokens": "vllm:request_prompt_tokens",
    "octavo_requests_cancelled_total": "",
    "octavo_requests_running": "vllm:num_requests_running",
    "octavo_requests_waiting": "vllm:num_requests_waiting",
    "octavo_sequences_finished_total": "vllm:request_success_total",
    "octavo_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "octavo_weights_bytes": "",
}
SAMPLE = re.compile(
    r"(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)\{(?P<labels>(?:[a-z_]+=\"(?:[^\"\\\n]|\\.)*\",?)*)\}"
    r" (?P<value>[0-9.e+-]+)"
)


@pytest.fixture
def capacity() -> Capacity:
    return Capacity(
        model="m",
        architecture="a",
        num_parameters=1,
        max_model_len=64,
        kv_pool=KVPool(num_blocks=8, block_size=16, num_bytes=1234567),
        weights_bytes=42,
        vocab_size=10,
        backend="cpu",
    )


def samples(text: str) -> dict[str, float]:
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            match = SAMPLE.fullmatch(line)
            assert match, line
            assert line not in found
            found[line.rpartition(" ")[0]] = float(match["value"])
    return found


def test_names_are_frozen() -> None:
    assert {metric.name: metric.alias for metric in METRICS} == NAMES


def test_every_metric_is_rendered_with_its_kind(capacity: Capacity) -> None:
    metrics = Metrics("a model", "1.2")
    metrics.count("octavo_http_requests_total", "/v1/completions", "200")
    metrics.count("octavo_http_refused_total", "431")
    text = metrics.render(EngineStats(), capacity, is_ready=True)
    assert text.endswith("\n")
    values = samples(text)
    for metric in METRICS:
        for name in filter(None, (metric.name, metric.alias)):
            assert f"# TYPE {name} {metric.kind}\n" in text
            assert f"# HELP {name} {metric.help}\n" in text
            assert any(re.match(name + r"(_bucket|_count|_sum)?\{", key) for key in values), name
        assert metric.name.endswith("_total") == (metric.kind == "counter")


def test_values_of_the_engine(capacity: Capacity) -> None:
    stats = EngineStats(
        num_running=3,
        num_waiting=2,
        cache=CacheStats(
            num_blocks=8,
            num_blocks_used=2,
            num_blocks_cached=1,
            use=BlockUse(
                num_tokens=40,
                num_empty_slots=8,
                num_shared_blocks=2,
                num_saved_blocks=3,
                num_copies=7,
            ),
            num_blocks_pinned=3,
            num_queries=90,
            num_hits=32,
            lower=LowerStats(
                host=TierStats(
                    num_bytes=19, num_blocks=14, num_hits=13, num_writes=15, num_drops=11
                ),
                disk=TierStats(
                    num_bytes=9, num_blocks=4, num_hits=3, num_writes=5, num_drops=1, num_corrupt=6
                ),
            ),
        ),
        num_preemptions=7,
        prompt_tokens=100,
        generation_tokens=50,
        num_steps=11,
        step_time_s=0.25,
    )
    values = samples(Metrics("m").render(stats, capacity, is_ready=True))
    expected = {
        "octavo_requests_running": 3,
        "vllm:num_requests_running": 3,
        "octavo_requests_waiting": 2,
        "octavo_kv_cache_bytes": 1234567,
        "octavo_weights_bytes": 42,
        "octavo_kv_cache_blocks": 8,
        "octavo_kv_cache_blocks_used": 2,
        "octavo_kv_cache_blocks_cached": 1,
        "octavo_kv_cache_tokens": 40,
        "octavo_kv_cache_empty_slots": 8,
        "octavo_kv_cache_blocks_shared": 2,
        "octavo_kv_cache_blocks_saved": 3,
        "octavo_kv_cache_block_copies_total": 7,
        "octavo_kv_cache_blocks_pinned": 3,
        "vllm:kv_cache_usage_perc": 0.25,
        "octavo_preemptions_total": 7,
        "octavo_prompt_tokens_total": 100,
        "vllm:generation_tokens_total": 50,
        "octavo_prefix_cache_queries_total": 90,
        "octavo_prefix_cache_hits_total": 32,
        "octavo_kv_host_bytes": 19,
        "octavo_kv_host_blocks": 14,
        "octavo_kv_host_hits_total": 13,
        "octavo_kv_host_writes_total": 15,
        "octavo_kv_host_drops_total": 11,
        "octavo_kv_disk_bytes": 9,
        "octavo_kv_disk_blocks": 4,
        "octavo_kv_disk_hits_total": 3,
        "octavo_kv_disk_writes_total": 5,
        "octavo_kv_disk_drops_total": 1,
        "octavo_kv_disk_corrupt_total": 6,
        "octavo_engine_steps_total": 11,
        "octavo_engine_step_seconds_total": 0.25,
        "octavo_ready": 1,
    }
    assert {name: values[f'{name}{{model_name="m"}}'] for name in expected} == expected
    loading = samples(Metrics("m").render(EngineStats(), None, is_ready=False))
    assert loading['octavo_kv_cache_bytes{model_name="m"}'] == 0
    assert loading['octavo_ready{model_name="m"}'] == 0


def test_histograms_are_cumulative() -> None:
    metrics = Metrics("m")
    for value in (0.0005, 0.02, 0.025, 1000.0):
        metrics.time_to_first_token.observe(value)
    metrics.inter_token_latency.observe(0.5, times=3)
    values = samples(metrics.render(EngineStats(), None, is_ready=True))
    name = "octavo_time_to_first_token_seconds"
    assert values[f'{name}_bucket{{model_name="m",le="0.001"}}'] == 1
    assert values[f'{name}_bucket{{model_name="m",le="0.025"}}'] == 3
    assert values[f'{name}_bucket{{model_name="m",le="300"}}'] == 3
    assert values[f'{name}_bucket{{model_name="m",le="+Inf"}}'] == 4
    assert values[f'{name}_count{{model_name="m"}}'] == 4
    assert values[f'{name}_sum{{model_name="m"}}'] == pytest.approx(1000.0455)
    name = "vllm:inter_token_latency_seconds"
    assert values[f'{name}_count{{model_name="m"}}'] == 3
    assert values[f'{name}_sum{{model_name="m"}}'] == 1.5


def test_odd_names_are_escaped() -> None:
    text = Metrics('a "quoted"\\ \nname').render(EngineStats(), None, is_ready=True)
    assert r'model_name="a \"quoted\"\\ \nname"' in text
    samples(text)


def test_an_unknown_counter_is_a_bug() -> None:
    with pytest.raises(KeyError):
        Metrics("m").count("octavo_nothing_total")
