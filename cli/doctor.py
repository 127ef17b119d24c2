"""onelaunch doctor: whether a kernel can be built and run here, and what to fix first if not."""

from __future__ import annotations

import dataclasses
import json
import time

import click
from onelaunch.inspect import doctor as check

from .arguments import json_option


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Check tools and cache, then build and run a real kernel.

    It also prints the variables of onelaunch that are set. Exit code 1: there is something to fix.

    \b
    Examples:
      onelaunch doctor
      onelaunch doctor --json
    """
    start = time.perf_counter()
    rows = check.examine()
    first = check.first_to_fix(rows)
    seconds = time.perf_counter() - start
    if as_json:
        facts = {"rows": [dataclasses.asdict(row) for row in rows], "seconds": round(seconds, 2), "ok": first is None}
        click.echo(json.dumps(facts, indent=1))
    else:
        width = max(len(row.name) for row in rows)
        for row in rows:
            click.echo(f"{row.level:4}  {row.name:{width}}  {row.value}  ({row.origin})")
        click.echo(f"{seconds:.1f} s")
        if first is not None:
            click.echo(f"onelaunch: fix this first: {first.name} is {first.value}: {first.origin}", err=True)
    if first is not None:
        raise click.exceptions.Exit(1)
