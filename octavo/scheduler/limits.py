"""What a request may ask for: refused at once, with the numbers, if it could never be served."""

from __future__ import annotations

from octavo.errors import ContextLengthError, InvalidRequestError, OverloadedError
from octavo.kv_cache.manager import KVCacheManager
from octavo.scheduler.request import Sequence
from octavo.types import Capacity, EngineRequest

MAX_TOKEN_ID = 2**31 - 1


class RequestLimits:
    """The bounds that the model and the KV pool set to one sequence."""

    def __init__(self, capacity: Capacity, num_rows: int) -> None:
        """Keep the bounds; a step has `num_rows` rows."""
        self._num_rows = num_rows
        self._max_model_len = capacity.max_model_len
        self._num_blocks = capacity.kv_pool.num_blocks
        self._block_size = capacity.kv_pool.block_size

    def max_num_tokens(self, request: EngineRequest) -> int:
        """How long a sequence of the request may become, prompt and output."""
        max_tokens = request.params.max_tokens
        if max_tokens is None:
            return self._max_model_len
        return min(len(request.prompt_ids) + max_tokens, self._max_model_len)

    def check(self, request: EngineRequest) -> None:
        """Raise what is wrong with the request, if anything is.

        Raises:
            InvalidRequestError: no prompt, an impossible token id, or a count below 1.
            ContextLengthError: the model or the KV pool could never hold one of its sequences.
        """
        prompt, params = request.prompt_ids, request.params
        if not prompt:
            raise InvalidRequestError("the prompt has no tokens", param="prompt")
        if min(prompt) < 0 or max(prompt) > MAX_TOKEN_ID:
            raise InvalidRequestError(
                f"token ids must be 0 to {MAX_TOKEN_ID}; the prompt has "
                f"{min(prompt) if min(prompt) < 0 else max(prompt)}",
                param="prompt",
            )
        if params.n < 1:
            raise InvalidRequestError(f"n must be at least 1, not {params.n}", param="n")
        if params.num_sequences < params.n:
            raise InvalidRequestError(
                f"best_of ({params.best_of}) must not be less than n ({params.n})", param="best_of"
            )
        if params.max_tokens is not None and params.max_tokens < 1:
            raise InvalidRequestError(
                f"max_tokens must be at least 1, not {params.max_tokens}", param="max_tokens"
            )
        self._check_length(request)
        if params.use_beam_search:
            self._check_beams(request)

    def _check_beams(self, request: EngineRequest) -> None:
        """All beams of a search advance together, so all must fit at once."""
        width = request.params.num_sequences
        if width > self._num_rows:
            raise InvalidRequestError(
                f"a beam search of width {width} needs as many rows; the server has "
                f"{self._num_rows}: lower best_of or raise --max-num-seqs",
                param="best_of",
            )
        num_shared = len(request.prompt_ids) // self._block_size
        num_own = -(-(self.max_num_tokens(request) - 1) // self._block_size) - num_shared
        num_needed = num_shared + width * num_own
        if num_needed > self._num_blocks:
            raise ContextLengthError(
                f"{width} beams with max_tokens {request.params.max_tokens} need {num_needed} KV "
                f"blocks of {self._block_size} tokens; the pool has {self._num_blocks}: lower "
                "max_tokens or best_of, or give the server more memory",
                param="max_tokens",
            )

    def _check_length(self, request: EngineRequest) -> None:
        num_prompt = len(request.prompt_ids)
        if num_prompt + 1 > self._max_model_len:
            raise ContextLengthError(
                f"the context is {self._max_model_len} tokens long; the prompt has {num_prompt} "
                "and needs room for at least one more: shorten it",
                param="prompt",
            )
        # The last token of an output is sampled but never computed, so it needs no slot.
        num_slots = self.max_num_tokens(request) - 1
        num_needed = -(-num_slots // self._block_size)
        if num_needed > self._num_blocks:
            raise ContextLengthError(
                f"a prompt of {num_prompt} tokens with max_tokens {request.params.max_tokens} "
                f"needs {num_needed} KV blocks of {self._block_size} tokens; the pool has "
                f"{self._num_blocks}: shorten the prompt, lower max_tokens or give the server "
                "more memory",
                param="max_tokens",
            )


def reserve_pin(cache: KVCacheManager, seq: Sequence, now: float) -> tuple[bytes, ...]:
    """Set room aside to pin the prompt of a new sequence, or raise and change nothing.

    Returns:
        The names of its blocks.

    Raises:
        InvalidRequestError: nothing is cached, or the prompt is longer than all that may be pinned.
        OverloadedError: other prompts are pinned; some may have ended when the client comes back.
    """
    if not cache.use_prefix_cache:
        raise InvalidRequestError(
            "there is no prefix cache to keep the prompt in: leave cache_pin_s out or start the "
            "server without --no-prefix-cache",
            param="cache_pin_s",
        )
    num_blocks = len(seq.token_ids) // cache.block_size
    if num_blocks > cache.max_pinned_blocks:
        raise InvalidRequestError(
            f"the prompt fills {num_blocks} KV blocks, and at most {cache.max_pinned_blocks} of "
            f"{cache.num_blocks} may be pinned: leave cache_pin_s out, shorten the prompt or give "
            "the server more memory",
            param="cache_pin_s",
        )
    cache.end_pins(now)
    names = cache.reserve_pin(seq.table, seq.token_ids)
    if names is None:
        end = cache.first_pin_end
        raise OverloadedError(
            f"the prompt fills {num_blocks} KV blocks, and of the {cache.max_pinned_blocks} that "
            f"may be pinned {cache.num_pinned_blocks} are, or are asked for by requests that have "
            "not ended: try again later or leave cache_pin_s out",
            retry_after_s=1.0 if end is None else max(1.0, end - now),
            code="cache_pins_full",
        )
    return names
