"""`onelaunch replay`: runs a plan on real traces and compares every destination with the reference."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onelaunch
import pytest
import torch
from click.testing import CliRunner
from onelaunch import MetadataBuffers
from onelaunch.cli.lab.replay.options import Extent, ReplayOptions, Verify, Writes
from onelaunch.cli.lab.replay.simulated import refresh_with_tensor_ops, run_replay
from onelaunch.cli.lab.replay.summary import Distribution
from onelaunch.cli.main import app
from onelaunch.cli.output import check_writable
from onelaunch.errors import ArgumentError

DATA = Path(__file__).parent / "data"
AZURE = DATA / "azure_2023_conversation.csv"
MOONCAKE = DATA / "mooncake_conversation.csv"

SMALL = ReplayOptions(AZURE, max_batch=8, context_len=1024, max_steps=40, verify=Verify.every, index_topk=600)


class CorruptingPlan:
    """A plan whose ``run`` also corrupts one element, in one step."""

    def __init__(self, plan: Any, corrupt: Callable[[], None], at: int) -> None:
        self._plan, self._corrupt, self._at = plan, corrupt, at
        self.runs = 0

    @property
    def launches(self) -> int:
        return int(self._plan.launches)

    @property
    def config(self) -> onelaunch.KernelConfig:
        return self._plan.config  # type: ignore[no-any-return]

    def run(self, *args: Any, **kwargs: Any) -> None:
        self._plan.run(*args, **kwargs)
        if self.runs == self._at:
            self._corrupt()
        self.runs += 1


def corrupt_at(
    monkeypatch: pytest.MonkeyPatch, step: int, backend: int, field: str, index: tuple[int, ...]
) -> list[int]:
    """Flips a bit of one destination element after ``step``. Returns a list to which the right value is appended."""
    bind = onelaunch.bind
    right: list[int] = []

    def binding(destinations: list[MetadataBuffers], **options: Any) -> CorruptingPlan:
        def corrupt() -> None:
            tensor = getattr(destinations[backend], field)
            right.append(int(tensor[index]))
            tensor[index] = right[0] ^ 1

        return CorruptingPlan(bind(destinations, **options), corrupt, step)

    monkeypatch.setattr(onelaunch, "bind", binding)
    return right


@pytest.mark.parametrize("extent", list(Extent))
@pytest.mark.parametrize("trace", [AZURE, MOONCAKE], ids=["azure", "mooncake"])
def test_replay_of_a_real_trace_has_no_mismatch(trace: Path, extent: Extent) -> None:
    # Each step stands for two seconds of traffic, so that the batch fills and requests wait after a few steps.
    options = dataclasses.replace(SMALL, trace=trace, extent=extent, step_ms=2000.0, pages=200)
    summary = run_replay(options)
    assert summary.steps == summary.launches == summary.verified_steps == 40
    assert summary.mismatches == 0
    assert summary.first_mismatch is None
    assert summary.batch.max == 8
    assert summary.queued_steps > 0
    # The whole buffers of three backends were compared, including their untouched part.
    width = 1024 + 71
    assert summary.elements_checked == 40 * 3 * (8 * (width + -(-width // 64)) + 2 * 8 + 2 * 9)
    assert 0 < summary.length.min <= summary.length.median <= summary.length.p95 <= summary.length.max <= 1024


def test_replay_to_the_end_with_padding_and_preemption() -> None:
    options = dataclasses.replace(
        SMALL, requests=12, max_steps=None, pad_batch=4, preempt_probability=0.02, backends=2, page_size=16
    )
    summary = run_replay(options)
    assert summary.finished == summary.requests == 12
    assert summary.preemptions > 0
    assert summary.steps == summary.launches > 40
    assert summary.mismatches == 0


@pytest.mark.parametrize("trace", [AZURE, MOONCAKE], ids=lambda trace: trace.stem)
@pytest.mark.parametrize("extent", Extent)
def test_verified_writes_leave_what_all_steps_make(trace: Path, extent: Extent) -> None:
    """Requests finish and are preempted, later requests move up, and rows and pages are reused."""
    options = dataclasses.replace(
        SMALL, trace=trace, extent=extent, writes=Writes.verified, preempt_probability=0.03, pad_batch=4, step_ms=1e5
    )
    summary = run_replay(options)
    assert (summary.steps, summary.verified_steps, summary.mismatches) == (40, 40, 0)
    assert summary.preemptions > 0
    assert summary.tiles is not None
    assert summary.tiles_written is not None
    assert 0 < summary.tiles_written < summary.tiles


def test_preempted_small_pool_on_long_prompts() -> None:
    options = dataclasses.replace(SMALL, trace=MOONCAKE, pages=60, step_ms=500.0, max_steps=60)
    summary = run_replay(options)
    assert summary.clipped_prompts > 0
    assert summary.queued_steps > 0
    assert summary.length.max == 1024
    assert summary.mismatches == 0


def test_pages_of_one_token_have_no_table_of_pages() -> None:
    summary = run_replay(dataclasses.replace(SMALL, page_size=1, max_steps=20))
    assert summary.mismatches == 0
    assert summary.timed_steps == 1
    width = 1024 + 9
    assert summary.elements_checked == 20 * 3 * (8 * width + 2 * 8 + 2 * 9)


@pytest.mark.parametrize(
    ("field", "index"),
    [
        ("cache_seqlens", (0,)),
        ("cu_seqlens_k", (1,)),
        ("page_indices", (0, 3)),
        # Beyond every live element, where the refresh must not write.
        ("page_indices", (7, 1094)),
        ("real_page_table", (7, 17)),
        ("nsa_cu_seqlens_k", (8,)),
    ],
)
def test_a_wrong_element_is_counted_and_named(
    monkeypatch: pytest.MonkeyPatch, field: str, index: tuple[int, ...]
) -> None:
    right = corrupt_at(monkeypatch, step=5, backend=1, field=field, index=index)
    summary = run_replay(dataclasses.replace(SMALL, max_steps=10))
    assert summary.mismatches == 1
    mismatch = summary.first_mismatch
    assert mismatch is not None
    assert (mismatch.step, mismatch.backend, mismatch.field, mismatch.index) == (5, 1, field, index)
    assert (mismatch.got, mismatch.expected) == (right[0] ^ 1, right[0])
    assert f"{field}[{', '.join(map(str, index))}] is {mismatch.got}" in str(mismatch)


def test_an_element_that_is_never_written_again_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables hardly change between steps, so values left by an earlier step must not pass for written ones."""
    bind = onelaunch.bind

    class IdlePlan(CorruptingPlan):
        def run(self, *args: Any, **kwargs: Any) -> None:
            if self.runs < self._at:
                self._plan.run(*args, **kwargs)
            self.runs += 1

    monkeypatch.setattr(onelaunch, "bind", lambda *args, **kw: IdlePlan(bind(*args, **kw), lambda: None, 3))
    one_request = dataclasses.replace(SMALL, requests=1, max_steps=4, backends=1)
    summary = run_replay(one_request)
    assert summary.launches == 3
    mismatch = summary.first_mismatch
    assert mismatch is not None
    assert mismatch.step == 3
    length = summary.length.max
    # Two lengths, two sums of two elements, and the live part of both tables.
    assert summary.mismatches == 2 + 4 + length + -(-length // 64)


def test_sample_checks_every_sixteenth_step_and_none_checks_none(monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = run_replay(dataclasses.replace(SMALL, verify=Verify.sample))
    assert sampled.verified_steps == 3  # 0, 16, 32 of 40
    assert sampled.timed_steps == 2  # 8, 24
    assert sampled.refresh_us is not None
    assert sampled.torch_us is not None
    assert min(sampled.refresh_us, sampled.torch_us) > 0
    assert sampled.mismatches == 0

    corrupt_at(monkeypatch, step=16, backend=0, field="page_indices", index=(0, 0))
    assert run_replay(dataclasses.replace(SMALL, verify=Verify.sample)).mismatches == 1
    unchecked = run_replay(dataclasses.replace(SMALL, verify=Verify.none))
    assert (unchecked.verified_steps, unchecked.elements_checked, unchecked.mismatches) == (0, 0, 0)


@pytest.mark.parametrize("bs", [1, 5])
def test_tensor_ops_do_the_same_refresh(bs: int) -> None:
    generator = torch.Generator().manual_seed(bs)
    pool = torch.randint(0, 2**30, (7, 333), dtype=torch.int32, generator=generator)
    lengths = torch.randint(1, 200, (bs,), generator=generator)
    rows = torch.randperm(6, generator=generator)[:bs] + 1
    max_len = int(lengths.max())

    def filled(*shape: int) -> torch.Tensor:
        return torch.full(shape, -7, dtype=torch.int32)

    sets = [
        MetadataBuffers(
            cache_seqlens=filled(6),
            cu_seqlens_k=filled(7),
            page_indices=filled(6, 333),
            nsa_cache_seqlens=filled(6),
            nsa_cu_seqlens_k=filled(7),
            real_page_table=filled(6, 6),
        )
        for _ in range(3)
    ]
    refresh_with_tensor_ops(sets, lengths, rows, pool, max_len=max_len, index_topk=100, page_size=64)

    clamped = [min(length, 100) for length in lengths.tolist()]
    for buffers in sets:
        expected = {
            "cache_seqlens": [*lengths.tolist(), *[-7] * (6 - bs)],
            # Element 0 is a constant that engines set up once.
            "cu_seqlens_k": [-7, *np.cumsum(lengths.tolist()).tolist(), *[-7] * (6 - bs)],
            "nsa_cache_seqlens": [*clamped, *[-7] * (6 - bs)],
            "nsa_cu_seqlens_k": [-7, *np.cumsum(clamped).tolist(), *[-7] * (6 - bs)],
        }
        for field, tensor in buffers.items():
            if field.name in expected:
                assert tensor.tolist() == expected[field.name]
        table, real = buffers.page_indices, buffers.real_page_table
        assert table is not None
        assert real is not None
        for r in range(6):
            live = pool[rows[r], :max_len].tolist() if r < bs else []
            assert table[r].tolist() == live + [-7] * (333 - len(live))
            pages = [slot // 64 for slot in live[::64]]
            assert real[r].tolist() == pages + [-7] * (6 - len(pages))


@pytest.mark.parametrize("values", [[3], [1, 2], [5, 1, 9, 9, 2], list(range(1, 101)), [7] * 95 + [8] * 5])
def test_distribution_agrees_with_numpy(values: list[int]) -> None:
    spread = Distribution.of_counts(np.bincount(values, minlength=200))
    for share, value in ((0, spread.min), (50, spread.median), (95, spread.p95), (100, spread.max)):
        assert value == np.percentile(values, share, method="inverted_cdf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"requests": 0}, "--requests is 0"),
        ({"max_steps": 0}, "--max-steps is 0"),
        ({"backends": 0}, "--backends is 0"),
        ({"index_topk": 0}, "--index-topk is 0"),
        ({"context_len": 0}, "context_len is 0"),
        ({"max_batch": 10**9}, r"needs [\d,]+ GiB.* Lower --max-batch \(1000000000\)"),
        ({"backends": 10**8}, r"Lower .*--backends \(100000000\)"),
        ({"pages": 2**31 - 1, "page_size": 1}, "GiB|int32"),
        ({"trace": DATA / "README.md"}, "line 1: the header has 0 columns arrival_ms"),
        ({"trace": DATA / "no.csv"}, "can't be opened"),
    ],
)
def test_wrong_options_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        run_replay(dataclasses.replace(SMALL, **change))


def test_each_step_is_reported() -> None:
    seen: list[tuple[int, int]] = []
    run_replay(dataclasses.replace(SMALL, max_steps=5, requests=30), lambda s, _, n: seen.append((s, n)))
    assert seen == [(1, 30), (2, 30), (3, 30), (4, 30), (5, 30)]


# ------------------------------------------------------------------------------------------------- command

ARGUMENTS = [str(AZURE), "--device", "cpu", "--max-batch", "4", "--context-len", "512", "--max-steps", "20"]


def test_command_prints_a_summary_and_writes_json(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    result = CliRunner().invoke(app, ["replay", *ARGUMENTS, "--json", str(file)])
    assert result.exit_code == 0, result.output
    lines = dict(line.split("  ", 1) for line in result.stdout.splitlines())
    facts = {name.strip(): value.strip() for name, value in lines.items()}
    summary = json.loads(file.read_text())
    assert summary["steps"] == summary["launches"] == 20
    assert summary["mismatches"] == 0
    assert summary["first_mismatch"] is None
    assert facts["launches"] == "20"
    assert facts["mismatches"].startswith("0 of ")
    assert facts["bytes written"] == f"{summary['bytes_written']:,}"
    assert "azure_2023_conversation.csv" in facts["trace"]
    assert facts["time"].startswith("not shown"), "a CPU's times were compared"
    assert "\x1b" not in result.output


def test_command_keeps_standard_output_for_json() -> None:
    result = CliRunner().invoke(app, ["replay", *ARGUMENTS, "--json", "-"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["steps"] == 20
    assert "mismatches" in result.stderr


def test_command_fails_on_a_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    corrupt_at(monkeypatch, step=2, backend=2, field="nsa_cache_seqlens", index=(0,))
    result = CliRunner().invoke(app, ["replay", *ARGUMENTS, "--verify", "every"])
    assert result.exit_code == 1
    assert "step 2, backend 2: nsa_cache_seqlens[0] is" in result.stdout


def test_command_explains_what_it_cannot_use(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("arrival_ms,input_tokens,output_tokens\n0,many,1\n")
    result = CliRunner().invoke(app, ["replay", str(trace), "--device", "cpu"])
    assert result.exit_code == 2
    assert f"onelaunch: {trace}, line 2, column input_tokens: 'many'" in result.stderr
    result = CliRunner().invoke(app, ["replay", *ARGUMENTS, "--json", str(tmp_path / "no" / "summary.json")])
    assert result.exit_code == 2
    assert "can't be written" in result.stderr


def test_what_can_be_written_is_known_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A user other than root may write to a device, but may not make files beside it.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in (Path("/dev"), tmp_path / "kept"))
    check_writable(Path("/dev/null"))
    check_writable(tmp_path / "new.json")
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "kept" / "file")
    with pytest.raises(PermissionError):
        check_writable(tmp_path / "link")
    with pytest.raises(FileNotFoundError):
        check_writable(tmp_path / "no" / "file")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_missing_device_is_explained() -> None:
    result = CliRunner().invoke(app, ["replay", str(AZURE), "--device", "cuda"])
    assert result.exit_code == 2
    assert "PyTorch sees no CUDA device" in result.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("trace", [AZURE, MOONCAKE], ids=["azure", "mooncake"])
def test_replay_on_the_gpu(trace: Path) -> None:
    options = dataclasses.replace(SMALL, trace=trace, context_len=4096, max_steps=200, step_ms=500.0)
    summary = run_replay(options)
    assert summary.device != "cpu"
    assert summary.steps == summary.launches == 200
    assert summary.mismatches == 0


def test_replay_on_a_terminal_shows_progress_and_a_table() -> None:
    arguments = [str(DATA / "azure_2023_conversation.csv"), "--device", "cpu", "--max-batch", "4"]
    command = [sys.executable, "-m", "onelaunch.cli.main", "replay", *arguments]
    master, slave = os.openpty()
    with subprocess.Popen(
        [*command, "--context-len", "256", "--verify", "none", "--step-ms", "500", "--requests", "2"],
        stdout=subprocess.PIPE,
        stderr=slave,
        text=True,
    ) as process:
        os.close(slave)
        shown = b""
        with contextlib.suppress(OSError):  # Linux raises EIO once no process has the terminal open
            while part := os.read(master, 4096):
                shown += part
        os.close(master)
        assert process.stdout is not None
        summary = process.stdout.read()
    assert process.returncode == 0, shown
    assert re.search(rb"step \d+, \d running, \d waiting .*\d+%", shown)
    assert "2 of 2 requests finished" in summary
    assert "0 (nothing was checked)" in summary
