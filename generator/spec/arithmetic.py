"""The values of formulas: constants are folded when a kernel is emitted, tensors are computed when it is checked."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import reduce
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .expressions import MAX_DIVISOR, Constant, Dtype, LookUp, Name, Node, Number, Operation, limits, text

if TYPE_CHECKING:
    # For annotations only: formulas are folded without torch.
    from torch import Tensor

_COMPUTE: dict[str, Callable[..., Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "negative": operator.neg,
    "min": min,
    "max": max,
    "clamp": lambda value, low, high: min(max(value, low), high),
    "where": lambda condition, value, other: value if condition else other,
    "ceil_div": lambda value, divisor: -(-value // divisor),
}


def fold(node: Node, dtype: Dtype = "int32") -> Node:
    """The formula with constants computed, and without operations that leave a value as it is.

    Raises:
        ConfigError: a divisor isn't a constant from 1 to MAX_DIVISOR.
    """
    if isinstance(node, LookUp):
        return LookUp(node.source, tuple(fold(argument, dtype) for argument in node.arguments), node.missing)
    if not isinstance(node, Operation):
        return node
    op, arguments = node.operator, tuple(fold(argument, dtype) for argument in node.arguments)
    known = [known_value(argument) for argument in arguments]
    if op in ("//", "%", "ceil_div") and (known[1] is None or not 0 < known[1] <= MAX_DIVISOR):
        raise ConfigError(f"the divisor in {text(node)} is {known[1]}; allowed: a constant from 1 to {MAX_DIVISOR}.")
    if None not in known:
        return Number(_wrapped(int(_COMPUTE[op](*known)), dtype))
    first = arguments[0]
    match op, known:
        case ("+" | "-", [_, 0]) | ("*" | "//" | "ceil_div", [_, 1]):
            return first
        case ("+", [0, _]) | ("*", [1, _]):
            return arguments[1]
        case ("*", [0, _] | [_, 0]) | ("%", [_, 1]):
            return Number(0)
        case ("where", [int(condition), _, _]):
            return arguments[1] if condition else arguments[2]
    if op == "-" and first == arguments[1]:
        return Number(0)
    if op in ("min", "max"):
        return _fold_extremum(op, arguments, dtype)
    if op == "clamp":
        return fold(Operation("min", (Operation("max", arguments[:2]), arguments[2])), dtype)
    return Operation(op, arguments)


def _fold_extremum(op: str, arguments: tuple[Node, ...], dtype: Dtype) -> Node:
    """min or max as a chain of pairs, without repeated arguments and without the neutral number."""
    neutral = limits(dtype)[0 if op == "max" else 1]
    chosen = [argument for argument in dict.fromkeys(arguments) if known_value(argument) != neutral]
    if not chosen:
        return Number(neutral)
    return reduce(lambda left, right: Operation(op, (left, right)), chosen)


def known_value(node: Node) -> int | None:
    """The value of a number or constant; None for any other node."""
    return node.value if isinstance(node, Number | Constant) else None


def _wrapped(value: int, dtype: Dtype) -> int:
    low, high = limits(dtype)
    return (value - low) % (high - low + 1) + low


def evaluate(
    node: Node, inputs: Mapping[str, Tensor], look_up: Callable[[LookUp, list[Tensor]], Tensor] | None = None
) -> Tensor:
    """A formula's values with PyTorch.

    Args:
        node: the formula, with no name that isn't an input.
        inputs: at least one tensor; all int32, or all int64 for an int64 field, of shapes that broadcast.
        look_up: the elements that look-ups with such arguments yield; for formulas that have any.

    Returns:
        A tensor of the inputs' dtype and of the shape that they broadcast to.
    """
    like = next(iter(inputs.values()))

    def value(node: Node) -> Tensor:
        match node:
            case Number(number) | Constant(_, number):
                return like.new_full((), number)
            case Name(name):
                return inputs[name]
            case Operation(op, arguments):
                return compute(op, [value(argument) for argument in arguments])
            case LookUp(_, arguments, _):
                assert look_up is not None
                return look_up(node, [value(argument) for argument in arguments]).to(like.dtype)

    def compute(op: str, values: list[Tensor]) -> Tensor:
        match op:
            case "negative":
                return -values[0]
            case "min":
                return reduce(lambda a, b: a.minimum(b), values)
            case "max":
                return reduce(lambda a, b: a.maximum(b), values)
            case "clamp":
                return values[0].maximum(values[1]).minimum(values[2])
            case "where":
                return values[1].where(values[0] != 0, values[2])
            case "ceil_div":
                return values[0] // values[1] + (values[0] % values[1] != 0).to(like.dtype)
        result: Tensor = _COMPUTE[op](*values)
        return result.to(like.dtype)

    # A formula of constants has no shape; adding zeros gives it the inputs' shape.
    return value(node) + reduce(operator.add, (tensor * 0 for tensor in inputs.values()))
