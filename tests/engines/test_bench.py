"""onelaunch bench finds SGLang's own kernels in the wheel, calls them as the engine does, and gets right results."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

# The bench calls kernels as this version does. Other versions have them elsewhere, which the bench reports.
MEASURED_VERSION = "0.5.23"
# Runs in its own process, because the bench loads SGLang's modules without their packages. -O drops the launchers'
# asserts that tensors are on a GPU. The engine compiles its copy kernels for a GPU on first use; here PyTorch copies
# instead, from the arguments that the engine's own wrappers pass on.
MEASURED = """
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import torch
from onelaunch.cli.lab.bench.cases import Case
from onelaunch.cli.lab.bench.contenders import CONTENDERS
from onelaunch.cli.lab.bench.implementation import Unsupported
from onelaunch.cli.lab.bench.parts import PARTS, part_rows
from onelaunch.cli.lab.bench.scene import Scene
from onelaunch.cli.lab.bench.sglang_modules import version
from onelaunch.spec.reference_schedules import paged_mqa_schedule

sys.path.append(sys.argv[1])
from benched import Meter

sys.modules["sglang.kernels.jit.utils"] = compiler = ModuleType("sglang.kernels.jit.utils")
compiler.cache_once = lambda function: function
compiler.make_cpp_args = lambda *arguments: arguments

def must(true, *what):
    if not true:
        sys.exit(str(what))

def copy(source, to):
    for number, (tensor, place) in enumerate(zip(source, to, strict=True)):
        must((tensor is None) == (place is None), number)
        if tensor is not None and tensor.dim() == 2:
            place[:, : tensor.shape[1]] = tensor
        elif tensor is not None:
            first = int(number in (1, 4))  # a copy doesn't write the first 0 of the sums
            place[first:] = tensor[first:]

def copy_to_three(*arguments):
    *tensors, batch, columns, expanded = arguments
    source, destinations = tensors[:8], [tensors[n : n + 8] for n in range(8, len(tensors), 8)]
    must(len(destinations) == 3 and batch == expanded == len(source[0]) and columns == source[2].shape[1])
    for to in destinations:
        copy(source, to)

def copy_to_one(*arguments):
    *tensors, batch, columns, _, expanded = arguments
    source, to = tensors[:9], tensors[9:]
    must(batch == expanded == len(source[0]) and columns == source[2].shape[1] and source[4] is None and to[4] is None)
    copy([*source[:4], *source[5:]], [*to[:4], *to[5:]])

compiler.load_jit = lambda name, *a, **k: SimpleNamespace(
    fused_metadata_copy_multi=copy_to_three, fused_metadata_copy=copy_to_one
)
print(version() or "none", hasattr(sys.modules["sglang"], "Engine"))
ran = {"sglang": 0, "sglang-best": 0}
for case in (Case(6, 999, 3, 1031), Case(1, 600, 1, 601, 1), Case(33, 40, 5, 140, 16)):
    scene = Scene(case.lengths(), case.backends, case.width, case.page_size, torch.device("cpu"))
    for name in ran:
        try:
            calls = CONTENDERS[name].variants(scene, case)
        except Unsupported as error:
            sys.exit(str(error))
        for call in calls:
            fault = CONTENDERS[name].check(scene, case, call)
            must(not fault, name, str(case), fault)
            ran[name] += 1
print(ran)

def schedule(lengths, metadata, workspace):
    must(lengths.dtype == metadata.dtype == torch.int32 and metadata.shape == (133, 2))
    metadata.copy_(torch.tensor(paged_mqa_schedule(lengths.tolist(), 132)))

for name in ("is_arch_support_pdl", "is_hip_runtime"):
    setattr(compiler, name, None)
compiler.load_jit = lambda name, *a, **k: SimpleNamespace(run=schedule)
two = [replace(part, backends=(2,), floor=lambda inputs, backends: []) for part in PARTS[:2]]
for row in part_rows(Meter(), ("3x700", "33x5"), [*two, PARTS[3]]):
    print(row["part"], row["shape"], *row["warm_us"], row["reason"])
"""


def test_its_kernels_are_measured_as_the_engine_calls_them(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-O", "-c", MEASURED, str(Path(__file__).parent.parent)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if version("sglang") != MEASURED_VERSION:
        assert "this SGLang has no such kernels: No module named" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    shapes = ("3x700", "33x5")
    assert done.stdout.splitlines() == [
        f"{MEASURED_VERSION} False",
        "{'sglang': 3, 'sglang-best': 12}",
        *(f"flattened indices {shape} ours declared engine engine-best " for shape in shapes),
        *(f"pages of 32 alone {shape} ours declared engine " for shape in shapes),
        *(f"DeepGEMM's schedule {shape} ours engine " for shape in shapes),
    ]
