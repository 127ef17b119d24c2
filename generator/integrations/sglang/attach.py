"""Replaces a backend's refresh code by one launch, and restores it."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from ... import log
from ...errors import ArgumentError
from ...variables import DISABLE_VARIABLE
from ..refusals import batch_refusal, not_served, refusal, wide_table_refusal
from .captured import VERSION, WIDE_TABLE, mode_of
from .extension import EAGER, Extension, extends_without_a_graph
from .hooks import Bound, Replaced
from .lists import INDICES, Lists, splits_are_served
from .places import IN_GRAPH, LISTS_KERNEL, OUT_GRAPH, PLACES, WITHOUT_SPLITS, Place
from .refresher import Ready, Refresher, launch
from .wrappers import wrappers_refusal

# Attachments by backend.
_ATTACHED: weakref.WeakKeyDictionary[Any, Attachment] = weakref.WeakKeyDictionary()
# With this variable SGLang may record in a graph also what comes before a replay.
_GLUE_VARIABLE = "SGLANG_ENABLE_METADATA_GLUE_GRAPH"


class Attachment:
    """One backend whose refresh is a launch.

    Attributes:
        backend: the backend.
        refreshed: a description of what one launch refreshes; "" if onelaunch is disabled.
        stays: a description of the engine's steps that still run.
        launches: launches so far, not counting those that a graph replays.
        failed: the error after which the engine's own code runs again; "" if there was none.
        place: what is replaced; None if onelaunch is disabled.
        schedules: whether the launch makes DeepGEMM's schedules.
        made: whether a runner's launch has already written, for the current batch, what this launch would write.
    """

    def __init__(
        self,
        backend: Any,
        place: Place | None = None,
        refresh: Refresher | Lists | None = None,
        schedules: bool = False,
        extension: Extension | None = None,
    ) -> None:
        self.backend = backend
        self.refreshed = "" if place is None else place.refreshed
        self.stays = "everything" if place is None else place.stays
        self.launches = 0
        self.failed = ""
        self.place, self.schedules, self.made = place, schedules, False
        self._refresh, self._extension = refresh, extension
        self._several = hasattr(backend, "attn_backends")
        # (batch size, the engine's forward mode) -> (onelaunch's name of the mode, plan)
        self._ready: dict[tuple[int, Any], tuple[str, Ready]] = {}
        self._recorded = False
        self._replaced = Replaced()
        if place is None:
            return
        self._place = place
        _ATTACHED[backend] = self
        self._in_graphs = place.method == IN_GRAPH or bool(os.environ.get(_GLUE_VARIABLE))
        mine: dict[str, Callable[..., None]] = {
            OUT_GRAPH: self._out_graph,
            IN_GRAPH: self._in_graph,
            EAGER: self._without_graph,
        }
        for name in place.methods if extension is None else (*place.methods, EAGER):
            original = getattr(backend, name)
            replacement = _Kernel(self, original) if name == LISTS_KERNEL else Bound(mine[name], original)
            self._replaced.put(backend, name, replacement)

    @property
    def attached(self) -> bool:
        """Whether the launch replaces the engine's code."""
        return bool(self._replaced)

    def detach(self) -> None:
        """Restores the engine's own code. A second call does nothing.

        Graphs that recorded the launch keep it; a warning then says to capture them again.
        """
        self._replaced.restore()
        _ATTACHED.pop(self.backend, None)
        self._forget()
        if self._recorded:
            self._recorded = False
            warnings.warn(
                f"{type(self.backend).__name__} captured graphs that contain onelaunch's launch, and they keep it. "
                "Capture them again to run the engine's own kernel.",
                stacklevel=2,
            )

    def beside(self, *arguments: Any, **settings: Any) -> Ready:
        """A plan that also writes the input buffers of a runner's graph; see Refresher.beside."""
        assert self._refresh is not None
        return self._refresh.beside(*arguments, **settings)

    def __repr__(self) -> str:
        if not self.refreshed:
            return f"{type(self.backend).__name__}: disabled, the engine's own code runs"
        return f"{type(self.backend).__name__}: one launch refreshes {self.refreshed}; the engine's own: {self.stays}"

    # ------------------------------------------------------------------------------------------ what is replaced

    def _out_graph(self, original: Any, forward_batch: Any, in_capture: bool = False) -> None:
        """init_forward_metadata_out_graph: before a capture, and before each replay."""
        if in_capture or self._place.method == IN_GRAPH:
            original(forward_batch, in_capture=in_capture)
            if in_capture and self._guarded(self._prepare, forward_batch):
                self._forget()
            return
        try:
            served = self._before_replay(forward_batch)
        except Exception as error:
            served = self._give_way(error)
        if not served:
            original(forward_batch, in_capture=in_capture)
            self._forget()

    def _in_graph(self, original: Any, forward_batch: Any) -> None:
        """init_forward_metadata_in_graph: recorded while the engine captures."""
        if not self._guarded(self._before_replay, forward_batch):
            original(forward_batch)

    def _without_graph(self, original: Any, forward_batch: Any) -> None:
        """init_forward_metadata, which runs without a graph. Only a draft extension is served."""
        try:
            served = self._extension is not None and self._refresh is not None and self._extension.run(forward_batch)
        except Exception as error:
            served = self._give_way(error)
        if served:
            self.launches += 1
        else:
            original(forward_batch)

    def _guarded(self, step: Callable[..., bool], *arguments: Any) -> bool:
        """Runs a step; whether it replaced the engine's own code. After an exception no later step runs."""
        try:
            return self._refresh is not None and step(*arguments)
        except Exception as error:
            return self._give_way(error)

    def _give_way(self, error: Exception) -> bool:
        """After any exception: from now on the engine's own code writes every tensor. Returns False."""
        self._forget()
        self._refresh = None
        self._ready = {}
        self.failed = warned(self.backend, error)
        return False

    def _forget(self) -> None:
        """Drops the hashes of verified writes, because the engine's own code wrote the tables or will."""
        if self._refresh is not None:
            self._refresh.forget()

    # ------------------------------------------------------------------------------------------ the launch

    def _mode(self, forward_batch: Any) -> str:
        """The batch's mode; "" if it isn't served."""
        mode = "decode"
        if not self._several:
            try:
                mode = mode_of(forward_batch.forward_mode)
            except ArgumentError:
                return ""
            if mode == "decode" and getattr(forward_batch, "spec_info", None) is not None:
                return ""  # a single draft step, which sees more tokens than seq_lens says
        return mode if mode in self._place.modes and not batch_refusal(forward_batch) else ""

    def _prepare(self, forward_batch: Any) -> bool:
        """Binds a batch size's plan when its capture begins, so that nothing is built or bound while serving."""
        mode = self._mode(forward_batch)
        if not mode or self._refresh is None:
            return False
        bs = forward_batch.batch_size
        # SGLang's extend_seq_lens are int32.
        extends = torch.int32 if self._place.inputs is not None and mode == "draft_extend" else None
        ready = self._refresh.ready(
            bs, mode, forward_batch.seq_lens.dtype, forward_batch.req_pool_indices.dtype, extends
        )
        self._ready[bs, forward_batch.forward_mode] = mode, ready
        if self._place.method == IN_GRAPH and mode == "draft_extend":
            # The engine's recorded kernel writes these in each replay. With a fixed number of rows per request they are
            # constant, so they are written once.
            metadata = self.backend.draft_extend_metadata[bs]
            starts = metadata.cu_seqlens_q
            starts.copy_(torch.arange(len(starts), device=starts.device) * metadata.max_seq_len_q)
        return True

    def _before_replay(self, forward_batch: Any) -> bool:
        """Launches, then runs the engine's remaining steps.

        Since the last call the engine's other work has evicted this code from the CPU's caches, so each call and each
        look-up costs up to a microsecond. What the capture already determined isn't looked up again.
        """
        known = self._ready.get((forward_batch.batch_size, forward_batch.forward_mode))
        if known is None:  # captured before attach()
            return self._prepare(forward_batch) and self._before_replay(forward_batch)
        mode, (plan, pairs, held) = known
        spec_info = getattr(forward_batch, "spec_info", None)
        if (
            getattr(forward_batch, "encoder_lens", None) is not None
            or getattr(spec_info, "ragged_verify_layout", None) is not None
            or (spec_info is not None and mode == "decode" and not self._several)
        ):
            return False  # the conditions of _mode
        for owner, name, value in held:
            if getattr(owner, name, None) is not value:  # the pool was replaced
                return self._prepare(forward_batch) and self._before_replay(forward_batch)
        place = self._place
        inputs = () if place.inputs is None else place.inputs(self.backend, forward_batch, mode)
        if inputs is None:
            return False
        launch(plan, forward_batch.seq_lens, forward_batch.req_pool_indices, inputs)
        self.launches += 1
        if self._in_graphs:
            self._note_recording()
        if place.after is not None:
            place.after(pairs, forward_batch, mode, self.schedules)
        return True

    def _fill_lists(self, bs: int, seq_lens: Tensor, req_pool_indices: Tensor, source: Tensor | None = None) -> bool:
        """The launch that replaces the engine's list kernel; the steps around it stay the engine's."""
        if self.made:
            return True
        assert isinstance(self._refresh, Lists)
        self._refresh.run(bs, seq_lens, req_pool_indices, source)
        self.launches += 1
        if self._in_graphs:
            self._note_recording()
        return True

    def _note_recording(self) -> None:
        if self._place.method == IN_GRAPH or torch.cuda.is_current_stream_capturing():
            self._recorded = True


def warned(target: Any, error: Exception) -> str:
    """Warns once that a backend or runner runs the engine's own code from now on; returns the error's text.

    Call it two frames below the function that the engine calls, so that the warning names the engine's line.
    """
    failed = f"{type(error).__name__}: {error}"
    text = f"{type(target).__name__} runs the engine's own code from now on. {failed}"
    log.logger.warning(text)
    warnings.warn(text, RuntimeWarning, stacklevel=5)
    return failed


class _Kernel:
    """Replaces a backend's Triton kernel: kernel[grid](arguments)."""

    def __init__(self, attachment: Attachment, original: Any) -> None:
        self._attachment, self._original = attachment, original

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **keywords: Any) -> None:
            attachment = self._attachment
            rows, source, seq_lens, destination = arguments[:4]
            # Without a graph the engine fills other lists; with a unified pool it translates the tokens.
            for_a_graph = destination is getattr(attachment.backend, INDICES, None) and not keywords.get("TRANSLATE")
            if not (for_a_graph and attachment._guarded(attachment._fill_lists, grid[1], seq_lens, rows, source)):
                self._original[grid](*arguments, **keywords)

        return launch


def attached_to(backend: Any) -> Attachment | None:
    """The attachment of a backend; None if it isn't attached."""
    return _ATTACHED.get(backend)


def attach_backend(
    backend: Any,
    *,
    leave: Collection[str] = (),
    schedules: bool = False,
    **settings: Any,
) -> Attachment:
    """Attaches to a backend: see targets.attach."""
    if DISABLE_VARIABLE.is_on():
        attachment = Attachment(backend)
    else:
        place = _place_of(backend)
        if WIDE_TABLE in leave and (reason := wide_table_refusal(backend)):
            raise ArgumentError(
                f"leave has {WIDE_TABLE!r}, and {type(backend).__name__} needs it: {reason}. Remove it from leave."
            )
        refresh: Refresher | Lists
        extension = None
        if place.lists:
            if leave or schedules:
                what = f"leave is {tuple(leave)!r}" if leave else "schedules is True"
                raise ArgumentError(f"{what}; {type(backend).__name__} has only kv_indptr and kv_indices. Omit it.")
            refresh = Lists(backend, **settings)
        else:
            # Like the engine's own code, the launch leaves the columns after the live ones alone.
            settings = {"page_fill": None, **settings}
            refresh = Refresher(backend, leave=(*leave, *place.leave), schedules=schedules, **settings)
            if place.extends and extends_without_a_graph(backend):
                extension = Extension(backend, **settings)
        if settings.get("writes", "all") != "all":
            _check_verified(backend, place, leave)
        attachment = Attachment(backend, place, refresh, schedules, extension)
    left = f"; {', '.join(leave)} is left out" if leave and attachment.refreshed else ""
    log.logger.info("attach %r%s", attachment, left)
    return attachment


def _check_verified(backend: Any, place: Place, leave: Collection[str]) -> None:
    """Refuses verified writes if a plan can't know what its tables hold."""
    name = type(backend).__name__
    if place.method == IN_GRAPH:
        raise ArgumentError(
            f"writes is 'verified', and {name} records the launch in its graphs, where nothing calls "
            "Plan.forget() after the engine's own code wrote. Pass writes='all'."
        )
    child: Any = next(iter(getattr(backend, "attn_backends", [backend])))
    page_size: Any = getattr(child, "physical_page_size", None) or getattr(child, "real_page_size", 1)
    if hasattr(child, "dsa_index_topk") and page_size > 1 and WIDE_TABLE not in leave:
        raise ArgumentError(
            f"writes is 'verified', and the batch sizes that {name} captures share page_table_1, but each has a "
            "real_page_table of its own, so that no plan knows what the others wrote. Pass leave=('page_table_1',) if "
            "nothing reads that table, else writes='all'."
        )


def _place_of(backend: Any) -> Place:
    name = type(backend).__name__
    place = PLACES.get(name)
    if place is None:
        raise ArgumentError(f"backend is a {name}; allowed: {', '.join(PLACES)}.")
    if any(_is_mine(getattr(backend, method, None)) for method in place.methods):
        raise ArgumentError(f"{name} is attached already. Call detach() of what attach() returned first.")
    if reason := refusal(backend) or (wrappers_refusal(backend) if place.lists else ""):
        raise not_served(backend, reason)
    for method in place.methods:
        if not hasattr(backend, method):
            raise ArgumentError(f"{name} isn't served: it has no {method}. {VERSION}")
    if name == "TritonMultiStepDraftBackend" and not splits_are_served(backend):
        return WITHOUT_SPLITS
    return place


def _is_mine(method: Any) -> bool:
    return isinstance(method, _Kernel | Bound)
