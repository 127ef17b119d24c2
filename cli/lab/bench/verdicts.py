"""The targets of onelaunch's speed, and whether a run meets them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .cases import WIDE


def verdicts(rows: Sequence[Mapping[str, Any]], host: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The verdicts on a run: ``item``, ``of`` (the case), ``target``, ``measured``, and whether the target ``holds``.

    ``holds`` is None where there is no target.
    """
    out: list[dict[str, Any]] = []

    def say(item: str, of: str, target: str, measured: str, holds: bool | None) -> None:
        out.append({"item": item, "of": of, "target": target, "measured": measured, "holds": holds})

    by_case: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if row["status"] == "ok" and not row["series"]:  # a series may repeat a case that is judged
            by_case.setdefault(row["label"], {})[row["implementation"]] = row
    for label, found in by_case.items():
        ours, ideal = found.get("onelaunch"), found.get("ideal")
        if ours is None:
            continue
        case, took = ours["case"], ours["graph_us"]
        usual = case["backends"] == 3 and case["page_size"] == 64
        wide_live = usual and case["extent"] == "live" and case["width"] >= WIDE
        if ideal and wide_live:
            floor = ideal["graph_us"]
            measured = f"{took:.2f} us, ideal {floor:.2f}, ratio {took / floor:.2f}"
            if "listed" in found:
                listed = found["listed"]["graph_us"]
                measured += f"; tiles listed in advance {listed:.2f}, ratio {listed / floor:.2f}"
            if case["kind"] != "uniform":
                say("2 ragged", label, "at most 1.3 of the ideal", measured, took <= 1.3 * floor)
            elif floor > 5:
                say("2 live", label, "at most 1.15 of the ideal", measured, took <= 1.15 * floor)
            elif floor >= 2:
                say("2 live", label, "at most 1.25 of the ideal", measured, took <= 1.25 * floor)
            else:
                say("2 live", label, "at most 0.5 us above the ideal", measured, took <= floor + 0.5)
        if ideal and usual and case["extent"] == "full":
            share = ours["gbps"] / ideal["gbps"]
            say("3 full", label, "at least 85 % of the ideal's bandwidth", f"{100 * share:.0f} %", share >= 0.85)
        if "runtime" in found:
            theirs = found["runtime"]["graph_us"]
            say(
                "8 runtime arguments",
                label,
                "none",
                f"{theirs:.2f} us, {theirs / took:.2f} of ours",
                None,
            )
        if not (usual and case["extent"] == "live" and case["kind"] == "uniform"):
            continue
        for name, least, where in (
            ("triton", 1.4 if ideal and ideal["graph_us"] > 5 else 2.5, wide_live),
            ("torch-copies-wide", 20.0, wide_live and ours["shape"] == "64x8k"),
            ("torch-copies", 20.0, wide_live and ours["shape"] == "64x8k"),
            ("single-block", 100.0, ours["shape"] == "64x8k" and case["width"] == 8192),
        ):
            if where and name in found:
                times = found[name]["graph_us"] / took
                measured = f"{found[name]['graph_us']:.2f} us, {times:.1f} times"
                say(f"4 {name}", label, f"at least {least:g} times faster", measured, times >= least)
    took_by = {row["piece"]: row["us"] for row in host if row["us"] is not None}
    run, raw = took_by.get("plan.run"), took_by.get("raw")
    if run and raw:
        say("5 host", "plan.run", "at most 1.3 raw launches", f"{run:.2f} us, {run / raw:.2f}", run <= 1.3 * raw)
    for name in ("broadcast", "precompute", "copy"):
        if run and name in took_by:
            over = took_by[name] - run
            say("5 host", name, "at most 4 us above plan.run", f"{took_by[name]:.2f} us, {over:+.2f}", over <= 4)
    return out
