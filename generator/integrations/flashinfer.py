"""FlashInfer: kv_indptr and kv_indices of several draft steps or wrappers, refreshed by one launch.

For pages of one token, as SGLang has them: kv_indices are rows of the KV cache, request after request. In SGLang,
attach a multi-step draft backend of FlashInfer, FlashInfer-MLA or Triton with ``onelaunch.integrations.sglang.attach``.
SGLang keeps both lists for all captured batch sizes in two tensors with a row for each step, so one plan serves them
all.

Without SGLang, for wrappers that were made with ``use_cuda_graph=True``. The lengths of draft steps differ; for other
wrappers omit seqlen_offsets::

    from onelaunch.integrations import flashinfer

    # once for each batch size
    plan = flashinfer.bind_backends(wrappers, req_to_token, seqlen_offsets=range(1, len(wrappers) + 1))

    # each round, before the replay
    plan.run(seq_lens, req_pool_indices)

FlashInfer's planning on the host (``plan``, or SGLang's ``fast_decode_plan``) must still be called, with the same
tensors, which it then doesn't copy. kv_last_page_len is 1 everywhere and never changes. The MLA wrapper's
``_kv_len_arr_buf`` isn't refreshed. Pages of several tokens are refused, and so are draft trees (a topk above 1), which
have a list of tokens for each branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..errors import ArgumentError
from ..run.plan import Plan, bind
from ..spec.fields import MetadataBuffers
from .attributes import described, has, read
from .refusals import refusal

_ADVICE = "onelaunch doesn't know this version of the engine: fill a MetadataBuffers and call onelaunch.bind."
# The paged wrappers' names, then those of BatchMLAPagedAttentionWrapper.
_INDPTR = ("_paged_kv_indptr_buf", "_kv_indptr_buf")
_INDICES = ("_paged_kv_indices_buf", "_kv_indices_buf")


def buffers_from(wrapper: Any) -> MetadataBuffers:
    """The tensors of one of FlashInfer's wrappers for CUDA graphs, which reads its indices from buffers.

    Args:
        wrapper: BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper or
            BatchMLAPagedAttentionWrapper, or an object with their attributes.

    Raises:
        ArgumentError: an attribute is missing, there is no buffer, or a page has more than one token.
    """
    if (tokens := _page_size(wrapper)) != 1:
        raise ArgumentError(
            f"the wrapper was planned with pages of {tokens} tokens or more; allowed: 1. Its kv_indices list pages, "
            "which onelaunch doesn't support."
        )
    found = {
        "kv_indptr": read("the wrapper", wrapper, _INDPTR, _ADVICE),
        "kv_indices": read("the wrapper", wrapper, _INDICES, _ADVICE),
    }
    for name, tensor in found.items():
        if tensor is None:
            raise ArgumentError(f"the wrapper's buffer of {name} is None. Make the wrapper with use_cuda_graph=True.")
    return MetadataBuffers(**found)


def _page_size(wrapper: Any) -> int:
    """The page size that a wrapper was planned with, or the least that it can be; 1 before it was planned.

    The MLA wrapper and two of the decode wrapper's implementations keep it. In the others a last page with several
    tokens shows it; they may all have one by chance.
    """
    kept = getattr(wrapper, "_page_size", None)
    last = getattr(wrapper, "_paged_kv_last_page_len_buf", None)
    if kept is None and getattr(wrapper, "_plan_info", None) is not None and isinstance(last, Tensor) and len(last):
        kept = int(last.max())
    return max(kept or 1, 1)


def bind_backends(backend: Any, req_to_token: Tensor | None = None, **settings: Any) -> Plan:
    """Binds the steps of one of SGLang's multi-step draft backends, or a list of wrappers.

    Args:
        backend: a multi-step backend with attn_backends, kv_indptr [steps, max_bs + 1] and cuda_graph_kv_indices
            [steps, capacity], whose first len(attn_backends) rows are refreshed; or a list of wrappers.
        req_to_token: int32 or int64 [pool rows, W]; None is the multi-step backend's own.
        settings: arguments of onelaunch.bind, such as seq_lens_dtype. Unless given, seqlen_offsets are 1, 2, ... for a
            multi-step backend, and none for wrappers.

    Returns:
        A plan; run() takes the lengths without the draft tokens, and each request's row of the pool. Tokens beyond the
        capacity aren't written.

    Raises:
        ArgumentError: an attribute is missing or doesn't fit; see onelaunch.bind.
    """
    given = dict(settings)
    if given.get("page_size", 1) != 1:
        raise ArgumentError(
            f"page_size is {given['page_size']}; allowed: 1. kv_indices of larger pages list pages, which onelaunch "
            "doesn't support."
        )
    if has(backend, ("attn_backends",)):
        buffers = _steps(backend)
        if req_to_token is None:
            req_to_token = pool_of(backend)
        given.setdefault("seqlen_offsets", range(1, len(buffers) + 1))
    elif isinstance(backend, Sequence) and not isinstance(backend, str):
        buffers = [buffers_from(wrapper) for wrapper in backend]
        if req_to_token is None:
            raise ArgumentError("req_to_token is None; wrappers don't have the pool. Pass req_to_token=.")
    else:
        raise ArgumentError(
            f"backend has no attribute attn_backends; it is {described(backend)}. Give a multi-step draft backend, or "
            "a list of wrappers."
        )
    if given.get("seqlen_offsets") is not None:
        given["seqlen_offsets"] = list(given["seqlen_offsets"])
    return bind(buffers, req_to_token=req_to_token, **given)


def _steps(backend: Any) -> list[MetadataBuffers]:
    if reason := refusal(backend, partly=True):
        raise ArgumentError(f"{type(backend).__name__} isn't served: {reason}. The engine's own code serves it.")
    children = read("backend", backend, ("attn_backends",), _ADVICE)
    if not isinstance(children, Sequence):
        raise ArgumentError(f"backend.attn_backends is a {type(children).__name__}; it must be a list. {_ADVICE}")
    count = len(children)
    branches = getattr(backend, "topk", None) or 1
    if branches > 1:
        raise ArgumentError(
            f"the backend's topk is {branches}; allowed: 0 and 1. A draft tree has a list of tokens for each branch, "
            "which onelaunch doesn't support."
        )
    rows = {}
    for field, name in (("kv_indptr", "kv_indptr"), ("kv_indices", "cuda_graph_kv_indices")):
        tensor = read("backend", backend, (name,), "Call it after init_cuda_graph_state.")
        if not isinstance(tensor, Tensor) or tensor.dim() != 2 or tensor.shape[0] < count:
            what = f"of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
            raise ArgumentError(
                f"backend.{name} is {what} and there are {count} attn_backends; it must be a tensor with a row "
                f"for each step. {_ADVICE}"
            )
        rows[field] = tensor
    return [MetadataBuffers(**{field: tensor[step] for field, tensor in rows.items()}) for step in range(count)]


def pool_of(backend: Any) -> Tensor:
    """req_to_token of an SGLang backend's pool, of its first child, or its own.

    Raises:
        ArgumentError: there is none.
    """
    owner = getattr(backend, "req_to_token_pool", None)
    if owner is None:
        owner = next(iter(getattr(backend, "attn_backends", None) or [backend]))
    found: Tensor | None = read("the backend's pool", owner, ("req_to_token",), "Pass req_to_token=.")
    if found is None:
        raise ArgumentError("the backend's req_to_token is None. Pass req_to_token=.")
    return found
