"""The metadata fields. A field is declared in one line here, and nowhere else.

Vectors and running sums are declared by a formula (see expressions.py), from which the kernel, the parameters, the
checks of a binding, descriptions and an evaluation with PyTorch follow (vectors.py). What isn't a formula has code of
its own in templates/device, and is declared with its shape and with what an element holds, for people.

A field has an element for each of the bs requests, or for each of the R rows. In decode R is bs. In target_verify and
draft_extend a request has several rows, request after request. ``reference.py`` says by hand what each field means.

A formula may name:

* ``base_len``: a request's input length, as int32;
* ``offset``: what the mode and the backend add to it: the backend's seqlen_offset, and next_n in target_verify;
* ``seq_len``: base_len + offset, the length that the backend sees;
* ``rows``: how many rows the request has, 1 in decode;
* ``row``: which of them the element is, from 0 on; only in fields with an element a row;
* ``request`` and ``step``: the number of the request, and of the backend;
* the settings ``index_topk``, ``index_kpool`` and ``page_size``;
* other vectors, and TERMS. A name stands for a formula, not for memory: the vector needn't be bound.

In the formulas of the other kinds ``pool_row`` is the request's row of req_to_token and W the width of page_indices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .expressions import Dtype

if TYPE_CHECKING:
    # For annotations alone: what emits and loads kernels runs without torch.
    from torch import Tensor

Kind = Literal["vector", "running_sum", "table", "schedule", "splits", "indices"]
Per = Literal["request", "row"]


@dataclass(frozen=True)
class Vector:
    """One element a request or a row.

    Attributes:
        formula: the element's value.
        per: what has an element: a request, or each row of a request.
        dtype: int32 and bool are computed in wrapping int32, int64 with inputs that are widened first; bool stores
            whether the value isn't 0.
        decode: the formula in decode, where it isn't what the other one gives for one row.
    """

    formula: str
    per: Per = "row"
    dtype: Dtype = "int32"
    decode: str | None = None
    kind: ClassVar[Kind] = "vector"
    shape: ClassVar[str] = "[bs]"

    @property
    def meaning(self) -> str:
        """What an element holds, for people."""
        return self.formula if self.decode is None else f"{self.formula}; in decode {self.decode}"


@dataclass(frozen=True)
class RunningSum(Vector):
    """0, then the running sum of a formula over all requests or rows: one element more than there are of them."""

    kind: ClassVar[Kind] = "running_sum"
    shape: ClassVar[str] = "[bs + 1]"

    @property
    def meaning(self) -> str:
        """What an element holds, for people."""
        return f"0, then the running sum of {super().meaning}"


@dataclass(frozen=True)
class Special:
    """A field with code of its own in templates/device.

    Attributes:
        kind: "table" has unit inner stride; "schedule" is contiguous, its size a number of multiprocessors; "splits" is
            a running sum that comes with one; "indices" holds tables one behind the other.
        shape: the shape for people, in decode, with bs requests.
        meaning: what an element holds, for people.
        per: what has an element or a table row: a request, or each row of a request.
        settings: the settings of fields that it depends on.
        other_dtypes: what its tensors may have in place of ``dtype``.
    """

    kind: Kind
    shape: str
    meaning: str
    per: Per = "row"
    dtype: Dtype = "int32"
    settings: tuple[str, ...] = ()
    other_dtypes: tuple[Dtype, ...] = ()


Declaration = Vector | Special


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
        """What sort of field it is."""
        return self.declaration.kind

    @property
    def per(self) -> Per:
        """Whether its rows are requests, or the rows that a request has."""
        return self.declaration.per

    @property
    def dtype(self) -> Dtype:
        """The dtype of its tensors, unless they have one of other_dtypes."""
        return self.declaration.dtype

    @property
    def dtypes(self) -> tuple[Dtype, ...]:
        """What its tensors may have."""
        more = self.declaration.other_dtypes if isinstance(self.declaration, Special) else ()
        return (self.dtype, *more)

    @property
    def shape(self) -> str:
        """The shape for people, in decode, with bs requests."""
        return self.declaration.shape

    @property
    def formula(self) -> str:
        """What an element holds, for people."""
        return self.declaration.meaning

    @property
    def dim(self) -> int:
        """Dimensions of its tensor."""
        return 2 if self.kind in ("table", "schedule") else 1

    @property
    def extra(self) -> int:
        """Elements that it has more than requests or rows: the 0 that running sums begin with."""
        return int(self.kind in ("running_sum", "splits"))

    @property
    def sized_by_batch(self) -> bool:
        """Whether its first dimension says how many requests or rows fit."""
        return self.kind not in ("schedule", "indices")

    def shape_in(self, mode: str) -> str:
        """The shape in a forward mode, with bs requests and R rows."""
        return self.shape if mode == "decode" or self.per == "request" else self.shape.replace("bs", "R")


def _declared(declaration: Declaration) -> Any:
    return dataclasses.field(default=None, metadata={"declaration": declaration})


def vector(formula: str, per: Per = "row", **more: Any) -> Any:
    """Declares a Vector."""
    return _declared(Vector(formula, per, **more))


def running_sum(formula: str, per: Per = "row", **more: Any) -> Any:
    """Declares a RunningSum."""
    return _declared(RunningSum(formula, per, **more))


def special(kind: Kind, shape: str, meaning: str, per: Per = "row", **more: Any) -> Any:
    """Declares a Special."""
    return _declared(Special(kind, shape, meaning, per, **more))


@dataclass(eq=False)
class MetadataBuffers:
    """The destination tensors of one backend, on one device. Any field may be None: it isn't written.

    All are int32; kv_indices may be int64.

    Shapes are capacities: a refresh of ``bs`` requests writes the first ``bs`` (or R) rows and leaves the others alone.
    """

    cache_seqlens: Tensor | None = vector("seq_len", "request")
    cu_seqlens_k: Tensor | None = running_sum("cache_seqlens", "request")
    page_indices: Tensor | None = special("table", "[bs, W]", "req_to_token[pool_row, column]")
    # Complete pools are clamped; the tokens behind the last one stay.
    nsa_cache_seqlens: Tensor | None = vector("min(seqlens_expanded - pool_tail, index_topk) + pool_tail")
    nsa_cu_seqlens_k: Tensor | None = running_sum("nsa_cache_seqlens")
    real_page_table: Tensor | None = special(
        "table",
        "[bs, ceil(W / page_size)]",
        "req_to_token[pool_row, column * page_size] // page_size",
        settings=("page_size",),
    )
    # Every row sees one token less than the row behind it. A padding request has fewer tokens than rows.
    seqlens_expanded: Tensor | None = vector("max(seq_len - rows + row + 1, 0)", decode="seq_len")
    pooled_cache_seqlens: Tensor | None = vector("cache_seqlens // index_kpool", "request")
    pooled_real_page_table: Tensor | None = special(
        "table",
        "[bs, ceil(W / page_size / index_kpool)]",
        "real_page_table[row, column * index_kpool] // index_kpool",
        settings=("page_size", "index_kpool"),
    )
    paged_mqa_schedule_metadata: Tensor | None = special(
        "schedule",
        "[num_sms + 1, 2]",
        "where each multiprocessor begins: its query atom and split of 256",
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
    kv_indptr: Tensor | None = running_sum("max(base_len, 0) + offset", "request")
    kv_indices: Tensor | None = special(
        "indices",
        "[capacity]",
        "req_to_token[pool_row, column] at kv_indptr[request] + column",
        "request",
        other_dtypes=("int64",),
    )

    def items(self) -> Iterator[tuple[Field, Tensor]]:
        """The fields that are present, in the order of the table."""
        for field in FIELDS.values():
            tensor = getattr(self, field.name)
            if tensor is not None:
                yield field, tensor


# Vectors that formulas name, and that no buffer holds.
TERMS: dict[str, Field] = {"pool_tail": Field("pool_tail", Vector("seqlens_expanded % index_kpool"))}

FIELDS: dict[str, Field] = {
    f.name: Field(f.name, f.metadata["declaration"]) for f in dataclasses.fields(MetadataBuffers)
}
