"""What every verb does alike: help with examples, errors in a sentence, exit codes, Ctrl-C, completion, the version."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onelaunch
import pytest
import torch
import typer
from onelaunch import PRESETS
from onelaunch.build import toolchain
from onelaunch.cache.store import MANIFEST, Store
from onelaunch.cli import common
from onelaunch.cli.main import app
from onelaunch.inspect import kernels as inspect
from onelaunch.spec.settings import parse_settings
from typer.testing import CliRunner

ROOT: Any = typer.main.get_command(app)


def walk(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every verb by its words, groups among them."""
    yield words, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, (*words, name))


VERBS = dict(walk(ROOT))


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
        command, path = ROOT, []
        while hasattr(command, "commands"):
            path.append(rest.pop(0))
            assert path[-1] in command.commands, f"{example}: there is no {path[-1]}"
            command = command.commands[path[-1]]
        assert path[: len(words)] == list(words), f"{example} is of another verb"
        command.make_context(" ".join(path), rest)  # raises what a user would be told
        for option, value in itertools.pairwise(rest):
            if option == "--set":
                parse_settings(value)
        for name in (word for word in rest if re.match(r"[a-z0-9]+-(decode|copy|precompute|verify|extend)", word)):
            assert name in PRESETS, example


def test_every_option_and_argument_is_explained() -> None:
    for words, command in VERBS.items():
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"onelaunch {' '.join(words)}: {parameter.name} has no help"


def test_exit_codes_are_documented() -> None:
    text = invoke("--help").stdout
    assert re.findall(r"^    (\d+) ", text[text.index("Exit codes:") :], re.M) == ["0", "1", "2", "70", "130"]


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("words", [["show", "no-such"], ["describe", "no-such"], ["explain", "--set", "x"]])
def test_a_traceback_is_shown_where_it_is_asked_for(words: list[str]) -> None:
    plain = invoke(*words)
    assert (plain.exit_code, len(plain.stderr.splitlines())) == (2, 1)
    for asked in (["--traceback", *words], [*words, "--traceback"]):
        result = invoke(*asked)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("Traceback (most recent call last):")
        assert result.stderr.endswith(plain.stderr)
    assert invoke(*words).stderr == plain.stderr, "the next call remembers it"


def test_a_defect_is_one_sentence_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> str:
        raise KeyError("two\nlines")

    monkeypatch.setattr(inspect, "view", broken)
    result = invoke("show", "nsa-decode-1")
    assert (result.exit_code, result.stdout) == (70, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("onelaunch: a defect of onelaunch: KeyError: ")
    assert "in broken" in invoke("show", "nsa-decode-1", "--traceback").stderr


# ------------------------------------------------------------------------------------------------ Ctrl-C


@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_leaves_nothing_half_done(jobs: int, tmp_path: Path) -> None:
    """With one build here and with several in workers: nothing stays in the cache, and no process either."""
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *--version*) echo "c++ (X) 12.2.0"; exit;; esac\n'
        f"echo $$ > {tmp_path}/running.$$\nexec sleep 300\n"
    )
    compiler.chmod(0o755)
    settings = [f"--set=fields=cache_seqlens,num_backends={n}" for n in range(1, jobs + 1)]
    process = subprocess.Popen(
        [sys.executable, "-m", "onelaunch.cli.main", "build", *settings, "--target", "cpu", "--jobs", str(jobs)],
        env={**os.environ, "CXX": str(compiler), "ONELAUNCH_CACHE_DIR": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 120
        while len(running := list(tmp_path.glob("running.*"))) < jobs:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
        stdout, stderr = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert stderr.splitlines()[-1] == "onelaunch: interrupted"
    assert "Traceback" not in stderr
    cache = tmp_path / "cache"
    assert not list((cache / "staging").glob("*"))
    assert not list(cache.glob(f"entries/*/{MANIFEST}"))
    assert not list((cache / "failed").glob("*")), "an interruption isn't a failure to remember"
    assert Store(cache).stored_keys() == []
    for pid in (int(path.suffix[1:]) for path in running):
        end = time.monotonic() + 10
        while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            assert time.monotonic() < end, "a compiler still runs"
            time.sleep(0.05)


def test_an_interrupted_verb_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect, "view", interrupted)
    result = invoke("show", "nsa-decode-1")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "onelaunch: interrupted\n")


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
        env={"_ONELAUNCH_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "2"},
    )
    assert set(result.stdout.split()) == {name for name in PRESETS if name.startswith("nsa-decode-3-page")}


def test_sizes_for_people() -> None:
    said = {0: "0 B", 999: "999 B", 1000: "1 KB", 2_400_000: "2 MB", 3_100_000_000: "3.1 GB"}
    assert {count: common.size(count) for count in said} == said


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (
            ["explain", "--set", "fields=cache_seqlens", "--target", "cpu"],
            {"hit", "key", "nearest", "differs"},
        ),
        (["list"], {"presets", "others"}),
        (["describe"], {"fields", "bytes_read", "bytes_written", "estimate"}),
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


@pytest.mark.nvcc
def test_generate_tells_editors_of_every_preset(tmp_path: Path) -> None:
    result = invoke("generate", "--folder", str(tmp_path / "emitted"), "--clangd")
    assert result.exit_code == 0, result.output
    (tmp_path / "emitted" / "mine.cu").write_text("int main() {}\n")
    again = invoke("generate", "--folder", str(tmp_path / "emitted"), "--clangd")
    assert f"wrote {tmp_path / 'emitted' / 'mine.cu'}" in again.stdout, "a stray file isn't removed"
    commands = json.loads((tmp_path / "emitted" / "compile_commands.json").read_text())
    assert {Path(command["file"]).stem for command in commands} == set(PRESETS)
