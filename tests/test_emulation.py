"""Emitted CUDA on host threads: against the reference, under the sanitizers, and with planted faults."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from cases import AUDITS, CONFIGURATIONS, FAR, LONG_ROWS, RAGGED, SHAPES, STEPS, STRATEGIES, Shape
from emulation import harness
from emulation.faults import FAULTS
from emulation.harness import CompileError, Outcome
from onelaunch import PRESETS, KernelConfig, render

pytestmark = pytest.mark.uncounted
SANITIZERS = ("address+undefined", "thread")
# Blocks of the shipped size take the sanitizers long, and what these see in them is what they see in small ones.
SMALL = {"threads": 64, "blocks_per_sm": 2}
# Launch settings that change which warp takes what.
LAUNCHES = {
    "one warp": {"threads": 32, "blocks_per_sm": 4},
    "four warps": {"threads": 128},
    "largest block": {"threads": 1024, "blocks_per_sm": 1},
    "unroll 1": {"unroll": 1, **SMALL},
    "unroll 8": {"unroll": 8, **SMALL},
    "many blocks": {"threads": 64, "unroll": 1, "blocks_per_sm": 8},
}
LIVE, FULL = (KernelConfig(num_backends=2, extent=extent, page_size=16) for extent in ("live", "full"))
# Of a grid. GCC's ThreadSanitizer holds 8,128 threads, and makes 9 mappings for each, of which Linux allows 65,530.
MAX_TSAN_THREADS = 7000
RACED_AUDITS = ("live", "variable rows")
# Others have each of their parts; they take long.
LONG_UNDER = {
    "address+undefined": ("declared rows", "padded"),
    "thread": ("declared rows", "declared offsets", "padded", "verified offsets"),
}
SMALL_STRATEGIES = {name: config.replace(**SMALL) for name, config in STRATEGIES.items()}
OTHERS = {
    **{name: config.replace(**SMALL) for name, config in CONFIGURATIONS.items() if name not in STRATEGIES},
    **{name: LIVE.replace(**settings) for name, settings in LAUNCHES.items()},
    **{f"{name}, equal rows": FULL.replace(**LAUNCHES[name]) for name in ("four warps", "unroll 1")},
}


def shapes_for(config: KernelConfig, sanitizer: str) -> tuple[Shape, ...]:
    """Every shape that the sanitizer has a use for, with one of more requests than two windows of threads."""
    requests, long = 2 * config.threads + 45, (LONG_ROWS,)
    if sanitizer == "thread" and config.equal_rows:
        # Every tile has a warp of its own, and to begin a thread costs ThreadSanitizer more than a millisecond. Longer
        # rows only have more warps, all of which do what those of RAGGED do. A second window is what the lengths' block
        # needs; the other sanitizers see the third.
        requests, long = config.threads + 5, ()
    many = Shape("many", tuple(range(requests)), width=90, max_len=70, token_pad=1, seed=6)
    # Large batches of many backends take long, and no path of the kernel depends on the number.
    heavy = (*long, many) if config.num_backends < 16 else ()
    if config.verified:
        heavy += (STEPS,)
    # ThreadSanitizer has no use for far addresses, and the shadow of so much memory is slow.
    return (*SHAPES, *heavy, *((FAR,) if sanitizer != "thread" else ()))


@pytest.fixture(scope="session")
def builds(shared: Path) -> Path:
    """The session's programs."""
    folder = shared / "emulation"
    folder.mkdir(exist_ok=True)
    return folder


def own_blocks(config: KernelConfig) -> int:
    """A block for the lengths and one for each schedule, or one for each backend where they differ."""
    return config.sets + sum(1 if config.once(name) else config.sets for name in config.schedules)


def launch(
    source: str,
    config: KernelConfig,
    sanitizer: str,
    shapes: tuple[Shape, ...],
    builds: Path,
    launches: tuple[tuple[int, int], ...] = ((1, 1), (2, 64)),
    lines: bool = False,
) -> Outcome:
    """Builds and runs: by default blocks one after the other, then all at the same time."""
    reason = harness.missing_runtime(sanitizer)
    if reason is not None:
        pytest.skip(reason)
    each = own_blocks(config)
    # Equal rows have as many blocks for tables as they need: a few at the same time are enough.
    concurrent = 6 if config.equal_rows else config.blocks_per_sm * max((shape.sm_count for shape in shapes), default=1)
    copies = each + 2 * concurrent
    program = harness.build(source, sanitizer, builds, copies=copies, lines=lines)
    return harness.run(program, config, shapes, launches=launches)


def check(config: KernelConfig, sanitizer: str, shapes: tuple[Shape, ...], builds: Path, **options: object) -> None:
    outcome = launch(render(config), config, sanitizer, shapes, builds, **options)  # type: ignore[arg-type]
    if outcome.caught is not None:  # once more, for a report with the lines
        outcome = launch(render(config), config, sanitizer, shapes, builds, lines=True, **options)  # type: ignore[arg-type]
    assert outcome.caught is None, f"{config.settings()} under {sanitizer}: {outcome.caught}\n{outcome.text}"


# ---- against the reference -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PRESETS)
def test_preset_agrees_with_the_reference(name: str, builds: Path) -> None:
    """What ships, with its own blocks."""
    config = PRESETS[name]
    check(config, "none", shapes_for(config, "none"), builds, launches=((2, 64),))


@pytest.mark.parametrize("name", OTHERS)
def test_configuration_agrees_with_the_reference(name: str, builds: Path) -> None:
    config = OTHERS[name]
    # A block at a time, too: what one leaves must not matter to the next.
    check(config, "none", shapes_for(config, "none"), builds, launches=((1, 1), (2, 64)))


@pytest.mark.parametrize(
    ("name", "sanitizer"),
    [
        pytest.param(name, sanitizer, marks=[pytest.mark.long] * (name in LONG_UNDER[sanitizer]))
        for name in SMALL_STRATEGIES
        for sanitizer in SANITIZERS
    ],
)
def test_strategy_is_clean(name: str, sanitizer: str, builds: Path) -> None:
    """One configuration of each strategy and each field kind under the sanitizers.

    Once each: what they report doesn't depend on how the blocks happened to run (test_prelude).
    """
    config = SMALL_STRATEGIES[name]
    check(config, sanitizer, shapes_for(config, sanitizer), builds, launches=((5, 64),))


@pytest.mark.parametrize(
    ("name", "sanitizer"),
    [
        # But for the flag of audit.cuh, threads share what they share in a refresh. Two audits show a race there.
        pytest.param(name, sanitizer, marks=[pytest.mark.long] * (sanitizer == "thread" and name not in RACED_AUDITS))
        for name in AUDITS
        for sanitizer in SANITIZERS
    ],
)
def test_an_audit_is_clean_and_exact(name: str, sanitizer: str, builds: Path) -> None:
    """Nothing is written; what a refresh leaves isn't reported, and an element of each field that is wrong is."""
    config = AUDITS[name].replace(**SMALL)
    few = Shape("few", (290, 3, 0, 600), width=610, token_phase=4, table_phase=8, spare_rows=1)
    wrong = [few.replace(name=f"wrong {field}", wrong=field) for field in config.fields]
    check(config, sanitizer, (RAGGED, *wrong), builds, launches=((5, 64),))


@pytest.mark.parametrize("threads", [64, 256])
def test_the_parts_of_flashmla_at_ends_and_between(threads: int, builds: Path) -> None:
    """Chunks of many requests, which the CPU target hasn't: parts that begin at every end, at some, and at none."""
    config = KernelConfig(num_backends=2, fields=("flashmla_metadata", "num_splits"), threads=threads)
    shapes = [
        Shape(
            f"{batch} of {length} less {less}, {parts} parts",
            tuple(length - i * 37 % less for i in range(batch)),
            num_sm_parts=parts,
        )
        for batch in (1, 2, 33, 64, 65, 128, 256, 257, 600)
        for length, less in ((64, 1), (2048, 1), (4096, 128), (32_768, 1024))
        for parts in (1, 11, 132, 512)
    ]
    check(config, "none", tuple(shapes), builds, launches=((1, 1),))


@pytest.mark.long
@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("name", [*OTHERS, *PRESETS])
def test_every_configuration_is_clean(name: str, sanitizer: str, builds: Path) -> None:
    config = OTHERS[name] if name in OTHERS else PRESETS[name].replace(**SMALL)
    shapes = shapes_for(config, sanitizer) if config.threads < 1024 or sanitizer != "thread" else (RAGGED,)
    if sanitizer == "thread" and own_blocks(config) * config.threads > MAX_TSAN_THREADS:
        # Half of the backends: all their blocks run the same code, and a block keeps its warps.
        half = config.num_backends // 2
        config = config.replace(num_backends=half, seqlen_offsets=config.seqlen_offsets[:half])
        assert own_blocks(config) * config.threads < MAX_TSAN_THREADS
    check(config, sanitizer, shapes, builds, launches=((6, 64),))


@pytest.mark.long
@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize(
    "name", ["nsa-decode-3", "nsa-decode-3-full", "nsa-decode-3-pages-only", "nsa-copy-3", "nsa-target-verify-3"]
)
def test_preset_is_clean_with_its_own_blocks(name: str, sanitizer: str, builds: Path) -> None:
    shapes = (RAGGED, FAR) if sanitizer != "thread" else (RAGGED,)
    check(PRESETS[name], sanitizer, shapes, builds, launches=((4, 64),))


@pytest.mark.parametrize(
    "config",
    [
        SMALL_STRATEGIES["checked"],
        SMALL_STRATEGIES["rows"].replace(checked=True, extent="full"),
        SMALL_STRATEGIES["checked variable rows"],
        SMALL_STRATEGIES["filled pages"].replace(checked=True),
        SMALL_STRATEGIES["checked indices"],
    ],
    ids=["decode", "full rows", "variable", "filled", "indices"],
)
def test_a_row_outside_the_pool_is_not_read(config: KernelConfig, builds: Path) -> None:
    """The sanitizer would see a read; the violation is recorded for the host."""
    shapes = [
        Shape(f"row {row} of {3 * many}", (600, 30, 600) * many, width=610, bad_pool_row=row, extends=(2, 0, 3))
        for row, many in ((-1, 1), (4, 1), (2**40, 40), (-(2**40), 1))
    ]
    check(config, "address+undefined", tuple(shapes), builds, launches=((7, 64),))


# ---- faults ----------------------------------------------------------------------------------------------------------
PLANTED = {fault.name: (template, fault) for template, faults in FAULTS.items() for fault in faults}
# One of each file; the others are long tests. That each check catches what it is for, test_prelude shows as well.
_FIRST = {template: name for name, (template, _) in reversed(PLANTED.items())}


@functools.cache
def sound(config: KernelConfig, sanitizer: str, builds: Path) -> Outcome:
    """The unchanged source, on the shapes of all faults in this configuration."""
    alike = (fault for _, fault in PLANTED.values() if (fault.config, fault.sanitizer) == (config, sanitizer))
    return launch(render(config), config, sanitizer, tuple(dict.fromkeys(fault.shape for fault in alike)), builds)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.long] * (n not in _FIRST.values()), id=n.replace(" ", "-")) for n in PLANTED],
)
def test_fault_is_caught(name: str, builds: Path) -> None:
    template, fault = PLANTED[name]
    before = sound(fault.config, fault.sanitizer, builds)
    assert before.caught is None, f"the unchanged source is faulty: {before.text}"
    source = fault.apply(render(fault.config), template)
    after = launch(source, fault.config, fault.sanitizer, (fault.shape,), builds)
    assert after.caught == fault.caught_by, f"{fault.breaks}; caught by {after.caught}:\n{after.text}"


def test_a_fault_that_matches_nothing_fails() -> None:
    template, fault = next(iter(PLANTED.values()))
    with pytest.raises(LookupError, match="no longer matches"):
        fault.apply("int main() {}", template)


# ---- the prelude -----------------------------------------------------------------------------------------------------
# A kernel of two blocks with the parameters of PROBE_CONFIG; `i` counts the grid's threads, 64 a block. What it must do
# is cache_seqlens[i] = seq_lens[i]; the probes do it by detours, and some of those are wrong.
PROBE_CONFIG = KernelConfig(fields=("cache_seqlens",), threads=64)
PROBE_SHAPE = Shape("probe", tuple(range(1000, 1128)))
PROBE = """
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
  BODY
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


@pytest.mark.parametrize("name", PROBES, ids=lambda name: name.replace(" ", "-"))
def test_prelude(name: str, builds: Path) -> None:
    body, sanitizer, caught_by = PROBES[name]
    config = PROBE_CONFIG
    outcomes = [
        launch(PROBE.replace("BODY", body), config, sanitizer, (PROBE_SHAPE,), builds, launches=launches)
        for launches in (((1, 1),), ((2, 64),))
    ]
    # The same verdict whether the blocks ran one after the other or at the same time.
    assert [o.caught for o in outcomes] == [caught_by] * 2, "\n".join(o.text for o in outcomes)


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
def test_what_the_prelude_lacks_does_not_compile(body: str, builds: Path) -> None:
    with pytest.raises(CompileError):
        launch(PROBE.replace("BODY", body), PROBE_CONFIG, "none", (PROBE_SHAPE,), builds)


def test_a_failure_names_the_seed(builds: Path) -> None:
    source = PROBE.replace("BODY", "out[i] = blockIdx.x;")
    outcome = launch(source, PROBE_CONFIG, "none", (PROBE_SHAPE,), builds, launches=((41, 2),))
    assert outcome.caught == "mismatch"
    assert "probe, seed 41, 2 blocks together: cache_seqlens[0] differs in 128" in outcome.text
