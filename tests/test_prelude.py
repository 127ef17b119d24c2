"""Tests of the emulation: its prelude behaves as CUDA does, and each of its checks catches the fault it is for."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import Shape
from emulation import harness
from emulation.harness import CompileError, Outcome
from onelaunch import KernelConfig

pytestmark = pytest.mark.uncounted

# A kernel of two blocks with the parameters of CONFIG; `i` is the thread's index in the grid, with 64 threads a block.
# It must compute cache_seqlens[i] = seq_lens[i]. Each probe does so in another way, and some probes are wrong on
# purpose. One program for each sanitizer holds all probes; the first length selects the one that runs.
CONFIG = KernelConfig(fields=("cache_seqlens",), threads=64)
SOURCE = """
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace {
struct Params {
  const std::int64_t* seq_lens;
  std::int64_t seq_lens_stride, batch_size, device;
  std::int32_t* cache_seqlens;
};
__device__ int length(const Params& p, int i) { return static_cast<int>(p.seq_lens[i]); }
__global__ void kernel(const __grid_constant__ Params p) {
  const int t = static_cast<int>(threadIdx.x), lane = t % 32, i = static_cast<int>(blockIdx.x) * 64 + t;
  std::int32_t* out = p.cache_seqlens;
  (void)t, (void)lane, (void)i, (void)out;
  switch (length(p, 0) / 1000) {
    CASES
  }
}
}  // namespace

extern "C" {
int probe_launch(const std::int64_t* words, void* stream) {
  Params params;
  std::memcpy(&params, words, sizeof params);
  cudaSetDevice(static_cast<int>(params.device));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(2);
  config.blockDim = dim3(64);
  config.stream = static_cast<cudaStream_t>(stream);
  const int error = cudaLaunchKernelEx(&config, kernel, params);
  cudaSetDevice(0);
  return error;
}
int probe_prepare(std::int64_t device, std::int64_t* resources) {
  resources[0] = resources[1] = resources[2] = 0;
  const int error = cudaSetDevice(static_cast<int>(device));
  cudaSetDevice(0);
  return error;
}
const char* probe_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
}
"""

# By name: the probe's code, the sanitizer it is built with, and the check that catches it (None: the probe is correct).
PROBES: dict[str, tuple[str, str, str | None]] = {
    "plain": ("out[i] = length(p, i);", "thread", None),
    "shared memory, one copy a block": (
        "__shared__ int s[64]; s[63 - t] = length(p, i); __syncthreads(); out[i] = s[63 - t];",
        "thread",
        None,
    ),
    "shared memory through a barrier": (
        "__shared__ int s[64]; s[t] = length(p, i ^ 33); __syncthreads(); out[i] = s[t ^ 33];",
        "thread",
        None,
    ),
    "shared memory without a barrier": (
        "__shared__ int s[64]; s[t] = length(p, i ^ 33); out[i] = s[t ^ 33];",
        "thread",
        "thread",
    ),
    "the barrier before the last one doesn't count": (
        "__shared__ int s[64]; __syncthreads(); s[t] = length(p, i ^ 33); out[i] = s[t ^ 33]; __syncthreads();",
        "thread",
        "thread",
    ),
    "a shuffle doesn't order memory": (
        "__shared__ int s[64]; s[t] = length(p, i ^ 1); __shfl_sync(0xffffffffu, t, 0); out[i] = s[t ^ 1];",
        "thread",
        "thread",
    ),
    "a vote doesn't order memory": (
        "__shared__ int s[64]; s[t] = length(p, i ^ 1); __ballot_sync(0xffffffffu, true); out[i] = s[t ^ 1];",
        "thread",
        "thread",
    ),
    "__syncwarp orders the warp": (
        "__shared__ int s[64]; s[t] = length(p, i ^ 1); __syncwarp(); out[i] = s[t ^ 1];",
        "thread",
        None,
    ),
    "__syncwarp doesn't order the block": (
        "__shared__ int s[64]; s[t] = length(p, i ^ 32); __syncwarp(); out[i] = s[t ^ 32];",
        "thread",
        "thread",
    ),
    "two blocks write one element": (
        "out[i] = length(p, i); if (t == 0) out[17] = length(p, 17);",
        "thread",
        "thread",
    ),
    "two blocks write one element, ordered in each": (
        "if (t == 0) out[17] = length(p, 17); __syncthreads(); if (i != 17) out[i] = length(p, i);",
        "thread",
        "thread",
    ),
    "a block reads what another wrote": (
        "out[i] = length(p, i); if (blockIdx.x == 1 && out[t] == -9) out[i] = 0;",
        "thread",
        "thread",
    ),
    "16-byte stores are seen": (
        "if (t % 4 == 0) *reinterpret_cast<int4*>(out + i) = int4{length(p, i), length(p, i + 1), length(p, i + 2), "
        "length(p, i + 3)}; if (t == 3) out[i] = length(p, i);",
        "thread",
        "thread",
    ),
    "16-byte loads are seen": (
        "if (t == 3) out[0] = length(p, 0); __syncthreads(); out[i] = length(p, i); "
        "if (t == 4) { int4 x = *reinterpret_cast<int4*>(out); if (x.w == -9) out[4] = 0; }",
        "thread",
        "thread",
    ),
    "shuffles": (
        "const int other = __shfl_up_sync(0xffffffffu, length(p, i), 2u); "
        "const int first = __shfl_sync(0xffffffffu, length(p, i), 0); "
        "out[i] = lane >= 2 ? other + 2 : other == first + lane ? other : -1;",
        "thread",
        None,
    ),
    "votes of halves of a warp": (
        "const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u; const unsigned odd = __ballot_sync(half, lane % 2); "
        "out[i] = odd == (0xaaaaaaaau & half) && __popc(odd) == 8 ? length(p, i) : -1;",
        "thread",
        None,
    ),
    "a shuffle from a lane outside the mask": (
        "if (lane < 16) out[i] = __shfl_sync(0xffffu, length(p, i), 20);",
        "none",
        "emulation",
    ),
    "lanes with different masks": (
        "out[i] = length(p, i); __ballot_sync(lane < 16 ? 0xffffffffu : 0xffff0000u, true);",
        "none",
        "emulation",
    ),
    "lanes at different intrinsics": (
        "out[i] = length(p, i); if (lane < 16) __ballot_sync(0xffffffffu, true); else __syncwarp();",
        "none",
        "emulation",
    ),
    "a lane that left": (
        "out[i] = length(p, i); if (lane == 7) return; __ballot_sync(0xffffffffu, true);",
        "none",
        "emulation",
    ),
    "a warp at the barrier, its lane at a vote": (
        "out[i] = length(p, i); if (lane == 7) __ballot_sync(0xffffffffu, true); else __syncthreads();",
        "none",
        "emulation",
    ),
    "different barriers": (
        "out[i] = length(p, i); if (t < 32) {\n__syncthreads();\n} else {\n__syncthreads();\n}",
        "none",
        "emulation",
    ),
    "the end of a shared array": (
        "__shared__ int s[64]; int* volatile at = s; s[t] = 0; out[i] = length(p, i); if (at[t + 1] == 77) out[i] = 0;",
        "address",
        "address",
    ),
    "the end of a destination": ("out[i] = length(p, i); if (i == 127) out[128] = 1;", "address", "address"),
    "the end of a destination, unsanitized": (
        "out[i] = length(p, i); if (i == 127) out[128] = 1;",
        "none",
        "emulation",
    ),
    "an input is written": (
        "out[i] = length(p, i); if (i == 5) const_cast<std::int64_t*>(p.seq_lens)[5] = 1;",
        "none",
        "emulation",
    ),
    "__ldg of an input": ("out[i] = static_cast<int>(__ldg(p.seq_lens + i));", "thread", None),
    "__ldg of a destination": ("out[i] = length(p, i); if (__ldg(out + i) == -9) out[i] = 0;", "none", "emulation"),
    "an element is left out": ("if (i != 100) out[i] = length(p, i);", "none", "mismatch"),
}
# Every element is wrong.
BLOCK_INDICES = "out[i] = static_cast<int>(blockIdx.x);"


def source(*bodies: str) -> str:
    cases = (f"case {number}: {{ {body} }} break;" for number, body in enumerate(bodies, 1))
    return SOURCE.replace("CASES", "\n    ".join(cases))


EVERY = source(*(body for body, _, _ in PROBES.values()), BLOCK_INDICES)


def run(number: int, sanitizer: str, programs: Path, launches: tuple[tuple[int, int], ...]) -> Outcome:
    """Runs one probe of EVERY, counted from 1. Two blocks need two copies of the object file."""
    reason = harness.missing_runtime(sanitizer)
    if reason is not None:
        pytest.skip(reason)
    program = harness.build(EVERY, sanitizer, programs, copies=2)
    shape = Shape("probe", tuple(range(1000 * number, 1000 * number + 128)))
    return harness.run(program, CONFIG, (shape,), launches=launches)


@pytest.mark.parametrize("name", PROBES, ids=lambda name: name.replace(" ", "-"))
def test_a_probe_is_caught_by_its_check_alone(name: str, programs: Path) -> None:
    """The result is the same whether the blocks run one after the other or at the same time."""
    _, sanitizer, caught_by = PROBES[name]
    number = list(PROBES).index(name) + 1
    outcomes = [run(number, sanitizer, programs, launches) for launches in (((1, 1),), ((2, 64),))]
    assert [o.caught for o in outcomes] == [caught_by] * 2, "\n".join(o.text for o in outcomes)


def test_a_failure_names_the_seed(programs: Path) -> None:
    outcome = run(len(PROBES) + 1, "none", programs, ((41, 2),))
    assert outcome.caught == "mismatch"
    assert "probe, seed 41, 2 blocks together: cache_seqlens[0] differs in 128" in outcome.text


@pytest.mark.parametrize(
    "body",
    [
        "out[i] = __shfl_xor_sync(0xffffffffu, t, 1);",
        "out[i] = __any_sync(0xffffffffu, t);",
        "__threadfence();",
        "atomicAdd(out, 1);",
        "extern __shared__ int s[]; out[i] = s[t];",
        'asm volatile("griddepcontrol.wait;" ::: "memory");',
    ],
    ids=["shuffle", "vote", "fence", "atomic", "dynamic-shared-memory", "assembly"],
)
def test_what_the_prelude_lacks_does_not_compile(body: str, programs: Path) -> None:
    with pytest.raises(CompileError):
        harness.build(source(body), "none", programs, copies=1)
