"""The functions that engines call, by the names they know."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import loader, ops, plan
from .checks import INT_DTYPES, MAX_BATCH, check_int, check_tensor
from .config import MAX_NEXT_N, KernelConfig
from .errors import ArgumentError
from .fields import FIELDS, MetadataBuffers

_T = TypeVar("_T")
_MAX_PLANS = 256
# Plans by what they are specialized and bound to. They hold addresses only: whoever calls with a tensor keeps it alive.
_plans: OrderedDict[Any, Any] = OrderedDict()
_fields_of = attrgetter(*FIELDS)


class _Known(NamedTuple):
    """A plan that was made for these very tensors. Gone as soon as one of them is."""

    plan: Any
    present: Callable[[Sequence[Any]], tuple[Tensor, ...]]  # leaves out the fields that are None
    addresses: list[int]
    tensors: list[weakref.ref[Tensor]]


# The same plans by the tensors themselves, for callers that pass the same ones again: telling tensors apart by what
# they are takes longer than the launch. A tensor whose shape or strides are changed in place isn't noticed here.
_known: dict[Any, _Known] = {}


def fused_metadata_precompute_and_broadcast_cuda(
    seq_lens: Tensor,
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    cache_seqlens_list: Sequence[Tensor] | None,
    cu_seqlens_k_list: Sequence[Tensor] | None,
    page_indices_list: Sequence[Tensor] | None,
    nsa_cache_seqlens_list: Sequence[Tensor] | None,
    nsa_cu_seqlens_k_list: Sequence[Tensor] | None,
    real_page_table_list: Sequence[Tensor] | None = None,
    *,
    max_len: int,
    nsa_index_topk: int,
    real_page_size: int,
    extent: str = "full",
    mode: str = "decode",
    next_n: int = 1,
    extend_seq_lens: Tensor | None = None,
    seqlens_expanded_list: Sequence[Tensor] | None = None,
) -> None:
    """Computes the metadata of a step and writes it to N backends, in one launch.

    Works on CUDA and on CPU tensors; all must be on one device. A list that is None is left out. In target_verify and
    draft_extend a request has several rows, request after request, R in all.

    Args:
        seq_lens, req_pool_indices: int32 or int64 [bs].
        req_to_token: int32 or int64 [pool rows, W].
        cache_seqlens_list: N int32 tensors [bs or more].
        cu_seqlens_k_list: N int32 tensors [bs + 1 or more].
        nsa_cache_seqlens_list, seqlens_expanded_list: N int32 tensors [bs or more; R or more].
        nsa_cu_seqlens_k_list: N int32 tensors [bs + 1 or more; R + 1 or more].
        page_indices_list: N int32 tensors [bs or R or more, max_len or more].
        real_page_table_list: N int32 tensors [bs or R or more, ceil(max_len / real_page_size) or more].
        max_len: columns to write, at most the width of every table.
        nsa_index_topk: clamp of the NSA lengths.
        real_page_size: tokens a page of real_page_table.
        extent: "full" writes every column below max_len, "live" those below a request's length.
        mode: "decode", "target_verify" or "draft_extend".
        next_n: rows of each request in the last two, unless extend_seq_lens says it.
        extend_seq_lens: int32 or int64 [bs], the rows of each request in draft_extend, zeros among them; the caller
            keeps their sum within the rows of the destinations.

    Raises:
        ArgumentError, ConfigError: an argument doesn't fit; nothing was written.
    """
    if is_dynamo_compiling():
        torch.ops.onelaunch.fused_metadata_precompute_and_broadcast_cuda(
            seq_lens,
            req_pool_indices,
            req_to_token,
            cache_seqlens_list,
            cu_seqlens_k_list,
            page_indices_list,
            nsa_cache_seqlens_list,
            nsa_cu_seqlens_k_list,
            real_page_table_list,
            max_len=max_len,
            nsa_index_topk=nsa_index_topk,
            real_page_size=real_page_size,
            extent=extent,
            forward_mode=mode,
            next_n=next_n,
            extend_seq_lens=extend_seq_lens,
            seqlens_expanded_list=seqlens_expanded_list,
        )
        return
    lists = {
        "cache_seqlens": cache_seqlens_list,
        "cu_seqlens_k": cu_seqlens_k_list,
        "page_indices": page_indices_list,
        "nsa_cache_seqlens": nsa_cache_seqlens_list,
        "nsa_cu_seqlens_k": nsa_cu_seqlens_k_list,
        "real_page_table": real_page_table_list,
        "seqlens_expanded": seqlens_expanded_list,
    }
    tensors: list[Any] = [req_to_token]
    try:
        for given in lists.values():
            tensors += given or ()
            tensors.append(None)  # or tensors that are shared out in another way would look the same
        told_apart = True
    except (TypeError, RuntimeError):
        told_apart = False  # no lists: what comes next says so
    _refresh(
        tensors if told_apart else None,
        lambda: tuple(map(_identities, lists.values())),
        lambda: _backends(lists),
        lambda index, name: f"{name}_list[{index}]",
        seq_lens,
        req_pool_indices,
        req_to_token,
        extend_seq_lens,
        max_len=max_len,
        nsa_index_topk=nsa_index_topk,
        real_page_size=real_page_size,
        extent=extent,
        mode=mode,
        next_n=next_n,
    )


def precompute_decode_metadata_cuda(
    seq_lens: Tensor,
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    *,
    max_len: int,
    nsa_index_topk: int,
    real_page_size: int,
    out: MetadataBuffers | None = None,
) -> MetadataBuffers:
    """Computes the metadata of a decode step once, in one launch, for fused_metadata_copy_cuda to copy.

    Args:
        seq_lens, req_pool_indices: int32 or int64 [bs].
        req_to_token: int32 or int64 [pool rows, W].
        max_len: columns of page_indices, at most W.
        nsa_index_topk: clamp of the NSA lengths.
        real_page_size: tokens a page of real_page_table; 1 makes it the same tensor as page_indices.
        out: where to write; None allocates every field at its exact shape.

    Returns:
        ``out``, or new buffers. seqlens_expanded is the very tensor of cache_seqlens, as decode defines it.

    Raises:
        ArgumentError, ConfigError: an argument doesn't fit; nothing was written.
    """
    return _precompute(
        seq_lens,
        req_pool_indices,
        req_to_token,
        max_len=max_len,
        nsa_index_topk=nsa_index_topk,
        real_page_size=real_page_size,
        out=out,
    )


def precompute_target_verify_metadata_cuda(
    seq_lens: Tensor,
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    *,
    max_len: int,
    nsa_index_topk: int,
    real_page_size: int,
    next_n: int,
    out: MetadataBuffers | None = None,
) -> MetadataBuffers:
    """precompute_decode_metadata_cuda for a step that verifies next_n tokens a request: R = bs * next_n rows.

    Args:
        next_n: rows of each request, and tokens that its length has more than seq_lens says.
        The others as in precompute_decode_metadata_cuda.

    Returns:
        ``out``, or new buffers.

    Raises:
        ArgumentError, ConfigError: an argument doesn't fit; nothing was written.
    """
    return _precompute(
        seq_lens,
        req_pool_indices,
        req_to_token,
        max_len=max_len,
        nsa_index_topk=nsa_index_topk,
        real_page_size=real_page_size,
        out=out,
        mode="target_verify",
        next_n=next_n,
    )


def precompute_draft_extend_metadata_cuda(
    seq_lens: Tensor,
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    *,
    max_len: int,
    nsa_index_topk: int,
    real_page_size: int,
    next_n: int = 1,
    extend_seq_lens: Tensor | None = None,
    rows: int | None = None,
    out: MetadataBuffers | None = None,
) -> MetadataBuffers:
    """precompute_decode_metadata_cuda for a step that extends every request by some tokens, a row each.

    Args:
        next_n: rows of each request, where extend_seq_lens is None.
        extend_seq_lens: int32 or int64 [bs], the rows of each request, zeros among them.
        rows: the sum of extend_seq_lens, needed to allocate; the caller knows it without asking the device.
        The others as in precompute_decode_metadata_cuda.

    Returns:
        ``out``, or new buffers.

    Raises:
        ArgumentError, ConfigError: an argument doesn't fit; nothing was written.
    """
    return _precompute(
        seq_lens,
        req_pool_indices,
        req_to_token,
        max_len=max_len,
        nsa_index_topk=nsa_index_topk,
        real_page_size=real_page_size,
        out=out,
        mode="draft_extend",
        next_n=next_n,
        extend_seq_lens=extend_seq_lens,
        rows=rows,
    )


def _precompute(
    seq_lens: Tensor,
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    *,
    max_len: int,
    nsa_index_topk: int,
    real_page_size: int,
    out: MetadataBuffers | None,
    mode: str = "decode",
    next_n: int = 1,
    extend_seq_lens: Tensor | None = None,
    rows: int | None = None,
) -> MetadataBuffers:
    if out is None:
        check_tensor("seq_lens", seq_lens, dim=1, dtypes=INT_DTYPES)
        check_tensor("req_to_token", req_to_token, dim=2, dtypes=INT_DTYPES, device=seq_lens.device)
        check_int("max_len", max_len, 0, req_to_token.shape[1], ", the width of req_to_token")
        check_int("real_page_size", real_page_size, 1, 2**31 - 1)
        if extend_seq_lens is None:
            rows = seq_lens.numel() * check_int("next_n", next_n, 1, MAX_NEXT_N)
        elif rows is None:
            raise ArgumentError(
                "rows is None; to allocate the fields for extend_seq_lens their sum is needed. Give it, or out."
            )
        else:
            check_int("rows", rows, 0, MAX_BATCH)
        out = _allocate(seq_lens.numel(), rows, max_len, real_page_size, seq_lens.device, mode)
    elif not isinstance(out, MetadataBuffers):
        raise ArgumentError(f"out is a {type(out).__name__}; it must be a MetadataBuffers or None.")
    if is_dynamo_compiling():
        ops.precompute(
            out,
            seq_lens,
            req_pool_indices,
            req_to_token,
            max_len=max_len,
            nsa_index_topk=nsa_index_topk,
            real_page_size=real_page_size,
            forward_mode=mode,
            next_n=next_n,
            extend_seq_lens=extend_seq_lens,
        )
        return out
    destination = out
    _refresh(
        [req_to_token, *_fields_of(destination)],
        lambda: tuple(map(_identity, _fields_of(destination))),
        lambda: [destination],
        lambda index, name: f"out.{name}",
        seq_lens,
        req_pool_indices,
        req_to_token,
        extend_seq_lens,
        max_len=max_len,
        nsa_index_topk=nsa_index_topk,
        real_page_size=real_page_size,
        extent="full",
        mode=mode,
        next_n=next_n,
    )
    return out


def _refresh(
    tensors: Sequence[Any] | None,
    identities: Callable[[], tuple[Any, ...]],
    backends: Callable[[], list[MetadataBuffers]],
    name_of: plan.NameOf,
    seq_lens: Tensor,
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    extend_seq_lens: Tensor | None,
    *,
    max_len: int,
    nsa_index_topk: int,
    real_page_size: int,
    extent: str,
    mode: str,
    next_n: int,
) -> None:
    """Runs the plan of these tensors, bound at the first call.

    Args:
        tensors: req_to_token and the destinations, None among them; None if there are no such things.
        identities: those of the destinations that ``backends`` makes.
        The others as in fused_metadata_precompute_and_broadcast_cuda.
    """
    facts = (
        getattr(seq_lens, "dtype", None),
        getattr(req_pool_indices, "dtype", None),
        None if extend_seq_lens is None else getattr(extend_seq_lens, "dtype", None),
        nsa_index_topk if type(nsa_index_topk) is int else _number(nsa_index_topk),
        real_page_size if type(real_page_size) is int else _number(real_page_size),
        extent,
        mode,
        next_n if type(next_n) is int else _number(next_n),
    )
    known = _recall(tensors, facts)
    if known is not None:
        known.run(seq_lens, req_pool_indices, extend_seq_lens, max_len=max_len)
        return
    key = (_identity(req_to_token), identities(), *facts)

    def make() -> plan.Plan:
        check_tensor("seq_lens", seq_lens, dim=1, dtypes=INT_DTYPES)
        check_tensor("req_pool_indices", req_pool_indices, dim=1, dtypes=INT_DTYPES)
        extends: dict[str, Any] = {}
        if extend_seq_lens is not None:
            check_tensor("extend_seq_lens", extend_seq_lens, dim=1, dtypes=INT_DTYPES)
            if mode != "draft_extend":
                raise ArgumentError(f"extend_seq_lens is a tensor and mode is {mode!r}; they are for 'draft_extend'.")
            extends = {"extend": "variable", "extend_seq_lens_dtype": extend_seq_lens.dtype}
        return plan.make_plan(
            backends(),
            req_to_token,
            mode=mode,
            index_topk=nsa_index_topk,
            page_size=real_page_size,
            extent=extent,
            max_len=None,
            seq_lens_dtype=seq_lens.dtype,
            req_pool_indices_dtype=req_pool_indices.dtype,
            next_n=next_n,
            name_of=name_of,
            topk_name="nsa_index_topk",
            page_size_name="real_page_size",
            keep=False,
            **extends,
        )

    _remembered(key, make, tensors, facts).run(seq_lens, req_pool_indices, extend_seq_lens, max_len=max_len)


def fused_metadata_copy_cuda(
    precomputed: MetadataBuffers,
    destinations: MetadataBuffers | Sequence[MetadataBuffers],
    *,
    bs: int | None = None,
    max_len: int | None = None,
    real_page_size: int | None = None,
    mode: str = "decode",
    next_n: int | None = None,
    rows: int | None = None,
) -> None:
    """Copies precomputed metadata to one or N destinations, in one launch.

    Every field that the destinations have is copied; all destinations have the same fields.

    Args:
        precomputed: the source, from precompute_decode_metadata_cuda.
        destinations: one MetadataBuffers, or N.
        bs: requests to copy; None is what ``precomputed`` holds.
        max_len: columns of page_indices to copy; None is the source's width.
        real_page_size: bounds the columns of real_page_table at ceil(max_len / real_page_size); None copies the
            source's whole width.
        mode: "decode", "target_verify" or "draft_extend"; in the last two requests have several rows.
        next_n: rows of each request, if it is one number for all; with ``bs`` it says how many rows to copy.
        rows: rows to copy of the fields with an element a row, where extend lengths vary; None is what
            ``precomputed`` holds.

    Raises:
        ArgumentError: an argument doesn't fit; nothing was written.
    """
    one = isinstance(destinations, MetadataBuffers)
    facts = ("copy", one, mode)
    tensors: tuple[Any, ...] | None = None
    if not is_dynamo_compiling():
        try:
            tensors = _fields_of(precomputed)
            for buffers in (destinations,) if one else destinations:  # type: ignore[union-attr]
                tensors += _fields_of(buffers)
        except (AttributeError, TypeError):
            tensors = None  # no buffers: what comes next says so
    known = _recall(tensors, facts)
    if known is not None:
        known.run(bs=bs, max_len=max_len, page_size=real_page_size, rows=_rows_of(bs, mode, next_n, rows))
        return
    if not isinstance(precomputed, MetadataBuffers):
        raise ArgumentError(f"precomputed is a {type(precomputed).__name__}; it must be a MetadataBuffers.")
    targets = [destinations] if isinstance(destinations, MetadataBuffers) else destinations
    if not isinstance(targets, Sequence) or not all(isinstance(target, MetadataBuffers) for target in targets):
        raise ArgumentError(f"destinations is {targets!r}; it must be a MetadataBuffers or a list of them.")
    if not targets:
        raise ArgumentError("destinations is empty; give at least one MetadataBuffers.")
    if is_dynamo_compiling():
        ops.copy(
            precomputed,
            targets,
            bs=bs,
            max_len=max_len,
            real_page_size=real_page_size,
            forward_mode=mode,
            next_n=next_n,
            rows=rows,
        )
        return
    rows = _rows_of(bs, mode, next_n, rows)
    key = (*facts, tuple(tuple(map(_identity, _fields_of(b))) for b in (precomputed, *targets)))

    def make() -> plan.CopyPlan:
        def name_of(index: int, name: str) -> str:
            return f"destinations.{name}" if one else f"destinations[{index}].{name}"

        shared = precomputed.real_page_table is not None and precomputed.real_page_table is precomputed.page_indices
        page_size = 1 if shared else 2
        return plan.CopyPlan(precomputed, plan.Destinations(targets, page_size, name_of, mode), keep=False, mode=mode)

    _remembered(key, make, tensors, facts).run(bs=bs, max_len=max_len, page_size=real_page_size, rows=rows)


def _rows_of(bs: int | None, mode: str, next_n: int | None, rows: int | None) -> int | None:
    """The rows that a copy is asked for, None for all that there are."""
    if mode == "decode":
        if rows is not None or next_n not in (None, 1):
            raise ArgumentError(f"next_n is {next_n} and rows is {rows}; in decode a request is a row: leave them out.")
    elif rows is None and next_n is not None:
        check_int("next_n", next_n, 1, MAX_NEXT_N)
        if bs is not None:
            rows = check_int("bs", bs, 0, MAX_BATCH) * next_n
    elif rows is None and bs is not None:
        raise ArgumentError(f"bs is {bs} in {mode}, and next_n and rows are None; give one of them too.")
    return rows


def specialize(config: KernelConfig, arch: str | Sequence[str] | None = None) -> loader.Kernel:
    """Renders a configuration, and builds it or loads it from the store.

    Args:
        config: the configuration.
        arch: GPU architectures such as "90a" or ("90a", "100a"); None is the current device's, or 90a where there
            is no GPU.

    Returns:
        The kernel, with ``source``, ``key``, ``path`` and ``resources``.

    Raises:
        ToolchainError, CompileError, JitPolicyError, StoreError: see loader.load.
    """
    return loader.load(config, (arch,) if isinstance(arch, str) else arch)


def _backends(lists: dict[str, Sequence[Tensor] | None]) -> list[MetadataBuffers]:
    given: dict[str, Sequence[Tensor]] = {}
    for name, tensors in lists.items():
        if tensors is None:
            continue
        if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
            raise ArgumentError(f"{name}_list is a {type(tensors).__name__}; it must be a list of tensors or None.")
        given[name] = tensors
    if not given:
        raise ArgumentError("every list is None; give at least one list of destinations.")
    first = next(iter(given))
    for name, tensors in given.items():
        if len(tensors) != len(given[first]):
            raise ArgumentError(
                f"{name}_list has {len(tensors)} tensors and {first}_list has {len(given[first])}; all lists must "
                "have one tensor a backend."
            )
        for index, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise ArgumentError(f"{name}_list[{index}] is a {type(tensor).__name__}; it must be a torch.Tensor.")
    return [MetadataBuffers(**{name: tensors[i] for name, tensors in given.items()}) for i in range(len(given[first]))]


def _allocate(bs: int, rows: int, max_len: int, page_size: int, device: torch.device, mode: str) -> MetadataBuffers:
    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    cache, table = new(bs), new(rows, max_len)
    return MetadataBuffers(
        cache_seqlens=cache,
        cu_seqlens_k=new(bs + 1),
        page_indices=table,
        nsa_cache_seqlens=new(rows),
        nsa_cu_seqlens_k=new(rows + 1),
        real_page_table=table if page_size == 1 else new(rows, -(-max_len // page_size)),
        seqlens_expanded=cache if mode == "decode" else new(rows),
    )


def _identity(tensor: Any) -> Any:
    """What a plan depends on in a tensor. Anything else is kept as it is, for the checks to refuse."""
    if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
        return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
    return None if tensor is None else id(tensor)


def _identities(tensors: Any) -> Any:
    try:
        return tuple(map(_identity, tensors))
    except TypeError:
        return None if tensors is None else id(tensors)


def _number(value: Any) -> Any:
    """A number that a plan depends on. True and 16.0 must not find the plan of 1 and 16, which was checked."""
    return value if type(value) is int else (type(value), id(value))


def _remembered(key: Any, make: Callable[[], _T], tensors: Sequence[Any] | None, facts: tuple[Any, ...]) -> _T:
    """The plan of a key, made at the first call and known by its tensors from then on."""
    try:
        made: _T | None = _plans.get(key)
    except TypeError:  # something in it can't be hashed, so it is nothing that the checks accept
        return make()
    if made is None:
        made = make()
        _plans[key] = made
        if len(_plans) > _MAX_PLANS:
            _plans.popitem(last=False)
        _know(tensors, facts, made)
    else:
        _plans.move_to_end(key)
    return made


def _recall(tensors: Sequence[Any] | None, facts: tuple[Any, ...]) -> Any:
    """The plan that was made for these very tensors, if they still lie where they lay."""
    if tensors is None:
        return None
    try:
        known = _known.get((facts, *map(id, tensors)))
    except TypeError:
        return None
    if known is not None and list(map(Tensor.data_ptr, known.present(tensors))) == known.addresses:
        return known.plan
    return None


def _know(tensors: Sequence[Any] | None, facts: tuple[Any, ...], made: Any) -> None:
    if tensors is None:
        return
    key = (facts, *map(id, tensors))

    def forget(_: weakref.ref[Tensor]) -> None:
        _known.pop(key, None)  # its number may be another tensor's from now on

    there = [place for place, tensor in enumerate(tensors) if tensor is not None]
    if len(there) < 2:
        return  # itemgetter gives no tuple then, and so small a plan needs no help
    present = itemgetter(*there)
    _known[key] = _Known(
        made, present, list(map(Tensor.data_ptr, present(tensors))), [weakref.ref(t, forget) for t in present(tensors)]
    )
    if len(_known) > _MAX_PLANS:
        del _known[next(iter(_known))]


ops.register(fused_metadata_precompute_and_broadcast_cuda, _precompute, fused_metadata_copy_cuda)
