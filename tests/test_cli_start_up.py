"""The command starts quickly: verbs that need no GPU and no build import no large packages."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import pytest

# Seconds to import: torch 2 to 5, matplotlib and numpy 0.2 each, jinja2 0.1.
LARGE = ("torch", "numpy", "matplotlib", "triton", "jinja2")
RUN = """
import json, sys
from onelaunch.cli.main import app
try:
    app(sys.argv[1:], prog_name="onelaunch")
finally:
    sys.stderr.write("\\n" + json.dumps(sorted(sys.modules)))
"""
VERBS = {
    "--help": (),
    "show --help": (),
    "list": (),
    "cache list": (),
    "describe nsa-decode-3": (),
    # These verbs render.
    "show nsa-decode-3": ("jinja2",),
    "show nsa-decode-3 --what key --target cpu": ("jinja2",),
}


def run(words: str, **environment: str) -> tuple[list[str], float]:
    """The large packages that a command imports, and its CPU seconds (wall time would count other processes too)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", RUN, *words.split()]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stderr.splitlines()[-1])
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return [name for name in LARGE if name in loaded], seconds


@pytest.mark.parametrize("words", VERBS)
def test_quick_verbs_import_no_large_package(words: str) -> None:
    loaded, seconds = run(words)
    assert tuple(loaded) == VERBS[words]
    # 0.1 to 0.35 s. The first run may compile modules, and on a busy machine some take twice as long.
    tries = [seconds]
    while min(tries) >= 0.8 and len(tries) < 8:
        tries.append(run(words)[1])
    assert min(tries) < 0.8


def test_completion_imports_no_large_package() -> None:
    for words, number in (("onelaunch re", "1"), ("onelaunch show nsa-dec", "2")):
        complete = {"_ONELAUNCH_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": number}
        assert run("", **complete)[0] == []
