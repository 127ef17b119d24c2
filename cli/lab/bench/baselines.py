"""Our own kernels to compare a refresh with: lower bounds, and the same refresh less specialized.

They are built as onelaunch's own kernels are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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

from .cases import INDEX_TOPK, Case
from .implementation import Unsupported
from .scene import Call, Scene

# The maximum number of backends of the kernel with run-time arguments.
RUNTIME_BACKENDS = 8
_RUNTIME_WORDS = ("num_backends", "index_topk", "page_shift")


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


def _words(config: KernelConfig, scene: Scene) -> list[int]:
    """The words that a plan of the configuration would be bound with.

    A field or a backend that the configuration has and the scene lacks is a null pointer.
    """
    pool = scene.inputs[2]
    backends = [*scene.buffers, *[None] * (config.num_backends - scene.backends)]
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


def _bound_call(
    module: ModuleType, scene: Scene, columns: int, words: list[int], tensors: Sequence[Tensor] = ()
) -> Call:
    """A call of a kernel with the per-call words of a decode configuration.

    Args:
        words: the words that it is bound with.
        tensors: tensors that these words point to and that the scene doesn't hold.
    """
    index, cuda = scene.device.index or 0, scene.device.type == "cuda"
    seq_lens, rows, _ = scene.inputs
    run = module.bind(words).launch
    first = [seq_lens.data_ptr(), 1, rows.data_ptr(), 1, seq_lens.numel(), columns]

    def launch(tensors: Sequence[Tensor] = tensors) -> None:
        run(*first, torch._C._cuda_getCurrentRawStream(index) if cuda else 0)

    return launch


def listed(scene: Scene, case: Case) -> list[Call]:
    """The same tiles, from a precomputed list; no lengths, no pages."""
    return [listed_call(scene, case.extent, unroll) for unroll in (1, 2, 4)]


def listed_call(scene: Scene, extent: Any = "live", unroll: int = 2) -> Call:
    """A call of a kernel that gets a precomputed list of all tiles of page_indices."""
    config = KernelConfig(
        num_backends=scene.backends,
        fields=("page_indices",),
        vector_bytes=scene.plan(extent).config.vector_bytes,
        unroll=unroll,
        target=target_of(scene.device),
    )
    size = len(layout.param_words(config)) + 2
    module = kernel("listed", config.target, layout.call_words(config), size, config=config)
    tiles = _tiles(config, scene, extent)
    words = [*_words(config, scene), tiles.data_ptr(), len(tiles)]
    return _bound_call(module, scene, scene.width, words, [tiles])


def _tiles(config: KernelConfig, scene: Scene, extent: Any) -> Tensor:
    """int32 [tiles, 4]: row, row of req_to_token, first column, end of the row's live columns."""
    table = scene.buffers[0].page_indices
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
    pool_rows = scene.inputs[1].cpu()
    listed = torch.stack((row, pool_rows[row], in_row * config.tile_columns - offsets[row], ends[row]), 1)
    return listed.to(scene.device, torch.int32)


def single_block(scene: Scene, case: Case) -> list[Call]:
    """One block of 256 threads, up to the longest request."""
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
    return [_bound_call(module, scene, columns, _words(config, scene))]


def runtime(scene: Scene, case: Case) -> list[Call]:
    """Our kernel with N, page size, top-k and fields as arguments."""
    if case.backends > RUNTIME_BACKENDS:
        raise Unsupported(f"it has room for {RUNTIME_BACKENDS} backends")
    if case.page_size & (case.page_size - 1):
        raise Unsupported("its page size is a power of two")
    config = runtime_config(case.extent, target_of(scene.device))
    # Pages of one token have no real_page_table. With this shift a row has at most one page, which is stored nowhere.
    shift = case.page_size.bit_length() - 1 if case.page_size > 1 else 30
    words = [*_words(config, scene), case.backends, INDEX_TOPK, shift]
    return [_bound_call(runtime_kernel(config), scene, case.width, words)]


def runtime_config(extent: Any, target: Any) -> KernelConfig:
    """The configuration whose strategy and parameter block the kernel with runtime arguments has."""
    return KernelConfig(num_backends=RUNTIME_BACKENDS, page_size=2, index_topk=1, extent=extent, target=target)


def runtime_kernel(config: KernelConfig) -> ModuleType:
    """The kernel of runtime_config with N, page size, top-k and fields as arguments of the call."""
    words = len(layout.param_words(config)) + len(_RUNTIME_WORDS)
    call_words = layout.call_words(config)
    return kernel("runtime", config.target, call_words, words, config=config, plan_words=_RUNTIME_WORDS)


def empty(scene: Scene, case: Case) -> list[Call]:
    """A kernel that does nothing."""
    run = kernel("empty", target_of(scene.device)).bind([0]).launch
    index, cuda = scene.device.index or 0, scene.device.type == "cuda"
    return [lambda: run(torch._C._cuda_getCurrentRawStream(index) if cuda else 0)]


def ideal(scene: Scene, case: Case) -> list[Call]:
    """The ideal fan-out of as many words."""
    return [ideal_call(scene, case.extent, unroll) for unroll in (1, 2, 4)]


def ideal_call(scene: Scene, extent: str = "live", unroll: int = 4) -> Call:
    """A call of the ideal fan-out of as many words: contiguous, aligned, one read and N writes."""
    words = scene.live if extent == "live" else scene.width * len(scene.lengths)
    wide = [b.page_indices for b in scene.buffers if b.page_indices is not None]
    return fan_out(scene.inputs[2], wide, words, unroll)


def fan_out(source: Tensor, to: Sequence[Tensor], words: int, unroll: int, page_size: int = 1) -> Call:
    """A call of the kernel of lower bounds, which reads a contiguous source and writes N destinations.

    Args:
        words: words that each destination gets.
        page_size: with more than 1, the first token of each page is read, and its page's number written.
    """
    target = target_of(source.device)
    settings = {"num_backends": len(to), "unroll": unroll, "page_size": page_size}
    module = kernel("ideal", target, ("vectors",), len(to) + 2, **settings)
    index, cuda = source.device.index or 0, source.device.type == "cuda"
    run = module.bind([source.data_ptr(), *(tensor.data_ptr() for tensor in to)]).launch

    def launch(tensors: Sequence[Tensor] = (source, *to)) -> None:  # they stay alive
        run(words // 4, torch._C._cuda_getCurrentRawStream(index) if cuda else 0)

    return launch
