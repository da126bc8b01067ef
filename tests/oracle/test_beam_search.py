"""Beam search through scheduler, runner and reference backend against transformers' own."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from octavo.config import EngineConfig
from octavo.runner.runner import Runner
from octavo.scheduler.scheduler import Scheduler
from octavo.types import Capacity, EngineRequest, KVPool, SamplingParams
from tests.oracle.test_tiny_models import BACKENDS, SIZES, make_oracle

MAX_LEN = 256
NUM_ROWS = 12
EOS = 1
PROMPTS = {"short": [7, 3, 9, 4, 4, 2], "even": [11] * 32, "long": list(range(30, 83)), "one": [5]}
SETTINGS: list[dict[str, Any]] = [
    {"n": 1, "best_of": 4, "max_tokens": 20},
    {"n": 4, "max_tokens": 12, "length_penalty": 0.0},
    {"n": 2, "best_of": 3, "max_tokens": 20, "early_stopping": True},
    {"n": 6, "max_tokens": 20, "early_stopping": "never", "length_penalty": 2.0},
    {"n": 5, "max_tokens": 20, "length_penalty": -1.0, "stop_token_ids": (40, 41, 42, 100, 7)},
]


@pytest.fixture(scope="module")
def oracle() -> Any:
    """A model that often ends a text: else the rules of stopping would not matter."""
    model = make_oracle("llama-grouped")
    with torch.no_grad():
        model.lm_head.weight[EOS] = model.lm_head.weight.abs().mean(dim=0)
        model.model.norm.weight *= 2.0
    return model


@pytest.fixture(scope="module")
def program(oracle: Any, quality: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("beams")
    oracle.save_pretrained(folder)
    stream = quality.Stream.compile(
        "reference",
        *quality.load(folder),
        max_len=MAX_LEN,
        num_sequences=NUM_ROWS,
        **BACKENDS["reference"],
    )
    return stream.program


def search(
    program: Any, block_size: int, requests: list[EngineRequest]
) -> dict[str, list[tuple[int, ...]]]:
    """Every request's beams, all requests at once."""
    config = EngineConfig(
        model="tiny",
        served_name="tiny",
        memory_bytes=1,
        num_threads=1,
        block_size=block_size,
        max_num_seqs=NUM_ROWS,
        max_num_batched_tokens=64,
    )
    capacity = Capacity(
        model="tiny",
        architecture="llama",
        num_parameters=0,
        max_model_len=MAX_LEN,
        kv_pool=KVPool(num_blocks=MAX_LEN // block_size, block_size=block_size, num_bytes=0),
        weights_bytes=0,
        vocab_size=SIZES["vocab_size"],
        backend="reference",
    )
    scheduler = Scheduler(config, capacity, frozenset({EOS}))
    runner = Runner(
        program,
        num_rows=NUM_ROWS,
        max_model_len=MAX_LEN,
        block_size=block_size,
        eos_token_ids=[EOS],
    )
    for request in requests:
        scheduler.add(request, 0.0)
    found: dict[str, list[tuple[int, ...]]] = {request.request_id: [] for request in requests}
    while scheduler.has_work():
        for update in scheduler.update(runner.step(scheduler.schedule(0.0))):
            found[update.request_id].append(update.token_ids)
    assert scheduler.stats().cache.num_blocks_used == 0
    return found


def expected_beams(oracle: Any, prompt: list[int], settings: dict[str, Any]) -> list[list[int]]:
    found = oracle.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        num_beams=settings.get("best_of", settings["n"]),
        num_return_sequences=settings["n"],
        max_new_tokens=settings["max_tokens"],
        length_penalty=settings.get("length_penalty", 1.0),
        early_stopping=settings.get("early_stopping", False),
        eos_token_id=[EOS, *settings.get("stop_token_ids", ())],
        pad_token_id=0,
    )
    enders = {EOS, *settings.get("stop_token_ids", ())}
    beams = []
    for row in found[:, len(prompt) :].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in enders), len(row))
        beams.append(row[:end])
    return beams


@pytest.mark.parametrize("name", PROMPTS)
def test_beams_are_those_of_transformers(
    name: str, oracle: Any, program: Any, quality: ModuleType
) -> None:
    requests = [
        EngineRequest(
            request_id=str(number),
            prompt_ids=PROMPTS[name],
            params=SamplingParams(use_beam_search=True, temperature=0.0, seed=0, **settings),
        )
        for number, settings in enumerate(SETTINGS)
    ]
    found = search(program, quality.BLOCK_SIZE, requests)
    lengths = set()
    for request, settings in zip(requests, SETTINGS, strict=True):
        expected = expected_beams(oracle, PROMPTS[name], settings)
        assert [list(beam) for beam in found[request.request_id]] == expected, settings
        lengths |= {len(beam) for beam in expected}
    assert len(lengths) > 2, "beams end at different lengths"
