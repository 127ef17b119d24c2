"""The metadata fields. Each is declared here, in one line, and nowhere else.

Vectors and running sums are declared by a formula (see expressions.py). The kernel, its parameters, the checks of a
binding, descriptions and an evaluation with PyTorch follow from it (see vectors.py). Any other field has its own code
in templates/device; its declaration gives the shape, and describes an element for people.

A field has one element per request (bs), or one per row (R). In decode R is bs. In target_verify and
draft_extend a request has several rows, request after request. ``reference.py`` defines each field again, by hand.

A formula may name:

* ``base_len``: a request's input length, as int32;
* ``offset``: the sum of the backend's seqlen_offset and, in target_verify, next_n;
* ``seq_len``: base_len + offset, the length that the backend sees;
* ``rows``: the number of rows of the request, 1 in decode;
* ``row``: the index of the element's row in its request, from 0; only in fields with one element per row;
* ``request`` and ``step``: the index of the request, and of the backend;
* the settings ``index_topk``, ``index_kpool`` and ``page_size``;
* other vectors, and TERMS. A name stands for that vector's formula, so the vector needn't be bound.

In the formulas of the other kinds ``pool_row`` is the request's row of req_to_token and W the width of page_indices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .expressions import Dtype

if TYPE_CHECKING:
    # For annotations only: emitting and loading kernels needs no torch.
    from torch import Tensor

Kind = Literal["vector", "running_sum", "table", "packed", "schedule", "splits", "counts"]
Per = Literal["request", "row"]


@dataclass(frozen=True)
class Vector:
    """One element per request, or per row.

    Attributes:
        formula: the element's value.
        per: what has an element: a request, or each row of a request.
        dtype: int32 and bool are computed in wrapping int32, int64 with inputs that are widened first; bool stores
            whether the value isn't 0.
        rows: how many rows a request has in this field, where that isn't what the mode says.
        pad: what lies between the last element and the captured size of a run; None leaves that alone. Of a running sum
            also "last", its last element again.
        missing: what a look-up outside of its source yields.
        decode: the formula in decode, where it isn't what the other one gives for one row.
    """

    formula: str
    per: Per = "row"
    dtype: Dtype = "int32"
    rows: int | None = None
    pad: int | Literal["last"] | None = None
    missing: int = 0
    decode: str | None = None
    kind: ClassVar[Kind] = "vector"
    shape: ClassVar[str] = "[bs]"

    @property
    def meaning(self) -> str:
        """What an element holds, for people."""
        return self.formula if self.decode is None else f"{self.formula}; in decode {self.decode}"


@dataclass(frozen=True)
class RunningSum(Vector):
    """0, then the inclusive running sum of a formula over all requests or rows."""

    per: Per = "request"
    kind: ClassVar[Kind] = "running_sum"
    shape: ClassVar[str] = "[bs + 1]"

    @property
    def meaning(self) -> str:
        """What an element holds, for people."""
        return f"0, then the running sum of {super().meaning}"


@dataclass(frozen=True)
class Table:
    """A row for each request or row, of which the live columns are written.

    Attributes:
        formula: the value of an element; it may also name ``column``.
        columns: how many columns are live; the same for all rows of a request.
        per: whether there is one row per request, or per row.
        dtype: as in Vector.
        fill: what the other columns hold; None leaves them alone.
        missing: what a look-up outside of its source yields.
        shape: the shape for people, in decode, with bs requests.
    """

    formula: str
    columns: str
    per: Per = "row"
    dtype: Dtype = "int32"
    fill: int | None = None
    missing: int = 0
    shape: str = "[bs, W]"
    kind: ClassVar[Kind] = "table"

    @property
    def meaning(self) -> str:
        """What an element holds, for people."""
        return f"{self.formula}, for columns below {self.columns}"


@dataclass(frozen=True)
class Packed:
    """The rows of all requests one after the other: the requests' tokens or pages, where a running sum says.

    Attributes:
        formula: the value of an element; it may also name ``column``.
        at: the running sum over requests of how many elements each has.
        dtype: as in Vector.
        missing: what a look-up outside of its source yields.
        other_dtypes: what its tensors may have in place of ``dtype``.
    """

    formula: str
    at: str
    dtype: Dtype = "int32"
    missing: int = 0
    other_dtypes: tuple[Dtype, ...] = ()
    per: ClassVar[Per] = "request"
    kind: ClassVar[Kind] = "packed"
    shape: ClassVar[str] = "[capacity]"

    @property
    def meaning(self) -> str:
        """What an element holds, for people."""
        return f"{self.formula}, at {self.at}[request] + column"


@dataclass(frozen=True)
class Special:
    """A field with its own code in templates/device.

    Attributes:
        kind: "schedule" is contiguous, and its size is a number of SMs; "splits" is a running sum that belongs to one;
            "counts" has a number for each request, which depends on all requests and on no backend's offset.
        shape: the shape for people, in decode, with bs requests.
        meaning: what an element holds, for people.
        per: whether there is one element, or table row, per request or per row.
        settings: the settings that its values depend on.
        other_dtypes: dtypes that its tensors may have in place of ``dtype``.
    """

    kind: Kind
    shape: str
    meaning: str
    per: Per = "row"
    dtype: Dtype = "int32"
    settings: tuple[str, ...] = ()


Declaration = Vector | Table | Packed | Special


@dataclass(frozen=True)
class Field:
    """One metadata field.

    Attributes:
        name: attribute of MetadataBuffers, and the spelling in the emitted CUDA.
        declaration: what it holds.
    """

    name: str
    declaration: Declaration

    @property
    def kind(self) -> Kind:
        """The kind of field."""
        return self.declaration.kind

    @property
    def per(self) -> Per:
        """Whether it has one element, or table row, per request or per row of a request."""
        return self.declaration.per

    @property
    def dtype(self) -> Dtype:
        """The dtype of its tensors, unless they have one of other_dtypes."""
        return self.declaration.dtype

    @property
    def dtypes(self) -> tuple[Dtype, ...]:
        """What its tensors may have."""
        more = self.declaration.other_dtypes if isinstance(self.declaration, Packed) else ()
        return (self.dtype, *more)

    @property
    def shape(self) -> str:
        """The shape for people, in decode, with bs requests."""
        return self.declaration.shape

    @property
    def formula(self) -> str:
        """The meaning of an element, for people."""
        return self.declaration.meaning

    @property
    def own_rows(self) -> int | None:
        """How many rows a request has in it, where that isn't what the mode says."""
        return self.declaration.rows if isinstance(self.declaration, Vector) else None

    @property
    def pad(self) -> int | Literal["last"] | None:
        """What lies between the last element and the captured size of a run, if it is written."""
        return self.declaration.pad if isinstance(self.declaration, Vector) else None

    @property
    def dim(self) -> int:
        """The number of dimensions of its tensor."""
        return 2 if self.kind in ("table", "schedule") else 1

    @property
    def extra(self) -> int:
        """Elements beyond one per request or row: 1 for the 0 that running sums begin with."""
        return int(self.kind in ("running_sum", "splits"))

    @property
    def sized_by_batch(self) -> bool:
        """Whether its first dimension is a capacity in requests or rows."""
        return self.kind not in ("schedule", "packed")

    def shape_in(self, mode: str) -> str:
        """The shape in a forward mode, with bs requests and R rows."""
        if self.own_rows is not None:
            return self.shape.replace("bs", f"bs * {self.own_rows}")
        return self.shape if mode == "decode" or self.per == "request" else self.shape.replace("bs", "R")


def vector(
    formula: str,
    per: Per = "row",
    *,
    dtype: Dtype = "int32",
    rows: int | None = None,
    pad: int | None = None,
    missing: int = 0,
) -> Vector:
    """Declares a vector: one element a request, or one for each of its rows.

    Args:
        formula: the value of an element, such as "base_len + row"; see the top of this module for what it may name.
        per: "request", or "row" for an element for each row that a request has in the forward mode.
        dtype: "int32", "int64" or "bool" (whether the value isn't 0).
        rows: a number of rows of its own for each request, in place of the mode's.
        pad: a number for the elements from the batch to the captured size that a run is given; None leaves them alone.
        missing: what a look-up outside of its source yields.

    The formula is checked when the declaration is used: by bind() or KernelConfig, which raise ConfigError.
    """
    return Vector(formula, per, dtype, rows, pad, missing)


def running_sum(
    formula: str,
    per: Per = "request",
    *,
    dtype: Dtype = "int32",
    pad: int | Literal["last"] | None = None,
    missing: int = 0,
) -> RunningSum:
    """Declares a running sum: 0, then the sums of a formula over the requests or rows so far, n + 1 elements.

    Args:
        formula, per, missing: see vector(); the sum wraps around at the width of ``dtype``.
        dtype: "int32" or "int64".
        pad: as in vector(), or "last" for the sum of all.
    """
    return RunningSum(formula, per, dtype, None, pad, missing)


def table(
    formula: str,
    per: Per = "row",
    *,
    columns: str,
    dtype: Dtype = "int32",
    fill: int | None = None,
    missing: int = 0,
) -> Table:
    """Declares a table: a row for each request or row, such as the pages of its tokens.

    Args:
        formula, per, dtype, missing: see vector(); the formula may also name ``column``.
        columns: the formula of how many columns of a row are live, such as "ceil_div(seq_len, page_size)". They end
            at the destination's width at the latest.
        fill: a number for the columns that aren't live; None leaves them alone.
    """
    return Table(formula, columns, per, dtype, fill, missing)


def packed(formula: str, *, at: str, dtype: Dtype = "int32", missing: int = 0) -> Packed:
    """Declares a packed field: the elements of request after request, as FlashInfer's kv_indices has them.

    Args:
        formula, dtype, missing: see vector(); the formula may also name ``column``, an element's place in its request.
        at: the name of the running sum over requests that counts each request's elements, such as "kv_indptr".
            Offsets are summed up in int64, and elements beyond the destination's capacity are dropped.
    """
    return Packed(formula, at, dtype, missing)


def field(declaration: Declaration) -> Any:
    """An attribute of MetadataBuffers."""
    return dataclasses.field(default=None, metadata={"declaration": declaration})


def special(kind: Kind, shape: str, meaning: str, per: Per = "row", **more: Any) -> Any:
    """An attribute of MetadataBuffers with code of its own."""
    return field(Special(kind, shape, meaning, per, **more))


@dataclass(eq=False)
class MetadataBuffers:
    """The destination tensors of one backend, on one device. Any field may be None: it isn't written.

    All are int32; kv_indices may be int64.

    Shapes are capacities: a refresh of ``bs`` requests writes the first ``bs`` (or R) rows and leaves the others alone.
    """

    cache_seqlens: Tensor | None = field(vector("seq_len", "request"))
    cu_seqlens_k: Tensor | None = field(running_sum("cache_seqlens", "request"))
    page_indices: Tensor | None = field(table("token(column)", columns="seq_len"))
    # Complete pools are clamped; the tokens after the last one stay.
    nsa_cache_seqlens: Tensor | None = field(vector("min(seqlens_expanded - pool_tail, index_topk) + pool_tail"))
    nsa_cu_seqlens_k: Tensor | None = field(running_sum("nsa_cache_seqlens", "row"))
    real_page_table: Tensor | None = field(
        Table(
            "token(column * page_size) // page_size",
            "ceil_div(seq_len, page_size)",
            shape="[bs, ceil(W / page_size)]",
        )
    )
    # Every row sees one token less than the next row. A padding request has fewer tokens than rows.
    seqlens_expanded: Tensor | None = field(Vector("max(seq_len - rows + row + 1, 0)", decode="seq_len"))
    pooled_cache_seqlens: Tensor | None = field(vector("cache_seqlens // index_kpool", "request"))
    pooled_real_page_table: Tensor | None = field(
        Table(
            "token(column * page_size * index_kpool) // page_size // index_kpool",
            "ceil_div(ceil_div(seq_len, page_size), index_kpool)",
            shape="[bs, ceil(W / page_size / index_kpool)]",
        )
    )
    paged_mqa_schedule_metadata: Tensor | None = special(
        "schedule",
        "[num_sms + 1, 2]",
        "where each SM begins: its query atom and split of 256",
        "request",
        settings=("index_kpool",),
    )
    flashmla_metadata: Tensor | None = special(
        "schedule", "[num_sm_parts, 8]", "where each part begins and ends, in requests and blocks of 64", "request"
    )
    num_splits: Tensor | None = special(
        "splits", "[bs + 1]", "0, then the running sum of each request's splits", "request"
    )
    # A length below zero counts as no tokens, so that requests never overlap.
    kv_indptr: Tensor | None = field(running_sum("max(base_len, 0) + offset", "request"))
    kv_indices: Tensor | None = field(Packed("token(column)", "kv_indptr", other_dtypes=("int64",)))
    num_kv_splits: Tensor | None = special("counts", "[bs]", "into how many parts attention splits it", "request")

    def items(self) -> Iterator[tuple[Field, Tensor]]:
        """The fields that are present, with their tensors, in the order of FIELDS."""
        for field in FIELDS.values():
            tensor = getattr(self, field.name)
            if tensor is not None:
                yield field, tensor


# Vectors that only formulas use: no buffer holds them.
TERMS: dict[str, Field] = {"pool_tail": Field("pool_tail", Vector("seqlens_expanded % index_kpool"))}

FIELDS: dict[str, Field] = {
    f.name: Field(f.name, f.metadata["declaration"]) for f in dataclasses.fields(MetadataBuffers)
}
