"""A kernel, or the difference of two, as one HTML page that needs no network."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup

from ..errors import ArgumentError
from . import machine_code, occupancy
from .diff import comparable
from .kernels import Subject

# The line that machine_code writes before the instructions of a source line.
_ANNOTATION = re.compile(r"\s*// (\d+): ")
# It writes this line before instructions that come from a header of the toolkit.
_HEADER = re.compile(r"\s*// \S+:\d+$")
_INSTRUCTION = {
    "sass": re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)"),
    "ptx": re.compile(r"\s+(?:@!?%p\d+\s+)?([a-z][a-z0-9]*)[.\s;]"),
}


def kernel_page(kernel: Subject) -> str:
    """CUDA, SASS and PTX side by side, of the first architecture. Lines from one source line are highlighted together.

    Raises:
        ArgumentError: the kernel is for the CPU, which has no machine code to show.
        ToolchainError: a program that disassembles is missing.
    """
    if not kernel.on_gpu:
        raise ArgumentError(f"{kernel.name} is built for the CPU; a page shows SASS and PTX. Choose its CUDA target.")
    arch = kernel.archs[0]
    used = machine_code.resources(kernel)[arch]
    sass, ptx = (_with_source_lines(text(kernel, True)) for text in (machine_code.sass, machine_code.ptx))
    facts: dict[str, object] = {"architecture": f"sm_{arch}", "registers": used["registers"]}
    facts |= {"shared memory": f"{used['shared_bytes']} bytes", "stack": f"{used['stack_bytes']} bytes"}
    facts |= {"spilled": f"{used['spill_bytes']} bytes"}
    if kernel.config is not None:
        threads = kernel.config.threads
        share = occupancy.of(arch, threads, used["registers"], used["shared_bytes"])
        facts["occupancy"] = f"{share:.0%} of a multiprocessor's warps, with {threads} threads per block"
    counted = Counter(found[1] for line, _ in sass if (found := _INSTRUCTION["sass"].match(line)))
    facts["SASS instructions"] = counted.total()
    facts["PTX instructions"] = sum(bool(_INSTRUCTION["ptx"].match(line)) for line, _ in ptx)
    return _render(
        "kernel",
        title=f"{kernel.name} on sm_{arch}",
        facts=facts.items(),
        settings=_settings(kernel),
        instructions=counted.most_common(),
        panes=[
            {"id": "source", "title": "CUDA", "share": 5, "lines": list(_source(kernel.source))},
            {"id": "sass", "title": "SASS", "share": 4, "lines": list(_code(sass))},
            {"id": "ptx", "title": "PTX", "share": 3, "lines": list(_code(ptx))},
        ],
    )


def diff_page(one: Subject, other: Subject, what: str, context: int = 3) -> str:
    """The differences of two kernels, side by side, with ``context`` equal lines around each. See diff.difference."""
    before, after = (comparable(kernel, what).splitlines() for kernel in (one, other))
    table = difflib.HtmlDiff(wrapcolumn=None).make_table(before, after, one.name, other.name, True, context)
    # HtmlDiff doesn't mark the columns of line numbers, which are narrower than the others.
    table = re.sub(r"(<colgroup></colgroup>\s*){6}", '<col class="number"><col><col class="number"><col>', table)
    table = re.sub(r'<td class="diff_next"[^>]*>.*?</td>|<th class="diff_next"><br /></th>', "", table)
    table = table.replace(' nowrap="nowrap"', "")
    lines = list(difflib.ndiff(before, after))
    return _render(
        "diff",
        title=f"{one.name} and {other.name} ({what})",
        table=table,
        added=sum(line.startswith("+ ") for line in lines),
        removed=sum(line.startswith("- ") for line in lines),
    )


@cache
def _templates() -> jinja2.Environment:
    loader = jinja2.PackageLoader("onelaunch.templates", "html")
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)


def _render(name: str, **values: Any) -> str:
    style = Markup(_templates().get_template("style.css").render())
    if "table" in values:
        values["table"] = Markup(values["table"])
    return _templates().get_template(f"{name}.html.j2").render(style=style, **values)


def _settings(kernel: Subject) -> Iterator[tuple[str, object]]:
    for name, value in (kernel.config.to_dict() if kernel.config is not None else {}).items():
        yield name, ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def _with_source_lines(text: str) -> list[tuple[str, int]]:
    """The lines of machine code, each with the number of its source line, or 0 if it has none."""
    lines, source = [], 0
    for line in text.splitlines():
        if at := _ANNOTATION.match(line):
            source = int(at[1])
        elif _HEADER.match(line):
            source = 0
        else:
            instruction = any(pattern.match(line) for pattern in _INSTRUCTION.values())
            lines.append((line, source if instruction else 0))
    return lines


def _source(text: str) -> Iterator[dict[str, object]]:
    for number, line in enumerate(text.splitlines(), 1):
        code, mark, comment = line.partition("//")
        yield {"number": number, "source": number, "code": code or ("" if mark else " "), "comment": mark + comment}


def _code(lines: list[tuple[str, int]]) -> Iterator[dict[str, object]]:
    for line, source in lines:
        yield {"source": source, "code": re.sub(r"\s*/\* 0x[0-9a-f]+ \*/\s*$", "", line).expandtabs(8) or " "}
