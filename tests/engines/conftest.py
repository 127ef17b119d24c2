"""The tests of this folder run in an environment with an engine in it: see `make engines`. Elsewhere there are none."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("sglang") is not None:
    import fakes

    fakes.install()
else:
    collect_ignore_glob = ["test_*.py"]
