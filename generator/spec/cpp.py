"""Formulas as C++ expressions."""

from __future__ import annotations

from collections.abc import Collection

from .arithmetic import known_value
from .expressions import COMPARISONS, PRECEDENCE, Constant, Dtype, LookUp, Name, Node, Number, Operation, limits


def cpp(node: Node, dtype: Dtype = "int32", maps: Collection[str] = ()) -> str:
    """A folded formula as a C++ expression of type std::int32_t, or std::int64_t for int64.

    Names are int32 variables, constants are spelled kIndexTopk and so on. Beside what C++ has it uses min and max of
    two values of one type, and of templates/device/ floor_div, floor_mod, ceil_div, bits, wrap and look_up.

    Args:
        node: the formula.
        dtype: of the field.
        maps: the look-ups that are maps; the others are sources.
    """
    return _Cpp("int64" if dtype == "int64" else "int32", maps).value(node)


def user_name(name: str) -> str:
    """How the emitted text spells what a user declared: with a prefix that none of its other names has."""
    return f"user_{name}"


def cpp_constant(name: str) -> str:
    """How the emitted text spells a constant: a setting, or one that a user declared."""
    return name if name.startswith(user_name("")) else "k" + "".join(map(str.capitalize, name.split("_")))


def cpp_source(name: str) -> str:
    """How the emitted text spells a source or a map."""
    return "token_source(p)" if name == "token" else f"p.{user_name(name)}"


class _Cpp:
    """Writes one formula.

    Sums and products are computed unsigned and converted back, since signed overflow is undefined in C++. Where the
    left operand is unsigned, C++ converts the right one, modulo 2^32 or 2^64.
    """

    def __init__(self, dtype: Dtype, maps: Collection[str]) -> None:
        self._wide, self._maps = dtype == "int64", maps
        self._type, self._unsigned = f"std::{dtype}_t", f"std::u{dtype}_t"

    def value(self, node: Node) -> str:
        match node:
            case Number(value):
                return self._number(value)
            case Constant(name):
                return self._widened(cpp_constant(name))
            case Name(name):
                return self._widened(name)
            case Operation("+" | "-" | "*" | "negative"):
                return f"wrap({self._bits(node)[0]})"
            case Operation("//" | "%" | "ceil_div" as op, (dividend, divisor)):
                function = {"//": "floor_div", "%": "floor_mod"}.get(op, op)
                return f"{function}({self.value(dividend)}, {self._leaf(divisor)})"
            case Operation("min" | "max" as op, (left, right)):
                return f"{op}({self.value(left)}, {self.value(right)})"
            case Operation("where", (condition, value, other)):
                return f"({self._condition(condition)} ? {self.value(value)} : {self.value(other)})"
            case Operation(op) if op in COMPARISONS.values():
                return f"static_cast<{self._type}>({self._condition(node)})"
            case LookUp(source, arguments, missing):
                places = [self.value(argument) for argument in arguments]
                if source not in self._maps and len(places) == 1:
                    places.insert(0, "pool_row")
                outside = self._number(missing) if self._wide else f"{self._type}{{{self._number(missing)}}}"
                return f"look_up(p, request, {cpp_source(source)}, {', '.join(places)}, {outside})"
        raise AssertionError(f"{node} isn't folded")

    def _condition(self, node: Node) -> str:
        match node:
            case Operation(op, (left, right)) if op in COMPARISONS.values():
                return f"{self._leaf(left)} {op} {self._leaf(right)}"  # C++ widens the narrower one
        return f"{self.value(node)} != 0"

    def _bits(self, node: Node) -> tuple[str, int]:
        """An unsigned expression with the bits of a value, and its precedence."""
        match node:
            case Operation("negative", (argument,)):
                return f"{self._unsigned}{{0}} - {self._operand(argument, 2)}", 2
            case Operation("+" | "-" | "*" as op, (left, right)):
                own = PRECEDENCE[op]
                before, tightness = self._bits(left)
                before = before if tightness >= own else f"({before})"
                number = known_value(right) if isinstance(right, Number) else None
                if op != "*" and number is not None and number < 0:
                    return f"{before} {'-' if op == '+' else '+'} {self._magnitude(number)}", own
                return f"{before} {op} {self._operand(right, own)}", own
        return f"bits({self.value(node)})", 5

    def _operand(self, node: Node, own: int) -> str:
        """The right operand of an unsigned operator."""
        if isinstance(node, Operation) and node.operator in ("+", "-", "*", "negative"):
            bits, tightness = self._bits(node)
            return bits if tightness > own else f"({bits})"
        return self._leaf(node)

    def _leaf(self, node: Node) -> str:
        match node:
            case Number(value):
                return str(value) if 0 <= value < 2**31 else self._number(value)
            case Constant(name):
                return cpp_constant(name)
            case Name(name):
                return name
        return self.value(node)

    def _widened(self, name: str) -> str:
        return f"{self._type}{{{name}}}" if self._wide else name

    def _number(self, value: int) -> str:
        low, _ = limits("int64" if self._wide else "int32")
        if value == low:  # its magnitude doesn't fit this type
            return f"({self._number(value + 1)} - 1)"
        return f"{self._type}{{{value}}}" if self._wide else str(value)

    def _magnitude(self, value: int) -> str:
        return str(-value) if -value < 2**31 else f"{self._unsigned}{{{-value}u}}"
