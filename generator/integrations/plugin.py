"""The entry point in ``sglang.srt.plugins``: an unmodified SGLang attaches onelaunch to the backends that it makes.

If onelaunch is installed, SGLang calls ``install`` in each of its processes. It does nothing unless
``ONELAUNCH_SGLANG`` is 1 or ``SGLANG_PLUGINS`` contains the name onelaunch. It never raises. The log gets one line per
backend: what one launch refreshes and what the engine still does, or why the backend isn't served.

Unless it is requested, it imports only the standard library.
"""

from __future__ import annotations

import logging
import os
import pkgutil
from typing import Any

from ..variables import SGLANG_VARIABLE

NAME = "onelaunch"
SELECTED_VARIABLE = "SGLANG_PLUGINS"

_logger = logging.getLogger("onelaunch")
_FACTORY = "sglang.srt.speculative.draft_utils.DraftBackendFactory"
_RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"


def asked() -> bool:
    """Whether the environment requests it. ``ONELAUNCH_SGLANG=0`` overrides ``SGLANG_PLUGINS``."""
    if SGLANG_VARIABLE.read():
        return SGLANG_VARIABLE.is_on()
    return NAME in [name.strip() for name in os.environ.get(SELECTED_VARIABLE, "").split(",")]


def install() -> None:
    """Registers hooks where SGLang makes backends, if the environment requests it."""
    if not asked():
        return
    try:
        registry = pkgutil.resolve_name("sglang.srt.plugins.hook_registry:HookRegistry")
        after = pkgutil.resolve_name("sglang.srt.plugins.hook_registry:HookType").AFTER
        for target, hook in (
            (f"{_FACTORY}.create_decode_backend", _made),
            (f"{_FACTORY}.create_draft_extend_backend", _made),
            (f"{_RUNNER}.init_attention_backends", _initialized),
        ):
            registry.register(target, hook, after)
    except Exception as error:
        _logger.warning("onelaunch isn't attached: this SGLang has no hooks that it knows (%s).", error)


def _made(backend: Any, *arguments: Any, **keywords: Any) -> None:
    """After a factory made a draft backend."""
    _attach(backend)


def _initialized(result: Any, runner: Any, *arguments: Any, **keywords: Any) -> None:
    """After a model runner made its own backends, which are often one."""
    made = [getattr(runner, name, None) for name in ("attn_backend", "decode_attn_backend")]
    for backend in {id(backend): backend for backend in made}.values():
        _attach(backend)


def _attach(backend: Any) -> None:
    if backend is None:
        return
    try:
        # Not at the top of the file: without a request no torch is imported.
        from .sglang import attach

        attach(backend)  # logs what it did
    except Exception as error:
        _logger.info("attach %s", error)
