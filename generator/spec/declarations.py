"""Declarations as settings: in Python, as JSON for ``--set`` and the key, as tables in TOML."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from .fields import Declaration, Packed, RunningSum, Table, Vector
from .values import check_one_of

_KINDS: dict[str, type[Vector | Table | Packed]] = {
    "vector": Vector,
    "running_sum": RunningSum,
    "table": Table,
    "packed": Packed,
}
# What the functions that declare a field take.
_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "vector": ("formula", "per", "dtype", "rows", "pad", "missing"),
    "running_sum": ("formula", "per", "dtype", "pad", "missing"),
    "table": ("formula", "columns", "per", "dtype", "fill", "missing"),
    "packed": ("formula", "at", "dtype", "missing"),
}


class Declarations:
    """Declarations by name."""

    def check(self, name: str, value: Any) -> tuple[tuple[str, Declaration], ...]:
        try:
            given = dict(value)
        except (TypeError, ValueError):
            raise ConfigError(f"{name} is {value!r}; it must be declarations by name.") from None
        return tuple((each, declaration_of(each, declared)) for each, declared in given.items())

    def read(self, name: str, text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError as error:
            raise ConfigError(
                f"{name} is {text[:200]!r}; it must be JSON such as "
                f'{{"positions":{{"formula":"base_len","dtype":"int64"}}}}: {error}.'
            ) from None

    def write(self, value: Any) -> str:
        return json.dumps({name: plain(declaration) for name, declaration in value}, separators=(",", ":"))


def plain(declaration: Declaration) -> dict[str, Any]:
    """A declaration as JSON has it: its kind, its formula, and what differs from the defaults."""
    kind = next(name for name, each in _KINDS.items() if type(declaration) is each)
    given = {f.name: getattr(declaration, f.name) for f in dataclasses.fields(declaration)}
    defaults = {f.name: f.default for f in dataclasses.fields(declaration)}
    return {"kind": kind} | {name: value for name, value in given.items() if value != defaults[name]}


def written(declaration: Declaration) -> str:
    """A declaration as Python has it, for people."""
    given = plain(declaration)
    kind, formula = given.pop("kind"), given.pop("formula")
    return f"{kind}({', '.join([repr(formula), *(f'{name}={value!r}' for name, value in given.items())])})"


def declaration_of(name: str, value: Any) -> Declaration:
    """The declaration that plain() wrote so, or a declaration as it is.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(value, Vector | Table | Packed):
        return value
    if not isinstance(value, Mapping) or "formula" not in value:
        raise ConfigError(
            f"declare[{name}] is {value!r}; it must be a declaration such as onelaunch.vector('seq_len + 1'), or a "
            "table with kind, formula and the other arguments of that function."
        )
    given = dict(value)
    kind = given.pop("kind", "vector")
    check_one_of(f"the kind of {name}", kind, tuple(_KINDS))
    for argument in given:
        check_one_of(f"an argument of {name}", argument, _ARGUMENTS[kind])
    needed = {"table": "columns", "packed": "at"}.get(kind, "formula")
    if needed not in given:
        raise ConfigError(f"declare[{name}] is {value!r}; a {kind} has {needed}, too.")
    return _KINDS[kind](**given)
