"""Formulas: a subset of Python's integer expressions, parsed once.

A formula is made of whole numbers, names, ``+ - * // %`` with Python's rounding, comparisons (1 or 0), the functions
of FUNCTIONS, and look-ups ``token(column)``. Every operator is total: sums and products wrap around at the width of the
field, a divisor is a positive constant, ``where`` computes both of its values, and a look-up outside of its source
yields a declared number.

arithmetic.py folds and evaluates a formula's tree, cpp.py emits it.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, NoReturn

from ..errors import ConfigError, did_you_mean

Dtype = Literal["int32", "int64", "bool"]

MAX_CHARACTERS = 1_000
MAX_DEPTH = 32
# A divisor is an int in C++, whatever the width of the dividend.
MAX_DIVISOR = 2**31 - 1

# Operators by the nodes of Python's syntax tree; PRECEDENCE is higher where an operator binds more tightly.
COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
}
_ARITHMETIC: dict[type[ast.operator], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.FloorDiv: "//",
    ast.Mod: "%",
}
PRECEDENCE = dict.fromkeys(COMPARISONS.values(), 1) | {"+": 2, "-": 2, "*": 3, "//": 3, "%": 3, "negative": 4}

# The smallest and the largest number of arguments of each function.
FUNCTIONS: dict[str, tuple[int, int]] = {
    "min": (2, 8),
    "max": (2, 8),
    "clamp": (3, 3),
    "where": (3, 3),
    "ceil_div": (2, 2),
}


@dataclass(frozen=True)
class Number:
    """A whole number."""

    value: int


@dataclass(frozen=True)
class Constant:
    """A setting: a number with a name. The emitted C++ uses the name."""

    name: str
    value: int


@dataclass(frozen=True)
class Name:
    """An input, or another vector."""

    name: str


@dataclass(frozen=True)
class Operation:
    """An operator or a function of its arguments."""

    operator: str
    arguments: tuple[Node, ...]


@dataclass(frozen=True)
class LookUp:
    """An element of a source or a map.

    Attributes:
        source: its name; "token" is req_to_token.
        arguments: of a source the column, or the row and the column; of a map the index.
        missing: what it yields where there is no such element.
    """

    source: str
    arguments: tuple[Node, ...]
    missing: int


Node = Number | Constant | Name | Operation | LookUp


# ------------------------------------------------------------------------------------------------------------- parse


def parse(
    text: str,
    label: str,
    names: Collection[str],
    constants: Collection[str],
    dtype: Dtype = "int32",
    look_ups: Mapping[str, tuple[int, int, int]] = {},
) -> Node:
    """The tree of a formula.

    Args:
        text: the formula.
        label: the name of its field, for messages.
        names: inputs and vectors that it may name.
        constants: settings that it may name, also in divisors.
        dtype: of the field; literals must fit.
        look_ups: by source or map how many arguments it takes at least and at most, and what it yields outside.

    Raises:
        ConfigError: the formula isn't in the subset; the message says what, and at which column.
    """
    return _Parser(text, label, names, constants, dtype, look_ups).parse()


class _Parser:
    def __init__(
        self,
        text: str,
        label: str,
        names: Collection[str],
        constants: Collection[str],
        dtype: Dtype,
        look_ups: Mapping[str, tuple[int, int, int]],
    ) -> None:
        self._text, self._label, self._names, self._constants = text, label, names, constants
        self._look_ups = look_ups
        self._low, self._high = limits(dtype)

    def parse(self) -> Node:
        text = self._text
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"the formula of {self._label} is {text!r}; it must be a string such as 'seq_len + 1'.")
        if len(text) > MAX_CHARACTERS:
            self._refuse(MAX_CHARACTERS, f"it has {len(text)} characters; allowed: {MAX_CHARACTERS}")
        for column, character in enumerate(text):
            if not character.isascii() or not character.isprintable():
                self._refuse(column, f"{character!r} isn't allowed; use printable ASCII on one line")
        try:
            tree = ast.parse(text.strip(), mode="eval")
        except SyntaxError as error:
            self._refuse((error.offset or 1) - 1 + self._indent, f"{error.msg}")
        except (RecursionError, MemoryError, ValueError):
            self._refuse(0, f"it is nested too deeply; allowed: {MAX_DEPTH} levels")
        return self._node(tree.body, 1)

    @property
    def _indent(self) -> int:
        return len(self._text) - len(self._text.lstrip())

    def _refuse(self, column: int, reason: str) -> NoReturn:
        raise ConfigError(f"the formula of {self._label}, column {column + 1} of {self._text[:200]!r}: {reason}.")

    def _at(self, node: ast.expr, reason: str) -> NoReturn:
        self._refuse(node.col_offset + self._indent, reason)

    def _node(self, node: ast.expr, depth: int) -> Node:
        if depth > MAX_DEPTH:
            self._at(node, f"it is nested too deeply; allowed: {MAX_DEPTH} levels")
        match node:
            case ast.Constant(value=value):
                return self._number(node, value)
            case ast.Name(id=name):
                return self._name(node, name)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(value))) if not isinstance(value, bool):
                return self._number(node, -value)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return Operation("negative", (self._node(operand, depth + 1),))
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return self._node(operand, depth + 1)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                if type(op) in (ast.FloorDiv, ast.Mod):
                    self._check_divisor(right)
                arguments = (self._node(left, depth + 1), self._node(right, depth + 1))
                return Operation(_ARITHMETIC[type(op)], arguments)
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in COMPARISONS:
                arguments = (self._node(left, depth + 1), self._node(right, depth + 1))
                return Operation(COMPARISONS[type(op)], arguments)
            case ast.Compare(ops=[_, _, *_]):
                self._at(node, "a chain of comparisons isn't allowed; compare two values, and combine with where or *")
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
                return self._call(node, name, args, keywords, depth)
        return self._at(
            node,
            f"{type(node).__name__} isn't allowed; a formula has whole numbers, names, + - * // %, comparisons, "
            f"{', '.join(FUNCTIONS)}",
        )

    def _number(self, node: ast.expr, value: object) -> Number:
        if not isinstance(value, int) or isinstance(value, bool):
            self._at(node, f"{str(value)[:40]!r} isn't allowed; numbers are whole")
        if not self._low <= value <= self._high:
            self._at(node, f"a number of {value.bit_length()} bits is too large; allowed: {self._low} to {self._high}")
        return Number(value)

    def _name(self, node: ast.expr, name: str) -> Name:
        if name not in self._names and name not in self._constants:
            allowed = ", ".join(sorted({*self._names, *self._constants}))
            self._at(node, f"there is no {name[:40]!r} here.{did_you_mean(name, self._names)} Allowed: {allowed}")
        return Name(name)

    def _call(self, node: ast.expr, name: str, args: list[ast.expr], keywords: list[ast.keyword], depth: int) -> Node:
        if name not in FUNCTIONS and name not in self._look_ups:
            allowed = ", ".join([*FUNCTIONS, *self._look_ups])
            self._at(node, f"there is no function {name[:40]!r}.{did_you_mean(name, FUNCTIONS)} Allowed: {allowed}")
        low, high = FUNCTIONS[name] if name in FUNCTIONS else self._look_ups[name][:2]
        if keywords or any(isinstance(arg, ast.Starred) for arg in args) or not low <= len(args) <= high:
            count = str(low) if low == high else f"{low} to {high}"
            self._at(node, f"{name} takes {count} values")
        if name == "ceil_div":
            self._check_divisor(args[1])
        arguments = tuple(self._node(arg, depth + 1) for arg in args)
        return Operation(name, arguments) if name in FUNCTIONS else LookUp(name, arguments, self._look_ups[name][2])

    def _check_divisor(self, node: ast.expr) -> None:
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and part.id not in self._constants and part.id not in FUNCTIONS:
                self._at(node, f"a divisor must be a positive constant; {part.id[:40]!r} varies")


# -------------------------------------------------------------------------------------------------------------- tree


def limits(dtype: Dtype) -> tuple[int, int]:
    """The smallest and the largest value of a formula of this dtype; bool is computed in int32."""
    bits = 64 if dtype == "int64" else 32
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def names(node: Node) -> list[str]:
    """The names in a formula, in order of appearance, each once."""
    match node:
        case Name(name):
            return [name]
        case Operation(arguments=arguments) | LookUp(arguments=arguments):
            return list(dict.fromkeys(name for argument in arguments for name in names(argument)))
    return []


def look_ups(node: Node) -> list[LookUp]:
    """The look-ups in a formula, in the order in which they are met."""
    if not isinstance(node, Operation | LookUp):
        return []
    own = [node] if isinstance(node, LookUp) else []
    return own + [found for argument in node.arguments for found in look_ups(argument)]


def size(node: Node) -> int:
    """How many nodes a formula has."""
    return 1 + sum(map(size, node.arguments)) if isinstance(node, Operation | LookUp) else 1


def substitute(node: Node, values: Mapping[str, Node]) -> Node:
    """The formula with some names replaced."""
    match node:
        case Name(name):
            return values.get(name, node)
        case Operation(op, arguments):
            return Operation(op, tuple(substitute(argument, values) for argument in arguments))
        case LookUp(source, arguments, missing):
            return LookUp(source, tuple(substitute(argument, values) for argument in arguments), missing)
    return node


def text(node: Node) -> str:
    """The formula as Python writes it, with no more parentheses than it needs."""
    return _text(node)[0]


def _text(node: Node) -> tuple[str, int]:
    match node:
        case Number(value):
            return str(value), 5 if value >= 0 else 4
        case Constant(name) | Name(name):
            return name, 5
        case Operation("negative", (argument,)):
            inner, tightness = _text(argument)
            # -(3) isn't the number -3.
            return f"-{inner}" if tightness >= 4 and not isinstance(argument, Number) else f"-({inner})", 4
        case Operation(op, (left, right)) if op in PRECEDENCE:
            own = PRECEDENCE[op]
            before, behind = _text(left), _text(right)
            # Without parentheses Python would read a chained comparison.
            first = before[0] if before[1] > own or (before[1] == own and own > 1) else f"({before[0]})"
            second = behind[0] if behind[1] > own else f"({behind[0]})"
            return f"{first} {op} {second}", own
        case Operation(op, arguments) | LookUp(op, arguments):
            return f"{op}({', '.join(map(text, arguments))})", 5
