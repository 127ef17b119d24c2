"""Dense FlashMLA's schedule alone, one backend: ours beside FlashMLA's own kernel, from SGLang's wheel of kernels.

Nothing is copied, and of the wheel only FlashMLA's extension is loaded: its op is what SGLang's FlashMLA backend calls,
read in sglang-kernel 0.4.5.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import onelaunch
import torch
from onelaunch import MetadataBuffers
from torch import Tensor

from .cases import SHAPES, Case, parse_shape
from .meter import Meter
from .scene import Call

# Query heads for one of keys and values, of which a part takes 64: a part for each multiprocessor.
_HEADS = 64


class Missing(Exception):
    """FlashMLA's extension isn't there, or can't be loaded; the message says why."""


@cache
def schedule() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """FlashMLA's own: from int32 [bs] lengths on a GPU to (metadata [parts, 8], num_splits [bs + 1]).

    Raises:
        Missing: no wheel of SGLang's kernels, or one for another torch.
    """
    found = importlib.util.find_spec("sgl_kernel")  # without its __init__, which loads everything else
    folders = [] if found is None else list(found.submodule_search_locations or ())
    libraries = [path for folder in folders for path in Path(folder).glob("flashmla_ops*.so")]
    if not libraries:
        raise Missing("SGLang's kernels (sglang-kernel) aren't importable, or without FlashMLA")
    torch_ops: Any = torch.ops  # load_library has no annotations
    try:
        torch_ops.load_library(libraries[0])
        op = torch_ops.sgl_kernel.get_mla_decoding_metadata.default
    except (AttributeError, OSError, RuntimeError) as error:
        raise Missing(f"FlashMLA's extension can't be loaded: {error}") from error
    # seqlens_k, num_q_tokens_per_head_k, h_k, h_q, is_fp8_kvcache, topk: as for dense attention in bfloat16.
    return lambda lengths: tuple(op(lengths, _HEADS, 1, None, False, None))


def schedule_rows(meter: Meter) -> list[dict[str, Any]]:
    """A row for each shape: ``ours_us`` and ``theirs_us``, medians in a CUDA graph with warm caches.

    The two take turns, and must agree number for number. ``reason`` says what is wrong or missing.
    """
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        row: dict[str, Any] = {"shape": shape, "ours_us": None, "theirs_us": None, "reason": ""}
        rows.append(row)
        try:
            calls, row["reason"] = _calls(Case(*parse_shape(shape)).lengths(), meter)
            took: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(3):
                for name, call in calls.items():
                    took[name] += meter.warm_us(call)
            row |= {f"{name}_us": round(statistics.median(times), 3) for name, times in took.items()}
        except Exception as error:  # of any kind: the other shapes are still measured
            row["reason"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return rows


def _calls(lengths: list[int], meter: Meter) -> tuple[dict[str, Call], str]:
    """The calls that can be measured, and why one of them can't."""
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=meter.device)
    rows = torch.arange(len(lengths), device=meter.device)
    theirs = None
    try:
        wanted = [tensor.clone() for tensor in schedule()(seq_lens)]
        theirs, reason = schedule(), ""
    except Missing as error:
        reason = str(error)
    parts = wanted[0].shape[0] if theirs else 132
    buffers = MetadataBuffers(
        flashmla_metadata=torch.full((parts, 8), -7, dtype=torch.int32, device=meter.device),
        num_splits=torch.full((len(lengths) + 1,), -7, dtype=torch.int32, device=meter.device),
    )
    pool = torch.zeros((len(lengths), 1), dtype=torch.int32, device=meter.device)  # a schedule reads no tokens
    plan = onelaunch.bind([buffers], req_to_token=pool, seq_lens_dtype=torch.int32)
    calls: dict[str, Call] = {"ours": lambda: plan.run(seq_lens, rows)}
    calls["ours"]()
    if theirs:
        for field, tensor in zip(("flashmla_metadata", "num_splits"), wanted, strict=True):
            got = getattr(buffers, field)
            unequal = got != tensor
            if field == "flashmla_metadata":
                unequal[:, 7] = False  # padding
            if unequal.any():
                place = tuple(unequal.nonzero()[0].tolist())
                return {}, f"{field}{list(place)} is {int(got[place])}, FlashMLA says {int(tensor[place])}"
        calls["theirs"] = lambda: theirs(seq_lens)
    return calls, reason
