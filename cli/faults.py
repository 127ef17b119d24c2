"""How the command ends: error messages, exit codes, and --traceback."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TypeVar

import click
from onelaunch.errors import OnelaunchError

EXIT_CODES = """\b
Exit codes:
  0    done
  1    done, and the answer is no: kernels differ, a destination is wrong, nothing is built, something needs fixing
  2    it can't be done: a wrong argument, a missing tool, a failed build; standard error says why in a sentence
  70   a defect of onelaunch; --traceback shows where
  130  interrupted by Ctrl-C; nothing is left half-done
"""

Result = TypeVar("Result")

_wants_traceback = False


def take_traceback(words: list[str]) -> list[str]:
    """The words of a command line without --traceback, wherever it is; remembers whether it was there."""
    global _wants_traceback
    _wants_traceback = "--traceback" in words
    return [word for word in words if word != "--traceback"]


def sentence(run: Callable[[], Result]) -> Result:
    """Runs a verb's body. An error of onelaunch, or of a file, becomes one sentence and exit code 2."""
    try:
        return run()
    except OnelaunchError as error:
        message = str(error)
        show_traceback()
    except BrokenPipeError:
        raise  # see guarded()
    except OSError as error:
        message = f"{error.filename or 'a file'} can't be read or written: {error.strerror or error}."
        show_traceback()
    click.echo(f"onelaunch: {message}", err=True)
    raise click.exceptions.Exit(2)


def show_traceback() -> None:
    """Prints where the current exception was raised, if --traceback was given."""
    if _wants_traceback:
        click.echo(traceback.format_exc(), err=True, nl=False)


def guarded(run: Callable[[], Result]) -> Result:
    """Runs the command. Ctrl-C and an exception that a verb doesn't handle, a defect, become a sentence and a code."""
    try:
        return run()
    except KeyboardInterrupt:
        click.echo("onelaunch: interrupted", err=True)
        raise click.exceptions.Exit(130) from None
    except BrokenPipeError:
        raise  # standard output was closed, as by `| head`: the library ends the command
    except OSError as error:
        # Verbs read and write files inside sentence(); what they print comes after it.
        show_traceback()
        click.echo(f"onelaunch: standard output can't be written: {error.strerror or error}.", err=True)
        raise click.exceptions.Exit(2) from None
    except Exception as error:
        # Usage errors and exits are the library's to show.
        if type(error).__module__.partition(".")[0] == "click":
            raise
        show_traceback()
        message = " ".join(f"{type(error).__name__}: {error}".split())
        click.echo(
            f"onelaunch: a defect of onelaunch: {message}. Please report it, with what --traceback adds.", err=True
        )
        raise click.exceptions.Exit(70) from error
