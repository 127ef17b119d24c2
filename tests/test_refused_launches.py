"""Launches and loads that fail, and a plan's repr."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import onelaunch
import pytest
import torch
from onelaunch import LaunchError, MetadataBuffers
from onelaunch.cli.lab.replay.pool import PagedAllocator
from onelaunch.errors import ArgumentError
from onelaunch.load import loader
from onelaunch.run import api, bound, remembered
from onelaunch.run.copy_plan import CopyPlan
from onelaunch.run.destinations import Destinations


def buffers(width: int = 4) -> MetadataBuffers:
    return MetadataBuffers(cache_seqlens=torch.zeros(width, dtype=torch.int32))


def test_a_launch_that_is_refused() -> None:
    table = torch.zeros(1, 1, dtype=torch.int32)
    plan = onelaunch.bind([buffers()], req_to_token=table)
    copier = CopyPlan(buffers(), Destinations([buffers()], 1, lambda index, name: name), keep=True)
    lengths, rows = torch.tensor([5, 6]), torch.tensor([0, 0])

    def refuse(*arguments: object) -> None:
        raise RuntimeError("cudaErrorUnknown (999)")

    again = (plan, lambda: plan.run(lengths, rows))  # now the plan has checked these tensors
    plan._run = copier._run = refuse
    for refused, call in (again, again, (copier, lambda: copier.run(bs=2))):
        with pytest.raises(LaunchError, match=r"wasn't launched on cpu: cudaErrorUnknown \(999\)\.") as caught:
            call()
        assert refused.config.symbol in str(caught.value)
        assert refused.launches == 0


def test_a_launch_of_a_remembered_plan_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that a function makes, and then finds."""

    def refuse(*arguments: object) -> None:
        raise RuntimeError("cudaErrorUnknown (999)")

    monkeypatch.setattr(bound, "_with_nvtx", lambda run, name: refuse)
    source, out, target = buffers(), buffers(), buffers()
    inputs = torch.tensor([5, 6]), torch.tensor([0, 0]), torch.zeros(1, 1, dtype=torch.int32)
    numbers = {"max_len": 1, "nsa_index_topk": 8, "real_page_size": 1}
    for call in (
        lambda: onelaunch.precompute_decode_metadata_cuda(*inputs, **numbers, out=out),
        lambda: onelaunch.fused_metadata_copy_cuda(source, target),
    ):
        for _ in range(2):
            with pytest.raises(LaunchError, match=r"onelaunch_\w+ wasn't launched on cpu: cudaErrorUnknown \(999\)\."):
                call()


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (700, r" A kernel that was launched before this call, of any library in this process, has failed, .*\."),
        (710, r" A kernel that was launched before this call, .*\."),
        (901, r" Something before this launch ended the capture: end the capture, and capture again without it\."),
        (9, ""),
        (2, ""),
    ],
)
def test_an_error_of_somebody_else_is_told_as_such(code: int, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """test_gpu_faults.py provokes these errors on a GPU."""
    plan = onelaunch.bind([buffers()], req_to_token=torch.zeros(1, 1, dtype=torch.int32))

    def refuse(*arguments: object) -> None:
        raise RuntimeError(f"CUDA error {code}: some words")

    plan._run = refuse
    with pytest.raises(LaunchError, match=rf"wasn't launched on cpu: CUDA error {code}: some words\.{advice}$"):
        plan.run(torch.tensor([5, 6]), torch.tensor([0, 0]))
    kernel = SimpleNamespace(archs=("90a",), module=SimpleNamespace(prepare=refuse))
    monkeypatch.setattr(loader, "load", lambda config, archs: kernel)
    built = advice or r" It was built for sm_90a\."
    with pytest.raises(LaunchError, match=rf"can't be loaded on cpu: CUDA error {code}: some words\.{built}$"):
        onelaunch.bind([buffers()], req_to_token=torch.zeros(1, 1, dtype=torch.int32))


@pytest.mark.parametrize(("facts", "what"), [({"checked": True}, "record"), ({"writes": "verified"}, "hashes")])
def test_memory_that_a_lost_context_refuses(facts: dict[str, Any], what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(*arguments: object, **named: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore of torch's")

    tables = [MetadataBuffers(page_indices=torch.zeros((4, 8), dtype=torch.int32))]
    table = torch.zeros((5, 8), dtype=torch.int32)
    monkeypatch.setattr(torch, "zeros", zeros)
    said = (
        rf"the {what} of .* can't be allocated on cpu: CUDA error: an illegal memory access was encountered\. A kernel "
    )
    with pytest.raises(LaunchError, match=said):
        onelaunch.bind(tables, req_to_token=table, **facts)


def test_a_kernel_that_cant_be_loaded_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(index: int) -> None:
        raise RuntimeError("no kernel image")

    kernel = SimpleNamespace(archs=("90a",), module=SimpleNamespace(prepare=prepare))
    monkeypatch.setattr(loader, "load", lambda config, archs: kernel)
    with pytest.raises(LaunchError, match=r"can't be loaded on cpu: no kernel image\. It was built for sm_90a\."):
        onelaunch.bind([buffers()], req_to_token=torch.zeros(1, 1, dtype=torch.int32))


def test_a_plan_says_what_it_is() -> None:
    plan = onelaunch.bind([buffers(5)], req_to_token=torch.zeros(1, 1, dtype=torch.int32))
    assert repr(plan) == f"Plan({plan.config.symbol}, device=cpu, capacity=5)"


def test_the_table_of_plans_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "_MAX_PLANS", 2)
    source = buffers()
    targets = {name: buffers() for name in "abc"}
    made = []
    real = api.CopyPlan
    monkeypatch.setattr(api, "CopyPlan", lambda *args, **kwargs: (made.append(name), real(*args, **kwargs))[1])
    for name in ("a", "b", "a", "c", "a", "b"):
        onelaunch.fused_metadata_copy_cuda(source, targets[name])
    assert made == ["a", "b", "c", "b"], "a was used more recently than b when c came, so b is dropped"


def test_a_row_that_grows_past_the_table() -> None:
    allocator = PagedAllocator(max_requests=1, width=8, page_size=4, pages=9, rng=np.random.default_rng(0))
    row = allocator.admit(4)
    with pytest.raises(ArgumentError, match=f"9 tokens don't fit row {row}: it is 8 wide"):
        allocator.grow(row, 9)
