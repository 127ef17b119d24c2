"""SGLang's seams alone: the engine's sequence before each graph of a speculative step, and onelaunch's instead of it.

    python seams.py RESULT [--flashinfer] [--dry]

With --flashinfer it measures FlashInfer's seams, otherwise all others: in a bundle FlashInfer has an environment of its
own. Its plans read and write on the host, so they can't be captured.

Uses the engine's own backends, graph runners and worker, with objects of runner_objects.py and request_objects.py.
There is no model: only the work before a replay runs. Each seam is measured with the engine's code and with onelaunch
attached to the runner: kernels and copies by name, their device time, the host time of a call, and both times in a CUDA
graph with the same launches. Writes JSON. With --dry it runs on a CPU without timing, as a check that it works.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

DRY = "--dry" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

if DRY:
    import fakes

    fakes.install()

import measure  # noqa: E402
import objects  # noqa: E402
import request_objects  # noqa: E402
import runner_objects  # noqa: E402
from measure import measured  # noqa: E402
from onelaunch.integrations import sglang  # noqa: E402
from turn import wait_for_turn  # noqa: E402

DEVICE = "cpu" if DRY else "cuda"
REQUESTS, STEPS, TOKENS, PAGE = (2, 3, 4, 1) if DRY else (16, 3, 4, 1)
# The shortest and the longest request, and the tables' width.
SHORTEST, LONGEST, CONTEXT = (10, 20, 640) if DRY else (1024, 4096, 8192)
LENGTHS = tuple(SHORTEST + (LONGEST - SHORTEST) * i // REQUESTS for i in range(REQUESTS))


def runner_of(seam: str, backend: str, pool: torch.Tensor) -> Any:
    if seam == "draft":
        return runner_objects.draft_runner(backend, pool, PAGE, STEPS)
    make = runner_objects.verify_runner if seam == "verify" else runner_objects.extend_runner
    return make(backend, pool, PAGE, TOKENS)


def with_call(seam: str, runner: Any, use: Callable[[Callable[[Any], Any], Any], Any]) -> Any:
    """Runs the seam, and returns use(call, batch): call(batch) is the engine's own call at the seam."""
    request = request_objects.Request(LENGTHS, seed=1)
    owner, name = {
        "draft": (getattr(runner, "eagle_worker", None), "draft"),
        "verify": (runner, "load_batch"),
        "draft-extend": (runner, "execute"),
    }[seam]
    call, own = getattr(owner, name), vars(owner).get(name)
    found = []

    def instead(batch: Any, *arguments: Any) -> None:
        # A default device adds overhead to each PyTorch call.
        torch.set_default_device(None)
        try:
            found.append(use(lambda batch: call(batch, *arguments), batch))
        finally:
            torch.set_default_device(DEVICE)

    setattr(owner, name, instead)
    try:
        if seam == "draft":
            request.draft(runner, PAGE)
        elif seam == "verify":
            request.verify(runner, TOKENS)
        else:
            request.extend(runner, TOKENS, cpu_lengths=True)
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
    return found[0]


def attached(target: Any) -> Any:
    torch.set_default_device(None)
    try:
        return sglang.attach(target)
    finally:
        torch.set_default_device(DEVICE)


def written(runner: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in vars(runner.buffers).items() if isinstance(value, torch.Tensor)}


def both(seam: str, backend: str) -> dict[str, Any]:
    pool = objects.token_pool(PAGE, seed=PAGE)
    runner = runner_of(seam, backend, pool)
    timed = partial(measured, graph=backend != "flashinfer")
    found: dict[str, Any] = {"engine": with_call(seam, runner, timed)}
    wanted = written(runner)
    attachment = attached(runner)
    try:
        found["onelaunch"] = with_call(seam, runner, timed)
        got = written(runner)
        found["different"] = different(wanted, got)
        found["failed"], found["stays"] = attachment.failed, attachment.stays
    finally:
        attachment.detach()
    return found


def extension(backend: str) -> dict[str, Any]:
    """FA3's draft extension, which SGLang 0.5.17 doesn't capture in a graph."""
    pool = objects.token_pool(PAGE, seed=PAGE)
    made = objects.backend(backend, pool, page=PAGE, draft=True, draft_tokens=TOKENS)
    batch = objects.Batch(LENGTHS, REQUESTS, "draft_extend", TOKENS).make()
    batch.extend_seq_lens_cpu = [TOKENS] * REQUESTS
    names = ("cache_seqlens_int32", "cu_seqlens_k", "cu_seqlens_q")

    def refreshed() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        torch.set_default_device(None)
        try:
            numbers = measured(lambda batch: made.init_forward_metadata(batch), batch)
            made.init_forward_metadata(batch)
        finally:
            torch.set_default_device(DEVICE)
        metadata = made.forward_metadata
        tensors = {name: getattr(metadata, name).clone() for name in names}
        live = torch.arange(metadata.page_table.shape[1]) < batch.seq_lens[:, None]
        return numbers, {**tensors, "page_table": torch.where(live, metadata.page_table, 0)}

    engine, wanted = refreshed()
    attachment = attached(made)
    try:
        mine, got = refreshed()
    finally:
        attachment.detach()
    return {"engine": engine, "onelaunch": mine, "different": different(wanted, got), "failed": attachment.failed}


def chain() -> dict[str, Any]:
    """The verified chain: its write locations, positions, retrieve indices and the mask among draft tokens."""
    from sglang.kernels.ops.speculative.cache_locs import assign_extend_cache_locs_uniform_func
    from sglang.srt.speculative.eagle_utils import TreeMaskMode, build_tree_kernel_efficient

    pool, request, lengths = (
        objects.token_pool(PAGE, seed=PAGE),
        request_objects.Request(LENGTHS, 1),
        torch.tensor(LENGTHS),
    )
    drafts = request.tokens[: REQUESTS * STEPS].view(REQUESTS, STEPS)
    parents, scores = (torch.arange(STEPS).repeat(REQUESTS, 1) - first for first in (1, 0))
    bonus = request.topk_index.flatten()

    def engine(batch: Any) -> dict[str, torch.Tensor]:
        mask, positions, *retrieve, _ = build_tree_kernel_efficient(
            bonus, parents, scores, drafts, lengths, 0, 1, STEPS, TOKENS, TreeMaskMode.QLEN_ONLY
        )
        locations = assign_extend_cache_locs_uniform_func(
            req_pool_indices=request.rows, req_to_token=pool, start_offset=lengths,
            batch_size=REQUESTS, draft_token_num=TOKENS, device=DEVICE,
        )  # fmt: skip
        names = ("retrieve_index", "retrieve_next_token", "retrieve_next_sibling")
        return dict(zip(names, retrieve, strict=True)) | {
            "mask": mask, "positions": positions, "out_cache_loc": locations
        }  # fmt: skip

    return alone("target_verify", pool, engine, lengths, request.rows)


def layout() -> dict[str, Any]:
    """The tensors from which a draft extension's batch is made."""
    from sglang.srt.model_executor.forward_batch_info import compute_position

    pool, request, lengths = (
        objects.token_pool(PAGE, seed=PAGE),
        request_objects.Request(LENGTHS, 1),
        torch.tensor(LENGTHS),
    )

    def engine(batch: Any) -> dict[str, torch.Tensor]:
        prefix = lengths.to(torch.int32)
        extends = torch.full((REQUESTS,), TOKENS, dtype=torch.int32, device=DEVICE)
        positions, starts = compute_position("triton", prefix, extends, REQUESTS * TOKENS)
        return {"prefix_lens": prefix, "extend_seq_lens": extends, "seq_lens": lengths + TOKENS,
                "positions": positions, "extend_start_loc": starts}  # fmt: skip

    return alone("draft_extend", pool, engine, lengths, request.rows)


def alone(
    mode: str,
    pool: torch.Tensor,
    engine: Callable[[Any], dict[str, torch.Tensor]],
    lengths: torch.Tensor,
    rows: torch.Tensor,
) -> dict[str, Any]:
    """Measures an engine's sequence and bind_seam()'s plan for the same tensors, and compares the tensors."""
    torch.set_default_device(None)
    try:
        wanted = engine(None)
        got = {name: torch.zeros_like(tensor).view(-1) for name, tensor in wanted.items()}
        plan = sglang.bind_seam(mode, TOKENS, got, pool)
        found = {
            "engine": measured(engine, None),
            "onelaunch": measured(lambda batch: plan.run(lengths, rows), None),
        }
    finally:
        torch.set_default_device(DEVICE)
    return {**found, "different": different({name: tensor.reshape(-1) for name, tensor in wanted.items()}, got)}


def different(wanted: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in wanted if not torch.equal(wanted[name], got[name])]


# The chain and the layout don't depend on the backend.
MEASURED: dict[str, Callable[[], dict[str, Any]]] = {
    "fa3, draft": lambda: both("draft", "fa3"),
    "fa3, verify": lambda: both("verify", "fa3"),
    "fa3, draft-extend": lambda: extension("fa3"),
    "triton, draft": lambda: both("draft", "triton"),
    "triton, verify": lambda: both("verify", "triton"),
    "triton, draft-extend": lambda: both("draft-extend", "triton"),
    "the verified chain": chain,
    "a draft extension's layout": layout,
}
FLASHINFER: dict[str, Callable[[], dict[str, Any]]] = {
    f"flashinfer, {seam}": partial(both, seam, "flashinfer") for seam in ("draft", "verify", "draft-extend")
}


def main() -> None:
    result = Path(sys.argv[1])
    measure.DRY = DRY
    torch.set_default_device(DEVICE)
    objects.POOL_ROWS, objects.CONTEXT, objects.WIDTH = 2 * REQUESTS + 8, CONTEXT, CONTEXT + 60
    runner_objects.CAPTURED = (REQUESTS,)
    found: dict[str, Any] = {
        "shape": {"requests": REQUESTS, "steps": STEPS, "tokens": TOKENS, "page": PAGE, "longest": LONGEST},
        "torch": torch.__version__,
        "gpu": None if DRY else torch.cuda.get_device_name(),
        "seams": {},
    }
    # The first pass imports and compiles. The second, after the wait, warms up the processor: without it the calls
    # timed first took the host 1.7 times as long as the same calls did later.
    for run, counts in enumerate((measure.ONCE, measure.ONCE, measure.Counts())):
        measure.counts = counts
        if not DRY and run == 1:
            wait_for_turn(result.parent)
        for name, make in (FLASHINFER if "--flashinfer" in sys.argv else MEASURED).items():
            try:
                made = make()
            except Exception:
                made = {"error": traceback.format_exc()[-3000:]}
            found["seams"][name] = made
            print(time.strftime("%T"), name, json.dumps(made)[:300], flush=True)
            if DRY or counts is not measure.ONCE:
                result.write_text(json.dumps(found, indent=1) + "\n")
        if DRY:
            break


if __name__ == "__main__":
    main()
