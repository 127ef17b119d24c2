"""Configuration to source text. Holds the only Jinja environment; no other module spells C++ types."""

from __future__ import annotations

import importlib.resources
import re
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from ..spec import layout
from ..spec.config import KernelConfig
from ..spec.cpp import cpp, user_name
from ..spec.declarations import written
from ..spec.expressions import Number
from ..spec.parts import MAX_SM_PARTS
from ..spec.presets import PRESETS
from ..spec.vectors import (
    count_dtype,
    described,
    element,
    functions_of,
    live_count,
    locals_of,
    value_locals,
    value_varies,
)
from ..spec.violations import violations_of
from .binding import render_plain_binding

if TYPE_CHECKING:
    import jinja2

# By field, the function that computes it in blocks of its own, and how many these are.
_SCHEDULERS = {
    "paged_mqa_schedule_metadata": ("schedule_mqa", "kLengthSets"),
    "flashmla_metadata": ("schedule_flashmla", "kLengthSets"),
    "num_kv_splits": ("count_kv_splits", "1"),
}
_TYPES = {"int32": "std::int32_t", "int64": "std::int64_t", "bool": "bool"}
_MEMBER_TYPES = {
    "int64": "std::int64_t ",
    "lengths": "const SeqLen* ",
    "extends": "const ExtendLen* ",
    "pool": "const PoolIndex* ",
    "token": "const Token* ",
    "to_int32": "std::int32_t* ",
    "to_int64": "std::int64_t* ",
    "to_bool": "bool* ",
    "table": "Table ",
    "violation": "Violation* ",
    "hashes": "std::uint64_t* ",
    **{f"from_{dtype}": f"const std::{dtype}_t* " for dtype in ("int32", "int64")},
    **{f"source_{dtype}": f"Source<std::{dtype}_t> " for dtype in ("int32", "int64")},
    **{f"map_{dtype}": f"Map<std::{dtype}_t> " for dtype in ("int32", "int64")},
    **{f"strided_{dtype}": f"Strided<{each}> " for dtype, each in _TYPES.items()},
}


def _read(name: str) -> str | None:
    path = importlib.resources.files("onelaunch.templates").joinpath(*name.split("/"))
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _device(name: str) -> str:
    """The text of device/<name>.cuh, emitted as it is."""
    text = _read(f"device/{name}.cuh")
    if text is None:
        raise LookupError(f"the templates have no device/{name}.cuh.")
    return text.rstrip("\n")


# A declaration declares the first name before a parenthesis, a brace or an equals sign.
_DECLARED = re.compile(r"^(?!//).*?(\w+) ?[({=]", re.MULTILINE)


def _needed(declarations: str, rest: str, between: str = "\n\n") -> str:
    """The declarations that the rest of a text names, and those that these need, in order.

    Args:
        declarations: constants, types and functions, each of which names only earlier ones.
        rest: the text that follows them.
        between: what ends each.
    """
    named = set(_names(rest))
    kept: list[str] = []
    for declaration in reversed(declarations.strip("\n").split(between)):
        found = _DECLARED.search(declaration)
        if found and found[1] in named:
            kept.append(declaration)
            named.update(_names(declaration))
    return "".join(declaration + between for declaration in reversed(kept))


def _names(text: str) -> list[str]:
    """The names in C++, without those in comments."""
    return re.findall(r"\w+", re.sub(r"//.*", "", text))


@cache
def _environment() -> jinja2.Environment:
    # Imported here: a process that finds its kernel in the cache renders nothing.
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["needed"] = _needed
    environment.globals |= {
        "device": _device,
        "locals_of": locals_of,
        "element": element,
        "live_count": live_count,
        "computed_field": _computed_field,
    }
    return environment


def render(config: KernelConfig) -> str:
    """The emitted CUDA (or, for ``target="cpu"``, C++) of a configuration.

    The text depends only on the configuration and the templates, not on time, paths or the machine.
    """
    return _environment().get_template("kernel.cu.j2").render(_context(config))


def render_template(name: str, values: dict[str, Any]) -> str:
    """A template that isn't a kernel's."""
    return _environment().get_template(name).render(values)


def _context(config: KernelConfig) -> dict[str, Any]:
    files = device_files(config)
    return {
        "config": config,
        "target": config.target,
        "symbol": config.symbol,
        "banner": _banner(config),
        "regenerate": _regenerate(config),
        "files": files,
        "writers": _writers(config),
        "roles": _roles(config),
        "computes": "computed" in _writers(config),
        "length_offsets": _wrapped(config.length_offsets),
        "request_values": _request_values(config),
        "members": layout.members(config),
        "member_types": _MEMBER_TYPES,
        "violations": {v.constant: v.number for v in violations_of(config)},
        "max_sm_parts": MAX_SM_PARTS,
        "user_name": user_name,
        "number": lambda value: cpp(Number(value), "int64" if abs(value) >= 2**31 else "int32"),
    }


def device_files(config: KernelConfig) -> list[str]:
    """The files of templates/device/ that a configuration's kernel has, without their suffix, in order."""
    strategy, copies = config.strategy, config.copies
    rows = bool(config.tables) and strategy != "indices"  # tables that have rows
    tokens, pages = copies or config.token_table is not None, not copies and bool(config.paged_tables)
    # It counts the tiles, or parts, of requests of different lengths.
    counts = strategy in ("live", "variable", "indices") or (not copies and bool(config.computed))
    computes = not copies and bool(config.vectors or config.schedules or config.computed)
    splits = "num_kv_splits" in config.fields
    vectorized = config.vector_bytes == 16
    ends = "live_ends" if config.live else "full_ends"
    verified = config.hashes_tiles
    # Tables are written element by element, too: at the ends of rows, and pages everywhere.
    words = config.packed is not None or pages or (rows and tokens)
    counts_of = "backend_counts" if config.live and config.lengths_differ else "one_count"
    wanted = {
        "running_sum": counts or config.variable_rows or (computes and bool(config.sums or config.schedules)),
        "destinations": True,
        "audit" if config.audits else "put": bool(config.vectors or config.schedules or config.computed or words),
        "store": bool(config.vectors or config.schedules),
        "store_once": splits or any(config.once(name) for name in config.vectors),
        "strided": bool(config.strided),
        "floor_div": pages or config.has_mqa_schedule or "floor_div" in functions_of(config),
        "floor_mod": "floor_mod" in functions_of(config),
        "ceil_div": splits or "ceil_div" in functions_of(config),
        "wrapping": computes,
        "expanded_length": config.has_mqa_schedule,
        "mqa_schedule": config.has_mqa_schedule,
        "flashmla_schedule": "flashmla_metadata" in config.fields,
        "kv_splits": splits,
        "same_end": rows and not (config.live and config.lengths_differ),
        "opaque": bool(config.packed or config.look_ups) or (rows and tokens),
        "look_up": bool(config.look_ups),
        "tile": rows and tokens,
        "realign": rows and tokens and vectorized and config.req_to_token_dtype == "int32",
        "aligned_tile" if vectorized else "unaligned_tile": rows and tokens and not verified,
        "backend_ends" if config.live and config.lengths_differ else ends: rows and not copies,
        "pages": pages,
        "tile_hash": verified,
        counts_of: verified,
        "verified_tile": verified and tokens,
        "token_columns": rows and tokens and not copies,
        "token_pages": tokens and pages,
        "lone_pages": rows and not tokens,
        _copy_tile_file(config): rows and not copies,
        "warp_sum": strategy == "indices" or (not copies and bool(config.computed)),
        "window": counts,
        "copy_table": rows and copies,
        str(strategy): strategy not in (None, "copy"),
    }
    return [name for name, there in wanted.items() if there]


def _copy_tile_file(config: KernelConfig) -> str:
    """The file with copy_tile(), which writes a tile of all tables."""
    pages = bool(config.paged_tables)
    if config.pages_alone:
        return "verified_pages" if config.hashes_tiles else "every_page"
    if config.hashes_tiles:
        return "verified_tokens_and_pages" if pages else "verified_tokens"
    if not pages:
        return "tokens"
    return "held_pages" if config.holds_page_tokens else "tokens_and_pages"


def _writers(config: KernelConfig) -> list[str]:
    """The templates that emit the code of a list of fields."""
    if config.copies:
        return ["copy"]
    return ["vectors"] * bool(config.vectors) + ["computed"] * bool(config.computed)


def _roles(config: KernelConfig) -> list[tuple[str, str]]:
    """The functions that the first blocks run, before those that write tables, and how many blocks run each."""
    if config.copies:
        return []
    roles = [_SCHEDULERS[name] for name in config.schedules]
    return roles + [("refresh_vectors", "kLengthSets")] * bool(config.vectors)


@dataclass(frozen=True)
class _Named:
    """A local constant by which formulas name a value of a request.

    Attributes:
        type: its type.
        name: its name.
        read: how it is read from an input; "" if it follows from others.
        absent: its value where there is no request.
        value: how it follows from others.
        used: whether every kernel with it uses it.
    """

    type: str
    name: str
    read: str = ""
    absent: str = "0"
    value: str = ""
    used: bool = False

    @property
    def declared(self) -> str:
        """What stands before its value where it is declared."""
        return f"{'' if self.used else '[[maybe_unused]] '}const {self.type} {self.name}"


def _request_values(config: KernelConfig) -> list[_Named]:
    """The values of a request that formulas name, each after those that it follows from."""
    found = [_Named("std::int32_t", "base_len", "request_length(p, request)", used=True)]
    for each, dtype in config.inputs:
        name, read = user_name(each), f"{user_name(each)}_of(p, request)"
        if dtype == "int64":
            found.append(_Named("std::int64_t", f"{name}_int64", read))
            found.append(_Named("std::int32_t", name, value=f"static_cast<std::int32_t>({name}_int64)"))
        else:
            found.append(_Named("std::int32_t", name, read))
    if config.look_ups and config.reads_rows:
        found.append(_Named("std::int64_t", "pool_row", "request_row(p, request)", "-1"))
    if config.row_vectors or config.names_rows:
        read, value = ("request_rows(p, request)", "") if config.variable_rows else ("", "kNextN")
        found.append(_Named("int", "rows", read, value=value))
    return found


def _computed_field(config: KernelConfig, name: str) -> dict[str, Any]:
    """What the emitted text says of a declared table or packed field."""
    field, member, once = config.field(name), config.member(name), config.once(name)
    packed = field.kind == "packed"
    apart = not once and value_varies(config, name)
    of_rows = name in config.row_fields
    # A packed field that reads req_to_token seldom has more elements than that has columns. Its capacity, often that of
    # the greatest batch, would give small batches more blocks than they need.
    capacity = f"pieces_of(p.{member}_capacity) + p.batch_size"
    most = f"smaller(read, {capacity})" if config.reads_tokens else f"({capacity})"
    if not packed:
        most = f"p.batch_size * {'kNextN * ' * of_rows}pieces_of(p.{member}_width)"
    return {
        "described": "\n//   ".join(textwrap.wrap(f"{name}: {described(config, name)}", 112, break_long_words=False)),
        "packed": packed,
        "fill": None if packed else getattr(field.declaration, "fill", None),
        "count_type": f"std::{count_dtype(config, name)}_t",
        "locals": value_locals(config, name),
        "rows_each": "kNextN" if of_rows else 1,
        "sets": 1 if once else "kLengthSets",
        "apart": apart,
        "capacity": f"{member}_{'capacity' if packed else 'width'}",
        "most_pieces": "kLengthSets * " * apart + most,
    }


def render_baseline(
    name: str,
    symbol: str,
    call_words: Sequence[str],
    words: int,
    config: KernelConfig | None = None,
    plan_words: Sequence[str] = (),
    **facts: Any,
) -> tuple[str, str]:
    """The CUDA and the binding of a kernel that onelaunch is measured against.

    Args:
        name: a template below templates/baselines/.
        symbol: stem of the exported names.
        call_words: names of the parameter words that each call sets.
        words: 64-bit words of its parameter block.
        config: a configuration whose settings and parameter block the template uses.
        plan_words: names of 64-bit words that the template adds at the end of that block.
        facts: further variables of the template.
    """
    context = {"target": "cuda", **(_context(config) if config else {}), **facts, "symbol": symbol}
    if config:
        more = [layout.Member(word, "int64", None, False, "of this baseline") for word in plan_words]
        context["members"] = [*context["members"], *more]
    source = _environment().get_template(f"baselines/{name}.cu.j2").render(context)
    return source, render_plain_binding(symbol, call_words, words)


def _wrapped(numbers: Sequence[int]) -> str:
    """The elements of an array in C++, in lines of their own if they are many."""
    text = ", ".join(map(str, numbers))
    return text if len(numbers) <= 16 else "\n" + textwrap.indent(textwrap.fill(text, 100), " " * 6)


def _banner(config: KernelConfig) -> list[tuple[str, str]]:
    """The settings as (name, text) pairs for the banner."""
    shown = []
    for name, value in config.shown_settings().items():
        if name == "declare":
            value = "; ".join(f"{field} = {written(declaration)}" for field, declaration in config.declare)
        elif isinstance(value, dict):
            value = ", ".join(f"{field}: {count}" for field, count in value.items()) or "all"
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        shown.append((name, str(value)))
    return shown


def _regenerate(config: KernelConfig) -> str:
    for name, known in PRESETS.items():
        if known == config:
            return f"onelaunch show {name}"
    return f"onelaunch show --set {shlex.quote(config.settings())}"
