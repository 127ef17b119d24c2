"""FlashInfer: one launch refreshes what the plans of several wrappers or draft steps read.

In SGLang, attach a backend with ``onelaunch.integrations.sglang.attach``: a multi-step draft backend of FlashInfer,
FlashInfer-MLA or Triton, or FlashInfer's single one. SGLang's pages have one token, so kv_indices are rows of the KV
cache. The lists for all captured batch sizes are in two tensors, those of draft steps with a row for each.

Without SGLang, bind wrappers that were made with ``use_cuda_graph=True``. Here they are draft steps, each of which sees
one more token; for other wrappers omit seqlen_offsets::

    from onelaunch.integrations import flashinfer

    # once for each batch size
    host = [flashinfer.on_host(flashinfer.plan_inputs(wrapper)) for wrapper in wrappers]
    plan = flashinfer.bind_backends(
        wrappers, req_to_token, page_size=16, seqlen_offsets=range(1, len(wrappers) + 1), host=host
    )

    # each round, before the replay
    plan.run(seq_lens, req_pool_indices)

Still call FlashInfer's planning on the host: ``plan``, or ``fast_decode_plan``, which copies nothing on the device. It
reads kv_indptr and last_page_len (or kv_len_arr) on the host. From the wrapper's own tensors it copies each one to the
host and waits. Pass the tensors in ``host`` instead: the same launch wrote them too, into pinned memory. Wait for that
launch first (by an event or the stream), and finish all plans of a round before the next run.

FlashInfer still plans, chooses a backend and packs masks. Not refreshed are the dense block tables and lengths of
trtllm-gen, cuDNN and cute-DSL, which ``plan`` makes from these lists on the host. Draft trees (topk above 1) are
refused, because each branch has a list of tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ArgumentError, missing
from ..run.bind import bind
from ..run.declared import Written, into
from ..run.plan import Plan
from ..spec.fields import MetadataBuffers
from ..spec.seams import FLASHINFER
from .attributes import described, has, merged, read
from .refusals import not_served, refusal

_ADVICE = "onelaunch doesn't know this version of the engine: fill a MetadataBuffers and call onelaunch.bind."
# The paged wrappers' names, then those of BatchMLAPagedAttentionWrapper.
_INDPTR = ("_paged_kv_indptr_buf", "_kv_indptr_buf")
_INDICES = ("_paged_kv_indices_buf", "_kv_indices_buf")


_LAST = ("_paged_kv_last_page_len_buf",)
_LENGTHS = ("_kv_len_arr_buf",)
_QUERIES = ("_qo_indptr_buf",)


@dataclass(eq=False)
class PlanInputs:
    """What FlashInfer's plan of one wrapper reads, all int32. A tensor that is None isn't written.

    Attributes:
        kv_indptr: [bs + 1], where each request's pages begin.
        kv_indices: [capacity], the pages.
        last_page_len: [bs], the tokens in each request's last page, 1 to page_size; 0 for a request without pages.
        kv_len_arr: [bs], the tokens of each request; the MLA wrapper has it in place of last_page_len.
        qo_indptr: [bs + 1], where each request's query tokens begin.
    """

    kv_indptr: Tensor | None = None
    kv_indices: Tensor | None = None
    last_page_len: Tensor | None = None
    kv_len_arr: Tensor | None = None
    qo_indptr: Tensor | None = None


def plan_inputs(wrapper: Any) -> PlanInputs:
    """The buffers of one of FlashInfer's wrappers for CUDA graphs.

    Args:
        wrapper: BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper or
            BatchMLAPagedAttentionWrapper, or an object with their attributes.

    Raises:
        ArgumentError: an attribute is missing, or there is no buffer.
    """
    found = {
        "kv_indptr": read("the wrapper", wrapper, _INDPTR, _ADVICE),
        "kv_indices": read("the wrapper", wrapper, _INDICES, _ADVICE),
    }
    for name, tensor in found.items():
        if tensor is None:
            raise ArgumentError(f"the wrapper's buffer of {name} is None. Make the wrapper with use_cuda_graph=True.")
    for name, (attribute,) in (("last_page_len", _LAST), ("kv_len_arr", _LENGTHS), ("qo_indptr", _QUERIES)):
        found[name] = getattr(wrapper, attribute, None)
    return PlanInputs(**found)


def on_host(inputs: PlanInputs) -> PlanInputs:
    """New host tensors for all that a plan reads on the host: everything but kv_indices.

    They are pinned if the inputs are on a GPU. kv_indptr determines the number of requests.
    """
    assert inputs.kv_indptr is not None
    requests = len(inputs.kv_indptr) - 1
    pinned = inputs.kv_indptr.device.type == "cuda"

    def new(tensor: Tensor | None, count: int) -> Tensor | None:
        return None if tensor is None else torch.zeros(count, dtype=torch.int32, pin_memory=pinned)

    return PlanInputs(
        kv_indptr=new(inputs.kv_indptr, requests + 1),
        last_page_len=new(inputs.last_page_len, requests),
        kv_len_arr=new(inputs.kv_len_arr, requests),
        qo_indptr=new(inputs.qo_indptr, requests + 1),
    )


def _page_size(wrapper: Any) -> int:
    """The page size that a wrapper was planned with, or a lower bound of it; 1 before it was planned.

    The MLA wrapper and two of the decode wrapper's implementations store it. For the others the longest last page is a
    lower bound, which is 1 if every last page happens to have one token.
    """
    kept = getattr(wrapper, "_page_size", None)
    last = getattr(wrapper, "_paged_kv_last_page_len_buf", None)
    if kept is None and getattr(wrapper, "_plan_info", None) is not None and isinstance(last, Tensor) and len(last):
        kept = int(last.max())
    return max(kept or 1, 1)


def bind_backends(
    backend: Any,
    req_to_token: Tensor | None = None,
    *,
    query_len: int | None = None,
    host: Sequence[PlanInputs] | None = None,
    num_kv_splits: Tensor | None = None,
    **settings: Any,
) -> Plan:
    """Binds the steps of one of SGLang's multi-step draft backends, or a list of wrappers.

    For wrappers the launch writes kv_indptr, kv_indices, MLA's kv_len_arr, and last_page_len if pages have several
    tokens (with pages of one token it is always 1).

    Args:
        backend: a multi-step backend with attn_backends, kv_indptr [steps, max_bs + 1] and cuda_graph_kv_indices
            [steps, capacity], whose first len(attn_backends) rows are refreshed; or a list of wrappers.
        req_to_token: int32 or int64 [pool rows, W]; None is the multi-step backend's own. With pages of P tokens, every
            P-th column is the first token of a page.
        query_len: the query tokens of each request, to write qo_indptr too; None leaves it alone. Only for wrappers.
        host: for each wrapper the tensors that get the same values on the host, pinned if the wrappers are on a GPU:
            see on_host(). Their qo_indptr is written only with query_len. Only for wrappers.
        num_kv_splits: int32 [max_bs], also written: the split counts that all steps of a Triton backend read, by
            num_head, num_kv_head, max_kv_splits and device_core_count. Only for a multi-step backend.
        settings: arguments of onelaunch.bind, such as seq_lens_dtype. seqlen_offsets default to 1, 2, ... for a
            multi-step backend, and to none for wrappers. page_size defaults to 1; only wrappers may have more.

    Returns:
        A plan; run() takes the lengths without the draft tokens, and each request's row of the pool. Entries beyond the
        capacity of kv_indices aren't written.

    Raises:
        ArgumentError: an attribute is missing or doesn't fit; see onelaunch.bind.
    """
    given = dict(settings)
    page_size = given.setdefault("page_size", 1)
    if has(backend, ("attn_backends",)):
        if page_size != 1 or query_len is not None or host is not None:
            raise ArgumentError(
                f"page_size is {page_size}, query_len is {query_len} and host is a {type(host).__name__}; with a "
                "multi-step backend, whose pages have one token, allowed: 1, None and None. Give a list of wrappers."
            )
        buffers = _steps(backend, num_kv_splits)
        if req_to_token is None:
            req_to_token = pool_of(backend)
        given.setdefault("seqlen_offsets", range(1, len(buffers) + 1))
    elif isinstance(backend, Sequence) and not isinstance(backend, str):
        if req_to_token is None:
            raise ArgumentError("req_to_token is None; wrappers don't have the pool. Pass req_to_token=.")
        buffers, declare = _wrappers(backend, page_size, query_len, host)
        given = merged({"declare": declare, "constants": {"query_len": query_len or 0}}, given)
    else:
        raise ArgumentError(
            f"backend has no attribute attn_backends; it is {described(backend)}. Give a multi-step draft backend, or "
            "a list of wrappers."
        )
    if given.get("seqlen_offsets") is not None:
        given["seqlen_offsets"] = list(given["seqlen_offsets"])
    return bind(buffers, req_to_token=req_to_token, **given)


def _wrappers(
    wrappers: Sequence[Any], page_size: int, query_len: int | None, host: Sequence[PlanInputs] | None
) -> tuple[list[MetadataBuffers], dict[str, Any]]:
    """The standard fields of wrappers, and their declared fields."""
    for wrapper in wrappers:
        if (tokens := _page_size(wrapper)) > page_size:
            raise ArgumentError(
                f"page_size is {page_size} and a wrapper was planned with pages of {tokens} tokens or more. Pass its "
                "page_size."
            )
    found = [plan_inputs(wrapper) for wrapper in wrappers]
    buffers = [MetadataBuffers() for _ in wrappers]
    unwritten = set() if query_len is not None else {"qo_indptr"}
    declare: dict[str, Any] = {}
    if page_size == 1:
        buffers = [MetadataBuffers(kv_indptr=one.kv_indptr, kv_indices=one.kv_indices) for one in found]
        declare = _declared(found, "", {*unwritten, "kv_indptr", "kv_indices", "last_page_len"})
    else:
        declare = _declared(found, "", unwritten)
    if host is not None:
        if len(host) != len(wrappers):
            raise ArgumentError(f"host has {len(host)} entries and there are {len(wrappers)} wrappers; give one each.")
        declare |= _declared(host, "host_", unwritten)
    if query_len is not None and "qo_indptr" not in declare:
        raise ArgumentError(
            f"query_len is {query_len} and the wrappers have no _qo_indptr_buf (made without tensor cores). Pass None."
        )
    return buffers, {name: FLASHINFER[name] for name in ("kv_len", "page_indptr")} | declare


# The names in FLASHINFER of the lists, which count pages there.
_NAMES = {"kv_indptr": "page_indptr", "kv_indices": "pages"}


def _declared(inputs: Sequence[PlanInputs], prefix: str, unwritten: set[str]) -> dict[str, Written]:
    """The declared fields of the tensors that aren't None."""
    declare = {}
    for field in dataclasses.fields(PlanInputs):
        tensors = [getattr(one, field.name) for one in inputs]
        if field.name in unwritten or all(tensor is None for tensor in tensors):
            continue
        if any(tensor is None for tensor in tensors):
            raise ArgumentError(
                f"wrapper {tensors.index(None)} has no {field.name} and others have one. Bind wrappers of different "
                "kinds to plans of their own."
            )
        name = _NAMES.get(field.name, field.name)
        declare[f"{prefix}{name}"] = into(FLASHINFER[name], tensors)
    return declare


def _steps(backend: Any, num_kv_splits: Tensor | None) -> list[MetadataBuffers]:
    if reason := refusal(backend, partly=True):
        raise not_served(backend, reason)
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
    lists = [{field: tensor[step] for field, tensor in rows.items()} for step in range(count)]
    return [MetadataBuffers(**of_step, num_kv_splits=num_kv_splits) for of_step in lists]


def pool_of(backend: Any) -> Tensor:
    """req_to_token of an SGLang backend: of its pool, else of its first child, else its own.

    Raises:
        ArgumentError: it has none.
    """
    owner = getattr(backend, "req_to_token_pool", None)
    if owner is None:
        owner = next(iter(getattr(backend, "attn_backends", None) or [backend]))
    found: Tensor | None = read("the backend's pool", owner, ("req_to_token",), "Pass req_to_token=.")
    if found is None:
        raise ArgumentError("the backend's req_to_token is None. Pass req_to_token=.")
    return found


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        raise missing(__name__, name, {"buffers_from": "use plan_inputs()"})
