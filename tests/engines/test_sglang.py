"""SGLang's own classes allocate, capture and replay; an equal set has onelaunch attached. All tensors must be equal."""

from __future__ import annotations

from typing import Any

import compare
import pytest
from objects import FAMILIES
from pairs import Pair

pytestmark = pytest.mark.usefixtures("quick_builds")

# Lengths of real requests, and the captured batch size: long and short, at a page's edge, padded, a smaller batch.
LENGTHS = (((77, 300, 640, 64, 1), 5), ((128, 65, 5), 5), ((63, 192), 2), ((9,), 2), ((640, 639, 2, 130), 5))


def steps_and_pages() -> list[Any]:
    """For each multi-step backend: every page size with three steps, and two to five steps with one page size."""
    cases = []
    for name, family in FAMILIES.items():
        cases += [pytest.param(name, page, 4, id=f"{name}-page{page}-steps4") for page in family.pages]
        cases += [pytest.param(name, family.pages[0], s, id=f"{name}-steps{s}") for s in (2, 3, 5)]
    return cases


@pytest.mark.parametrize(("name", "page", "steps"), steps_and_pages())
def test_draft_steps(name: str, page: int, steps: int) -> None:
    pair = Pair(name, page, mode="decode", steps=steps)
    for seed, (lengths, bs) in enumerate(LENGTHS):
        pair.replay(lengths, bs, seed)
        pair.check()
    pair.record()


SINGLE = [
    pytest.param(name, page, mode, id=f"{name}-page{page}-{mode}")
    for name, family in FAMILIES.items()
    if family.single
    for page in family.pages
    for mode in ("decode", "target_verify", "draft_extend")
]


@pytest.mark.parametrize(("name", "page", "mode"), SINGLE)
def test_a_single_backend(name: str, page: int, mode: str) -> None:
    pair = Pair(name, page, mode=mode)
    for seed, (lengths, bs) in enumerate(LENGTHS):
        pair.replay(lengths, bs, seed)
        pair.check()
    pair.record()


@pytest.mark.parametrize(("mode", "steps"), [("decode", 4), ("decode", 0), ("target_verify", 0), ("draft_extend", 0)])
def test_a_launch_that_makes_deepgemms_schedules_too(mode: str, steps: int) -> None:
    """DeepGEMM isn't installed here, so the reference computes the engine's schedules from its lengths (fakes.py)."""
    pair = Pair("dsa", 64, mode=mode, steps=steps, schedules=True)
    for made in getattr(pair.mine, "attn_backends", [pair.mine]):
        made._refresh_paged_mqa_schedule_metadata = lambda *a: pytest.fail("the engine made the schedule")
    for seed, (lengths, bs) in enumerate(LENGTHS):
        pair.replay(lengths, bs, seed)
        pair.check()


@pytest.mark.parametrize(
    ("name", "mode", "steps"),
    [(name, "decode", 3) for name in FAMILIES]
    + [(name, mode, 0) for name, family in FAMILIES.items() if family.single for mode in ("decode", "target_verify")]
    + [(name, "draft_extend", 0) for name, family in FAMILIES.items() if family.single],
)
def test_a_wrong_entry_of_any_tensor_is_found(name: str, mode: str, steps: int) -> None:
    pair = Pair(name, FAMILIES[name].pages[0], mode=mode, steps=steps)
    pair.replay((77, 300, 640), 5, seed=1)
    pair.check()
    corrupted = 0
    for path, tensor in compare.reachable(pair.mine).items():
        index = compare.live_entry(path, tensor)
        if index is None or int(tensor[index]) == compare.POISON:
            continue
        tensor[index] += 1
        assert any(text.startswith(f"{path}:") for text in compare.differences(pair.engine, pair.mine)), path
        tensor[index] -= 1
        corrupted += 1
    assert corrupted >= 2
    pair.check()
