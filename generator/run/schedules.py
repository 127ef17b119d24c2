"""Schedules by themselves: DeepGEMM's of paged MQA logits, and FlashMLA's for sparse attention."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..errors import ArgumentError
from ..spec.fields import MetadataBuffers
from ..spec.parts import MAX_NEXT_N, MAX_SM_PARTS, MAX_SPLIT_COST, FlashMLAOrder
from ..spec.reference_schedules import flashmla_schedule
from . import bind, ops
from .checks import INT_DTYPES, MAX_BATCH, check_int
from .remembered import RememberedPlans

_CONVENTIONS = ("sm90", "sm100")

mqa_plans = RememberedPlans(passed=5, inputs=1)  # of Plan.run


def paged_mqa_schedule(
    context_lens: Tensor,
    num_sms: int,
    *,
    out: Tensor | None = None,
    convention: str | None = None,
    split_cost: int = 0,
) -> Tensor:
    """DeepGEMM's schedule of paged MQA logits: get_paged_mqa_logits_metadata, in one launch.

    DeepGEMM compiles its own for every 32 requests more, and for every num_sms. This one is a kernel for each n, for
    all batch sizes: call it once before serving, or build it ahead of time, where n is 1 by ``onelaunch build --set
    fields=paged_mqa_schedule_metadata,seq_lens_dtype=int32``, and where it is 4 with ``mode=draft_extend,next_n=4`` too
    (on sm_100 also ``schedule_remainder=first,schedule_split_cost=4``).

    Args:
        context_lens: int32 or int64 [bs, n], of which the last column counts, or [bs] for n = 1; any strides.
        num_sms: multiprocessors that share the work, 1 or more. DeepGEMM in vLLM 0.33.0 takes half of them on sm_90
            where n is 4.
        out: int32 [num_sms + 1, 2], contiguous; None allocates it. New memory needs a new plan, and binding one takes a
            thousand times as long as a call that finds its plan.
        convention: "sm90" (also of sm_120): an entry is a query atom of two tokens and a split of 256 in it; or
            "sm100": a request's first token and a split of 256. See reference.paged_mqa_schedule. None asks the device
            of the tensors; on a CPU it is "sm90".
        split_cost: units of work of a split of one request; 0 for DeepGEMM's of 2026-06, ceil(n / 2) or n. In vLLM
            0.33.0 it is 1 on sm_90 where n is 4, and on sm_100 2 * q * ceil(n / q) + n, where q is 128 // heads.

    Returns:
        ``out``, or a new tensor.

    Raises:
        ArgumentError: an argument doesn't fit; nothing was written.
    """
    check_int("num_sms", num_sms, 1, MAX_BATCH - 1)
    if out is None and isinstance(context_lens, Tensor):
        out = torch.empty((num_sms + 1, 2), dtype=torch.int32, device=context_lens.device)
    if is_dynamo_compiling():
        torch.ops.onelaunch.paged_mqa_schedule(context_lens, num_sms, out, convention, split_cost)
        return out
    lengths, n = _last_column(context_lens)
    arguments = mqa_plans.run(lengths, lengths, None, None, None, n, num_sms, convention, split_cost, out)
    if arguments is not None:
        if isinstance(out, Tensor) and out.shape != (num_sms + 1, 2):
            raise ArgumentError(
                f"out has shape {tuple(out.shape)} and num_sms is {num_sms}; it must be [{num_sms + 1}, 2]."
            )
        check_int("split_cost", split_cost, 0, MAX_SPLIT_COST)
        settings = {
            # Lengths that include the n tokens.
            "mode": "decode" if n == 1 else "draft_extend",
            "next_n": n,
            "seq_lens_dtype": lengths.dtype,
            **paged_mqa_settings(convention_of(lengths.device) if convention is None else convention, n, split_cost),
        }
        # The kernel gathers nothing: it has no table, and doesn't read the requests' rows.
        table = torch.empty((1, 1), dtype=torch.int32, device=lengths.device)
        names = bind.ArgumentNames(lambda index, name: "out")
        buffers = MetadataBuffers(paged_mqa_schedule_metadata=out)
        made = bind.make_plan([buffers], table, settings, names, keep=False)
        mqa_plans.keep(made, *arguments)
        made.run(lengths, lengths)
    return out


def convention_of(device: torch.device) -> str:
    """The convention of DeepGEMM's schedule on a device."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10:  # pragma: gpu
        return "sm100"
    return "sm90"


def paged_mqa_settings(convention: str, n: int, split_cost: int = 0) -> dict[str, Any]:
    """The settings of bind() for DeepGEMM's schedule of requests with n tokens.

    Args:
        convention, split_cost: see paged_mqa_schedule.
        n: query tokens of a request.

    Raises:
        ArgumentError: an unknown convention.
    """
    if convention not in _CONVENTIONS:
        allowed = ", ".join(map(repr, _CONVENTIONS))
        raise ArgumentError(f"convention is {convention!r}; allowed: {allowed}, or None for the device's.")
    if convention == "sm90":
        return {"schedule_remainder": "last", "schedule_atoms": split_cost}
    return {"schedule_remainder": "first", "schedule_split_cost": split_cost or n}


def _last_column(context_lens: Any) -> tuple[Tensor, int]:
    """The lengths that count, and n."""
    if not isinstance(context_lens, Tensor):
        raise ArgumentError(f"context_lens is a {type(context_lens).__name__}; it must be a torch.Tensor.")
    if context_lens.dtype not in INT_DTYPES:
        raise ArgumentError(f"context_lens has dtype {context_lens.dtype}; allowed: torch.int32, torch.int64.")
    if context_lens.dim() == 1:
        return context_lens, 1
    if context_lens.dim() != 2 or not 1 <= context_lens.shape[1] <= MAX_NEXT_N:
        raise ArgumentError(
            f"context_lens has shape {tuple(context_lens.shape)}; it must be [bs], or [bs, n] with n from 1 to "
            f"{MAX_NEXT_N}."
        )
    return context_lens.select(1, -1), context_lens.shape[1]  # cheaper than an index


def sparse_flashmla_metadata(
    rows: int, topk: int, num_sm_parts: int, *, order: str = "2026", device: Any = "cpu"
) -> tuple[Tensor, Tensor]:
    """FlashMLA's tile schedule for sparse attention, and its num_splits: flashmla_metadata of equal lengths.

    Args:
        rows: rows of the batch, 0 or more.
        topk: tokens that every row attends to, 1 or more.
        num_sm_parts: parts, 1 to 512. FlashMLA of 2026 on sm_90 has max(SMs // s_q // (h_q // 64), 1).
        order: "2026" or "2025", see reference.flashmla_schedule.
        device: the device of the returned tensors.

    Returns:
        int32 [num_sm_parts, 8] and int32 [rows + 1].

    Raises:
        ArgumentError: a number or the order isn't allowed.
    """
    check_int("rows", rows, 0, MAX_BATCH)
    check_int("topk", topk, 1, 2**31 - 1)
    check_int("num_sm_parts", num_sm_parts, 1, MAX_SM_PARTS)
    if order not in (allowed := get_args(FlashMLAOrder)):
        raise ArgumentError(f"order is {order!r}; allowed: {', '.join(map(repr, allowed))}.")
    metadata, num_splits = flashmla_schedule([topk] * rows, num_sm_parts, order=order)
    return (
        torch.tensor(metadata, dtype=torch.int32, device=device),
        torch.tensor(num_splits, dtype=torch.int32, device=device),
    )


def _schedule_into(
    context_lens: Tensor, num_sms: int, out: Tensor, convention: str | None = None, split_cost: int = 0
) -> None:
    paged_mqa_schedule(context_lens, num_sms, out=out, convention=convention, split_cost=split_cost)


ops.define("paged_mqa_schedule", _schedule_into)
