"""Common to all verbs: help with examples, errors in a sentence, exit codes, Ctrl-C, completion, the version."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onelaunch
import pytest
import torch
from click.testing import CliRunner
from onelaunch import PRESETS, preset, render
from onelaunch.build import toolchain
from onelaunch.cli.main import app
from onelaunch.cli.output import size
from onelaunch.cli.verbs import Verb
from onelaunch.inspect import views
from onelaunch.spec.settings import parse_settings


def walk(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every verb by its words, including groups."""
    command = command.load() if isinstance(command, Verb) else command
    yield words, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, (*words, name))


VERBS = dict(walk(app))


def invoke(*words: str, **environment: str) -> Any:
    return CliRunner().invoke(app, list(words), env=environment)


def examples(words: tuple[str, ...]) -> list[str]:
    """The lines below "Examples:" in a verb's help."""
    text = invoke(*words, "--help").stdout
    section = re.search(r"^( +)Examples:\n((?:\1  .*\n)+)", text, re.M)
    assert section is not None, f"onelaunch {' '.join(words)} --help has no examples:\n{text}"
    return [line.strip() for line in section[2].splitlines()]


@pytest.mark.parametrize("words", VERBS, ids=lambda words: "-".join(words) or "onelaunch")
def test_every_verbs_help_has_examples_that_parse(words: tuple[str, ...]) -> None:
    result = invoke(*words, "--help")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()[2].strip()) > 20, "the help doesn't say what the verb does"
    for example in examples(words):
        first, *rest = shlex.split(example)
        assert first == "onelaunch"
        path: list[str] = []
        while hasattr(VERBS[tuple(path)], "commands"):
            path.append(rest.pop(0))
        assert path[: len(words)] == list(words), f"{example} calls another verb"
        # Raises the error that a user would see. A command keeps the help option of its first context.
        with app.make_context("onelaunch", ["list"]) as parent:
            VERBS[tuple(path)].make_context(" ".join(path), list(rest), parent=parent)
        for option, value in itertools.pairwise(rest):
            if option == "--set":
                parse_settings(value)
        for name in (word for word in rest if re.match(r"[a-z0-9]+-(decode|copy|precompute|verify|extend)", word)):
            assert name in PRESETS, example


def test_every_option_and_argument_is_explained() -> None:
    for words, command in VERBS.items():
        for parameter in command.params:
            if getattr(parameter, "hidden", False):
                continue
            text = command.help if parameter.param_type_name == "argument" else parameter.help
            name = (parameter.human_readable_name).strip("[].") if parameter.param_type_name == "argument" else ""
            assert name in (text or ""), f"onelaunch {' '.join(words)}: {parameter.name} has no help"
            assert text, f"onelaunch {' '.join(words)}: {parameter.name} has no help"


@pytest.mark.parametrize("words", VERBS)
def test_no_help_text_is_cut(words: tuple[str, ...]) -> None:
    text = invoke(*words, "--help", COLUMNS="80").stdout
    assert "..." not in text.partition("Commands:")[2]
    assert max(map(len, text.splitlines())) <= 80


def test_short_options_and_names_that_are_gone() -> None:
    assert invoke("-h").stdout == invoke("--help").stdout
    # In its own process: click remembers the help option's names from a command's first context.
    command = [sys.executable, "-m", "onelaunch.cli.main", "cache", "gc", "-h"]
    assert "-h, --help" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert invoke("-V").stdout == invoke("--version").stdout
    for words, text in (
        (["tune"], "`onelaunch tune` is gone since 0.2: the default launch shape was within 4.4 % of the best"),
        (["--install-completion"], 'put eval "$(_ONELAUNCH_COMPLETE=bash_source onelaunch)" into'),
        (["shwo"], "No such command 'shwo'. Did you mean 'show'?"),
        (["generate", "--folder", "x"], "--folder is gone since 0.2; use --output."),
    ):
        result = invoke(*words)
        assert (result.exit_code, result.stdout) == (2, "")
        assert text in result.stderr


def test_the_help_lists_the_verbs_and_the_exit_codes() -> None:
    text = invoke("--help").stdout
    assert text == invoke().output, "a call without a verb doesn't print the help"
    section = text[text.index("Commands:") : text.index("Exit codes:")]
    assert re.findall(r"^  (\w+) +\S.*\.$", section, re.M) == list(app.commands)
    assert re.findall(r"^    (\d+) ", text[text.index("Exit codes:") :], re.M) == ["0", "1", "2", "70", "130"]


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("words", [["show", "no-such"], ["describe", "no-such"], ["explain", "--set", "x"]])
def test_a_traceback_is_shown_where_it_is_requested(words: list[str]) -> None:
    plain = invoke(*words)
    assert (plain.exit_code, plain.stderr.startswith("onelaunch: ")) == (2, True)
    for given in (["--traceback", *words], [*words, "--traceback"]):
        result = invoke(*given)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("Traceback (most recent call last):")
        assert result.stderr.endswith(plain.stderr)
    assert invoke(*words).stderr == plain.stderr, "the next call remembers it"


def test_a_defect_is_one_sentence_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> str:
        raise KeyError("two\nlines")

    monkeypatch.setattr(views, "view", broken)
    result = invoke("show", "nsa-decode-1")
    assert (result.exit_code, result.stdout) == (70, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("onelaunch: a defect of onelaunch: KeyError: ")
    assert "in broken" in invoke("show", "nsa-decode-1", "--traceback").stderr


# ------------------------------------------------------------------------------------------------ the rest


def test_the_version_comes_with_the_toolchain() -> None:
    result = invoke("--version")
    assert result.exit_code == 0
    first, *rest = result.stdout.splitlines()
    assert first == f"onelaunch {onelaunch.__version__}"
    said = dict(line.split("  ", 1) for line in rest)
    assert said["python"].strip() == sys.version.split()[0]
    assert said["torch"].strip() == torch.__version__.split("+")[0]
    for tool, value, _ in toolchain.describe():
        assert said[tool].strip().startswith(value), said


def test_the_version_where_there_is_no_toolchain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "describe", lambda: [("CUDA toolkit", toolchain.NOT_USABLE, "it is gone\nreally")])
    result = invoke("--version")
    assert result.exit_code == 0
    assert re.fullmatch(r"CUDA toolkit +not usable: it is gone", result.stdout.splitlines()[-1])


@pytest.mark.parametrize("verb", ["show", "describe", "diff"])
def test_a_shell_completes_presets(verb: str) -> None:
    words = f"onelaunch {verb} nsa-decode-3-page"
    result = CliRunner().invoke(
        app,
        [],
        prog_name="onelaunch",
        env={"_ONELAUNCH_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": "2"},
    )
    assert set(result.stdout.split()) == {f"plain,{name}" for name in PRESETS if name.startswith("nsa-decode-3-page")}


def test_sizes_for_people() -> None:
    said = {0: "0 B", 999: "999 B", 1000: "1 KB", 2_400_000: "2 MB", 3_100_000_000: "3.1 GB"}
    assert {count: size(count) for count in said} == said


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["explain", "--set", "fields=cache_seqlens", "--target", "cpu"], {"hit", "key", "nearest", "differs"}),
        (["list"], {"presets", "others"}),
        (["describe"], {"fields", "bytes_read", "bytes_written"}),
        (["show", "--target", "cpu", "--what", "command"], {"onelaunch"}),
    ],
)
def test_json_for_scripts(words: list[str], names: set[str]) -> None:
    result = invoke(*words, "--json")
    facts = json.loads(result.stdout)
    assert names <= set(facts)
    if words[0] == "explain":
        assert result.exit_code == (0 if facts["hit"] else 1)
        assert re.fullmatch(r"[0-9a-f]{64}", facts["key"])
    else:
        assert result.exit_code == 0


def test_the_module_is_the_command(tmp_path: Path) -> None:
    for arguments, code in ((["--version"], 0), (["show", "no-such-preset"], 2)):
        done = subprocess.run(
            [sys.executable, "-m", "onelaunch.cli.main", *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["show", "--no-such-option"], ["no-such-verb"]])
def test_a_wrong_command_line(arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage:" in result.stderr


def test_the_emitted_text_doesnt_depend_on_the_locale(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "onelaunch.cli.main", "show", "nsa-decode-1"],
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("utf-8") == render(preset("nsa-decode-1"))


OTHER_VERBS = ("--version", "list --json", "describe nsa-decode-1", "cache list", "nosuch")


@pytest.mark.parametrize(
    "verb", ["--help", "show nsa-decode-3", *(pytest.param(v, marks=pytest.mark.long) for v in OTHER_VERBS)]
)
def test_streams_that_are_closed_or_full(verb: str) -> None:
    """Or without a reader. A full standard output is one sentence; nothing else is said and nothing fails."""
    redirections = (">&-", "2>&-", ">&- 2>&-", "<&-", ">/dev/full", "2>/dev/full", ">/dev/full 2>/dev/full", "| true")
    started = {
        redirection: subprocess.Popen(
            f"{sys.executable} -m onelaunch.cli.main {verb} {redirection}",
            shell=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for redirection in redirections
    }
    for redirection, command in started.items():
        said = command.communicate()[1]
        assert "Traceback" not in said
        assert "Exception ignored" not in said
        if verb == "nosuch":
            assert "standard output" not in said
            continue
        full = redirection.startswith(">/dev/full")
        assert command.returncode == (2 if full else 0), redirection
        sentence = "onelaunch: standard output can't be read or written: No space left on device.\n"
        assert said == (sentence if redirection == ">/dev/full" else ""), redirection
