"""Putting a refresh in the engine's place on one backend, and taking it out again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from ... import log
from ...errors import ArgumentError
from ...variables import DISABLE_VARIABLE
from .. import flashinfer
from ..refusals import batch_refusal, refusal, wide_table_refusal
from .captured import VERSION, WIDE_TABLE, mode_of
from .places import PLACES, Place
from .refresher import Refresher

_OUT, _IN, _CSR = (
    "init_forward_metadata_out_graph",
    "init_forward_metadata_in_graph",
    "generate_draft_decode_kv_indices",
)


class Attachment:
    """A refresh in the engine's place on one backend.

    Attributes:
        backend: the backend.
        refreshed: what one launch refreshes, for people; "" if it is disabled.
        stays: the engine's steps that are still called.
        launches: launches so far; what a graph replays isn't counted.
        failed: why the engine's own code runs again; "" while the launch does.
    """

    def __init__(self, backend: Any, place: Place | None, refresher: Refresher | None, schedules: bool = False) -> None:
        self.backend = backend
        self.refreshed = "" if place is None else place.refreshed
        self.stays = "everything" if place is None else place.stays
        self.launches = 0
        self.failed = ""
        self._place, self._refresher, self._schedules = place, refresher, schedules
        self._recorded = False
        self._plan: Any = None
        self._originals: dict[str, Any] = {}
        self._shadowed: set[str] = set()
        if place is None:
            return
        if place.csr:
            self._replace(_CSR, _Kernel(self))
        else:
            self._replace(_OUT, self._out_graph)
            if place.in_graph:
                self._replace(_IN, self._in_graph)

    @property
    def attached(self) -> bool:
        """Whether the launch is in the engine's place."""
        return bool(self._originals)

    def detach(self) -> None:
        """Puts the engine's own code back. Does nothing the second time.

        What a graph has recorded can't be undone: then a warning says that the graphs must be captured again.
        """
        for name in self._originals:
            if name in self._shadowed:
                setattr(self.backend, name, self._originals[name])
            else:
                delattr(self.backend, name)
        self._originals = {}
        if self._recorded:
            self._recorded = False
            warnings.warn(
                f"{type(self.backend).__name__} captured graphs with onelaunch's launch in them, and they keep it. "
                "Capture them again to have the engine's own kernel.",
                stacklevel=2,
            )

    def __repr__(self) -> str:
        if not self.refreshed:
            return f"{type(self.backend).__name__}: disabled, the engine's own code runs"
        return f"{type(self.backend).__name__}: one launch refreshes {self.refreshed}; the engine's own: {self.stays}"

    # ------------------------------------------------------------------------------------------ what is replaced

    def _replace(self, name: str, mine: Any) -> None:
        if name in vars(self.backend):
            self._shadowed.add(name)
        self._originals[name] = getattr(self.backend, name)
        setattr(self.backend, name, mine)

    def _out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """init_forward_metadata_out_graph: before a capture, and before each replay."""
        place, original = self._place, self._originals[_OUT]
        assert place is not None
        if in_capture or place.in_graph:
            original(forward_batch, in_capture=in_capture)
            if in_capture:
                self._guarded(self._prepare, forward_batch)
        elif not self._guarded(self._refresh, forward_batch):
            original(forward_batch, in_capture=in_capture)

    def _in_graph(self, forward_batch: Any) -> None:
        """init_forward_metadata_in_graph: recorded while the engine captures."""
        if self._guarded(self._refresh, forward_batch):
            self._recorded = True
        else:
            self._originals[_IN](forward_batch)

    def _guarded(self, step: Callable[[Any], bool], forward_batch: Any) -> bool:
        """Whether the step served the batch. After an exception it serves none, and one warning says why."""
        if self.failed:
            return False
        try:
            return step(forward_batch)
        except Exception as error:  # of any kind: the engine's own code writes every tensor again
            self.failed = f"{type(error).__name__}: {error}"
            text = f"{type(self.backend).__name__} runs the engine's own code from now on. {self.failed}"
            log.logger.warning(text)
            warnings.warn(text, RuntimeWarning, stacklevel=3)
            return False

    # ------------------------------------------------------------------------------------------ the launch

    def _mode(self, forward_batch: Any) -> str:
        """The batch's mode; "" if it isn't served."""
        assert self._place is not None
        if hasattr(self.backend, "attn_backends"):
            mode = "decode"
        else:
            try:
                mode = mode_of(forward_batch.forward_mode)
            except ArgumentError:
                return ""
            if mode == "decode" and getattr(forward_batch, "spec_info", None) is not None:
                return ""  # one draft step alone, which sees more tokens than seq_lens says
        return mode if mode in self._place.modes and not batch_refusal(forward_batch) else ""

    def _prepare(self, forward_batch: Any) -> bool:
        """Binds the plan of a batch size right after its capture began, so that nothing is built or bound later."""
        mode = self._mode(forward_batch)
        if not mode:
            return False
        assert self._refresher is not None
        self._refresher.prepare(
            forward_batch.batch_size,
            mode=mode,
            seq_lens_dtype=forward_batch.seq_lens.dtype,
            req_pool_indices_dtype=forward_batch.req_pool_indices.dtype,
        )
        if self._place is not None and self._place.in_graph and mode == "draft_extend":
            # The recorded kernel would write these each time; with a fixed number of rows a request they are constants.
            metadata = self.backend.draft_extend_metadata[forward_batch.batch_size]
            starts = metadata.cu_seqlens_q
            starts.copy_(torch.arange(len(starts), device=starts.device) * metadata.max_seq_len_q)
        return True

    def _refresh(self, forward_batch: Any) -> bool:
        mode = self._mode(forward_batch)
        if not mode:
            return False
        assert self._refresher is not None
        assert self._place is not None
        pairs = self._refresher.run(
            forward_batch.batch_size, forward_batch.seq_lens, forward_batch.req_pool_indices, mode=mode
        )
        self.launches += 1
        self._place.after(pairs, forward_batch, mode, self._schedules)
        return True

    def _indices(self, batch_size: int, rows: Tensor, source: Tensor, lengths: Tensor, destination: Tensor) -> bool:
        """kv_indptr and kv_indices of all steps, if the engine fills what its graphs read from its own pool."""
        backend = self.backend
        if destination is not getattr(backend, "cuda_graph_kv_indices", None):
            return False
        if self._plan is None:
            self._plan = flashinfer.bind_backends(
                backend, source, seq_lens_dtype=lengths.dtype, req_pool_indices_dtype=rows.dtype
            )
            self._source = source, destination
        if self._source[0] is not source or self._source[1] is not destination:
            self._plan = None
            return self._indices(batch_size, rows, source, lengths, destination)
        self._plan.run(lengths[:batch_size], rows[:batch_size])
        self.launches += 1
        return True


class _Kernel:
    """In place of a backend's Triton kernel: kernel[grid](arguments)."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **keywords: Any) -> None:
            attachment = self._attachment
            rows, source, lengths, destination = arguments[:4]

            def fill(batch_size: int) -> bool:
                if keywords.get("TRANSLATE"):
                    return False
                return attachment._indices(batch_size, rows, source, lengths, destination)

            if not attachment._guarded(fill, grid[1]):
                attachment._originals[_CSR][grid](*arguments, **keywords)

        return launch


def attach(
    backend: Any,
    *,
    leave: Collection[str] = (),
    schedules: bool = False,
    **facts: Any,
) -> Attachment:
    """Puts one launch in the place of the code with which an SGLang backend refreshes its metadata.

    Call it before the engine captures its graphs: then plans are bound at capture, and nothing is built while serving.
    Nothing but this object changes. If a refresh fails, the engine's own code runs from then on, and one warning says
    why. With ``ONELAUNCH_DISABLE=1`` nothing is attached.

    Args:
        backend: a multi-step draft backend, or a single DSA, FA3, TRTLLM-MHA, FlashMLA or TRTLLM-MLA backend.
        leave: ("page_table_1",) leaves out DSA's table of tokens, most of what a refresh writes. Nothing reads it
            where the fused top-k v2 runs without k-pools and HiSparse; anything else is refused. The engine writes it
            again after detach().
        schedules: whether the launch makes DeepGEMM's schedules of DSA too.
        facts: arguments of onelaunch.bind, which override what the backend has.

    Returns:
        The attachment, whose text says what is refreshed and what stays the engine's; see detach().

    Raises:
        ArgumentError: the backend or its configuration isn't served; the message names the attribute. Nothing changed.
    """
    if DISABLE_VARIABLE.is_on():
        attachment = Attachment(backend, None, None)
    else:
        place = _place_of(backend)
        if WIDE_TABLE in leave and (reason := wide_table_refusal(backend)):
            raise ArgumentError(
                f"leave has {WIDE_TABLE!r}, and {type(backend).__name__} needs it: {reason}. Remove it from leave."
            )
        # The engine leaves the dead columns of a table alone, so the launch does too.
        refresher = Refresher(backend, leave=leave, schedules=schedules, **{"page_fill": None, **facts})
        attachment = Attachment(backend, place, refresher, schedules)
    left = f"; {', '.join(leave)} is left out" if leave and attachment.refreshed else ""
    log.logger.info("attach %r%s", attachment, left)
    return attachment


def _place_of(backend: Any) -> Place:
    name = type(backend).__name__
    place = PLACES.get(name)
    if place is None:
        raise ArgumentError(f"backend is a {name}; allowed: {', '.join(PLACES)}.")
    methods = (_CSR,) if place.csr else (_OUT, _IN)
    if any(_is_mine(getattr(backend, method, None)) for method in methods):
        raise ArgumentError(f"{name} is attached already. Call detach() of what attach() returned first.")
    if reason := refusal(backend):
        raise ArgumentError(f"{name} isn't served: {reason}. The engine's own code serves it.")
    for method in methods:
        if not hasattr(backend, method):
            raise ArgumentError(f"{name} isn't served: it has no {method}. {VERSION}")
    return place


def _is_mine(method: Any) -> bool:
    return isinstance(method, _Kernel) or isinstance(getattr(method, "__self__", None), Attachment)
