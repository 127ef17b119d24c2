"""The C++ of a kernel's Python binding: a few macros, then templates/binding.cpp with the files that it includes."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Sequence
from functools import cache

from ..spec import layout
from ..spec.config import KernelConfig


@cache
def _text() -> str:
    folder = importlib.resources.files("onelaunch.templates")

    def included(line: re.Match[str]) -> str:
        return folder.joinpath("binding", line[1]).read_text(encoding="utf-8").rstrip("\n")

    text = folder.joinpath("binding.cpp").read_text(encoding="utf-8")
    return re.sub(r'^#include "binding/(\w+\.h)"$', included, text, flags=re.MULTILINE)


def module_name(symbol: str) -> str:
    """The import name of a kernel's binding; ``symbol`` is the stem of the kernel's exported names."""
    return f"{symbol}_binding"


def render_binding(config: KernelConfig, module: str) -> str:
    """The binding of a configuration's kernel; ``module`` is the import name that is compiled into it."""
    return _binding(config.symbol, module, layout.call_words(config), len(layout.param_words(config)))


def render_plain_binding(symbol: str, call_words: Sequence[str], words: int) -> str:
    """The binding of a kernel without a configuration; its module is named ``<symbol>_binding``.

    Args:
        symbol: stem of the exported names.
        call_words: names of the parameter words that each call sets.
        words: 64-bit words of its parameter block.
    """
    return _binding(symbol, module_name(symbol), call_words, max(words, 1))


def _binding(symbol: str, module: str, call_words: Sequence[str], words: int) -> str:
    return f"""\
// Emitted by onelaunch from templates/binding.cpp. Do not edit.
#define ONELAUNCH_SYMBOL {symbol}
#define ONELAUNCH_MODULE {module}
#define ONELAUNCH_PLAN_WORDS {words}
#define ONELAUNCH_CALL_WORDS {len(call_words)}
#define ONELAUNCH_CALL_NAMES "{"".join(f"{word}, " for word in call_words)}"

{_text()}"""
