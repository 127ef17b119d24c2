"""The tests of this folder run in an environment with an engine in it: see `make engines`. Elsewhere there are none."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

_HERE = Path(__file__).parent
sys.path.insert(0, str(_HERE))


def _engine() -> str:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return ""
    return next((name for name in ("sglang", "vllm") if importlib.util.find_spec(name) is not None), "")


engine = _engine()
_vllm = {path.name for path in _HERE.glob("test_vllm*.py")}
_sglang = {path.name for path in _HERE.glob("test_*.py")} - _vllm
collect_ignore = sorted((_sglang if engine != "sglang" else set()) | (_vllm if engine != "vllm" else set()))
if engine == "sglang":
    import fakes

    fakes.install()
elif engine == "vllm":
    import vllm_fakes

    vllm_fakes.install()
