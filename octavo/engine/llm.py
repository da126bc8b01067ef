"""LLM: a model in this very process, for scripts and notebooks: prompts in, answers out."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypedDict, Unpack

import msgspec

from octavo.config import (
    DEFAULT_DEVICE,
    EngineConfig,
    KVDtype,
    Quantization,
    available_cpus,
    choose_backend,
    is_on_gpu,
    parse_size,
    plan_memory,
    token_budget,
)
from octavo.engine.core import EngineCore
from octavo.engine.interrupts import deferred_interrupts
from octavo.engine.output import OutputProcessor
from octavo.engine.validation import complete_request
from octavo.errors import ConfigError, EngineDeadError, InvalidRequestError
from octavo.tokenizer.load import Tokenizer, load_tokenizer
from octavo.types import (
    OPEN_CACHE,
    BeamSearchOutput,
    BeamSearchParams,
    BeamSearchSequence,
    CacheParams,
    Capacity,
    CompletionOutput,
    OutputDelta,
    RequestOutput,
    SamplingParams,
    TokenLogprob,
)
from octavo.weights import source

Prompt = str | Mapping[str, Any]
"""Text, {"prompt": text} or {"prompt_token_ids": ids}; with "cache_salt" and "cache_pin_s" if need
be: only prompts of equal salt share cached prefixes; a pinned one stays cached for so long."""

Message = Mapping[str, Any]


class LLMOptions(TypedDict, total=False):
    """What `LLM` can be told beside the model: meanings and defaults as in `EngineConfig`."""

    memory: str | int | None
    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int
    threads: int | None
    block_size: int
    kv_dtype: KVDtype
    prefix_cache: bool
    kv_host: str | int
    kv_disk: str | None
    kv_disk_size: str | int
    backend: Literal["auto", "cpu", "torch", "reference"]
    device: str
    dtype: Literal["auto", "bf16", "fp16", "fp32"]
    deterministic: bool
    quantization: Quantization | None


class LLM:
    """A language model that answers many prompts at once.

    >>> with LLM("smollm2") as llm:
    ...     [answer] = llm.generate("The capital of France is", SamplingParams(temperature=0))
    """

    def __init__(self, model: str = "smollm2", **options: Unpack[LLMOptions]) -> None:
        """Load a model: a folder, a GGUF file, hf:org/repo[:file] or a known name.

        Raises:
            ConfigError: the model cannot be loaded as asked; the message has cause and remedy.
        """
        config = engine_config(model, options)
        self._core = EngineCore.load(config)
        try:
            self.tokenizer: Tokenizer = load_tokenizer(config.model)
        except BaseException:
            self._core.close()
            raise
        self._numbers = itertools.count()
        self._is_closed = False

    @property
    def capacity(self) -> Capacity:
        """What the engine can hold."""
        return self._core.capacity

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer prompts; answers come in the prompts' order, one even for a single prompt.

        Args:
            prompts: one or many: text, or {"prompt_token_ids": [...]}; see `Prompt`.
            sampling_params: one for all, or one each; the default samples 16 tokens at temperature
                1.
            use_tqdm: show progress if standard error is a terminal.

        Raises:
            InvalidRequestError: a prompt or a parameter is at fault; nothing has been computed.
        """
        many = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        texts, ids = [], []
        for prompt in many:
            text, prompt_ids = self._encode(prompt)
            texts.append(text)
            ids.append(prompt_ids)
        caches = [_cache_params(prompt) for prompt in many]
        return self._run(texts, ids, caches, sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or many, through the model's chat template.

        Raises:
            InvalidRequestError: the model has no chat template, or as in `generate`.
        """
        template = self.tokenizer.chat_template
        if template is None:
            raise InvalidRequestError(
                "this model has no chat template; use generate", param="messages"
            )
        if not messages:
            raise InvalidRequestError("messages is empty", param="messages")
        is_single = isinstance(messages[0], Mapping)
        many: list[Any] = [messages] if is_single else list(messages)
        spans = [template.render(list(conversation)) for conversation in many]
        texts: list[str | None] = ["".join(span.text for span in one) for one in spans]
        ids = [self.tokenizer.encode_spans(one) for one in spans]
        return self._run(texts, ids, [OPEN_CACHE] * len(ids), sampling_params, use_tqdm)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes, pinned ones too; True, as vLLM's has it: it cannot fail."""
        self._check_open()
        self._core.reset_prefix_cache()
        return True

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        *,
        use_tqdm: bool = True,
    ) -> list[BeamSearchOutput]:
        """The most probable answers to each prompt that a beam search finds, best first.

        Raises:
            InvalidRequestError: a prompt or a parameter is at fault; nothing has been computed.
        """
        sampling_params = SamplingParams(
            n=params.beam_width,
            use_beam_search=True,
            temperature=0.0,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
            ignore_eos=params.ignore_eos,
            max_tokens=params.max_tokens,
            logprobs=0,
        )
        answers = self.generate(prompts, sampling_params, use_tqdm=use_tqdm)
        return [
            BeamSearchOutput(sequences=[_beam(output) for output in answer.outputs])
            for answer in answers
        ]

    def close(self) -> None:
        """Free the model; idempotent."""
        self._is_closed = True
        self._core.close()

    def __enter__(self) -> Self:
        """Use as a context manager."""
        return self

    def __exit__(self, *error: object) -> None:
        """Free the model."""
        self.close()

    def _encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            return prompt, self._encode_raw(prompt)
        unknown = set(prompt) - {"prompt", "prompt_token_ids", "cache_salt", "cache_pin_s"}
        if unknown or not {"prompt", "prompt_token_ids"}.intersection(prompt):
            raise InvalidRequestError(
                'a prompt is text, {"prompt": text} or {"prompt_token_ids": ids}, with '
                '"cache_salt" and "cache_pin_s" if need be',
                param="prompt",
            )
        text = prompt.get("prompt")
        ids = prompt.get("prompt_token_ids")
        return text, list(ids) if ids is not None else self._encode_raw(str(text))

    def _encode_raw(self, text: str) -> list[int]:
        """Whoever gives a raw prompt writes its special tokens out; chat keeps users' as text."""
        return self.tokenizer.encode(text, parse_special=True)

    def _run(
        self,
        texts: list[str | None],
        ids: list[list[int]],
        caches: list[CacheParams],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        self._check_open()
        params = _per_prompt(sampling_params, len(ids))
        requests = [
            complete_request(str(next(self._numbers)), prompt_ids, one, self.capacity, cache=cache)
            for prompt_ids, one, cache in zip(ids, params, caches, strict=True)
        ]
        processor = OutputProcessor(self.tokenizer)
        answers: dict[str, RequestAnswer] = {}
        advance, finish = _progress_bar(len(requests) if use_tqdm else 0)
        try:
            for request, text in zip(requests, texts, strict=True):
                name = request.request_id
                processor.add(name, len(request.prompt_ids), request.params)
                answers[name] = RequestAnswer(name, text, request.prompt_ids, request.params)
                self._core.add(request)
            self._drain(processor, answers, advance)
        except BaseException:
            for name in answers:
                self._core.abort(name)
            raise
        finally:
            finish()
        return [answer.finished() for answer in answers.values()]

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineDeadError("this LLM is closed; make a new one")

    def _drain(
        self,
        processor: OutputProcessor,
        answers: dict[str, RequestAnswer],
        advance: Callable[[], None],
    ) -> None:
        with deferred_interrupts() as check_interrupt:
            while self._core.has_work():
                check_interrupt()
                for update in self._core.step():
                    result = processor.process(update)
                    for delta in result.deltas:
                        answers[update.request_id].add(delta)
                    if result.is_stopped_here:
                        self._core.abort(update.request_id, update.index)
                    if result.is_request_finished:
                        advance()


@dataclass(slots=True)
class SequenceAnswer:
    """One sequence while it grows."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    last: OutputDelta | None = None


class RequestAnswer:
    """Collects the deltas of one request."""

    def __init__(
        self, request_id: str, prompt: str | None, prompt_ids: list[int], params: SamplingParams
    ) -> None:
        """Begin with nothing."""
        self._request_id = request_id
        self._prompt = prompt
        self._prompt_ids = prompt_ids
        self._params = params
        self._sequences = [SequenceAnswer() for _ in range(params.n)]

    def add(self, delta: OutputDelta) -> None:
        """Append what is new."""
        sequence = self._sequences[delta.index]
        sequence.texts.append(delta.text)
        sequence.token_ids.extend(delta.token_ids)
        sequence.logprobs.extend(delta.logprobs)
        sequence.last = delta

    def finished(self) -> RequestOutput:
        """The whole answer, once every sequence has ended."""
        outputs = []
        num_cached_tokens = 0
        for index, sequence in enumerate(self._sequences):
            last = sequence.last
            assert last is not None and last.finish_reason is not None
            if index == 0:
                num_cached_tokens = last.usage.num_cached_tokens
            outputs.append(
                CompletionOutput(
                    index=index,
                    text="".join(sequence.texts),
                    token_ids=tuple(sequence.token_ids),
                    logprobs=None if self._params.logprobs is None else tuple(sequence.logprobs),
                    finish_reason=last.finish_reason,
                    stop_reason=last.stop_reason,
                )
            )
        return RequestOutput(
            request_id=self._request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_ids,
            outputs=outputs,
            num_cached_tokens=num_cached_tokens,
        )


def _beam(output: CompletionOutput) -> BeamSearchSequence:
    return BeamSearchSequence(
        text=output.text,
        token_ids=output.token_ids,
        cum_logprob=sum(token.logprob for token in output.logprobs or ()),
        finish_reason=output.finish_reason,
    )


def engine_config(model: str, options: LLMOptions) -> EngineConfig:
    """The configuration of an engine in this process; fetches the model if needed.

    Raises:
        ConfigError: an option is unknown or wrong, or the model cannot be had.
    """
    unknown = set(options) - set(LLMOptions.__annotations__)
    if unknown:
        raise ConfigError(
            f"LLM has no option {', '.join(sorted(unknown))}; known are "
            f"{', '.join(LLMOptions.__annotations__)}"
        )
    memory = options.get("memory")
    threads = options.get("threads")
    host_size, disk_size = options.get("kv_host", 0), options.get("kv_disk_size", "10GiB")
    renamed = {"memory", "threads", "prefix_cache", "kv_host", "kv_disk_size"}
    others = {name: value for name, value in options.items() if name not in renamed}
    backend = choose_backend(options.get("backend", "auto"), options.get("device"))
    device = options.get("device", DEFAULT_DEVICE)
    if memory is None and is_on_gpu(backend, device):
        memory_bytes = None
    else:
        memory_bytes = plan_memory(parse_size(memory) if isinstance(memory, str) else memory)
    path = source.resolve(model)
    values: dict[str, Any] = {
        "model": str(path),
        "served_name": model,
        "memory_bytes": memory_bytes,
        "max_num_batched_tokens": token_budget(backend, device),
        "num_threads": available_cpus() if threads is None else threads,
        "max_num_waiting": sys.maxsize,
        "use_prefix_cache": options.get("prefix_cache", True),
        "kv_host_bytes": parse_size(host_size) if isinstance(host_size, str) else host_size,
        "kv_disk_bytes": parse_size(disk_size) if isinstance(disk_size, str) else disk_size,
        **others,
        "backend": backend,
    }
    try:
        return msgspec.convert(values, EngineConfig).validate()
    except msgspec.ValidationError as error:
        raise ConfigError(f"an option of LLM is wrong: {error}") from None


def _cache_params(prompt: Prompt) -> CacheParams:
    """What a prompt asks of the prefix cache; `complete_request` checks it."""
    if isinstance(prompt, str):
        return OPEN_CACHE
    salt, pin_s = prompt.get("cache_salt"), prompt.get("cache_pin_s")
    if salt == "":
        raise InvalidRequestError(
            "cache_salt is empty; leave it out, or give None, to have none", param="cache_salt"
        )
    return CacheParams(salt="" if salt is None else salt, pin_s=0.0 if pin_s is None else pin_s)


def _per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise InvalidRequestError(
            f"{len(params)} SamplingParams for {count} prompts; give one, or one each",
            param="sampling_params",
        )
    return list(params)


def _progress_bar(total: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """Functions that advance and end a progress bar; they do nothing off a terminal."""
    if total == 0 or not sys.stderr.isatty():
        return (lambda: None), (lambda: None)
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]  # noqa: PLC0415
    except ImportError:
        return (lambda: None), (lambda: None)
    bar = tqdm(total=total, unit="prompt", dynamic_ncols=True)

    def advance() -> None:
        bar.update()

    return advance, bar.close
