"""Configuration to source text: the one Jinja environment, and the only place that C++ spellings come from."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from . import layout
from .config import PRESETS, KernelConfig
from .fields import FIELDS

if TYPE_CHECKING:
    import jinja2


@cache
def _environment() -> jinja2.Environment:
    # Imported here: a process that finds its kernel in the cache renders nothing.
    import jinja2

    templates = importlib.resources.files("onelaunch.templates")

    def source(name: str) -> str | None:
        path = templates.joinpath(*name.split("/"))
        return path.read_text(encoding="utf-8") if path.is_file() else None

    return jinja2.Environment(
        loader=jinja2.FunctionLoader(source),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def render(config: KernelConfig) -> str:
    """The emitted CUDA (or, for ``target="cpu"``, C++) of a configuration.

    The text depends on the configuration and the templates alone: no time, no path, no machine.
    """
    return _environment().get_template("metadata.cu.j2").render(_context(config))


def _context(config: KernelConfig) -> dict[str, Any]:
    copies = config.operation == "copy"
    members = layout.members(config)
    wide = "page_indices" in config.fields
    live_tables = bool(config.tables) and config.extent == "live"
    sums = any(FIELDS[name].kind == "cumulative" for name in config.fields)
    return {
        "config": config,
        "symbol": config.symbol,
        "facts": _facts(config),
        "regenerate": _regenerate(config),
        "members": members,
        "column_limits": layout.column_limits(config),
        "copied_lengths": [name for name in config.vectors if FIELDS[name].kind == "lengths"],
        "copied_sums": [name for name in config.vectors if FIELDS[name].kind == "cumulative"],
        "copies": copies,
        "gathers": bool(config.tables) and not copies,
        "wide": wide,
        "pages": "real_page_table" in config.fields and not copies,
        "page_shift": _shift(config.page_size),
        "live_tables": live_tables,
        "scans": not copies and (sums or live_tables),
        "block_sums": not copies and sums,
        "tile_columns": config.warp_size * 4 * config.unroll,
        "vectorized": config.vector_bytes == 16,
        "realigns": config.vector_bytes == 16 and (copies or config.req_to_token_dtype == "int32"),
        "uses_topk": not copies and any(name.startswith("nsa_") for name in config.fields),
        "uses_backends": any(config.destinations(name) == config.num_backends for name in config.fields),
    }


def render_binding(config: KernelConfig, module: str) -> str:
    """The C++ of the Python binding; ``module`` is the import name baked into it."""
    return (
        _environment()
        .get_template("binding.cpp.j2")
        .render(
            symbol=config.symbol,
            module=module,
            param_words=len(layout.param_words(config)),
            call_words=layout.call_words(config),
        )
    )


def render_baseline(
    name: str,
    symbol: str,
    call_words: Sequence[str],
    words: int,
    config: KernelConfig | None = None,
    **facts: Any,
) -> tuple[str, str]:
    """The CUDA and the binding of a kernel that onelaunch is measured against.

    Args:
        name: a template below templates/baselines/.
        symbol: stem of the exported names.
        call_words: names of the parameter words that each call sets.
        words: 64-bit words of its parameter block.
        config: a configuration whose facts and parameter block the template uses.
        facts: what else the template asks for.
    """
    context = {"target": "cuda", **(_context(config) if config else {}), **facts, "symbol": symbol}
    source = _environment().get_template(f"baselines/{name}.cu.j2").render(context)
    return source, render_plain_binding(symbol, call_words, words)


def render_plain_binding(symbol: str, call_words: Sequence[str], words: int) -> str:
    """The binding of a kernel that no configuration describes; its module is named ``<symbol>_binding``."""
    return (
        _environment()
        .get_template("binding.cpp.j2")
        .render(symbol=symbol, module=f"{symbol}_binding", param_words=max(words, 1), call_words=call_words)
    )


def _facts(config: KernelConfig) -> list[tuple[str, str]]:
    facts = []
    for name, value in config.to_dict().items():
        if isinstance(value, dict):
            value = ", ".join(f"{field}: {count}" for field, count in value.items()) or "all"
        elif isinstance(value, list):
            value = ", ".join(value)
        facts.append((name, str(value)))
    return facts


def _regenerate(config: KernelConfig) -> str:
    for name, known in PRESETS.items():
        if known == config:
            return f"onelaunch show {name}"
    return f"onelaunch show --set {config.settings()}"


def _shift(page_size: int) -> int | None:
    """log2 of a power of two, else None."""
    return page_size.bit_length() - 1 if page_size & (page_size - 1) == 0 else None
