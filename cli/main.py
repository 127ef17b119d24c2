"""The onelaunch command: its verbs, and how errors and exit codes look."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import cache
from .build import build, explain
from .common import EXIT_CODES, Verbs, sentence, write_commands
from .describe import describe
from .doctor import doctor
from .lab.bench import bench
from .lab.replay import replay
from .listing import list_kernels
from .show import diff, show

HELP = """Generate, build, inspect and replay kernels that refresh N backends' attention metadata in one launch.

\b
Examples:
  onelaunch list
  onelaunch show nsa-decode-3
  onelaunch build nsa-decode-3 --arch 90a
"""

app = typer.Typer(
    name="onelaunch",
    cls=Verbs,
    help=HELP,
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=True,
)
app.command("list")(list_kernels)
app.command()(show)
app.command()(describe)
app.command()(diff)
app.command()(build)
app.command()(explain)
app.command()(replay)
app.command()(doctor)
app.command()(bench)
app.add_typer(cache.app, name="cache")


def _version(wanted: bool) -> None:
    if not wanted:
        return
    import platform
    from importlib import metadata

    from onelaunch import __version__
    from onelaunch.build import toolchain

    typer.echo(f"onelaunch {__version__}")
    rows = [("python", platform.python_version(), ""), ("torch", metadata.version("torch"), "")]
    for tool, value, origin in [*rows, *toolchain.describe()]:
        reason = origin.splitlines()[0] if value == toolchain.NOT_USABLE else ""
        typer.echo(f"{tool:23}  {value}{f': {reason}' if reason else ''}")
    raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version, and those of the toolchain."
        ),
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error comes from; may stand anywhere.")
    ] = False,
) -> None:
    pass


@app.command()
def generate(
    folder: Annotated[Path, typer.Option(help="Where the emitted CUDA is kept.")] = Path("generated"),
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if a file isn't up to date.")] = False,
    clangd: Annotated[
        bool, typer.Option("--clangd", help="Also write a compile_commands.json there, for editors.")
    ] = False,
) -> None:
    """Write the emitted CUDA of every preset, or check that what is there is up to date.

    \b
    Examples:
      onelaunch generate
      onelaunch generate --check
      onelaunch generate --folder emitted --clangd
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
    if clangd:
        typer.echo(f"wrote {sentence(lambda: write_commands(folder))}")


if __name__ == "__main__":
    app()
