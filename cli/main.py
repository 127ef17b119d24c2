"""The onelaunch command: its verbs, and how errors and exit codes look."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .replay import replay

app = typer.Typer(
    name="onelaunch",
    help="Generate, build and replay kernels that refresh N backends' attention metadata in one launch.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=True,
)
app.command()(replay)

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


def sentence(run: Callable[[], Any]) -> Any:
    """Runs a verb's body; an error of onelaunch, or of a file that was named, is one sentence and exit code 2."""
    from onelaunch.errors import OnelaunchError

    try:
        return run()
    except OnelaunchError as error:
        said = str(error)
    except OSError as error:
        said = f"{error.filename or 'a file'} can't be read or written: {error.strerror or error}."
    typer.echo(f"onelaunch: {said}", err=True)
    raise typer.Exit(2)


def chosen(name: str | None, settings: str | None, target: str | None = None) -> Any:
    """The configuration that a preset's name and --set stand for."""
    from onelaunch.config import parse_settings, preset

    config = parse_settings(settings or "", preset(name) if name else None)
    return config.replace(target=target) if target else config


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


@app.command()
def build(
    configs: Annotated[list[str] | None, typer.Argument(help="Presets.")] = None,
    settings: Settings = None,
    target: Annotated[str | None, typer.Option(help="cuda or cpu; default cuda.")] = None,
    arch: Annotated[str | None, typer.Option(help="GPU architectures, such as 90a,100a.")] = None,
) -> None:
    """Compile configurations ahead of time into the cache.

    Examples: onelaunch build nsa-decode-3 --arch 90a; onelaunch build --set num_backends=5 --target cpu
    """
    import time

    from onelaunch import specialize

    def run() -> None:
        names: list[str | None] = [*configs] if configs else [None]
        wanted = [chosen(name, settings, target) for name in names]
        archs = tuple(part.strip() for part in arch.split(",")) if arch else None
        for config in wanted:
            start = time.perf_counter()
            kernel = specialize(config, archs)
            built = time.perf_counter() - start
            typer.echo(f"{kernel.key[:16]}  {built:6.2f} s  {config.symbol}  {kernel.path}")

    sentence(run)


if __name__ == "__main__":
    app()
