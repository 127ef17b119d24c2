"""One plan for each batch size and mode that an SGLang backend captured."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import ArgumentError
from ...run.bind import bind
from ...run.declared import Written, into
from ...run.plan import Plan
from ...run.schedules import convention_of, paged_mqa_settings
from ...spec.fields import Declaration, MetadataBuffers, running_sum
from ..attributes import has, merged, read
from ..refusals import not_served, refusal
from .captured import (
    DSA,
    EXTENDED,
    MHA,
    MLA,
    SCHEDULE,
    STEPS,
    Captured,
    Names,
    buffers_from,
    captured_for,
    family_of,
    mode_of,
)


def bind_backends(
    backend: Any,
    bs: int,
    req_to_token: Tensor | None = None,
    *,
    mode: Any = "decode",
    leave: Collection[str] = (),
    schedules: bool = False,
    **settings: Any,
) -> Plan:
    """Binds the metadata that an SGLang backend captured for a batch size: of all children, or of a single backend.

    It reads from the children what ``settings`` doesn't have: page_size, index_topk, index_kpool, next_n (the number of
    draft tokens) and, for FA3 and TRTLLM-MHA, the steps' offsets. Tables of FA3, TRTLLM-MHA, FlashMLA and TRTLLM-MLA
    have one row per request in every mode, so their target_verify is a decode with lengths that are next_n longer.

    Args:
        backend: a multi-step backend with ``attn_backends``, or a single backend.
        bs: a batch size that it captured.
        req_to_token: int32 [pool rows, W]; None is the children's own.
        mode: SGLang's ForwardMode or a name of bind()'s modes.
        leave: see buffers_from.
        schedules: whether to refresh DSA's paged_mqa_schedule_metadata, which distributes splits of 256 tokens over the
            SMs, as DeepGEMM's own function does. In target_verify and draft_extend it is per row if the captured
            paged_mqa_ctx_lens_2d has one column, else per request, with DeepGEMM's convention for the device.
        settings: arguments of onelaunch.bind, which override what the children have. For block_kv_indices page_fill is
            -1 unless given.

    Raises:
        ArgumentError: an attribute is missing, or nothing was captured for ``bs``; see also onelaunch.bind.
    """
    mode = mode_of(mode)
    _refuse(backend, mode)
    return _bind(captured_for(backend, bs, mode), has(backend, STEPS), req_to_token, mode, leave, schedules, settings)


def _refuse(backend: Any, mode: str) -> None:
    """Refuses a backend whose tensors would get wrong values. buffers_from refuses tensors without a field."""
    if reason := refusal(backend, partly=True):
        raise not_served(backend, reason)
    for child in getattr(backend, STEPS[0], None) or [backend]:
        branches = getattr(child, "topk", None) or 1
        if (has(backend, STEPS) or mode != "decode") and branches > 1:
            raise ArgumentError(
                f"the backend's topk is {branches}; allowed: 0 and 1. A draft tree has rows for each branch, which "
                "onelaunch doesn't refresh."
            )


def _bind(
    captured: list[Captured],
    several: bool,
    req_to_token: Tensor | None,
    mode: str,
    leave: Collection[str],
    schedules: bool,
    settings: Mapping[str, Any],
) -> Plan:
    child = captured[0].child
    names = family_of(captured[0].metadata)
    given = dict(settings)

    def setting(name: str, attributes: tuple[str, ...], **default: Any) -> Any:
        if name not in given:
            given[name] = read("the backend", child, attributes, f"Pass {name}=.", **default)
        return given[name]

    if req_to_token is None:
        req_to_token = read("the backend", child, ("req_to_token",), "Pass req_to_token=.")
        assert req_to_token is not None
    block_size = {"default": 64} if names is MLA else {}
    page_size = setting("page_size", ("physical_page_size", "real_page_size", "page_size"), **block_size)
    if mode == "decode" or given.get("extend") == "variable":
        given.pop("next_n", None)
    else:
        setting("next_n", ("speculative_num_draft_tokens", "num_draft_tokens"))
    buffers = [buffers_from(c.metadata, page_size=page_size, leave=leave, schedules=schedules) for c in captured]
    if names is DSA:
        setting("index_topk", ("dsa_index_topk", "nsa_index_topk"))
        setting("index_kpool", ("dsa_index_kpool", "nsa_index_kpool"), default=1)
        given["mode"] = mode
        if schedules and getattr(captured[0].metadata, SCHEDULE, None) is not None:
            _schedule_settings(captured[0].metadata, given)
    else:
        if given.get("extend") == "variable" and "cu_seqlens_q" not in leave:
            starts: list[Any] = [getattr(c.metadata, "cu_seqlens_q", None) for c in captured]
            if starts[0] is not None:
                declare = {"cu_seqlens_q": into(running_sum(EXTENDED), starts)}
                inputs = {EXTENDED: given["extend_seq_lens_dtype"]}
                given |= merged(given, {"declare": declare, "inputs": inputs})
        _row_a_request(captured, buffers, names, several and names is MHA, mode, given)
    return bind(buffers, req_to_token=req_to_token, **given)


def _row_a_request(
    captured: list[Captured],
    buffers: list[MetadataBuffers],
    names: Names,
    growing: bool,
    mode: str,
    given: dict[str, Any],
) -> None:
    """Sets the arguments of bind() for tables with one row per request in every mode.

    A verification's second lengths are appended to buffers.
    """
    added = given.pop("next_n", 0)
    for name in ("extend", "extend_seq_lens_dtype"):
        given.pop(name, None)
    if mode == "target_verify":
        for c, b in list(zip(captured, buffers, strict=True)):
            lengths = getattr(c.metadata, "global_seq_lens_k", None)
            if lengths is not None:  # TRTLLM-MLA's: bound as a further backend of the same table
                buffers.append(MetadataBuffers(cache_seqlens=lengths, real_page_table=b.real_page_table))
        given.setdefault("seqlen_offsets", [added] * len(buffers))
    elif mode == "decode" and growing:
        given.setdefault(
            "seqlen_offsets",
            [1 + read("the backend", c.child, ("speculative_step_id",), "Pass seqlen_offsets=.") for c in captured],
        )
    if names is MLA:
        given.setdefault("page_fill", -1)


def _schedule_settings(metadata: Any, given: dict[str, Any]) -> None:
    """Sets schedule_per from the shape of DeepGEMM's lengths, and DeepGEMM's convention from the device."""
    if given["index_kpool"] > 1:
        raise ArgumentError(
            f"schedules is True and index_kpool is {given['index_kpool']}; DSA has a second schedule, of pools, which "
            "onelaunch doesn't make. Pass schedules=False."
        )
    device = getattr(metadata, SCHEDULE).device
    given.setdefault("schedule_remainder", "first" if convention_of(device) == "sm100" else "last")
    if given["mode"] == "decode" or "schedule_per" in given:
        return
    lengths = read("metadata", metadata, ("paged_mqa_ctx_lens_2d",), "Pass schedule_per=.")
    if lengths is None or lengths.dim() != 2:
        raise ArgumentError(
            "metadata.paged_mqa_ctx_lens_2d isn't 2-D, so it doesn't show how many rows a request has. Pass "
            "schedule_per=."
        )
    given["schedule_per"] = "row" if lengths.shape[1] == 1 else "request"
    if lengths.shape[1] > 1:
        given.update({**paged_mqa_settings(convention_of(device), lengths.shape[1]), **given})


class _Bound(NamedTuple):
    plan: Plan
    captured: list[Captured]
    pairs: list[tuple[Any, Any]]
    pools: list[Tensor | None]

    def current(self, bs: int) -> bool:
        """Whether the children still have these captures and this pool."""
        return all(
            c.current(bs) and getattr(c.child, "req_to_token", None) is pool
            for c, pool in zip(self.captured, self.pools, strict=True)
        )


def launch(
    plan: Plan, seq_lens: Tensor, req_pool_indices: Tensor, inputs: Collection[Tensor] = (), size: int | None = None
) -> None:
    """Plan.run() with fewer Python frames unless the plan audits: with cold CPU caches each line costs host time.

    Args:
        inputs: the declared inputs, in the plan's order.
        size: run()'s captured_size.

    Raises:
        ArgumentError: see Plan.run; nothing was written.
        RuntimeError: CUDA refused the launch.
    """
    if plan._audit_every:
        named: dict[str, Any] = dict(zip(plan._input_names, inputs, strict=True))
        plan.run(seq_lens, req_pool_indices, captured_size=size, **named)
    else:
        plan._run(plan, seq_lens, req_pool_indices, None, None, size, *inputs)


class Ready(NamedTuple):
    """A plan for one captured batch size, and what it relies on.

    Attributes:
        plan: the plan, for exactly that number of requests; its inputs may be longer.
        pairs: each child with its metadata.
        held: (object, attribute, bound value). The plan is valid while every attribute still has that value.
    """

    plan: Plan
    pairs: list[tuple[Any, Any]]
    held: list[tuple[Any, str, Any]]

    def exchanged(self) -> str:
        """The name of the first bound attribute that was replaced since; "" if none was."""
        return next((name for owner, name, value in self.held if getattr(owner, name, None) is not value), "")


class Refresher:
    """Refreshes an SGLang backend's captured metadata, with one plan for each captured batch size and mode.

    The first run() of a batch size makes its plan, or prepare() does; after that a call is one launch. If a batch size
    is captured again or the pool is replaced, a new plan is made.

    Args:
        backend, req_to_token, leave, schedules, settings: see bind_backends.
    """

    def __init__(
        self,
        backend: Any,
        req_to_token: Tensor | None = None,
        *,
        leave: Collection[str] = (),
        schedules: bool = False,
        **settings: Any,
    ) -> None:
        self._backend, self._pool, self._leave, self._schedules = backend, req_to_token, leave, schedules
        self._settings = settings
        self._bound: dict[tuple[Any, ...], _Bound] = {}

    @property
    def plans(self) -> dict[tuple[Any, ...], Plan]:
        """The plans by (batch size, mode, seq_lens' dtype, req_pool_indices' dtype, extend_seq_lens' dtype or None)."""
        return {key: bound.plan for key, bound in self._bound.items()}

    def prepare(
        self,
        bs: int,
        *,
        mode: Any = "decode",
        seq_lens_dtype: torch.dtype = torch.int64,
        req_pool_indices_dtype: torch.dtype = torch.int64,
        extend_seq_lens_dtype: torch.dtype | None = None,
    ) -> Plan:
        """The plan of a captured batch size, made now if there is none. Don't call it inside a capture.

        The dtypes are those of run()'s tensors; extend_seq_lens_dtype is None if run() gets no extend_seq_lens.

        Raises:
            ArgumentError: see bind_backends.
        """
        key = (bs, mode_of(mode), seq_lens_dtype, req_pool_indices_dtype, extend_seq_lens_dtype)
        return self._prepared(key).plan

    def ready(
        self,
        bs: int,
        mode: str,
        seq_lens_dtype: torch.dtype,
        req_pool_indices_dtype: torch.dtype,
        extend_seq_lens_dtype: torch.dtype | None = None,
    ) -> Ready:
        """prepare() for a caller that knows when a capture begins and keeps the plan, so that no run() looks it up.

        Raises:
            ArgumentError: see bind_backends.
        """
        bound = self._prepared((bs, mode, seq_lens_dtype, req_pool_indices_dtype, extend_seq_lens_dtype))
        bound.plan.exact = bs
        bound.plan.follow_addresses()
        pools = zip(bound.captured, bound.pools, strict=True)
        return Ready(bound.plan, bound.pairs, [(c.child, "req_to_token", pool) for c, pool in pools])

    def beside(
        self, bs: int, mode: str, declare: Mapping[str, Declaration | Written], added: int = 0, **settings: Any
    ) -> Ready:
        """A separate plan for a captured batch size that also writes the declared fields.

        Args:
            bs, mode: as in prepare().
            declare: fields with tensors; terms without tensors; and cu_seqlens_q, which gets the backend's tensor.
            added: the backend's lengths minus run()'s, in tokens.
            settings: arguments of onelaunch.bind.

        Raises:
            ArgumentError: see bind_backends.
        """
        captured = captured_for(self._backend, bs, mode)
        if added:
            settings["seqlen_offsets"] = [added] * len(captured)
        starts = getattr(captured[0].metadata, "cu_seqlens_q", None)
        written = dict(declare)
        # DSA's has an element per row and never changes.
        if mode == "draft_extend" and isinstance(starts, Tensor) and family_of(captured[0].metadata) is MHA:
            written["cu_seqlens_q"] = Written(declare["cu_seqlens_q"], starts)  # type: ignore[arg-type]
        settings = {**self._settings, **settings, "declare": written}
        several = has(self._backend, STEPS)
        plan = _bind(captured, several, self._pool, mode, self._leave, self._schedules, settings)
        held = [(c.child, "req_to_token", getattr(c.child, "req_to_token", None)) for c in captured]
        return Ready(plan, [(c.child, c.metadata) for c in captured], held)

    def forget(self) -> None:
        """Plan.forget() of all plans, because other code wrote the tables."""
        for bound in self._bound.values():
            bound.plan.forget()

    def run(
        self,
        bs: int,
        seq_lens: Tensor,
        req_pool_indices: Tensor,
        extend_seq_lens: Tensor | None = None,
        *,
        mode: Any = "decode",
    ) -> list[tuple[Any, Any]]:
        """Refreshes everything that was captured for a batch size: one launch on the current stream.

        Args:
            bs: the captured batch size.
            seq_lens, req_pool_indices: int32 or int64, bs elements or more, of which the first bs count.
            extend_seq_lens: likewise, the number of tokens that draft_extend extends each request by; None if all have
                the captured number. The caller guarantees that the captured tensors have room for the sum.
            mode: SGLang's ForwardMode or a name of bind()'s modes.

        Returns:
            Each child with its metadata, for the engine's remaining steps. For FlashMLA that is only its table.

        Raises:
            ArgumentError: see bind_backends and Plan.run; nothing was written.
            LaunchError: CUDA refused the launch.
        """
        tensors = {"seq_lens": seq_lens, "req_pool_indices": req_pool_indices}
        if extend_seq_lens is not None:
            tensors["extend_seq_lens"] = extend_seq_lens
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or tensor.dim() != 1 or len(tensor) < bs:
                shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ArgumentError(f"{name} is {shape} and bs is {bs}; it must be a tensor of {bs} elements or more.")
        extend_dtype = None if extend_seq_lens is None else extend_seq_lens.dtype
        bound = self._prepared((bs, mode_of(mode), seq_lens.dtype, req_pool_indices.dtype, extend_dtype))
        config = bound.plan.config
        extended = None if extend_seq_lens is None else extend_seq_lens[:bs]
        inputs: dict[str, Any] = (
            {EXTENDED: extended} if extended is not None and EXTENDED in dict(config.inputs) else {}
        )
        bound.plan.run(
            seq_lens if len(seq_lens) == bs else seq_lens[:bs],
            req_pool_indices if len(req_pool_indices) == bs else req_pool_indices[:bs],
            extended if config.extend == "variable" else None,
            **inputs,
        )
        return bound.pairs

    def _prepared(self, key: tuple[Any, ...]) -> _Bound:
        bs, mode, seq_lens_dtype, pool_dtype, extend_dtype = key
        bound = self._bound.get(key)
        if bound is None or not bound.current(bs):
            _refuse(self._backend, mode)
            captured = captured_for(self._backend, bs, mode)
            settings = {**self._settings, "seq_lens_dtype": seq_lens_dtype, "req_pool_indices_dtype": pool_dtype}
            if extend_dtype is not None:
                if mode != "draft_extend":
                    raise ArgumentError(
                        f"extend_seq_lens is a tensor and mode is {mode!r}; it is for 'draft_extend' only. Pass None."
                    )
                settings |= {"extend": "variable", "extend_seq_lens_dtype": extend_dtype}
            several = has(self._backend, STEPS)
            plan = _bind(captured, several, self._pool, mode, self._leave, self._schedules, settings)
            pairs = [(c.child, c.metadata) for c in captured]
            pools = [getattr(c.child, "req_to_token", None) for c in captured]
            bound = self._bound[key] = _Bound(plan, captured, pairs, pools)
        return bound
