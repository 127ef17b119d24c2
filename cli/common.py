"""What the verbs share: how errors and exit codes look, and which configuration the options name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer


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


def architectures(text: str | None) -> tuple[str, ...] | None:
    """What --arch names; None if it wasn't given."""
    return tuple(part.strip() for part in text.split(",")) if text else None
