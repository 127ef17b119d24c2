"""What a kernel is, seen from outside."""

from __future__ import annotations

import hashlib

from .config import KernelConfig
from .render import render


def fingerprint(config: KernelConfig) -> str:
    """sha256 (hex) of the emitted source: what evidence of a run on a GPU is filed under."""
    return hashlib.sha256(render(config).encode()).hexdigest()
