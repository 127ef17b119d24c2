"""Error messages, exit codes, and --traceback."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TypeVar

import click
from onelaunch.errors import OnelaunchError

EXIT_CODES = """\b
Exit codes:
  0    done
  1    done, and the answer is no: kernels differ, a destination is wrong,
       nothing is built, something needs fixing
  2    it can't be done: a wrong argument, a missing tool, a failed build;
       standard error says why in a sentence
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


def show_traceback() -> None:
    """Prints where the current exception was raised, if --traceback was given."""
    if _wants_traceback:
        click.echo(traceback.format_exc(), err=True, nl=False)


def guarded(run: Callable[[], Result]) -> Result:
    """Runs a verb. Whatever it raises becomes one sentence on standard error, and an exit code."""
    try:
        return run()
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except BrokenPipeError:
        raise  # the reader of standard output is gone, as after `| head`: click ends the command
    except OnelaunchError as error:
        message, code = str(error), 2
        show_traceback()
    except OSError as error:
        # The OSError of a file names it.
        place = error.filename or "standard output"
        message, code = f"{place} can't be read or written: {error.strerror or error}.", 2
        show_traceback()
    except Exception as error:
        # click prints usage errors, and handles exits.
        if type(error).__module__.partition(".")[0] == "click":
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())
        message, code = f"a defect of onelaunch: {text}. Please report it, with what --traceback adds.", 70
        show_traceback()
    click.echo(f"onelaunch: {message}", err=True)
    raise click.exceptions.Exit(code)
