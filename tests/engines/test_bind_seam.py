"""bind_seam(): what SGLang's own kernels compute around a speculative step, in one launch over tensors of a caller."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import compare
import objects
import onelaunch
import pytest
import torch
from onelaunch import ArgumentError
from onelaunch.integrations import sglang
from request_objects import LENGTHS, Request

pytestmark = pytest.mark.usefixtures("quick_builds")


@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_chain_that_is_verified(lengths: tuple[int, ...]) -> None:
    """Compares a chain's positions, write locations, retrieve indices and mask with the engine's own kernels."""
    pool, request, count = objects.token_pool(64, seed=64), Request(lengths, 1), len(lengths)
    runner = SimpleNamespace(model_runner=SimpleNamespace(req_to_token_pool=SimpleNamespace(req_to_token=pool)))
    wanted = {"out_cache_loc": request.window(runner, 4)}
    kernels = import_module("sglang.kernels.ops.speculative.eagle")
    names = ("mask", "positions", "retrieve_index", "retrieve_next_token", "retrieve_next_sibling")
    if hasattr(kernels, "build_chain_tree"):  # SGLang 0.5.17's kernel is compiled for a GPU
        drafts = request.tokens[: count * 3].view(count, 3)
        made = kernels.build_chain_tree(request.accepted, drafts, torch.tensor(lengths), None, request.rows, pool)
        wanted |= dict(zip(names, made, strict=False))
        assert torch.equal(made[6], wanted["out_cache_loc"])
    got = {
        name: torch.full_like(t, True if t.dtype == torch.bool else compare.POISON).view(-1)
        for name, t in wanted.items()
    }
    plan = sglang.bind_seam("target_verify", 4, got, pool)
    plan.run(torch.tensor(lengths), request.rows)
    assert plan.launches == 1
    for name in got:
        assert torch.equal(wanted[name].reshape(-1), got[name]), name
    if hasattr(kernels, "build_chain_tree"):
        assert plan.config == onelaunch.PRESETS["sglang-verify-chain"].replace(target="cpu")


@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_layout_of_a_draft_extension(lengths: tuple[int, ...]) -> None:
    """Compares prefix, extend and new lengths, starts and positions with the engine's own kernels."""
    pool, rows, before = objects.token_pool(64, seed=64), torch.arange(len(lengths)) + 1, torch.tensor(lengths)
    kernels = import_module("sglang.kernels.ops.speculative.eagle")
    names = ("prefix_lens", "extend_seq_lens", "seq_lens")
    if hasattr(kernels, "prepare_draft_extend_layout"):
        *made, (positions, starts, _) = kernels.prepare_draft_extend_layout(before, 4, False)
        wanted = dict(zip(names, made, strict=True))
    else:
        prefix, extends = before.int(), torch.full((len(lengths),), 4, dtype=torch.int32)
        batches = import_module("sglang.srt.model_executor.forward_batch_info")
        positions, starts = batches.compute_position("triton", prefix, extends, 4 * len(lengths))
        wanted = dict(zip(names, (prefix, extends, before + 4), strict=True))
    wanted |= {"positions": positions, "extend_start_loc": starts}
    got = {name: torch.full_like(tensor, compare.POISON) for name, tensor in wanted.items()}
    plan = sglang.bind_seam("draft_extend", 4, got, pool)
    plan.run(before, rows)
    assert plan.launches == 1
    for name in got:
        assert torch.equal(wanted[name], got[name]), name
    assert plan.config == onelaunch.PRESETS["sglang-draft-extend-layout"].replace(target="cpu")


def test_tensors_that_a_seam_does_not_declare() -> None:
    with pytest.raises(ArgumentError, match="tensors has 'qo'; allowed: seq_lens, req_pool_indices, positions"):
        sglang.bind_seam("decode", 3, {"qo": torch.zeros(3)}, objects.token_pool(1, seed=1))
