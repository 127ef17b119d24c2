"""Everything that the bench measures, by name: the engine's own way, ours, Triton, PyTorch, and lower bounds.

Each is implemented as well as possible, and declares what it writes, so that it is checked against the reference before
it is timed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import onelaunch
import torch

from . import baselines, sglang_refresh, torch_refresh
from .cases import INDEX_TOPK, Case
from .implementation import Implementation, Unsupported
from .scene import Call, Scene
from .sglang_modules import Missing

# Words that one block writes in about 50 milliseconds.
_MAX_SINGLE_BLOCK_WORDS = 16_000_000


def _page_size_of_tensors(case: Case) -> None:
    if case.page_size & (case.page_size - 1):
        raise Unsupported("its page size is a power of two")


# ---- onelaunch -------------------------------------------------------------------------------------------------------
def _onelaunch(scene: Scene, case: Case) -> list[Call]:
    return [scene.refresh_call(case.extent)]


def _verified(moved: bool) -> Callable[[Scene, Case], list[Call]]:
    """Verified writes. The calls refresh two states in turn, because in a server something changes between two steps.

    Args:
        moved: the other state has each request in another's place, so that every tile differs; otherwise it has one
            token less in each request.
    """

    def variants(scene: Scene, case: Case) -> list[Call]:
        if moved and case.batch == 1:
            raise Unsupported("a single request can't take another one's place")
        seq_lens, rows, _ = scene.inputs
        other = (seq_lens, rows.roll(1)) if moved else ((seq_lens - 1).clamp(min=0), rows)
        plan = scene.plan(case.extent, writes="verified")
        states = [(seq_lens, rows), other]
        turn = 0

        def call() -> None:
            nonlocal turn
            plan.run(*states[turn])
            turn = 1 - turn

        def forget() -> None:
            nonlocal turn
            turn = 0
            plan.forget()

        scene.poisoned.append(forget)
        return [call]

    return variants


def _declared(scene: Scene, case: Case) -> list[Call]:
    """Two of the fields declared as a user would, by the same formulas and into the same destinations."""
    formulas = {"cache_seqlens": "seq_len", "nsa_cache_seqlens": "min(seq_len, index_topk)"}
    without = [dataclasses.replace(buffers, **dict.fromkeys(formulas)) for buffers in scene.buffers]
    declare = {
        f"declared_{name}": onelaunch.into(
            onelaunch.vector(formula, "request"), [getattr(buffers, name) for buffers in scene.buffers]
        )
        for name, formula in formulas.items()
    }
    return [scene.refresh_call(case.extent, buffers=without, declare=declare)]


def _twenty_more(scene: Scene, case: Case) -> list[Call]:
    declare = {
        f"more_{i}": onelaunch.into(
            onelaunch.vector(f"seq_len * {i} + request", "request"),
            torch.empty(case.batch, dtype=torch.int32, device=scene.device),
        )
        for i in range(20)
    }
    return [scene.refresh_call(case.extent, declare=declare)]


# ---- SGLang ----------------------------------------------------------------------------------------------------------
def _sglang_kernels(case: Case) -> Any:
    if case.extent != "live":
        raise Unsupported("it computes live columns only")
    if importlib.util.find_spec("triton") is None:
        raise Unsupported("triton isn't installed, which SGLang's kernels need")
    try:
        return sglang_refresh.kernels()
    except Missing as error:
        raise Unsupported(str(error)) from error


def _sglang(scene: Scene, case: Case) -> list[Call]:
    found = _sglang_kernels(case)
    if isinstance(found.copies, str):
        raise Unsupported(found.copies)
    return [_sglang_refresh(scene, case, case.width)]


def _sglang_best(scene: Scene, case: Case) -> list[Call]:
    found = _sglang_kernels(case)
    plain, pooled = found.metadata.fused_dsa_decode_metadata, found.pooled.fused_dsa_decode_metadata_kpool

    def each(kernel: Any, columns: int) -> Call:
        return lambda: sglang_refresh.refresh_each(
            kernel, scene.buffers, scene.inputs, columns, INDEX_TOPK, case.page_size
        )

    calls = [each(pooled, case.width), each(pooled, scene.longest), each(plain, scene.longest)]
    if not isinstance(found.copies, str):
        calls.append(_sglang_refresh(scene, case, scene.longest))
    return calls


def _sglang_refresh(scene: Scene, case: Case, columns: int) -> Call:
    return lambda: sglang_refresh.refresh(scene.buffers, scene.inputs, columns, INDEX_TOPK, case.page_size)


# ---- Triton ----------------------------------------------------------------------------------------------------------
def _need_triton(case: Case) -> None:
    if importlib.util.find_spec("triton") is None:
        raise Unsupported("triton isn't installed")
    _page_size_of_tensors(case)


def _triton(scene: Scene, case: Case) -> list[Call]:
    _need_triton(case)
    # Imported here because triton is optional, and because it reads $TRITON_INTERPRET when it is imported.
    from . import triton_refresh

    def call(block: int, warps: int) -> Call:
        def refresh() -> None:
            for backend in scene.buffers:
                triton_refresh.refresh(
                    backend,
                    *scene.inputs,
                    index_topk=INDEX_TOPK,
                    page_size=case.page_size,
                    live_only=case.extent == "live",
                    block=block,
                    warps=warps,
                )

        return refresh

    return [call(*choice) for choice in triton_refresh.CHOICES]


def _triton_together(scene: Scene, case: Case) -> list[Call]:
    _need_triton(case)
    # As above.
    from . import triton_together

    multiprocessors = triton_together.multiprocessors(scene.device)

    def call(block: int, warps: int, programs: int, aligned: bool) -> Call:
        return lambda: triton_together.refresh(
            scene.buffers,
            *scene.inputs,
            index_topk=INDEX_TOPK,
            page_size=case.page_size,
            live_only=case.extent == "live",
            block=block,
            warps=warps,
            programs=programs * multiprocessors,
            aligned=aligned,
        )

    return [call(*choice) for choice in triton_together.CHOICES]


# ---- PyTorch ---------------------------------------------------------------------------------------------------------
def _torch(how: str, whole: bool) -> Callable[[Scene, Case], list[Call]]:
    def variants(scene: Scene, case: Case) -> list[Call]:
        _page_size_of_tensors(case)
        if whole and case.extent == "full":
            raise Unsupported("with extent full every implementation writes the whole table")
        columns = case.width if whole or case.extent == "full" else scene.longest
        if whole and columns == scene.longest:
            raise Unsupported("the longest request is as long as the table is wide")
        return [torch_refresh.call(how, torch_refresh.views(scene, columns))]

    return variants


CONTENDERS: dict[str, Implementation] = {
    i.name: i
    for i in (
        Implementation(
            "ideal",
            "ideal fan-out",
            "aligned contiguous read of the same words, a write to N places",
            baselines.ideal,
            checked=False,
            builds=True,
        ),
        Implementation(
            "listed",
            "tiles from a list",
            "the same tiles, from a precomputed list; no lengths, no pages",
            baselines.listed,
            writes=("page_indices",),
            builds=True,
        ),
        Implementation(
            "empty",
            "empty kernel",
            "a launch of a kernel that does nothing",
            baselines.empty,
            checked=False,
            builds=True,
        ),
        Implementation("onelaunch", "onelaunch", "the plan of bind", _onelaunch, builds=True),
        Implementation(
            "onelaunch-verified",
            "onelaunch, verified writes",
            "writes what changed; each request is one token longer or shorter than in the previous call",
            _verified(moved=False),
            builds=True,
        ),
        Implementation(
            "onelaunch-moved",
            "onelaunch, verified writes, all changed",
            "each request has other tokens than in the previous call",
            _verified(moved=True),
            builds=True,
        ),
        Implementation(
            "onelaunch-declared",
            "onelaunch, two fields declared",
            "cache_seqlens and nsa_cache_seqlens declared by formulas",
            _declared,
            builds=True,
        ),
        Implementation(
            "onelaunch-20-more",
            "onelaunch, 20 vectors more",
            "with 20 more declared vectors, of one destination each",
            _twenty_more,
            builds=True,
        ),
        Implementation(
            "sglang",
            "SGLang, as it runs",
            "one launch that computes, one that copies to three backends at full width",
            _sglang,
            spares=False,
            first_sums=False,
        ),
        Implementation(
            "sglang-best",
            "SGLang, its best form",
            "the faster of two: its best kernel, launched for each backend; and what it runs, up to the longest length",
            _sglang_best,
            spares=False,
            first_sums=False,
        ),
        Implementation(
            "triton",
            "Triton, a launch a backend",
            "a Triton launch for each backend, live chunks only",
            _triton,
        ),
        Implementation(
            "triton-together",
            "Triton, one launch",
            "all backends in one Triton launch, live chunks only",
            _triton_together,
        ),
        Implementation(
            "runtime",
            "onelaunch's kernel, unspecialized",
            "our kernel with N, page size, top-k and fields as arguments",
            baselines.runtime,
            builds=True,
        ),
        Implementation(
            "torch-copies",
            "PyTorch, copies",
            "PyTorch, computed once and copied N times, up to the longest request",
            _torch("copies", False),
            live=False,
            first_sums=False,
        ),
        Implementation(
            "torch-copies-wide",
            "PyTorch, full width",
            "the same for the whole width, as a graph that doesn't know the lengths must",
            _torch("copies", True),
            whole=True,
            first_sums=False,
        ),
        Implementation(
            "torch-recompute",
            "PyTorch, N times",
            "PyTorch, computed for each backend, up to the longest request",
            _torch("recompute", False),
            live=False,
            first_sums=False,
        ),
        Implementation(
            "torch-compile",
            "torch.compile",
            "computed once and copied N times under torch.compile, up to the longest request",
            _torch("compile", False),
            live=False,
            first_sums=False,
        ),
        Implementation(
            "single-block",
            "one block",
            "one block of 256 threads, up to the longest request",
            baselines.single_block,
            live=False,
            limit=_MAX_SINGLE_BLOCK_WORDS,
            builds=True,
        ),
    )
}
"""By name, in the order in which they are measured."""


def warmed(cases: Sequence[Case], names: Sequence[str], device: torch.device) -> list[str]:
    """Builds the kernels of ours that the cases need, several at once.

    What others compile, they compile at the first call, which is checked and not timed.

    Returns:
        What couldn't be built, a sentence each. Measuring it reports the same failure.
    """
    small = dict.fromkeys(case.replace(batch=2, length=5, width=64, kind="uniform") for case in cases)

    def warm(case: Case, name: str) -> str:
        scene = Scene(case.lengths(), case.backends, case.width, case.page_size, device)
        try:
            for call in CONTENDERS[name].variants(scene, case):
                call()
        except Unsupported:
            pass
        except Exception as error:
            return f"{name}, {case}: {type(error).__name__}: {error}"
        return ""

    needed = [(case, name) for case in small for name in names if CONTENDERS[name].builds]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return [failed for failed in pool.map(lambda one: warm(*one), needed) if failed]
