"""The reference of num_kv_splits has the same float arithmetic as Triton, in which SGLang computes split counts."""

import pytest
import torch

pytestmark = pytest.mark.gpu
# torch's CPU builds come without Triton.
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@triton.jit  # type: ignore[untyped-decorator]
def _multiprocessors(lengths, out, count, device_core_count, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    longest = tl.load(lengths + place, mask=place < count, other=1)
    doublings = tl.maximum(tl.log2(tl.cast(longest, tl.float32) / 64.0), 1.0)
    tl.store(out + place, tl.cast(device_core_count * doublings, tl.int32), mask=place < count)


@pytest.mark.parametrize("device_core_count", [78, 132, 148])
def test_float_arithmetic_is_that_of_triton(device_core_count: int) -> None:
    """PyTorch's arithmetic, which the reference uses, at all lengths up to 2^20 and near larger powers of two."""
    lengths = torch.arange(1, 2**20 + 1, device="cuda")
    more = torch.tensor([2**k + d for k in range(20, 31) for d in (-1, 0, 1)], device="cuda")
    lengths = torch.cat((lengths, more))
    got = torch.empty_like(lengths, dtype=torch.int32)
    _multiprocessors[(-(-len(lengths) // 1024),)](lengths, got, len(lengths), device_core_count, SIZE=1024)
    doublings = torch.log2(lengths.to(torch.float32) / 64).clamp(min=1)
    assert torch.equal(got, (doublings * device_core_count).to(torch.int32))
