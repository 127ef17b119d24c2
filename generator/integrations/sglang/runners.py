"""SGLang's graph runners of a speculative step: the input buffers of their graphs, and what a call fills them from.

``bind_seam`` binds the same declarations to a caller's tensors, without a runner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import ArgumentError
from ...run.arguments import FIRST_INPUT
from ...run.bind import bind
from ...run.declared import into
from ...run.plan import Plan
from ...spec import seams
from ...spec.fields import Declaration, MetadataBuffers
from .captured import mode_of

# The function through which a runner copies a batch into its buffers: copies(destinations, sources).
COPIES = "_grouped_foreach_copy_"
# For runners with a registry, the registry's method: fill(batch, padded_bs=...).
FILL = "fill_from"
Sources = Mapping[str, Tensor]


@dataclass(frozen=True)
class Runner:
    """One runner class of SGLang's.

    Attributes:
        seam: a description of what it replays.
        method: the method that copies a batch into the buffers, makes the backend refresh its metadata, and replays.
        registry: the attribute with the registry of its buffers, whose FILL copies a batch; "" if the runner copies
            with COPIES of its module.
        backend: the attribute with its attention backend.
        mode: bind()'s name for its mode.
        declare: (tokens per request) -> the buffers' declarations by name.
        tokens: (runner) -> tokens per request.
        buffers: (runner) -> the buffers by name.
        lengths: (sources, batch) -> the requests' lengths without the tokens of the seam.
        inputs: (sources, tokens per request) -> the declared inputs of a call.
        stays: a description of the engine's steps that still run.
    """

    seam: str
    method: str
    registry: str
    backend: str
    mode: str
    declare: Callable[[int], dict[str, Declaration]]
    tokens: Callable[[Any], int]
    buffers: Callable[[Any], dict[str, Tensor]]
    lengths: Callable[[Sources, Any], Tensor]
    inputs: Callable[[Sources, int], dict[str, Tensor]]
    stays: str


def _attributes(names: tuple[str, ...]) -> Callable[[Any], dict[str, Tensor]]:
    """The attributes of runner.buffers that are there."""

    def found(runner: Any) -> dict[str, Tensor]:
        buffers = {name: getattr(runner.buffers, name, None) for name in names}
        return {name: tensor for name, tensor in buffers.items() if isinstance(tensor, Tensor)}

    return found


def _slots(runner: Any) -> dict[str, Tensor]:
    """The slots of the registry of a target model's runner."""
    return {name: runner.buffer_registry.get_slot(name).buffer for name in seams.VERIFY_BUFFERS}


_TOKENS = [seams.token_input(number) for number in range(seams.MAX_TOKEN_INPUTS)]
_ROWS = "req_pool_indices"
# The source that each declared input is a view of.
VIEWED = {
    "pool_rows": _ROWS,
    "first_token": "topk_index",
    "first_probability": "topk_p",
    "accepted": "num_accept_tokens",
    **dict.fromkeys(_TOKENS, "input_ids"),
}


def _draft_inputs(sources: Sources, tokens: int) -> dict[str, Tensor]:
    return {
        "pool_rows": sources["req_pool_indices"],
        "first_token": sources["topk_index"].select(1, 0),
        "first_probability": sources["topk_p"].select(1, 0).view(torch.int32),
    }


def _token_inputs(sources: Sources, tokens: int) -> dict[str, Tensor]:
    inputs = {}
    if "input_ids" in sources:
        inputs = dict(zip(_TOKENS, sources["input_ids"].view(-1, tokens).unbind(1), strict=False))
    inputs["pool_rows"] = sources["req_pool_indices"]
    return inputs


def _extend_inputs(sources: Sources, tokens: int) -> dict[str, Tensor]:
    inputs = _token_inputs(sources, tokens)
    inputs["accepted"] = sources["num_accept_tokens"]
    return inputs


class Views:
    """Calls a seam's plan with a batch's own tensors, of which its inputs are views.

    Making a view costs more than the rest of a call. So views are made once for each set of shapes, and tensors that
    differ only in their addresses reuse them (see Plan.follow_addresses).

    Args:
        plan: the plan.
        inputs: the declared inputs of a call, from its sources.
        viewed: the source that each declared input is a view of.
    """

    def __init__(
        self, plan: Plan, inputs: Callable[[Sources], dict[str, Tensor]], viewed: Mapping[str, str] = VIEWED
    ) -> None:
        self._plan, self._made = plan, inputs
        viewed_by = [viewed[name] for name in plan._input_names]
        self._names = [name for name in dict.fromkeys(viewed_by) if name != _ROWS]
        if plan._audit_every:  # Plan.run() has arguments of its own
            plan.follow_addresses()
        else:
            places = {_ROWS: 1, **{name: FIRST_INPUT + index for index, name in enumerate(self._names)}}
            plan.follow_addresses([places[name] for name in viewed_by])

    def run(self, lengths: Tensor, rows: Tensor, sources: Sources, size: int | None = None) -> None:
        """Plan.run() for a captured size.

        Raises:
            ArgumentError: see Plan.run; nothing was written.
            RuntimeError: CUDA refused the launch.
        """
        plan, tensors = self._plan, [sources[name] for name in self._names]
        if plan._audit_every:
            inputs = dict(zip(plan._input_names, self._inputs(rows, tensors), strict=True))
            plan.run(lengths, rows, captured_size=size, **inputs)
        else:
            plan._run(self, lengths, rows, None, None, size, *tensors)

    def _check(
        self, lengths: Tensor, rows: Tensor, extended: None, max_len: None, size: int | None, *tensors: Tensor
    ) -> list[int]:
        """Plan._check() with the views as inputs."""
        return self._plan._check(lengths, rows, extended, max_len, size, *self._inputs(rows, tensors))

    def _inputs(self, rows: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        inputs = self._made({**dict(zip(self._names, tensors, strict=True)), _ROWS: rows})
        return [inputs[name] for name in self._plan._input_names]


RUNNERS = {
    "EAGLEDraftCudaGraphRunner": Runner(
        seam="the draft step",
        method="execute",
        registry="",
        backend="draft_attn_backend",
        mode="decode",
        declare=seams.draft_step,
        tokens=lambda runner: int(runner.speculative_num_steps),
        buffers=_attributes(seams.DRAFT_BUFFERS),
        lengths=lambda sources, batch: sources["seq_lens"],
        inputs=_draft_inputs,
        stays="hidden states",
    ),
    "DecodeCudaGraphRunner": Runner(
        seam="verification",
        method="load_batch",
        registry="buffer_registry",
        backend="attn_backend",
        mode="target_verify",
        declare=seams.verify,
        tokens=lambda runner: int(runner.captured_req_width),
        buffers=_slots,
        lengths=lambda sources, batch: sources["seq_lens"],
        inputs=_token_inputs,
        stays="the tree and its mask",
    ),
    "EAGLEDraftExtendCudaGraphRunner": Runner(
        seam="draft extension",
        method="execute",
        registry="",
        backend="draft_extend_attn_backend",
        mode="draft_extend",
        declare=seams.draft_extend,
        tokens=lambda runner: int(runner.captured_req_width),
        buffers=_attributes(seams.DRAFT_EXTEND_BUFFERS),
        lengths=lambda sources, batch: batch.extend_prefix_lens,
        inputs=_extend_inputs,
        stays="hidden states",
    ),
}


def named(tokens: int) -> dict[str, Any]:
    """The inputs and constants of bind() that the seams' formulas name."""
    inputs = {name: getattr(torch, dtype) for name, dtype in seams.INPUTS.items()}
    return {"inputs": inputs, "constants": {"draft_tokens": tokens}}


def bind_seam(mode: Any, tokens: int, tensors: Mapping[str, Tensor], req_to_token: Tensor, **settings: Any) -> Plan:
    """Binds tensors of an engine of yours to a seam's declarations, for one launch without a runner.

    Args:
        mode: SGLang's ForwardMode or a name of bind()'s modes, which chooses the seam: the draft step (decode),
            verification (target_verify) or draft extension (draft_extend).
        tokens: tokens per request: the number of draft steps in decode, else of draft tokens.
        tensors: by the names that ``onelaunch.spec.seams`` declares for that seam, such as positions (int64 [bs *
            tokens]), retrieve_index (int64, likewise) or extend_start_loc (int32 [bs]).
        req_to_token: int32 or int64 [pool rows, W].
        settings: further arguments of onelaunch.bind, such as padding_len.

    Returns:
        A plan; run() takes the lengths without the tokens of the seam, each request's row of the pool, and the inputs
        that the fields name: pool_rows (for req_pool_indices), token_0, token_1, ... (for input_ids), accepted.

    Raises:
        ArgumentError: a name isn't declared; see also onelaunch.bind.
    """
    declared = {kind.mode: kind.declare for kind in RUNNERS.values()}[mode_of(mode)](tokens)
    for name in tensors:
        if name not in declared:
            raise ArgumentError(f"tensors has {name!r}; allowed: {', '.join(declared)}.")
    return bind(
        [MetadataBuffers()],
        req_to_token=req_to_token,
        declare={**declared, **{name: into(declared[name], tensor) for name, tensor in tensors.items()}},
        **named(tokens),
        **settings,
    )
