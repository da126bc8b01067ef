"""Running a template that came with a model as untrusted code: bounded work, bounded output.

jinja2's immutable sandbox keeps a template away from the interpreter; here each rendering also gets
a budget of steps, characters and time. Every loop counts its rounds and every call counts as a
step; what can make a great string or list of a small one is measured before it runs. A single
operation on values within the budget is not interrupted, so a server renders in a worker thread.
Knows nothing of chat.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.filters import do_indent
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_OUTPUT_CHARS = 8 << 20
MAX_BUILT_CHARS = 64 << 20
MAX_STEPS = 1_000_000
MAX_RANGE = 100_000
MAX_SECONDS = 1.0
MAX_WIDTH = 1000

# What a value that is no string counts for: no number and no pair of brackets is longer.
_ENTRY_CHARS = 64

# No template can name this variable: it is no identifier.
_BUDGET = "budget of this rendering"
_COUNTED, _JOINED, _MEASURED = "counted rounds", "joined texts", "measured value"

_REMOVED_GLOBALS = ("lipsum", "cycler", "joiner")
_REMOVED_FILTERS = (
    *("batch", "center", "pprint", "random", "slice", "sum", "urlize", "wordwrap", "xmlattr"),
)
# Filters that make a string of whatever they are given.
_TEXT_FILTERS = frozenset(
    {
        *("capitalize", "e", "escape", "forceescape", "format", "indent", "join", "lower"),
        *("replace", "safe", "string", "striptags", "title", "tojson", "trim", "truncate"),
        *("upper", "urlencode", "wordcount"),
    }
)
_PADDING_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})
_WIDE_FIELD = re.compile(r"\d{4}|\{[^{}]*\{|%[^a-zA-Z%]*\*")


class TemplateLimitError(jinja2.TemplateError):
    """A template went past its budget."""


class Budget:
    """What one rendering may still spend."""

    def __init__(self) -> None:
        """Start the clock."""
        self._num_steps = MAX_STEPS
        self._num_chars = MAX_BUILT_CHARS
        self._deadline = time.monotonic() + MAX_SECONDS

    def step(self) -> None:
        """Count one round of a loop or one call."""
        self._num_steps -= 1
        if self._num_steps < 0:
            raise TemplateLimitError(f"the chat template takes more than {MAX_STEPS} steps")
        if time.monotonic() > self._deadline:
            raise TemplateLimitError(f"the chat template takes more than {MAX_SECONDS:g} s")

    def build(self, num_chars: int) -> None:
        """Count characters, or entries of a list, that an operation makes."""
        self._num_chars -= num_chars
        if self._num_chars < 0:
            raise TemplateLimitError(
                f"the chat template builds more than {MAX_BUILT_CHARS} characters"
            )

    def measure(self, value: object) -> int:
        """The rough length of a value as text, counted while measured: nesting cannot explode."""
        if isinstance(value, str):
            self.build(len(value))
            return len(value)
        self.build(_ENTRY_CHARS)
        if isinstance(value, Mapping):
            self.step()
            entries = sum(self.measure(key) + self.measure(value[key]) for key in value)
            return _ENTRY_CHARS + entries
        if isinstance(value, list | tuple | set):
            self.step()
            return _ENTRY_CHARS + sum(map(self.measure, value))
        return _ENTRY_CHARS


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of chat templates: rules and names as transformers has them, and a budget."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        """Set the environment up; one serves any number of templates and threads."""
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", GenerationBlock],
            finalize=_finalize,
        )
        for name in _REMOVED_GLOBALS:
            del self.globals[name]
        for name in _REMOVED_FILTERS:
            del self.filters[name]
        self.globals.update(
            range=_bounded_range, raise_exception=_raise_exception, strftime_now=_strftime_now
        )
        self.filters.update(tojson=_tojson, indent=_indent, join=_join, replace=_replace)
        self.filters.update(format=_format, trim=_trim)
        self.filters.update({_COUNTED: _counted, _JOINED: _joined, _MEASURED: _measured})

    def compile_bounded(self, source: str) -> jinja2.Template:
        """Compile a template, its loops counted and its texts measured.

        Raises:
            jinja2.TemplateSyntaxError: the source is no template.
        """
        tree: nodes.Template = _Counting().visit(self.parse(source))
        return self.from_string(tree)

    def render_bounded(self, template: jinja2.Template, variables: Mapping[str, object]) -> str:
        """Render within a fresh budget.

        Raises:
            jinja2.TemplateError: the template failed, refused its input or went past its budget.
        """
        pieces: list[str] = []
        num_chars = 0
        for piece in template.generate({**variables, _BUDGET: Budget()}):
            pieces.append(piece)
            num_chars += len(piece)
            if num_chars > MAX_OUTPUT_CHARS:
                raise TemplateLimitError(
                    f"the chat template puts out more than {MAX_OUTPUT_CHARS} characters"
                )
        return "".join(pieces)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Count a call, and measure methods of strings that can build a great one."""
        budget = _budget_of(__context)
        budget.step()
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            _check_method(budget, owner, method.__name__, [*args, *kwargs.values()])
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Measure operators that can build a great value."""
        budget = _budget_of(context)
        if operator == "+":
            if isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
                budget.build(len(left) + len(right))
        elif operator == "%" and isinstance(left, str):
            _check_fields(budget, left, right)
        elif operator != "%":
            _check_product(budget, operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call_filter(self, name: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        """Count and measure filters that other filters apply, as `map` does."""
        context = kwargs.get("context") or (args[2] if len(args) > 2 else None)
        if isinstance(context, Context):
            budget = _budget_of(context)
            budget.step()
            if name in _TEXT_FILTERS:
                budget.measure(value)
        return super().call_filter(name, value, *args, **kwargs)


class GenerationBlock(Extension):
    """`{% generation %}` marks the model's words, for training; here its body is put out as is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body alone."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Counting(NodeTransformer):
    """Puts the budget's filters around loops, joins and what becomes text."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.iter = _filtered(node.iter, _COUNTED)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), _JOINED)

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if node.name in _TEXT_FILTERS and node.node is not None:
            node.node = _filtered(node.node, _MEASURED)
        return node


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    """The node's value through a filter of ours."""
    wrapped = nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
    wrapped.set_environment(node.environment) if node.environment else None
    return wrapped


def _budget_of(context: Context) -> Budget:
    """The budget of the rendering that this context belongs to."""
    budget: Budget = context.parent[_BUDGET]
    return budget


@jinja2.pass_context
def _finalize(context: Context, value: object) -> object:
    """Count what an expression puts out, into the answer or into a block that is captured."""
    _budget_of(context).measure(value)
    return value


@jinja2.pass_context
def _counted(context: Context, values: Iterable[Any]) -> Iterator[Any]:
    """The values, each counted as a step."""
    budget = _budget_of(context)
    for value in values:
        budget.step()
        yield value


@jinja2.pass_context
def _joined(context: Context, values: list[object]) -> str:
    """`a ~ b`."""
    _budget_of(context).measure(values)
    return "".join(map(str, values))


@jinja2.pass_context
def _measured(context: Context, value: object) -> object:
    """The value, counted."""
    _budget_of(context).measure(value)
    return value


@jinja2.pass_context
def _join(context: Context, value: Iterable[Any], d: object = "", attribute: Any = None) -> str:
    """`values|join(", ", attribute="name")`."""
    values = list(value)
    if attribute is not None:
        values = list(
            context.environment.call_filter(
                "map", values, kwargs={"attribute": attribute}, context=context
            )
        )
    budget = _budget_of(context)
    separator = str(d)
    budget.measure(values)
    budget.build(len(separator) * len(values))
    return separator.join(map(str, values))


@jinja2.pass_context
def _replace(context: Context, s: object, old: object, new: object, count: int = -1) -> str:
    """`text|replace("a", "b")`."""
    text, old, new = str(s), str(old), str(new)
    _check_method(_budget_of(context), text, "replace", [old, new])
    return text.replace(old, new, -1 if count is None else count)


@jinja2.pass_context
def _format(context: Context, value: object, *args: object, **kwargs: object) -> str:
    """`"%s is %s"|format(a, b)`."""
    text = str(value)
    _check_fields(_budget_of(context), text, args or kwargs)
    return text % (kwargs or args)


@jinja2.pass_context
def _indent(
    context: Context, s: object, width: int | str = 4, first: bool = False, blank: bool = False
) -> str:
    """`text|indent(4)`."""
    text = str(s)
    _check_width(len(width) if isinstance(width, str) else width)
    size = len(width) if isinstance(width, str) else width
    _budget_of(context).build((text.count("\n") + 1) * (size + 1))
    return do_indent(text, width, first, blank)


def _trim(value: object, chars: str | None = None) -> str:
    """`text|trim`."""
    return str(value).strip(chars)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it for templates: no HTML escapes, no escapes beyond ASCII."""
    if isinstance(value, Undefined):
        raise jinja2.UndefinedError("tojson of a value that is not defined")
    _check_width(indent if isinstance(indent, int) else 0)
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _bounded_range(*args: int) -> range:
    """`range`, up to a length."""
    values = range(*args)
    if len(values) > MAX_RANGE:
        raise TemplateLimitError(f"range is limited to {MAX_RANGE} in a chat template")
    return values


def _raise_exception(message: object) -> NoReturn:
    """What a template calls to refuse its input."""
    raise jinja2.TemplateError(str(message))


def _strftime_now(format_text: str) -> str:
    """The local time, as a template wants it written."""
    return datetime.now().strftime(format_text)


def _check_method(budget: Budget, owner: str, name: str, args: list[Any]) -> None:
    """Measure what a method of a string is about to build."""
    budget.build(len(owner))
    if name in _PADDING_METHODS:
        _check_width(*(arg for arg in args if isinstance(arg, int)))
        budget.build(MAX_WIDTH * (owner.count("\t") if name == "expandtabs" else 1))
    elif name == "replace" and len(args) >= 2 and isinstance(args[0], str):
        budget.build(owner.count(args[0]) * len(str(args[1])))
    elif name == "join" and args and isinstance(args[0], list | tuple):
        budget.measure(args[0])
        budget.build(len(owner) * len(args[0]))
    elif name in ("format", "format_map"):
        _check_fields(budget, owner, args)
    elif name == "translate":
        raise TemplateLimitError("str.translate is not available in a chat template")


def _check_fields(budget: Budget, text: str, values: object) -> None:
    """Measure formatting: every field may hold the longest value."""
    if _WIDE_FIELD.search(text):
        raise TemplateLimitError("the chat template formats a field too wide")
    budget.build(len(text) + (text.count("%") + text.count("{")) * budget.measure(values))


def _check_width(*widths: int) -> None:
    """Refuse to pad beyond reason."""
    if any(width > MAX_WIDTH for width in widths):
        raise TemplateLimitError(f"the chat template pads text beyond {MAX_WIDTH} characters")


def _check_product(budget: Budget, operator: str, left: object, right: object) -> None:
    """Measure `*` and `**`."""
    for text, count in ((left, right), (right, left)):
        if isinstance(text, str | list | tuple) and isinstance(count, int):
            budget.build(len(text) * max(count, 0))
    if isinstance(left, int) and isinstance(right, int):
        num_bits = left.bit_length() * (right if operator == "**" else 1)
        if max(num_bits, right.bit_length()) > 256:
            raise TemplateLimitError("the chat template computes with numbers beyond 256 bits")
