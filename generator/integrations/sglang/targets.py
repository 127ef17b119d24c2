"""attach(): one line for whatever of SGLang's is served."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ... import log
from ...errors import ArgumentError
from ...variables import DISABLE_VARIABLE
from .attach import Attachment, attach_backend
from .runners import RUNNERS
from .seam import Seam, attach_runner
from .worker import WORKER, Producers, attach_worker


def attach(
    target: Any, *, leave: Collection[str] = (), schedules: bool = False, **settings: Any
) -> Attachment | Seam | Producers:
    """Replaces the code that refreshes metadata before a replay by one launch.

    Attach a backend before the engine captures its graphs: then plans are bound at capture, and nothing is built while
    serving. Attach a graph runner after it captured its graphs, and the draft worker after its runners. Only the target
    changes, and with a runner its backend. If a launch fails, the engine's own code runs from then on, and one warning
    says why. With ``ONELAUNCH_DISABLE=1`` nothing is attached.

    Args:
        target: a multi-step draft backend, or a single DSA, FA3, TRTLLM-MHA, FlashMLA, TRTLLM-MLA, Triton or FlashInfer
            backend; or a graph runner: EAGLEDraftCudaGraphRunner, EAGLEDraftExtendCudaGraphRunner, or the
            DecodeCudaGraphRunner that verifies. A runner's launch writes its input buffers, with padding, and its
            backend's tensors if the backend is served; arguments that the backend was attached with stay in effect. Or
            an EagleDraftWorker: one launch makes the chain that is verified, another the layout of a draft extension.
        leave: ("page_table_1",) leaves out DSA's table of tokens, which is most of what a refresh writes. Nothing reads
            it if the fused top-k v2 runs without k-pools and HiSparse; otherwise it is refused. The engine writes the
            table again after detach(). For a backend.
        schedules: whether the launch makes DSA's DeepGEMM schedules too. For a backend.
        settings: arguments of onelaunch.bind, which override what the backend has. For a backend.

    Returns:
        The attachment. Its text says what is refreshed and what the engine still does.

    Raises:
        ArgumentError: the target or its configuration isn't served; the message names the attribute. Nothing changed.
    """
    name = type(target).__name__
    if name not in RUNNERS and name != WORKER:
        return attach_backend(target, leave=leave, schedules=schedules, **settings)
    if leave or schedules or settings:
        raise ArgumentError(
            "leave, schedules and settings are a backend's. Attach the runner's backend with them first."
        )
    if DISABLE_VARIABLE.is_on():
        return Attachment(target)
    made = attach_runner(target) if name in RUNNERS else attach_worker(target)
    log.logger.info("attach %r", made)
    return made
