"""What the formulas of a configuration may name: the standard fields, and what a user declares beside them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from ..errors import ConfigError
from .expressions import FUNCTIONS, Dtype, Node, limits, look_ups, names, parse, size, substitute, text
from .fields import FIELDS, TERMS, Declaration, Field, Packed, Per, RunningSum, Special, Table, Vector
from .values import check_one_of, check_whole

# What every formula may name.
INPUTS = ("base_len", "offset", "seq_len", "rows", "row", "request", "step")
# Settings that formulas may name. Those that are 1 or more may be divisors.
CONSTANTS = ("index_topk", "index_kpool", "page_size")
# The source that every refresh has: req_to_token.
TOKEN = "token"

_IDENTIFIER = re.compile(r"[a-z][a-z0-9_]{0,62}")
# The limit of a formula's nodes, once the formulas of the vectors that it names are substituted.
MAX_NODES = 1_000
# The limit of rows of its own, as of a mode's rows.
MAX_ROWS = 2**15
# The limit of declarations, of inputs, of constants and so on, each.
MAX_NAMES = 256
# The binding has room for this many declared inputs of a run.
MAX_INPUTS = 15


@dataclass(frozen=True)
class Scope:
    """The declarations of one configuration.

    Attributes:
        declare: a user's fields and terms by name.
        inputs: by name the dtype of an input of each run, one element per request.
        constants: by name a number.
        sources: by name the dtype of a table that look-ups read.
        maps: by name the dtype of a one-dimensional table, and the value outside of it.
    """

    declare: tuple[tuple[str, Declaration], ...] = ()
    inputs: tuple[tuple[str, Dtype], ...] = ()
    constants: tuple[tuple[str, int], ...] = ()
    sources: tuple[tuple[str, Dtype], ...] = ()
    maps: tuple[tuple[str, tuple[Dtype, int]], ...] = ()

    def check(self) -> None:
        """Checks every name and every declaration.

        Raises:
            ConfigError: a name isn't allowed or is given twice, or a declaration isn't in the language.
        """
        taken = {*FIELDS, *TERMS, *INPUTS, *CONSTANTS, *FUNCTIONS, TOKEN, "column", "pool_row"}
        for part in dataclasses.fields(self):
            given = getattr(self, part.name)
            limit = MAX_INPUTS if part.name == "inputs" else MAX_NAMES
            if len(given) > limit:
                raise ConfigError(f"{part.name} has {len(given)} names; allowed: {limit}.")
            for name, _ in given:
                if not isinstance(name, str) or not _IDENTIFIER.fullmatch(name):
                    raise ConfigError(
                        f"{part.name} has the name {str(name)[:80]!r}; a name is a lower-case letter, then lower-case "
                        "letters, digits and underscores, up to 63 in all."
                    )
                if name in taken:
                    raise ConfigError(
                        f"{part.name} has the name {name!r}, which is another thing's already; choose another name."
                    )
                taken.add(name)
        for name, declaration in self.declare:
            check_declaration(name, declaration)
            for mode in ("decode", "target_verify"):
                self.substituted(name, mode)
                if isinstance(declaration, Table | Packed):
                    self.substituted(name, mode, True)

    def field(self, name: str) -> Field:
        """A standard field, a term or a declared field."""
        return self.fields[name]

    # Looked up very often: a cache by the scope itself would take the hash of all declarations each time.
    @cached_property
    def fields(self) -> Mapping[str, Field]:
        """The standard fields, the terms and the declared fields, by name."""
        return FIELDS | TERMS | {name: Field(name, declaration) for name, declaration in self.declare}

    @cached_property
    def vectors(self) -> Mapping[str, Field]:
        """The fields and terms with one element per request or row that have a formula."""
        return {name: field for name, field in self.fields.items() if isinstance(field.declaration, Vector)}

    def declared(self, name: str) -> bool:
        """Whether a user declared the field."""
        return name in dict(self.declare)

    def formula(self, name: str, mode: str) -> Node:
        """The parsed formula of a vector or running sum in a forward mode.

        Raises:
            ConfigError: the formula isn't in the subset, or names what it may not.
        """
        return _formula(self, name, mode)

    def columns(self, name: str, mode: str) -> Node:
        """Of a table how many columns are live, of a packed field how many elements a request has.

        Raises:
            ConfigError: as formula().
        """
        return _columns(self, name, mode)

    def substituted(self, name: str, mode: str, columns: bool = False) -> Node:
        """The formula (or columns()) with the formulas of the vectors that it names in place of their names.

        Raises:
            ConfigError: formulas name each other, or the result has more than MAX_NODES nodes.
        """
        return _substituted(self, name, mode, columns)

    def named(self, fields: Iterable[str], mode: str) -> frozenset[str]:
        """Every name in the formulas of some fields, and in the formulas of what they name."""
        return frozenset(name for each in fields for name in _named(self, each, mode))

    def of(self, fields: Iterable[str], mode: str) -> Scope:
        """What the formulas of some fields need of it."""
        fields = tuple(fields)
        used = self.named(fields, mode) | {*fields}

        def kept(pairs: tuple[tuple[str, Any], ...]) -> Any:
            return tuple((name, value) for name, value in pairs if name in used)

        return Scope(*(kept(getattr(self, part.name)) for part in dataclasses.fields(self)))

    def canonical(self) -> Scope:
        """The same with formulas as they are printed, and everything in the order of its names."""

        def printed(name: str, declaration: Declaration) -> Declaration:
            assert not isinstance(declaration, Special)
            changed = dataclasses.replace(declaration, formula=text(self.formula(name, "target_verify")))
            if isinstance(changed, Table):
                return dataclasses.replace(changed, columns=text(self.columns(name, "target_verify")))
            return changed

        declare = tuple((name, printed(name, declaration)) for name, declaration in sorted(self.declare, key=_name))
        return Scope(declare, *(tuple(sorted(getattr(self, f.name), key=_name)) for f in dataclasses.fields(self)[1:]))


def _name(pair: tuple[str, Any]) -> str:
    return pair[0]


def check_declaration(name: str, declaration: Declaration) -> None:
    """Checks all of a declaration but its formulas.

    Raises:
        ConfigError: a part of it isn't allowed.
    """
    assert not isinstance(declaration, Special)
    check_one_of(f"the per of {name}", declaration.per, ("request", "row"))
    summed = isinstance(declaration, RunningSum)
    dtypes = ("int32", "int64", "bool") if type(declaration) in (Vector, Packed) else ("int32", "int64")
    check_one_of(f"the dtype of {name}", declaration.dtype, dtypes)
    low, high = limits(declaration.dtype)
    check_whole(f"the missing of {name}", declaration.missing, low, high)
    if isinstance(declaration, Table) and declaration.fill is not None:
        check_whole(f"the fill of {name}", declaration.fill, low, high)
    if not isinstance(declaration, Vector):
        return
    if declaration.rows is not None:
        check_whole(f"the rows of {name}", declaration.rows, 1, MAX_ROWS)
        if declaration.per == "request" or summed:
            raise ConfigError(f"{name} has rows={declaration.rows}; only a vector with per='row' has rows of its own.")
    if declaration.pad is not None and not (summed and declaration.pad == "last"):
        check_whole(f"the pad of {name}", declaration.pad, low, high)


@cache
def _formula(scope: Scope, name: str, mode: str) -> Node:
    declared = scope.fields[name].declaration
    assert not isinstance(declared, Special)
    written = declared.formula
    if mode == "decode" and isinstance(declared, Vector) and declared.decode is not None:
        written = declared.decode
    return _parsed(scope, name, written, () if isinstance(declared, Vector) else ("column",), declared.per)


@cache
def _columns(scope: Scope, name: str, mode: str) -> Node:
    declared = scope.fields[name].declaration
    if isinstance(declared, Table):
        return _parsed(scope, name, declared.columns, (), "request")
    assert isinstance(declared, Packed)
    sums = [n for n, field in scope.vectors.items() if field.kind == "running_sum" and field.per == "request"]
    check_one_of(f"the at of {name}", declared.at, tuple(sums))
    return _formula(scope, declared.at, mode)


def _parsed(scope: Scope, name: str, written: str, more: tuple[str, ...], per: Per) -> Node:
    """The parsed formula of a field, or of its columns, that may also have the names in ``more``."""
    declared = scope.fields[name].declaration
    assert not isinstance(declared, Special)
    vectors = [n for n, other in scope.vectors.items() if type(other.declaration) is Vector and n != name]
    allowed = (*INPUTS, *vectors, *dict(scope.inputs), *more)
    read = {TOKEN: (1, 2, declared.missing)}
    read |= {source: (1, 2, declared.missing) for source, _ in scope.sources}
    read |= {map_: (1, 1, outside) for map_, (_, outside) in scope.maps}
    node = parse(written, name, allowed, (*CONSTANTS, *dict(scope.constants)), declared.dtype, read)
    low, high = limits(declared.dtype)
    for named in names(node):
        if named in dict(scope.constants) and not low <= dict(scope.constants)[named] <= high:
            raise ConfigError(
                f"constants[{named}] is {dict(scope.constants)[named]}, and {name} is computed in {declared.dtype}; "
                f"allowed: {low} to {high}. Declare {name} with dtype='int64'."
            )
    if per == "request":
        for named in names(node):
            if named == "row" or (named in vectors and scope.fields[named].per == "row"):
                raise ConfigError(
                    f"the formula of {name}, {written!r}, names {named}, which is per row; {name} has one element "
                    "per request. Declare it with per='row', or name per-request inputs only."
                )
    return node


@cache
def _substituted(scope: Scope, name: str, mode: str, columns: bool) -> Node:
    def visit(name: str, path: tuple[str, ...]) -> Node:
        if name in path:
            circle = " names ".join((*path[path.index(name) :], name))
            raise ConfigError(f"formulas name each other: {circle}. Write one of them without the others.")
        node = (_columns if columns and not path else _formula)(scope, name, mode)
        inner = {named: visit(named, (*path, name)) for named in names(node) if named in scope.vectors}
        node = substitute(node, inner)
        if size(node) > MAX_NODES:
            raise ConfigError(
                f"the formula of {name} has more than {MAX_NODES} operators, numbers and names once the vectors that "
                "it names are substituted. Make it smaller."
            )
        return node

    return visit(name, ())


@cache
def _named(scope: Scope, name: str, mode: str) -> frozenset[str]:
    declared = scope.fields[name].declaration
    if isinstance(declared, Special):
        return frozenset(declared.settings)
    nodes = [_formula(scope, name, mode)]
    at: set[str] = set()
    if isinstance(declared, Table | Packed):
        nodes.append(_columns(scope, name, mode))
        at = {declared.at} if isinstance(declared, Packed) else set()
    named = {n for node in nodes for n in names(node)}
    found = {*named, *at, *(found.source for node in nodes for found in look_ups(node))}
    return frozenset(found).union(*(_named(scope, n, mode) for n in named if n in scope.vectors))
