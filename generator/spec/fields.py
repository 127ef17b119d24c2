"""The table of metadata fields. A field is declared here and nowhere else.

Names are SGLang's NSA names; meanings follow its DSA/NSA backend, formulas as in ``reference.py``. In the
formulas ``s`` is a request's sequence length, ``n`` is ``next_n``, ``q`` a request's extend length, ``j`` a row's place
among its request's rows, ``T`` is ``index_topk``, ``P`` is ``page_size``, ``k`` is ``index_kpool`` and ``row`` is the
request's row of ``req_to_token``.

A field has an element for each of the bs requests, or for each of the R rows. In decode R is bs. In target_verify and
draft_extend a request has n rows (q of its own with variable extend lengths), request after request.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    # For annotations alone: what emits and loads kernels runs without torch.
    from torch import Tensor

Kind = Literal["lengths", "cumulative", "table", "schedule", "splits", "indices"]
Per = Literal["request", "row"]


@dataclass(frozen=True)
class Field:
    """One metadata field.

    Attributes:
        name: attribute of MetadataBuffers, and the spelling in the emitted CUDA.
        kind: "lengths" is int32 [rows], "cumulative" is int32 [rows + 1] and starts with 0, "table" is
            int32 [rows, columns] with unit inner stride. "schedule" is int32 [parts, words], contiguous, its size a
            number of multiprocessors; "splits" is int32 [bs + 1] and comes with one; "indices" is int32 [capacity].
        shape: the shape for people, in decode, with bs requests.
        formula: what an element holds.
        per: whether its rows are requests, or the rows that a request has n or q of.
    """

    name: str
    kind: Kind
    shape: str
    formula: str
    per: Per = "row"

    @property
    def dim(self) -> int:
        """Dimensions of its tensor."""
        return 2 if self.kind in ("table", "schedule") else 1

    @property
    def extra(self) -> int:
        """Elements that it has more than requests or rows: the 0 that running sums begin with."""
        return int(self.kind in ("cumulative", "splits"))

    @property
    def sized_by_batch(self) -> bool:
        """Whether its first dimension says how many requests or rows fit."""
        return self.kind not in ("schedule", "indices")

    def shape_in(self, mode: str) -> str:
        """The shape in a forward mode, with bs requests and R rows."""
        return self.shape if mode == "decode" or self.per == "request" else self.shape.replace("bs", "R")


def _field(kind: Kind, shape: str, formula: str, per: Per = "row") -> Tensor | None:
    return dataclasses.field(default=None, metadata={"kind": kind, "shape": shape, "formula": formula, "per": per})


@dataclass(eq=False)
class MetadataBuffers:
    """The destination tensors of one backend, all int32 on one device. Any field may be None: it isn't written.

    Shapes are capacities: a refresh of ``bs`` requests writes the first ``bs`` (or R) rows and leaves the others alone.
    """

    cache_seqlens: Tensor | None = _field("lengths", "[bs]", "s, in target_verify s + n", "request")
    cu_seqlens_k: Tensor | None = _field(
        "cumulative", "[bs + 1]", "0, then the running sum of cache_seqlens", "request"
    )
    page_indices: Tensor | None = _field("table", "[bs, W]", "req_to_token[row, column]")
    nsa_cache_seqlens: Tensor | None = _field(
        "lengths", "[bs]", "min(e, T) with e = seqlens_expanded; with pools min(floor(e / k) * k, T) + e mod k"
    )
    nsa_cu_seqlens_k: Tensor | None = _field("cumulative", "[bs + 1]", "0, then the running sum of nsa_cache_seqlens")
    real_page_table: Tensor | None = _field("table", "[bs, ceil(W / P)]", "floor(req_to_token[row, column * P] / P)")
    seqlens_expanded: Tensor | None = _field(
        "lengths", "[bs]", "in decode s; in target_verify max(s + j + 1, 0); in draft_extend max(s - q + j + 1, 0)"
    )
    pooled_cache_seqlens: Tensor | None = _field("lengths", "[bs]", "floor(cache_seqlens / k)", "request")
    pooled_real_page_table: Tensor | None = _field(
        "table", "[bs, ceil(W / P / k)]", "floor(real_page_table[row, column * k] / k)"
    )
    paged_mqa_schedule_metadata: Tensor | None = _field(
        "schedule", "[num_sms + 1, 2]", "where each multiprocessor begins: its query atom and split of 256", "request"
    )
    flashmla_metadata: Tensor | None = _field(
        "schedule", "[num_sm_parts, 8]", "where each part begins and ends, in requests and blocks of 64", "request"
    )
    num_splits: Tensor | None = _field(
        "splits", "[bs + 1]", "0, then the running sum of each request's splits", "request"
    )
    kv_indptr: Tensor | None = _field(
        "cumulative", "[bs + 1]", "0, then the running sum of max(s, 0), in target_verify of max(s, 0) + n", "request"
    )
    kv_indices: Tensor | None = _field(
        "indices", "[capacity]", "req_to_token[row, column] at kv_indptr[request] + column", "request"
    )

    def items(self) -> Iterator[tuple[Field, Tensor]]:
        """The fields that are present, in the order of the table."""
        for field in FIELDS.values():
            tensor = getattr(self, field.name)
            if tensor is not None:
                yield field, tensor


FIELDS: dict[str, Field] = {f.name: Field(f.name, **f.metadata) for f in dataclasses.fields(MetadataBuffers)}
