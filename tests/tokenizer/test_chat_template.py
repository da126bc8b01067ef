"""Chat templates: rendering as transformers does it, and what users write staying text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from octavo.errors import InvalidRequestError, ModelFileError
from octavo.tokenizer.chat_template import ChatTemplate
from octavo.tokenizer.tokenizer import Tokenizer
from octavo.types import Span

SPECIALS = {
    text: place
    for place, text in enumerate(
        [
            *("<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>"),
            *("<|end_header_id|>", "<|eot_id|>", "<s>", "</s>", "[INST]", "[/INST]", "<|"),
        ]
    )
}
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = (
    "{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
    "{% endif %}\n"
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' ~ '\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
HEADERS = """{{ bos_token }}
{%- for message in messages %}
    {%- set header = '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>' %}
    {{- header ~ '\n\n' ~ message['content'] | trim ~ '<|eot_id|>' }}
{%- endfor %}
{% if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{% endif %}
"""
INSTRUCTIONS = """{% if messages[0]['role'] == 'system' -%}
  {% set system, rest = messages[0]['content'] ~ '\n\n', messages[1:] %}
{%- else -%}
  {% set system, rest = '', messages %}
{%- endif -%}
{{ bos_token }}
{%- for message in rest %}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('roles must alternate between user and assistant') }}
  {%- endif %}
  {%- if message['role'] == 'user' %}
    {{- '[INST] ' ~ (system if loop.first else '') ~ message['content'].strip() ~ ' [/INST]' }}
  {%- else %}
    {{- ' ' ~ message['content'].strip() ~ eos_token }}
  {%- endif %}
{%- endfor %}"""
PROGRAM = """{% macro show(message) %}
{{ message.role | upper }}: {{ message.content }}
{% endmacro %}
{% set ns = namespace(count=0, text='') %}
{% for message in messages if message.content is string %}
    {% if loop.index > 50 %}{% break %}{% endif %}
    {% set ns.count = ns.count + (message.content | length) %}
    {% set ns.text = ns.text + '%s|' % message.role %}
    {% generation %}{{ show(message) }}{% endgeneration %}
{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}
    {%- for word in message.content.split() %}
{{ loop.cycle('a', 'b') }}{{ word | tojson }}{% endfor %}
{% endfor %}
{{ ns.count }} {{ ns.text }} {{ messages | map(attribute='role') | join(', ') }}
{{ {'é': ['<', 1.5, none, true]} | tojson(indent=2) }} {{ range(3) | list }} {{ tools }}
{{ nothing }}
{{ ['x'] * 3 + ['y'] }} {{ 'ab' * 2 }} {{ 2 ** 5 }} {{ 7 % 4 }} {{ '%02d' | format(7) }}
{{ 'a-b' | replace('-', '+') }} {{ 'x'.rjust(3) }} {{ '{} {}'.format(1, 'two') }}
{{ 'l1\nl2' | indent }} {{ ['b', 'a'] | sort | first }} {{ {'k': 1}.items() | list }}"""
TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "instructions": INSTRUCTIONS, "program": PROGRAM}

CONVERSATION = [
    {"role": "system", "content": "Answer in verse.\n"},
    {"role": "user", "content": "  What is <b>this</b> & that? 你好 🙂 \n"},
    {"role": "assistant", "content": 'A riddle\'s "end", a hat.'},
    {"role": "user", "content": "> quoted\n\n  and more"},
]


def template(name: str) -> ChatTemplate:
    return ChatTemplate(TEMPLATES[name], SPECIALS, VARIABLES)


def joined(spans: list[Span]) -> str:
    return "".join(span.text for span in spans)


def as_transformers(source: str, messages: list[dict[str, Any]], prompt: bool) -> str:
    rendered, _ = render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=prompt, **VARIABLES
    )
    return str(rendered[0])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("messages", [CONVERSATION, CONVERSATION[1:], CONVERSATION[1:2]])
def test_renders_like_transformers(name: str, prompt: bool, messages: list[dict[str, Any]]) -> None:
    spans = template(name).render(messages, add_generation_prompt=prompt)
    assert joined(spans) == as_transformers(TEMPLATES[name], messages, prompt)
    assert all(span.is_template for span in spans)


@pytest.mark.parametrize("prompt", [True, False])
def test_default_model_renders_like_transformers(smollm2: Tokenizer, prompt: bool) -> None:
    assert smollm2.chat_template is not None
    for messages in (CONVERSATION, CONVERSATION[1:]):
        spans = smollm2.chat_template.render(messages, add_generation_prompt=prompt)
        text = as_transformers(smollm2.chat_template.source, messages, prompt)
        assert joined(spans) == text
        ids = smollm2.encode(text, add_special_tokens=False, parse_special=True)
        assert smollm2.encode_spans(spans) == ids


def test_special_tokens_of_users_are_spans_of_their_own() -> None:
    messages = [{"role": "user", "content": "say <|im_end|> twice: <|im_end|>"}]
    spans = template("chatml").render(messages)
    assert joined(spans) == as_transformers(CHATML, messages, True)
    assert [span.text for span in spans if not span.is_template] == ["<|im_end|>"] * 2


@pytest.mark.parametrize("end", ["<", "<|", "<|im_", "<|im_end|", "<|im_end  \n"])
def test_a_token_cannot_be_completed_by_what_follows(end: str) -> None:
    source = "{% for m in messages %}{{ m.content | trim }}{% endfor %}"
    messages = [
        {"role": "user", "content": end},
        {"role": "user", "content": "<|im_end|>"[len(end.strip()) :]},
    ]
    spans = ChatTemplate(source, {"<|im_end|>": 1}, {}).render(messages)
    assert joined(spans) == "<|im_end|>"
    assert not any("<|im_end|>" in span.text for span in spans if span.is_template)


FRAGMENTS = [*SPECIALS, "<|im_", "end|>", "<", "|>", ">", "</", "s>", "[", "INST]", "x", " ", "\n"]


@settings(max_examples=200, deadline=None)
@given(
    contents=st.lists(
        st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join), min_size=1, max_size=4
    ),
    name=st.sampled_from(["chatml", "headers", "instructions"]),
    character=st.sampled_from(["", "\U00100000", "\U00100001é"]),
)
def test_users_never_add_a_special_token(
    smollm2: Tokenizer, contents: list[str], name: str, character: str
) -> None:
    specials = {text: smollm2.vocab_size + place for place, text in enumerate(SPECIALS)}
    tokenizer = _with_specials(smollm2, specials)
    one = ChatTemplate(TEMPLATES[name], specials, VARIABLES)
    roles = ["user", "assistant"] * 2

    def conversation(texts: list[str]) -> list[dict[str, Any]]:
        return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]

    mine = one.render(conversation([text + character for text in contents]))
    harmless = one.render(conversation(["x"] * len(contents)))
    assert joined(mine) == as_transformers(
        TEMPLATES[name], conversation([text + character for text in contents]), True
    )
    assert _specials_in(tokenizer, mine) == _specials_in(tokenizer, harmless)


def _with_specials(tokenizer: Tokenizer, specials: dict[str, int]) -> Tokenizer:
    """The same vocabulary with other special tokens."""
    vocabulary = tokenizer._vocabulary
    return Tokenizer(
        type(vocabulary)(
            plain=vocabulary.plain, pieces=vocabulary.pieces, specials=specials, size=10**6
        )
    )


def _specials_in(tokenizer: Tokenizer, spans: list[Span]) -> list[int]:
    return [i for i in tokenizer.encode_spans(spans) if i in tokenizer.special_ids]


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    spans = template("chatml").render([{"role": "user", "content": parts}])
    assert joined(spans) == joined(
        template("chatml").render([{"role": "user", "content": "one\ntwo"}])
    )


def test_other_parts_are_refused() -> None:
    part = {"type": "image_url", "image_url": {"url": "data:,"}}
    with pytest.raises(InvalidRequestError, match="text only") as refusal:
        template("chatml").render([{"role": "user", "content": [part]}])
    assert refusal.value.param == "messages"


def test_special_tokens_are_found_in_every_string_a_template_sees() -> None:
    source = "{{ tools | tojson }}{{ messages[0].name }}{{ extra }}"
    spans = ChatTemplate(source, SPECIALS, {}).render(
        [{"role": "user", "content": "", "name": "<s>"}],
        tools=[{"</s>": {"a": ["[INST]"]}}],
        extra="<|eot_id|>",
    )
    assert joined(spans) == '[{"</s>": {"a": ["[INST]"]}}]<s><|eot_id|>'
    users = [span.text for span in spans if not span.is_template]
    assert users == ["</s>", "[INST]", "<s>", "<|eot_id|>"]


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("{{ raise_exception('no system role, please') }}", "no system role, please"),
        ("{{ messages[7].content.title() }}", "misses something"),
        ("{{ messages[0]['content'] + 1 }}", "fails on the messages"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails on the messages"),
        ("{{ (1).__class__.__mro__ }}", "refuses the messages"),
    ],
)
def test_a_failing_template_is_the_requests_fault(source: str, cause: str) -> None:
    with pytest.raises(InvalidRequestError, match=cause) as refusal:
        ChatTemplate(source, SPECIALS, {}).render([{"role": "user", "content": "x"}])
    assert refusal.value.param == "messages"


def test_a_broken_template_is_the_models_fault() -> None:
    with pytest.raises(ModelFileError, match="not valid Jinja"):
        ChatTemplate("{% for x in %}", SPECIALS, {})
