"""Detokenizer: token ids that arrive a few at a time become text that never has to be taken back.

It works on bytes: each token's bytes go through an incremental UTF-8 decoder that holds back an
unfinished character. Time and memory per token do not grow with the text. Knows nothing of requests
or stop strings.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # an engine is launched before the tokenizers library is imported
    from octavo.tokenizer.tokenizer import Tokenizer


class Detokenizer:
    """Turns the ids of one sequence into text, bit by bit.

    All pushes and `finish` joined are `Tokenizer.decode` of all ids (of a text that is no
    continuation).

    Bytes become U+FFFD only when no continuation can make them valid UTF-8.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        *,
        is_continuation: bool = False,
    ) -> None:
        """Start a text.

        Args:
            tokenizer: the model's.
            skip_special_tokens: leave special tokens out.
            is_continuation: the text goes on after a prompt: keep the leading space that `decode`
                takes away for SentencePiece models, where an answer's first token may carry the
                space between two words.
        """
        self._token_bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._drops_space = tokenizer.strips_leading_space and not is_continuation

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete."""
        skipped = self._skipped
        pieces = [self._token_bytes(token_id) for token_id in ids if token_id not in skipped]
        return self._begin(self._decoder.decode(b"".join(pieces)))

    def finish(self) -> str:
        """The text still held back, its unfinished character as U+FFFD."""
        return self._begin(self._decoder.decode(b"", final=True))

    def _begin(self, text: str) -> str:
        """Take the space that encoding put before the text from its beginning."""
        if not self._drops_space or not text:
            return text
        self._drops_space = False
        return text[1:] if text[0] == " " else text
