"""Long use in one process: memory stays flat. `make test-long` prints the figures."""

from __future__ import annotations

import gc
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onelaunch
import pytest
import torch
from onelaunch import KernelConfig, MetadataBuffers, render
from onelaunch.build import compile as compiler
from onelaunch.cache import collect
from onelaunch.cache.store import Store
from onelaunch.load import loader

pytestmark = pytest.mark.long

# Allocators keep about this much in any case. If configurations leaked, it would be five times as much.
NOISE_BYTES = 8 * 2**20


def resident() -> int:
    gc.collect()
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


@pytest.fixture
def flat(capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> Iterator[Callable[[str], None]]:
    """Records the resident memory. From the first record to the last, growth must stay below NOISE_BYTES."""
    noted: list[tuple[str, int]] = []
    yield lambda what: noted.append((what, resident()))
    with capsys.disabled():
        print(f"\n{request.node.name}: " + ", ".join(f"{size / 2**20:.1f} MiB after {what}" for what, size in noted))
    assert noted[-1][1] - noted[0][1] < NOISE_BYTES, noted


def bound(rows: int = 8) -> tuple[Any, list[MetadataBuffers]]:
    pool = torch.arange(rows * 16, dtype=torch.int32).view(rows, 16)
    buffers = [
        MetadataBuffers(
            cache_seqlens=torch.zeros(rows, dtype=torch.int32),
            page_indices=torch.zeros((rows, 16), dtype=torch.int32),
        )
        for _ in range(3)
    ]
    return onelaunch.bind(buffers, req_to_token=pool), buffers


def test_a_million_runs_from_four_threads(flat: Callable[[str], None]) -> None:
    """Each thread has inputs of its own, half of them equal to its previous call's. Concurrent runs don't interfere."""
    plan, _ = bound()
    plan.run(torch.tensor([1]), torch.tensor([0]))
    failed: list[BaseException] = []

    def work(number: int, runs: int) -> None:
        try:
            lengths, rows = torch.full((8,), number + 1), torch.arange(8)
            for run in range(runs // 2):
                plan.run(lengths, rows)
                plan.run(lengths[: 1 + run % 8], rows[: 1 + run % 8])
        except BaseException as error:
            failed.append(error)

    for runs in (100_000, 400_000, 500_000):
        threads = [threading.Thread(target=work, args=(number, runs // 4)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        flat(f"{runs} runs more")
    assert failed == []
    assert plan.launches == 1_000_001


def test_twenty_thousand_plans(flat: Callable[[str], None]) -> None:
    for count in (2_000, 8_000, 10_000):
        for number in range(count):
            plan, buffers = bound(2 + number % 7)
            plan.run(torch.tensor([3, 5]), torch.tensor([1, 0]))
            assert buffers[2].cache_seqlens is not None
            assert buffers[2].cache_seqlens[:2].tolist() == [3, 5]
        flat(f"{count} plans more")


def test_two_thousand_configurations(
    flat: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is emitted, keyed, looked up, published and found again, in a cache that stays below its size bound."""
    made = loader.load(KernelConfig(fields=("cache_seqlens",), target="cpu"))

    def copies(recipe: Any, tools: Any, *, stage: Path, **bounds: Any) -> compiler.Build:
        for name in made.manifest["files"]:
            (stage / name).write_bytes((made.path.parent / name).read_bytes())
        return compiler.Build(made.path.name, str(made.manifest["source_file"]), "", 0.0, {}, {})

    monkeypatch.setattr(compiler, "build", copies)
    monkeypatch.setenv(collect.MAX_SIZE_VARIABLE, "20M")
    monkeypatch.setattr(collect, "FRESH_SECONDS", 0.0)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # would take most of the test's time
    store = Store(tmp_path / "cache")
    configs = (
        KernelConfig(fields=("cache_seqlens", "real_page_table"), num_backends=n, page_size=size, target="cpu")
        for n in (1, 2)
        for size in range(2, 1002)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for count in (200, 800, 1000):
            for config, _ in zip(configs, range(count), strict=False):
                assert render(config)
                assert loader.lookup(config, (), store) is None
                entry, built = loader.ensure(config, store=store)
                assert built
                assert loader.lookup(config, (), store)[0] == entry  # type: ignore[index]
            flat(f"{count} configurations more")
    assert sum(collect.sizes(store).values()) <= 20 * 2**20
    assert len(os.listdir(store.root / "locks")) == len(os.listdir(store.root / "staging")) == 0
