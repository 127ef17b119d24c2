"""The C++ of a kernel's Python binding."""

from __future__ import annotations

from .render import render_binding, render_plain_binding

__all__ = ["render_binding", "render_plain_binding"]
