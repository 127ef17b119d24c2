"""What a configuration decides in the emitted text: strategy, grid, tiles at once, and how pages are read."""

from __future__ import annotations

import re
from typing import Any

import pytest
from onelaunch import KernelConfig, render
from onelaunch.emit.render import device_files


@pytest.mark.parametrize(
    ("settings", "strategy", "split"),
    [
        ({}, "live", "own_blocks"),
        ({"mode": "target_verify", "next_n": 2}, "live", "own_blocks"),
        ({"seqlen_offsets": (1, 2), "num_backends": 2}, "live", "own_blocks"),
        ({"extent": "full"}, "equal", "tiles"),
        ({"fields": ("cache_seqlens", "real_page_table"), "page_fill": -1}, "equal", "tiles"),
        (
            {"fields": ("seqlens_expanded", "page_indices"), "mode": "draft_extend", "extend": "variable"},
            "variable",
            None,
        ),
        ({"fields": ("kv_indices",)}, "indices", None),
        ({"operation": "copy"}, "copy", None),
        ({"fields": ("cache_seqlens",)}, None, None),
    ],
    ids=str,
)
def test_the_host_divides_where_threads_would_have_to(
    settings: dict[str, Any], strategy: str | None, split: str | None
) -> None:
    """The host divides blocks among requests if lengths matter, and tiles among rows if all rows are equal."""
    config = KernelConfig(**settings)
    assert config.strategy == strategy
    source = render(config)
    assert ("std::uint32_t own_blocks;" in source) == (split == "own_blocks")
    assert ("std::uint32_t tiles;  // per row" in source) == (split == "tiles")
    assert ("split_of(params" in source) == (split is not None)
    assert ("const __grid_constant__ Split split" in source) == (split is not None)


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({}, "p.sm_count * kBlocksPerSm;"),
        ({"operation": "copy"}, "p.sm_count * kBlocksPerSm * 2;"),
        ({"fields": ("kv_indices",)}, "p.sm_count * kBlocksPerSm;"),
        (
            {"fields": ("seqlens_expanded", "page_indices"), "mode": "draft_extend", "extend": "variable"},
            "p.sm_count * kBlocksPerSm;",
        ),
        ({"extent": "full"}, None),
        ({"fields": ("cache_seqlens", "real_page_table"), "page_fill": -1}, None),
    ],
    ids=str,
)
def test_equal_rows_have_as_many_blocks_as_they_need(settings: dict[str, Any], limit: str | None) -> None:
    """Other kernels loop, with a number of blocks that suits the device. Equal rows need no loop."""
    config = KernelConfig(**settings)
    found = re.search(r"std::int64_t limit = (p\.sm_count.*?;)", render(config))
    assert (found[1] if found else None) == limit
    assert config.equal_rows == (limit is None)
    assert (config == config.replace(blocks_per_sm=7)) == (limit is None)


@pytest.mark.parametrize(
    ("fields", "backends", "limit"),
    [
        (("page_indices",), 1, 6),
        (("page_indices", "real_page_table"), 1, 6),
        (("real_page_table",), 1, 3),
        (("kv_indptr", "kv_indices"), 1, 6),
        (("kv_indptr", "kv_indices"), 2, 3),
    ],
)
def test_the_limit_of_the_blocks_of_small_tiles_is_half(fields: tuple[str, ...], backends: int, limit: int) -> None:
    page_size = 1 if "kv_indices" in fields else 64
    config = KernelConfig(fields=fields, num_backends=backends, blocks_per_sm=6, page_size=page_size)
    assert config.table_blocks_per_sm == limit
    assert config.replace(blocks_per_sm=1).table_blocks_per_sm == 1
    assert f"kBlocksPerSm = {limit};" in render(config)


@pytest.mark.parametrize(
    ("settings", "tiles"),
    [
        ({"num_backends": 3}, 2),
        ({"num_backends": 4}, 1),
        ({"num_backends": 8, "distinct": (("page_indices", 1),)}, 2),
        ({"num_backends": 2, "mode": "target_verify", "next_n": 2}, 2),
        ({"num_backends": 2, "seqlen_offsets": (1, 2)}, 1),
        ({"unroll": 4}, 1),
        ({"vector_bytes": 4}, 1),
        ({"num_backends": 7, "extent": "full"}, 2),
        ({"num_backends": 7, "fields": ("real_page_table",), "seqlen_offsets": tuple(range(7))}, 2),
        ({"fields": ("real_page_table",), "extent": "full"}, 1),
        ({"fields": ("real_page_table",), "writes": "verified"}, 1),
        ({"fields": ("real_page_table",), "unroll": 4}, 1),
    ],
    ids=str,
)
def test_a_warp_takes_two_tiles_at_once_where_registers_allow_it(settings: dict[str, Any], tiles: int) -> None:
    """With more stores per word that is read, one tile already keeps enough memory accesses in flight."""
    config = KernelConfig(**settings)
    assert config.wide_tiles == tiles
    assert f"constexpr int kWideTiles = {tiles};" in render(config)


@pytest.mark.parametrize(("offsets", "longest"), [((), 0), ((7,), 7), ((1, 2), 2), ((5, 2, 3), 5)])
def test_indices_are_read_for_the_longest_backend(offsets: tuple[int, ...], longest: int) -> None:
    settings: dict[str, Any] = {"num_backends": max(2, len(offsets)), "seqlen_offsets": offsets}
    source = render(KernelConfig(fields=("kv_indptr", "kv_indices"), **settings))
    assert set(re.findall(r"read_columns\(p, tokens, (\w+)\)", source)) == {"kLongestOffset"}
    assert f"kLongestOffset = {longest};" in source


def test_pages_are_shifted_out_only_where_they_are_a_power_of_two() -> None:
    for size, shift in ((2, 1), (16, 4), (64, 6), (2**30, 30)):
        assert f"constexpr int kPageShift = {shift};" in render(KernelConfig(page_size=size))
    assert "if constexpr ((kPageSize & (kPageSize - 1)) == 0)" in render(KernelConfig(page_size=48))


# A warp takes up to two tiles at once, and a tile is up to two accesses.
@pytest.mark.parametrize(("unroll", "one_pass"), [(1, 8), (2, 16)])
def test_pages_come_from_registers_where_each_lane_has_one_at_most(unroll: int, one_pass: int) -> None:
    for page_size, held in ((one_pass // 2, False), (one_pass, True), (4 * one_pass, True), (one_pass + 4, False)):
        config = KernelConfig(unroll=unroll, page_size=page_size)
        assert config.holds_page_tokens == held
        assert ("held_pages" in device_files(config)) == held
    assert not KernelConfig(unroll=unroll, page_size=2048).holds_page_tokens
    assert not KernelConfig(unroll=4).holds_page_tokens
    assert not KernelConfig(req_to_token_dtype="int64").holds_page_tokens
