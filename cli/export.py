"""onelaunch export: a kernel as files that another project takes."""

from __future__ import annotations

from pathlib import Path

import click
import onelaunch
from onelaunch.emit.export import INTERFACES
from onelaunch.emit.export import export as files_of

from .arguments import chosen, config_argument, settings_option, target_option
from .output import write_whole


@click.command()
@config_argument
@settings_option
@target_option
@click.option(
    "--for", "interface", type=click.Choice(INTERFACES), default="tvm-ffi", help="The interface to wrap it for."
)
@click.option("--name", help="Of the files and the function; default: made from CONFIG.")
@click.option(
    "-o", "--output", metavar="FOLDER", type=click.Path(path_type=Path), required=True, help="The folder to write to."
)
def export(
    config: str | None, settings: str | None, target: str | None, interface: str, name: str | None, output: Path
) -> None:
    """Write a kernel for another project: a header, a wrapper and a Python function.

    The project then needs nothing of onelaunch: to build and call them it needs apache-tvm-ffi and a compiler. CONFIG
    is a preset; without it, the default configuration.

    \b
    Examples:
      onelaunch export fa3-decode-3 --for tvm-ffi -o kernels
      onelaunch export --set num_backends=5 --name refresh_draft -o kernels
    """
    found = files_of(
        name or (config or "refresh").replace("-", "_"), chosen(config, settings, target), onelaunch.__version__
    )
    output.mkdir(parents=True, exist_ok=True)
    for file, text in found.items():
        write_whole(output / file, text)
        click.echo(f"wrote {output / file}")
