"""ONELAUNCH_LOG: one line per build, load and bind; ONELAUNCH_NVTX: a range around each launch."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import onelaunch
import pytest
import torch
from onelaunch import KernelConfig, MetadataBuffers, render
from onelaunch.cache.store import Store
from onelaunch.load import loader

CPU = KernelConfig(fields=("cache_seqlens",), target="cpu")


def bind() -> onelaunch.Plan:
    buffers = onelaunch.MetadataBuffers(cache_seqlens=torch.zeros(2, dtype=torch.int32))
    return onelaunch.bind([buffers], req_to_token=torch.zeros((2, 8), dtype=torch.int32))


def test_a_line_for_each_build_load_and_bind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path / "cache")
    monkeypatch.setattr(loader, "default_store", lambda: store)
    monkeypatch.setattr(loader, "_loaded", {})

    def said() -> list[tuple[str, ...]]:
        lines = [(record.levelname, *record.message.split(maxsplit=4)) for record in caplog.records]
        caplog.clear()
        for line in lines:
            assert line[2] == CPU.symbol
            assert re.match(r"\d+\.\d ms", line[5]), line
        return [(line[0], line[1], line[3], line[4]) for line in lines]

    caplog.set_level(logging.DEBUG, "onelaunch")
    kernel = bind().kernel
    key = f"key={kernel.key[:12]}"
    assert kernel.built
    assert said() == [("INFO", what, key, "miss") for what in ("build", "load", "bind")]
    bind()
    assert said() == [("DEBUG", "load", key, "hit"), ("INFO", "bind", key, "hit")]
    # The next process.
    loader._loaded.clear()
    assert not bind().kernel.built
    assert said() == [("INFO", "load", key, "hit"), ("INFO", "bind", key, "miss")]
    caplog.set_level(logging.WARNING, "onelaunch")
    bind()
    assert said() == []


@pytest.mark.parametrize("level", ["info", "debug", "loud", None])
def test_the_variable_shows_them_on_standard_error(level: str | None, tmp_path: Path) -> None:
    program = (
        "from onelaunch import log\n"
        "log.event('load', 'symbol', 'k' * 64, 'hit', 0.0012, '', '90a')\n"
        "log.event('load', 'symbol', 'k' * 64, 'hit', 0.0, 'memory', level=10)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "ONELAUNCH_LOG"}
    environment |= {"ONELAUNCH_LOG": level} if level else {}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("onelaunch: ")]
    assert done.stdout == ""
    assert len(lines) == {"info": 1, "debug": 2}.get(level or "", 0)
    for line in lines[:1]:
        assert re.fullmatch(r"onelaunch: \d\d:\d\d:\d\d load symbol key=k{12} hit 1\.2 ms, 90a", line)
    assert ("ONELAUNCH_LOG is 'loud'; allowed: info, debug." in done.stderr) is (level == "loud")


# ------------------------------------------------------------------------------------------------ NVTX


def test_ranges_around_each_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: calls.append(f"push {name}"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append("pop"))
    monkeypatch.setenv("ONELAUNCH_NVTX", "1")
    traced = bind()
    calls.clear()
    traced.run(torch.tensor([5, 6]), torch.tensor([0, 1]))
    assert calls == [f"push {CPU.symbol}", "pop"]
    assert traced.launches == 1
    # An error of the launch is raised, and the range is closed.
    with pytest.raises(TypeError):
        traced._bound.run()
    assert calls[2:] == calls[:2]
    # So too where a function finds its plan again.
    buffers = [MetadataBuffers(cache_seqlens=torch.zeros(4, dtype=torch.int32)) for _ in range(2)]
    onelaunch.fused_metadata_copy_cuda(*buffers)
    first = calls[-2:]
    calls.clear()
    onelaunch.fused_metadata_copy_cuda(*buffers)
    assert calls == first
    assert first[0].startswith("push onelaunch_copy_")


@pytest.mark.parametrize("value", [None, "", "0"])
def test_without_the_variable_the_launch_is_called_itself(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONELAUNCH_NVTX", raising=False)
    if value is not None:
        monkeypatch.setenv("ONELAUNCH_NVTX", value)
    bound = bind()._bound
    assert bound.run == bound._plan.run


def test_a_torch_without_nvtx_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object) -> None:
        raise RuntimeError("NVTX functions not installed")

    monkeypatch.setattr(torch.cuda.nvtx, "range_push", missing)
    monkeypatch.setattr("onelaunch.log._warned", set())
    monkeypatch.setenv("ONELAUNCH_NVTX", "1")
    with pytest.warns(UserWarning, match="ONELAUNCH_NVTX is set, but this torch has no NVTX"):
        bind()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bound = bind()._bound
    assert bound.run == bound._plan.run


def test_a_kernels_name_says_what_it_is() -> None:
    """In a profiler: operation, mode and N."""
    for config, stem in (
        (KernelConfig(num_backends=5), "onelaunch_broadcast_decode_n5_"),
        (KernelConfig(operation="copy", num_backends=3), "onelaunch_copy_decode_n3_"),
    ):
        kernel = re.search(r"__global__ void __launch_bounds__\([^)]*\)\s+(\w+)\(", render(config))
        assert kernel is not None
        assert kernel[1] == config.symbol
        assert kernel[1].startswith(stem)
