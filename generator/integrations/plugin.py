"""The entry point ``sglang.srt.plugins``: attaches onelaunch in an unmodified SGLang, wherever it is served.

If onelaunch is installed, SGLang calls ``install`` in each of its processes. ``install`` does nothing unless
``ONELAUNCH_SGLANG`` is 1 or ``SGLANG_PLUGINS`` contains the name onelaunch, and it never raises. It logs one line for
each attention backend, each graph runner of a speculative step and each draft worker: what one launch makes and what
the engine still does, or why it isn't served.

``ONELAUNCH_SGLANG=backends`` attaches to attention backends only.

Until onelaunch is requested, this module imports only the standard library.
"""

from __future__ import annotations

import logging
import os
import pkgutil
from collections.abc import Iterable, Iterator
from typing import Any

from ..variables import SGLANG_VARIABLE

NAME = "onelaunch"
BACKENDS = "backends"
SELECTED_VARIABLE = "SGLANG_PLUGINS"

_logger = logging.getLogger("onelaunch")
_FACTORY = "sglang.srt.speculative.draft_utils.DraftBackendFactory"
_CHOICES = ("decode_backend", "prefill_backend", "full_attn_backend")
_RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"
_WORKER = "sglang.srt.speculative.eagle_worker_v2.EAGLEWorkerV2"
# Paths from the worker to the graph runners of a speculative step and to the draft worker.
_AFTER_CAPTURE = (
    "_draft_worker.cuda_graph_runner",
    "_target_worker.model_runner.decode_cuda_graph_runner",
    "_draft_worker.cuda_graph_runner_for_draft_extend",
    "_draft_worker",
)


def requested() -> bool:
    """Whether the environment requests onelaunch. ``ONELAUNCH_SGLANG=0`` overrides ``SGLANG_PLUGINS``."""
    if SGLANG_VARIABLE.read():
        return SGLANG_VARIABLE.is_on()
    return NAME in [name.strip() for name in os.environ.get(SELECTED_VARIABLE, "").split(",")]


def install() -> None:
    """Registers hooks where SGLang makes backends and captures graphs, if the environment requests it."""
    if not requested():
        return
    try:
        registry = pkgutil.resolve_name("sglang.srt.plugins.hook_registry:HookRegistry")
        after = pkgutil.resolve_name("sglang.srt.plugins.hook_registry:HookType").AFTER
        hooks = [
            (f"{_FACTORY}.create_decode_backend", _made),
            (f"{_FACTORY}.create_draft_extend_backend", _made),
            (f"{_RUNNER}.init_attention_backends", _initialized),
        ]
        if SGLANG_VARIABLE.read() != BACKENDS:
            hooks.append((f"{_WORKER}.init_cuda_graphs", _captured))
        for target, hook in hooks:
            registry.register(target, hook, after)
    except Exception as error:
        _logger.warning("onelaunch isn't attached: this SGLang has no hooks that it knows (%s).", error)


def _made(backend: Any, *arguments: Any, **keywords: Any) -> None:
    """After a factory made a draft backend."""
    _attach_all([backend])


def _initialized(result: Any, runner: Any, *arguments: Any, **keywords: Any) -> None:
    """After a model runner made its own backends, which are often one."""
    _attach_all([getattr(runner, name, None) for name in ("attn_backend", "decode_attn_backend")])


def _captured(result: Any, worker: Any, *arguments: Any, **keywords: Any) -> None:
    """After the worker and the target model's runner captured their graphs."""
    runners = []
    for path in _AFTER_CAPTURE:
        runner = worker
        for name in path.split("."):
            runner = getattr(runner, name, None)
        runners.append(runner)
    _attach_all(runners)


def _attach_all(made: Iterable[Any]) -> None:
    """Attaches to each backend, runner or worker once, and skips None."""
    for backend in {id(part): part for one in made for part in _parts(one)}.values():
        try:
            # Imported here because it imports torch, which must not happen unless onelaunch is requested.
            from .sglang import attach

            attach(backend)  # logs what it did
        except Exception as error:
            _logger.info("attach %s", error)


def _parts(backend: Any) -> Iterator[Any]:
    """The backend, or those that it only chooses between, as HybridAttnBackend does."""
    # On FlashInfer's backend one of these names is a str, which names its kernels.
    found = [part for name in _CHOICES if not isinstance(part := getattr(backend, name, None), str | None)]
    for part in found:
        yield from _parts(part)
    if backend is not None and not found:
        yield backend
