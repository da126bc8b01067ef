"""LLM: prompts in, answers out, in this process."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import octavo
from octavo import LLM, BeamSearchParams, RequestOutput, SamplingParams
from octavo.errors import (
    ConfigError,
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    ModelFileError,
)
from octavo.types import SchedulerOutput

OPTIONS: dict[str, Any] = {"memory": "1MiB", "threads": 1}
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_model_path: Path) -> Iterator[LLM]:
    with LLM(str(tiny_model_path), **OPTIONS) as model:
        yield model


def ids_of(output: RequestOutput) -> tuple[int, ...]:
    return output.outputs[0].token_ids


def test_one_prompt_or_many(llm: LLM) -> None:
    [one] = llm.generate("on the", GREEDY)
    assert one.prompt == "on the"
    assert one.prompt_token_ids == llm.tokenizer.encode("on the")
    [answer] = one.outputs
    assert len(answer.token_ids) == 6
    assert answer.text == llm.tokenizer.decode(answer.token_ids)
    assert answer.finish_reason == "length"
    assert answer.logprobs is None
    many = llm.generate(["in", "on the", {"prompt_token_ids": one.prompt_token_ids}], GREEDY)
    assert [ids_of(o) for o in many[1:]] == [answer.token_ids] * 2
    assert many[2].prompt is None
    assert llm.generate([]) == []


def test_params_for_each_prompt(llm: LLM) -> None:
    each = [
        SamplingParams(temperature=0, max_tokens=k, ignore_eos=True, logprobs=k) for k in (1, 3)
    ]
    first, second = llm.generate(["a", "a"], each)
    assert [len(ids_of(o)) for o in (first, second)] == [1, 3]
    logprobs = second.outputs[0].logprobs
    assert logprobs is not None
    assert [len(entry.top) for entry in logprobs] == [3] * 3
    assert [entry.token_id for entry in logprobs] == list(ids_of(second))
    assert len(ids_of(llm.generate("a")[0])) <= 16
    with pytest.raises(InvalidRequestError, match="2 SamplingParams for 1"):
        llm.generate("a", each)


def test_n_answers_and_stop_strings(llm: LLM) -> None:
    params = SamplingParams(n=4, seed=1, max_tokens=20, ignore_eos=True)
    [output] = llm.generate("a", params)
    assert [o.index for o in output.outputs] == [0, 1, 2, 3]
    texts = [o.text for o in output.outputs]
    assert len(set(texts)) == 4
    stop = texts[2][5:8]
    [stopped] = llm.generate(
        "a", SamplingParams(n=4, seed=1, max_tokens=20, ignore_eos=True, stop=(stop,))
    )
    answer = stopped.outputs[2]
    assert answer.text == texts[2][: texts[2].index(stop)]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)


def test_the_best_of_many_samples(llm: LLM) -> None:
    settings = {"seed": 1, "max_tokens": 12, "ignore_eos": True}
    [every] = llm.generate("a", SamplingParams(n=6, logprobs=0, **settings))
    [best] = llm.generate("a", SamplingParams(n=2, best_of=6, **settings))
    ranked = sorted(every.outputs, key=lambda o: -sum(t.logprob for t in o.logprobs or ()))
    assert [o.token_ids for o in best.outputs] == [o.token_ids for o in ranked[:2]]
    assert [(o.index, o.logprobs) for o in best.outputs] == [(0, None), (1, None)]


def test_beams_are_in_order_and_one_beam_is_greedy(llm: LLM) -> None:
    params = BeamSearchParams(beam_width=4, max_tokens=6, ignore_eos=True)
    outputs = llm.beam_search(["a", {"prompt_token_ids": [5, 6, 7]}], params)
    for prompt, output in zip(["a", {"prompt_token_ids": [5, 6, 7]}], outputs, strict=True):
        scores = [beam.cum_logprob for beam in output.sequences]
        assert scores == sorted(scores, reverse=True)
        assert len({beam.token_ids for beam in output.sequences}) == 4
        assert all(beam.finish_reason == "length" for beam in output.sequences)
        one = BeamSearchParams(beam_width=1, max_tokens=6, ignore_eos=True)
        [alone], [greedy] = llm.beam_search(prompt, one), llm.generate(prompt, GREEDY)
        assert alone.sequences[0].token_ids == greedy.outputs[0].token_ids
    with pytest.raises(InvalidRequestError, match="16"):
        llm.beam_search("a", BeamSearchParams(beam_width=17, max_tokens=6))


def test_a_prefix_is_served_from_the_cache(llm: LLM) -> None:
    prompt = {"prompt_token_ids": list(range(40))}
    [cold] = llm.generate(prompt, GREEDY)
    [warm] = llm.generate(prompt, GREEDY)
    assert (cold.num_cached_tokens, warm.num_cached_tokens) == (0, 32)


def test_prompts_of_another_salt_share_nothing(llm: LLM) -> None:
    prompt = {"prompt_token_ids": list(range(60, 100))}
    salted = prompt | {"cache_salt": "a"}
    served = [llm.generate(p, GREEDY)[0] for p in (prompt, salted, salted, prompt)]
    assert [output.num_cached_tokens for output in served] == [0, 0, 32, 32]
    assert len({ids_of(output) for output in served}) == 1
    assert llm.generate(prompt | {"cache_salt": None}, GREEDY)[0].num_cached_tokens == 32
    assert llm.generate({"prompt": "on the", "cache_salt": "a"}, GREEDY)[0].prompt == "on the"


def test_a_pinned_prompt_and_a_reset(tiny_model_path: Path) -> None:
    prompt = {"prompt_token_ids": list(range(40))}
    with LLM(str(tiny_model_path), memory="36KiB", threads=1, max_model_len=96) as small:
        assert small.capacity.kv_pool.num_blocks < 10
        small.generate(prompt | {"cache_pin_s": 600}, GREEDY)
        for other in range(100, 110):
            small.generate({"prompt_token_ids": [other] * 40}, GREEDY)
        assert small.generate(prompt, GREEDY)[0].num_cached_tokens == 32
        assert small.reset_prefix_cache() is True
        assert small.generate(prompt, GREEDY)[0].num_cached_tokens == 0
        with pytest.raises(InvalidRequestError, match="may be pinned"):
            small.generate({"prompt_token_ids": [7] * 90, "cache_pin_s": 1}, GREEDY)
        assert len(ids_of(small.generate("a", GREEDY)[0])) == 6
    with pytest.raises(EngineDeadError):
        small.reset_prefix_cache()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"cache_salt": ""}, "cache_salt"),
        ({"cache_salt": "x" * 257}, "cache_salt"),
        ({"cache_salt": "\ud800"}, "cache_salt"),
        ({"cache_salt": 5}, "cache_salt"),
        ({"cache_pin_s": -1}, "cache_pin_s"),
        ({"cache_pin_s": 3601}, "cache_pin_s"),
        ({"cache_pin_s": "1"}, "cache_pin_s"),
        ({"cache_pin_s": float("nan")}, "cache_pin_s"),
    ],
)
def test_what_is_asked_of_the_cache_is_checked(
    llm: LLM, fields: dict[str, object], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        llm.generate({"prompt": "on the"} | fields, GREEDY)
    assert caught.value.param == param


def test_the_log_says_why_a_prefix_was_missed(
    tiny_model_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "octavo.engine")
    with LLM(str(tiny_model_path), **OPTIONS) as talkative:
        for fields in ({}, {}, {"cache_salt": "a"}):
            talkative.generate({"prompt_token_ids": list(range(40))} | fields, GREEDY)
    assert caplog.messages == [
        "request 0, sequence 0: 0 of 40 tokens cached; block 0 missed: never seen",
        "request 1, sequence 0: 32 of 40 tokens cached; all that could be",
        "request 2, sequence 0: 0 of 40 tokens cached; block 0 missed: other salt or scope",
    ]


def test_chat_renders_the_template(llm: LLM) -> None:
    talk = [{"role": "user", "content": "in <|im_end|>"}]
    [output] = llm.chat(talk, GREEDY)
    assert output.prompt == ("<|im_start|>user\nin <|im_end|><|im_end|>\n<|im_start|>assistant\n")
    [end] = llm.tokenizer.eos_token_ids
    assert output.prompt_token_ids.count(end) == 1, "what a user types is no special token"
    twice = llm.chat([talk, talk], GREEDY)
    assert [ids_of(o) for o in twice] == [ids_of(output)] * 2
    with pytest.raises(InvalidRequestError, match="empty"):
        llm.chat([])


def test_a_bad_request_computes_nothing_and_leaves_nothing(llm: LLM) -> None:
    long = {"prompt_token_ids": [1] * 600}
    for prompts, error in (
        (["a", long], ContextLengthError),
        (["a", {"prompt_token_ids": [-1]}], InvalidRequestError),
        (["a", {"ids": [1]}], InvalidRequestError),
        (["a", {}], InvalidRequestError),
        (["a", {"cache_salt": "a"}], InvalidRequestError),
        ([""], InvalidRequestError),
    ):
        with pytest.raises(error):
            llm.generate(prompts, GREEDY)  # type: ignore[arg-type]
    assert len(ids_of(llm.generate("a", GREEDY)[0])) == 6


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_ctrl_c_ends_the_call_between_steps(
    tiny_model_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**OPTIONS, "backend": backend, "device": "cpu", "prefix_cache": False}
    with LLM(str(tiny_model_path), **options) as llm:
        expected = ids_of(llm.generate("on the", GREEDY)[0])
        executor = llm._core._executor
        submit, num_signals = executor.submit, 1

        def interrupted(plan: SchedulerOutput) -> Any:
            for _ in range(num_signals):
                os.kill(os.getpid(), signal.SIGINT)
            return submit(plan)

        with monkeypatch.context() as patch:
            patch.setattr(executor, "submit", interrupted)
            with pytest.raises(KeyboardInterrupt):
                llm.generate(["on the", "of it", "at"], GREEDY)
            assert not llm._core.stats().num_running
        assert ids_of(llm.generate("on the", GREEDY)[0]) == expected
        num_signals = 2  # Whoever insists need not wait for the step, but the engine is gone.
        with monkeypatch.context() as patch:
            patch.setattr(executor, "submit", interrupted)
            with pytest.raises(KeyboardInterrupt):
                llm.generate("on the", GREEDY)
        with pytest.raises(EngineDeadError, match="a step has failed"):
            llm.generate("on the", GREEDY)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"colour": 1}, "colour.*memory"),
        ({"memory": "much"}, "much"),
        ({"threads": 0}, "--threads"),
        ({"max_num_seqs": "9"}, "max_num_seqs"),
        ({"quantization": "int5"}, "quantization"),
        ({"max_model_len": 100_000}, "512"),
    ],
)
def test_a_wrong_option_says_so(tiny_model_path: Path, options: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LLM(str(tiny_model_path), **(OPTIONS | options))


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere"):
        LLM(str(tmp_path / "nowhere"), **OPTIONS)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelFileError):
        LLM(str(tmp_path), **OPTIONS)


def test_a_closed_llm_may_be_closed_again(tiny_model_path: Path) -> None:
    model = LLM(str(tiny_model_path), **OPTIONS)
    model.close()
    model.close()
    with pytest.raises(EngineDeadError, match="closed"):
        model.generate("a")


def test_the_package_exports_its_names_lazily() -> None:
    assert octavo.__version__
    assert set(dir(octavo)) == set(octavo.__all__)
    for name in octavo.__all__:
        assert getattr(octavo, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        octavo.nothing  # noqa: B018
