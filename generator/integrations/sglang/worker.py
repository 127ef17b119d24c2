"""Replaces what SGLang's draft worker makes between its graphs by launches, and restores it.

Between the draft's graph and the verification's, one launch makes the chain that is verified, with its mask. Between
the verification's and the draft extension's, another makes the tensors of the extension's batch. The tensors are
allocated once, for the largest batch, and the engine's own functions and operations return them instead of computing
them.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ...errors import ArgumentError
from ...run.bind import bind
from ...run.declared import into
from ...spec import seams
from ...spec.fields import Declaration, MetadataBuffers, Vector
from ..attributes import read
from ..refusals import not_served, refusal
from .attach import warned
from .captured import VERSION
from .hooks import Answers, Bound, Hook, Replaced, asked
from .runners import VIEWED, Sources, Views, named

WORKER = "EagleDraftWorker"
# The modules of what is replaced, the worker's own among them.
_DRAFTER, _COMMON = "sglang.srt.speculative.eagle_worker_v2", "sglang.srt.speculative.eagle_worker_common"
_LOCATIONS, _BATCHES = "sglang.kernels.ops.speculative.cache_locs", "sglang.srt.model_executor.forward_batch_info"
_EXTENDS = "_draft_extend_for_decode"
# Versions with this function make the layout of a draft extension by one launch of their own.
_LAYOUT = "prepare_draft_extend_layout"
CHAIN, LAYOUT = "the chain that is verified", "the layout of a draft extension"
_CHAIN = ("input_ids", "positions", "out_cache_loc", "retrieve_index", "retrieve_next_token", "retrieve_next_sibling")
_TREE = _CHAIN[3:]
# The packed mask of FlashInfer's graphs. The chain of a batch whose mask hasn't room is the engine's.
FULL_MASK = "cuda_graph_custom_mask"
_MAX_MASK_BYTES = 2**28
_EXTENSION = (
    *("num_correct_drafts", "select_end", "select_index", "input_ids"),
    *("prefix_lens", "extend_seq_lens", "extend_start_loc", "positions", "seq_lens"),
)


class Kept:
    """Tensors that are allocated once, for the largest batch, and the launch that writes them.

    Args:
        declared: the seam's fields.
        names: the fields to allocate a tensor for.
        others: tensors of further fields, by name.
        capacity: the largest batch.
        pool: req_to_token.
        inputs, viewed: see Views.
        facts: arguments of onelaunch.bind.
    """

    def __init__(
        self,
        declared: Mapping[str, Declaration],
        names: tuple[str, ...],
        others: Mapping[str, Tensor],
        capacity: int,
        pool: Tensor,
        inputs: Callable[[Sources], dict[str, Tensor]],
        viewed: Mapping[str, str],
        facts: Mapping[str, Any],
    ) -> None:
        self.capacity, self._widths, self._heads = capacity, {}, dict[int, dict[str, Tensor]]()
        self._tensors: dict[str, Tensor] = {}
        for name in names:
            field = declared[name]
            assert isinstance(field, Vector)
            self._widths[name] = field.rows or 1
            size = capacity * self._widths[name]
            self._tensors[name] = torch.zeros(size, dtype=getattr(torch, field.dtype), device=pool.device)
        written = {name: into(declared[name], tensor) for name, tensor in {**self._tensors, **others}.items()}
        plan = bind([MetadataBuffers()], req_to_token=pool, declare={**declared, **written}, **facts)
        self._views = Views(plan, inputs, viewed)

    def run(self, lengths: Tensor, rows: Tensor, sources: Sources, size: int | None = None) -> dict[str, Tensor]:
        """Launches; returns this batch's tensors by name.

        Raises:
            ArgumentError, RuntimeError: see Views.run; nothing was written.
        """
        self._views.run(lengths, rows, sources, size)
        bs = lengths.numel()
        if bs not in self._heads:
            self._heads[bs] = {name: tensor[: bs * self._widths[name]] for name, tensor in self._tensors.items()}
            for name in _TREE:
                if name in self._tensors:
                    self._heads[bs][name] = self._heads[bs][name].view(bs, -1)
        return self._heads[bs]


def _full_mask(worker: Any, backend: Any) -> Any:
    """A buffer for FlashInfer's mask, an element per byte of its graphs' packed one; None if they have none."""
    packed = getattr(backend, FULL_MASK, None)
    if packed is None:
        return None
    size = min(packed.numel(), _MAX_MASK_BYTES)
    device = worker.req_to_token_pool.req_to_token.device
    return SimpleNamespace(mode=worker.tree_mask_mode, buffer=torch.zeros(size, dtype=torch.bool, device=device))


class Producers:
    """A draft worker whose tensors between the graphs are made by launches.

    Attributes:
        backend: the worker.
        refreshed: a description of what the launches make.
        stays: a description of what the engine still makes.
        launches: launches so far.
        failed: the error after which the engine's own code runs again; "" if there was none.
        attached: whether the launches replace the engine's code.
    """

    def __init__(self, worker: Any) -> None:
        self.backend, self.attached = worker, True
        self.launches, self.failed = 0, ""
        self._tokens = worker.speculative_num_draft_tokens
        self._target, self._pools = worker.target_worker.model_runner, worker.req_to_token_pool
        self._pool = self._pools.req_to_token
        self._mask: Any = getattr(self._target.attn_backend, "verify_mask", None)
        # FlashInfer's backend has no such buffer: its plan packs the mask into the wrapper's.
        self._own = self._mask is None and type(self._target.attn_backend).__name__ == "FlashInferAttnBackend"
        if self._own:
            self._mask = _full_mask(worker, self._target.attn_backend)
        graphs = getattr(self._target, "decode_cuda_graph_runner", None)
        self._fill = int(getattr(graphs, "seq_len_fill_value", 1))
        self._sizes = sorted(getattr(graphs, "capture_bs", ()))
        self._capacity = max([len(worker._topk1_parents_prealloc), *self._sizes[-1:]])
        self._chain: Kept | None = None
        self._extension: Kept | None = None
        made, stays = [], []
        newer = hasattr(import_module(_COMMON), _LAYOUT)
        mode = None if self._mask is None else self._mask.mode.name
        if mode == "FULL_MASK" or (mode == "QLEN_ONLY" and not newer):
            self._chain = self._bind_chain(self._fill)
            made.append(CHAIN)
        else:
            stays.append(f"{CHAIN}, {'by one launch' if mode == 'QLEN_ONLY' else 'with a mask of its own'}")
        if newer:
            stays.append(f"{LAYOUT}, by one launch")
        else:
            self._extension = self._bind_extension()
            made.append(LAYOUT)
            stays.append("the draft's positions by repeat_interleave")
            self._starts = torch.arange(self._capacity, device=self._pool.device) * self._tokens
        if not made:
            raise ArgumentError(f"{type(worker).__name__} isn't served: SGLang itself makes {'; '.join(stays)}.")
        self.refreshed, self.stays = " and ".join(made), "; ".join(stays)
        self._batch: Any = None  # while its verification's input is made
        self._located: tuple[Tensor, Tensor, Tensor] | None = None  # lengths and rows, and the locations made for them
        self._answers: Answers | None = None  # while a draft extension's batch is made
        self._layout: tuple[Tensor, Tensor] | None = None  # its positions and starts
        self._replaced = Replaced()
        self._replace()

    def __repr__(self) -> str:
        return f"{type(self.backend).__name__}: one launch makes {self.refreshed}; the engine's own: {self.stays}"

    def detach(self) -> None:
        """Restores the engine's own code. A second call does nothing."""
        self._replaced.restore()
        Hook.remove(self)
        self.attached = False

    # ------------------------------------------------------------------------------------------ attaching

    def _bind_chain(self, fill: int) -> Kept:
        tokens, mask = self._tokens, self._mask
        full = mask.mode.name == "FULL_MASK"
        others, facts = {"mask": mask.buffer.view(torch.bool)}, named(tokens)
        if full:
            # Padding requests have a mask too, as long as their own length.
            others, facts = {"full_mask": others["mask"]}, {**facts, "padding_len": int(fill)}
        later = {seams.token_input(number): "draft_tokens" for number in range(1, tokens)}

        def inputs(sources: Sources) -> dict[str, Tensor]:
            drafts = zip(later, sources["draft_tokens"].unbind(1), strict=True)
            return {"pool_rows": sources["req_pool_indices"], "token_0": sources["bonus_tokens"], **dict(drafts)}

        viewed = {**VIEWED, "token_0": "bonus_tokens", **later}
        return Kept(seams.verify(tokens), _CHAIN, others, self._capacity, self._pool, inputs, viewed, facts)

    def _bind_extension(self) -> Kept:
        tokens, facts = self._tokens, named(self._tokens)
        numbered = [seams.token_input(number) for number in range(tokens)]
        # The engine converts them to int64; the launch reads them before that.
        facts["inputs"] = {**facts["inputs"], **dict.fromkeys(numbered, torch.int32)}

        def inputs(sources: Sources) -> dict[str, Tensor]:
            of_requests = {"pool_rows": sources["req_pool_indices"], "accepted": sources["num_accept_tokens"]}
            return {**of_requests, **dict(zip(numbered, sources["input_ids"].view(-1, tokens).unbind(1), strict=True))}

        declared = seams.draft_extend(tokens)
        return Kept(declared, _EXTENSION, {}, self._capacity, self._pool, inputs, VIEWED, facts)

    def _replace(self) -> None:
        worker, drafter, common = self.backend, import_module(_DRAFTER), import_module(_COMMON)
        if self._chain is not None:
            Hook.put(self, drafter, "build_eagle_verify_input", self._verifies)
            Hook.put(self, common, "build_tree_kernel_efficient", self._tree)
            Hook.put(self, import_module(_LOCATIONS), "assign_extend_cache_locs_uniform_func", self._locations)
        if self._extension is not None:
            Hook.put(self, drafter, "prepare_for_draft_extend", self._prepares)
            Hook.put(self, import_module(_BATCHES), "compute_position", self._positions)
            self._replaced.put(worker, _EXTENDS, Bound(self._extends, getattr(worker, _EXTENDS)))

    def _ready(self, bs: int) -> bool:
        """Whether a batch is served: adaptive speculation changes the number of tokens, and a pool may be replaced."""
        worker = self.backend
        return (
            not self.failed
            and 0 < bs <= self._capacity
            and worker.speculative_num_draft_tokens == self._tokens
            and self._pools.req_to_token is self._pool
        )

    # ------------------------------------------------------------------------------------------ the chain

    def _verifies(self, original: Any, batch: Any, *arguments: Any, **keywords: Any) -> Any:
        """build_eagle_verify_input, the last step of the worker's draft."""
        if keywords.get("target_worker") is not self.backend.target_worker:
            return NotImplemented
        self._batch, self._located = batch, None
        try:
            return original(batch, *arguments, **keywords)
        finally:
            self._batch = None

    def _tree(
        self,
        original: Any,
        bonus_tokens: Tensor,
        parents: Tensor,
        scores: Tensor,
        draft_tokens: Tensor,
        seq_lens: Tensor,
        seq_lens_sum: int,
        topk: int,
        steps: int,
        tokens: int,
        mode: Any,
        mask: Tensor | None,
        **keywords: Any,
    ) -> Any:
        """build_tree_kernel_efficient: for a chain, one launch makes all of its results."""
        batch, chain, bs = self._batch, self._chain, seq_lens.numel()
        if (
            batch is None
            or chain is None
            or not self._ready(bs)
            or (topk, steps + 1, tokens) != (1, tokens, self._tokens)
            or mode != self._mask.mode
            or mask is not (None if self._own else self._mask.buffer)
            or draft_tokens.dtype != torch.int64
        ):
            return NotImplemented
        at = bisect.bisect_left(self._sizes, bs)
        size = self._sizes[at] if at < len(self._sizes) and self._mask.mode.name == "FULL_MASK" else None
        if self._own:
            cells = tokens * (seq_lens_sum + bs * tokens + ((size or bs) - bs) * (self._fill + tokens))
            if cells > self._mask.buffer.numel():
                return NotImplemented
        sources = {"bonus_tokens": bonus_tokens.to(torch.int64), "draft_tokens": draft_tokens}
        try:
            made = chain.run(seq_lens, batch.req_pool_indices, sources, size)
        except Exception as error:
            self.failed = warned(self.backend, error)
            return NotImplemented
        self.launches += 1
        self._located = seq_lens, batch.req_pool_indices, made["out_cache_loc"]
        return self._mask.buffer, made["positions"], *(made[name] for name in _TREE), made["input_ids"]

    def _locations(self, original: Any, **keywords: Any) -> Any:
        """assign_extend_cache_locs_uniform_func: the write locations of the chain."""
        made, self._located = self._located, None
        if made is None or keywords["draft_token_num"] != self._tokens:
            return NotImplemented
        lengths, rows, locations = made
        same = keywords["start_offset"] is lengths and keywords["req_pool_indices"] is rows
        return locations if same else NotImplemented

    # ------------------------------------------------------------------------------------------ the extension

    def _extends(self, original: Any, batch: Any, result: Any, *arguments: Any, **keywords: Any) -> Any:
        """The worker's draft extension: the launch makes its batch's tensors before the engine's code computes them."""
        try:
            known = self._make(batch, result)
        except Exception as error:
            self.failed, known = warned(self.backend, error), None
        if known is None:
            return original(batch, result, *arguments, **keywords)
        self._answers = Answers(known)
        self._answers.__enter__()  # type: ignore[no-untyped-call]
        try:
            return original(batch, result, *arguments, **keywords)
        finally:
            self._close()

    def _prepares(self, original: Any, *arguments: Any, **keywords: Any) -> Any:
        """prepare_for_draft_extend: when it returns, operations are computed again."""
        try:
            return original(*arguments, **keywords)
        finally:
            self._close()

    def _positions(self, original: Any, *arguments: Any) -> Any:
        """compute_position: the positions, and where each request starts."""
        layout, self._layout = self._layout, None
        return NotImplemented if layout is None else layout

    def _close(self) -> None:
        if self._answers is not None:
            self._answers.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._answers = self._layout = None

    def _make(self, batch: Any, result: Any) -> dict[tuple[Any, ...], Tensor] | None:
        """Launches; returns the results of the engine's operations, or None if the batch isn't served."""
        lengths, accepted, ids = batch.seq_lens, result.accept_lens, result.next_token_ids
        bs, tokens, extension = lengths.numel(), self._tokens, self._extension
        if (
            extension is None
            or batch.forward_mode.is_idle()
            or not self._ready(bs)
            or (accepted.dtype, ids.dtype) != (torch.int32, torch.int32)
            or ids.numel() != bs * tokens
        ):
            return None
        sources = {"num_accept_tokens": accepted, "input_ids": ids}
        made = extension.run(lengths, batch.req_pool_indices, sources)
        self.launches += 1
        self._layout = made["positions"], made["extend_start_loc"]
        starts, end = self._starts[:bs], made["select_end"]
        return {
            asked("sub", accepted, 1): made["num_correct_drafts"],
            asked("arange", 0, bs * tokens, tokens): starts,
            asked("add", starts, accepted): end,
            asked("sub", end, 1): made["select_index"],
            asked("to", ids, torch.int64): made["input_ids"],
            # Lengths aren't negative.
            asked("sub", lengths, 0): lengths,
            asked("clamp", lengths, min=0): lengths,
            asked("to", lengths, torch.int32): made["prefix_lens"],
            asked("full", (bs,), tokens, dtype=torch.int32): made["extend_seq_lens"],
            asked("add", lengths, tokens): made["seq_lens"],
        }


def attach_worker(worker: Any) -> Producers:
    """Attaches to a draft worker: see targets.attach."""
    name = type(worker).__name__
    for attribute in ("target_worker", "req_to_token_pool", "_topk1_parents_prealloc", _EXTENDS):
        read("the worker", worker, (attribute,), VERSION)
    tokens, steps = worker.speculative_num_draft_tokens, worker.speculative_num_steps
    for attribute, value, served, why in (
        ("topk", worker.topk, worker.topk == 1, "a draft tree isn't a chain"),
        ("speculative_num_draft_tokens", tokens, tokens == steps + 1, f"speculative_num_steps is {steps}"),
        (
            *("speculative_num_draft_tokens", tokens, tokens <= seams.MAX_TOKEN_INPUTS),
            f"at most {seams.MAX_TOKEN_INPUTS} are inputs of a launch",
        ),
        ("plan_stream", worker.plan_stream, worker.plan_stream is None, "another stream prepares batches"),
    ):
        if not served:
            raise not_served(worker, f"{attribute} is {value!r}: {why}")
    if reason := refusal(worker.target_worker.model_runner.attn_backend, partly=True):
        raise not_served(worker, reason)
    there = [seam for hook in Hook.made.values() for seam, _ in hook.seams]
    if any(isinstance(seam, Producers) and seam.backend is worker for seam in there):
        raise ArgumentError(f"{name} is attached already. Call detach() of what attach() returned.")
    return Producers(worker)
