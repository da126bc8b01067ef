"""What a request may ask for: refused at once, with the numbers, if it could never be served."""

from __future__ import annotations

from octavo.errors import ContextLengthError, InvalidRequestError
from octavo.types import Capacity, EngineRequest

MAX_TOKEN_ID = 2**31 - 1


class RequestLimits:
    """The bounds that the model and the KV pool set to one sequence."""

    def __init__(self, capacity: Capacity) -> None:
        """Keep the bounds."""
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
        if params.max_tokens is not None and params.max_tokens < 1:
            raise InvalidRequestError(
                f"max_tokens must be at least 1, not {params.max_tokens}", param="max_tokens"
            )
        self._check_length(request)

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
