"""Compares paged_mqa_schedule with DeepGEMM's own kernels, compiled for the host from the headers in vLLM's wheel."""

from __future__ import annotations

import random

import deep_gemm_host
import onelaunch
import pytest
import torch
from torch import Tensor

BATCHES = (1, 2, 31, 32, 33, 64, 65, 257)
KINDS = ("zero", "edges", "random")


def lengths(bs: int, kind: str) -> Tensor:
    numbers = random.Random(f"{bs}.{kind}")
    edges = (0, 1, 255, 256, 257, 511, 512, 513, 70_000)
    chosen = {
        "zero": lambda: 0,
        "edges": lambda: numbers.choice(edges),
        "random": lambda: numbers.choice([0, numbers.randint(0, 300), numbers.randint(0, 200_000)]),
    }[kind]
    return torch.tensor([chosen() for _ in range(bs)], dtype=torch.int32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_sm90(n: int, kind: str) -> None:
    for bs in BATCHES:
        context_lens = torch.full((bs, n), 2**30, dtype=torch.int32)  # the kernel reads only the last column
        context_lens[:, -1] = lengths(bs, kind)
        for num_sms in deep_gemm_host.SMS:
            for atoms in {1, (n + 1) // 2}:
                wanted = deep_gemm_host.sm90(context_lens, num_sms, atoms=atoms)
                got = onelaunch.paged_mqa_schedule(context_lens, num_sms, convention="sm90", split_cost=atoms)
                assert torch.equal(got, wanted), (bs, num_sms, atoms)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_sm100(n: int, kind: str) -> None:
    """A split costs MMAs for each block of two tokens, and an epilogue for each token."""
    cost = 2 * 2 * ((n + 1) // 2) + n
    for bs in BATCHES:
        last = lengths(bs, kind)
        indices = torch.arange(bs, dtype=torch.int32).repeat_interleave(n)
        rows = last.repeat_interleave(n)[:, None].contiguous()
        for num_sms in deep_gemm_host.SMS:
            wanted = deep_gemm_host.sm100(rows, num_sms, indices=indices)
            by_request = rows.view(bs, n)
            got = onelaunch.paged_mqa_schedule(by_request, num_sms, convention="sm100", split_cost=cost)
            assert torch.equal(got, wanted), (bs, num_sms)


def test_a_wrong_length_is_found() -> None:
    """The control: each request in turn gets one split more."""
    context_lens = lengths(33, "random")[:, None].contiguous()
    wanted = deep_gemm_host.sm90(context_lens, 132, atoms=1)
    for request in range(33):
        context_lens[request] += 256
        assert not torch.equal(onelaunch.paged_mqa_schedule(context_lens, 132, convention="sm90"), wanted)
        context_lens[request] -= 256
    assert torch.equal(onelaunch.paged_mqa_schedule(context_lens, 132, convention="sm90"), wanted)
