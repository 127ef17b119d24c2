"""The targets of onelaunch's speed, and whether a run meets them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .cases import WIDE

Row = Mapping[str, Any]

# No contender that does the whole refresh may be faster by more than both of these.
_SHARE, _US = 0.02, 0.05
_FASTEST = f"no rival faster by over {100 * _SHARE:.0f} % and {_US} us"
# Lower bounds and parts of a refresh aren't rivals. Nor is anything of ours.
_NO_RIVALS = ("ideal", "listed", "empty", "runtime")
# The largest allowed ratio of verified writes to the full refresh, with cold caches, for _OF_VERIFIED backends or more:
# with fewer, what is read counts more.
_OF_VERIFIED = 3
_VERIFIED = {"128x32k": 0.45, "64x130k": 0.35, "16x130k": 0.5, "64x8k": 0.85, "256x4k": 0.85}
_VERIFIED_ELSEWHERE, _MOVED = 1.05, 1.3
# The full refresh of whole tables has at least this share of the ideal's bandwidth.
_FULL_SHARE = 0.85
# A declared table or packed field has look-ups that check where they read, and code that takes any formula.
_DECLARED_US = 0.15
# What 20 declared vectors may add at 64x8k.
_TWENTY_US = 0.3
# The ratio of plan.run to a raw launch, and what the functions that take lists may add to plan.run.
_RUN_RATIO, _LISTS_US = 1.3, 3.0


def verdicts(rows: Sequence[Row], host: Sequence[Row], parts: Sequence[Row] = ()) -> list[dict[str, Any]]:
    """The verdicts on a run: ``item``, ``of`` (the case), ``target``, ``measured``, and whether it ``holds``."""
    by_case: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["status"] == "ok" and not row["series"]:  # a series may repeat a case that is judged
            by_case.setdefault(row["label"], {})[row["implementation"]] = row
    found: list[dict[str, Any]] = []
    for label, case in by_case.items():
        if "onelaunch" in case:
            for item, target, measured, holds in _of_case(case):
                found.append({"item": item, "of": label, "target": target, "measured": measured, "holds": holds})
    for of, target, measured, holds in _of_host(host):
        found.append({"item": "host", "of": of, "target": target, "measured": measured, "holds": holds})
    for row in parts:
        for what, target, measured, holds in _of_part(row):
            of = f"{row['shape']} N={row['backends']}"
            item = f"{row['part']}, {what}"
            found.append({"item": item, "of": of, "target": target, "measured": measured, "holds": holds})
    return found


def _of_case(case: Mapping[str, Row]) -> Iterator[tuple[str, str, str, bool]]:
    ours, ideal = case["onelaunch"], case.get("ideal")
    rivals = [row for name, row in case.items() if name not in _NO_RIVALS and not name.startswith("onelaunch")]
    for caches in ("cold", "warm") if rivals else ():
        took = ours[f"{caches}_us"]
        fastest = min(rivals, key=lambda row: float(row[f"{caches}_us"]))
        theirs = fastest[f"{caches}_us"]
        yield (
            f"fastest, {caches}",
            _FASTEST,
            f"{took:.2f} us; {fastest['implementation']} {theirs:.2f}, {theirs / took:.2f} of ours",
            _no_slower(took, theirs),
        )
    for caches in ("cold", "warm"):
        took = ours[f"{caches}_us"]
        if declared := case.get("onelaunch-declared"):
            theirs = declared[f"{caches}_us"]
            target = f"at most {100 * _SHARE:.0f} % or {_US} us above the same fields built in"
            measured = f"{theirs:.2f} us, built in {took:.2f}"
            yield f"declared, {caches}", target, measured, _no_slower(theirs, took)
        if (more := case.get("onelaunch-20-more")) and ours["shape"] == "64x8k":
            over = more[f"{caches}_us"] - took
            yield f"20 vectors more, {caches}", f"at most {_TWENTY_US} us", f"{over:+.2f} us", over <= _TWENTY_US
    took, about = ours["cold_us"], ours["case"]
    full = about["extent"] == "full"
    if ideal and full:
        share = (ours["bytes"] / took) / (ideal["bytes"] / ideal["cold_us"])
        least = f"at least {100 * _FULL_SHARE:.0f} % of the ideal's bandwidth"
        yield "whole tables", least, f"{100 * share:.0f} %", share >= _FULL_SHARE
    if full or about["width"] < WIDE or about["kind"] != "uniform":
        return
    if verified := case.get("onelaunch-verified"):
        ratio, limit = verified["cold_us"] / took, _VERIFIED_ELSEWHERE
        if about["backends"] >= _OF_VERIFIED:
            limit = _VERIFIED.get(ours["shape"], limit)
        measured = f"{verified['cold_us']:.2f} us, {ratio:.2f} of {took:.2f}"
        yield "verified", f"at most {limit} of the full refresh", measured, ratio <= limit
        if ideal and ideal["cold_us"] > 5:
            floor = ideal["cold_us"]
            holds = verified["cold_us"] < floor
            yield "verified", "below the ideal of all bytes", f"{verified['cold_us']:.2f} us, ideal {floor:.2f}", holds
    if moved := case.get("onelaunch-moved"):
        ratio = moved["cold_us"] / took
        measured = f"{moved['cold_us']:.2f} us, {ratio:.2f} of {took:.2f}"
        yield "verified, all changed", f"at most {_MOVED} of the full refresh", measured, ratio <= _MOVED


def _of_host(host: Sequence[Row]) -> Iterator[tuple[str, str, str, bool]]:
    took = {row["piece"]: row["us"] for row in host if row["us"] is not None}
    run, raw = took.get("plan.run"), took.get("raw")
    if run and raw:
        measured = f"{run:.2f} us, {run / raw:.2f}"
        yield "plan.run", f"at most {_RUN_RATIO} raw launches", measured, run <= _RUN_RATIO * raw
    for name in ("broadcast", "precompute", "copy"):
        if run and name in took:
            over = took[name] - run
            measured = f"{took[name]:.2f} us, {over:+.2f}"
            yield name, f"at most {_LISTS_US:g} us above plan.run", measured, over <= _LISTS_US


def _of_part(row: Row) -> Iterator[tuple[str, str, str, bool]]:
    for caches in ("warm", "cold"):
        times = row[f"{caches}_us"]
        rivals = [times[name] for name in ("engine", "engine-best") if name in times]
        if rivals and "ours" not in times:
            yield caches, _FASTEST, f"ours wasn't measured; {row['reason']}", False
        elif rivals:
            took, theirs = times["ours"], min(rivals)
            measured = f"{took:.2f} us; the engine's {theirs:.2f}, {theirs / took:.2f} of ours"
            yield caches, _FASTEST, measured, _no_slower(took, theirs)
        target = f"at most {100 * _SHARE:.0f} % or {_DECLARED_US} us above the same fields built in"
        if "declared: " in row["reason"]:
            yield f"declared, {caches}", target, f"not measured; {row['reason']}", False
        elif "declared" in times and "ours" in times:
            took, theirs = times["declared"], times["ours"]
            measured = f"{took:.2f} us, built in {theirs:.2f}"
            yield f"declared, {caches}", target, measured, _no_slower(took, theirs, _DECLARED_US)


def _no_slower(took: float, theirs: float, us: float = _US) -> bool:
    return took <= max(theirs * (1 + _SHARE), theirs + us)
