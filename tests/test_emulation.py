"""Emitted CUDA on host threads: against the reference, under the sanitizers, and with planted faults."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from cases import AUDITS, CONFIGURATIONS, FAR, LONG_ROWS, RAGGED, SHAPES, STEPS, STRATEGIES, Shape
from emulation.faults import FAULTS
from emulation.harness import Outcome, launch, own_blocks
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


def check(config: KernelConfig, sanitizer: str, shapes: tuple[Shape, ...], programs: Path, **options: object) -> None:
    outcome = launch(render(config), config, sanitizer, shapes, programs, **options)  # type: ignore[arg-type]
    if outcome.caught is not None:  # once more, for a report with the lines
        outcome = launch(render(config), config, sanitizer, shapes, programs, lines=True, **options)  # type: ignore[arg-type]
    assert outcome.caught is None, f"{config.settings()} under {sanitizer}: {outcome.caught}\n{outcome.text}"


# ---- against the reference -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PRESETS)
def test_preset_agrees_with_the_reference(name: str, programs: Path) -> None:
    """What ships, with its own blocks."""
    config = PRESETS[name]
    check(config, "none", shapes_for(config, "none"), programs, launches=((2, 64),))


@pytest.mark.parametrize("name", OTHERS)
def test_configuration_agrees_with_the_reference(name: str, programs: Path) -> None:
    config = OTHERS[name]
    # A block at a time, too: what one leaves must not matter to the next.
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

    Once each: what they report doesn't depend on how the blocks happened to run (test_prelude.py).
    """
    config = SMALL_STRATEGIES[name]
    check(config, sanitizer, shapes_for(config, sanitizer), programs, launches=((5, 64),))


@pytest.mark.parametrize(
    ("name", "sanitizer"),
    [
        # But for the flag of audit.cuh, threads share what they share in a refresh. Two audits show a race there.
        pytest.param(name, sanitizer, marks=[pytest.mark.long] * (sanitizer == "thread" and name not in RACED_AUDITS))
        for name in AUDITS
        for sanitizer in SANITIZERS
    ],
)
def test_an_audit_is_clean_and_exact(name: str, sanitizer: str, programs: Path) -> None:
    """Nothing is written; what a refresh leaves isn't reported, and an element of each field that is wrong is."""
    config = AUDITS[name].replace(**SMALL)
    few = Shape("few", (290, 3, 0, 600), width=610, token_phase=4, table_phase=8, spare_rows=1)
    wrong = [few.replace(name=f"wrong {field}", wrong=field) for field in config.fields]
    check(config, sanitizer, (RAGGED, *wrong), programs, launches=((5, 64),))


@pytest.mark.parametrize("threads", [64, 256])
def test_the_parts_of_flashmla_at_ends_and_between(threads: int, programs: Path) -> None:
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
    check(config, "none", tuple(shapes), programs, launches=((1, 1),))


@pytest.mark.long
@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("name", [*OTHERS, *PRESETS])
def test_every_configuration_is_clean(name: str, sanitizer: str, programs: Path) -> None:
    config = OTHERS[name] if name in OTHERS else PRESETS[name].replace(**SMALL)
    shapes = shapes_for(config, sanitizer) if config.threads < 1024 or sanitizer != "thread" else (RAGGED,)
    if sanitizer == "thread" and own_blocks(config) * config.threads > MAX_TSAN_THREADS:
        # Half of the backends: all their blocks run the same code, and a block keeps its warps.
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
# One of each file; the others are long tests. That each check catches what it is for, test_prelude.py shows as well.
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
