"""From token ids to the bytes that they stand for, without state: one token at a time.

A token's bytes need not be whole characters; `detokenizer` puts them together. Kinds of
vocabularies: byte-level (each character of a token's text is one byte) and sentencepiece (▁ is a
space, `<0xHH>` one byte).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import tokenizers

PieceKind = Literal["byte_level", "sentencepiece"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """The 256 characters of byte-level vocabularies and the byte that each stands for.

    Bytes that are printable in Latin-1 stand for themselves; the others, in order, for U+0100 and
    following.
    Source: Radford et al. 2019 (GPT-2), the released encoder.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shown = set(printable)
    hidden = [byte for byte in range(256) if byte not in shown]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + index): byte for index, byte in enumerate(hidden)})
    return table


class Pieces:
    """The bytes of each token of one vocabulary.

    Attributes:
        strips_leading_space: a text that begins with these tokens loses one leading space (it was
            put there on encoding).
    """

    def __init__(
        self,
        kind: PieceKind,
        vocabulary: tokenizers.Tokenizer,
        literal: Mapping[int, bytes],
        *,
        strips_leading_space: bool = False,
    ) -> None:
        """Keep the vocabulary for looking tokens up; `literal` wins over it."""
        self.strips_leading_space = strips_leading_space
        self._kind = kind
        self._vocabulary = vocabulary
        self._literal = dict(literal)
        self._alphabet = byte_alphabet() if kind == "byte_level" else {}

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text; b"" for an unknown id."""
        known = self._literal.get(token_id)
        if known is not None:
            return known
        text = self._vocabulary.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        if text is None:
            return b""
        if self._kind == "byte_level":
            alphabet = self._alphabet
            try:
                return bytes([alphabet[character] for character in text])
            except KeyError:
                return text.encode()
        byte = _BYTE_TOKEN.fullmatch(text)
        return bytes([int(byte[1], 16)]) if byte else text.replace("▁", " ").encode()
