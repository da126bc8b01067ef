"""ChatTemplate: messages become the prompt that a model knows, the user's words kept apart.

A template is a program that came with the model; it runs in `sandbox`. What users write never
becomes a special token: texts of special tokens inside their strings are hidden behind single
private characters while the template runs, and come back as spans that are not the template's.
Knows nothing of token ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2

from octavo.errors import InvalidRequestError, ModelFileError
from octavo.tokenizer.sandbox import BoundedEnvironment, TemplateLimitError
from octavo.tokenizer.special import SpecialMatcher
from octavo.types import Span

_PRIVATE = range(0x10_0000, 0x10_FFFE)


class ChatTemplate:
    """One model's template, compiled.

    Rendering takes at most 1 s, a million steps and 8 MiB of output (`sandbox` says what is
    counted).

    Attributes:
        source: the template as the model brings it.
    """

    def __init__(
        self, source: str, special_texts: Mapping[str, int], variables: Mapping[str, str]
    ) -> None:
        """Compile a template.

        Args:
            source: Jinja.
            special_texts: special tokens by their text.
            variables: what the template may name, such as `bos_token`.

        Raises:
            ModelFileError: the source is no template.
        """
        self.source = source
        self._matcher = SpecialMatcher(special_texts)
        self._variables = dict(variables)
        self._environment = BoundedEnvironment()
        try:
            self._template = self._environment.compile_bounded(source)
        except (jinja2.TemplateError, RecursionError) as fault:
            raise ModelFileError(
                f"the model's chat template is not valid Jinja: {fault}"
            ) from fault

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        **kwargs: object,
    ) -> list[Span]:
        """The prompt of a conversation.

        All strings in `messages` and `kwargs` count as the user's. A special token whose text
        stands in one of them, or could be completed from the end of one by what follows it, becomes
        a span with `is_template` false; the rest of the prompt, ordinary user text included, is the
        template's. `role` is compared by templates and often part of a special token, so callers
        must allow known roles only.

        Args:
            messages: role and content each; a content of several text parts is joined with
                newlines.
            add_generation_prompt: end with the beginning of the assistant's answer.
            kwargs: passed on to the template, such as `tools`.

        Raises:
            InvalidRequestError: the template refuses the messages, fails on them or goes past its
                limits.
        """
        conversation = [_flatten(message) for message in messages]
        hidden = _Hidden(self._matcher, self.source, conversation, kwargs)
        variables = {
            **self._variables,
            "tools": None,
            "documents": None,
            **hidden.hide(kwargs),
            "messages": hidden.hide(conversation),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._environment.render_bounded(self._template, variables)
        except TemplateLimitError as fault:
            raise InvalidRequestError(str(fault), param="messages") from None
        except jinja2.UndefinedError as fault:
            message = f"the model's chat template misses something in the messages: {fault}"
            raise InvalidRequestError(message, param="messages") from None
        except jinja2.TemplateError as fault:
            message = f"the model's chat template refuses the messages: {fault}"
            raise InvalidRequestError(message, param="messages") from None
        except Exception as fault:  # a template is a program: it can fail in any way
            message = f"the model's chat template fails on the messages: {fault}"
            raise InvalidRequestError(message, param="messages") from fault
        return hidden.reveal(text)


class _Hidden:
    """Special tokens' texts in the inputs, hidden behind private characters that occur in none."""

    def __init__(self, matcher: SpecialMatcher, *inputs: object) -> None:
        self._matcher = matcher
        self._inputs = inputs
        self._marks: dict[str, str] = {}
        self._free: Iterator[str] | None = None

    def hide(self, value: Any) -> Any:
        """A copy of plain data with every string, keys included, free of special tokens."""
        if isinstance(value, str):
            return self._hide_text(value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(entry) for entry in value]
        return value

    def reveal(self, text: str) -> list[Span]:
        """Cut a rendered text at the marks and put back what they stand for."""
        if not self._marks:
            return [Span(text, True)] if text else []
        originals = {mark: original for original, mark in self._marks.items()}
        pieces = re.split(f"([{''.join(originals)}])", text)
        return [
            Span(originals.get(piece, piece), piece not in originals) for piece in pieces if piece
        ]

    def _hide_text(self, text: str) -> str:
        pieces = []
        position = 0
        for start, end, _ in self._matcher.find(text):
            pieces += [text[position:start], self._mark(text[start:end])]
            position = end
        rest = text[position:]
        visible = rest.rstrip()  # templates often trim
        dangling = self._matcher.dangling_start(visible)
        if dangling is not None:
            rest = rest[:dangling] + self._mark(visible[dangling:]) + rest[len(visible) :]
        return "".join([*pieces, rest]) if pieces or dangling is not None else text

    def _mark(self, original: str) -> str:
        """The character that stands for a text."""
        mark = self._marks.get(original)
        if mark is None:
            if self._free is None:
                used = set().union(*_strings(self._inputs))
                self._free = (chr(code) for code in _PRIVATE if chr(code) not in used)
            mark = next(self._free, None)
            if mark is None:
                message = "the messages use every private character of Unicode"
                raise InvalidRequestError(message, param="messages")
            self._marks[original] = mark
        return mark


def _strings(value: object) -> Iterator[str]:
    """Every string in plain data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _strings(key)
            yield from _strings(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _strings(entry)


def _flatten(message: Mapping[str, object]) -> dict[str, object]:
    """The message with a content of text parts joined into one string."""
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return dict(message)
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        is_text = not isinstance(part, Mapping) or part.get("type", "text") == "text"
        if not is_text or not isinstance(text, str):
            message_text = "this model takes text only: a content part must be of type 'text'"
            raise InvalidRequestError(message_text, param="messages")
        texts.append(text)
    return {**message, "content": "\n".join(texts)}
