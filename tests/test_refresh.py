"""Every case of the table, on the CPU target and on a GPU: configurations, settings, batches, widths, phases."""

from __future__ import annotations

from itertools import product

import cases
import pairs
import pytest
import torch
from cases import BATCH_SHAPES, BATCHES, CONFIGURATIONS, SHAPES, STRATEGIES, Shape, batch
from checker import check
from onelaunch import PRESETS, KernelConfig

PAIRS = pairs.any_two_settings()
WITH_TABLES = [name for name, config in STRATEGIES.items() if config.tables and "kv_indices" not in config.fields]

pytestmark = pytest.mark.uncounted
quick_builds = pytest.mark.usefixtures("quick_builds")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset(device: torch.device, name: str) -> None:
    """Every shipped preset, on every shape."""
    for shape in (*SHAPES, *BATCH_SHAPES):
        check(PRESETS[name], shape, device)


@quick_builds
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_configuration(device: torch.device, name: str) -> None:
    """One configuration of each strategy and field kind, and each special case in the code, on every shape."""
    for shape in pairs.affordable(CONFIGURATIONS[name], (*SHAPES, *BATCH_SHAPES)):
        check(CONFIGURATIONS[name], shape, device)


@quick_builds
@pytest.mark.parametrize("name", PAIRS, ids=[f"{n}-{config.symbol[10:-17]}" for n, (config, _) in PAIRS.items()])
def test_any_two_settings_together(device: torch.device, name: str) -> None:
    """Pairwise coverage: any two values of any two settings occur together in one of these configurations."""
    config, shapes = PAIRS[name]
    for shape in shapes:
        check(config, shape, device)


def test_the_table_holds_every_value_of_every_setting() -> None:
    chosen = pairs.all_pairs(pairs.SETTINGS, pairs.allowed)
    for name, values in pairs.SETTINGS.items():
        assert {case[name] for case in chosen} == set(values), name


def test_the_table_holds_every_field_and_mode() -> None:
    for table in (STRATEGIES, PRESETS):
        configs = table.values()
        assert {name for config in configs for name in config.fields} >= {
            name for name, field in cases.FIELDS.items() if field.kind not in ("splits",)
        } - {"pooled_cache_seqlens"} - ({"flashmla_metadata"} if table is PRESETS else set())
        assert {config.mode for config in configs} == {"decode", "target_verify", "draft_extend"}


@quick_builds
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_batch_size(device: torch.device, name: str) -> None:
    for bs in BATCHES:
        check(STRATEGIES[name], batch(bs, 90, input_stride=1 + bs % 2), device)


@quick_builds
def test_no_cap_on_the_batch(device: torch.device) -> None:
    """The running sums carry over across 256 windows of threads."""
    for name in ("schedules", "indices", "vectors", "equal rows"):
        config = STRATEGIES[name].replace(num_backends=1, seqlen_offsets=(), distinct=())
        check(config, batch(65_536, 5, page_size=2, max_indices=10**6), device)


@quick_builds
@pytest.mark.parametrize("extent", ["live", pytest.param("full", marks=pytest.mark.long)])
def test_65536_requests_of_64_backends(device: torch.device, extent: str) -> None:
    fields = ("cache_seqlens", "cu_seqlens_k", "page_indices")
    plan = check(KernelConfig(num_backends=64, fields=fields, extent=extent), batch(65_536, 5, page_size=2), device)
    assert plan.capacity == 65_538


@quick_builds
@pytest.mark.parametrize("name", ["live", "equal rows", "variable rows", "copy"])
def test_every_16_byte_phase(device: torch.device, name: str) -> None:
    """Destination and source rows begin at every distance from a 16-byte boundary."""
    for destination, source, pad in product(range(4), range(4), (0, 1)):
        shape = batch(9, 1101, token_phase=4 * source, table_phase=4 * destination, table_pad=pad + 3, token_pad=pad)
        check(STRATEGIES[name], shape, device)


@quick_builds
@pytest.mark.parametrize("name", WITH_TABLES)
def test_widths(device: torch.device, name: str) -> None:
    """Around the tiles of both targets: 16 columns on the CPU, 512 on a GPU."""
    for width in (1, 2, 3, 4, 5, 15, 16, 17, 63, 65, 511, 512, 513, 520, 1030):
        # With a single request the row stride doesn't matter, so more rows allow 16-byte stores.
        check(STRATEGIES[name], batch(13 if width % 2 else 1, width, table_pad=width % 4), device)
        check(STRATEGIES[name], batch(13, width + 3, table_columns=width, table_phase=4), device)


@quick_builds
@pytest.mark.parametrize("name", WITH_TABLES)
def test_max_len(device: torch.device, name: str) -> None:
    for max_len in (0, 1, 63, 64, 65, 500, 1100, 1101):
        check(STRATEGIES[name], batch(12, 1101, max_len=max_len), device)


@quick_builds
@pytest.mark.parametrize("extent", ["live", "full"])
def test_tables_without_columns(device: torch.device, extent: str) -> None:
    for fields in (("page_indices",), ("cache_seqlens", "page_indices")):
        check(KernelConfig(fields=fields, extent=extent), batch(3, 40, table_columns=0), device)


@quick_builds
@pytest.mark.parametrize("extent", ["live", "full"])
@pytest.mark.parametrize("page_size", [2, 1_000, 2**31 - 1])
def test_large_pages(device: torch.device, page_size: int, extent: str) -> None:
    for fields in (cases.SIX, ("real_page_table",)):
        check(KernelConfig(num_backends=2, fields=fields, page_size=page_size, extent=extent), batch(9, 1101), device)


@quick_builds
def test_64_offsets(device: torch.device) -> None:
    check(KernelConfig(num_backends=64, seqlen_offsets=tuple(range(64)), fields=cases.SEVEN), batch(33, 90), device)


@quick_builds
def test_as_many_backends_as_the_parameters_hold(device: torch.device) -> None:
    for config in (KernelConfig(num_backends=250, fields=cases.EVERY), KernelConfig(num_backends=500, extent="full")):
        check(cases.fullest(config), batch(5, 90, num_sms=3, num_sm_parts=3), device)


@quick_builds
def test_filled_pages_of_a_table_wider_than_the_pool(device: torch.device) -> None:
    """Columns that no token reaches are filled, too."""
    check(STRATEGIES["filled pages"], Shape("wide", (33, 0), width=90, table_columns=40 * 64, spare_rows=1), device)


@quick_builds
@pytest.mark.parametrize("capacity", [0, 1, 69, 70, 71, 200, 272])
def test_nothing_is_written_beyond_the_capacity_of_kv_indices(device: torch.device, capacity: int) -> None:
    for config in (STRATEGIES["indices"], STRATEGIES["indices"].replace(seqlen_offsets=(1, 0, 2))):
        lengths = (70, 3, 0, 200)
        # Empty tensors count as one tensor shared by all backends, and backends that share one must have equal offsets.
        config = config if capacity else config.replace(num_backends=1, seqlen_offsets=())
        check(config, Shape(f"capacity {capacity}", lengths, width=201, max_indices=capacity, spare_rows=1), device)


@quick_builds
@pytest.mark.parametrize("offsets", [(), (1, 9)])
def test_sums_beyond_32_bits_do_not_wrap_around(device: torch.device, offsets: tuple[int, ...]) -> None:
    """kv_indptr wraps as int32 does. A position that wrapped with it would overwrite the first request's indices."""
    config = KernelConfig(num_backends=2, fields=cases.CSR, seqlen_offsets=offsets)
    check(config, Shape("wrap", (2**31 - 1, 2**31 - 1, 2, 50, 7), width=90, max_indices=500, spare_rows=1), device)
