"""Replaces a graph runner's copies and its backend's refresh by one launch, and restores them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ... import log
from ...errors import ArgumentError
from ...run.bind import bind
from ...run.declared import into
from ...spec.fields import MetadataBuffers
from ..attributes import read
from ..refusals import batch_refusal, not_served, refusal
from .attach import attach_backend, attached_to, warned
from .captured import VERSION
from .hooks import Bound, Hook, Replaced, Unfilled
from .places import LISTS_KERNEL, OUT_GRAPH
from .refresher import Ready
from .runners import COPIES, FILL, RUNNERS, Runner, Sources, Views, named

# The runner's method that chooses a batch's captured size.
_PAD = "_pad_to_bucket"
# A verification copies these of the batch's tensors again. The batch gets views of the buffers instead, because
# PyTorch skips a copy of a tensor onto itself.
_COPIED_AGAIN = ("input_ids", "positions")
# The module and name of SGLang 0.5.17's kernel that gathers the draft's write locations.
_WORKER, _GATHER = "sglang.srt.speculative.eagle_worker_common", "assign_draft_cache_locs_contiguous"


class Seam:
    """A graph runner whose copies, and whose backend's refresh, are one launch.

    Attributes:
        backend: the runner.
        refreshed: a description of what one launch writes.
        stays: a description of the engine's steps that still run.
        launches: launches so far.
        failed: the error after which the engine's own code runs again; "" if there was none.
    """

    def __init__(self, runner: Any, kind: Runner) -> None:
        self.backend, self._kind = runner, kind
        self.launches, self.failed = 0, ""
        self._tokens = kind.tokens(runner)
        self._declared = kind.declare(self._tokens)
        self._buffers = {name: tensor for name, tensor in kind.buffers(runner).items() if name in self._declared}
        self._names = {tensor.data_ptr(): name for name, tensor in self._buffers.items()}
        self._width = 1 if kind.mode == "decode" else self._tokens  # positions of a request
        registry = getattr(runner, kind.registry) if kind.registry else None
        self._slots = [] if registry is None else [registry.get_slot(name) for name in self._buffers]
        self._heads: dict[int, dict[str, Tensor]] = {}  # the buffers of _COPIED_AGAIN, by a batch's number of tokens
        self._backend = getattr(runner, kind.backend)
        self._attachment, self._owned = attached_to(self._backend), False
        if self._attachment is None:
            self._attach_backend()
        self._whole = self._serves_backend()
        try:
            self._ready = {bs: self._bind(bs) for bs in runner.capture_bs}
        except Exception:
            if self._owned and self._attachment is not None:
                self._attachment.detach()
            raise
        self._views = {bs: Views(ready.plan, self._inputs) for bs, ready in self._ready.items()}
        self._batch: Any = None  # while the runner's method runs
        self._size = 0  # the captured size of that batch
        self._launched: Ready | None = None  # between the launch and the engine's call of the backend's refresh
        self._drafting = False  # while the worker drafts with this runner
        self._unfilled: dict[str, Unfilled] = {}  # the buffers, until the batch is copied into them
        self._waiting: Callable[[], Any] | None = None  # the deferred gather of the draft's write locations
        columns = ", ".join(self._buffers)
        self.refreshed = f"{kind.seam}'s {columns}"
        if self._whole:
            assert self._attachment is not None
            self.refreshed += f"; {type(self._backend).__name__}'s {self._attachment.refreshed}"
        self.stays = f"{kind.stays}; of {type(self._backend).__name__}: {self._of_backend()}"
        self._replaced = Replaced()
        self._replace()

    @property
    def attached(self) -> bool:
        """Whether the launch replaces the engine's code."""
        return bool(self._replaced)

    def __repr__(self) -> str:
        return f"{type(self.backend).__name__}: one launch writes {self.refreshed}; the engine's own: {self.stays}"

    # ------------------------------------------------------------------------------------------ attaching

    def _attach_backend(self) -> None:
        try:
            self._attachment, self._owned = attach_backend(self._backend), True
        except ArgumentError as error:
            log.logger.info("attach %s", error)

    def _serves_backend(self) -> bool:
        """Whether the launch also replaces the backend's refresh before a replay."""
        attachment = self._attachment
        if attachment is None or not attachment.attached:
            return False
        place = attachment.place
        assert place is not None
        return self._kind.mode in place.modes and place.method in (OUT_GRAPH, LISTS_KERNEL)

    def _of_backend(self) -> str:
        if not self._whole or self._attachment is None:
            return "everything" if self._attachment is None else repr(self._attachment)
        return self._attachment.stays

    def _bind(self, bs: int) -> Ready:
        kind, runner = self._kind, self.backend
        extends = kind.mode == "draft_extend"
        written = {**self._declared, **{name: into(self._declared[name], self._view(name)) for name in self._buffers}}
        settings: dict[str, Any] = {
            **named(self._tokens),
            "padding_len": int(runner.seq_len_fill_value) - (self._tokens if extends else 0),
            "seq_lens_dtype": torch.int32 if extends else torch.int64,
        }
        if self._whole:
            assert self._attachment is not None
            return self._attachment.beside(bs, kind.mode, written, self._tokens if extends else 0, **settings)
        pool = runner.model_runner.req_to_token_pool.req_to_token
        plan = bind([MetadataBuffers()], req_to_token=pool, declare=written, **settings)
        return Ready(plan, [], [(runner.model_runner.req_to_token_pool, "req_to_token", pool)])

    def _inputs(self, sources: Sources) -> dict[str, Tensor]:
        return self._kind.inputs(sources, self._tokens)

    def _view(self, name: str) -> Tensor:
        tensor = self._buffers[name]
        # topk_p is copied bit by bit. With one branch its only column is the whole tensor.
        return tensor.view(-1).view(torch.int32) if tensor.is_floating_point() else tensor.view(-1)

    def _replace(self) -> None:
        kind, runner = self._kind, self.backend
        self._set(runner, kind.method, self._around)
        self._set(self._backend, OUT_GRAPH, self._out_graph)
        if kind.registry:
            self._set(getattr(runner, kind.registry), FILL, self._fill)
        else:
            self._set(runner, _PAD, self._padded)
            Hook.put(self, sys.modules[type(runner).__module__], COPIES, self._copies)
        worker, drafter = sys.modules.get(_WORKER), getattr(runner, "eagle_worker", None)
        if kind.mode == "decode" and worker is not None and hasattr(worker, _GATHER) and hasattr(drafter, "draft"):
            Hook.put(self, worker, _GATHER, self._gathers)
            self._set(runner, "can_run_graph", self._can_run_graph)
            self._set(drafter, "draft", self._drafts)

    def _set(self, owner: Any, name: str, mine: Any) -> None:
        self._replaced.put(owner, name, Bound(mine, getattr(owner, name)))

    def detach(self) -> None:
        """Restores the engine's own code. A second call does nothing."""
        self._replaced.restore()
        Hook.remove(self)
        if self._owned and self._attachment is not None:
            self._attachment.detach()

    # ------------------------------------------------------------------------------------------ what is replaced

    def _around(self, original: Any, batch: Any, *arguments: Any, **keywords: Any) -> Any:
        """The runner's method, during which the launch replaces the copies."""
        self._batch, self._size = batch, 0
        # The engine fills buffers only to pad a batch, so not if its size was captured.
        padded = not self._kind.registry and batch.batch_size not in self._ready and not self.failed
        buffers = self.backend.buffers
        if padded:
            self._unfilled = {name: Unfilled(getattr(buffers, name)) for name in self._buffers}
            self.backend.buffers = SimpleNamespace(**{**vars(buffers), **self._unfilled})
        try:
            return original(batch, *arguments, **keywords)
        finally:
            if padded:
                self.backend.buffers, self._unfilled = buffers, {}
            self._batch = self._launched = None
            if self._attachment is not None:
                self._attachment.made = False
            self._flush()

    def _padded(self, original: Any, size: int, sizes: Sequence[int]) -> int:
        self._size = original(size, sizes)
        return self._size

    def _out_graph(self, original: Any, batch: Any, *arguments: Any, **keywords: Any) -> Any:
        """The backend's refresh: after a launch only the steps that stay the engine's."""
        if self._remaining(batch):
            return None
        if self._launched is None:
            for made in self._ready.values():
                made.plan.forget()
        return original(batch, *arguments, **keywords)

    def _remaining(self, batch: Any) -> bool:
        """Runs the steps that stay the engine's after a launch; False if its own code must refresh everything."""
        ready, attachment = self._launched, self._attachment
        place = None if attachment is None else attachment.place
        if ready is None or not self._whole or place is None or place.method != OUT_GRAPH:
            return False
        assert attachment is not None
        try:
            if place.inputs is not None and place.inputs(self._backend, batch, self._kind.mode) is None:
                self._launched = None
                return False
            if place.after is not None:
                place.after(ready.pairs, batch, self._kind.mode, attachment.schedules)
        except Exception as error:
            self._launched = None
            return self._give_way(error)
        return True

    def _copies(self, original: Any, destinations: list[Tensor], sources: list[Tensor]) -> Any:
        """The runner's copies of a batch into its buffers: only those that the launch doesn't write."""
        if self._batch is None or self.failed:
            return NotImplemented
        known = self._names
        names = [known.get(to.data_ptr(), "") for to in destinations]
        named = dict(zip(names, sources, strict=True))
        for name, unfilled in self._unfilled.items():
            setattr(self.backend.buffers, name, unfilled.tensor)
        if not self._done(named):
            for unfilled in self._unfilled.values():
                unfilled.fill()
            return NotImplemented
        if "" in named:
            left = [index for index, name in enumerate(names) if not name]
            original([destinations[index] for index in left], [sources[index] for index in left])
        return None

    def _fill(self, original: Any, batch: Any, **keywords: Any) -> None:
        """The registry's copies, without the slots that the launch wrote."""
        sources = {name: getattr(batch, name, None) for name in self._buffers}
        self._size = keywords["padded_bs"]
        staged = keywords.get("skip_slots")  # the engine wrote these slots already
        raw = keywords["raw_num_tokens"]
        if batch is not self._batch or self.failed or staged or not self._done(sources):
            original(batch, **keywords)
            return
        if raw not in self._heads:
            self._heads[raw] = {name: self._buffers[name][:raw] for name in _COPIED_AGAIN if name in self._buffers}
        for name, head in self._heads[raw].items():
            setattr(batch, name, head)
        for slot in self._slots:
            slot.enabled = False
        try:
            original(batch, **keywords)
        finally:
            for slot in self._slots:
                slot.enabled = True

    def _done(self, sources: dict[str, Any]) -> bool:
        """Launches if it can; whether it did. If not, the engine's own code must do everything."""
        try:
            done = self._launch(sources)
        except Exception as error:
            done = self._give_way(error)
        if done:
            self._waiting = None
        else:
            self._flush()
        return done

    def _launch(self, sources: dict[str, Any]) -> bool:
        """Launches unless a source is missing or the batch isn't served; whether it did.

        Each line costs host time, because this code isn't in the CPU's caches: see Attachment._before_replay.
        """
        kind, batch, ready = self._kind, self._batch, self._ready.get(self._size)
        if ready is None or not self._fits(batch):
            return False
        for name in self._buffers:
            if sources.get(name) is None:
                return False
        lengths, rows = kind.lengths(sources, batch), sources["req_pool_indices"]
        requests = rows.numel()
        if lengths.numel() != requests or sources["positions"].numel() != requests * self._width:
            return False
        for owner, name, value in ready.held:
            if getattr(owner, name, None) is not value:
                raise ArgumentError(f"{name} was replaced after attach(). Attach again.")
        self._views[self._size].run(lengths, rows, sources, self._size)
        self.launches += 1
        self._launched = ready
        if self._whole and self._attachment is not None:
            self._attachment.made = True
        return True

    def _fits(self, batch: Any) -> bool:
        """Whether a batch is served: a chain, of this seam's mode and number of tokens."""
        spec_info = batch.spec_info
        if batch_refusal(batch) or batch.forward_mode.is_idle() or getattr(spec_info, "num_front_tokens", 0):
            return False
        if self._kind.mode != "target_verify":
            return True
        chain = getattr(spec_info, "topk", 0) == 1 and getattr(spec_info, "draft_token_num", 0) == self._tokens
        return bool(batch.forward_mode.is_target_verify()) and chain

    def _give_way(self, error: Exception) -> bool:
        """After any exception: the engine's own code runs from now on. Returns False."""
        self.failed = warned(self.backend, error)
        return False

    # ------------------------------------------------------------------------------------------ the draft's gather

    def _gathers(self, launch: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """Defers the gather of a draft's write locations until the launch, which makes them too."""
        if not self._drafting or self.failed or arguments[5:7] != (1, self._tokens):
            return NotImplemented
        self._waiting = functools.partial(launch, *arguments, **keywords)
        return None

    def _drafts(self, original: Any, *arguments: Any, **keywords: Any) -> Any:
        """The worker's draft, which uses this runner unless adaptive speculation replaced it."""
        worker = self.backend.eagle_worker
        # Two further readers of the locations, before the graph.
        seeded = getattr(worker, "seed_dsa_topk_from_draft_extend", True)
        watched = getattr(getattr(worker, "draft_runner", None), "canary_manager", None) is not None
        mine = getattr(worker, "cuda_graph_runner", None) is self.backend
        self._drafting = mine and not seeded and not watched
        try:
            return original(*arguments, **keywords)
        finally:
            self._drafting = False
            self._flush()

    def _can_run_graph(self, original: Any, batch: Any) -> Any:
        runs = original(batch)
        if not runs:
            self._flush()
        return runs

    def _flush(self) -> None:
        """Launches the deferred gather, because what follows reads its result."""
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            waiting()


def attach_runner(runner: Any) -> Seam:
    """Attaches to a graph runner: see attach."""
    kind = RUNNERS[type(runner).__name__]
    backend = read("the runner", runner, (kind.backend,), VERSION)
    for name in ("capture_bs", "seq_len_fill_value", _PAD, kind.method):
        read("the runner", runner, (name,), VERSION)
    if reason := refusal(backend):
        raise not_served(runner, reason)
    if getattr(runner, "_metadata_glue", None) is not None:
        raise ArgumentError(
            f"{type(runner).__name__} isn't served: _metadata_glue is set, so what comes before a replay is "
            "recorded in a graph. Unset SGLANG_ENABLE_METADATA_GLUE_GRAPH."
        )
    if isinstance(getattr(runner, kind.method), Bound):
        raise ArgumentError(f"{type(runner).__name__} is attached already. Call detach() of what attach() returned.")
    if kind.mode == "decode" and (runner.topk or 1) > 1:
        raise ArgumentError(f"the runner's topk is {runner.topk}; allowed: 1. A draft tree has rows for each branch.")
    if kind.mode == "target_verify" and runner.captured_req_width < 2:
        raise ArgumentError("the runner's captured_req_width is 1: it doesn't verify, it decodes. Attach its backend.")
    return Seam(runner, kind)
