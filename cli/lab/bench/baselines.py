"""The baselines of the bench: the same refresh by other means, each implemented as well as possible.

Every implementation makes one call for each buffer set of a Scene, and declares what it writes, so that it is checked
against the reference before it is timed.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from onelaunch import KernelConfig
from onelaunch.build import compile as compiler
from onelaunch.build import key, toolchain
from onelaunch.cache.module import import_entry
from onelaunch.emit.render import render_baseline
from onelaunch.load import loader
from onelaunch.load.obtain import obtain
from onelaunch.spec import layout
from onelaunch.spec.fields import FIELDS
from torch import Tensor

from . import torch_refresh
from .cases import INDEX_TOPK, Case
from .scene import Call, Scene

# The maximum number of backends of the kernel with run-time arguments.
RUNTIME_BACKENDS = 8
_RUNTIME_WORDS = ("num_backends", "index_topk", "page_shift")


class Unsupported(Exception):
    """An implementation can't do a case; the message says why."""


@dataclass(frozen=True)
class Implementation:
    """One way to do a refresh.

    Attributes:
        name: its name in the table.
        what: what it does, in words.
        calls: gives a list of variants, each with a call for every set; the fastest variant counts.
        live: whether it writes the live columns only. Otherwise it writes every column below the longest request's
            length or, with ``whole``, every column of the table.
        whole: see ``live``.
        first_sums: whether it writes the first 0 of the running sums; the engines' tensor code expects it to be there.
        checked: whether it does a refresh, which can be checked.
        writes: the fields that it writes; fewer than all if it does only a part of the refresh.
        limit: maximum requests times columns times backends, as more would take too long; None is no limit.
    """

    name: str
    what: str
    calls: Callable[[Scene, Case], list[list[Call]]]
    live: bool = True
    whole: bool = False
    first_sums: bool = True
    checked: bool = True
    writes: tuple[str, ...] = tuple(FIELDS)
    limit: int | None = None

    def check(self, scene: Scene, case: Case, call: Call, number: int) -> str:
        """Runs the call of a set on poisoned destinations; returns the first wrong word, or ""."""
        if not self.checked:
            call()
            return ""
        scene.poison(number, **({} if self.first_sums else {"first_sums": 0}))
        call()
        return self.fault(scene, case, number)

    def fault(self, scene: Scene, case: Case, number: int) -> str:
        """The first wrong word of a set that was poisoned and refreshed; "" if there is none."""
        if not self.checked:
            return ""
        whole = case.extent == "full" or self.whole
        extent = "live" if self.live and not whole else "full"
        return scene.fault(number, extent, None if whole or self.live else scene.longest, self.writes)


# ---- kernels ---------------------------------------------------------------------------------------------------------
def target_of(device: torch.device) -> Any:
    """The target that a device's kernels are built for."""
    return "cuda" if device.type == "cuda" else "cpu"


@cache
def built(symbol: str, source: str, binding: str, target: str) -> ModuleType:
    """A kernel to compare with, built as onelaunch's own kernels are: same recipe, same binding, same store."""
    archs = toolchain.architectures(torch.cuda.current_device()) if target == "cuda" else ()
    tools = toolchain.find_tools(target)
    recipe = key.Recipe(symbol, source, binding, archs, tuple(compiler.flags(target, archs)), tools.versions())
    store = loader.default_store()
    entry = store.find(recipe.key)
    if entry is None:
        entry = obtain(recipe, tools, store)[0]
    return import_entry(entry)


def kernel(name: str, target: str, call_words: Sequence[str] = (), words: int = 0, **facts: Any) -> ModuleType:
    """The module of a template below templates/baselines/; see render_baseline."""
    known = sorted((fact, value.key if fact == "config" else value) for fact, value in facts.items())
    digest = hashlib.sha256(repr((name, target, known)).encode()).hexdigest()[:8]
    symbol = f"onelaunch_baseline_{name}_{digest}"
    return built(symbol, *render_baseline(name, symbol, call_words, words, target=target, **facts), target)


def _words(config: KernelConfig, scene: Scene, number: int) -> list[int]:
    """The words that a plan of the configuration would be bound with, for a set.

    A field or a backend that the configuration has and the scene lacks is a null pointer.
    """
    pool = scene.inputs[number][2]
    backends = [*scene.buffers[number], *[None] * (config.num_backends - scene.backends)]
    cuda = pool.device.type == "cuda"
    values: dict[str, list[int]] = {
        "device": [pool.device.index or 0],
        "sm_count": [torch.cuda.get_device_properties(pool.device).multi_processor_count if cuda else 1],
        "req_to_token": [pool.data_ptr()],
        "req_to_token_stride": [pool.stride(0)],
        "req_to_token_width": [pool.shape[1]],
    }
    for name in config.fields:
        values[name] = []
        for backend in backends:
            tensor: Tensor | None = getattr(backend, name, None)
            stride = [0 if tensor is None else tensor.stride(0)] if FIELDS[name].kind == "table" else []
            values[name] += [0 if tensor is None else tensor.data_ptr(), *stride]
    return [word for m in layout.members(config) if not m.per_call for word in values[m.name]]


def _bound_calls(
    module: ModuleType, scene: Scene, columns: int, words: Callable[[int], list[int]], tensors: Sequence[Tensor] = ()
) -> list[Call]:
    """A call for each set, of a kernel with the per-call words of a decode configuration.

    Args:
        words: gives the words that a set is bound with.
        tensors: tensors that these words point to and that the scene doesn't hold.
    """
    index, cuda = scene.device.index or 0, scene.device.type == "cuda"

    def call(number: int) -> Call:
        seq_lens, rows, _ = scene.inputs[number]
        run = module.bind(words(number)).launch
        first = [seq_lens.data_ptr(), 1, rows.data_ptr(), 1, seq_lens.numel(), columns]

        def launch(tensors: Sequence[Tensor] = tensors) -> None:
            run(*first, torch._C._cuda_getCurrentRawStream(index) if cuda else 0)

        return launch

    return [call(number) for number in range(scene.sets)]


def _onelaunch(scene: Scene, case: Case) -> list[list[Call]]:
    return [scene.refresh_calls(case.extent)]


def _listed(scene: Scene, case: Case) -> list[list[Call]]:
    return [listed_calls(scene, case.extent, unroll) for unroll in (1, 2, 4)]


def listed_calls(scene: Scene, extent: Any = "live", unroll: int = 2) -> list[Call]:
    """A call for each set, of a kernel that gets a precomputed list of all tiles of page_indices."""
    config = KernelConfig(
        num_backends=scene.backends,
        fields=("page_indices",),
        vector_bytes=scene.plans(extent)[0].config.vector_bytes,
        unroll=unroll,
        target=target_of(scene.device),
    )
    size = len(layout.param_words(config)) + 2
    module = kernel("listed", config.target, layout.call_words(config), size, config=config)
    tiles = [_tiles(config, scene, extent, number) for number in range(scene.sets)]

    def words(number: int) -> list[int]:
        return [*_words(config, scene, number), tiles[number].data_ptr(), len(tiles[number])]

    return _bound_calls(module, scene, scene.width, words, tiles)


def _tiles(config: KernelConfig, scene: Scene, extent: Any, number: int) -> Tensor:
    """int32 [tiles, 4] of a set: row, row of req_to_token, first column, end of the row's live columns."""
    table = scene.buffers[number][0].page_indices
    assert table is not None
    ends = torch.tensor(scene.lengths).clamp(0, scene.width)
    if extent == "full":
        ends.fill_(scene.width)
    # As in the emitted kernel, tiles begin at aligned addresses of the destination.
    begins = table.data_ptr() // 4 + torch.arange(len(ends)) * table.stride(0)
    offsets = begins % config.tile_alignment if config.vector_bytes == 16 else torch.zeros_like(begins)
    counts = torch.where(ends > 0, (ends + offsets + config.tile_columns - 1) // config.tile_columns, 0)
    row = torch.arange(len(ends)).repeat_interleave(counts)
    in_row = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
    pool_rows = scene.inputs[number][1].cpu()
    listed = torch.stack((row, pool_rows[row], in_row * config.tile_columns - offsets[row], ends[row]), 1)
    return listed.to(scene.device, torch.int32)


def _single_block(scene: Scene, case: Case) -> list[list[Call]]:
    config = KernelConfig(
        num_backends=case.backends,
        page_size=case.page_size,
        index_topk=INDEX_TOPK,
        extent="full",
        vector_bytes=4,
        target=target_of(scene.device),
    )
    words = layout.param_words(config)
    module = kernel("single_block", config.target, layout.call_words(config), len(words), config=config)
    columns = case.width if case.extent == "full" else scene.longest
    return [_bound_calls(module, scene, columns, lambda number: _words(config, scene, number))]


def _runtime(scene: Scene, case: Case) -> list[list[Call]]:
    if case.backends > RUNTIME_BACKENDS:
        raise Unsupported(f"it has room for {RUNTIME_BACKENDS} backends")
    if case.page_size & (case.page_size - 1):
        raise Unsupported("its page size is a power of two")
    config = runtime_config(case.extent, target_of(scene.device))
    # Pages of one token have no real_page_table. With this shift a row has at most one page, which is stored nowhere.
    shift = case.page_size.bit_length() - 1 if case.page_size > 1 else 30

    def words(number: int) -> list[int]:
        return [*_words(config, scene, number), case.backends, INDEX_TOPK, shift]

    return [_bound_calls(runtime_kernel(config), scene, case.width, words)]


def runtime_config(extent: Any, target: Any) -> KernelConfig:
    """The configuration whose strategy and parameter block the kernel with runtime arguments has."""
    return KernelConfig(num_backends=RUNTIME_BACKENDS, page_size=2, index_topk=1, extent=extent, target=target)


def runtime_kernel(config: KernelConfig) -> ModuleType:
    """The kernel of runtime_config with N, page size, top-k and fields as arguments of the call."""
    words = len(layout.param_words(config)) + len(_RUNTIME_WORDS)
    call_words = layout.call_words(config)
    return kernel("runtime", config.target, call_words, words, config=config, plan_words=_RUNTIME_WORDS)


def _empty(scene: Scene, case: Case) -> list[list[Call]]:
    run = kernel("empty", target_of(scene.device)).bind([0]).launch
    index, cuda = scene.device.index or 0, scene.device.type == "cuda"
    return [[lambda: run(torch._C._cuda_getCurrentRawStream(index) if cuda else 0)] * scene.sets]


def _ideal(scene: Scene, case: Case) -> list[list[Call]]:
    return [ideal_calls(scene, case.extent, unroll) for unroll in (1, 2, 4)]


def ideal_calls(scene: Scene, extent: str = "live", unroll: int = 4) -> list[Call]:
    """A call for each set, of the ideal fan-out of as many words: contiguous, aligned, one read and N writes."""
    words = scene.live if extent == "live" else scene.width * len(scene.lengths)
    target = target_of(scene.device)
    module = kernel("ideal", target, ("vectors",), scene.backends + 2, num_backends=scene.backends, unroll=unroll)
    index, cuda = scene.device.index or 0, scene.device.type == "cuda"

    def call(number: int) -> Call:
        wide = [b.page_indices.data_ptr() for b in scene.buffers[number] if b.page_indices is not None]
        run = module.bind([scene.inputs[number][2].data_ptr(), *wide]).launch
        return lambda: run(words // 4, torch._C._cuda_getCurrentRawStream(index) if cuda else 0)

    return [call(number) for number in range(scene.sets)]


# ---- PyTorch ---------------------------------------------------------------------------------------------------------
def _torch_calls(how: str, whole: bool) -> Callable[[Scene, Case], list[list[Call]]]:
    def calls(scene: Scene, case: Case) -> list[list[Call]]:
        if case.page_size & (case.page_size - 1):
            raise Unsupported("its page size is a power of two")
        if whole and case.extent == "full":
            raise Unsupported("with extent full every implementation writes the whole table")
        columns = case.width if whole or case.extent == "full" else scene.longest
        if whole and columns == scene.longest:
            raise Unsupported("the longest request is as long as the table is wide")
        views = [torch_refresh.views(scene, number, columns) for number in range(scene.sets)]
        return [[torch_refresh.call(how, each) for each in views]]

    return calls


# ---- Triton ----------------------------------------------------------------------------------------------------------
def _triton(scene: Scene, case: Case) -> list[list[Call]]:
    if importlib.util.find_spec("triton") is None:
        raise Unsupported("triton isn't installed")
    # Imported here because triton is optional, and because it reads $TRITON_INTERPRET when it is imported.
    from . import triton_refresh

    if case.page_size & (case.page_size - 1):
        raise Unsupported("its page size is a power of two")

    def call(number: int, block: int, warps: int) -> Call:
        def refresh() -> None:
            for backend in scene.buffers[number]:
                triton_refresh.refresh(
                    backend,
                    *scene.inputs[number],
                    index_topk=INDEX_TOPK,
                    page_size=case.page_size,
                    live_only=case.extent == "live",
                    block=block,
                    warps=warps,
                )

        return refresh

    return [[call(n, *choice) for n in range(scene.sets)] for choice in triton_refresh.CHOICES]


# Words that one block writes in about 50 milliseconds.
_MAX_SINGLE_BLOCK_WORDS = 16_000_000

IMPLEMENTATIONS: dict[str, Implementation] = {
    i.name: i
    for i in (
        Implementation(
            "ideal", "aligned contiguous read of the same words, a write to N places", _ideal, checked=False
        ),
        Implementation(
            "listed",
            "the same tiles, from a precomputed list; no lengths, no pages",
            _listed,
            writes=("page_indices",),
        ),
        Implementation("empty", "a launch of a kernel that does nothing", _empty, checked=False),
        Implementation("onelaunch", "onelaunch: the plan of bind", _onelaunch),
        Implementation("triton", "a Triton launch for each backend, live chunks only", _triton),
        Implementation("runtime", "our kernel with N, page size, top-k and fields as arguments", _runtime),
        Implementation(
            "torch-copies",
            "PyTorch, computed once and copied N times, up to the longest request",
            _torch_calls("copies", False),
            live=False,
            first_sums=False,
        ),
        Implementation(
            "torch-copies-wide",
            "the same for the whole width, as a graph that doesn't know the lengths must",
            _torch_calls("copies", True),
            whole=True,
            first_sums=False,
        ),
        Implementation(
            "torch-recompute",
            "PyTorch, computed for each backend, up to the longest request",
            _torch_calls("recompute", False),
            live=False,
            first_sums=False,
        ),
        Implementation(
            "torch-compile",
            "computed once and copied N times under torch.compile, up to the longest request",
            _torch_calls("compile", False),
            live=False,
            first_sums=False,
        ),
        Implementation(
            "single-block",
            "one block of 256 threads, up to the longest request",
            _single_block,
            live=False,
            limit=_MAX_SINGLE_BLOCK_WORDS,
        ),
    )
}
"""By name, in the order in which they are measured."""


def warmed(cases: Sequence[Case], names: Sequence[str], device: torch.device) -> list[str]:
    """Builds what the cases need, so that no measurement includes a build.

    Returns:
        What couldn't be built, a sentence each. Measuring it reports the same failure.
    """
    failed = []
    small = dict.fromkeys(case.replace(batch=2, length=5, width=64, kind="uniform") for case in cases)
    for case in small:
        scene = Scene(case.lengths(), case.backends, case.width, case.page_size, 1, device)
        for name in names:
            try:
                for calls in IMPLEMENTATIONS[name].calls(scene, case):
                    calls[0]()
            except Unsupported:
                continue
            except Exception as error:
                failed.append(f"{name}, {case}: {type(error).__name__}: {error}")
    return failed
