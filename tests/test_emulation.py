"""Emitted CUDA on host threads: against the reference, under the sanitizers, and with faults planted."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from emulation import harness
from emulation.harness import Case, CompileError, Outcome
from emulation.mutations import MUTATIONS, Mutation
from onelaunch.emit.render import render
from onelaunch.spec.config import KernelConfig
from onelaunch.spec.fields import FIELDS
from onelaunch.spec.presets import PRESETS, preset

# Tile edges, nothing, padding, lengths beyond the table and beyond what sums in 31 bits.
RAGGED = Case(
    "ragged",
    (0, 1, 1603, -4, 511, 512, 513, 2**31 - 1, 2**32 + 5, 1600, 2**31 - 1),
    width=1603,
    token_phase=4,
    table_phase=8,
    table_pad=4,
    spare_rows=1,
)
# More tiles than two for each warp.
LONG = Case("long rows", tuple(389 * i % 1700 for i in range(50)), width=1609, token_phase=4, table_phase=12, seed=7)
CASES = (
    RAGGED,
    Case("no requests", ()),
    Case("one request", (5,), width=12),
    # Row strides that are odd: every row of source and destination has another phase.
    Case("phases", (1541,) * 9, width=1541, pool_rows=5, table_pad=0, token_phase=12, table_phase=4, seed=1),
    # The fast path's last tile ends where all memory does.
    Case("exact", (1536, 1024, 1536), width=1536, pool_rows=2, token_phase=8, seed=2),
    Case("bounded", (40, 900, 1300, 750), width=1300, table_columns=1001, max_len=700, input_stride=3, seed=3),
    Case("narrow tables", (40, 900, 1300), width=1300, table_columns=770, seed=4),
    # As many blocks as requests or more: each has its own, once or a few times over, and what is left is shared out.
    Case("few rounds", (1401, 0), width=1401, token_phase=4, table_phase=12, seed=8),
    Case("one long request", (1402,), width=1403, token_phase=4, table_phase=12, seed=10),
    Case("a rest to share", (2500, 90), width=2503, token_phase=12, table_phase=4, seed=9),
    Case("a rest for half the blocks", (7000,), width=7003, token_phase=4, table_phase=12, seed=11),
)
# Rows that lie more than 2^32 bytes apart, and elements from 2^31 on. ThreadSanitizer has no use for it, and the
# shadow of so much memory is slow.
FAR = Case("far", (600, 31, 600), width=600, pool_rows=3, sparse_stride=2**30 + 4, spare_rows=1, seed=5)


def all_cases(config: KernelConfig, sanitizer: str) -> tuple[Case, ...]:
    """Every case that the sanitizer has a use for, with one of more requests than two windows of threads."""
    requests, long = 2 * config.threads + 45, (LONG,)
    if sanitizer == "thread" and config.equal_rows:
        # Every tile has a warp of its own, and to begin a thread costs ThreadSanitizer more than a millisecond. Longer
        # rows only have more warps, all of which do what those of RAGGED do. A second window is what the lengths' block
        # needs; the other sanitizers see the third.
        requests, long = config.threads + 5, ()
    many = Case("many", tuple(range(requests)), width=90, max_len=70, token_pad=1, seed=6)
    # Large batches of many backends take long, and no path of the kernel depends on the number.
    heavy = (*long, many) if config.num_backends < 16 else ()
    return (*CASES, *heavy, *((FAR,) if sanitizer != "thread" else ()))


SMALL = {"threads": 64, "blocks_per_sm": 2}
TABLES = ("page_indices", "real_page_table")
SEVEN = (*KernelConfig().fields, "seqlens_expanded")
BY_BATCH = tuple(name for name, field in FIELDS.items() if field.kind in ("lengths", "cumulative", "table"))
SCHEDULES = ("paged_mqa_schedule_metadata", "flashmla_metadata", "num_splits")
CSR = ("kv_indptr", "kv_indices")
EXTRAS = {
    "one-warp": KernelConfig(num_backends=2, threads=32, blocks_per_sm=4),
    "four-warps": KernelConfig(num_backends=2, threads=128),
    "largest-block": KernelConfig(num_backends=2, threads=1024, blocks_per_sm=1),
    "unroll-1": KernelConfig(num_backends=2, unroll=1, **SMALL),
    "many-blocks": KernelConfig(num_backends=2, threads=64, unroll=1, blocks_per_sm=8),
    "full-unroll-1": KernelConfig(num_backends=2, extent="full", unroll=1, page_size=16, **SMALL),
    "unroll-8": KernelConfig(num_backends=2, unroll=8, **SMALL),
    "odd-pages": KernelConfig(num_backends=2, page_size=7, **SMALL),
    "odd-pages-int64": KernelConfig(page_size=7, req_to_token_dtype="int64", extent="full", **SMALL),
    "pages-beyond-a-tile": KernelConfig(num_backends=2, page_size=1024, **SMALL),
    "pages-alone": KernelConfig(num_backends=2, fields=("real_page_table",), extent="full", **SMALL),
    "pages-alone-live": KernelConfig(fields=("real_page_table",), page_size=3, **SMALL),
    "table-alone": KernelConfig(num_backends=2, fields=("page_indices",), **SMALL),
    "expanded": KernelConfig(num_backends=2, fields=("seqlens_expanded", "nsa_cu_seqlens_k"), index_topk=0, threads=64),
    "shared-by-backends": KernelConfig(
        num_backends=4, distinct=(("page_indices", 1), ("cu_seqlens_k", 2), ("real_page_table", 3)), **SMALL
    ),
    "verify-words": KernelConfig(mode="target_verify", next_n=3, num_backends=2, vector_bytes=4, **SMALL),
    "verify-full": KernelConfig(
        mode="target_verify", next_n=2, num_backends=2, extent="full", page_size=7, fields=SEVEN, **SMALL
    ),
    "draft-extend-pages": KernelConfig(
        mode="draft_extend", next_n=3, fields=("seqlens_expanded", "real_page_table"), page_size=3, **SMALL
    ),
    "variable-words": KernelConfig(
        mode="draft_extend", extend="variable", extend_seq_lens_dtype="int32", vector_bytes=4, fields=SEVEN, **SMALL
    ),
    "variable-full": KernelConfig(mode="draft_extend", extend="variable", num_backends=2, extent="full", **SMALL),
    "variable-lengths": KernelConfig(mode="draft_extend", extend="variable", fields=("seqlens_expanded",), threads=64),
    "variable-filled-checked": KernelConfig(
        mode="draft_extend", extend="variable", fields=("real_page_table",), page_fill=-1, checked=True, **SMALL
    ),
    "variable-checked": KernelConfig(
        mode="draft_extend", extend="variable", fields=SEVEN, num_backends=2, checked=True, **SMALL
    ),
    "offset": KernelConfig(num_backends=2, seqlen_offsets=(5,), **SMALL),
    "offsets": KernelConfig(num_backends=3, seqlen_offsets=(0, 700, 5), fields=SEVEN, **SMALL),
    "offsets-shared": KernelConfig(
        num_backends=3,
        seqlen_offsets=(9, 2, 5),
        distinct=(("page_indices", 1),),
        fields=("cu_seqlens_k", *TABLES),
        page_size=7,
        **SMALL,
    ),
    "offsets-verify-filled": KernelConfig(
        num_backends=2,
        seqlen_offsets=(1, 80),
        mode="target_verify",
        next_n=2,
        fields=("nsa_cu_seqlens_k", "real_page_table"),
        page_fill=-1,
        **SMALL,
    ),
    "pools": KernelConfig(
        num_backends=2, index_kpool=3, page_size=2, index_topk=100, fields=BY_BATCH, mode="draft_extend", **SMALL
    ),
    "pools-of-pages": KernelConfig(index_kpool=4, page_size=2, fields=("pooled_real_page_table",), **SMALL),
    "schedules": KernelConfig(num_backends=2, fields=(*SEVEN, *SCHEDULES), schedule_remainder="first", **SMALL),
    "schedules-alone": KernelConfig(
        num_backends=3, fields=SCHEDULES, distinct=(("num_splits", 1),), flashmla_order="2025", threads=32
    ),
    "schedules-verify-checked": KernelConfig(
        num_backends=2,
        mode="target_verify",
        next_n=5,
        fields=("real_page_table", *SCHEDULES),
        checked=True,
        page_size=3,
        **SMALL,
    ),
    "schedules-of-rows": KernelConfig(
        mode="draft_extend", next_n=3, schedule_per="row", fields=("seqlens_expanded", *SCHEDULES), **SMALL
    ),
    "schedules-offsets-pools": KernelConfig(
        num_backends=3,
        seqlen_offsets=(9, 2, 500),
        index_kpool=3,
        mode="target_verify",
        next_n=4,
        fields=("cu_seqlens_k", *SCHEDULES),
        threads=64,
    ),
    "full-own-lengths": KernelConfig(
        num_backends=3,
        fields=("cache_seqlens", "page_indices"),
        seq_lens_dtype="int32",
        seqlen_offsets=(1, 2, 3),
        extent="full",
        **SMALL,
    ),
    "indices": KernelConfig(num_backends=2, fields=CSR, **SMALL),
    "indices-int64": KernelConfig(
        num_backends=3, distinct=(("kv_indices", 2),), fields=("kv_indices",), req_to_token_dtype="int64", **SMALL
    ),
    "indices-checked": KernelConfig(
        num_backends=2, seqlen_offsets=(3, 70), mode="target_verify", next_n=2, fields=CSR, checked=True, **SMALL
    ),
    "indices-beside": KernelConfig(
        num_backends=2, seqlen_offsets=(7,), fields=("cu_seqlens_k", *CSR, *SCHEDULES), **SMALL
    ),
    "copy-rows": KernelConfig(operation="copy", mode="target_verify", num_backends=2, fields=BY_BATCH, **SMALL),
    "copy-words": KernelConfig(operation="copy", num_backends=2, vector_bytes=4, **SMALL),
    "copy-lengths": KernelConfig(operation="copy", num_backends=2, fields=("cu_seqlens_k",), threads=64),
}


@pytest.fixture(scope="session")
def builds(shared: Path) -> Path:
    """The session's programs."""
    folder = shared / "emulation"
    folder.mkdir(exist_ok=True)
    return folder


def launch(
    source: str,
    config: KernelConfig,
    sanitizer: str,
    cases: tuple[Case, ...],
    builds: Path,
    launches: tuple[tuple[int, int], ...] = ((1, 1), (2, 64)),
    lines: bool = False,
) -> Outcome:
    """Builds and runs: by default blocks one after the other, then all at the same time."""
    reason = harness.missing_runtime(sanitizer)
    if reason is not None:
        pytest.skip(reason)
    # A block for the lengths and one for each schedule, or one for each backend where they differ.
    each = (1 + len(config.schedules)) * max(1, len(config.seqlen_offsets))
    # Equal rows have as many blocks for tables as they need: a few at the same time are enough.
    most = 6 if config.equal_rows else config.blocks_per_sm * max((case.sm_count for case in cases), default=1)
    copies = each + 2 * most
    program = harness.build(source, sanitizer, builds, copies=copies, lines=lines)
    return harness.run(program, config, cases, launches=launches)


def check(config: KernelConfig, sanitizer: str, cases: tuple[Case, ...], builds: Path, **options: object) -> None:
    outcome = launch(render(config), config, sanitizer, cases, builds, **options)  # type: ignore[arg-type]
    if outcome.caught is not None:  # once more, for a report with the lines
        outcome = launch(render(config), config, sanitizer, cases, builds, lines=True, **options)  # type: ignore[arg-type]
    assert outcome.caught is None, f"{config.settings()} under {sanitizer}: {outcome.caught}\n{outcome.text}"


# ---- what ships ------------------------------------------------------------------------------------------------------
# One preset of each kind of kernel. Blocks of the shipped size take the sanitizers long, and what these see in them is
# what they see in small ones: every preset runs with those.
OF_EACH_KIND = ("nsa-decode-3", "nsa-decode-3-full", "nsa-decode-3-pages-only", "nsa-copy-3", "nsa-target-verify-3")


@pytest.mark.parametrize("name", PRESETS)
def test_preset_agrees_with_the_reference(name: str, builds: Path) -> None:
    config = preset(name)
    in_turn_too = {} if name in OF_EACH_KIND else {"launches": ((2, 64),)}
    check(config, "none", all_cases(config, "none"), builds, **in_turn_too)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("sanitizer", ["address+undefined", "thread"])
def test_preset_is_clean(name: str, sanitizer: str, builds: Path) -> None:
    # Threads cost ThreadSanitizer dearly: the preset's own blocks see little, smaller ones see every case. Once each:
    # what it reports doesn't depend on how the blocks happened to run (test_prelude).
    config = preset(name)
    if name in OF_EACH_KIND:
        cases = (RAGGED, FAR) if sanitizer != "thread" else (RAGGED,)
        check(config, sanitizer, cases, builds, launches=((4, 64),))
    small = config.replace(**SMALL)
    check(small, sanitizer, all_cases(small, sanitizer), builds, launches=((5, 64),))


@pytest.mark.parametrize("sanitizer", ["address+undefined", "thread"])
@pytest.mark.parametrize("name", EXTRAS)
def test_other_configurations(name: str, sanitizer: str, builds: Path) -> None:
    config = EXTRAS[name]
    cases = all_cases(config, sanitizer) if sanitizer != "thread" and config.threads < 1024 else (RAGGED,)
    check(config, sanitizer, cases, builds, launches=((6, 64),))


# Nothing is read of a row that isn't there, which the sanitizer would see, and the host is told.
@pytest.mark.parametrize(
    "config",
    [
        preset("nsa-decode-3-checked").replace(**SMALL),
        preset("nsa-target-verify-3").replace(checked=True, extent="full", **SMALL),
        EXTRAS["variable-checked"],
        KernelConfig(fields=("real_page_table",), page_fill=-1, checked=True, **SMALL),
        EXTRAS["indices-checked"],
    ],
    ids=["decode", "verify-full", "variable", "filled", "indices"],
)
def test_a_row_that_is_not_in_the_pool(config: KernelConfig, builds: Path) -> None:
    cases = [
        Case(f"row {row} of {3 * many}", (600, 30, 600) * many, width=610, bad_pool_row=row, extends=(2, 0, 3))
        for row, many in ((-1, 1), (4, 1), (2**40, 40), (-(2**40), 1))
    ]
    check(config, "address+undefined", tuple(cases), builds, launches=((7, 64),))


# ---- faults ----------------------------------------------------------------------------------------------------------
@functools.cache
def sound(config: KernelConfig, sanitizer: str, case: Case, builds: Path) -> Outcome:
    return launch(render(config), config, sanitizer, (case,), builds)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name.replace(" ", "-"))
def test_mutation_is_caught(mutation: Mutation, builds: Path) -> None:
    before = sound(mutation.config, mutation.sanitizer, mutation.case, builds)
    assert before.caught is None, f"the unchanged source is faulty: {before.text}"
    mutant = mutation.apply(render(mutation.config))
    after = launch(mutant, mutation.config, mutation.sanitizer, (mutation.case,), builds)
    assert after.caught == mutation.caught_by, f"{mutation.breaks}; caught by {after.caught}:\n{after.text}"


def test_mutation_that_matches_nothing_fails() -> None:
    mutation = MUTATIONS[0]
    with pytest.raises(LookupError, match="no longer matches"):
        mutation.apply("int main() {}")


# ---- the prelude -----------------------------------------------------------------------------------------------------
# A kernel of two blocks with the parameters of PROBE_CONFIG; `i` counts the grid's threads, 64 a block. What it must do
# is cache_seqlens[i] = seq_lens[i]; the probes do it by detours, and some of those are wrong.
PROBE_CONFIG = KernelConfig(fields=("cache_seqlens",), threads=64)
PROBE_CASE = Case("probe", tuple(range(1000, 1128)))
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
        launch(PROBE.replace("BODY", body), config, sanitizer, (PROBE_CASE,), builds, launches=launches)
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
        launch(PROBE.replace("BODY", body), PROBE_CONFIG, "none", (PROBE_CASE,), builds)


def test_a_failure_names_the_seed(builds: Path) -> None:
    source = PROBE.replace("BODY", "out[i] = blockIdx.x;")
    outcome = launch(source, PROBE_CONFIG, "none", (PROBE_CASE,), builds, launches=((41, 2),))
    assert outcome.caught == "mismatch"
    assert "probe, seed 41, 2 blocks together: cache_seqlens[0] differs in 128" in outcome.text
