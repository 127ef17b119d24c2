"""Vectors and running sums in one configuration: the C++ that computes them, and their values with PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .arithmetic import evaluate, fold
from .cpp import cpp
from .expressions import Constant, Dtype, Name, Node, Number, Operation, names, parse, size, substitute, text
from .fields import FIELDS, TERMS, Declaration, Field, Vector

if TYPE_CHECKING:
    # Only for annotations: configurations ask this module which settings their fields use.
    from torch import Tensor

    from .config import KernelConfig

INPUTS = ("base_len", "offset", "seq_len", "rows", "row", "request", "step")
# Settings that formulas may name. Those that are at least 1 may be divisors.
CONSTANTS = ("index_topk", "index_kpool", "page_size")

# The fields and terms that have a formula.
_VECTORS = {name: field for name, field in (FIELDS | TERMS).items() if isinstance(field.declaration, Vector)}

# The limit for a formula after substitution of the vectors that it names.
MAX_NODES = 1_000


@dataclass(frozen=True)
class Local:
    """A local constant of the emitted code.

    Attributes:
        name: the vector whose value it is.
        type: "std::int32_t" or "std::int64_t".
        cpp: its value, an expression of inputs and of the locals before it.
    """

    name: str
    type: str
    cpp: str

    def declaration(self, indent: int) -> str:
        """The line that declares it, or two where it is longer than 120 columns."""
        line = f"const {self.type} {self.name} = {self.cpp};"
        return line if indent + len(line) <= 120 else line.replace(" = ", f" =\n{' ' * (indent + 4)}", 1)


# -------------------------------------------------------------------------------------------------------- declarations


@cache
def formula(name: str, mode: str) -> Node:
    """The parsed formula of a standard vector or running sum in a forward mode."""
    return parse_declaration(_VECTORS[name], {n: field.declaration for n, field in _VECTORS.items()}, mode)


def parse_declaration(field: Field, declarations: Mapping[str, Declaration], mode: str) -> Node:
    """The parsed formula of a vector or running sum.

    Args:
        field: the field.
        declarations: every field that it may name.
        mode: the forward mode; a declaration may have a separate formula for decode.

    Raises:
        ConfigError: the formula isn't in the subset, or names a field that it can't use.
    """
    declared = field.declaration
    assert isinstance(declared, Vector)
    vectors = [n for n, other in declarations.items() if type(other) is Vector and n != field.name]
    written = declared.decode if mode == "decode" and declared.decode is not None else declared.formula
    node = parse(written, field.name, (*INPUTS, *vectors), CONSTANTS, declared.dtype)
    if declared.per == "request":
        for name in names(node):
            if name == "row" or (name in vectors and declarations[name].per == "row"):
                raise ConfigError(
                    f"the formula of {field.name}, {written!r}, names {name}, which is per row; {field.name} has one "
                    "element per request. Declare it with per='row', or name per-request inputs only."
                )
    return node


def substituted(name: str, formulas: Mapping[str, Node]) -> Node:
    """A vector's formula, with the vectors that it names replaced by their formulas.

    Raises:
        ConfigError: formulas name each other, or the result has more than MAX_NODES nodes.
    """

    def visit(name: str, path: tuple[str, ...]) -> Node:
        if name in path:
            circle = " names ".join((*path[path.index(name) :], name))
            raise ConfigError(f"formulas name each other: {circle}. Write one of them without the others.")
        node = formulas[name]
        node = substitute(node, {named: visit(named, (*path, name)) for named in names(node) if named in formulas})
        if size(node) > MAX_NODES:
            raise ConfigError(
                f"the formula of {name} has more than {MAX_NODES} operators, numbers and names once the vectors that "
                "it names are substituted. Make it smaller."
            )
        return node

    return visit(name, ())


@cache
def settings_of(name: str) -> frozenset[str]:
    """The settings that a standard field depends on, directly or through the vectors that it names."""
    declared = FIELDS[name].declaration
    if not isinstance(declared, Vector):
        return frozenset(declared.settings)
    return frozenset(names(substituted(name, _formulas("target_verify")))) & frozenset(CONSTANTS)


# ------------------------------------------------------------------------------------------------- in a configuration


def _known(config: KernelConfig) -> dict[str, Node]:
    """The names whose values a configuration fixes."""
    known: dict[str, Node] = {setting: Constant(setting, getattr(config, setting)) for setting in CONSTANTS}
    if config.mode == "decode":
        known |= {"rows": Number(1), "row": Number(0)}
    if not any(config.length_offsets):
        known |= {"offset": Number(0)}
    return known


def _formulas(mode: str) -> dict[str, Node]:
    return {name: formula(name, mode) for name in _VECTORS}


def formula_in(config: KernelConfig, name: str, dtype: Dtype) -> Node:
    """A vector's folded formula in a configuration and a dtype: settings are constants, other vectors are names."""
    known = _known(config)
    # A vector that is only another name or a number needs no local constant.
    node = substitute(formula(name, config.mode), known)
    for named in names(node):
        if named in _VECTORS:
            leaf = formula_in(config, named, dtype)
            known[named] = Name(_local(named, dtype)) if isinstance(leaf, Operation) else leaf
    return fold(substitute(node, known), dtype)


def described(config: KernelConfig, name: str) -> str:
    """An element's formula in a configuration, for people: settings appear by name, constants are folded."""
    field = FIELDS[name]
    if name not in _VECTORS:
        return field.formula
    terms = {term: formula(term, config.mode) for term in TERMS}
    written = text(fold(substitute(substitute(formula(name, config.mode), terms), _known(config)), field.dtype))
    return f"0, then the running sum of {written}" if field.kind == "running_sum" else written


def locals_of(config: KernelConfig, fields: Sequence[str]) -> list[Local]:
    """The local constants from which emitted code computes some fields, in an order in which they can be computed.

    Args:
        config: the configuration.
        fields: vectors and running sums, either all per request or all per row. Per-row code can use the locals of the
            per-request fields, so these aren't repeated for it.
    """
    found: dict[str, Local] = {}

    def visit(name: str, dtype: Dtype) -> None:
        node = formula_in(config, name, dtype)
        named = names(node)
        for other in _VECTORS:
            if _local(other, dtype) in named:
                visit(other, dtype)
        local = _local(name, dtype)
        if isinstance(node, Operation):
            kind = "std::int64_t" if dtype == "int64" else "std::int32_t"
            found.setdefault(local, Local(local, kind, cpp(node, dtype)))

    for name in fields:
        visit(name, FIELDS[name].dtype)
    if any(name in config.row_fields for name in fields):
        for local in locals_of(config, config.request_vectors):
            found.pop(local.name, None)
    return list(found.values())


def element(config: KernelConfig, name: str) -> str:
    """The C++ of a vector's element, or of a running sum's summand; it uses the locals of locals_of."""
    dtype = FIELDS[name].dtype
    node = formula_in(config, name, dtype)
    return _local(name, dtype) if isinstance(node, Operation) else cpp(node, dtype)


def functions_of(config: KernelConfig) -> frozenset[str]:
    """The division functions of templates/device/ that the emitted formulas call."""
    if config.copies:
        return frozenset()
    written = [local.cpp for name in config.vectors for local in locals_of(config, [name])]
    return frozenset(
        function for function in ("floor_div", "floor_mod", "ceil_div") if f"{function}(" in " ".join(written)
    )


def evaluate_vectors(
    config: KernelConfig, seq_lens: Tensor, extend_seq_lens: Tensor | None = None, step: int = 0
) -> dict[str, Tensor]:
    """The values of a configuration's vectors and running sums for one backend, by their formulas, with PyTorch.

    Args:
        config: its vectors, mode, offsets and settings.
        seq_lens: int32 or int64 [bs].
        extend_seq_lens: int32 or int64 [bs], the rows of each request, for a configuration with variable rows.
        step: the backend, from 0 on.

    Returns:
        By field, a tensor of its dtype with one element per request or row; running sums have one more.
    """
    base_len = seq_lens.int()
    counts = base_len.new_full(base_len.shape, 1 if config.mode == "decode" else config.next_n)
    if config.variable_rows and extend_seq_lens is not None:
        counts = extend_seq_lens.int().clamp(min=0)
    offset = base_len.new_full(base_len.shape, config.length_offsets[step % len(config.length_offsets)])
    request = base_len.new_ones(base_len.shape).cumsum(0) - 1
    inputs = {"base_len": base_len, "offset": offset, "seq_len": base_len + offset, "rows": counts, "request": request}
    inputs |= {"step": base_len.new_full(base_len.shape, step)}
    of_rows = {name: tensor.repeat_interleave(counts) for name, tensor in inputs.items()}
    before = (counts.cumsum(0) - counts).repeat_interleave(counts)
    of_rows["row"] = of_rows["rows"].new_ones(before.shape).cumsum(0) - 1 - before
    values: dict[str, Tensor] = {}
    for name in config.vectors:
        field = FIELDS[name]
        by_name = inputs if field.per == "request" else of_rows
        wide = field.dtype == "int64"
        node = substitute(substituted(name, _formulas(config.mode)), _known(config))
        tensor = evaluate(node, {n: t.long() if wide else t.int() for n, t in by_name.items()})
        if field.kind == "running_sum":
            sums = tensor.new_zeros(tensor.numel() + 1)
            sums[1:] = tensor.cumsum(0, dtype=tensor.dtype)
            tensor = sums
        values[name] = tensor.bool() if field.dtype == "bool" else tensor
    return values


def _local(name: str, dtype: Dtype) -> str:
    """The name of the local constant with a vector's value; a field of another width has a local of its own width."""
    return name if (dtype == "int64") == (_VECTORS[name].dtype == "int64") else f"{name}_{dtype}"
