"""What clients send: the fields of each endpoint with their types, ranges and defaults.

A request is made of one or two flat structs whose fields stand side by side in the JSON object;
`parsing.py` splits the object. Fields that have no effect or are not supported are listed in
`fields.py`. Ranges here are those of the API; the engine checks what depends on the model.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from octavo.engine.validation import (
    MAX_COUNT,
    MAX_LOGIT_BIASES,
    MAX_LOGPROBS,
    MAX_N,
    MAX_PIN_S,
    MAX_SALT_CHARACTERS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
)
from octavo.types import SamplingParams

TokenId = Annotated[int, Meta(ge=0, le=MAX_COUNT)]


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a stream is framed."""

    include_usage: bool = False
    """Send a last chunk with the usage and no choices."""
    continuous_usage_stats: bool = False
    """Send the usage so far in every chunk."""
    include_obfuscation: bool = False
    """Accepted; no padding is added."""


class GenerationFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields that chat and text completions share. A null is the default."""

    model: str = ""
    """A served name; empty takes the only one."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_COUNT)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_N)] = 1
    best_of: Annotated[int, Meta(ge=1, le=MAX_N)] | None = None
    """Compute so many answers and return the n most probable ones; with beam search, its width."""
    use_beam_search: bool = False
    """Search for the most probable answers instead of sampling; they come when all are found."""
    length_penalty: Annotated[float, Meta(ge=-10.0, le=10.0)] = 1.0
    """Beams are ranked by log probability / length ** length_penalty."""
    early_stopping: bool | Literal["never"] = False
    """When a beam search ends, as in transformers."""
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] = 1.0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=MAX_COUNT)] = 0
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    seed: int | None = None
    """Any 64-bit number, signed or not."""
    stop: str | Annotated[list[str], Meta(max_length=MAX_STOP_STRINGS)] = []
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKEN_IDS)] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: Annotated[int, Meta(ge=0, le=MAX_COUNT)] = 0
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=100.0)] = 1.0
    presence_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    logit_bias: Annotated[
        dict[TokenId, Annotated[float, Meta(ge=-100.0, le=100.0)]],
        Meta(max_length=MAX_LOGIT_BIASES),
    ] = {}
    skip_special_tokens: bool = True
    priority: Annotated[int, Meta(ge=-MAX_COUNT, le=MAX_COUNT)] = 0
    cache_salt: Annotated[str, Meta(min_length=1, max_length=MAX_SALT_CHARACTERS)] | None = None
    """Only requests of an equal salt share cached prefixes."""
    cache_pin_s: Annotated[float, Meta(ge=0.0, le=MAX_PIN_S)] = 0.0
    """Keep the prompt cached for so many seconds from the first token on."""
    request_id: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._:-]{1,128}$")] | None = None
    """Becomes part of the answer's id."""

    def sampling_params(self, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """The engine's record of these fields."""
        return SamplingParams(
            n=self.n,
            best_of=self.best_of,
            use_beam_search=self.use_beam_search,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            include_stop_str_in_output=self.include_stop_str_in_output,
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            max_tokens=max_tokens,
            logprobs=logprobs,
            logit_bias=self.logit_bias,
            skip_special_tokens=self.skip_special_tokens,
        )


class ContentPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of a message; only those of type text are supported."""

    type: str
    text: str | None = None
    image_url: Any = None
    video_url: Any = None
    audio_url: Any = None
    input_audio: Any = None
    file: Any = None
    refusal: Any = None


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A message of a conversation."""

    role: str
    """system, developer (the same), user or assistant."""
    content: str | list[ContentPart] | None = None
    name: str | None = None
    """Accepted for OpenAI's clients; templates do not show it."""
    refusal: str | None = None
    """Accepted as null in assistant messages that are sent back."""
    annotations: list[Any] | None = None
    """Accepted as null or empty in assistant messages that are sent back."""
    audio: Any = None
    tool_calls: list[Any] | None = None
    function_call: Any = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class ChatFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Further fields of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1, le=MAX_COUNT)] | None = None
    """OpenAI's newer name of max_tokens; the default is what the context leaves."""
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] = 0
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    """Go on with the last message instead of answering it."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables for the model's template."""


class CompletionFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Further fields of /v1/completions."""

    prompt: str | list[str | TokenId | list[TokenId]]
    """A text, a list of texts, a list of token ids, or a list of such lists."""
    echo: bool = False
    """Begin the answer's text with the prompt's."""
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    add_special_tokens: bool = True


class TokenizeFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """/tokenize: either `prompt` or `messages`."""

    model: str = ""
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    """Default: true for a prompt, false for messages."""
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    return_token_strs: bool = False


class DetokenizeFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """/detokenize."""

    model: str = ""
    tokens: list[TokenId]
    skip_special_tokens: bool = False
