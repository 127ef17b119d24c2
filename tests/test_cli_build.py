"""onelaunch build: its builds, its output, and its errors."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import onelaunch
import pytest
from click.testing import CliRunner
from compilers import compiler_that
from onelaunch import KernelConfig, preset
from onelaunch.build import toolchain
from onelaunch.cache.store import Store
from onelaunch.cli.main import app
from onelaunch.load import loader, prebuild

SMALL = "fields=cache_seqlens"


def invoke(*arguments: str, **environment: str) -> Any:
    return CliRunner().invoke(app, ["build", *arguments], env=environment)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store, which the command builds into."""
    store = Store(tmp_path / "cache")
    monkeypatch.setattr(loader, "default_store", lambda: store)
    monkeypatch.setattr(loader, "_loaded", {})
    return store


def assert_one_sentence(result: Any, *texts: str) -> None:
    """Checks for nothing on standard output, one line on standard error, exit code 2 and no traceback."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("onelaunch: ")
    for text in texts:
        assert text in line


def test_build_then_nothing_to_build(store: Store) -> None:
    first = invoke("--set", SMALL, "--target", "cpu")
    assert first.exit_code == 0, first.output
    config = KernelConfig(fields=("cache_seqlens",), target="cpu")
    (entry,) = store.entries()
    said = re.fullmatch(rf"(\w{{12}})  +(\d+\.\d\d) s  {config.symbol}  (.+)\n", first.stdout)
    assert said is not None, first.stdout
    assert said[1] == entry.key[:12]
    assert said[3] == str(entry.module_path)
    loader._loaded.clear()
    onelaunch.freeze()
    second = invoke("--set", SMALL, "--target", "cpu")
    assert second.exit_code == 0, second.output
    assert second.stdout.split()[-1] == str(entry.module_path)


def test_build_as_json(store: Store, tmp_path: Path) -> None:
    config = KernelConfig(fields=("cache_seqlens",), target="cpu")
    other = KernelConfig(fields=("cu_seqlens_k",), target="cpu")
    words = ("--set", SMALL, "--target", "cpu", "--json")
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
    broken = str(compiler_that("exit 1", tmp_path))
    more = KernelConfig(fields=("nsa_cache_seqlens",), target="cpu").settings()
    for settings in ((more,), (more, f"{more},index_topk=3")):
        flags = [word for text in settings for word in ("--set", text)]
        result = invoke(*flags, "--target", "cpu", "--json", CXX=broken)
        assert result.exit_code == 2
        assert "Traceback" not in result.stderr
        if len(settings) == 1:
            assert result.stderr.splitlines()[-1].startswith("onelaunch: The kernel ")
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
    result = invoke("nsa-decode-1", "nsa-copy-3", "--arch", "90a, 100a", "--set", "unroll=4")
    assert result.exit_code == 0, result.output
    configs = [preset(name).replace(unroll=4) for name in ("nsa-decode-1", "nsa-copy-3")]
    assert asked == [prebuild.Job(config, ("90a", "100a")) for config in configs]
    *rows, summary = result.stdout.splitlines()
    assert [line.split()[-2:] for line in rows] == [[config.symbol, "/there"] for config in configs]
    assert summary.startswith("2 built, 0 there before, 0 failed, in ")
    # The command's own process builds a single preset.
    assert invoke("nsa-decode-1").exit_code == 0
    assert asked[-1] == prebuild.Job(KernelConfig(), toolchain.current_architectures())
    # Several presets without --arch are for the local GPU, which the child processes don't query.
    monkeypatch.setattr(toolchain, "current_architectures", lambda: ("89",))
    assert invoke("nsa-decode-1", "nsa-copy-3").exit_code == 0
    assert [job.archs for job in asked[-2:]] == [("89",), ("89",)]


def test_build_names_a_wrong_preset_before_it_builds_another(store: Store) -> None:
    result = invoke("nsa-decode-1", "nsa-decode-1000", "--target", "cpu")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "onelaunch: There is no preset 'nsa-decode-1000'. Did you mean 'nsa-decode-1'?\n"
        "`onelaunch list` prints all of them.\n"
    )
    assert not (store.root / "entries").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nsa-decode-1", "--target", "gpu"], "target is 'gpu'; allowed: 'cuda', 'cpu'."),
        ([], "No configuration is named. Name presets (`onelaunch list` prints them), settings by --set, or a file"),
        (["--preset", "nsa-decode-1"], "--preset is gone since 0.2; name presets as arguments"),
        (["vllm-decode-3"], "The preset 'vllm-decode-3' is gone since 0.2: vLLM's draft steps advance one object"),
    ],
)
def test_build_refuses_in_one_sentence(arguments: list[str], text: str, store: Store) -> None:
    assert_one_sentence(invoke(*arguments), text)


@pytest.mark.nvcc
def test_build_refuses_an_architecture_that_is_none(store: Store) -> None:
    assert_one_sentence(invoke("nsa-decode-1", "--arch", "hopper"), "'hopper'", "write 90a")


def test_build_is_a_wish_that_no_policy_refuses(store: Store) -> None:
    """ONELAUNCH_JIT governs builds that a call would start; such a call then finds what the command built."""
    result = invoke("--set", SMALL, "--target", "cpu", ONELAUNCH_JIT="error")
    assert result.exit_code == 0, result.output
    (entry,) = store.entries()
    assert result.stdout.split()[-1] == str(entry.module_path)
    assert loader.POLICY_VARIABLE not in os.environ
    assert "ONELAUNCH_JIT=error doesn't apply here" in invoke("--help", COLUMNS="200").stdout
