"""onelaunch generate: writes or checks generated/, the emitted CUDA of every preset."""

from __future__ import annotations

import difflib
from pathlib import Path

import click
from onelaunch.emit.render import render
from onelaunch.inspect import editors
from onelaunch.spec.presets import PRESETS

from .arguments import gone_option
from .output import write_whole


@click.command()
@click.option(
    "-o",
    "--output",
    "folder",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    default=Path("generated"),
    help="The folder of the emitted CUDA.",
)
@gone_option("--folder", "use --output")
@click.option("--check", is_flag=True, help="Write nothing; fail if a file isn't up to date.")
@click.option("--clangd", is_flag=True, help="Also write a compile_commands.json there, for editors.")
def generate(folder: Path, check: bool, clangd: bool) -> None:
    """Write the emitted CUDA of every preset, or check that the files are up to date.

    \b
    Examples:
      onelaunch generate
      onelaunch generate --check
      onelaunch generate -o emitted --clangd
    """
    if check:
        difference = check_folder(folder)
        if difference:
            click.echo(difference, nl=False)
            click.echo(f"onelaunch: {folder} is out of date. Run: onelaunch generate", err=True)
            raise click.exceptions.Exit(1)
        click.echo(f"{folder} is up to date")
        return
    for path in write_folder(folder):
        click.echo(f"wrote {path}")
    if clangd:
        commands = folder / editors.COMMANDS
        write_whole(commands, editors.commands_of_folder(folder))
        click.echo(f"wrote {commands}")


def emitted() -> dict[str, str]:
    """The emitted text of every preset, by file name."""
    return {f"{name}.cu": render(config) for name, config in PRESETS.items()}


def write_folder(folder: Path) -> list[Path]:
    """Writes changed files, and removes .cu files that no preset emits; returns the paths of both."""
    folder.mkdir(exist_ok=True)
    wanted = emitted()
    touched = []
    for path in sorted(folder.glob("*.cu")):
        if path.name not in wanted:
            path.unlink()
            touched.append(path)
    for name, text in wanted.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_whole(path, text)
            touched.append(path)
    return touched


def check_folder(folder: Path) -> str:
    """A unified diff from the files in the folder to the emitted ones; "" if they agree."""
    wanted = emitted()
    present = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.cu")}
    parts: list[str] = []
    for name in sorted(wanted.keys() | present.keys()):
        old, new = present.get(name, ""), wanted.get(name, "")
        parts += difflib.unified_diff(
            old.splitlines(keepends=True), new.splitlines(keepends=True), f"{folder}/{name}", f"emitted/{name}"
        )
    return "".join(parts)
