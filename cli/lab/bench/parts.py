"""Parts of a refresh alone, beside the engine's own kernel for each: flattened indices, pages, schedules; and tokens.

Nothing of an engine is copied: the kernels come from the wheels that can be imported, read in SGLang 0.5.23 and
sglang-kernel 0.4.5.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onelaunch
import torch
from onelaunch import MetadataBuffers, into, packed, running_sum, table
from onelaunch.run.plan import Plan
from onelaunch.spec import reference
from onelaunch.spec.fields import Packed
from torch import Tensor

from . import flashmla
from .baselines import fan_out
from .cases import SHAPES, Case, parse_shape, wide_enough
from .implementation import sentence_of
from .meter import Meter
from .scene import Call, first_difference, make_inputs, poison
from .sglang_modules import Missing, module

# Tokens of a page in the tables of pages, and of a block that the engine's planned grid gives to a program.
PAGE_SIZE, _TOKENS = 32, 512
_MAX_BLOCKS = 32
# The name of a call in the results, and its variants, of which the fastest counts.
Calls = dict[str, list[Call]]


@dataclass
class Inputs:
    """Inputs of a shape, and new destinations for them.

    Attributes:
        lengths: tokens of each request.
        seq_lens, rows, pool: int64 [bs], int64 [bs], int32 [bs + 1, W].
    """

    lengths: list[int]
    width: int
    device: torch.device
    seq_lens: Tensor = field(init=False)
    rows: Tensor = field(init=False)
    pool: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.seq_lens, self.rows, self.pool = make_inputs(self.lengths, self.width, self.device)

    @property
    def multiprocessors(self) -> int:
        """By which schedules divide the work; on a CPU those of an H100."""
        if self.device.type == "cpu":
            return 132
        return torch.cuda.get_device_properties(self.device).multi_processor_count

    def new(self, *shape: int) -> Tensor:
        """An int32 tensor, not written yet."""
        return torch.empty(shape, dtype=torch.int32, device=self.device)


@dataclass(frozen=True)
class Part:
    """A part of a refresh.

    Attributes:
        name: for people.
        backends: the numbers of backends to measure.
        destinations: makes the buffers of N backends.
        engine: gives the engine's calls, which write the given buffers or return new ones. "engine" is the call as the
            engine makes it; "engine-best" has its other forms. Raises Missing.
        floor: gives the calls of a lower bound, which write elsewhere.
        settings: those of bind(), for N backends.
        declared: formulas of its tables and packed fields, as a user would declare them: they write into the same kind
            of tensors, and shall cost what the built-in fields cost.
        undefined: marks the elements of a field, given its name and expected content, that mean nothing.
    """

    name: str
    backends: tuple[int, ...]
    destinations: Callable[[Inputs, int], list[MetadataBuffers]]
    engine: Callable[[Inputs, list[MetadataBuffers]], Calls]
    settings: Callable[[int], dict[str, Any]] = lambda backends: {}
    floor: Callable[[Inputs, int], list[Call]] = lambda inputs, backends: []
    declared: Mapping[str, Any] = field(default_factory=dict)
    undefined: Callable[[Inputs, str, Tensor], Tensor | None] = lambda inputs, name, expected: None


def _offsets(backends: int) -> dict[str, Any]:
    """A draft step sees the tokens of the steps before."""
    return {"seqlen_offsets": tuple(range(1, backends + 1))}


# ---- flattened indices: Triton, FlashInfer ---------------------------------------------------------------------------
def _index_buffers(inputs: Inputs, backends: int) -> list[MetadataBuffers]:
    count = len(inputs.lengths)
    capacity = sum(inputs.lengths) + count * backends
    indptr, indices = inputs.new(backends, count + 1), inputs.new(backends, capacity)
    return [MetadataBuffers(kv_indptr=indptr[n], kv_indices=indices[n]) for n in range(backends)]


def _sglang_indices(inputs: Inputs, buffers: list[MetadataBuffers]) -> Calls:
    """SGLang's kernel as its Triton backend calls it, and with a grid that the host plans, as FlashInfer's may."""
    locations = module("kernels.ops.speculative.cache_locs")
    kernel, power = locations.generate_draft_decode_kv_indices, locations.next_power_of_2
    steps, count = len(buffers), len(inputs.lengths)
    # The engine's are one tensor each, [steps, capacity] and [steps, bs + 1]; the first step's begins where they do.
    indptr, indices = buffers[0].kv_indptr, buffers[0].kv_indices
    assert indices is not None
    width = indices.numel()

    def call(blocks: int, planned: bool) -> Call:
        arguments = (
            inputs.rows, inputs.pool, inputs.seq_lens, indices, indptr, inputs.seq_lens,
            inputs.pool.stride(0), width, count + 1, power(count), power(steps), power(count), 1,
        )  # fmt: skip

        def run() -> None:  # a launch by Triton returns the compiled kernel
            kernel[steps * blocks, count, 1](*arguments, NUM_STEPS=steps if planned else 0)

        return run

    max_blocks = -(-max(inputs.lengths) // _TOKENS)
    return {
        "engine": [call(1, False)],
        "engine-best": [call(blocks, True) for blocks in dict.fromkeys((min(_MAX_BLOCKS, max_blocks), max_blocks))],
    }


# ---- pages alone: FA3, TRTLLM-MHA ------------------------------------------------------------------------------------
def _page_buffers(inputs: Inputs, backends: int) -> list[MetadataBuffers]:
    count = len(inputs.lengths)
    return [
        MetadataBuffers(
            cache_seqlens=inputs.new(count),
            cu_seqlens_k=inputs.new(count + 1),
            real_page_table=inputs.new(count, -(-inputs.width // PAGE_SIZE)),
        )
        for _ in range(backends)
    ]


def _sglang_pages(inputs: Inputs, buffers: list[MetadataBuffers]) -> Calls:
    refresh = module("kernels.ops.attention.trtllm_mha_graph_metadata").update_trtllm_mha_graph_metadata

    def call() -> None:
        for step, to in enumerate(buffers):
            assert to.real_page_table is not None
            refresh(
                req_pool_indices=inputs.rows,
                seq_lens=inputs.seq_lens,
                req_to_token=inputs.pool,
                cache_seqlens=to.cache_seqlens,
                cu_seqlens_k=to.cu_seqlens_k,
                page_table=to.real_page_table,
                bs=len(inputs.lengths),
                seqlen_offset=step + 1,
                max_seq_pages=to.real_page_table.shape[1],
                page_size=PAGE_SIZE,
            )

    return {"engine": [call]}


def _page_floor(inputs: Inputs, backends: int) -> list[Call]:
    """A read of one token a page, and N writes of the pages' numbers: contiguous, aligned."""
    pages = sum(-(-length // PAGE_SIZE) for length in inputs.lengths)
    to = [inputs.new(pages) for _ in range(backends)]
    return [fan_out(inputs.pool, to, pages, unroll, PAGE_SIZE) for unroll in (1, 2, 4)]


# ---- tokens: no engine refreshes these alone -------------------------------------------------------------------------
def _token_buffers(inputs: Inputs, backends: int) -> list[MetadataBuffers]:
    count = len(inputs.lengths)
    return [
        MetadataBuffers(cache_seqlens=inputs.new(count), page_indices=inputs.new(count, inputs.width))
        for _ in range(backends)
    ]


def _no_engine(inputs: Inputs, buffers: list[MetadataBuffers]) -> Calls:
    return {}


# ---- schedules -------------------------------------------------------------------------------------------------------
def _mqa_buffers(inputs: Inputs, backends: int) -> list[MetadataBuffers]:
    return [
        MetadataBuffers(paged_mqa_schedule_metadata=inputs.new(inputs.multiprocessors + 1, 2)) for _ in range(backends)
    ]


def _sglang_mqa(inputs: Inputs, buffers: list[MetadataBuffers]) -> Calls:
    schedule = module("kernels.ops.attention.dsv4.attn").get_paged_mqa_logits_metadata
    lengths, count = inputs.seq_lens.int(), inputs.multiprocessors
    return {
        "engine": [lambda: [MetadataBuffers(paged_mqa_schedule_metadata=schedule(lengths, page_size=64, num_sm=count))]]
    }


def _mla_buffers(inputs: Inputs, backends: int) -> list[MetadataBuffers]:
    return [
        MetadataBuffers(
            flashmla_metadata=inputs.new(inputs.multiprocessors, 8), num_splits=inputs.new(len(inputs.lengths) + 1)
        )
        for _ in range(backends)
    ]


def _flashmla(inputs: Inputs, buffers: list[MetadataBuffers]) -> Calls:
    schedule, lengths = flashmla.schedule(), inputs.seq_lens.int()

    def call() -> list[MetadataBuffers]:
        metadata, splits = schedule(lengths)
        return [MetadataBuffers(flashmla_metadata=metadata, num_splits=splits)]

    return {"engine": [call]}


def _undefined_in_flashmla(inputs: Inputs, name: str, expected: Tensor) -> Tensor | None:
    """Padding, which FlashMLA doesn't write."""
    if name != "flashmla_metadata":
        return None
    undefined = torch.zeros_like(expected, dtype=torch.bool)
    undefined[:, 7] = True
    return undefined


def _int32(backends: int) -> dict[str, Any]:
    return {"seq_lens_dtype": torch.int32}


PARTS = (
    Part(
        "flattened indices", (1, 3, 7), _index_buffers, _sglang_indices, _offsets,
        declared={
            "kv_indptr": running_sum("max(base_len, 0) + offset"),
            "kv_indices": packed("token(column)", at="kv_indptr"),
        },
    ),
    Part(
        f"pages of {PAGE_SIZE} alone", (1, 3), _page_buffers, _sglang_pages,
        lambda backends: {"page_size": PAGE_SIZE, **_offsets(backends)}, _page_floor,
        {
            "real_page_table": table(
                "token(column * page_size) // page_size", "request", columns="ceil_div(seq_len, page_size)"
            ),
        },
    ),
    Part(
        "tokens alone", (1, 3), _token_buffers, _no_engine, _offsets,
        declared={"page_indices": table("token(column)", "request", columns="seq_len")},
    ),
    Part("DeepGEMM's schedule", (1,), _mqa_buffers, _sglang_mqa, _int32),
    Part("FlashMLA's schedule", (1,), _mla_buffers, _flashmla, _int32, undefined=_undefined_in_flashmla),
)  # fmt: skip


def part_rows(meter: Meter, shapes: Sequence[str] = SHAPES, parts: Sequence[Part] = PARTS) -> Iterator[dict[str, Any]]:
    """A row for each part, number of backends and shape.

    ``warm_us`` and ``cold_us`` are medians in a CUDA graph, by the name of the call: "ours", "declared", "engine",
    "engine-best", "floor". The calls take turns. All of ours and of the engine's must write what the reference says.
    ``reason`` says what is wrong or missing.
    """
    for part in parts:
        for backends in part.backends:
            for shape in shapes:
                row: dict[str, Any] = {"part": part.name, "backends": backends, "shape": shape, "reason": ""}
                row |= {"warm_us": {}, "cold_us": {}}
                batch, length = parse_shape(shape)
                case = Case(batch, length, width=wide_enough(length))
                try:
                    inputs = Inputs(case.lengths(), case.width, meter.device)
                    calls, row["reason"] = _calls(part, inputs, backends)
                    row |= _times(meter, calls)
                except Exception as error:  # of any kind: the other rows are still measured
                    row["reason"] = sentence_of(error)
                yield row


def _calls(part: Part, inputs: Inputs, backends: int) -> tuple[Calls, str]:
    """The calls that can be measured, and why the others can't."""
    settings = part.settings(backends)
    seq_lens = inputs.seq_lens.to(settings.get("seq_lens_dtype", torch.int64))
    expected, ours, declared, theirs = (part.destinations(inputs, backends) for _ in range(4))
    for written in (expected, ours, declared):
        poison(written)
    poison(theirs, first_sums=0)
    known: dict[str, Any] = {"index_topk": 0, "page_size": 1, "extent": "live"} | settings
    known.pop("seq_lens_dtype", None)
    reference.refresh(expected, inputs.seq_lens, inputs.rows, inputs.pool, **known)
    plan = onelaunch.bind(ours, req_to_token=inputs.pool, **settings)
    calls: Calls = {"ours": [lambda: plan.run(seq_lens, inputs.rows)]}
    if part.declared:
        as_user = _declared_plan(part, inputs, declared, settings)
        calls["declared"] = [lambda: as_user.run(seq_lens, inputs.rows)]
    reasons = []
    try:
        calls |= part.engine(inputs, theirs)
    except Missing as error:
        reasons.append(str(error))
    for name in list(calls):
        for call in calls[name]:
            of_ours = {"ours": ours, "declared": declared}.get(name)
            returned = call()
            fault = _fault(part, inputs, of_ours or returned or theirs, expected)
            if fault:
                del calls[name]
                reasons.append(f"{name}: {fault}")
                break
            poison(theirs, first_sums=0)
    if floor := part.floor(inputs, backends):
        calls["floor"] = floor
    return calls, "; ".join(reasons)


def _declared_plan(part: Part, inputs: Inputs, buffers: list[MetadataBuffers], settings: Mapping[str, Any]) -> Plan:
    """A plan in which a user's declarations take the place of built-in fields."""
    names = {name: f"declared_{name}" for name in part.declared}
    declare = {
        names[name]: into(
            dataclasses.replace(field, at=names[field.at]) if isinstance(field, Packed) else field,
            [getattr(each, name) for each in buffers],
        )
        for name, field in part.declared.items()
    }
    without = [dataclasses.replace(each, **dict.fromkeys(names)) for each in buffers]
    return onelaunch.bind(without, req_to_token=inputs.pool, declare=declare, **settings)


def _fault(part: Part, inputs: Inputs, got: Any, expected: list[MetadataBuffers]) -> str:
    """The first wrong element, in words; "" if there is none."""
    for index, (backend, wanted) in enumerate(zip(got, expected, strict=True)):
        for known, want in wanted.items():
            got_one = getattr(backend, known.name)
            if found := first_difference(index, known.name, got_one, want, part.undefined(inputs, known.name, want)):
                return found
    return ""


def _times(meter: Meter, calls: Mapping[str, Sequence[Call]]) -> dict[str, dict[str, float]]:
    """Medians by the kind of caches and the name of the call, in microseconds."""
    found: dict[str, dict[str, float]] = {}
    for column, measure in (("warm_us", meter.warm_us), ("cold_us", meter.cold_us)):
        took: dict[str, list[list[float]]] = {name: [[] for _ in each] for name, each in calls.items()}
        for _ in range(2):
            for name, each in calls.items():
                for variant, call in enumerate(each):
                    took[name][variant] += measure(call)
        found[column] = {name: round(min(statistics.median(times) for times in each), 3) for name, each in took.items()}
    return found
