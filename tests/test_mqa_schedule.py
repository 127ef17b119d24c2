"""DeepGEMM's schedule by itself: paged_mqa_schedule agrees with the reference, and builds once for all batches."""

from __future__ import annotations

import re
from typing import Any

import onelaunch
import pytest
import torch
from onelaunch import ArgumentError
from onelaunch.load import loader
from onelaunch.run import schedules
from onelaunch.spec import reference
from onelaunch.spec.settings import parse_settings
from torch import Tensor

pytestmark = pytest.mark.usefixtures("quick_builds")

BATCHES = (0, 1, 2, 31, 32, 33, 64, 65, 257)
CONVENTIONS = ("sm90", "sm100")


def context_lens(bs: int, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Lengths of every size, some of them 0. Columns before the last are too large: a read would show."""
    last = [(977 * i * i + 255 * i) % 70_001 * (i % 5 != 3) for i in range(1, bs + 1)]
    lens = torch.full((bs, n), 2**30, dtype=dtype)
    lens[:, -1] = torch.tensor(last, dtype=dtype)
    return lens.to(device)


def expected(lens: Tensor, num_sms: int, convention: str, split_cost: int = 0) -> list[list[int]]:
    n, lengths = lens.shape[1], lens[:, -1].tolist()
    if convention == "sm90":
        return reference.paged_mqa_schedule(lengths, num_sms, atoms=split_cost or -(-n // 2))
    return reference.paged_mqa_schedule(lengths, num_sms, atoms=n, split_cost=split_cost or n, remainder="first")


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_every_batch_in_one_build(dtype: torch.dtype, n: int, convention: str, device: torch.device) -> None:
    onelaunch.paged_mqa_schedule(context_lens(3, n, dtype, device), 7, convention=convention)
    onelaunch.freeze()  # from here on a build is an error
    for num_sms in (1, 7, 132):
        out = torch.full((num_sms + 1, 2), -7, dtype=torch.int32, device=device)
        for bs in BATCHES:
            lens = context_lens(bs, n, dtype, device)
            got = onelaunch.paged_mqa_schedule(lens, num_sms, out=out, convention=convention)
            assert got is out
            assert got.tolist() == expected(lens, num_sms, convention), (bs, num_sms)


@pytest.mark.parametrize(("convention", "cost"), [("sm90", 1), ("sm90", 3), ("sm100", 1), ("sm100", 12)])
def test_what_a_split_costs_may_be_given(convention: str, cost: int, device: torch.device) -> None:
    lens = context_lens(37, 4, torch.int32, device)
    got = onelaunch.paged_mqa_schedule(lens, 66, convention=convention, split_cost=cost)
    assert got.tolist() == expected(lens, 66, convention, cost)
    assert got.tolist() != expected(lens, 66, convention)


def test_lengths_of_one_token_may_be_a_vector_of_any_stride(device: torch.device) -> None:
    lens = context_lens(19, 1, torch.int64, device)
    apart = torch.zeros((19, 3), dtype=torch.int64, device=device)
    apart[:, 1] = lens[:, 0]
    assert onelaunch.paged_mqa_schedule(apart[:, 1], 20).tolist() == expected(lens, 20, "sm90")
    shared = apart[:, 1].unsqueeze(-1).expand(-1, 4)
    assert onelaunch.paged_mqa_schedule(shared, 20, convention="sm90").tolist() == expected(shared, 20, "sm90")


def test_the_builds_that_the_docstring_names() -> None:
    """The function finds the kernels that the docstring's `onelaunch build --set` commands build."""
    text = " ".join(str(schedules.paged_mqa_schedule.__doc__).split())
    one, four, new = re.findall(r"``(?:onelaunch build --set )?([a-z_]+=[\w=,]+)``", text)
    cpu = torch.device("cpu")
    cases = ((1, one, "sm90"), (4, f"{one},{four}", "sm90"), (4, f"{one},{four},{new}", "sm100"))
    for _, settings, _ in cases:
        loader.load(parse_settings(settings).replace(target="cpu"))
    loader._loaded.clear()
    onelaunch.freeze()
    for n, _, convention in cases:
        lens = context_lens(5, n, torch.int32, cpu)
        got = onelaunch.paged_mqa_schedule(lens, 4, convention=convention)
        assert got.tolist() == expected(lens, 4, convention)
    with pytest.raises(onelaunch.JitPolicyError):
        onelaunch.paged_mqa_schedule(context_lens(5, 9, torch.int32, cpu), 4)


def test_a_plan_is_found_again_by_its_memory(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    lens, out = context_lens(5, 1, torch.int32, device), torch.empty((9, 2), dtype=torch.int32, device=device)
    first = onelaunch.paged_mqa_schedule(lens, 8, out=out).tolist()
    monkeypatch.setattr(schedules.bind, "make_plan", lambda *args, **kwargs: pytest.fail("it made another plan"))
    assert onelaunch.paged_mqa_schedule(lens[:4], 8, out=out).tolist() == expected(lens[:4], 8, "sm90") != first


# ------------------------------------------------------------------------------------------------ torch.compile


@pytest.fixture
def dynamo() -> Any:
    import torch._dynamo

    torch._dynamo.reset()
    return torch._dynamo


def test_torch_accepts_the_operator(dynamo: Any, device: torch.device) -> None:
    out = torch.empty((8, 2), dtype=torch.int32, device=device)
    operator = torch.ops.onelaunch.paged_mqa_schedule.default
    torch.library.opcheck(operator, (context_lens(9, 2, torch.int32, device), 7, out))
    torch.library.opcheck(operator, (context_lens(9, 2, torch.int32, device), 7, out, "sm100", 3))


@pytest.mark.parametrize("given", [False, True], ids=["new", "out"])
def test_it_is_part_of_a_graph(given: bool, dynamo: Any, device: torch.device) -> None:
    lens = context_lens(40, 3, torch.int32, device)
    out = torch.full((13, 2), -7, dtype=torch.int32, device=device) if given else None

    def step(lens: Tensor) -> Tensor:
        return onelaunch.paged_mqa_schedule(lens + 256, 12, out=out, convention="sm100") * 2

    got = torch.compile(step, backend="aot_eager", fullgraph=True)(lens)
    wanted = torch.tensor(expected(lens + 256, 12, "sm100"))
    assert torch.equal(got.cpu(), (wanted * 2).to(torch.int32))
    assert out is None or torch.equal(out.cpu(), wanted.to(torch.int32))


# ------------------------------------------------------------------------------------------------ refusals

GOOD = torch.tensor([[3], [700]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("lens", "num_sms", "more", "message"),
    [
        ([3], 4, {}, "context_lens is a list"),
        (GOOD.float(), 4, {}, "context_lens has dtype torch.float32; allowed: torch.int32, torch.int64"),
        (GOOD[None], 4, {}, r"context_lens has shape \(1, 2, 1\); it must be \[bs\], or \[bs, n\]"),
        (GOOD[:, :0], 4, {}, r"context_lens has shape \(2, 0\)"),
        (GOOD, 0, {}, "num_sms is 0; allowed: 1 to"),
        (GOOD, 4.0, {}, "num_sms is 4.0"),
        (GOOD, 4, {"convention": "sm80"}, "convention is 'sm80'; allowed: 'sm90', 'sm100', or None"),
        (GOOD, 4, {"split_cost": -1}, "split_cost is -1; allowed: 0 to"),
        (GOOD, 4, {"out": torch.empty((4, 2), dtype=torch.int32)}, r"out has shape \(4, 2\) and num_sms is 4"),
        (GOOD, 4, {"out": torch.empty((5, 2))}, "out has dtype float32; allowed: int32"),
        (GOOD, 4, {"out": torch.empty((2, 5), dtype=torch.int32).T}, "out has strides"),
        (GOOD, 4, {"out": "new"}, "out is a str"),
    ],
)
def test_what_does_not_fit_is_refused(lens: Any, num_sms: Any, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        onelaunch.paged_mqa_schedule(lens, num_sms, **more)


def test_lengths_that_are_the_schedules_memory_are_refused() -> None:
    out = torch.zeros((5, 2), dtype=torch.int32)
    with pytest.raises(ArgumentError, match="overlaps out in memory"):
        onelaunch.paged_mqa_schedule(out, 4, out=out)
    assert not out.any()


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 4])
def test_it_is_captured_and_follows_the_lengths(n: int) -> None:
    device = torch.device("cuda", 0)
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    lens = context_lens(64, n, torch.int32, device)
    out = torch.empty((num_sms + 1, 2), dtype=torch.int32, device=device)
    onelaunch.paged_mqa_schedule(lens, num_sms, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        onelaunch.paged_mqa_schedule(lens, num_sms, out=out)
    convention = schedules.convention_of(device)
    for shift in (0, 300, 5000):
        lens[:, -1] += shift
        out.fill_(-7)
        graph.replay()
        assert out.tolist() == expected(lens, num_sms, convention)
