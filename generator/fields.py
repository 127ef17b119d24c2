"""The table of metadata fields. A field is declared here and nowhere else.

Names are SGLang's NSA names; meanings follow its DSA/NSA backend, formulas as in ``reference.py``. In the
formulas ``s`` is a request's sequence length, ``T`` is ``index_topk``, ``P`` is ``page_size`` and ``row`` is the
request's row of ``req_to_token``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    # For annotations alone: what emits and loads kernels runs without torch.
    from torch import Tensor

Kind = Literal["lengths", "cumulative", "table"]


@dataclass(frozen=True)
class Field:
    """One metadata field.

    Attributes:
        name: attribute of MetadataBuffers, and the spelling in the emitted CUDA.
        kind: "lengths" is int32 [rows], "cumulative" is int32 [rows + 1] and starts with 0, "table" is
            int32 [rows, columns] with unit inner stride.
        shape: the shape for people, with bs requests.
        formula: what an element holds.
    """

    name: str
    kind: Kind
    shape: str
    formula: str


def _field(kind: Kind, shape: str, formula: str) -> Tensor | None:
    return dataclasses.field(default=None, metadata={"kind": kind, "shape": shape, "formula": formula})


@dataclass(eq=False)
class MetadataBuffers:
    """The destination tensors of one backend, all int32 on one device. Any field may be None: it isn't written.

    Shapes are capacities: a refresh of ``bs`` requests writes the first ``bs`` rows and leaves the others alone.
    """

    cache_seqlens: Tensor | None = _field("lengths", "[bs]", "s")
    cu_seqlens_k: Tensor | None = _field("cumulative", "[bs + 1]", "0, then the running sum of cache_seqlens")
    page_indices: Tensor | None = _field("table", "[bs, W]", "req_to_token[row, column]")
    nsa_cache_seqlens: Tensor | None = _field("lengths", "[bs]", "min(s, T)")
    nsa_cu_seqlens_k: Tensor | None = _field("cumulative", "[bs + 1]", "0, then the running sum of nsa_cache_seqlens")
    real_page_table: Tensor | None = _field("table", "[bs, ceil(W / P)]", "floor(req_to_token[row, column * P] / P)")
    seqlens_expanded: Tensor | None = _field("lengths", "[bs]", "s (in decode the same values as cache_seqlens)")

    def items(self) -> Iterator[tuple[Field, Tensor]]:
        """The fields that are present, in the order of the table."""
        for field in FIELDS.values():
            tensor = getattr(self, field.name)
            if tensor is not None:
                yield field, tensor


FIELDS: dict[str, Field] = {f.name: Field(f.name, **f.metadata) for f in dataclasses.fields(MetadataBuffers)}
