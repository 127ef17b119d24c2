"""One engine that generates with EAGLE and CUDA graphs.

    python generate.py MODELS RESULT TOKENS ROUNDS [argument=value ...]

Greedy, with prompts of different lengths: 16 requests, one request, and 16 requests that end one after another, so that
the batch shrinks through the captured sizes and is padded in between. Writes tokens' hashes and verify steps as JSON.
With ROUNDS above 0 it waits for its turn and generates only the batch of 16, ROUNDS times in each of the probe's
states, alternating between the states. These rounds are timed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from turn import wait_for_turn

PACKAGES = (
    "sglang",
    "sglang-kernel",
    "flashinfer-python",
    "apache-tvm-ffi",
    "torch",
    "triton",
    "transformers",
    "numpy",
)
LENGTHS = (5, 40)  # shortest and longest prompt
STATES = ("off", "backends", "on")  # see PROBE_PHASE in site/engine_probe.py


def prompts(count: int) -> list[list[int]]:
    numbers = random.Random(7)
    return [[numbers.randrange(3, 512) for _ in range(numbers.randrange(*LENGTHS))] for _ in range(count)]


def scenarios(longest: int) -> dict[str, list[int]]:
    """The number of tokens to generate for each request."""
    return {"batch 16": [longest] * 16, "batch 1": [longest], "shrinking": [longest * (i + 1) // 16 for i in range(16)]}


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    import sglang

    models, result, longest, rounds = sys.argv[1:5]
    arguments: dict[str, Any] = {
        "model_path": f"{models}/target",
        "speculative_draft_model_path": f"{models}/draft",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "speculative_algorithm": "EAGLE",
        "speculative_num_steps": 3,
        "speculative_eagle_topk": 1,
        "page_size": 1,
        "context_length": 2048,
        "max_total_tokens": 65536,
        "max_running_requests": 32,
        "mem_fraction_static": 0.7,
        "cuda_graph_bs_decode": [1, 2, 4, 8, 16],
        "cuda_graph_max_bs_decode": 16,
        "disable_prefill_cuda_graph": True,
        "disable_radix_cache": True,
        "disable_custom_all_reduce": True,
        "random_seed": 1,
        "log_level": "info",
        "watchdog_timeout": 300,
    }
    for argument in sys.argv[5:]:
        name, _, value = argument.partition("=")
        try:
            arguments[name] = json.loads(value)
        except ValueError:
            arguments[name] = value
    arguments["speculative_num_draft_tokens"] = arguments["speculative_num_steps"] + 1
    start = time.time()
    engine = sglang.Engine(**arguments)
    found: dict[str, Any] = {"up": round(time.time() - start, 1), "scenarios": {}}
    if int(rounds):
        wait_for_turn(Path(result).parent)
    phase = Path(os.environ["PROBE_PHASE"])
    for name, tokens in scenarios(int(longest)).items():
        marks = ["first"]  # a warm-up, which compiles the remaining kernels
        if int(rounds):
            if name != "batch 16":
                continue
            marks += [f"timed {state}" for state in STATES] * int(rounds) + [f"profiled {state}" for state in STATES]
        for mark in marks:
            phase.write_text(mark)
            sampling = [{"temperature": 0, "max_new_tokens": n, "ignore_eos": True} for n in tokens]
            outputs = engine.generate(input_ids=prompts(len(tokens)), sampling_params=sampling)
            phase.write_text("")
            generated = [output["output_ids"] for output in outputs]
            steps = [output["meta_info"].get("spec_verify_ct") or 0 for output in outputs]
            found["scenarios"].setdefault(name, []).append(
                {
                    "hash": hashlib.sha256(json.dumps(generated).encode()).hexdigest()[:16],
                    "tokens": sum(map(len, generated)),
                    "verify_steps": sum(steps),
                }
            )
    # The probe writes its results before each prefill, so this prefill makes it write the last ones.
    phase.write_text("end")
    engine.generate(input_ids=prompts(1), sampling_params={"temperature": 0, "max_new_tokens": 1, "ignore_eos": True})
    found["versions"] = {package: version(package) for package in PACKAGES} | {
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name(),
    }
    if os.environ.get("ENGINES_GPU_STAND_IN"):
        found["stand_in"] = "FA3's attention kernel: see site/flash_attn.py"
    Path(result).write_text(json.dumps(found, indent=1))
    print("generated", json.dumps(found["scenarios"]), flush=True)
    os._exit(0)  # run.py ends the engine's processes faster than the engine itself would


if __name__ == "__main__":
    main()
