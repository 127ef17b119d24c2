"""The command: its verbs, what they print and where, and how an error looks."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import onelaunch
import pytest
from onelaunch import PRESETS, KernelConfig, preset, render
from onelaunch.build import toolchain
from onelaunch.cache.store import Store
from onelaunch.cli import main
from onelaunch.cli.main import app
from onelaunch.load import loader, prebuild
from typer.testing import CliRunner

DATA = Path(__file__).parent / "data"
SMALL = "fields=cache_seqlens"


def invoke(*arguments: str, **environment: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env=environment)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty one, which the command builds into."""
    store = Store(tmp_path / "cache")
    monkeypatch.setattr(loader, "default_store", lambda: store)
    monkeypatch.setattr(loader, "_loaded", {})
    return store


def assert_one_sentence(result: Any, *texts: str) -> None:
    """Nothing on standard output, one line on standard error, exit code 2 and no traceback."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("onelaunch: ")
    for text in texts:
        assert text in line


# ------------------------------------------------------------------------------------------------------ the command


def test_the_version() -> None:
    result = invoke("--version")
    assert (result.exit_code, result.stdout.splitlines()[0]) == (0, f"onelaunch {onelaunch.__version__}")


def test_no_verb_prints_the_verbs() -> None:
    result = invoke()
    for verb in ("replay", "show", "generate", "build"):
        assert re.search(rf"^\s+{verb}\s", result.output, re.M), result.output


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


# ---------------------------------------------------------------------------------------------------------- show


def test_show_prints_the_source_and_nothing_else() -> None:
    result = invoke("show", "nsa-decode-3")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == render(preset("nsa-decode-3"))


def test_show_without_a_preset_is_the_defaults() -> None:
    assert invoke("show").stdout == render(KernelConfig())


def test_show_with_settings_over_a_preset() -> None:
    wanted = preset("nsa-decode-3").replace(page_size=16, extent="full")
    assert invoke("show", "nsa-decode-3", "--set", "page_size=16, extent=full").stdout == render(wanted)
    assert invoke("show", "--set", wanted.settings()).stdout == render(wanted)


def test_show_into_a_file(tmp_path: Path) -> None:
    for option in ("-o", "--output"):
        file = tmp_path / f"kernel{option}.cu"
        result = invoke("show", "nsa-decode-1", option, str(file))
        assert (result.exit_code, result.output) == (0, "")
        assert file.read_text(encoding="utf-8") == render(preset("nsa-decode-1"))


def test_show_on_a_terminal_is_coloured(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    main.show("nsa-decode-1")
    text = screen.getvalue()
    assert "\x1b[" in text
    plain = [line.rstrip() for line in re.sub(r"\x1b\[[\d;]*m", "", text).rstrip().splitlines()]
    assert plain == [line.rstrip() for line in render(preset("nsa-decode-1")).splitlines()]


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["no-such"], ["the preset's name is 'no-such'; allowed: 'nsa-decode-1'"]),
        (["nsa-decod-1"], ["Did you mean 'nsa-decode-1'?"]),
        (["--set", "page_size"], ["'page_size' is not of the form key=value"]),
        (["--set", "page_size=many"], ["page_size is 'many'; it must be a whole number"]),
        (["--set", "page_sise=3"], ["Did you mean 'page_size'?"]),
        (["--set", "num_backends=0"], ["num_backends is 0; allowed: 1 or more"]),
        (["--set", "num_backends=100000"], ["kernel parameters", "Refresh the backends in several plans."]),
    ],
)
def test_show_refuses_in_one_sentence(arguments: list[str], texts: list[str], tmp_path: Path) -> None:
    file = tmp_path / "out.cu"
    assert_one_sentence(invoke("show", *arguments, "-o", str(file)), *texts)
    assert not file.exists()


# ------------------------------------------------------------------------------------------------------ generate


def test_generate_writes_checks_and_mends_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    first = invoke("generate", "--folder", str(folder))
    assert first.exit_code == 0
    assert first.stdout.splitlines() == [f"wrote {folder / name}.cu" for name in PRESETS]
    assert {path.name for path in folder.iterdir()} == {f"{name}.cu" for name in PRESETS}

    checked = invoke("generate", "--folder", str(folder), "--check")
    assert (checked.exit_code, checked.stdout) == (0, f"{folder} is up to date\n")
    again = invoke("generate", "--folder", str(folder))
    assert (again.exit_code, again.output) == (0, "")

    (folder / "nsa-decode-1.cu").unlink()
    (folder / "nsa-decode-2.cu").write_text("// edited\n", encoding="utf-8")
    (folder / "stray.cu").write_text("// of no preset\n", encoding="utf-8")
    (folder / "notes.txt").write_text("kept\n", encoding="utf-8")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    wrong = invoke("generate", "--folder", str(folder), "--check")
    assert wrong.exit_code == 1
    assert wrong.stderr == f"onelaunch: {folder} isn't what the templates emit. Run: onelaunch generate\n"
    assert "-// edited" in wrong.stdout
    assert "-// of no preset" in wrong.stdout
    assert f"+++ emitted/{'nsa-decode-1'}.cu" in wrong.stdout
    assert "nsa-decode-3.cu" not in wrong.stdout
    assert {path: path.read_bytes() for path in folder.iterdir()} == before, "--check wrote"

    mended = invoke("generate", "--folder", str(folder))
    assert mended.stdout.splitlines() == [
        f"wrote {folder / name}" for name in ("stray.cu", "nsa-decode-1.cu", "nsa-decode-2.cu")
    ]
    assert invoke("generate", "--folder", str(folder), "--check").exit_code == 0
    assert (folder / "notes.txt").read_text() == "kept\n"
    assert not (folder / "stray.cu").exists()


@pytest.mark.parametrize("arguments", [["show", "-o", "{}/no/out.cu"], ["generate", "--folder", "{}/no/out"]])
def test_a_file_that_cant_be_written_is_one_sentence(arguments: list[str], tmp_path: Path) -> None:
    result = invoke(*(argument.format(tmp_path) for argument in arguments))
    assert_one_sentence(result, f"{tmp_path}/no/out", "can't be read or written: No such file or directory.")


def test_a_check_of_a_folder_with_a_file_that_cant_be_read(tmp_path: Path) -> None:
    (tmp_path / "nsa-decode-1.cu").mkdir()
    result = invoke("generate", "--folder", str(tmp_path), "--check")
    assert_one_sentence(result, "nsa-decode-1.cu can't be read or written: Is a directory.")


# --------------------------------------------------------------------------------------------------------- build


def test_build_then_nothing_to_build(store: Store) -> None:
    first = invoke("build", "--set", SMALL, "--target", "cpu")
    assert first.exit_code == 0, first.output
    config = KernelConfig(fields=("cache_seqlens",), target="cpu")
    (entry,) = store.entries()
    said = re.fullmatch(rf"(\w{{16}})  +(\d+\.\d\d) s  {config.symbol}  (.+)\n", first.stdout)
    assert said is not None, first.stdout
    assert said[1] == entry.key[:16]
    assert said[3] == str(entry.module_path)
    loader._loaded.clear()
    onelaunch.freeze()
    second = invoke("build", "--set", SMALL, "--target", "cpu")
    assert second.exit_code == 0, second.output
    assert second.stdout.split()[-1] == str(entry.module_path)


def test_build_as_json(store: Store, tmp_path: Path) -> None:
    config = KernelConfig(fields=("cache_seqlens",), target="cpu")
    other = KernelConfig(fields=("cu_seqlens_k",), target="cpu")
    words = ("build", "--set", SMALL, "--target", "cpu", "--json")
    first = json.loads(invoke(*words).stdout)
    (entry,) = store.entries()
    (kernel,) = first["kernels"]
    assert kernel.pop("seconds") > 0
    assert kernel == {
        "symbol": config.symbol,
        "configuration": config.to_dict(),
        "archs": [],
        "key": entry.key,
        "path": str(entry.module_path),
        "built": True,
        "error": "",
    }
    loader._loaded.clear()
    again = json.loads(invoke(*words).stdout)
    assert (again["kernels"][0]["built"], again["failed"]) == (False, 0)
    assert again["kernels"][0]["path"] == str(entry.module_path)
    several = invoke(*words, "--set", other.settings())
    assert several.exit_code == 0, several.output
    document = json.loads(several.stdout)
    assert [k["symbol"] for k in document["kernels"]] == [config.symbol, other.symbol]
    assert [k["built"] for k in document["kernels"]] == [False, True]
    broken = tmp_path / "c++"
    broken.write_text('#!/bin/sh\ncase "$*" in *--version*) echo "c++ (X) 12.2.0";; *) exit 1;; esac\n')
    broken.chmod(0o755)
    more = KernelConfig(fields=("nsa_cache_seqlens",), target="cpu").settings()
    for settings in ((more,), (more, f"{more},index_topk=3")):
        flags = [word for text in settings for word in ("--set", text)]
        result = invoke("build", *flags, "--target", "cpu", "--json", CXX=str(broken))
        assert result.exit_code == 2
        failed = json.loads(result.stdout)
        assert failed["failed"] == len(failed["kernels"]) == len(settings)
        assert all(k["error"].startswith("The kernel ") and k["key"] == k["path"] == "" for k in failed["kernels"])


def test_build_of_several_presets_for_named_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[prebuild.Job] = []

    def build_all(jobs: list[prebuild.Job], at_once: int, timeout: float, report: Any, retry: bool) -> Any:
        asked.extend(jobs)
        ended = [prebuild.Done(job, "k" * 64, "/there", 0.5, True, "") for job in jobs]
        for done in ended:
            report(done)
        return ended

    def specialize(config: KernelConfig, archs: Any) -> loader.Kernel:
        asked.append(prebuild.Job(config, archs))
        return loader.Kernel(config, "k" * 64, Path("/there"), archs or (), {}, sys)

    monkeypatch.setattr(prebuild, "build_all", build_all)
    monkeypatch.setattr(onelaunch, "specialize", specialize)
    result = invoke("build", "nsa-decode-1", "nsa-copy-3", "--arch", "90a, 100a", "--set", "unroll=4")
    assert result.exit_code == 0, result.output
    configs = [preset(name).replace(unroll=4) for name in ("nsa-decode-1", "nsa-copy-3")]
    assert asked == [prebuild.Job(config, ("90a", "100a")) for config in configs]
    *rows, summary = result.stdout.splitlines()
    assert [line.split()[-2:] for line in rows] == [[config.symbol, "/there"] for config in configs]
    assert summary.startswith("2 built, 0 there before, 0 failed, in ")
    # A single one is built by the command's own process.
    assert invoke("build").exit_code == 0
    assert asked[-1] == prebuild.Job(KernelConfig(), toolchain.current_architectures())
    # Several without --arch are for the GPU that is here, which the children don't ask.
    monkeypatch.setattr(toolchain, "current_architectures", lambda: ("89",))
    assert invoke("build", "nsa-decode-1", "nsa-copy-3").exit_code == 0
    assert [job.archs for job in asked[-2:]] == [("89",), ("89",)]


def test_build_names_a_wrong_preset_before_it_builds_another(store: Store) -> None:
    result = invoke("build", "nsa-decode-1", "nsa-decode-1000", "--target", "cpu")
    assert_one_sentence(result, "the preset's name is 'nsa-decode-1000'")
    assert not (store.root / "entries").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--target", "gpu"], "target is 'gpu'; allowed: 'cuda', 'cpu'."),
        (["nsa-decode-1", "--set", "threads=48"], "threads is 48; on the cuda target it must be a power of two"),
    ],
)
def test_build_refuses_in_one_sentence(arguments: list[str], text: str, store: Store) -> None:
    assert_one_sentence(invoke("build", *arguments), text)


@pytest.mark.nvcc
def test_build_refuses_an_architecture_that_is_none(store: Store) -> None:
    assert_one_sentence(invoke("build", "nsa-decode-1", "--arch", "hopper"), "'hopper'", "write 90a")


def test_build_is_a_wish_that_no_policy_refuses(store: Store) -> None:
    """ONELAUNCH_JIT is for the builds that a call would start; what the command built, such a call then finds."""
    result = invoke("build", "--set", SMALL, "--target", "cpu", ONELAUNCH_JIT="error")
    assert result.exit_code == 0, result.output
    (entry,) = store.entries()
    assert result.stdout.split()[-1] == str(entry.module_path)
    assert loader.POLICY_VARIABLE not in os.environ
    assert "ONELAUNCH_JIT=error doesn't refuse this" in invoke("build", "--help", COLUMNS="200").stdout


def test_a_build_that_fails_is_one_sentence(store: Store, tmp_path: Path) -> None:
    broken = tmp_path / "c++"
    broken.write_text('#!/bin/sh\ncase "$*" in *--version*) echo "c++ (X) 12.2.0";; *) exit 1;; esac\n')
    broken.chmod(0o755)
    result = invoke("build", "--set", SMALL, "--target", "cpu", CXX=str(broken))
    # The notice of the build goes to the process's standard error, not through the command's.
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("onelaunch: The kernel ")


# -------------------------------------------------------------------------------------------------------- replay


def test_replay_on_a_terminal_shows_progress_and_a_table() -> None:
    arguments = [str(DATA / "azure_2023_conversation.csv"), "--device", "cpu", "--max-batch", "4"]
    environment = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "120"}
    for limit in (["--max-steps", "20"], ["--requests", "2"]):
        result = invoke(
            "replay", *arguments, "--context-len", "256", "--verify", "none", "--step-ms", "500", *limit, **environment
        )
        assert result.exit_code == 0, result.output
        assert "\x1b[" in result.output
        assert "0 (nothing was checked)" in re.sub(r"\x1b\[[\d;]*m", "", result.output)
    assert "2 of 2 requests finished" in re.sub(r"\x1b\[[\d;]*m", "", result.output)


def test_the_emitted_text_doesnt_depend_on_the_locale(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "onelaunch.cli.main", "show", "nsa-decode-1"],
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("utf-8") == render(preset("nsa-decode-1"))
