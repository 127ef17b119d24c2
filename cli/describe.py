"""onelaunch describe: a configuration's fields, and the bytes that a refresh of them moves."""

from __future__ import annotations

import json
from typing import Any

import click
from onelaunch.errors import ArgumentError
from onelaunch.inspect.traffic import Traffic, traffic
from onelaunch.spec.config import KernelConfig
from onelaunch.spec.vectors import described

from .arguments import config_argument, json_option, settings_option, target_option
from .output import size
from .show import kernel


@click.command()
@config_argument
@settings_option
@click.option("--batch", type=click.IntRange(1, 2**20), default=64, help="Requests.")
@click.option("--length", type=click.IntRange(0, 2**31 - 1), default=8192, help="Tokens of each request.")
@click.option(
    "--width",
    type=click.IntRange(0, 2**31 - 1),
    help="Columns of the tables; default: the longest length, offsets included.",
)
@click.option(
    "--rows",
    type=click.IntRange(0, 2**20),
    default=1,
    help="Rows of each request, if calls give the number (variable extends, copies).",
)
@click.option("--page-size", type=click.IntRange(min=1), default=64, help="Tokens per page, for copies.")
@click.option("--num-sms", type=click.IntRange(min=1), help="SMs that schedules are for; default: an H100's.")
@target_option
@json_option
def describe(
    config: str | None,
    settings: str | None,
    batch: int,
    length: int,
    width: int | None,
    rows: int,
    page_size: int,
    num_sms: int | None,
    target: str | None,
    as_json: bool,
) -> None:
    """Print a kernel's fields with shapes, formulas and the bytes that a refresh writes.

    CONFIG is as in `onelaunch show`.

    \b
    Examples:
      onelaunch describe nsa-decode-3
      onelaunch describe --set num_backends=7 --batch 128 --length 32768
      onelaunch describe nsa-decode-3 --batch 1 --length 4096 --json
    """
    found = kernel(config, settings, target, None)
    if found.config is None:
        raise ArgumentError(f"{found.name} doesn't say which configuration it is for; name a preset.")
    moved = traffic(found.config, [length] * batch, width, rows=[rows] * batch, page_size=page_size, num_sms=num_sms)
    edited = str(found.edited) if found.edited else None
    facts = {
        "name": found.name,
        "symbol": found.symbol,
        "edited": edited,
        "configuration": found.config.to_dict(),
        "batch": batch,
        "length": length,
        **_moved(found.config, moved),
    }
    click.echo(json.dumps(facts, indent=1) if as_json else _text(facts))


def _moved(config: KernelConfig, moved: Traffic) -> dict[str, Any]:
    return {
        "width": moved.width,
        "rows": moved.rows,
        "fields": [
            {
                "name": each.field,
                "shape": config.field(each.field).shape_in(config.mode),
                "formula": described(config, each.field) if config.operation != "copy" else "copied",
                "written": [round(count, 1) for count in each.shape],
                "tensors": each.tensors,
                "bytes": each.bytes,
            }
            for each in moved.written
        ],
        "bytes_read": moved.bytes_read,
        "bytes_written": moved.bytes_written,
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
        f"index_topk {config['index_topk']}, page_size {config['page_size']}, target {config['target']}",
        f"{facts['batch']} requests of {facts['length']} tokens, "
        + (f"R = {facts['rows']} rows, " if config["mode"] != "decode" else "")
        + f"tables W = {facts['width']} columns wide",
        "",
    ]
    for row in rows:
        cells = [cell.rjust(w) if i > 3 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    does = "compares" if config["writes"] == "audit" else "writes"
    lines += ["", f"reads {size(facts['bytes_read'])}, {does} {size(facts['bytes_written'])}, in one launch"]
    return "\n".join(lines)
