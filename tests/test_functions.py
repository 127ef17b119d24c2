"""The three functions that engines call: broadcast, precompute, copy. They agree with the reference and each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onelaunch
import pytest
import support
import torch
from cases import BY_BATCH, CONFIGURATIONS, Shape, batch
from checker import Scene
from onelaunch import KernelConfig, MetadataBuffers
from onelaunch.spec import reference
from support import POISON, SIX_FIELDS, Poisoned, assert_same

pytestmark = pytest.mark.usefixtures("quick_builds")
SEVEN = support.SEVEN_FIELDS
MODES: dict[str, dict[str, Any]] = {
    "decode": {},
    "verify": {"mode": "target_verify", "next_n": 4},
    "extend": {"mode": "draft_extend", "next_n": 3},
    "variable": {"mode": "draft_extend", "extend": "variable"},
}


def call_settings(scene: Scene) -> dict[str, Any]:
    """max_len, top-k and page size, as these functions name them."""
    config = scene.config
    return {"max_len": scene.columns, "nsa_index_topk": config.index_topk, "real_page_size": config.page_size}


def mode_of(scene: Scene) -> dict[str, Any]:
    config = scene.config
    extends = scene.extend_seq_lens if config.extend == "variable" else None
    return {"mode": config.mode, "next_n": config.next_n, "extend_seq_lens": extends}


def lists_of(backends: Sequence[Poisoned]) -> dict[str, Any]:
    """The lists of destinations, by argument name."""
    names = [name for name in SEVEN if getattr(backends[0].buffers, name) is not None]
    missing: dict[str, Any] = {f"{name}_list": None for name in SIX_FIELDS}
    return missing | {f"{name}_list": [getattr(b.buffers, name) for b in backends] for name in names}


def broadcast(scene: Scene, **more: Any) -> None:
    onelaunch.fused_metadata_precompute_and_broadcast_cuda(
        scene.seq_lens,
        scene.req_pool_indices,
        scene.req_to_token,
        **lists_of(scene.backends),
        **call_settings(scene),
        **mode_of(scene),
        **more,
    )


def precompute(scene: Scene, out: MetadataBuffers | None = None) -> MetadataBuffers:
    inputs = scene.seq_lens, scene.req_pool_indices, scene.req_to_token
    settings = {**call_settings(scene), **mode_of(scene), "out": out}
    mode, next_n, extends = (settings.pop(name) for name in ("mode", "next_n", "extend_seq_lens"))
    if mode == "decode":
        return onelaunch.precompute_decode_metadata_cuda(*inputs, **settings)
    if mode == "target_verify":
        return onelaunch.precompute_target_verify_metadata_cuda(*inputs, next_n=next_n, **settings)
    rows = scene.rows if extends is not None and out is None else None
    return onelaunch.precompute_draft_extend_metadata_cuda(
        *inputs, next_n=next_n, extend_seq_lens=extends, rows=rows, **settings
    )


def scene_for(
    device: torch.device, shape: Shape, mode: str = "decode", n: int = 3, fields: Sequence[str] = SEVEN, **more: Any
) -> Scene:
    settings = {"extent": "full", "page_size": 16, "index_topk": 100, "fields": tuple(fields), **MODES[mode], **more}
    return Scene(KernelConfig(num_backends=n, **settings), shape, device)


SMALL = {"extends": (0, 3, 1, 0, 2, 7, 0)}
SHAPES = (
    batch(0, 9, **SMALL),
    batch(1, 1, **SMALL),
    batch(7, 1000, **SMALL),
    batch(33, 1000, max_len=640, **SMALL),
    batch(257, 100, max_len=65, input_stride=2, **SMALL),
)


@pytest.mark.parametrize(
    ("n", "page_size", "mode"),
    [(1, 1, "decode"), (3, 16, "decode"), (7, 16, "decode"), (3, 16, "verify"), (3, 1, "extend"), (2, 16, "variable")],
)
def test_broadcast(device: torch.device, n: int, page_size: int, mode: str) -> None:
    for shape in SHAPES:
        scene = scene_for(device, shape, mode, n, page_size=page_size)
        for _ in range(2):  # the second call finds the plan of the first
            broadcast(scene)
            scene.compare()
    live = scene_for(device, SHAPES[3], mode, n, page_size=page_size, extent="live")
    broadcast(live, extent="live")
    live.compare()


@pytest.mark.parametrize("left_out", [*SIX_FIELDS, "everything but cu_seqlens_k"])
def test_a_list_that_is_none_is_left_out(device: torch.device, left_out: str) -> None:
    fields = ("cu_seqlens_k",) if left_out not in SIX_FIELDS else tuple(f for f in SIX_FIELDS if f != left_out)
    scene = scene_for(device, batch(8, 300), n=2, fields=fields)
    settings = {**call_settings(scene), "max_len": 300}
    onelaunch.fused_metadata_precompute_and_broadcast_cuda(
        scene.seq_lens, scene.req_pool_indices, scene.req_to_token, **lists_of(scene.backends), **settings
    )
    scene.compare()


@pytest.mark.parametrize(
    ("page_size", "mode"), [(1, "decode"), (3, "decode"), (3, "verify"), (1, "extend"), (3, "variable")]
)
def test_precompute_allocates_exact_shapes(device: torch.device, page_size: int, mode: str) -> None:
    for shape in SHAPES:
        exact = shape.replace(table_columns=shape.max_len or shape.width, spare_rows=0)
        scene = scene_for(device, exact, mode, 1, page_size=page_size, fields=SIX_FIELDS if mode == "decode" else SEVEN)
        made, wanted = precompute(scene), scene.expected[0]
        assert (made.real_page_table is made.page_indices) == (page_size == 1)
        assert (made.seqlens_expanded is made.cache_seqlens) == (mode == "decode")
        for field, tensor in wanted.items():
            got = getattr(made, field.name)
            assert got.shape == tensor.shape, field.name
            assert torch.equal(got, tensor), field.name
        assert {field.name for field, _ in made.items()} == set(SEVEN)


@pytest.mark.parametrize("mode", MODES)
def test_precompute_into_given_buffers(device: torch.device, mode: str) -> None:
    for fields in (SEVEN, ("cu_seqlens_k", "real_page_table")):
        scene = scene_for(device, batch(20, 300, max_len=200, **SMALL), mode, 1, fields)
        out = scene.backends[0].buffers
        assert precompute(scene, out) is out
        scene.compare()


@pytest.mark.parametrize("mode", MODES)
def test_precompute_then_copy_is_the_broadcast(device: torch.device, mode: str) -> None:
    shape = batch(21, 250, **SMALL)
    for page_size in (1, 16) if mode == "decode" else (16,):
        scene = scene_for(device, shape, mode, page_size=page_size)
        made = precompute(scene)
        onelaunch.fused_metadata_copy_cuda(made, support.buffers_of(scene.backends), mode=scene.config.mode)
        scene.compare()
    # Copy the first half of the requests, and their rows.
    half, rows = 10, 10 * scene.config.next_n
    part: dict[str, Any] = {"next_n": scene.config.next_n} if mode in ("verify", "extend") else {}
    if mode == "variable":
        rows = part["rows"] = int(scene.extend_seq_lens[:half].sum())
    copied = scene_for(device, shape, mode)
    onelaunch.fused_metadata_copy_cuda(
        made, support.buffers_of(copied.backends), mode=scene.config.mode, bs=half, **part
    )
    wanted = support.plain_copy(copied.backends[0].buffers)
    for _, tensor in wanted.items():
        tensor.fill_(POISON)
    reference.copy(support.plain_copy(made), [wanted], bs=half, rows=rows)
    assert_same(copied.backends, wanted)


def copy(scene: Scene) -> None:
    targets = support.buffers_of(scene.backends)
    onelaunch.fused_metadata_copy_cuda(scene.source, targets, mode=scene.config.mode)


# What engines capture: a call that allocates nothing, on tensors that stay.
CAPTURABLE = {
    "broadcast": broadcast,
    "precompute": lambda scene: precompute(scene, scene.backends[0].buffers),
    "copy": copy,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CAPTURABLE)
def test_inputs_changed_in_place(device: torch.device, name: str, mode: str) -> None:
    """Later calls of an engine, and replays of its graph, see other lengths, rows and tokens in the same memory."""

    def scene_of(seed: int) -> Scene:
        # The same number of rows each time, in another order.
        extends = (0, 3, 1, 0, 2, 7, 0)
        shape = batch(21, 250, page_size=seed, seed=seed, spare_rows=0, extends=(*extends[seed:], *extends[:seed]))
        if name == "copy":  # a copy takes any number of rows
            config = KernelConfig(operation="copy", mode=MODES[mode].get("mode", mode), num_backends=3, fields=SEVEN)
            return Scene(config, shape, device)
        return scene_for(device, shape, mode, 1 if name == "precompute" else 3)

    scene = scene_of(0)

    def call() -> object:
        return CAPTURABLE[name](scene)

    call()  # builds and binds, which is refused during a capture
    again = support.captured(call).replay if device.type == "cuda" else call
    for seed in range(1, 5):
        scene.take_inputs(scene_of(seed))
        support.poison(scene.backends)
        again()
        scene.compare()


def test_precompute_into_buffers_of_another_mode_is_another_plan(device: torch.device) -> None:
    """The table of plans knows the mode: a verify must not find the plan of a decode step on the same tensors."""
    out = support.destination(SEVEN, 12, 90, 16, requests=12, device=device)
    pool = support.token_pool(61, 90, device=device)
    seq_lens = torch.tensor(support.lengths(4, 90, 16), device=device)
    rows = torch.tensor(support.pool_rows(4, 61), device=device)
    arguments: dict[str, Any] = {"max_len": 90, "nsa_index_topk": 9, "real_page_size": 16, "out": out.buffers}
    settings: dict[str, Any] = {"index_topk": 9, "page_size": 16, "extent": "full"}
    wanted = support.plain_copy(out.buffers)
    for next_n in (0, 1, 3, 2):
        if next_n:
            onelaunch.precompute_target_verify_metadata_cuda(seq_lens, rows, pool, next_n=next_n, **arguments)
            more: dict[str, Any] = {"mode": "target_verify", "next_n": next_n}
        else:
            onelaunch.precompute_decode_metadata_cuda(seq_lens, rows, pool, **arguments)
            more = {}
        reference.refresh([wanted], seq_lens.cpu(), rows.cpu(), pool.cpu(), **settings, **more)
        assert_same([out], wanted)


def test_a_destination_that_changed_in_place_is_noticed(device: torch.device) -> None:
    """The functions look their plan up by the tensors' properties at each call, not by object identity."""
    pool = support.token_pool(61, 300, device=device)
    seq_lens = torch.tensor([3, 64, 100], device=device)
    rows = torch.tensor([7, 0, 60], device=device)
    memory = torch.full((8 * 300,), POISON, dtype=torch.int32, device=device)
    table, copied = memory[: 4 * 300].view(4, 300), torch.full((4, 300), POISON, dtype=torch.int32, device=device)
    numbers = {"nsa_index_topk": 100, "real_page_size": 64, "max_len": 100}
    expected = pool[rows, :100]

    def broadcast_table() -> None:
        onelaunch.fused_metadata_precompute_and_broadcast_cuda(
            seq_lens, rows, pool, None, None, [table], None, None, **numbers
        )

    def precompute_table() -> None:
        onelaunch.precompute_decode_metadata_cuda(
            seq_lens, rows, pool, out=MetadataBuffers(page_indices=table), **numbers
        )

    for size, stride in (((4, 300), (300, 1)), ((4, 100), (300, 1)), ((4, 100), (100, 1)), ((3, 100), (250, 1))):
        table.as_strided_(size, stride)
        copied.as_strided_(size, stride)
        for call in (broadcast_table, precompute_table):
            memory.fill_(POISON)
            call()
            assert torch.equal(table[:3, :100], expected)
            assert int((memory != POISON).sum()) == 300
        onelaunch.fused_metadata_copy_cuda(
            MetadataBuffers(page_indices=table), MetadataBuffers(page_indices=copied), bs=3, max_len=100
        )
        assert torch.equal(copied[:3, :100], expected)
    table.resize_(4, 99)
    memory.fill_(POISON)
    with pytest.raises(onelaunch.ArgumentError, match="max_len is 100"):
        broadcast_table()
    assert (memory == POISON).all()


# ------------------------------------------------------------------------------------------------ copies


@pytest.mark.parametrize("n", [1, 2, 8, 9, 64])
def test_copy_to_n(device: torch.device, n: int) -> None:
    for shape in (batch(1, 1), batch(7, 1_101), batch(33, 90), batch(257, 17)):
        scene = Scene(KernelConfig(operation="copy", num_backends=n, fields=SEVEN), shape, device)
        targets = support.buffers_of(scene.backends)
        onelaunch.fused_metadata_copy_cuda(scene.source, targets[0] if n == 1 else targets, bs=len(shape.lengths))
        scene.compare()


def source_and_targets(
    device: torch.device, bs: int, width: int, fields: Sequence[str], target_width: int | None = None
) -> tuple[MetadataBuffers, list[Poisoned]]:
    """Random numbers in every field: a copy must not depend on what they mean."""
    source = support.destination(BY_BATCH, bs, width, 16, strides="odd", device=device).buffers
    numbers = torch.Generator().manual_seed(bs + width)
    for _, tensor in source.items():
        tensor.copy_(torch.randint(-(2**31), 2**31 - 1, tensor.shape, generator=numbers, dtype=torch.int64))
    return source, [support.destination(fields, bs, target_width or width, 16, device=device) for _ in range(2)]


def check_copy(source: MetadataBuffers, backends: list[Poisoned], wanted: dict[str, Any], **arguments: Any) -> None:
    onelaunch.fused_metadata_copy_cuda(source, support.buffers_of(backends), **arguments)
    expected = support.plain_copy(backends[0].buffers)
    for _, tensor in expected.items():
        tensor.fill_(POISON)
    reference.copy(support.plain_copy(source), [expected], **wanted)
    assert_same(backends, expected)


@pytest.mark.parametrize("fields", [("cache_seqlens",), ("nsa_cu_seqlens_k",), ("real_page_table",), SIX_FIELDS])
def test_copy_of_fewer_fields_than_the_source_has(device: torch.device, fields: tuple[str, ...]) -> None:
    check_copy(*source_and_targets(device, 33, 200, fields), {"bs": 33})


@pytest.mark.parametrize(
    ("wanted", "arguments"),
    [
        ({"bs": 0}, {"bs": 0}),
        ({"bs": 5, "columns": 0, "page_columns": 0}, {"bs": 5, "max_len": 0, "real_page_size": 16}),
        ({"bs": 20, "columns": 70}, {"max_len": 70}),
        ({"bs": 20, "columns": 70, "page_columns": 5}, {"max_len": 70, "real_page_size": 16}),
    ],
)
def test_copy_of_a_part(device: torch.device, wanted: dict[str, Any], arguments: dict[str, Any]) -> None:
    check_copy(*source_and_targets(device, 20, 200, SIX_FIELDS, 210), wanted, **arguments)
    if wanted.get("page_columns"):  # the destinations need no more columns than are copied
        check_copy(*source_and_targets(device, 20, 200, SIX_FIELDS, 70), wanted, **arguments)


def test_copy_of_pages_of_one_token(device: torch.device) -> None:
    """With pages of one token both names are one tensor, in the source and in the destinations."""
    config = CONFIGURATIONS["one token per page"]
    scene = Scene(config.replace(extent="full"), batch(6, 50), device)
    made = precompute(scene)
    assert made.real_page_table is made.page_indices
    for backend in scene.backends:
        backend.buffers.real_page_table = backend.buffers.page_indices
        backend.storages["real_page_table"] = backend.storages["page_indices"]
    for expected in scene.expected[:1]:
        expected.real_page_table = expected.page_indices
    onelaunch.fused_metadata_copy_cuda(made, support.buffers_of(scene.backends))
    scene.compare()
