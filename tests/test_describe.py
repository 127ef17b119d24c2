"""onelaunch describe: the bytes are what a refresh writes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import checker
import onelaunch
import pytest
import torch
from cases import batch
from click.testing import CliRunner
from onelaunch import FIELDS, PRESETS, ArgumentError, KernelConfig, preset
from onelaunch.cli.lab.bench.scene import Scene
from onelaunch.cli.main import app
from onelaunch.inspect.traffic import traffic
from onelaunch.spec.vectors import described
from support import ALL_FIELDS, POISON, POISON_BYTE, buffers_of, destination, token_pool

EVIDENCE = json.loads((Path(__file__).parent / "gpu" / "evidence.json").read_text(encoding="utf-8"))


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, ["describe", *words])


@pytest.mark.parametrize(("bs", "width"), [(3, 131), (33, 517)])
@pytest.mark.parametrize("name", PRESETS)
def test_what_a_refresh_of_a_preset_writes_is_what_it_says(name: str, bs: int, width: int) -> None:
    config = PRESETS[name].replace(padding_len=None)  # describe doesn't count padding
    shape = batch(bs, width, max_indices=10**6, extends=(2, 0, 1, 5, 0))
    scene = checker.Scene(config, shape)
    if scene.captured_size is not None:
        scene.captured_size = bs
    scene.run(scene.bind())
    moved = traffic(
        config,
        list(shape.lengths),
        width,
        rows=scene.extend_seq_lens.tolist(),
        page_size=scene.page_size,
        num_sms=shape.num_sms,
        num_sm_parts=shape.num_sm_parts,
    )
    for written in moved.written:
        tensors = {t.data_ptr(): t for t in (getattr(b.buffers, written.field) for b in scene.backends)}
        assert written.tensors == len(tensors)
        assert written.bytes == sum(map(_changed_bytes, tensors.values())), written.field
        size = next(iter(tensors.values())).element_size()
        assert written.bytes == pytest.approx(size * written.tensors * math.prod(written.shape))
    assert tuple(written.field for written in moved.written) == config.fields
    assert moved.bytes_written == sum(written.bytes for written in moved.written)
    assert moved.rows == scene.rows


def _changed_bytes(tensor: torch.Tensor) -> int:
    if tensor.dtype == torch.bool:
        return int((tensor.view(torch.uint8) != POISON_BYTE).sum())
    return int((tensor != POISON).sum()) * tensor.element_size()


@pytest.mark.parametrize(
    ("extent", "fields", "page_size"),
    [
        ("live", ALL_FIELDS, 16),
        ("full", tuple(name for name in ALL_FIELDS if name != "seqlens_expanded"), 4),
        ("live", ("cache_seqlens", "cu_seqlens_k", "real_page_table"), 8),
        ("live", ("kv_indptr", "kv_indices"), 1),
    ],
)
@pytest.mark.parametrize(
    "facts",
    [
        {"index_kpool": 2},
        {"mode": "target_verify", "next_n": 3, "seqlen_offsets": (5, 5)},
        {"mode": "draft_extend", "next_n": 2, "seqlen_offsets": (0, 7)},
        {"mode": "draft_extend", "extend": "variable"},
    ],
    ids=("pools", "verify", "extend", "variable"),
)
def test_what_a_refresh_writes_is_what_it_says(
    extent: str, fields: tuple[str, ...], page_size: int, facts: dict[str, Any]
) -> None:
    lengths, width, rows = [0, 1, 33, 64, 70], 64, [2, 0, 3, 1, 1]
    facts = {"index_kpool": 1, **facts}
    room = {"kv_indices": (300,)}
    backends = [
        destination(fields, 18, width, page_size, requests=8, index_kpool=facts["index_kpool"], shapes=room)
        for _ in range(2)
    ]
    plan = onelaunch.bind(
        buffers_of(backends),
        req_to_token=token_pool(8, width),
        page_size=page_size,
        index_topk=32,
        extent=extent,
        **facts,
    )
    variable = plan.config.extend == "variable"
    plan.run(torch.tensor(lengths), torch.arange(5), torch.tensor(rows) if variable else None)
    moved = traffic(plan.config, lengths, width, rows=rows)
    assert tuple(written.field for written in moved.written) == plan.config.fields
    for written in moved.written:
        own = sum(int((backend.storages[written.field] != POISON).sum()) for backend in backends)
        assert (written.tensors, written.bytes) == (2, 4 * own), written.field


def test_a_shared_table_is_written_as_far_as_the_longest_reaches() -> None:
    backends = [destination(("cache_seqlens", "page_indices"), 4, 40, 64) for _ in range(3)]
    for backend in backends[1:]:
        backend.buffers.page_indices = backends[0].buffers.page_indices
    plan = onelaunch.bind(buffers_of(backends), req_to_token=token_pool(4, 40), seqlen_offsets=(1, 9, 4))
    plan.run(torch.tensor([3, 0, 35]), torch.arange(3))
    moved = traffic(plan.config, [3, 0, 35], 40)
    (table,) = (written for written in moved.written if written.field == "page_indices")
    assert (table.tensors, table.bytes) == (1, 4 * (12 + 9 + 40))
    assert table.bytes == 4 * int((backends[0].storages["page_indices"] != POISON).sum())
    assert moved.bytes_read == 2 * 3 * 8 + 4 * (12 + 9 + 40), "each token is read once"


def test_bytes_by_hand() -> None:
    # Two lengths and two sums per request, two leading zeros; 130 tokens; 1 + 1 + 2 pages.
    config = KernelConfig(num_backends=2)
    assert traffic(config, [1, 64, 65]).bytes_written == 4 * 2 * (3 + 4 + 3 + 4 + 130 + 4)
    assert traffic(config.replace(page_size=1), [1, 64, 65]).bytes_written == 4 * 2 * (3 + 4 + 3 + 4 + 130)
    assert traffic(config.replace(extent="full"), [1, 64, 65]).bytes_written == 4 * 2 * (3 + 4 + 3 + 4 + 3 * 65 + 3 * 2)
    verify = traffic(preset("nsa-target-verify-3").replace(num_backends=1), [60, 1])
    assert verify.width == 64
    assert verify.bytes_written == 4 * (2 + 3 + 4 * (64 + 5) + 8 + 9 + 4 * (1 + 1) + 8)
    assert verify.bytes_read == 2 * 8 + 2 * 8 + 4 * (64 + 5), "a token is read once for all rows"
    variable = traffic(preset("nsa-draft-extend-3-variable"), [60, 7], rows=[2, 0])
    assert variable.bytes_read == 3 * 2 * 8 + 4 * 60, "no token of a request without rows is read"


def test_the_bench_counts_the_same_bytes() -> None:
    timed = traffic(preset("nsa-decode-3"), [4096])
    assert timed.bytes == EVIDENCE["timings"]["1x4k"]["bytes"]
    scene = Scene([5, 600, 1024], 3, 900, 64, torch.device("cpu"))
    assert scene.bytes() == traffic(preset("nsa-decode-3"), [5, 600, 1024], 900).bytes
    scene = Scene([5, 600, 1024], 3, 900, 1, torch.device("cpu"))
    assert (
        scene.bytes("full") == traffic(preset("nsa-decode-3-page1").replace(extent="full"), [5, 600, 1024], 900).bytes
    )


def test_shared_tables_other_dtypes_and_copies() -> None:
    plain = traffic(KernelConfig(num_backends=3), [100, 100])
    shared = traffic(KernelConfig(num_backends=3, distinct=(("page_indices", 1),)), [100, 100])
    assert plain.bytes_written - shared.bytes_written == 4 * 200 * 2
    wide = traffic(KernelConfig(num_backends=3, req_to_token_dtype="int64", seq_lens_dtype="int32"), [100, 100])
    assert wide.bytes_read - plain.bytes_read == 4 * 200 - 4 * 2
    pages = traffic(preset("nsa-decode-3-pages-only"), [100, 100])
    assert pages.bytes_read == 2 * 8 + 2 * 8 + 4 * 2 * 2, "only one token per page is read"
    copy = traffic(KernelConfig(operation="copy", num_backends=3), [100, 100], 100)
    assert copy.bytes_written == 3 * copy.bytes_read
    assert traffic(KernelConfig(), []).bytes_written == 4 * 2
    for lengths, width in (([-1], None), ([1], -1)):
        with pytest.raises(ArgumentError, match="negative"):
            traffic(KernelConfig(), lengths, width)
    with pytest.raises(ArgumentError, match="rows has 1 numbers and lengths has 2"):
        traffic(preset("nsa-draft-extend-3-variable"), [1, 2], rows=[3])


def test_the_command_prints_every_field_and_the_sum() -> None:
    result = invoke("nsa-decode-3", "--batch", "64", "--length", "8192")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    table = {line.split()[0]: line for line in lines if line.split() and line.split()[0] in FIELDS}
    assert tuple(table) == preset("nsa-decode-3").fields
    for name, line in table.items():
        assert FIELDS[name].shape in line
        assert described(preset("nsa-decode-3"), name) in line
    assert table["page_indices"].split()[-5:] == ["64", "x", "8192", "3", f"{4 * 3 * 64 * 8192:,}"]
    assert lines[-1] == "reads 2 MB, writes 6 MB, in one launch"


@pytest.mark.parametrize("name", PRESETS)
def test_the_command_says_what_is_counted_for_every_preset(name: str) -> None:
    words = ("--batch", "3", "--length", "100", "--rows", "2", "--page-size", "16", "--num-sms", "11", "--json")
    facts = json.loads(invoke(name, *words).stdout)
    moved = traffic(PRESETS[name], [100] * 3, rows=[2] * 3, page_size=16, num_sms=11)
    assert (facts["bytes_written"], facts["bytes_read"]) == (moved.bytes_written, moved.bytes_read)
    assert (facts["rows"], facts["width"]) == (moved.rows, moved.width)
    for field, written in zip(facts["fields"], moved.written, strict=True):
        assert field["bytes"] == written.bytes
        assert ("bs" in field["shape"]) <= (moved.rows == 3 or FIELDS[written.field].per == "request")


def test_as_json_and_of_an_entry() -> None:
    config = KernelConfig(fields=("cache_seqlens",), target="cpu")
    facts = json.loads(invoke("--set", config.settings(), "--batch", "3", "--length", "9", "--json").stdout)
    assert facts["configuration"] == config.to_dict()
    assert (facts["bytes_written"], facts["bytes_read"]) == (12, 24)
    assert facts["fields"][0] | {} == {
        "name": "cache_seqlens",
        "shape": "[bs]",
        "formula": "seq_len",
        "written": [3],
        "tensors": 1,
        "bytes": 12,
    }
    key = onelaunch.specialize(config).key
    assert json.loads(invoke(key, "--batch", "3", "--length", "9", "--json").stdout)["symbol"] == facts["symbol"]


@pytest.mark.parametrize(
    "words", [["--batch", "0"], ["--batch", str(10**12)], ["--length", "-1"], ["--width", "-1"], ["no-such"]]
)
def test_what_it_refuses(words: list[str]) -> None:
    result = invoke(*words)
    assert (result.exit_code, result.stdout) == (2, "")
