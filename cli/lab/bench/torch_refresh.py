"""The refresh in PyTorch, in three ways: recomputed for each backend, computed once and copied, and compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .cases import INDEX_TOPK
from .scene import Call, Scene


@dataclass(frozen=True)
class Views:
    """The tensors of a scene, sliced in advance to what is read and written: slicing would cost time in every call.

    ``tables`` has the columns of req_to_token, ``pages`` the first column of each page.
    """

    seq_lens: Tensor
    rows: Tensor
    tables: Tensor
    pages: Tensor | None
    shift: int
    backends: list[dict[str, Tensor]]


def views(scene: Scene, columns: int) -> Views:
    """The views of a scene.

    Args:
        columns: table columns to write.
    """
    seq_lens, rows, pool = scene.inputs
    page = scene.page_size
    backends = []
    for buffers in scene.buffers:
        cut = {field.name: tensor for field, tensor in buffers.items()}
        for name in ("cu_seqlens_k", "nsa_cu_seqlens_k"):
            cut[name] = cut[name][1:]
        cut["page_indices"] = cut["page_indices"][:, :columns]
        if page > 1:
            cut["real_page_table"] = cut["real_page_table"][:, : -(-columns // page)]
        backends.append(cut)
    pages = pool[:, :columns:page] if page > 1 else None
    return Views(seq_lens, rows, pool[:, :columns], pages, page.bit_length() - 1, backends)


def recompute(views: Views, backend: dict[str, Tensor]) -> None:
    """Refreshes one backend; each tensor is computed in place."""
    cache_seqlens, nsa = backend["cache_seqlens"], backend["nsa_cache_seqlens"]
    cache_seqlens.copy_(views.seq_lens)
    torch.cumsum(cache_seqlens, 0, dtype=torch.int32, out=backend["cu_seqlens_k"])
    torch.clamp(cache_seqlens, max=INDEX_TOPK, out=nsa)
    torch.cumsum(nsa, 0, dtype=torch.int32, out=backend["nsa_cu_seqlens_k"])
    torch.index_select(views.tables, 0, views.rows, out=backend["page_indices"])
    if views.pages is not None:
        tokens = torch.index_select(views.pages, 0, views.rows)
        torch.bitwise_right_shift(tokens, views.shift, out=backend["real_page_table"])


def copies(views: Views, computed: dict[str, Tensor]) -> None:
    """Computes into ``computed`` once, then copies to all backends."""
    recompute(views, computed)
    names = list(computed)
    torch._foreach_copy_(
        [backend[name] for backend in views.backends for name in names],
        [computed[name] for _ in views.backends for name in names],
    )


def fused(
    seq_lens: Tensor,
    rows: Tensor,
    tables: Tensor,
    pages: Tensor | None,
    shift: int,
    backends: list[dict[str, Tensor]],
) -> None:
    """The source for torch.compile to fuse: each value computed once, and N copies of it."""
    cache_seqlens = seq_lens.to(torch.int32)
    nsa = cache_seqlens.clamp(max=INDEX_TOPK)
    values = {
        "cache_seqlens": cache_seqlens,
        "cu_seqlens_k": torch.cumsum(cache_seqlens, 0, dtype=torch.int32),
        "nsa_cache_seqlens": nsa,
        "nsa_cu_seqlens_k": torch.cumsum(nsa, 0, dtype=torch.int32),
        "page_indices": tables[rows],
    }
    if pages is not None:
        values["real_page_table"] = pages[rows] >> shift
    for backend in backends:
        for name, tensor in backend.items():
            tensor.copy_(values[name])


def call(how: str, views: Views) -> Call:
    """The call of a way: "recompute", "copies" or "compile"."""
    if how == "recompute":

        def run() -> None:
            for backend in views.backends:
                recompute(views, backend)

        return run
    if how == "copies":
        computed = {name: torch.empty_like(tensor) for name, tensor in views.backends[0].items()}
        return lambda: copies(views, computed)
    compiled_refresh = compiled()
    return lambda: compiled_refresh(views.seq_lens, views.rows, views.tables, views.pages, views.shift, views.backends)


@cache
def compiled() -> Callable[..., None]:
    """``fused`` under torch.compile, with dynamic sizes: one build serves all shapes of a run."""
    # Imported here because it takes seconds.
    import torch._dynamo

    # There is a build for each number of backends, for batches of one and for odd strides. By default, the ninth build
    # would run uncompiled.
    settings: Any = torch._dynamo.config
    settings.recompile_limit = settings.accumulated_recompile_limit = 512
    settings.fail_on_recompile_limit_hit = True
    return torch.compile(fused, dynamic=True)
