"""Configuration to source text: the one Jinja environment, and the only place that C++ spellings come from."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from ..spec import layout
from ..spec.config import KernelConfig
from ..spec.fields import FIELDS
from ..spec.parts import MAX_SM_PARTS
from ..spec.presets import PRESETS
from ..spec.violations import VIOLATIONS

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

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(source),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["deeper"] = _deeper
    return environment


def _deeper(code: str) -> str:
    """Two more columns of indentation, except for pragmas."""
    return re.sub(r"^(?=[^#\n])", "  ", code, flags=re.MULTILINE)


def render(config: KernelConfig) -> str:
    """The emitted CUDA (or, for ``target="cpu"``, C++) of a configuration.

    The text depends on the configuration and the templates alone: no time, no path, no machine.
    """
    text = _environment().get_template("metadata.cu.j2").render(_context(config))
    return re.sub(r"\n{3,}", "\n\n", text)  # a part that is left out leaves its blank line behind


def _context(config: KernelConfig) -> dict[str, Any]:
    copies = config.operation == "copy"
    members = layout.members(config)
    wide = "page_indices" in config.fields
    variable = config.extend == "variable"
    live = config.live
    # Rows of equal length go by a simple count of tiles, others by windows of requests.
    windows = bool(config.tables) and not copies and not config.equal_rows
    # What the backends' lengths have more than seq_lens, one number for all or one each.
    added = (
        [0]
        if copies
        else [
            offset + (config.next_n if config.mode == "target_verify" else 0)
            for offset in config.seqlen_offsets or (0,)
        ]
    )
    row_vectors = [name for name in config.row_fields if name in config.vectors and not copies]
    uses_kpool = not copies and (config.index_kpool > 1 or any(name.startswith("pooled_") for name in config.fields))
    sums = any(FIELDS[name].kind == "running_sum" for name in config.fields)
    csr = "kv_indices" in config.fields
    pages = bool(config.paged_tables) and not copies
    splits = bool(config.tables) and not copies and not csr and not variable
    # Tiles that a warp takes at once, in large tables and of long requests; 0 where it never takes more than one: with
    # more to write for each word there is enough under way without, and the registers are needed for addresses.
    few_writes = wide and len(added) == 1 and config.destinations("page_indices") * config.next_n <= 3
    fits = config.vector_bytes == 16 and config.unroll <= 2
    wide_tiles = 2 if splits and wide and fits and (few_writes or not windows) else 0
    most_columns = config.tile_columns * (wide_tiles or 1)
    # They may have more pages than a warp has lanes.
    several_pages = most_columns > config.warp_size * config.page_size
    # Registers that hold tokens hold those that begin pages, each the same word of four.
    pages_from_registers = (
        bool(wide_tiles)
        and pages
        and config.req_to_token_dtype == "int32"
        and config.page_size % 4 == 0
        and config.page_size <= 1024
        and _shift(config.page_size) is not None
        and not several_pages
    )
    scheduled = "paged_mqa_schedule_metadata" in config.fields
    schedule_rows = scheduled and config.schedule_per == "row"
    # Which running sums there are, and whether over blocks too. What positions follow from doesn't wrap.
    block_sums = {}
    if not copies and (sums or windows or variable):
        block_sums["std::uint32_t"] = sums or variable or csr
    if config.schedules or csr:
        block_sums["std::uint64_t"] = True
    return {
        "config": config,
        "symbol": config.symbol,
        "facts": _facts(config),
        "regenerate": _regenerate(config),
        "members": members,
        "column_limits": layout.column_limits(config),
        "copied": _copied(config),
        "copies": copies,
        "gathers": bool(config.tables) and not copies,
        "wide": wide,
        "pages": pages,
        "several_pages": several_pages,
        "wide_tiles": wide_tiles,
        # Left to itself, ptxas spills a register of some kernels for blocks that the grid doesn't have.
        "resident_blocks": 1024 // config.threads if (splits or windows) and not csr else 0,
        "pages_from_registers": pages_from_registers,
        "splits": splits,
        "page_shift": _shift(config.page_size),
        "several_rows": not copies and bool(config.row_fields),
        "row_vectors": row_vectors,
        "variable": variable,
        "added": added,
        "pooled": any(name.startswith("pooled_") for name in config.fields) or (scheduled and config.index_kpool > 1),
        "pooled_pages": "pooled_real_page_table" in config.fields,
        "uses_kpool": uses_kpool,
        "fills": config.page_fill is not None,
        "violations": [o for o in VIOLATIONS if o.applies(config)],
        "has_requests_part": not copies
        and bool(config.checked or any(added) or config.row_fields or uses_kpool or schedule_rows),
        "own_lengths": len(added) > 1 and bool(config.vectors),
        "own_schedules": len(added) > 1 and bool(config.schedules),
        "own_ends": len(added) > 1 and live,
        "own_pages": any(config.destinations(name) == config.num_backends for name in config.paged_tables),
        "live": live,
        "windows": windows,
        "scans": bool(block_sums),
        "sum_types": list(block_sums),
        "block_sums": block_sums,
        "counts_lengths": any(name != "kv_indptr" for name in config.vectors),
        "csr": csr,
        "csr_most": "kLongestOffset" if len(added) > 1 else "kLengthOffset" if added[0] else "0",
        "gather": "gather_indices" if csr else "gather_tables",
        "schedule_rows": schedule_rows,
        "max_sm_parts": MAX_SM_PARTS,
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


def _copied(config: KernelConfig) -> list[dict[str, Any]]:
    """The vectors that a copy copies: one group where rows are requests, else those of requests and those of rows."""
    groups: list[dict[str, Any]] = [{"function": "copy_lengths", "limit": "batch_size", "lengths": [], "sums": []}]
    if config.row_fields:
        groups.append({"function": "copy_row_lengths", "limit": "rows", "lengths": [], "sums": []})
    for name in config.vectors:
        group = groups[-1 if name in config.row_fields else 0]
        group["lengths" if FIELDS[name].kind == "vector" else "sums"].append(name)
    return [group for group in groups if group["lengths"] or group["sums"]]


def _facts(config: KernelConfig) -> list[tuple[str, str]]:
    facts = []
    for name, value in config.shown_settings().items():
        if isinstance(value, dict):
            value = ", ".join(f"{field}: {count}" for field, count in value.items()) or "all"
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
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
