"""Jinja templates of strangers: what they render is bounded in size, work and time, and every failure is one error."""

from __future__ import annotations

import datetime
import functools
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from ...errors import ConfigError
from .filters import bounded_filters, check_format, check_percent, method_args
from .meter import METER, Meter, product_fits, tree_size

# Characters of a template at most: the largest that are published have some 20,000.
LONGEST = 1 << 17
# What brackets the text of a `{% generation %}` block; see `render`.
_MARKS: ContextVar[tuple[str, str]] = ContextVar("omnimix_template_marks", default=("", ""))
# Attributes of strings and numbers that templates may use; of `str`, `encode`, `translate` and `maketrans` are not.
_TEXT = frozenset(
    "capitalize casefold center count endswith expandtabs find format format_map index isalnum isalpha isascii "
    "isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower "
    "lstrip partition removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines "
    "startswith strip swapcase title upper zfill".split()
)
_NUMBER = frozenset(("bit_length", "real", "imag", "numerator", "denominator", "is_integer"))


def render(template: str, values: Mapping[str, Any], *, marks: tuple[str, str] = ("", "")) -> str:
    """Render a template in a sandbox, in which it can change nothing.

    Args:
        template: Jinja, with `{% break %}`, `{% continue %}` and `{% generation %}`, as transformers reads it.
        values: JSON-like values by name.
        marks: what is put before and after the text of each `{% generation %}` block.

    Raises:
        ConfigError: the template is broken, fails, calls `raise_exception`, or exceeds the bounds of `Meter`.
    """
    if len(template) > LONGEST:
        raise ConfigError(f"the chat template has {len(template):,} characters; at most {LONGEST:,} are read")
    try:
        meter = Meter(tree_size(list(values.values()), None))
        tokens = METER.set(meter), _MARKS.set(marks)
        try:
            return _output(_compiled(template).generate(**values), meter)
        finally:
            METER.reset(tokens[0])
            _MARKS.reset(tokens[1])
    except ConfigError:
        raise
    # A template computes with whatever Python has, so that it may raise whatever Python raises.
    except Exception as error:
        raise ConfigError(f"the chat template fails: {type(error).__name__}: {str(error)[:1000]}") from error


def _output(pieces: Iterator[str], meter: Meter) -> str:
    found, size = [], 0
    for piece in pieces:
        size += len(piece)
        meter.fits_size(size)
        found.append(piece)
    return "".join(found)


def has_generation(template: str) -> bool:
    """Whether a template marks what the assistant generates."""
    return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template) is not None


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    environment = _environment()
    tree = _Counted(environment).visit(environment.parse(template))
    tree.set_environment(environment)
    return jinja2.Template.from_code(environment, environment.compile(tree), environment.make_globals(None))


@functools.lru_cache(maxsize=1)
def _environment() -> _Environment:
    return _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Hooks, loopcontrols], finalize=_finalize, cache_size=0
    )


class _Environment(ImmutableSandboxedEnvironment):
    """A sandbox in which all that a template calls is measured."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, **options: Any):
        super().__init__(**options)
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _refuse,
            "strftime_now": _now,
            "namespace": _Namespace,
            "dict": _Dict(),
        }
        self.filters = bounded_filters()

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in _TEXT
        if isinstance(obj, int | float):
            return attr in _NUMBER
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def call(*args: Any, **kwargs: Any) -> str:
            check_format(value.__self__, [*args, *kwargs.values()])
            return wrapped(*args, **kwargs)

        return functools.update_wrapper(call, value)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter = METER.get()
        meter.spend()
        for value in (*args, *kwargs.values()):
            meter.fits(value)
        if isinstance(__obj, types.BuiltinMethodType) and isinstance(__obj.__self__, str):
            args = method_args(__obj.__name__, __obj.__self__, *args, **kwargs)
            kwargs = {} if __obj.__name__ == "expandtabs" else kwargs
        return meter.charge(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        meter = METER.get()
        meter.spend()
        meter.fits(left)
        meter.fits(right)
        if operator in ("*", "**"):
            product_fits(meter, operator, left, right)
        elif operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            meter.fits_size(len(left) + len(right))
        elif operator == "%" and isinstance(left, str):
            check_percent(left, right)
        return meter.charge(super().call_binop(context, operator, left, right))


class _Hooks(Extension):
    """`{% generation %}`, and what `_Counted` calls in place of Jinja's own operations."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_generated"), [], [], body).set_lineno(line)

    def _generated(self, caller: Any) -> str:
        before, after = _MARKS.get()
        return f"{before}{caller()}{after}"

    def spend(self, cost: int) -> bool:
        METER.get().spend(cost)
        return True

    def same(self, value: Any) -> Any:
        return value

    def concat(self, *values: Any) -> str:
        meter = METER.get()
        meter.fits_size(sum(tree_size(value, meter.most) for value in values))
        return "".join(map(str, values))

    def cut(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        return value[start:stop:step]


class _Counted(NodeTransformer):
    """Lets a template count: each round of a loop, each output, each new string or list goes through `_Hooks`."""

    def __init__(self, environment: _Environment):
        self.hooks = environment.extensions[_Hooks.identifier]

    def _call(self, node: nodes.Node, name: str, *args: nodes.Expr) -> nodes.Call:
        return self.hooks.call_method(name, list(args), lineno=node.lineno)

    def _spend(self, node: nodes.Node, cost: int) -> nodes.Node:
        return nodes.ExprStmt(self._call(node, "spend", nodes.Const(cost))).set_lineno(node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.body.insert(0, self._spend(node, 0))
        if node.test is not None:
            node.test = nodes.And(self._call(node, "spend", nodes.Const(0)), node.test).set_lineno(node.lineno)
        return node

    def visit_Output(self, node: nodes.Output) -> list[nodes.Node]:
        self.generic_visit(node)
        size = sum(len(part.data) for part in node.nodes if isinstance(part, nodes.TemplateData))
        return [self._spend(node, size), node]

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return self._call(node, "concat", *node.nodes)

    def visit_List(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else self._call(node, "same", node)

    visit_Tuple = visit_Dict = visit_List

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        ends = (end or nodes.Const(None) for end in (node.arg.start, node.arg.stop, node.arg.step))
        return self._call(node, "cut", node.node, *ends)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        node.expr = self._call(node, "same", node.expr)
        for operand in node.ops:
            operand.expr = self._call(node, "same", operand.expr)
        return node


class _Namespace(Namespace):
    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        Namespace.__init__(self)
        for name, value in dict(*rest, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a template may not set the attribute {name!r} of a namespace")
        super().__setitem__(name, value)

    # Jinja's shows what it holds, which may be itself.
    def __repr__(self) -> str:
        return "<Namespace>"


class _Dict:
    """`dict` without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


def _refuse(message: object) -> None:
    raise ConfigError(f"messages: the chat template refuses them: {str(message)[:1000]}")


def _now(form: str) -> str:
    if len(form) > 256:
        raise ValueError("strftime_now takes at most 256 characters")
    return datetime.datetime.now().strftime(form)


def _finalize(value: Any) -> str:
    meter = METER.get()
    meter.fits(value)
    text = str(value)
    meter.spend(len(text))
    return text
