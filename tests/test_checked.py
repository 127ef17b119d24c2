"""Checked plans: a violation is reported once, and nothing is read or written out of bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onelaunch
import pytest
import support
import torch
from cases import STRATEGIES, Shape
from checker import Scene, check
from support import POISON, Poisoned, assert_same
from torch import Tensor

pytestmark = pytest.mark.usefixtures("quick_builds")

POOL_ROWS, WIDTH = 6, 90
SEVEN = support.SEVEN_FIELDS


def checked_plan(
    device: torch.device, fields: Sequence[str] = SEVEN, **settings: Any
) -> tuple[onelaunch.Plan, Poisoned, Tensor]:
    """A checked plan with room for 8 rows and 9 requests."""
    pool = support.token_pool(POOL_ROWS, WIDTH, device=device)
    backend = support.destination(fields, 8, WIDTH, 16, requests=9, device=device)
    plan = onelaunch.bind([backend.buffers], req_to_token=pool, page_size=16, checked=True, **settings)
    return plan, backend, pool


VARIABLE: dict[str, Any] = {"mode": "draft_extend", "extend": "variable"}
# Settings, seq_lens, req_pool_indices, extend_seq_lens, and what the message says.
VIOLATIONS: dict[str, tuple[dict[str, Any], list[int], list[int], list[int] | None, str]] = {
    "row": ({}, [5, 6, 7], [1, 6, 2], None, "req_pool_indices[1] is 6; allowed: rows of req_to_token, 0 to 6 excl"),
    "row below": ({"extent": "full"}, [5, 6, 7], [1, 2, -1], None, "req_pool_indices[2] is -1;"),
    "row far away": ({}, [5, 6], [2**40, 1], None, f"req_pool_indices[0] is {2**40};"),
    "length below": ({}, [5, -6, 7], [1, 2, 3], None, "seq_lens[1] is -6; allowed: 0 or more."),
    "length beyond": ({}, [5, 90, 91], [1, 2, 3], None, "seq_lens[2] is 91; allowed: up to 90,"),
    "length beyond, bounded": ({"max_len": 50}, [5, 51], [1, 2], None, "seq_lens[1] is 51; allowed: up to 50,"),
    "length beyond, verify": (
        {"mode": "target_verify", "next_n": 2},
        [88, 89],
        [1, 2],
        None,
        "seq_lens[1] is 89; allowed: up to 88,",
    ),
    "length beyond, offset": ({"seqlen_offsets": (7,)}, [83, 84], [1, 2], None, "seq_lens[1] is 84; allowed: up to 83"),
    "extend below": (VARIABLE, [5, 6], [1, 2], [3, -1], "extend_seq_lens[1] is -1; allowed: 0 to 8,"),
    "extend beyond": (VARIABLE, [5, 6], [1, 2], [9, 1], "extend_seq_lens[0] is 9; allowed: 0 to 8,"),
    "rows beyond": (
        VARIABLE,
        [5, 6, 7],
        [1, 2, 3],
        [3, 4, 2],
        "extend_seq_lens add up to 9 rows at request 2; the destinations have 8.",
    ),
}


@pytest.mark.parametrize(("settings", "lengths", "rows", "extends", "message"), VIOLATIONS.values(), ids=VIOLATIONS)
def test_a_violation_is_reported_once(
    device: torch.device,
    settings: dict[str, Any],
    lengths: list[int],
    rows: list[int],
    extends: list[int] | None,
    message: str,
) -> None:
    plan, backend, pool = checked_plan(device, **settings)
    given = None if extends is None else torch.tensor(extends, device=device)
    plan.run(torch.tensor(lengths, device=device), torch.tensor(rows, device=device), given)
    with pytest.raises(onelaunch.ArgumentError) as caught:
        plan.check()
    assert message in str(caught.value)
    plan.check()
    assert_guards([backend])
    table = backend.buffers.page_indices
    assert table is not None
    bad = [i for i, row in enumerate(rows) if not 0 <= row < POOL_ROWS]
    for request in bad:
        assert (table[request] == POISON).all()
    for request in set(range(len(rows))) - set(bad) if extends is None and "mode" not in settings else ():
        live = min(max(0, lengths[request]), settings.get("max_len", WIDTH))
        assert torch.equal(table[request, :live], pool[rows[request], :live])


def test_rows_beyond_the_capacity_are_left_out(device: torch.device) -> None:
    """Rows that fit are right; rows that don't fit aren't written."""
    plan, backend, pool = checked_plan(device, **VARIABLE)
    lengths, rows = torch.tensor([50, 60, 70, 80], device=device), torch.tensor([1, 2, 3, 4], device=device)
    extends = torch.tensor([3, 4, 4, 1], device=device)
    plan.run(lengths, rows, extends)
    larger = support.destination(SEVEN, 12, WIDTH, 16, requests=9)
    settings: dict[str, Any] = {"index_topk": 2048, "page_size": 16, "extent": "live", "mode": "draft_extend"}
    wanted = support.expected_refresh([larger], lengths, rows, pool, extend_seq_lens=extends, **settings)
    for field, tensor in backend.buffers.items():
        assert torch.equal(tensor.cpu(), getattr(wanted, field.name)[: tensor.shape[0]]), field.name
    assert_guards([backend])


def assert_guards(backends: Sequence[Poisoned]) -> None:
    for backend in backends:
        for name, storage in backend.storages.items():
            assert (storage[: support.GUARD] == POISON).all(), name
            assert (storage[-support.GUARD :] == POISON).all(), name


def test_valid_inputs_report_nothing(device: torch.device) -> None:
    plan, backend, pool = checked_plan(device)
    seq_lens, rows = torch.tensor([90, 0, 17], device=device), torch.tensor([0, 5, 3], device=device)
    for _ in range(3):
        plan.run(seq_lens, rows)
        plan.check()
    settings = {"index_topk": 2048, "page_size": 16, "extent": "live"}
    assert_same([backend], support.expected_refresh([backend], seq_lens, rows, pool, **settings))


@pytest.mark.parametrize("name", [name for name, config in STRATEGIES.items() if config.checked])
def test_valid_batches_report_nothing(device: torch.device, name: str) -> None:
    scene = Scene(STRATEGIES[name], Shape("valid", (7, 0, 90, 33), extends=(2, 0, 1), width=200), device)
    assert not scene.violations
    check(STRATEGIES[name], scene.shape, device)


def test_the_first_violation_stays(device: torch.device) -> None:
    plan, _, _ = checked_plan(device)
    good = torch.tensor([1, 2], device=device)
    plan.run(torch.tensor([-1, 2], device=device), good)
    plan.run(torch.tensor([1, -2], device=device), good)
    with pytest.raises(onelaunch.ArgumentError, match=r"seq_lens\[0\] is -1"):
        plan.check()
    plan.run(torch.tensor([1, -2], device=device), good)
    with pytest.raises(onelaunch.ArgumentError, match=r"seq_lens\[1\] is -2"):
        plan.check()


@pytest.mark.parametrize("capacity", [193, 192])
def test_tokens_that_do_not_fit_kv_indices_are_reported(device: torch.device, capacity: int) -> None:
    config = STRATEGIES["checked indices"].replace(seqlen_offsets=(0, 10))
    shape = Shape("full", (70, 3, 0, 68), width=100, max_indices=capacity)
    scene = Scene(config, shape, device)
    assert [kind for kind, *_ in scene.violations] == ["capacity"] * (193 - capacity)
    check(config, shape, device)


@pytest.mark.parametrize("name", [name for name, config in STRATEGIES.items() if config.checked])
@pytest.mark.parametrize("row", [-1, 4, 2**40])
def test_a_row_outside_the_pool_is_not_read(device: torch.device, name: str, row: int) -> None:
    check(STRATEGIES[name], Shape("bad row", (60, 30, 60), width=99, bad_pool_row=row, extends=(2, 0, 3)), device)
