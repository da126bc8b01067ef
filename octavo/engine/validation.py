"""What SamplingParams and prompts may be: every bound stands here once, for LLM and server.

A fault raises InvalidRequestError with `param` set, and the message says what would be right.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import msgspec

from octavo.errors import ContextLengthError, InvalidRequestError
from octavo.types import OPEN_CACHE, CacheParams, Capacity, EngineRequest, SamplingParams

MAX_N = 128
MAX_BEAMS = 16
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIASES = 1024
MAX_COUNT = 2**31 - 1
MAX_SALT_CHARACTERS = 256
MAX_PIN_S = 3600.0

_BOUNDS: tuple[tuple[str, float, float], ...] = (
    ("temperature", 0.0, 100.0),
    ("min_p", 0.0, 1.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
    ("repetition_penalty", 0.01, 100.0),
    ("length_penalty", -10.0, 10.0),
)
_COUNTS: tuple[tuple[str, int, int], ...] = (
    ("n", 1, MAX_N),
    ("top_k", -1, MAX_COUNT),
    ("min_tokens", 0, MAX_COUNT),
)

_SEARCH_FIELDS: dict[str, tuple[object, ...]] = {
    "length_penalty": (1.0,),
    "early_stopping": (False,),
}
"""The values that mean nothing, for sampling."""
_SAMPLING_FIELDS: dict[str, tuple[object, ...]] = {
    "temperature": (0.0, 1.0),
    "top_k": (0, -1),
    "top_p": (1.0,),
    "min_p": (0.0,),
    "repetition_penalty": (1.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "logit_bias": ({},),
    "stop": ((), []),
    "min_tokens": (0,),
}
"""The values that mean nothing, for a beam search."""


def validate_params(params: SamplingParams, vocab_size: int | None = None) -> SamplingParams:
    """Return params as they are if every field is in its range.

    Args:
        params: as the user gave them.
        vocab_size: token ids are checked against it if it is known.

    Raises:
        InvalidRequestError: a field is out of range; `param` names it.
    """
    for name, low, high in _COUNTS:
        _check_count(name, getattr(params, name), low, high)
    for name, lowest, highest in _BOUNDS:
        _check_number(name, getattr(params, name), lowest, highest)
    if not _is_number(params.top_p) or not 0 < params.top_p <= 1:
        raise InvalidRequestError(
            f"top_p must be a number above 0 and at most 1, not {params.top_p!r}", param="top_p"
        )
    if params.max_tokens is not None:
        _check_count("max_tokens", params.max_tokens, 1, MAX_COUNT)
        if params.min_tokens > params.max_tokens:
            raise InvalidRequestError(
                f"min_tokens ({params.min_tokens}) must not be more than max_tokens "
                f"({params.max_tokens})",
                param="min_tokens",
            )
    if params.logprobs is not None:
        _check_count("logprobs", params.logprobs, 0, MAX_LOGPROBS)
    if params.seed is not None:
        _check_count("seed", params.seed, -(2**63), 2**64 - 1)
    for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
        if not isinstance(getattr(params, name), bool):
            raise InvalidRequestError(f"{name} must be true or false", param=name)
    _check_stop(params)
    _check_token_ids(params, vocab_size)
    _check_choice(params)
    return params


def complete_request(
    request_id: str,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    capacity: Capacity,
    *,
    priority: int = 0,
    cache: CacheParams = OPEN_CACHE,
    client: str = "",
) -> EngineRequest:
    """The request as the engine takes it: checked, with max_tokens and seed set.

    max_tokens None means up to the context length; seed None takes a fresh one.

    Raises:
        InvalidRequestError: the parameters or the prompt are at fault.
        ContextLengthError: prompt and answer cannot fit into the context.
    """
    validate_params(params, capacity.vocab_size)
    _check_prompt(prompt_ids, capacity)
    room = capacity.max_model_len - len(prompt_ids)
    if room < 1 or (params.max_tokens is not None and params.max_tokens > room):
        answer = 1 if params.max_tokens is None else params.max_tokens
        raise ContextLengthError(
            f"this model's context is {capacity.max_model_len} tokens, but {len(prompt_ids)} of "
            f"the prompt and {answer} of the answer were asked for; shorten the prompt or lower "
            "max_tokens",
            param="prompt" if room < 1 else "max_tokens",
        )
    max_tokens = room if params.max_tokens is None else params.max_tokens
    seed = int.from_bytes(os.urandom(8)) if params.seed is None else params.seed % 2**64
    _check_count("priority", priority, -MAX_COUNT, MAX_COUNT)
    _check_cache(cache)
    return EngineRequest(
        request_id=request_id,
        prompt_ids=list(prompt_ids),
        params=msgspec.structs.replace(params, max_tokens=max_tokens, seed=seed),
        priority=priority,
        cache=cache,
        client=client,
    )


def _check_cache(cache: CacheParams) -> None:
    try:
        is_text = isinstance(cache.salt, str) and cache.salt.encode() is not None
    except UnicodeEncodeError:  # half a surrogate pair, which no encoding can carry
        is_text = False
    if not is_text or len(cache.salt) > MAX_SALT_CHARACTERS:
        raise InvalidRequestError(
            f"cache_salt must be a text of 1 to {MAX_SALT_CHARACTERS} characters",
            param="cache_salt",
        )
    _check_number("cache_pin_s", cache.pin_s, 0.0, MAX_PIN_S)


def _check_count(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequestError(
            f"{name} must be a whole number from {low} to {high}, not {value!r}", param=name
        )


def _check_number(name: str, value: object, low: float, high: float) -> None:
    if not _is_number(value) or not low <= value <= high:  # type: ignore[operator]
        raise InvalidRequestError(
            f"{name} must be a number from {low:g} to {high:g}, not {value!r}", param=name
        )


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, int) or math.isfinite(value)


def _check_stop(params: SamplingParams) -> None:
    is_sequence = isinstance(params.stop, tuple | list)
    if not is_sequence or not all(isinstance(s, str) for s in params.stop):
        raise InvalidRequestError("stop must be a sequence of strings", param="stop")
    if len(params.stop) > MAX_STOP_STRINGS:
        raise InvalidRequestError(
            f"stop may hold at most {MAX_STOP_STRINGS} strings, not {len(params.stop)}",
            param="stop",
        )
    for text in params.stop:
        length = len(text.encode("utf-8", "surrogatepass"))
        if not 0 < length <= MAX_STOP_BYTES:
            raise InvalidRequestError(
                f"a stop string must be 1 to {MAX_STOP_BYTES} bytes long, not {length}",
                param="stop",
            )


def _check_choice(params: SamplingParams) -> None:
    """How many sequences are computed, and by which rule they are chosen."""
    if not isinstance(params.use_beam_search, bool):
        raise InvalidRequestError("use_beam_search must be true or false", param="use_beam_search")
    most = MAX_BEAMS if params.use_beam_search else MAX_N
    if params.best_of is not None:
        _check_count("best_of", params.best_of, params.n, most)
    _check_count("n", params.n, 1, most)
    if not (isinstance(params.early_stopping, bool) or params.early_stopping == "never"):
        raise InvalidRequestError(
            'early_stopping must be true, false or "never"', param="early_stopping"
        )
    neutral = _SEARCH_FIELDS if not params.use_beam_search else _SAMPLING_FIELDS
    for name, values in neutral.items():
        if getattr(params, name) not in values:
            cure = (
                f"beam search ranks by the model's own probabilities: leave {name} out"
                if params.use_beam_search
                else f"{name} needs use_beam_search"
            )
            raise InvalidRequestError(cure, param=name)


def _check_token_ids(params: SamplingParams, vocab_size: int | None) -> None:
    if not isinstance(params.stop_token_ids, tuple | list):
        raise InvalidRequestError(
            "stop_token_ids must be a sequence of token ids", param="stop_token_ids"
        )
    if not isinstance(params.logit_bias, dict):
        raise InvalidRequestError(
            "logit_bias must map token ids to numbers from -100 to 100", param="logit_bias"
        )
    limit = MAX_COUNT if vocab_size is None else vocab_size - 1
    for name, ids, most in (
        ("stop_token_ids", params.stop_token_ids, MAX_STOP_TOKEN_IDS),
        ("logit_bias", params.logit_bias, MAX_LOGIT_BIASES),
    ):
        if len(ids) > most:
            raise InvalidRequestError(
                f"{name} may hold at most {most} entries, not {len(ids)}", param=name
            )
        for token_id in ids:
            _check_token_id(name, token_id, limit)
    for value in params.logit_bias.values():
        _check_number("logit_bias", value, -100.0, 100.0)


def _check_token_id(name: str, token_id: object, limit: int) -> None:
    if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id <= limit:
        raise InvalidRequestError(
            f"{name}: token ids of this model are 0 to {limit}, {token_id!r} is none", param=name
        )


def _check_prompt(prompt_ids: Sequence[int], capacity: Capacity) -> None:
    if not prompt_ids:
        raise InvalidRequestError("the prompt is empty; give at least one token", param="prompt")
    if len(prompt_ids) >= capacity.max_model_len:
        return  # refused by its length anyway
    for token_id in prompt_ids:
        _check_token_id("prompt", token_id, capacity.vocab_size - 1)
