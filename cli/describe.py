"""onelaunch describe: a configuration's fields, and what a refresh of them costs."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from .common import Config, Json, Settings, Target, kernel, sentence, size


def describe(
    config: Config = None,
    settings: Settings = None,
    batch: Annotated[int, typer.Option(min=1, help="Requests.")] = 64,
    length: Annotated[int, typer.Option(min=0, help="Tokens of each request.")] = 8192,
    width: Annotated[
        int | None, typer.Option(min=0, help="Columns of the tables; default: the longest length, offsets included.")
    ] = None,
    rows: Annotated[
        int, typer.Option(min=0, help="Rows of each request, where a call says how many (variable extends, copies).")
    ] = 1,
    page_size: Annotated[int, typer.Option(min=1, help="Tokens a page of what a copy copies.")] = 64,
    num_sms: Annotated[
        int | None, typer.Option(min=1, help="Multiprocessors that schedules are for; default: an H100's.")
    ] = None,
    target: Target = None,
    as_json: Json = False,
) -> None:
    """Print a kernel's fields with shapes, formulas and the bytes that a refresh writes, and an estimate of its time.

    The estimate is the bytes at the rate of a large refresh, and a floor, both measured on one device inside a CUDA
    graph. It is no measurement: see `onelaunch replay` for one.

    \b
    Examples:
      onelaunch describe nsa-decode-3
      onelaunch describe --set num_backends=7,page_size=16 --batch 128 --length 32768
      onelaunch describe nsa-decode-3 --batch 1 --length 4096 --json
    """

    def run() -> Any:
        from onelaunch.errors import ArgumentError
        from onelaunch.inspect.traffic import traffic

        found = kernel(config, settings, target, None)
        if found.config is None:
            raise ArgumentError(f"{found.name} doesn't say which configuration it is for; name a preset.")
        return found, traffic(
            found.config, [length] * batch, width, rows=[rows] * batch, page_size=page_size, num_sms=num_sms
        )

    found, moved = sentence(run)
    facts = _facts(found, moved, batch, length)
    typer.echo(json.dumps(facts, indent=1) if as_json else _text(facts))


def _facts(found: Any, moved: Any, batch: int, length: int) -> dict[str, Any]:
    from onelaunch.inspect.traffic import H100
    from onelaunch.spec.fields import FIELDS

    return {
        "name": found.name,
        "symbol": found.symbol,
        "edited": str(found.edited) if found.edited else None,
        "configuration": found.config.to_dict(),
        "batch": batch,
        "length": length,
        "width": moved.width,
        "rows": moved.rows,
        "fields": [
            {
                "name": each.field,
                "shape": FIELDS[each.field].shape_in(found.config.mode),
                "formula": FIELDS[each.field].formula if found.config.operation != "copy" else "copied",
                "written": [round(count, 1) for count in each.shape],
                "tensors": each.tensors,
                "bytes": each.bytes,
            }
            for each in moved.written
        ],
        "bytes_read": moved.bytes_read,
        "bytes_written": moved.bytes_written,
        "estimate": {"microseconds": round(moved.microseconds(), 2), "device": H100.name},
    }


def _text(facts: dict[str, Any]) -> str:
    config = facts["configuration"]
    rows = [("field", "shape", "formula", "written", "tensors", "bytes")]
    for each in facts["fields"]:
        written = " x ".join(f"{count:g}" for count in each["written"])
        shape, formula = each["shape"], each["formula"]
        rows.append((each["name"], shape, formula, written, str(each["tensors"]), f"{each['bytes']:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{facts['name']}: {facts['symbol']}",
        f"{config['operation']}, {config['mode']}, {config['num_backends']} backends, extent {config['extent']}, "
        f"T = {config['index_topk']}, P = {config['page_size']}, target {config['target']}",
        f"{facts['batch']} requests of s = {facts['length']} tokens, "
        + (f"R = {facts['rows']} rows, " if config["mode"] != "decode" else "")
        + f"tables W = {facts['width']} columns wide",
        "",
    ]
    for row in rows:
        cells = [cell.rjust(w) if i > 3 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines += [
        "",
        f"reads {size(facts['bytes_read'])}, writes {size(facts['bytes_written'])}, in one launch",
        f"about {facts['estimate']['microseconds']:.1f} us on an {facts['estimate']['device']} inside a CUDA graph "
        "(an estimate, from what was measured there)",
    ]
    return "\n".join(lines)
