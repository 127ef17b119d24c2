"""The tests of this folder need an environment with an engine: see `make engines`. Elsewhere none are collected."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from onelaunch.integrations.sglang import hooks

_HERE = Path(__file__).parent
sys.path.insert(0, str(_HERE))
# Engines, and the module that makes each importable. File names of tests begin with the engine's name, except SGLang's.
_FAKES = {"sglang": "fakes", "vllm": "vllm_fakes", "flashinfer": "flashinfer_fakes"}


def _engine() -> str:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return ""
    return next((name for name in _FAKES if importlib.util.find_spec(name) is not None), "")


def _engine_of(test: Path) -> str:
    return next((name for name in _FAKES if test.name.startswith(f"test_{name}")), "sglang")


engine = _engine()
collect_ignore = sorted(path.name for path in _HERE.glob("test_*.py") if _engine_of(path) != engine)
if engine:
    importlib.import_module(_FAKES[engine]).install()


@pytest.fixture
def detached() -> Iterator[None]:
    """No test leaves a hook in the engine's modules."""
    yield
    for made in {id(made): made for hook in hooks.Hook.made.values() for made, _ in hook.seams}.values():
        made.detach()
    assert not hooks.Hook.made
