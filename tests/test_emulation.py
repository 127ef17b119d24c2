"""Emitted CUDA on host threads: against the reference, under the sanitizers, and with planted faults."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from cases import AUDITS, CONFIGURATIONS, CSR, FAR, LONG_ROWS, RAGGED, SHAPES, STEPS, STRATEGIES, Shape
from emulation.faults import FAULTS
from emulation.harness import Outcome, launch, own_blocks
from onelaunch import PRESETS, KernelConfig, render
from onelaunch.emit.render import device_files

pytestmark = pytest.mark.uncounted
SANITIZERS = ("address+undefined", "thread")
# Small blocks: the sanitizers are slow on blocks of the shipped size and find nothing more in them.
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
# Per grid. GCC's ThreadSanitizer holds 8,128 threads. It makes 9 mappings per thread, and Linux allows 65,530.
MAX_TSAN_THREADS = 7000
RACED_AUDITS = ("live", "variable rows")
# Half a minute each: where lengths lie at 2^31, warps walk over millions of elements that have no room.
LASTING_AUDITS = ("declared offsets",)
# These take long, and other configurations cover each of their parts.
LONG_UNDER = {
    "address+undefined": ("declared rows", "padded"),
    "thread": ("declared rows", "declared offsets", "padded", "padded rows", "verified offsets"),
}
# One preset for each set of device files. The others differ only in settings, which OTHERS cover in other combinations.
SHIPPED = {
    (*device_files(config), config.wide_tiles, config.checked): name for name, config in reversed(PRESETS.items())
}.values()
SMALL_STRATEGIES = {name: config.replace(**SMALL) for name, config in STRATEGIES.items()}
OTHERS = {
    **{name: config.replace(**SMALL) for name, config in CONFIGURATIONS.items() if name not in STRATEGIES},
    **{name: LIVE.replace(**settings) for name, settings in LAUNCHES.items()},
    **{f"{name}, equal rows": FULL.replace(**LAUNCHES[name]) for name in ("four warps", "unroll 1")},
}


def shapes_for(config: KernelConfig, sanitizer: str) -> tuple[Shape, ...]:
    """Every shape that is of use under the sanitizer, and one with more requests than two windows of threads."""
    requests, long = 2 * config.threads + 45, (LONG_ROWS,)
    if sanitizer == "thread" and config.equal_rows:
        # Each tile has its own warp, and ThreadSanitizer takes more than a millisecond to start a thread. Longer rows
        # only add warps that do what RAGGED's do. Two windows are enough for the lengths' block; the other sanitizers
        # run a third.
        requests, long = config.threads + 5, ()
    many = Shape("many", tuple(range(requests)), width=90, max_len=70, token_pad=1, seed=6)
    if config.strategy == "live" and config.pages_alone:
        # Blocks in groups, one of them left over, and each group has several windows of rows.
        rows = tuple(i * 977 % 1301 for i in range(4 * config.threads + 45))
        long = (*long, Shape("groups", rows, width=1303, sm_count=3, token_phase=4, table_pad=2))
    # Large batches of many backends take long, and no path of the kernel depends on the number of backends.
    heavy = (*long, many) if config.num_backends < 16 else ()
    if config.verified:
        heavy += (STEPS,)
    # Far addresses can't cause a race, and ThreadSanitizer's shadow of so much memory is slow.
    return (*SHAPES, *heavy, *((FAR,) if sanitizer != "thread" else ()))


def check(config: KernelConfig, sanitizer: str, shapes: tuple[Shape, ...], programs: Path, **options: object) -> None:
    outcome = launch(render(config), config, sanitizer, shapes, programs, **options)  # type: ignore[arg-type]
    if outcome.caught is not None:  # run again for a report with line numbers
        outcome = launch(render(config), config, sanitizer, shapes, programs, lines=True, **options)  # type: ignore[arg-type]
    assert outcome.caught is None, f"{config.settings()} under {sanitizer}: {outcome.caught}\n{outcome.text}"


# ---- against the reference -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name not in SHIPPED)) for name in PRESETS]
)
def test_preset_agrees_with_the_reference(name: str, programs: Path) -> None:
    """The shipped presets, with blocks of the shipped size."""
    config = PRESETS[name]
    check(config, "none", shapes_for(config, "none"), programs, launches=((2, 64),))


@pytest.mark.parametrize("name", OTHERS)
def test_configuration_agrees_with_the_reference(name: str, programs: Path) -> None:
    config = OTHERS[name]
    # Also one block at a time: what one block leaves behind must not matter to the next.
    check(config, "none", shapes_for(config, "none"), programs, launches=((1, 1), (2, 64)))


@pytest.mark.parametrize(
    ("name", "sanitizer"),
    [
        pytest.param(name, sanitizer, marks=[pytest.mark.long] * (name in LONG_UNDER[sanitizer]))
        for name in SMALL_STRATEGIES
        for sanitizer in SANITIZERS
    ],
)
def test_strategy_is_clean(name: str, sanitizer: str, programs: Path) -> None:
    """One configuration of each strategy and each field kind under the sanitizers.

    One run each: the sanitizers' reports don't depend on the order of blocks (test_prelude.py).
    """
    config = SMALL_STRATEGIES[name]
    check(config, sanitizer, shapes_for(config, sanitizer), programs, launches=((5, 64),))


@pytest.mark.parametrize(
    ("name", "sanitizer"),
    [
        # Beyond a refresh, threads share only the flag of audit.cuh. Two audits are enough to show a race on it.
        pytest.param(name, sanitizer, marks=[pytest.mark.long] * long)
        for name in AUDITS
        for sanitizer in SANITIZERS
        for long in [name in LASTING_AUDITS or (sanitizer == "thread" and name not in RACED_AUDITS)]
    ],
)
def test_an_audit_is_clean_and_exact(name: str, sanitizer: str, programs: Path) -> None:
    """An audit writes nothing, reports nothing after a refresh, and reports one wrong element of each field."""
    config = AUDITS[name].replace(**SMALL)
    few = Shape("few", (290, 3, 0, 600), width=610, token_phase=4, table_phase=8, spare_rows=1)
    wrong = [few.replace(name=f"wrong {field}", wrong=field) for field in config.fields]
    check(config, sanitizer, (RAGGED, *wrong), programs, launches=((5, 64),))


@pytest.mark.parametrize("cost", [0, 7, 8, 2**20])
def test_deepgemm_schedules_of_the_longest_lengths(cost: int, programs: Path) -> None:
    """Up to 64 items whose units fit in 32 bits, fill them, or don't fit, and more items than that."""
    config = KernelConfig(fields=("paged_mqa_schedule_metadata",), threads=64, schedule_split_cost=cost)
    shapes = [
        Shape(f"{batch} of {length}, {sms} SMs", (length,) * (batch - 1) + (last,), num_sms=sms)
        for batch in (1, 2, 8, 9, 31, 32, 33, 63, 64, 65)
        for length, last in ((2**31 - 1, 2**31 - 1), (2**31 - 1, 0), (0, 2**31 - 1), (70_001, 5))
        for sms in (1, 31, 132, 600)
    ]
    check(config, "none", tuple(shapes), programs, launches=((1, 1),))


@pytest.mark.parametrize("writes", ["all", "verified"])
def test_parts_of_tiles_for_many_backends(writes: str, programs: Path) -> None:
    """Where each part has a block, neighbouring parts are in neighbouring blocks; elsewhere they share one."""
    offsets = (1, 2, 3, 4, 70)
    config = KernelConfig(num_backends=5, fields=CSR, seqlen_offsets=offsets, threads=64, writes=writes)
    shapes = [
        Shape(f"{lengths} in {room}", lengths, width=4003, max_indices=room, sm_count=16)
        for lengths in ((1400,), (5, 300), (0,), (1900, 0), (3900,))
        for room in (0, 299, 9000)
    ]
    check(config, "address+undefined", tuple(shapes), programs, launches=((3, 64),))


@pytest.mark.parametrize("threads", [64, 256])
def test_the_parts_of_flashmla_at_ends_and_between(threads: int, programs: Path) -> None:
    """Parts that begin at the end of every request, of some, or of none. The CPU target has no chunks of requests."""
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
    check(config, "none", tuple(shapes), programs, launches=((1, 1),))


@pytest.mark.long
@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("name", [*OTHERS, *PRESETS])
def test_every_configuration_is_clean(name: str, sanitizer: str, programs: Path) -> None:
    config = OTHERS[name] if name in OTHERS else PRESETS[name].replace(**SMALL)
    shapes = shapes_for(config, sanitizer) if config.threads < 1024 or sanitizer != "thread" else (RAGGED,)
    if sanitizer == "thread" and own_blocks(config) * config.threads > MAX_TSAN_THREADS:
        # Half of the backends is enough: their blocks all run the same code, and no block loses warps.
        half = config.num_backends // 2
        config = config.replace(num_backends=half, seqlen_offsets=config.seqlen_offsets[:half])
        assert own_blocks(config) * config.threads < MAX_TSAN_THREADS
    check(config, sanitizer, shapes, programs, launches=((6, 64),))


@pytest.mark.long
@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize(
    "name", ["nsa-decode-3", "nsa-decode-3-full", "nsa-decode-3-pages-only", "nsa-copy-3", "nsa-target-verify-3"]
)
def test_preset_is_clean_with_its_own_blocks(name: str, sanitizer: str, programs: Path) -> None:
    shapes = (RAGGED, FAR) if sanitizer != "thread" else (RAGGED,)
    check(PRESETS[name], sanitizer, shapes, programs, launches=((4, 64),))


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
def test_a_row_outside_the_pool_is_not_read(config: KernelConfig, programs: Path) -> None:
    """The sanitizer would see a read; the violation is recorded for the host."""
    shapes = [
        Shape(f"row {row} of {3 * many}", (600, 30, 600) * many, width=610, bad_pool_row=row, extends=(2, 0, 3))
        for row, many in ((-1, 1), (4, 1), (2**40, 40), (-(2**40), 1))
    ]
    check(config, "address+undefined", tuple(shapes), programs, launches=((7, 64),))


# ---- faults ----------------------------------------------------------------------------------------------------------
PLANTED = {fault.name: (template, fault) for template, faults in FAULTS.items() for fault in faults}
# The first fault of each file; the others are long tests. test_prelude.py also shows that each check catches its fault.
_FIRST = {template: name for name, (template, _) in reversed(PLANTED.items())}


@functools.cache
def sound(config: KernelConfig, sanitizer: str, programs: Path) -> Outcome:
    """The unchanged source, on the shapes of all faults in this configuration."""
    alike = (fault for _, fault in PLANTED.values() if (fault.config, fault.sanitizer) == (config, sanitizer))
    return launch(render(config), config, sanitizer, tuple(dict.fromkeys(fault.shape for fault in alike)), programs)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.long] * (n not in _FIRST.values()), id=n.replace(" ", "-")) for n in PLANTED],
)
def test_fault_is_caught(name: str, programs: Path) -> None:
    template, fault = PLANTED[name]
    before = sound(fault.config, fault.sanitizer, programs)
    assert before.caught is None, f"the unchanged source is faulty: {before.text}"
    source = fault.apply(render(fault.config), template)
    after = launch(source, fault.config, fault.sanitizer, (fault.shape,), programs)
    assert after.caught == fault.caught_by, f"{fault.breaks}; caught by {after.caught}:\n{after.text}"


def test_a_fault_that_matches_nothing_fails() -> None:
    template, fault = next(iter(PLANTED.values()))
    with pytest.raises(LookupError, match="no longer matches"):
        fault.apply("int main() {}", template)
