"""Log probabilities in the two shapes that OpenAI's API has."""

from __future__ import annotations

from collections.abc import Sequence

from octavo.server.answers import ChatLogprobs, CompletionLogprobs, PositionLogprob, TopLogprob
from octavo.server.ports import Tokenizer
from octavo.types import TokenLogprob

_LEAST = -9999.0
"""Stands for minus infinity, which JSON does not have."""


def chat_logprobs(tokenizer: Tokenizer, positions: Sequence[TokenLogprob]) -> ChatLogprobs:
    """The shape of chat completions."""
    return ChatLogprobs(
        [
            PositionLogprob(
                tokenizer.token_text(p.token_id),
                max(_LEAST, p.logprob),
                list(tokenizer.token_bytes(p.token_id)),
                [
                    TopLogprob(
                        tokenizer.token_text(token_id),
                        max(_LEAST, logprob),
                        list(tokenizer.token_bytes(token_id)),
                    )
                    for token_id, logprob in p.top
                ],
            )
            for p in positions
        ]
    )


def completion_logprobs(
    tokenizer: Tokenizer, positions: Sequence[TokenLogprob], offset: int = 0
) -> CompletionLogprobs:
    """The older shape of text completions.

    Args:
        tokenizer: to name tokens.
        positions: one a token.
        offset: characters of the text before the first of them.
    """
    tokens = [tokenizer.token_text(p.token_id) for p in positions]
    offsets: list[int] = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return CompletionLogprobs(
        text_offset=offsets,
        token_logprobs=[max(_LEAST, p.logprob) for p in positions],
        tokens=tokens,
        top_logprobs=[
            {
                # The sampled token too: it need not be among the alternatives.
                tokenizer.token_text(token_id): max(_LEAST, logprob)
                for token_id, logprob in (*p.top, (p.token_id, p.logprob))
            }
            for p in positions
        ],
    )
