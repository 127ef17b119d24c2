"""What the verbs share: how errors and exit codes look, which kernel the arguments name, how text is printed."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

EXIT_CODES = """\b
Exit codes:
  0    done
  1    done, and the answer is no: kernels differ, a destination is wrong, nothing is built, something needs mending
  2    it can't be done: a wrong argument, a missing tool, a failed build; standard error says why in a sentence
  70   a defect of onelaunch; --traceback shows where
  130  interrupted by Ctrl-C; nothing is left half-done
"""

_wants_traceback = False


def preset_names(incomplete: str) -> list[str]:
    """What a shell completes a configuration's name by."""
    from onelaunch.spec.presets import PRESETS

    return [name for name in PRESETS if name.startswith(incomplete)]


Config = Annotated[
    str | None,
    typer.Argument(
        help="A preset, the first digits of an entry's key, an entry's folder, or a file; without one, the defaults.",
        autocompletion=preset_names,
    ),
]
Settings = Annotated[
    str | None,
    typer.Option("--set", help="Facts as key=value,…; over the preset if one is named. Fields are joined by +."),
]
Target = Annotated[str | None, typer.Option(help="cuda or cpu; default cuda.")]
Arch = Annotated[str | None, typer.Option(help="GPU architectures, such as 90a,100a.")]
Json = Annotated[bool, typer.Option("--json", help="As JSON.")]


def sentence(run: Callable[[], Any]) -> Any:
    """Runs a verb's body; an error of onelaunch, or of a file that was named, is one sentence and exit code 2."""
    from onelaunch.errors import OnelaunchError

    try:
        return run()
    except OnelaunchError as error:
        said = str(error)
        show_traceback()
    except OSError as error:
        said = f"{error.filename or 'a file'} can't be read or written: {error.strerror or error}."
        show_traceback()
    typer.echo(f"onelaunch: {said}", err=True)
    raise typer.Exit(2)


def show_traceback() -> None:
    """Prints where the current exception came from, if --traceback asks for it."""
    if _wants_traceback:
        typer.echo(traceback.format_exc(), err=True, nl=False)


class Verbs(typer.core.TyperGroup):
    """The command: takes --traceback anywhere, and ends every fault by a sentence and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Takes --traceback out, wherever it is among a verb's arguments."""
        global _wants_traceback
        _wants_traceback = "--traceback" in args
        return super().parse_args(ctx, [word for word in args if word != "--traceback"])

    def invoke(self, ctx: Any) -> Any:
        """Runs the verb; what it didn't foresee is a defect."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("onelaunch: interrupted", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            # Usage errors and exits are the library's to show; a reader that went away, as in `| head`, is no fault.
            if type(error).__module__.partition(".")[0] in ("click", "typer") or isinstance(error, BrokenPipeError):
                raise
            show_traceback()
            said = " ".join(f"{type(error).__name__}: {error}".split())
            typer.echo(
                f"onelaunch: a defect of onelaunch: {said}. Please report it, with what --traceback adds.", err=True
            )
            raise typer.Exit(70) from error


def chosen(name: str | None, settings: str | None, target: str | None = None) -> Any:
    """The configuration that a preset's name and --set stand for."""
    from onelaunch.spec.presets import preset
    from onelaunch.spec.settings import parse_settings

    config = parse_settings(settings or "", preset(name) if name else None)
    return config.replace(target=target) if target else config


def architectures(text: str | None) -> tuple[str, ...] | None:
    """What --arch names; None if it wasn't given."""
    return tuple(part.strip() for part in text.split(",")) if text else None


def kernel(name: str | None, settings: str | None, target: str | None, arch: str | None) -> Any:
    """The onelaunch.inspect.Subject that a verb's arguments stand for; says on standard error if it was edited."""
    from onelaunch.inspect import kernels as inspect

    found = inspect.find(name, settings, target, architectures(arch))
    if found.edited is not None:
        typer.echo(f"onelaunch: {found.symbol} is edited by hand: {found.edited}", err=True)
    return found


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def print_text(text: str, lexer: str) -> None:
    """Text to standard output: highlighted on a terminal (unless $NO_COLOR is set), plain elsewhere."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        sys.stdout.write(text)
        return
    from rich.console import Console
    from rich.syntax import Syntax

    # Plain text keeps the terminal's own colour, dark or light; it also wraps, as folded lines couldn't be copied.
    highlighted = Syntax(text, lexer, theme="ansi_dark", background_color="default").highlight(text)
    Console().print(highlighted, soft_wrap=True, end="")


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file in one step: interrupted, it leaves what was there before."""
    data = content.encode() if isinstance(content, str) else content
    target = path.resolve()
    if target.exists() and not target.is_file():  # such as /dev/stdout
        target.write_bytes(data)
        return
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        part.write_bytes(data)
        os.replace(part, target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def check_writable(path: Path) -> None:
    """Raises OSError where write_whole couldn't write, as far as that shows before there is anything to write."""
    target = path.resolve()
    place = target if target.exists() and not target.is_file() else target.parent
    place.stat()  # says what is missing
    if not os.access(place, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def write_commands(folder: Path) -> Path:
    """Writes a compile_commands.json of the emitted files in a folder; returns its path."""
    from onelaunch.errors import ConfigError
    from onelaunch.inspect import kernels as inspect

    files = {}
    for source in sorted(folder.glob("*.cu")):
        with contextlib.suppress(ConfigError):  # somebody else's file
            files[source] = inspect.of_file(source)
    path = folder / "compile_commands.json"
    write_whole(path, inspect.compile_commands(files))
    return path
