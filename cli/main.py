"""The onelaunch command: its verbs, and how errors and exit codes look."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from . import cache
from .bench import bench
from .build import build, explain
from .common import chosen, sentence
from .doctor import doctor
from .replay import replay
from .tune import tune

app = typer.Typer(
    name="onelaunch",
    help="Generate, build and replay kernels that refresh N backends' attention metadata in one launch.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=True,
)
app.command()(replay)
app.command()(build)
app.command()(explain)
app.command()(doctor)
app.command()(bench)
app.command()(tune)
app.add_typer(cache.app, name="cache")

Settings = Annotated[
    str | None,
    typer.Option("--set", help="Facts as key=value,…; over the preset if one is named. Fields are joined by +."),
]


def _version(wanted: bool) -> None:
    if wanted:
        from onelaunch import __version__

        typer.echo(f"onelaunch {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def show(
    config: Annotated[str | None, typer.Argument(help="A preset; without one, the defaults.")] = None,
    settings: Settings = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write to this file.")] = None,
) -> None:
    """Print the emitted CUDA of a configuration.

    Examples: onelaunch show nsa-decode-3; onelaunch show --set num_backends=5,page_size=16
    """
    from onelaunch.render import render

    source = sentence(lambda: render(chosen(config, settings)))
    if output is not None:
        target = output
        sentence(lambda: target.write_text(source, encoding="utf-8"))
    elif sys.stdout.isatty():
        from rich.console import Console
        from rich.syntax import Syntax

        Console().print(Syntax(source, "cuda", background_color="default"))
    else:
        sys.stdout.write(source)


@app.command()
def generate(
    folder: Annotated[Path, typer.Option(help="Where the emitted CUDA is kept.")] = Path("generated"),
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if a file isn't up to date.")] = False,
) -> None:
    """Write the emitted CUDA of every preset, or check that what is there is up to date.

    Examples: onelaunch generate; onelaunch generate --check
    """
    from .generate import check_folder, write_folder

    if check:
        difference = sentence(lambda: check_folder(folder))
        if difference:
            typer.echo(difference, nl=False)
            typer.echo(f"onelaunch: {folder} isn't what the templates emit. Run: onelaunch generate", err=True)
            raise typer.Exit(1)
        typer.echo(f"{folder} is up to date")
        return
    for path in sentence(lambda: write_folder(folder)):
        typer.echo(f"wrote {path}")


if __name__ == "__main__":
    app()
