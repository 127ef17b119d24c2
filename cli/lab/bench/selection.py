"""Which cases a run of `onelaunch bench` measures, and which implementations on each."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from onelaunch.errors import ConfigError

from .cases import SHAPES, Case, parse_shape, wide_enough

QUICK_SHAPES = ("1x4k", "64x8k", "128x32k", "256x4k")
# The engine's own way first, what onelaunch offers last: the order of the summary.
QUICK_NAMES = ("sglang", "sglang-best", "triton", "triton-together", "onelaunch", "onelaunch-verified")
# Measured on the quick shapes alone, unless shapes are named.
FEW_NAMES = (
    "listed",
    "empty",
    "onelaunch-declared",
    "onelaunch-20-more",
    "runtime",
    "torch-copies",
    "torch-copies-wide",
    "torch-recompute",
    "torch-compile",
    "single-block",
)
SERIES_NAMES = ("onelaunch", "onelaunch-verified")
SERIES_LENGTHS = (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)
# Shapes of the cases with one long request among short ones.
RAGGED = ("64x2k", "256x2k")
# Batch sizes of the requests that are drawn from a trace.
TRACED = (64, 256)


@dataclass(frozen=True)
class Selected:
    """A case, and the implementations to measure on it. ``series`` is the figure's curve that it belongs to, if any."""

    case: Case
    names: tuple[str, ...]
    series: str = ""


def select(
    names: Sequence[str],
    *,
    shapes: Sequence[str] = (),
    backends: Sequence[int] = (),
    pages: Sequence[int] = (),
    extents: Sequence[str] = (),
    widths: Sequence[str] = (),
    traces: Sequence[str] = (),
    quick: bool = False,
    everything: bool = False,
    series: bool = False,
) -> list[Selected]:
    """The cases of a run, the most important first, since a run may be interrupted.

    Args:
        names: implementations.
        shapes, backends, pages, extents, widths: if any is given, all combinations of them, with defaults for the
            others. A width is "live" (the longest request), "wide" (an engine's table) or a number.
        traces: names of traces, to draw lengths from.
        quick: four shapes, and the implementations that matter most.
        everything: the product of all shapes, 1, 3 and 7 backends, both widths, page sizes and extents, and both
            kinds of lengths.
        series: time against length, the figure's curves, too.

    Raises:
        ConfigError: a shape or a width can't be read, or a number is too small.
    """
    given = shapes or backends or pages or extents or widths
    if everything:
        shapes, backends, pages = shapes or SHAPES, backends or (1, 3, 7), pages or (64, 1)
        extents, widths = extents or ("live", "full"), widths or ("wide", "live")
    elif quick:
        shapes, names = shapes or QUICK_SHAPES, [name for name in names if name in QUICK_NAMES]
    shapes = shapes or SHAPES
    for name, numbers in (("--n", backends), ("--page-size", pages)):
        for number in numbers:
            if number < 1:
                raise ConfigError(f"{name} is {number}; allowed: 1 or more.")
    for extent in extents:
        if extent not in ("live", "full"):
            raise ConfigError(f"--extent is {extent!r}; allowed: 'live', 'full'.")

    def product(
        of: Sequence[str], widths: Sequence[str] = ("wide",), extents: Sequence[str] = ("live",), kind: str = "uniform"
    ) -> Iterable[Case]:
        for n, page, extent, width, shape in itertools.product(backends or (3,), pages or (64,), extents, widths, of):
            batch, length = parse_shape(shape)
            yield Case(batch, length, n, _width(width, length), page, extent, kind)  # type: ignore[arg-type]

    cases = list(product(shapes, widths or ("wide",), extents or ("live",)))
    if everything or not (given or quick):
        cases += product(RAGGED, kind="one-long")
    if not (given or quick or everything):
        cases += product(("64x8k",), ("live",))
        cases += product(("64x8k", "256x4k", "128x32k", "16x130k"), ("live",), ("full",))
        cases += product(("64x8k",), ("wide",), ("full",))
        cases += [case.replace(page_size=1) for case in product(("64x8k",))]
        cases += [case.replace(backends=n) for n in (1, 7) for case in product(("64x8k", "128x32k"))]
    for trace in traces:
        for n in backends or (3,):
            cases += [Case(batch, _width("wide", 1), n, kind=trace) for batch in TRACED]
    # torch.compile takes seconds for each shape, and an empty kernel takes the same time on all.
    few = [Case(batch, length, width=wide_enough(length)) for batch, length in map(parse_shape, QUICK_SHAPES)]

    def names_for(case: Case) -> tuple[str, ...]:
        return tuple(n for n in names if n not in FEW_NAMES or given or everything or case in few)

    selected = [Selected(case, names_for(case)) for case in dict.fromkeys(cases)]
    curves = tuple(name for name in names if name in SERIES_NAMES)
    lines = [Selected(Case(64, length), curves, "length") for length in SERIES_LENGTHS] if series else []
    return selected[: len(shapes)] + lines + selected[len(shapes) :]


def _width(text: str, length: int) -> int:
    if text == "live":
        return length
    if text == "wide":
        return wide_enough(length)
    if not _is_number(text) or int(text) < 1:
        raise ConfigError(f"--width is {text!r}; allowed: 'live', 'wide', or a number of columns.")
    return int(text)


def numbers(option: str, text: str | None) -> list[int]:
    """The whole numbers of a comma list.

    Raises:
        ConfigError: one isn't a number.
    """
    parts = parts_of(text)
    for part in parts:
        if not _is_number(part):
            raise ConfigError(f"{option} is {text!r}; it must be whole numbers, such as 1,3,7.")
    return [int(part) for part in parts]


def parts_of(text: str | None) -> list[str]:
    """The parts of a comma list."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _is_number(text: str) -> bool:
    # str.isdigit() alone accepts characters that int() doesn't, such as "²".
    return text.isascii() and text.isdigit() and len(text) < 10
