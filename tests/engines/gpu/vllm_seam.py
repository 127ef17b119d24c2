"""vLLM's draft step alone: the engine's launches before each step of a drafter, and onelaunch's in their place.

    python vllm_seam.py RESULT [--cpu]

Uses vLLM's own builders, block tables, Triton kernels and DeepGEMM, with the drafter's buffers of vllm_objects.py
around them, and no model. It measures both sides as seams.py does: kernels and copies by name, their device time, the
host time of a step, and both times in a CUDA graph, which vLLM uses. Every tensor of both sides is compared before and
after. Writes JSON. With --cpu it runs without timing, as a check that it works.

Needs vLLM 0.33.0 in this environment, or on the path its Python files, its third_party/deep_gemm and what
requirements-vllm-0.33.0.txt has beside it; nvcc, with which DeepGEMM and onelaunch compile; and onelaunch.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

CPU = "--cpu" in sys.argv
if CPU:
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.append(str(Path(__file__).resolve().parent.parent))

import measure  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
import vllm_fakes  # noqa: E402
import vllm_objects  # noqa: E402
from measure import guide_rows, measured  # noqa: E402
from vllm_objects import SIZES, Drafter, differences, poison  # noqa: E402

REQUESTS = 16
LENGTHS = tuple(1024 + 3072 * i // REQUESTS for i in range(REQUESTS))
# The model's longest sequence, and the largest numbers of requests and tokens that the engine serves.
LONGEST, MAX_REQUESTS, MAX_TOKENS = (8192, 64, 8192)
# Tokens of a verified request. On Hopper vLLM makes one row per token for 3, and one row per request for 4.
NEXT_N = (3, 4)


def drafters(next_n: int) -> tuple[Drafter, Drafter]:
    """The engine's drafter and ours, with the same requests before the same step. They share nothing else."""
    pair = Drafter(next_n, REQUESTS), Drafter(next_n, REQUESTS)
    poison(*pair)
    for each in pair:
        each.begin(LENGTHS)
    return pair


def both(next_n: int) -> dict[str, Any]:
    engine, mine = drafters(next_n)
    step = mine.bind()
    untouched = differences(engine, mine)
    engine.step()
    begun = differences(engine, mine)
    step.run()
    found: dict[str, Any] = {
        "different": untouched + differences(engine, mine),
        "compared": [name for name, _ in mine.tensors()],
        "written": sorted(mine.destinations()),
        "before ours ran": begun,
        "control": control(engine, mine, step),
    }
    found["engine"] = measured(lambda batch: engine.step(), None)
    found["onelaunch"] = measured(lambda batch: step.run(), None)
    found["different"] += differences(engine, mine)
    for number in range(3):
        for each in (engine, mine):
            each.advance()
        engine.step()
        step.run()
        found["different"] += [f"step {number + 2}: {name}" for name in differences(engine, mine)]
    return found


def control(engine: Drafter, mine: Drafter, step: Any) -> list[str]:
    """Spoils each destination in turn. Returns those for which the comparison doesn't find exactly that one."""
    missed = []
    for name, tensor in mine.destinations().items():
        tensor[(-1,) * tensor.dim()] += 1
        if differences(engine, mine) != [name]:
            missed.append(name)
        step.run()
    return missed


def main() -> None:
    result = Path(sys.argv[1])
    vllm_fakes.install(gpu=not CPU)
    measure.DRY = CPU
    vllm_objects.DEVICE = "cpu" if CPU else "cuda:0"
    vllm_objects.WIDTH, vllm_objects.MAX_REQUESTS, vllm_objects.MAX_TOKENS = LONGEST // 64, MAX_REQUESTS, MAX_TOKENS
    found: dict[str, Any] = {
        "shape": {
            "requests": REQUESTS, "shortest": LENGTHS[0], "longest": LENGTHS[-1], "blocks": SIZES,
            "model": LONGEST, "slots": MAX_TOKENS,
        },
        "vllm": importlib.metadata.version("vllm"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "gpu": None if CPU else torch.cuda.get_device_name(),
        "seams": {},
    }  # fmt: skip
    for counts in (measure.ONCE,) if CPU else (measure.ONCE, measure.Counts()):  # the first time compiles
        measure.counts = counts
        for next_n in NEXT_N:
            try:
                made = both(next_n)
            except Exception:
                made = {"error": traceback.format_exc()[-3000:]}
            found["seams"][f"vLLM, draft step after {next_n} tokens"] = made
            print(time.strftime("%T"), next_n, json.dumps(made)[:1500], flush=True)
            result.write_text(json.dumps(found, indent=1) + "\n")
    if not CPU and all("error" not in each for each in found["seams"].values()):
        print(guide_rows(found["seams"]))


if __name__ == "__main__":
    main()
