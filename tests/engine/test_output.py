"""OutputProcessor: the stream says what the whole says; stop strings cut text and tokens alike."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.engine.output import OutputProcessor
from octavo.tokenizer.tokenizer import Tokenizer
from octavo.types import FinishReason, OutputDelta, SamplingParams, TokenLogprob, TokenUpdate


def stream(
    tokenizer: Tokenizer,
    params: SamplingParams,
    steps: Sequence[Sequence[int]],
    finish: FinishReason = "length",
) -> tuple[list[OutputDelta], bool]:
    """The deltas of one sequence, each step one update, and whether a stop string ended it."""
    processor = OutputProcessor(tokenizer)
    processor.add("a", 3, params)
    deltas = []
    for number, ids in enumerate(steps, 1):
        result = processor.process(
            TokenUpdate(
                "a",
                0,
                tuple(ids),
                tuple(TokenLogprob(i, -1.0) for i in ids),
                finish if number == len(steps) else None,
                num_cached_tokens=2,
            )
        )
        deltas += result.deltas
        if result.is_request_finished:
            return deltas, result.is_stopped_here
    raise AssertionError("the request did not end")


def text_of(deltas: list[OutputDelta]) -> str:
    return "".join(d.text for d in deltas)


def ids_of(deltas: list[OutputDelta]) -> list[int]:
    return [i for d in deltas for i in d.token_ids]


def chunks(ids: list[int], size: int) -> list[list[int]]:
    return [ids[i : i + size] for i in range(0, len(ids), size)]


LETTERS = st.text(alphabet="abthe né🙂", max_size=25)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LETTERS, st.binary(max_size=4), st.integers(1, 4))
def test_the_stream_is_the_whole(
    tiny_tokenizer: Tokenizer, text: str, odd_bytes: bytes, size: int
) -> None:
    by_byte = {tiny_tokenizer.token_bytes(i): i for i in range(256)}
    ids = tiny_tokenizer.encode(text) + [by_byte[bytes([b])] for b in odd_bytes] or [0]
    deltas, _ = stream(tiny_tokenizer, SamplingParams(), chunks(ids, size))
    assert text_of(deltas) == tiny_tokenizer.decode(ids)
    assert ids_of(deltas) == ids
    assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == "length"
    assert {(d.usage.num_prompt_tokens, d.usage.num_cached_tokens) for d in deltas} == {(3, 2)}


def test_half_a_character_is_held_back(tiny_tokenizer: Tokenizer) -> None:
    ids = tiny_tokenizer.encode("é🙂")
    assert len(ids) == 6
    deltas, _ = stream(tiny_tokenizer, SamplingParams(), chunks(ids, 1))
    assert [d.text for d in deltas] == ["", "é", "", "", "", "🙂"]
    cut, _ = stream(tiny_tokenizer, SamplingParams(), chunks(ids[:4], 1))
    assert text_of(cut) == "é�"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LETTERS, st.lists(st.text("abthe n", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_strings_cut_the_same_however_tokens_come(
    tiny_tokenizer: Tokenizer, text: str, stops: list[str]
) -> None:
    ids = tiny_tokenizer.encode(text) or [0]
    whole = tiny_tokenizer.decode(ids)
    params = SamplingParams(stop=tuple(stops))
    ends = [whole.index(s) + len(s) for s in stops if s in whole]
    runs = [stream(tiny_tokenizer, params, chunks(ids, size)) for size in (1, 2, 3)]
    for deltas, is_stopped in runs:
        assert text_of(deltas) == text_of(runs[0][0])
        assert ids_of(deltas) == ids_of(runs[0][0])
        assert [e.token_id for d in deltas for e in d.logprobs] == ids_of(deltas)
        if ends:
            end = min(ends)
            stop = max((s for s in stops if whole[:end].endswith(s)), key=len)
            assert text_of(deltas) == whole[: end - len(stop)]
            assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", stop)
            taken = len(ids_of(deltas))  # up to the token that completes the stop string
            assert len(tiny_tokenizer.decode(ids[:taken])) >= end
            assert len(tiny_tokenizer.decode(ids[: taken - 1])) < end
        else:
            assert text_of(deltas) == whole
            assert not is_stopped
            assert deltas[-1].finish_reason == "length"


def test_a_stop_string_may_stay_in_the_text(tiny_tokenizer: Tokenizer) -> None:
    ids = tiny_tokenizer.encode("one two three")
    params = SamplingParams(stop=("two",), include_stop_str_in_output=True)
    deltas, is_stopped = stream(tiny_tokenizer, params, chunks(ids, 1))
    assert text_of(deltas) == "one two"
    assert is_stopped


def test_the_engine_need_not_be_told_of_an_end_that_it_knows(tiny_tokenizer: Tokenizer) -> None:
    ids = tiny_tokenizer.encode("ab")
    deltas, is_stopped = stream(tiny_tokenizer, SamplingParams(stop=("b",)), chunks(ids, 1))
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "b")
    assert not is_stopped


def test_a_stop_string_within_min_tokens_passes(tiny_tokenizer: Tokenizer) -> None:
    ids = tiny_tokenizer.encode("xbxbxb")
    params = SamplingParams(stop=("b",), min_tokens=2)
    deltas, _ = stream(tiny_tokenizer, params, chunks(ids, 1))
    assert text_of(deltas) == "xbx"
    assert len(ids_of(deltas)) == 4


@pytest.mark.parametrize(("is_included", "expected"), [(False, "ab"), (True, "ab<|im_end|>")])
def test_the_token_that_ends_is_no_text(
    tiny_tokenizer: Tokenizer, is_included: bool, expected: str
) -> None:
    [end] = tiny_tokenizer.eos_token_ids
    ids = [*tiny_tokenizer.encode("ab"), end]
    for stop in ((), ("zzz",)):
        params = SamplingParams(
            skip_special_tokens=False, include_stop_str_in_output=is_included, stop=stop
        )
        deltas, _ = stream(tiny_tokenizer, params, chunks(ids, 1), "stop")
        assert text_of(deltas) == expected
        assert ids_of(deltas) == ids
        skipping, _ = stream(tiny_tokenizer, SamplingParams(stop=stop), chunks(ids, 2), "stop")
        assert text_of(skipping) == "ab"


def test_sequences_are_apart_and_the_request_ends_with_the_last(tiny_tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(tiny_tokenizer)
    processor.add("wire", 3, SamplingParams(n=2, stop=("b",)), shown_id="shown")
    a, b = (tiny_tokenizer.encode(c)[0] for c in "ab")
    first = processor.process(TokenUpdate("wire", 1, (a,)))
    (delta,) = first.deltas
    assert (delta.request_id, delta.index, delta.text) == ("shown", 1, "a")
    stopped = processor.process(TokenUpdate("wire", 0, (b,)))
    assert stopped.is_stopped_here
    assert not stopped.is_request_finished
    late = processor.process(TokenUpdate("wire", 0, (a,)))
    assert late.deltas == ()
    last = processor.process(TokenUpdate("wire", 1, (a,), (), "length"))
    assert last.is_request_finished
    assert processor.process(TokenUpdate("wire", 1, (a,))).deltas == ()


@pytest.mark.parametrize("logprobs", [None, 1])
def test_the_best_of_many_are_returned_when_all_have_ended(
    tiny_tokenizer: Tokenizer, logprobs: int | None
) -> None:
    processor = OutputProcessor(tiny_tokenizer)
    processor.add("a", 3, SamplingParams(n=2, best_of=4, logprobs=logprobs, stop=("z",)))
    a, z = (tiny_tokenizer.encode(c)[0] for c in "az")
    results = []
    for index, ids, logprob, reason in [
        (0, (a, a), -1.0, None),
        (1, (a,), -0.9, None),
        (2, (a, a, z), -0.5, None),  # ended by its stop string
        (3, (a,), -0.1, "error"),
        (1, (a,), -3.0, "length"),
        (0, (a,), -1.2, "length"),
    ]:
        tokens = tuple(TokenLogprob(token, logprob) for token in ids)
        results.append(processor.process(TokenUpdate("a", index, ids, tokens, reason)))
    assert [r.is_stopped_here for r in results] == [False, False, True, False, False, False]
    assert all(r.deltas == () for r in results[:-1])
    best, second = results[-1].deltas
    assert (best.index, best.text, best.stop_reason) == (0, "aa", "z")
    assert (second.index, second.text, second.finish_reason) == (1, "aaa", "length")
    assert len(second.logprobs) == (0 if logprobs is None else 3)


def test_a_removed_request_is_silent(tiny_tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(tiny_tokenizer)
    processor.add("a", 1, SamplingParams())
    processor.remove("a")
    processor.remove("a")
    assert processor.process(TokenUpdate("a", 0, (1,))).deltas == ()
