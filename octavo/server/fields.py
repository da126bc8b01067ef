"""The request fields that are accepted without effect, and those that are known but not supported.

One table: the parser refuses by it, `/openapi.json` is generated with it and docs/api.md repeats
it. A field that is in no struct of `protocol.py` and not here is unknown, and a 400 that names the
nearest known one.
"""

from __future__ import annotations

import msgspec


class HarmlessField(msgspec.Struct, frozen=True):
    """A field that can't change the answer: any value is accepted, none has an effect."""

    name: str
    why: str


class UnsupportedField(msgspec.Struct, frozen=True):
    """A field that would change the answer: accepted only as null or with a neutral value."""

    name: str
    why: str
    neutral: tuple[object, ...] = ()


HARMLESS = (
    HarmlessField("metadata", "labels for a store that Octavo does not keep"),
    HarmlessField("user", "an end user's id, for abuse reports"),
    HarmlessField("safety_identifier", "an end user's id, for abuse reports"),
    HarmlessField(
        "prompt_cache_key", "routes to a cache; the prefix cache finds prefixes by itself"
    ),
    HarmlessField("prompt_cache_retention", "the prefix cache keeps what fits; see cache_pin_s"),
    HarmlessField("service_tier", "there is one tier"),
    HarmlessField("parallel_tool_calls", "without tools there are no calls"),
    HarmlessField("prediction", "a hint that could only save time"),
    HarmlessField("cache_prompt", "the prefix cache is always on"),
)

_TOOLS = "tool calls are not supported yet"
_CONSTRAINTS = "constrained output is not supported yet"
_TEXT_ONLY = "only text is supported"

UNSUPPORTED = (
    UnsupportedField("tools", _TOOLS, ([],)),
    UnsupportedField("tool_choice", _TOOLS, ("none", "auto")),
    UnsupportedField("functions", _TOOLS, ([],)),
    UnsupportedField("function_call", _TOOLS, ("none", "auto")),
    UnsupportedField("response_format", _CONSTRAINTS, ({"type": "text"},)),
    UnsupportedField("structured_outputs", _CONSTRAINTS),
    UnsupportedField("guided_json", _CONSTRAINTS),
    UnsupportedField("guided_regex", _CONSTRAINTS),
    UnsupportedField("guided_choice", _CONSTRAINTS),
    UnsupportedField("guided_grammar", _CONSTRAINTS),
    UnsupportedField("guided_decoding_backend", _CONSTRAINTS),
    UnsupportedField("guided_whitespace_pattern", _CONSTRAINTS),
    UnsupportedField("grammar", _CONSTRAINTS),
    UnsupportedField("json_schema", _CONSTRAINTS),
    UnsupportedField("allowed_token_ids", _CONSTRAINTS),
    UnsupportedField("bad_words", _CONSTRAINTS, ([],)),
    UnsupportedField("modalities", _TEXT_ONLY, (["text"],)),
    UnsupportedField("audio", _TEXT_ONLY),
    UnsupportedField("mm_processor_kwargs", _TEXT_ONLY),
    UnsupportedField("prompt_embeds", "prompts are text or token ids"),
    UnsupportedField("web_search_options", "the server searches nothing"),
    UnsupportedField("store", "answers are not stored", (False,)),
    UnsupportedField("suffix", "the model can't fill a gap", ("",)),
    UnsupportedField("prompt_logprobs", "log probabilities are of the answer only"),
    UnsupportedField("truncate_prompt_tokens", "shorten the prompt yourself"),
    UnsupportedField("return_token_ids", "ask /tokenize for ids", (False,)),
    UnsupportedField("return_tokens_as_token_ids", "ask /tokenize for ids", (False,)),
    UnsupportedField("spaces_between_special_tokens", "text is joined as it is", (True,)),
    UnsupportedField("logits_processors", "a request carries no code", ([],)),
    UnsupportedField("add_special_tokens", "a chat template writes them itself", (False,)),
    UnsupportedField("chat_template", "the model's own template is used"),
    UnsupportedField("documents", "put documents into the messages", ([],)),
    UnsupportedField("kv_transfer_params", "one engine computes a whole request"),
    UnsupportedField("vllm_xargs", "no extra arguments are known"),
    UnsupportedField("timeout", "close the connection to end a request"),
    UnsupportedField("repetition_detection", "use the penalties or stop strings"),
    UnsupportedField("reasoning_effort", "the model does not reason apart", ("none",)),
    UnsupportedField("thinking_token_budget", "the model does not reason apart"),
    UnsupportedField("include_reasoning", "the model does not reason apart", (True, False)),
    UnsupportedField("verbosity", "say in the prompt how long the answer should be", ("medium",)),
)

HARMLESS_NAMES = frozenset(field.name for field in HARMLESS)
UNSUPPORTED_BY_NAME = {field.name: field for field in UNSUPPORTED}
