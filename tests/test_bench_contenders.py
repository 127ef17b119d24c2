"""The bench's contenders: each gives right results, or says what it can't do."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benched import CASES, CPU, HERE
from cases import Shape
from emulation import harness
from onelaunch import KernelConfig
from onelaunch.cli.lab.bench import torch_refresh
from onelaunch.cli.lab.bench.cases import Case
from onelaunch.cli.lab.bench.contenders import CONTENDERS
from onelaunch.cli.lab.bench.implementation import Unsupported
from onelaunch.cli.lab.bench.scene import Scene
from onelaunch.emit.render import render_baseline
from onelaunch.spec import layout


@pytest.mark.usefixtures("quick_builds")
@pytest.mark.parametrize("name", [name for name in HERE if CONTENDERS[name].checked])
def test_an_implementation_writes_what_the_reference_says(name: str) -> None:
    ran = 0
    for case in CASES:
        scene = Scene(case.lengths(), case.backends, case.width, case.page_size, CPU)
        implementation = CONTENDERS[name]
        try:
            variants = implementation.variants(scene, case)
        except Unsupported:
            continue
        for call in variants:
            assert implementation.check(scene, case, call) == "", str(case)
            ran += 1
    assert ran >= 2


def test_listed_tiles_that_are_wrong_or_write_more_are_found() -> None:
    case = CASES[0]
    scene = Scene(case.lengths(), case.backends, case.width, case.page_size, CPU)
    listed = CONTENDERS["listed"]
    (good, *_), buffers = listed.variants(scene, case), scene.buffers[0]

    def after(change: Callable[[], object]) -> str:
        return listed.check(scene, case, lambda: (good(), change()))

    assert after(lambda: None) == ""
    assert "page_indices[0, 0]" in after(lambda: buffers.page_indices[0, 0].fill_(-5))  # type: ignore[index]
    assert "cache_seqlens[0] is 7" in after(lambda: buffers.cache_seqlens.fill_(7))  # type: ignore[union-attr]


@pytest.mark.usefixtures("quick_builds")
def test_verified_writes_have_something_new_to_write_in_every_call() -> None:
    case = CASES[0]
    for name, changed in (("onelaunch-verified", "cache_seqlens"), ("onelaunch-moved", "page_indices")):
        scene = Scene(case.lengths(), case.backends, case.width, case.page_size, CPU)
        (call,) = CONTENDERS[name].variants(scene, case)
        scene.poison()
        seen = []
        for _ in range(4):
            call()
            seen.append(getattr(scene.buffers[0], changed).clone())
        assert torch.equal(seen[0], seen[2])
        assert torch.equal(seen[1], seen[3])
        first = [tensor[:, 0] if changed == "page_indices" else tensor for tensor in seen]
        assert (first[0] != first[1]).all(), "of every request"


def test_the_ideal_copies_the_words_to_all_backends() -> None:
    case = Case(3, 40, backends=3, width=64)
    scene = Scene(case.lengths(), 3, 64, 64, CPU)
    for call in CONTENDERS["ideal"].variants(scene, case):
        scene.poison()
        call()
        words = scene.live // 4 * 4
        for backend in scene.buffers:
            assert backend.page_indices is not None
            flat = backend.page_indices.flatten()
            assert torch.equal(flat[:words], scene.inputs[2].flatten()[:words])
            assert (flat[words:] == -858993460).all()


def test_the_single_block_sums_right_whatever_the_batch(programs: Path) -> None:
    """The known model was right for one warp only. Here all 256 threads run, in the emulation of CUDA."""
    config = KernelConfig(num_backends=2, extent="full", vector_bytes=4, page_size=16)
    words = len(layout.param_words(config))
    source, _ = render_baseline("single_block", "rival", layout.call_words(config), words, config=config)
    program = harness.build(source, "none", programs, copies=1)
    cases = [
        Shape(f"{bs} requests", tuple(7 * i % 40 for i in range(bs)), width=37, pool_rows=bs + 1) for bs in (1, 33, 600)
    ]
    outcome = harness.run(program, config, cases, launches=((1, 1),))
    assert outcome.caught is None, outcome


CHECKED = """
import sys
import torch
from onelaunch.cli.lab.bench import triton_together
from onelaunch.cli.lab.bench.contenders import CONTENDERS
from onelaunch.cli.lab.bench.cases import Case
from onelaunch.cli.lab.bench.scene import Scene
(device,) = sys.argv[1:]
triton_together.multiprocessors = lambda device: 3  # several programs a request, and fewer than there are chunks
for name in ("triton", "triton-together"):
    for case in (Case(6, 999, 2, 1031), Case(258, 9, 1, 37, 16, "full"), Case(1, 6000, 3, 6001, 1)):
        scene = Scene(case.lengths(), case.backends, case.width, case.page_size, torch.device(device))
        calls = CONTENDERS[name].variants(scene, case)
        said = [CONTENDERS[name].check(scene, case, call) for call in (calls[0], calls[2])]
        print(next(filter(None, said), "right"))
"""
NO_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="this torch brings no triton")


@NO_TRITON
def test_the_triton_kernels_are_right_for_any_batch(tmp_path: Path) -> None:
    # In its own process: Triton decides at import whether to interpret kernels, as it must without a GPU.
    gpu = torch.cuda.is_available()
    environment = {**os.environ, "TRITON_INTERPRET": "0" if gpu else "1", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", CHECKED, "cuda" if gpu else "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["right"] * 6, done.stderr


@NO_TRITON
@pytest.mark.parametrize(("name", "backends"), [("triton_refresh", 1), ("triton_together", 3)])
def test_the_triton_kernels_compile_for_a_gpu_that_is_not_there(
    name: str, backends: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    triton = importlib.import_module("triton")
    source = importlib.import_module("triton.compiler").ASTSource
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    kernel = importlib.import_module(f"onelaunch.cli.lab.bench.{name}")._refresh
    names = list(kernel.arg_names)
    facts = {"backends": backends, "index_topk": 2048, "page_shift": 6, "live_only": True, "scan": 256}
    facts = {fact: value for fact, value in (facts | {"block": 512, "aligned": True}).items() if fact in names}
    types: dict[str, Any] = dict.fromkeys(("seq_lens", "req_pool_indices"), "*i64") | {"req_to_token": "*i32"}
    types |= dict.fromkeys(("pool_stride", "page_indices_stride", "real_page_table_stride"), "i32")
    types |= dict.fromkeys(("batch_size", "columns", "splits"), "i32") | dict.fromkeys(facts, "constexpr")
    written = ("*i32",) * backends if name == "triton_together" else "*i32"
    signature = {argument: types.get(argument, written) for argument in names}
    built = triton.compile(source(kernel, signature, {(names.index(n),): v for n, v in facts.items()}), target=target)
    assert built.asm["cubin"]
    # One launch writes each backend's six fields: four per request, the leading zeros of the sums, and both tables.
    assert built.asm["ptx"].count("st.global") >= 8 * backends


def test_what_torch_compile_gets_is_right_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes a minute, and the GPU run checks the compiled code."""
    monkeypatch.setattr(torch_refresh, "compiled", lambda: torch_refresh.fused)
    for case in CASES:
        scene = Scene(case.lengths(), case.backends, case.width, case.page_size, CPU)
        (call,) = CONTENDERS["torch-compile"].variants(scene, case)
        assert CONTENDERS["torch-compile"].check(scene, case, call) == "", str(case)


def test_what_an_implementation_cannot_do_is_said() -> None:
    case = Case(2, 9, backends=9, width=33, page_size=48)
    scene = Scene(case.lengths(), 9, 33, 48, CPU)
    for name, reason in (
        ("runtime", "8 backends"),
        ("torch-copies", "power of two"),
        ("triton", "power of two"),
        ("triton-together", "power of two"),
    ):
        with pytest.raises(Unsupported, match=reason):
            CONTENDERS[name].variants(scene, case)
    case = case.replace(backends=2)
    with pytest.raises(Unsupported, match="power of two"):
        CONTENDERS["runtime"].variants(scene, case)
