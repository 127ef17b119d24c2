"""What a bound plan refuses in each run, whatever it remembers of earlier runs; nothing is written."""

from __future__ import annotations

import re
from collections.abc import Callable

import onelaunch
import pytest
import support
import torch
from bad_input import BS, INPUTS, WIDTH, Case, Scene, attribute, bind, case, named, number_facts, refused
from onelaunch import ArgumentError, MetadataBuffers
from support import assert_untouched
from torch import Tensor

pytestmark = pytest.mark.usefixtures("quick_builds")


def test_a_dtype_error_says_what_to_bind_with(device: torch.device) -> None:
    """After binding with the argument that the message names, the tensor is accepted."""
    scene = Scene(device)
    scene.facts |= {"mode": "draft_extend", "extend": "variable"}
    scene.facts |= {
        "declare": {"mine": onelaunch.into(onelaunch.vector("accept", "request"), scene.new(BS))},
        "inputs": {"accept": torch.int64},
    }
    given = {
        "seq_lens": scene.seq_lens,
        "req_pool_indices": scene.rows,
        "extend_seq_lens": scene.seq_lens,
        "accept": scene.seq_lens,
    }
    for name, tensor in given.items():
        others = given | {name: tensor.int()}
        setting = "inputs={'accept': torch.int32}" if name == "accept" else f"{name}_dtype=torch.int32"
        sentence = f"{name} has dtype int32; allowed: int64. Bind with {setting}, or pass {name}.to(torch.int64)."
        with pytest.raises(ArgumentError, match=f"^{re.escape(sentence)}$"):
            bind(scene).admit(**others)
        bound = scene.facts | eval(f"dict({setting})")
        onelaunch.bind(scene.backends, req_to_token=scene.pool, **bound).admit(**others)
        sentence = f"{name} has dtype float32; allowed: int64. Pass {name}.to(torch.int64)."
        with pytest.raises(ArgumentError, match=f"^{re.escape(sentence)}$"):
            bind(scene).admit(**given | {name: tensor.float()})


RUN: list[Case] = [
    *INPUTS,
    # test_a_dtype_error_says_what_to_bind_with follows the advice.
    case(attribute("seq_lens", lambda s: s.seq_lens.int()), "seq_lens has dtype int32; allowed: int64. Bind with"),
    case(attribute("rows", lambda s: s.rows.int()), "req_pool_indices has dtype int32; allowed: int64. Bind with"),
    *number_facts("max_len", 0, WIDTH),
]


@pytest.mark.parametrize("earlier", [False, True], ids=["first call", "later call"])
@named(RUN)
def test_run(device: torch.device, change: Callable[[Scene], None], fragments: tuple[str, ...], earlier: bool) -> None:
    """A remembered good call must not let a bad one through, and the plan stays usable afterwards."""
    scene = Scene(device)
    plan = bind(scene)
    good = scene.seq_lens, scene.rows
    if earlier:
        plan.run(scene.seq_lens, scene.rows, max_len=1)
        plan.run(scene.seq_lens, scene.rows, max_len=16)
        scene.poison()
    change(scene)
    refused(ArgumentError, fragments, lambda: plan.run(scene.seq_lens, scene.rows, **scene.facts))
    assert_untouched(scene.poisoned)
    assert plan.launches == 2 * earlier
    plan.run(*good)
    assert plan.launches == 2 * earlier + 1
    assert all(b.buffers.cache_seqlens.tolist() == [3, 40, 17, 0, support.POISON] for b in scene.poisoned)


@pytest.mark.parametrize("name", ["seq_lens", "req_pool_indices"])
@pytest.mark.parametrize(
    "take",
    [
        lambda s: s.backends[1].cache_seqlens[:BS],
        lambda s: s.backends[0].page_indices[1, 2 : 2 + BS],
        lambda s: s.poisoned[0].storages["cu_seqlens_k"][support.GUARD - BS + 1 :][:BS],
    ],
    ids=["is a destination", "in a table", "touches a destination"],
)
def test_run_on_inputs_that_are_destinations(device: torch.device, take: Callable[[Scene], Tensor], name: str) -> None:
    """The classic: cache_seqlens refreshed in place, because .to(torch.int32) returned the same tensor."""
    scene = Scene(device)
    scene.facts = {"seq_lens_dtype": torch.int32, "req_pool_indices_dtype": torch.int32}
    plan = bind(scene)
    inputs = {"seq_lens": scene.seq_lens.int(), "req_pool_indices": scene.rows.int(), name: take(scene)}
    refused(ArgumentError, (f"{name} overlaps backends[",), lambda: plan.run(**inputs))
    assert_untouched(scene.poisoned)


@pytest.mark.parametrize(
    ("name", "room", "shown"),
    [
        ("cache_seqlens", 3, "backends[1].cache_seqlens has room for 3"),
        ("cu_seqlens_k", 4, "backends[1].cu_seqlens_k has room for 3"),
        ("page_indices", 2, "backends[1].page_indices has room for 2"),
        ("real_page_table", 0, "backends[1].real_page_table has room for 0"),
    ],
)
def test_run_names_the_destination_with_the_least_room(device: torch.device, name: str, room: int, shown: str) -> None:
    scene = Scene(device)
    scene.set(name, lambda t: t[:room])
    plan = bind(scene)
    refused(ArgumentError, ("seq_lens has 4 requests", shown), lambda: plan.run(scene.seq_lens, scene.rows))
    assert_untouched(scene.poisoned)


VARIABLE = {"mode": "draft_extend", "extend": "variable"}


@named(
    [
        case(attribute("extends", lambda s: None), "extend_seq_lens is None", "one element per request"),
        case(attribute("extends", lambda s: [1, 0, 2, 1]), "extend_seq_lens is a list", "torch.Tensor"),
        case(attribute("extends", lambda s: s.extends[:3]), "extend_seq_lens has 3 elements", "seq_lens has 4"),
        case(attribute("extends", lambda s: s.extends.int()), "extend_seq_lens has dtype int32", "int64"),
    ]
)
def test_run_with_extend_lengths(
    device: torch.device, change: Callable[[Scene], None], fragments: tuple[str, ...]
) -> None:
    scene = Scene(device)
    scene.extends = torch.tensor([1, 0, 2, 1], device=device)
    scene.facts = dict(VARIABLE)
    plan = bind(scene)
    plan.run(scene.seq_lens, scene.rows, scene.extends)
    scene.poison()
    change(scene)
    refused(ArgumentError, fragments, lambda: plan.run(scene.seq_lens, scene.rows, scene.extends))
    assert_untouched(scene.poisoned)


def test_run_with_extend_lengths_that_the_plan_does_not_take(device: torch.device) -> None:
    scene = Scene(device)
    plan = bind(scene)
    fragments = ("extend_seq_lens is a Tensor", "1 rows each in decode", "must be None")
    refused(ArgumentError, fragments, lambda: plan.run(scene.seq_lens, scene.rows, scene.rows))
    assert_untouched(scene.poisoned)


def test_run_with_more_rows_than_room(device: torch.device) -> None:
    scene = Scene(device)
    scene.facts = {"mode": "target_verify", "next_n": 2}
    plan = bind(scene)
    assert (plan.capacity, plan.row_capacity) == (2, 5)
    fragments = ("seq_lens has 4 requests of 2 rows each", "room for 2")
    refused(ArgumentError, fragments, lambda: plan.run(scene.seq_lens, scene.rows))
    assert_untouched(scene.poisoned)
    plan.run(scene.seq_lens[:2], scene.rows[:2])


def test_check_of_a_plan_that_checks_nothing(device: torch.device) -> None:
    refused(ArgumentError, ("without device checks", "checked=True"), bind(Scene(device)).check)


def test_a_plan_for_an_exact_number_of_requests(device: torch.device) -> None:
    out = torch.full((3,), -7, dtype=torch.int32, device=device)
    pool = torch.zeros((4, 8), dtype=torch.int32, device=device)
    plan = onelaunch.bind([MetadataBuffers(cache_seqlens=out)], req_to_token=pool)
    plan.exact = 2
    lengths, rows = torch.tensor([3, 4, 5], device=device), torch.arange(3, device=device)
    with pytest.raises(ArgumentError, match=r"seq_lens has 1 elements; the plan is for 2 requests\. Pass as"):
        plan.run(lengths[:1], rows)
    with pytest.raises(ArgumentError, match="req_pool_indices has 1 elements; the plan is for 2 requests"):
        plan.run(lengths, rows[:1])
    assert out.tolist() == [-7] * 3
    for count in (2, 3):  # the first elements of longer inputs count
        out.fill_(-7)
        plan.run(lengths[:count], rows)
        assert out.tolist() == [3, 4, -7]
