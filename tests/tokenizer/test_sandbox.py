"""Templates as attackers: out of the sandbox, without end, beyond memory."""

from __future__ import annotations

import time

import jinja2
import pytest

from octavo.tokenizer.sandbox import BoundedEnvironment, TemplateLimitError

ENVIRONMENT = BoundedEnvironment()


def render(source: str, **variables: object) -> str:
    return ENVIRONMENT.render_bounded(ENVIRONMENT.compile_bounded(source), variables)


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ '{0.__class__}'|format('') }}",
    "{{ ['']|map(attribute='__class__')|list }}",
    "{{ [x]|map('attr', '__class__')|list }}",
    "{{ x.append(1) }}",
    "{{ d.update(a=1) }}",
    "{{ d.clear() }}",
    "{% set d.a = 1 %}",
    "{% import 'os' as os %}",
    "{% include '/etc/passwd' %}",
    "{% extends 'x' %}",
    "{{ config }}{{ request }}{{ get_flashed_messages.__globals__ }}",
    "{{ (x for x in x).gi_frame }}",
    "{{ loop.__init__ }}",
    "{{ lipsum(n=10) }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_nothing_leads_out_of_the_sandbox(source: str) -> None:
    """Every one is refused, or gives nothing of Python's."""
    x: list[int] = []
    d: dict[str, int] = {}
    try:
        text = render(source, x=x, d=d)
    except Exception as refusal:
        assert isinstance(refusal, jinja2.TemplateError | TypeError | ValueError), refusal
    else:
        assert not any(word in text for word in ("class", "module", "function", "built-in", "root"))
    assert x == [] and d == {}


BOMBS = [
    "{% for a in range(1000) %}{% for b in range(1000) %}{% for c in range(1000) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "{{ range(10 ** 9) | list }}",
    "{% for a in range(100001) %}{% endfor %}",
    "{{ 'a' * 10 ** 9 }}",
    "{{ ['a'] * 10 ** 9 }}",
    "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}"
    "{% endfor %}",
    "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}",
    "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}"
    "{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}"
    "{% set ns.x = '{0}{0}'.format(ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
    "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}"
    "{% set ns.x = ''.join([ns.x, ns.x]) %}{% endfor %}",
    "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x | replace('a', 'aaaa') %}{% endfor %}",
    "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x.replace('a', 'aaaa') %}{% endfor %}",
    "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}"
    "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}"
    "{% endfor %}",
    "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% endfor %}{{ ns.x | tojson }}",
    "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% endfor %}{{ [ns.x] | map('string') | list }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% for i in range(100000) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' }}{% endfor %}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '%999999999d' | format(1) }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 999999999) }}",
    "{{ 'x'.ljust(10 ** 9) }}",
    "{{ 'x'.center(10 ** 9) }}",
    "{{ '\\t'.expandtabs(10 ** 9) }}",
    "{{ 'x'.zfill(10 ** 9) }}",
    "{{ 'x' | center(10 ** 9) }}",
    "{{ 'x\\ny' | indent(10 ** 9) }}",
    "{{ [[1]] | tojson(indent=10 ** 9) }}",
    "{{ [1] | batch(10 ** 9, 'x') | list }}",
    "{{ [1] | slice(10 ** 9) | list }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ 'abc'.translate({97: 'x' }) }}",
    "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
]


@pytest.mark.parametrize("source", BOMBS)
def test_bombs_are_stopped_early(source: str) -> None:
    start = time.monotonic()
    with pytest.raises(jinja2.TemplateError):
        render(source)
    assert time.monotonic() - start < 5  # limits are 1 s and 64 Mi characters; machines are busy


def test_limits_leave_room_for_long_conversations() -> None:
    source = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '\n' }}{% endfor %}"
    messages = [{"role": "user", "content": "x" * 2000} for _ in range(1000)]
    assert len(render(source, messages=messages)) == 1000 * 2007


def test_a_limit_names_itself() -> None:
    with pytest.raises(TemplateLimitError, match="range is limited to 100000"):
        render("{{ range(100001) }}")
    with pytest.raises(TemplateLimitError, match="puts out more than 8388608 characters"):
        render("{{ x }}{{ x }}", x="a" * (5 << 20))


def test_the_budget_is_not_to_be_had() -> None:
    assert render("{{ budget }}{% set budget = 1 %}{{ budget }}") == "1"
