"""Tokenizer: one model's text to token ids and back, the same for GGUF files and folders.

Special tokens are found here, not by the library: the inner tokenizer does not know them, so that
text which only looks like one stays text. Knows nothing of files; `load` builds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import tokenizers

from octavo.tokenizer.chat_template import ChatTemplate
from octavo.tokenizer.pieces import Pieces
from octavo.tokenizer.special import SpecialMatcher
from octavo.types import Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What a tokenizer is made of.

    Attributes:
        plain: encodes text in which no special token is recognised.
        continued: as plain, for text that follows a special token; None if there is no difference.
        whole: encodes text with special tokens in it as one, if the file describes such; else
            `specials` cut the text.
        pieces: the bytes of each token.
        specials: special tokens by their text.
        stripping: ids of special tokens that swallow the spaces (before them, after them).
        size: one more than the greatest id.
        prefix_ids: put before each text when special tokens are added.
        suffix_ids: put after it.
        bos_token_id: the id that begins a text, if the model has one.
        eos_token_ids: ids that end an answer.
    """

    plain: tokenizers.Tokenizer
    pieces: Pieces
    specials: Mapping[str, int]
    size: int
    continued: tokenizers.Tokenizer | None = None
    whole: tokenizers.Tokenizer | None = None
    stripping: Mapping[int, tuple[bool, bool]] = field(default_factory=dict)
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: frozenset[int] = frozenset()


class Tokenizer:
    """Encodes and decodes the text of one model; safe to use from many threads.

    Attributes:
        vocab_size: one more than the greatest token id.
        special_ids: tokens that steer the model and are no text; left out of texts unless asked
            for.
        eos_token_ids: tokens that end an answer.
        bos_token_id: the token that begins a text, if any.
        chat_template: how messages become a prompt; None if the model brings none.
    """

    def __init__(self, vocabulary: Vocabulary, chat_template: ChatTemplate | None = None) -> None:
        """Wrap a vocabulary; `load.load_tokenizer` makes one from a model's files."""
        self.chat_template = chat_template
        self.vocab_size = vocabulary.size
        self.special_ids = frozenset(vocabulary.specials.values())
        self.eos_token_ids = vocabulary.eos_token_ids
        self.bos_token_id = vocabulary.bos_token_id
        self._vocabulary = vocabulary
        self._pieces = vocabulary.pieces
        self._specials = SpecialMatcher(vocabulary.specials)

    @property
    def strips_leading_space(self) -> bool:
        """True if decoding takes away the space that encoding put before a text (SentencePiece)."""
        return self._pieces.strips_leading_space

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Encode a text.

        Args:
            text: any string; lone surrogates become U+FFFD.
            add_special_tokens: put the model's own beginning and end around it, such as `<s>`.
            parse_special: recognise special tokens written in the text.
        """
        ids = self.encode_spans((Span(text, parse_special),))
        if add_special_tokens:
            return [*self._vocabulary.prefix_ids, *ids, *self._vocabulary.suffix_ids]
        return ids

    def encode_spans(self, spans: Sequence[Span]) -> list[int]:
        """Encode a rendered prompt; adds nothing before or after it.

        Special tokens are recognised only inside the template's spans. All text between two of them
        is encoded as one, whoever wrote it: a prompt whose user typed no special token gets the ids
        of the whole string.
        """
        whole = self._vocabulary.whole
        if whole is not None and all(span.is_template for span in spans):
            text = well_formed("".join(span.text for span in spans))
            return encode_freely(whole, text)
        ids: list[int] = []
        parts = self._cut(spans)
        for index, part in enumerate(parts):
            if isinstance(part, int):
                ids.append(part)
                continue
            if index > 0 and self._strips(parts[index - 1])[1]:
                part = part.lstrip()
            if index + 1 < len(parts) and self._strips(parts[index + 1])[0]:
                part = part.rstrip()
            continued = self._vocabulary.continued if index > 0 else None
            ids += encode_freely(continued or self._vocabulary.plain, part)
        return ids

    def _cut(self, spans: Sequence[Span]) -> list[str | int]:
        """The special tokens of the template's spans as ids; all text between two as one string."""
        parts: list[str | int] = []
        run: list[str] = []
        for span in merge_spans(spans):
            position = 0
            for start, end, token_id in self._specials.find(span.text) if span.is_template else ():
                run.append(span.text[position:start])
                parts += [text for text in ("".join(run),) if text]
                parts.append(token_id)
                run = []
                position = end
            run.append(span.text[position:])
        return parts + [text for text in ("".join(run),) if text]

    def _strips(self, part: str | int) -> tuple[bool, bool]:
        """Whether a special token swallows the spaces before and after it."""
        if isinstance(part, int):
            return self._vocabulary.stripping.get(part, (False, False))
        return False, False

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD. Takes any integers."""
        text = b"".join(map(self._pieces.bytes_of, self._shown(ids, skip_special_tokens)))
        decoded = text.decode("utf-8", "replace")
        return decoded[1:] if self.strips_leading_space and decoded[:1] == " " else decoded

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; b"" for an unknown id."""
        return self._pieces.bytes_of(token_id)

    def token_text(self, token_id: int) -> str:
        """A token's bytes as text; those that are no whole characters become U+FFFD."""
        return self._pieces.bytes_of(token_id).decode("utf-8", "replace")

    def _shown(self, ids: Iterable[int], skip_special_tokens: bool) -> Iterable[int]:
        """The ids whose bytes belong to a text."""
        if not skip_special_tokens:
            return ids
        return (token_id for token_id in ids if token_id not in self.special_ids)


def encode_freely(encoder: tokenizers.Tokenizer, text: str) -> list[int]:
    """The ids of a text, computed without Python's lock: other threads run meanwhile.

    `Tokenizer.encode` would hold the lock, 0.3 s for 400 kB; the batch calls release it.
    """
    ids: list[int] = encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return ids


def well_formed(text: str) -> str:
    """The text with lone surrogates, which have no UTF-8, replaced by U+FFFD; pairs are joined."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def merge_spans(spans: Iterable[Span]) -> list[Span]:
    """The spans, well formed: neighbours of a kind joined, empty ones dropped."""
    merged: list[tuple[bool, list[str]]] = []
    for span in spans:
        if not span.text:
            continue
        if not merged or merged[-1][0] != span.is_template:
            merged.append((span.is_template, []))
        merged[-1][1].append(span.text)
    return [Span(well_formed("".join(texts)), is_template) for is_template, texts in merged]
