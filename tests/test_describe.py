"""onelaunch describe: the bytes are what a refresh writes, and the estimate is near what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onelaunch
import pytest
import torch
from onelaunch import FIELDS, ArgumentError, KernelConfig, preset
from onelaunch.cli.main import app
from onelaunch.cli.measure import Scene
from onelaunch.cli.replay import bytes_of_refresh
from onelaunch.estimate import H200, traffic
from support import POISON, buffers_of, destination, token_pool
from typer.testing import CliRunner

EVIDENCE = json.loads((Path(__file__).parent / "gpu" / "evidence.json").read_text(encoding="utf-8"))


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, ["describe", *words])


@pytest.mark.parametrize(
    ("extent", "fields", "page_size"),
    [
        ("live", tuple(FIELDS), 16),
        ("full", tuple(name for name in FIELDS if name != "seqlens_expanded"), 4),
        ("live", ("cache_seqlens", "cu_seqlens_k", "real_page_table"), 8),
    ],
)
def test_what_a_refresh_writes_is_what_it_says(extent: str, fields: tuple[str, ...], page_size: int) -> None:
    lengths, width = [0, 1, 33, 64, 70], 64
    backends = [destination(fields, 8, width, page_size) for _ in range(2)]
    plan = onelaunch.bind(
        buffers_of(backends), req_to_token=token_pool(8, width), page_size=page_size, index_topk=32, extent=extent
    )
    plan.run(torch.tensor(lengths), torch.arange(5))
    changed = sum(int((storage != POISON).sum()) for backend in backends for storage in backend.storages.values())
    moved = traffic(plan.config, lengths, width)
    assert moved.bytes_written == 4 * changed
    for written in moved.written:
        assert written.tensors == 2
        own = sum(int((backend.storages[written.field] != POISON).sum()) for backend in backends)
        assert written.bytes == 4 * own
        assert written.bytes == 8 * np.prod(written.shape)


def test_it_agrees_with_the_replay_and_the_timings() -> None:
    lengths, width = [5, 600, 1024], 1024
    for extent in ("live", "full"):
        config = preset("nsa-decode-3").replace(extent=extent)
        moved = traffic(config, lengths, width)
        facts: dict[str, Any] = {"backends": 3, "page_size": 64, "extent": extent, "max_len": width}
        assert moved.bytes_written == bytes_of_refresh(np.array(lengths), **facts)
        scene: Any = SimpleNamespace(lengths=lengths, width=width, backends=3, page_size=64)
        assert moved.bytes_written + moved.bytes_read == Scene.bytes(scene, extent)
    timed = traffic(preset("nsa-decode-3"), [8192] * 64)
    assert timed.bytes_written + timed.bytes_read == EVIDENCE["timings"]["64 x 8192"]["bytes"]


def test_shared_tables_other_dtypes_and_copies() -> None:
    plain = traffic(KernelConfig(num_backends=3), [100, 100])
    shared = traffic(KernelConfig(num_backends=3, distinct=(("page_indices", 1),)), [100, 100])
    assert plain.bytes_written - shared.bytes_written == 4 * 200 * 2
    wide = traffic(KernelConfig(num_backends=3, req_to_token_dtype="int64", seq_lens_dtype="int32"), [100, 100])
    assert wide.bytes_read - plain.bytes_read == 4 * 200 - 4 * 2
    pages = traffic(preset("nsa-decode-3-pages-only"), [100, 100])
    assert pages.bytes_read == 2 * 8 + 2 * 8 + 4 * 2 * 2, "only one token a page is read"
    copy = traffic(KernelConfig(operation="copy", num_backends=3), [100, 100], 100)
    assert copy.bytes_written == 3 * copy.bytes_read
    assert traffic(KernelConfig(), []).bytes_written == 4 * 2
    for lengths, width in (([-1], None), ([1], -1)):
        with pytest.raises(ArgumentError, match="negative"):
            traffic(KernelConfig(), lengths, width)


def test_the_estimate_is_near_what_was_measured() -> None:
    """Of every shape in the evidence; a kernel that changed its speed needs other constants, and says so here."""
    assert EVIDENCE["device"] == H200.name
    for shape, timing in EVIDENCE["timings"].items():
        estimate = H200.floor_us + timing["bytes"] / H200.bytes_per_us
        assert abs(estimate / timing["refresh_us"] - 1) < 0.2, (shape, estimate, timing["refresh_us"])


def test_the_command_prints_every_field_and_the_sum() -> None:
    result = invoke("nsa-decode-3", "--batch", "64", "--length", "8192")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    table = {line.split()[0]: line for line in lines if line.split() and line.split()[0] in FIELDS}
    assert tuple(table) == preset("nsa-decode-3").fields
    for name, line in table.items():
        assert FIELDS[name].shape in line
        assert FIELDS[name].formula in line
    assert table["page_indices"].split()[-5:] == ["64", "x", "8192", "3", f"{4 * 3 * 64 * 8192:,}"]
    assert lines[-1].startswith(f"about 5.1 us on an {H200.name}")
    assert "an estimate" in lines[-1]


def test_as_json_and_of_an_entry() -> None:
    config = KernelConfig(fields=("cache_seqlens",), target="cpu")
    facts = json.loads(invoke("--set", config.settings(), "--batch", "3", "--length", "9", "--json").stdout)
    assert facts["configuration"] == config.to_dict()
    assert (facts["bytes_written"], facts["bytes_read"]) == (12, 24)
    assert facts["fields"][0] | {} == {
        "name": "cache_seqlens",
        "shape": "[bs]",
        "formula": FIELDS["cache_seqlens"].formula,
        "written": [3],
        "tensors": 1,
        "bytes": 12,
    }
    key = onelaunch.specialize(config).key
    assert json.loads(invoke(key, "--batch", "3", "--length", "9", "--json").stdout)["symbol"] == facts["symbol"]


@pytest.mark.parametrize("words", [["--batch", "0"], ["--length", "-1"], ["--width", "-1"], ["no-such"]])
def test_what_it_refuses(words: list[str]) -> None:
    result = invoke(*words)
    assert (result.exit_code, result.stdout) == (2, "")
