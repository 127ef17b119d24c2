"""The verbs of the command. A verb's module is imported when the verb is called, so that the others start quickly."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from typing import Any

import click

from .faults import guarded, take_traceback

# By name: the function (or the group of verbs) in onelaunch.cli, and its line in the list of verbs.
VERBS = {
    "list": ("listing:list_kernels", "List the presets and their builds."),
    "show": ("show:show", "Print what a kernel is: CUDA, machine code, resources or key."),
    "describe": ("describe:describe", "Print a kernel's fields, and the bytes that a refresh moves."),
    "diff": ("diff:diff", "Print how two kernels differ."),
    "build": ("build:build", "Compile configurations ahead of time into the cache."),
    "explain": ("explain:explain", "Say whether a configuration is in the cache, and if not, why."),
    "export": ("export:export", "Write a kernel for a project that doesn't use onelaunch."),
    "replay": ("lab.replay.command:replay", "Replay a request trace, and check every refresh."),
    "doctor": ("doctor:doctor", "Check tools and cache, then build and run a real kernel."),
    "bench": ("lab.bench.command:bench", "Measure the refresh beside every baseline."),
    "generate": ("generate:generate", "Write the emitted CUDA of every preset, or check it."),
    "cache": ("cache:app", "List, verify, clean, pack and unpack the built kernels."),
}


_COMPLETION = 'put eval "$(_ONELAUNCH_COMPLETE=bash_source onelaunch)" into your shell\'s start-up file'
# Removed commands and options of the command itself. For one release their error message says what to do instead.
GONE = {
    "tune": "the default launch shape was within 4.4 % of the best of 36 wherever it was measured",
    "--install-completion": _COMPLETION,
    "--show-completion": _COMPLETION,
}


class Verb(click.Command):
    """A verb's name and help; everything else is in its module.

    Args:
        name: the verb.
        where: ``module:command`` below onelaunch.cli.
        help: its line in the list of verbs.
    """

    def __init__(self, name: str, where: str, help: str) -> None:
        super().__init__(name, help=help)
        self._where = where

    def load(self) -> click.Command:
        """The verb with its options; imports its module."""
        module, _, command = self._where.partition(":")
        found: click.Command = getattr(importlib.import_module(f"onelaunch.cli.{module}"), command)
        return found

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Loads the verb, which reads its arguments, prints its help or completes them."""
        return self.load().make_context(info_name, args, parent=parent, **extra)


class Verbs(click.Group):
    """The command. It accepts --traceback anywhere, and turns every error into a sentence and an exit code."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, (where, help) in VERBS.items():
            self.add_command(Verb(name, where, help))

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs in the order of VERBS."""
        return list(VERBS)

    def main(self, *args: Any, **settings: Any) -> Any:
        """Runs the command, also if standard output is closed or fails."""
        if sys.stdout is None:  # it was closed before the start
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        try:
            return super().main(*args, **settings)
        except SystemExit as end:
            failure = _flush()
            if failure and not end.code:
                _say(failure)
                raise SystemExit(2) from None
            raise
        except OSError as error:  # of a help text, which is printed before a verb runs
            _flush()
            _say(str(error.strerror))
            raise SystemExit(2) from None

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Removes --traceback, wherever it is among a verb's arguments, and refuses what is gone."""
        args = take_traceback(args)
        if args and args[0] in GONE:
            raise click.UsageError(f"`onelaunch {args[0]}` is gone since 0.2: {GONE[args[0]]}.", ctx)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the verb."""
        return guarded(lambda: super(Verbs, self).invoke(ctx))


def _say(failure: str) -> None:
    with contextlib.suppress(OSError):  # standard error may be as full
        click.echo(f"onelaunch: standard output can't be read or written: {failure}.", err=True)


def _flush() -> str:
    """Flushes standard output. Returns the error; "" if there is none, or if the reader is gone."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # Python tries again at exit, and would print a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return "" if isinstance(error, BrokenPipeError) else str(error.strerror)
    return ""
