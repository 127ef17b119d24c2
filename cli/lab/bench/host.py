"""The host time of a call, and its parts."""

from __future__ import annotations

from typing import Any

import onelaunch
import torch
from onelaunch.run.refresh import LISTS

from .baselines import kernel, target_of
from .cases import INDEX_TOPK, Case
from .meter import Meter
from .scene import Call, Scene

HOST = {
    "nothing": "an empty Python function",
    "binding": "a call of the binding that launches nothing",
    "stream": "the lookup of the current stream",
    "raw": "an empty kernel launched through the binding, its stream known",
    "raw+stream": "the same with the lookup of the stream",
    "kernel": "our kernel launched through the binding, all words and the stream known",
    "run": "the binding's run: arguments compared with the last call's, stream lookup, launch",
    "plan.run": "Plan.run, which calls that",
    "broadcast": "fused_metadata_precompute_and_broadcast_cuda with six lists",
    "precompute": "precompute_decode_metadata_cuda into given buffers",
    "copy": "fused_metadata_copy_cuda to all backends",
}


def host_pieces(scene: Scene, page_size: int) -> dict[str, Call]:
    """The parts of a call's host time, each as a call of its own; see HOST."""

    cuda, index = scene.device.type == "cuda", scene.device.index or 0
    seq_lens, rows, pool = scene.inputs
    backends = scene.buffers
    bound = scene.plan()
    bound.run(seq_lens, rows)
    nothing = kernel("empty", "cpu").bind([0]).launch
    raw = kernel("empty", target_of(scene.device)).bind([0]).launch
    words, stream = bound._check(seq_lens, rows, None, None), 0
    if cuda:  # pragma: gpu
        stream = torch._C._cuda_getCurrentRawStream(index)
    # Another plan than run()'s: after this launch, run() would have to check its arguments again.
    launch, run = scene.plan()._bound.launch, bound._bound.run
    lengths, sums, tables, nsa_lengths, nsa_sums, pages = ([getattr(b, name) for b in backends] for name in LISTS[:6])
    # Spelled out, as an engine does: "*lists" or "**numbers" would add half a microsecond or more.
    width, topk = scene.width, INDEX_TOPK
    computed = onelaunch.precompute_decode_metadata_cuda(
        seq_lens, rows, pool, max_len=width, nsa_index_topk=topk, real_page_size=page_size
    )
    pieces: dict[str, Call] = {
        "nothing": lambda: None,
        "binding": lambda: nothing(0),
        "raw": lambda: raw(stream),
        "kernel": lambda: launch(*words, stream),
        "run": lambda: run(bound, seq_lens, rows, None, None),
        "plan.run": lambda: bound.run(seq_lens, rows),
        "broadcast": lambda: onelaunch.fused_metadata_precompute_and_broadcast_cuda(
            seq_lens,
            rows,
            pool,
            lengths,
            sums,
            tables,
            nsa_lengths,
            nsa_sums,
            pages,
            max_len=width,
            nsa_index_topk=topk,
            real_page_size=page_size,
            extent="live",
        ),
        "precompute": lambda: onelaunch.precompute_decode_metadata_cuda(
            seq_lens, rows, pool, max_len=width, nsa_index_topk=topk, real_page_size=page_size, out=computed
        ),
        "copy": lambda: onelaunch.fused_metadata_copy_cuda(computed, backends),
    }
    if cuda:  # pragma: gpu
        pieces["stream"] = lambda: torch._C._cuda_getCurrentRawStream(index)
        pieces["raw+stream"] = lambda: raw(torch._C._cuda_getCurrentRawStream(index))
    for call in pieces.values():
        call()
    return {name: pieces[name] for name in HOST if name in pieces}


def host_rows(meter: Meter, backends: int = 3) -> list[dict[str, Any]]:
    """Microseconds of host time by part, on a shape so small that the GPU never makes the host wait."""
    case = Case(8, 1024, backends, width=4167)
    try:
        took = meter.host_us(host_pieces(meter.scene(case, case.lengths()), case.page_size))
    except Exception as error:
        return [{"piece": "all", "what": f"failed: {type(error).__name__}: {error}", "us": None}]
    rows = [{"piece": name, "what": HOST[name], "us": us} for name, us in took.items()]
    parts = (
        ("of which the launch", "raw less binding: cudaLaunchKernelEx of nothing", "raw", ("binding",)),
        (
            "of which the parameters",
            "kernel less raw: integers converted, a larger block, the grid",
            "kernel",
            ("raw",),
        ),
        (
            "of which the checks",
            "run less kernel: arguments compared, the stream",
            "run",
            ("kernel",),
        ),
        ("of which Python", "plan.run less run", "plan.run", ("run",)),
    )
    for part, what, whole, without in parts:
        rows.append({"piece": part, "what": what, "us": took[whole] - sum(took.get(name, 0.0) for name in without)})
    return rows
