"""Formulas in one configuration: what is known folded, and the C++ that computes the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .arithmetic import fold, known_value
from .cpp import cpp, user_name
from .expressions import Constant, Dtype, LookUp, Name, Node, Number, Operation, look_ups, names, substitute, text
from .fields import TERMS, Packed, Special, Table
from .scope import CONSTANTS

if TYPE_CHECKING:
    # Only for annotations: configurations ask this module which settings their fields use.
    from .config import KernelConfig
    from .implied import Implied

# Of a line of emitted text; and of an expression, beyond which its largest operand gets a local of its own.
_LINE_COLUMNS = 120
_VALUE_COLUMNS = 100


@dataclass(frozen=True)
class Local:
    """A local constant of the emitted code.

    Attributes:
        name: the vector whose value it is.
        type: "std::int32_t" or "std::int64_t".
        cpp: its value, an expression of inputs and of the locals before it.
        per: "request" if all rows of a request have the same.
    """

    name: str
    type: str
    cpp: str
    per: str

    def declaration(self, indent: int) -> str:
        """The line that declares it, or two, broken where clang-format breaks it. Without the first line's indent."""
        line = f"const {self.type} {self.name} = {self.cpp};"
        return line if indent + len(line) <= _LINE_COLUMNS else line.replace(" = ", " =\n" + " " * (indent + 4), 1)


def formulas_mode(config: Implied, own_rows: int | None) -> str:
    """The mode whose formulas a field has. With rows of its own it isn't decode, where a request has a single row."""
    return config.mode if own_rows is None else "target_verify"


def known_names(config: Implied, own_rows: int | None = None) -> dict[str, Node]:
    """The names whose values a configuration fixes, for a field with the mode's rows or with rows of its own."""
    known: dict[str, Node] = {setting: Constant(setting, getattr(config, setting)) for setting in CONSTANTS}
    known |= {name: Constant(user_name(name), value) for name, value in config.scope.constants}
    if own_rows is not None:
        known["rows"] = Number(own_rows)
    elif config.mode == "decode":
        known |= {"rows": Number(1), "row": Number(0)}
    if not any(config.length_offsets):
        known["offset"] = Number(0)
    return known


def formula_in(config: KernelConfig, name: str, dtype: Dtype, own_rows: int | None = None) -> Node:
    """A vector's formula in a configuration, computed in a dtype: settings are filled in, other vectors are names.

    Args:
        config: the configuration.
        name: the vector.
        dtype: of the field that is computed.
        own_rows: its rows, where that field has rows of its own.
    """
    scope, known = config.scope, known_names(config, own_rows) | _inputs(config, dtype)
    # A vector that is no more than another name or number needs no local of its own.
    node = substitute(scope.formula(name, formulas_mode(config, own_rows)), known)
    for named in names(node):
        if named in scope.vectors:
            leaf = formula_in(config, named, dtype, own_rows)
            known[named] = Name(_local(config, named, dtype)) if isinstance(leaf, Operation | LookUp) else leaf
    return fold(substitute(node, known), dtype)


def folded(config: Implied, name: str) -> list[Node]:
    """The formulas of a field in a configuration, with the formulas of other vectors in place of their names."""
    field = config.field(name)
    gathered = isinstance(field.declaration, Table | Packed)
    return [
        fold(
            substitute(
                config.scope.substituted(name, formulas_mode(config, field.own_rows), columns),
                known_names(config, field.own_rows),
            ),
            field.dtype,
        )
        for columns in ((False, True) if gathered else (False,))
    ]


def varies(config: Implied, name: str) -> bool:
    """Whether backends may differ in a field: their lengths differ, or a formula names the backend."""
    return _varies(config, folded(config, name))


def value_varies(config: KernelConfig, name: str) -> bool:
    """Whether an element of a declared table or packed field may differ by backend, not only how many there are."""
    return _varies(config, folded(config, name)[:1])


def _varies(config: Implied, formulas: Sequence[Node]) -> bool:
    named = [n for node in formulas for n in names(node)]
    lengths = len(config.seqlen_offsets) > 1 and ("seq_len" in named or "offset" in named)
    return config.num_backends > 1 and (lengths or "step" in named)


def read_by(config: Implied, fields: Sequence[str]) -> list[LookUp]:
    """The look-ups in the formulas of some vectors."""
    return [found for name in fields for node in folded(config, name) for found in look_ups(node)]


def described(config: KernelConfig, name: str) -> str:
    """What an element of a field holds in a configuration, for people: settings by name, constant parts computed."""
    field, declared = config.field(name), config.field(name).declaration
    if isinstance(declared, Special):
        return field.formula
    mode = formulas_mode(config, field.own_rows)
    terms = {term: config.scope.formula(term, mode) for term in TERMS}
    known = known_names(config, field.own_rows) | {n: Constant(n, value) for n, value in config.scope.constants}

    def shown(node: Node) -> str:
        return text(fold(substitute(substitute(node, terms), known), field.dtype))

    written = shown(config.scope.formula(name, mode))
    if isinstance(declared, Table):
        live = shown(config.scope.columns(name, mode))
        fill = "" if declared.fill is None else f", then {declared.fill}"
        return f"{written}, for columns below {live}{fill}"
    if isinstance(declared, Packed):
        return f"{written}, at {declared.at}[request] + column"
    return f"0, then the running sum of {written}" if field.kind == "running_sum" else written


def locals_of(config: KernelConfig, fields: Sequence[str]) -> list[Local]:
    """The local constants from which emitted code computes some fields, in an order in which they can be computed.

    Args:
        config: the configuration.
        fields: vectors and running sums that all have an element a request, or all one a row, or one with rows of its
            own. The locals of fields with an element a request are there where those of rows are computed, and aren't
            repeated.
    """
    found: dict[str, Local] = {}
    vectors = config.scope.vectors

    def visit(name: str, dtype: Dtype, own_rows: int | None) -> None:
        node = formula_in(config, name, dtype, own_rows)
        named = names(node)
        for other in vectors:
            if _local(config, other, dtype) in named:
                visit(other, dtype, own_rows)
        local = _local(config, name, dtype)
        if isinstance(node, Operation | LookUp):
            for part in _parts(local, node, dtype, dict(config.scope.maps), vectors[name].per):
                found.setdefault(part.name, part)

    for name in fields:
        visit(name, config.dtype(name), config.field(name).own_rows)
    if any(name not in config.request_vectors for name in fields):
        of_rows = any(config.field(name).own_rows is not None for name in fields)
        for local in locals_of(config, config.request_vectors):
            if not of_rows or local.per == "request":
                found.pop(local.name, None)
    return list(found.values())


def _parts(name: str, node: Node, dtype: Dtype, maps: Collection[str], per: str) -> list[Local]:
    """The locals of a value: one, after those of operands where its expression would be too long.

    A look-up in a branch of ``where`` stays there: a checked kernel reports those that are evaluated.
    """
    kind = "std::int64_t" if dtype == "int64" else "std::int32_t"
    found: list[Local] = []
    written = cpp(node, dtype, maps)
    while len(written) > _VALUE_COLUMNS and isinstance(node, Operation):
        # A comparison that is a value is 0 or 1, so that any operation can have a local.
        operands = list(node.arguments)
        fixed = [node.operator == "where" and i > 0 and bool(look_ups(each)) for i, each in enumerate(operands)]
        sizes = [
            0 if stays or not isinstance(each, Operation | LookUp) else len(cpp(each, dtype, maps))
            for stays, each in zip(fixed, operands, strict=True)
        ]
        if not any(sizes):
            break
        largest = sizes.index(max(sizes))
        operand = f"{name}_{len(found) + 1}"
        found += _parts(operand, operands[largest], dtype, maps, per)
        operands[largest] = Name(operand)
        node = dataclasses.replace(node, arguments=tuple(operands))
        written = cpp(node, dtype, maps)
    return [*found, Local(name, kind, written, per)]


def element(config: KernelConfig, name: str) -> str:
    """The C++ of a vector's element, or of what a running sum adds up, by the locals of locals_of."""
    dtype = config.dtype(name)
    node = formula_in(config, name, dtype, config.field(name).own_rows)
    if isinstance(node, Operation | LookUp):
        return _local(config, name, dtype)
    return cpp(node, dtype)


def live_columns(config: KernelConfig, name: str, base_len: int, offset: int) -> int:
    """How many columns of a declared table, or elements of a packed field, a request of this length has.

    Declared inputs count as 0, and so does what look-ups decide.
    """
    given: dict[str, Node] = dict.fromkeys(dict(config.scope.inputs), Number(0))
    given |= {"base_len": Number(base_len), "offset": Number(offset), "seq_len": Number(base_len + offset)}
    given |= {"request": Number(0), "step": Number(0), "rows": Number(config.next_n)}
    node = substitute(config.scope.substituted(name, config.mode, True), known_names(config) | given)
    count = known_value(fold(node, "int64"))
    return max(count or 0, 0)


def value_locals(config: KernelConfig, name: str) -> list[Local]:
    """The local constants from which emitted code computes an element of a declared table or packed field.

    The last one is ``value``, the element.
    """
    dtype = config.dtype(name)
    return _parts("value", _computed(config, name, dtype, False), dtype, dict(config.scope.maps), "row")


def live_count(config: KernelConfig, name: str) -> str:
    """The C++ of how many live columns a declared table's row has, or how many elements a request has when packed."""
    dtype = count_dtype(config, name)
    return cpp(_computed(config, name, dtype, True), dtype, dict(config.scope.maps))


def count_dtype(config: KernelConfig, name: str) -> Dtype:
    """The dtype in which that is computed: a table's columns are int32, and a packed field is placed by a sum."""
    declared = config.field(name).declaration
    return config.dtype(declared.at) if isinstance(declared, Packed) else "int32"


def _computed(config: KernelConfig, name: str, dtype: Dtype, columns: bool) -> Node:
    """The formula of a declared table or packed field, or of its columns, as emitted code computes it in a dtype."""
    known = known_names(config) | _inputs(config, dtype)
    if name in config.row_fields:
        known.pop("row", None)
    return fold(substitute(config.scope.substituted(name, config.mode, columns), known), dtype)


def _inputs(config: Implied, dtype: Dtype) -> dict[str, Node]:
    """How emitted code spells the inputs that a user declared. An int64 formula sees all 64 bits of an int64 input."""
    wide = [name for name, of in config.scope.inputs if of == dtype == "int64"]
    names = {name: user_name(name) for name, _ in config.scope.inputs}
    return {name: Name(f"{spelled}_int64" if name in wide else spelled) for name, spelled in names.items()}


def functions_of(config: KernelConfig) -> frozenset[str]:
    """The division functions of templates/device/ that the emitted formulas call."""
    if config.copies:
        return frozenset()
    written = [local.cpp for name in config.vectors for local in locals_of(config, [name])]
    written += [local.cpp for name in config.computed for local in value_locals(config, name)]
    written += [live_count(config, name) for name in config.computed]
    return frozenset(
        function
        for function in ("floor_div", "floor_mod", "ceil_div", "look_up")
        if f"{function}(" in " ".join(written)
    )


def _local(config: KernelConfig, name: str, dtype: Dtype) -> str:
    """The local constant with a vector's value. A field of another width computes it anew, in its own width."""
    field = config.scope.vectors[name]
    spelled = user_name(name) if config.scope.declared(name) else name
    return spelled if (dtype == "int64") == (field.dtype == "int64") else f"{spelled}_{dtype}"
