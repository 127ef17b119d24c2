"""onelaunch explain: whether a configuration is in the cache, and if not, why."""

from __future__ import annotations

import json

import click
from onelaunch.build import toolchain
from onelaunch.inspect.explain import explain as look_up

from .arguments import arch_option, architectures, chosen, config_argument, json_option, settings_option, target_option


@click.command()
@config_argument
@settings_option
@target_option
@arch_option
@json_option
def explain(config: str | None, settings: str | None, target: str | None, arch: str | None, as_json: bool) -> None:
    """Say whether a configuration is in the cache, and if not, why.

    A miss prints how the nearest build differs. Exit code 1: miss.

    CONFIG is a preset; without it, the default configuration.

    \b
    Examples:
      onelaunch explain nsa-decode-3 --arch 90a
      onelaunch explain --set num_backends=5 --json
    """
    wanted = chosen(config, settings, target)
    archs = () if wanted.target == "cpu" else architectures(arch) or toolchain.current_architectures()
    found = look_up(wanted, archs)
    if as_json:
        facts = {
            "hit": str(found.hit.path) if found.hit else None,
            "key": found.key,
            "nearest": str(found.nearest.path) if found.nearest else None,
            "differs": {what: {"nearest": was, "wanted": wanted} for what, was, wanted in found.differs},
            "failed": found.failed,
            "looked_in": found.looked_in,
            "missing": found.missing,
        }
        click.echo(json.dumps(facts, indent=1))
    else:
        click.echo(str(found))
    if found.hit is None:
        raise click.exceptions.Exit(1)
