"""The split counts of SGLang's Triton attention: the launch for the draft steps computes the engine's values."""

from __future__ import annotations

import random
from typing import Any

import compare
import objects
import pytest
import torch
from onelaunch import MetadataBuffers, bind, preset
from onelaunch.integrations import sglang
from pairs import CAPTURED, Pair

pytestmark = pytest.mark.usefixtures("quick_builds")

LENGTHS = (((77, 300, 640, 64, 1), 5), ((640, 639, 590, 600, 630), 5), ((9,), 2), ((640,), 2), ((300, 310), 2))
# A backend's attributes, and whether the launch computes the split counts with them.
WAYS = {
    "by the longest and the shortest": ({}, True),
    "many splits": ({"max_kv_splits": 64}, True),
    "a head of keys for each of queries": ({"num_kv_head": 16}, True),
    "all the same": ({"static_kv_splits": True}, True),
    "no multiprocessors": ({"device_core_count": 0}, True),
    "tiles": ({"enable_deterministic": True, "split_tile_size": 48}, True),
    "deterministic without tiles": ({"enable_deterministic": True, "static_kv_splits": True}, True),
    "no multiprocessors and deterministic": ({"enable_deterministic": True, "device_core_count": 0}, False),
}


def _pair(attributes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Pair:
    """A pair whose backends' children have these attributes."""
    made = objects.backend

    def backend(*arguments: Any, **keywords: Any) -> Any:
        multi = made(*arguments, **keywords)
        for child in multi.attn_backends:
            for name, value in attributes.items():
                assert hasattr(child, name), name
                setattr(child, name, value)
        return multi

    monkeypatch.setattr(objects, "backend", backend)
    return Pair("triton", 1, mode="decode", steps=4)


@pytest.mark.parametrize("way", WAYS)
def test_the_launch_makes_them_in_each_of_the_engines_ways(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attributes, served = WAYS[way]
    pair = _pair(attributes, monkeypatch)
    calls = []
    last = pair.mine.attn_backends[-1]
    own = last.get_num_kv_splits
    last.get_num_kv_splits = lambda *arguments: calls.append(own(*arguments))
    if not served:  # because the engine's own formula would divide by 0
        assert pair.attachment.refreshed == "kv_indptr and kv_indices"
        assert pair.attachment.stays == "split counts"
        return
    assert pair.attachment.stays == "nothing"
    assert "split counts" in repr(pair.attachment)
    for seed, (lengths, bs) in enumerate(LENGTHS):
        pair.replay(lengths, bs, seed)
        pair.check()
    assert not calls
    counts = pair.mine.cuda_graph_num_kv_splits
    assert int(counts[0]) > 0, "the poisoned counts must be written"
    counts[0] += 1
    assert any("cuda_graph_num_kv_splits" in text for text in compare.differences(pair.engine, pair.mine))


def test_the_preset_is_what_is_bound() -> None:
    pair = Pair("triton", 1, mode="decode", steps=4)
    plans = pair.attachment._refresh.plans.values()  # type: ignore[union-attr]
    shipped = preset("triton-decode-3").replace(target="cpu", num_head=objects.HEADS, num_kv_head=4)
    assert [plan.config for plan in plans] == [shipped] * len(CAPTURED)


def test_a_backend_that_counts_otherwise_keeps_its_own_call() -> None:
    """A version of the engine may lack the attributes that the formula reads."""
    pools = objects.token_pool(1, seed=5)
    engine, mine = (objects.backend("triton", pools, page=1, steps=3) for _ in range(2))
    for multi in (engine, mine):
        for child in multi.attn_backends:
            child.get_num_kv_splits = lambda counts, lengths: counts.copy_(lengths + 1)
            del child.static_kv_splits
    attachment = sglang.attach(mine)
    assert "the engine's own: split counts" in repr(attachment)
    for multi in (engine, mine):
        multi.init_cuda_graph_state(5, 5)
        batch = objects.Batch((1,) * 5, 5, "decode", 4, drafting=True).make()
        multi.init_forward_metadata_out_graph(batch, in_capture=True)
        compare.poison(multi)
        multi.init_forward_metadata_out_graph(objects.Batch((7, 640, 30), 5, "decode", 4, 0, True).make())
    assert attachment.launches == 1
    assert not attachment.failed
    assert engine.cuda_graph_num_kv_splits.tolist() == [8, 641, 31, 2, 2] == mine.cuda_graph_num_kv_splits.tolist()


@pytest.mark.parametrize(("num_head", "num_kv_head", "max_kv_splits"), [(32, 8, 8), (16, 16, 16), (40, 1, 700)])
def test_the_field_is_the_engines_kernel(num_head: int, num_kv_head: int, max_kv_splits: int) -> None:
    """Covers lengths beyond the other tests' pool, and batches larger than the engine's 256."""
    backend = objects.backend("triton", objects.token_pool(1, seed=1), page=1, steps=3).attn_backends[-1]
    numbers = {
        "num_head": num_head,
        "num_kv_head": num_kv_head,
        "max_kv_splits": max_kv_splits,
        "device_core_count": 132,
    }
    for name, value in numbers.items():
        setattr(backend, name, value)
    buffers = MetadataBuffers(num_kv_splits=torch.empty(300, dtype=torch.int32))
    plan = bind([buffers], req_to_token=torch.zeros((1, 1), dtype=torch.int32), **numbers)
    draw = random.Random(max_kv_splits)
    seen = set()
    for bs in (1, 2, 3, 8, 33, 255, 300):
        for longest in (
            2,
            64,
            127,
            128,
            129,
            4096,
            draw.randint(200, 9000),
            65_536,
            131_071,
            draw.randint(10**4, 10**6),
        ):
            shortest = draw.choice((1, longest * 4 // 5, longest * 4 // 5 + 1, longest))
            lengths = torch.tensor([draw.randint(max(shortest, 1), longest) for _ in range(bs)])
            lengths[0] = longest
            wanted = torch.full((bs,), compare.POISON, dtype=torch.int32)
            backend.get_num_kv_splits(wanted, lengths)
            plan.run(lengths, torch.zeros_like(lengths))
            assert torch.equal(buffers.num_kv_splits[:bs], wanted), (bs, lengths)
            seen.update(wanted.tolist())
    assert len(seen) > 5
