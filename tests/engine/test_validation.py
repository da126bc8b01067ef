"""Every field of a request at its limits, one past them, and with what is no number."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.engine.validation import complete_request, validate_params
from octavo.errors import ContextLengthError, InvalidRequestError
from octavo.types import Capacity, KVPool, SamplingParams

VOCAB = 1000
CAPACITY = Capacity(
    model="m", architecture="A", num_parameters=1, max_model_len=64,
    kv_pool=KVPool(num_blocks=8, block_size=16, num_bytes=1),
    weights_bytes=1, vocab_size=VOCAB, backend="cpu",
)  # fmt: skip

GOOD: list[tuple[str, list[Any]]] = [
    ("n", [1, 128]),
    ("best_of", [None, 1, 128]),
    ("use_beam_search", [True, False]),
    ("length_penalty", [1, 1.0]),
    ("early_stopping", [False]),
    ("temperature", [0, 0.0, 1, 100]),
    ("top_k", [-1, 0, 1, 2**31 - 1]),
    ("top_p", [1e-9, 0.5, 1]),
    ("min_p", [0, 1]),
    ("seed", [None, 0, -1, -(2**63), 2**64 - 1]),
    ("repetition_penalty", [0.01, 1, 100]),
    ("presence_penalty", [-2, 0, 2.0]),
    ("frequency_penalty", [-2, 0, 2.0]),
    ("stop", [(), ("x",) * 16, ("x" * 1024,), ("é" * 512,)]),
    ("stop_token_ids", [(), (0, VOCAB - 1), (1,) * 256]),
    ("min_tokens", [0, 16]),
    ("max_tokens", [None, 1, 2**31 - 1]),
    ("logprobs", [None, 0, 20]),
    ("logit_bias", [{}, {0: -100.0, VOCAB - 1: 100}]),
    ("ignore_eos", [True, False]),
    ("skip_special_tokens", [True, False]),
    ("include_stop_str_in_output", [True, False]),
]
NO_NUMBERS: list[Any] = [float("nan"), float("inf"), -float("inf"), "1", True, [], 1e308, 2**65]
BAD: list[tuple[str, list[Any]]] = [
    ("n", [0, -1, 129, 1.0, None, *NO_NUMBERS]),
    ("best_of", [0, -1, 129, 1.0, *NO_NUMBERS]),
    ("use_beam_search", [None, 0, "no"]),
    ("length_penalty", [0.5, -10.1, 10.1, None, *NO_NUMBERS]),
    ("early_stopping", [True, "never", "always", 0, None]),
    ("temperature", [-0.01, 100.1, None, *NO_NUMBERS]),
    ("top_k", [-2, 0.5, 2**31, None, *NO_NUMBERS]),
    ("top_p", [0, -0.1, 1.01, None, *NO_NUMBERS]),
    ("min_p", [-0.1, 1.01, None, *NO_NUMBERS]),
    ("seed", [0.5, 2**64, -(2**63) - 1, *NO_NUMBERS]),
    ("repetition_penalty", [0, -1, 101, None, *NO_NUMBERS]),
    ("presence_penalty", [-2.01, 2.01, None, *NO_NUMBERS]),
    ("frequency_penalty", [-2.01, 2.01, None, *NO_NUMBERS]),
    ("stop", ["text", ("",), ("x",) * 17, ("x" * 1025,), ("é" * 513,), (5,)]),
    ("stop_token_ids", [(-1,), (VOCAB,), (2**40,), (1,) * 257, ("1",), (True,), (1.5,)]),
    ("min_tokens", [-1, 17, 0.5, None, *NO_NUMBERS]),
    ("max_tokens", [0, -1, 2**31, 0.5, *NO_NUMBERS]),
    ("logprobs", [-1, 21, 0.5, *NO_NUMBERS]),
    ("logit_bias", [{-1: 0.0}, {VOCAB: 0.0}, {0: 101.0}, {0: float("nan")}, {0: "1"}, {0: None}]),
    ("ignore_eos", [None, 0, "no"]),
    ("skip_special_tokens", [None, 1]),
    ("include_stop_str_in_output", [None, 1]),
]


def cases(table: list[tuple[str, list[Any]]]) -> list[tuple[str, Any]]:
    return [(name, value) for name, values in table for value in values]


def test_the_tables_have_every_field() -> None:
    fields = set(SamplingParams.__struct_fields__)
    assert {name for name, _ in GOOD} == {name for name, _ in BAD} == fields


@pytest.mark.parametrize(("name", "value"), cases(GOOD))
def test_good_values_pass(name: str, value: Any) -> None:
    params = SamplingParams(**{name: value})
    assert validate_params(params, VOCAB) is params
    assert validate_params(params) is params


@pytest.mark.parametrize(("name", "value"), cases(BAD))
def test_bad_values_are_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        validate_params(SamplingParams(**{name: value}), VOCAB)
    assert caught.value.param == name
    assert name.split("_")[0] in caught.value.message
    assert caught.value.status == 400


def test_a_beam_search_takes_its_own_fields_and_none_of_sampling() -> None:
    search = {"use_beam_search": True, "n": 2, "best_of": 16, "temperature": 0}
    for name, value in [
        ("length_penalty", -10),
        ("early_stopping", "never"),
        ("stop_token_ids", (5,)),
    ]:
        validate_params(SamplingParams(**search, **{name: value}), VOCAB)
    for name, value in [
        ("temperature", 0.5),
        ("top_k", 3),
        ("top_p", 0.9),
        ("min_p", 0.1),
        ("repetition_penalty", 1.1),
        ("presence_penalty", 1),
        ("frequency_penalty", 1),
        ("logit_bias", {3: 1.0}),
        ("stop", ("x",)),
        ("min_tokens", 1),
        ("best_of", 17),
        ("best_of", 1),
    ]:
        with pytest.raises(InvalidRequestError) as caught:
            validate_params(SamplingParams(**search | {name: value}), VOCAB)
        assert caught.value.param == name


JSON = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)


@given(st.sampled_from(SamplingParams.__struct_fields__), JSON)
def test_any_value_passes_or_is_refused(name: str, value: Any) -> None:
    params = SamplingParams(**{name: value})
    try:
        validate_params(params, VOCAB)
    except InvalidRequestError as error:
        assert error.param == name
    else:
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


def test_a_request_is_completed() -> None:
    request = complete_request("a", [1, 2, 3], SamplingParams(max_tokens=None), CAPACITY)
    assert request.params.max_tokens == 61
    assert request.params.seed is not None
    other = complete_request("b", [1, 2, 3], SamplingParams(seed=-1), CAPACITY, priority=4)
    assert other.params.seed == 2**64 - 1
    assert other.params.max_tokens == 16
    assert other.priority == 4
    seeds = {complete_request("c", [1], SamplingParams(), CAPACITY).params.seed for _ in range(20)}
    assert len(seeds) == 20


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "param"),
    [(63, 1, None), (64, 1, "prompt"), (65, None, "prompt"), (60, 5, "max_tokens"), (60, 4, None)],
)
def test_the_context_length_is_a_limit_with_its_numbers(
    num_prompt: int, max_tokens: int | None, param: str | None
) -> None:
    params = SamplingParams(max_tokens=max_tokens)
    if param is None:
        assert complete_request("a", [1] * num_prompt, params, CAPACITY).params.max_tokens
        return
    with pytest.raises(ContextLengthError) as caught:
        complete_request("a", [1] * num_prompt, params, CAPACITY)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == param
    assert "64" in caught.value.message
    assert str(num_prompt) in caught.value.message


@pytest.mark.parametrize("ids", [[], [-1], [VOCAB], [2**40], ["a"], [True], [1.0]])
def test_a_prompt_of_no_tokens_of_the_model_is_refused(ids: list[Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        complete_request("a", ids, SamplingParams(), CAPACITY)
    assert caught.value.param == "prompt"
