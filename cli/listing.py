"""onelaunch list: the presets, and all builds."""

from __future__ import annotations

import json
from typing import Any

import click
from onelaunch.cache.tiers import tiers
from onelaunch.load import loader
from onelaunch.log import short_key
from onelaunch.spec.presets import PRESETS, PURPOSES

from .arguments import json_option
from .cache import listed
from .output import size


@click.command("list")
@json_option
def list_kernels(as_json: bool) -> None:
    """List the presets with their purpose and their builds.

    A build's line has its key, size, date and GPU architectures. Builds are listed from the folders of
    ONELAUNCH_PREBUILT and from the cache.

    \b
    Examples:
      onelaunch list
      onelaunch list --json
    """
    builds = [row for tier in tiers(loader.default_store()) for row in listed(tier)]
    kernels: list[dict[str, Any]] = []
    for name, config in PRESETS.items():
        # The CPU target of a preset is another configuration.
        symbols = config.symbol, config.replace(target="cpu").symbol
        own = [row for row in builds if row["symbol"] in symbols]
        kernels.append({"preset": name, "purpose": PURPOSES[name], "symbol": config.symbol, "builds": own})
    known = [row["key"] for kernel in kernels for row in kernel["builds"]]
    others = [row for row in builds if row["key"] not in known]
    if as_json:
        click.echo(json.dumps({"presets": kernels, "others": others}, indent=1))
        return
    width = max(len(kernel["preset"]) for kernel in kernels)
    for kernel in kernels:
        click.echo(f"{kernel['preset']:{width}}  {kernel['purpose']}")
        for row in kernel["builds"]:
            click.echo(f"{'':{width}}  {row_text(row)}")
    if not builds:
        click.echo("Nothing is built. `onelaunch build PRESET` builds one.", err=True)
    if others:
        click.echo("other builds")
        for row in others:
            click.echo(f"{'':{width}}  {row_text(row)}  {row['symbol']}")


def row_text(row: dict[str, Any]) -> str:
    """One build as a line."""
    archs = "+".join(row["archs"]) or "cpu"
    mark = "  edited by hand" if row["edited"] else ""
    return f"{short_key(row['key'])}  {size(row['bytes']):>8}  {row['built']}  {archs:10}{mark}".rstrip()
