"""Binding a kernel to buffers, once, so that a step is one cheap call and one launch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .. import log
from ..build import toolchain
from ..cache.store import warn_once
from ..errors import ArgumentError, LaunchError
from ..load import loader
from ..load.loader import Kernel
from ..spec import layout
from ..spec.config import MAX_NEXT_N, MAX_SEQLEN_OFFSET, MAX_SM_PARTS, KernelConfig
from ..spec.fields import FIELDS, MetadataBuffers
from ..spec.violations import VIOLATIONS
from .checks import (
    INT_DTYPES,
    MAX_BATCH,
    MAX_COLUMNS,
    Region,
    check_destination,
    check_disjoint,
    check_int,
    check_tensor,
    dtype_name,
)

NVTX_VARIABLE = "ONELAUNCH_NVTX"

NameOf = Callable[[int, str], str]


class Destinations:
    """The checked destinations of N backends: which fields there are, the different tensors of each, the capacity.

    Args:
        backends: one MetadataBuffers a backend; all have the same fields.
        page_size: P; with 1, real_page_table must be page_indices or None.
        name_of: the name of a backend's field, for messages.
        mode: the forward mode, which says whether rows are requests.

    Attributes:
        fields: names of the fields that are written.
        tensors: for each field, its different tensors: one that several backends share is there once.
        regions: their memory.
        device: the device of all of them.
        capacity: requests that fit; narrowest names the tensor with the least room for them.
        row_capacity: rows that fit, of which requests may have several; narrowest_rows likewise.

    Raises:
        ArgumentError: a tensor can't be written to, the backends don't match, or destinations overlap.
    """

    def __init__(
        self, backends: Sequence[MetadataBuffers], page_size: int, name_of: NameOf, mode: str = "decode"
    ) -> None:
        if isinstance(backends, MetadataBuffers) or not isinstance(backends, Sequence):
            raise ArgumentError(f"backends is a {type(backends).__name__}; it must be a list of MetadataBuffers.")
        for index, backend in enumerate(backends):
            if not isinstance(backend, MetadataBuffers):
                raise ArgumentError(f"backends[{index}] is a {type(backend).__name__}; it must be a MetadataBuffers.")
        if not backends:
            raise ArgumentError("backends is empty; give the buffers of at least one backend.")
        self.count = len(backends)
        self.device: torch.device | None = None
        self.tensors: dict[str, list[Tensor]] = {}
        names: dict[tuple[str, int], str] = {}
        room: dict[str, list[tuple[int, str]]] = {"request": [], "row": []}
        for index, backend in enumerate(backends):
            for name, tensor in _written(backend, index, page_size, name_of, mode).items():
                field, label = FIELDS[name], name_of(index, name)
                check_destination(label, tensor, dim=field.dim, device=self.device)
                self.device = tensor.device
                if field.extra and tensor.numel() == 0:
                    raise ArgumentError(f"{label} is empty; it must have room for the first 0, shape [bs + 1].")
                if field.kind == "schedule":
                    _check_schedule(name, label, tensor)
                if field.sized_by_batch:
                    room[field.per].append((tensor.shape[0] - field.extra, label))
                known = self.tensors.setdefault(name, [])
                if not any(_same_memory(tensor, other) for other in known):
                    known.append(tensor)
                    names[name, id(tensor)] = label
        first = _written(backends[0], 0, page_size, name_of, mode)
        for index, backend in enumerate(backends):
            for name in _written(backend, index, page_size, name_of, mode).keys() ^ first.keys():
                has, lacks = (0, index) if name in first else (index, 0)
                raise ArgumentError(
                    f"{name_of(lacks, name)} is None but {name_of(has, name)} is a tensor; all backends must have the "
                    "same fields. Bind backends with other fields to a plan of their own."
                )
        if not first:
            raise ArgumentError("backends have no field at all; give at least one tensor.")
        self.fields = tuple(name for name in FIELDS if name in first)
        if mode == "decode":
            room["request"] = room["row"] = room["request"] + room["row"]
        self.capacity, self.narrowest = min(room["request"] or [(MAX_BATCH, "")])
        self.row_capacity, self.narrowest_rows = min(room["row"] or [(MAX_BATCH, "")])
        self.names = names
        self.regions = [Region.of(names[name, id(t)], t) for name, tensors in self.tensors.items() for t in tensors]
        check_disjoint(self.regions)

    def width(self, name: str) -> int | None:
        """The common width of a table field, None if there is no such field.

        Raises:
            ArgumentError: backends differ in it.
        """
        return self._common(name, 1, "columns", "Slice them: table[:, :width].")

    def length(self, name: str) -> int | None:
        """The common length of a field whose first dimension isn't the batch, likewise."""
        return self._common(name, 0, "rows" if FIELDS[name].dim == 2 else "elements", "Slice them: tensor[:length].")

    def _common(self, name: str, dim: int, what: str, remedy: str) -> int | None:
        tensors = self.tensors.get(name)
        if not tensors:
            return None
        for tensor in tensors:
            if tensor.shape[dim] != tensors[0].shape[dim]:
                raise ArgumentError(
                    f"{self.names[name, id(tensor)]} has {tensor.shape[dim]} {what} and "
                    f"{self.names[name, id(tensors[0])]} has {tensors[0].shape[dim]}; all backends must have the same. "
                    f"{remedy}"
                )
        return tensors[0].shape[dim]

    def one_phase(self, name: str, *, rows_too: bool = False) -> bool:
        """Whether row r of every tensor lies equally far past a 16-byte boundary, for every r.

        Args:
            rows_too: whether all rows must, too: where one tile is written to several.
        """
        tensors = self.tensors[name]
        first = tensors[0]
        if any((t.data_ptr() - first.data_ptr()) % 16 for t in tensors):
            return False
        if rows_too:
            # Even of a single row: the kernel takes the phase of any row for that of all.
            return all(t.stride(0) % 4 == 0 for t in tensors)
        return all((t.stride(0) - first.stride(0)) % 4 == 0 or t.shape[0] == first.shape[0] == 1 for t in tensors)

    def distinct(self) -> tuple[tuple[str, int], ...]:
        """(field, count) of the fields that backends share, for KernelConfig.distinct."""
        return tuple((name, len(t)) for name, t in self.tensors.items() if len(t) < self.count)

    def words(self, name: str) -> list[int]:
        """The parameter words of a field."""
        if FIELDS[name].kind == "schedule":  # contiguous: an address says it all
            return [tensor.data_ptr() for tensor in self.tensors[name]]
        return [word for tensor in self.tensors[name] for word in _tensor_words(tensor)]


def _written(backend: MetadataBuffers, index: int, page_size: int, name_of: NameOf, mode: str) -> dict[str, Tensor]:
    """The fields to write: what is only another name for the same memory is left out."""
    fields = {field.name: tensor for field, tensor in backend.items()}
    for name, tensor in fields.items():
        if not isinstance(tensor, Tensor):
            raise ArgumentError(
                f"{name_of(index, name)} is a {type(tensor).__name__}; it must be a torch.Tensor or None."
            )
    expanded, cache = fields.get("seqlens_expanded"), fields.get("cache_seqlens")
    if mode == "decode" and expanded is not None and cache is not None and _same_memory(expanded, cache):
        del fields["seqlens_expanded"]
    real = fields.get("real_page_table")
    if page_size == 1 and real is not None:
        wide = fields.get("page_indices")
        if wide is None or not _same_memory(real, wide):
            raise ArgumentError(
                f"{name_of(index, 'real_page_table')} is a tensor of its own, but with pages of one token it is the "
                "same table as page_indices; pass None, or the very same tensor."
            )
        del fields["real_page_table"]
    return fields


def _check_schedule(name: str, label: str, tensor: Tensor) -> None:
    words, low, most = (2, 2, MAX_BATCH) if name == "paged_mqa_schedule_metadata" else (8, 1, MAX_SM_PARTS)
    rows = tensor.shape[0]
    if tensor.shape[1] != words or not low <= rows <= most:
        raise ArgumentError(
            f"{label} has shape {tuple(tensor.shape)}; it must be {FIELDS[name].shape}, of {low} to {most} rows."
        )
    if not tensor.is_contiguous():
        raise ArgumentError(f"{label} has strides {tensor.stride()}; a schedule must be contiguous.")


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _tensor_words(tensor: Tensor) -> list[int]:
    return [tensor.data_ptr(), tensor.stride(0)] if tensor.dim() == 2 else [tensor.data_ptr()]


class BoundKernel:
    """A loaded kernel with its constant parameter words set.

    Attributes:
        kernel: the kernel.
        run: run(owner, arguments...): one launch on the device's current stream. Where the arguments (tensors, ints
            and None) aren't those of the last call, owner._check(arguments...) refuses them or returns the words.
        launch: launch(words..., stream): the bare launch, for measurements.
    """

    def __init__(self, config: KernelConfig, device: torch.device, values: dict[str, list[int]]) -> None:
        start = time.perf_counter()
        archs = None
        self.index = 0
        if device.type == "cuda":  # pragma: gpu
            self.index = device.index
            archs = toolchain.architectures(device.index)
        self.kernel = loader.load(config, archs)
        values = {
            "device": [self.index],
            "sm_count": [
                torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
            ],
            **values,
        }
        words = [word for m in layout.members(config) if not m.per_call for word in values[m.name]]
        try:
            # Loads the kernel on the device now: a first launch inside a graph capture couldn't.
            self.kernel.module.prepare(self.index)
        except RuntimeError as error:
            raise LaunchError(
                f"{config.symbol} can't be loaded on {device}: {error}. It was built for "
                f"{', '.join('sm_' + arch for arch in self.kernel.archs) or 'the CPU'}."
            ) from error
        try:
            self.kernel.module.reads(Tensor, torch.dtype, MetadataBuffers, tuple(FIELDS))
        except (AttributeError, RuntimeError) as error:  # no such functions, or of another DLPack
            raise LaunchError(
                f"{config.symbol} can't read the tensors of torch {torch.__version__}: {error}. It needs "
                "torch.Tensor.__dlpack_c_exchange_api__ of DLPack 1: install torch 2.11 or later."
            ) from error
        self._plan = self.kernel.module.bind(words, self.index if device.type == "cuda" else -1)
        self.run, self.launch = _traced(self._plan.run, config.symbol), self._plan.launch
        outcome = "hit" if self.kernel.since < start else "miss"
        mark = "edited by hand" if self.kernel.edited else ""
        log.event("bind", config.symbol, self.kernel.key, outcome, time.perf_counter() - start, f"on {device}", mark)


def _traced(run: Callable[..., None], name: str) -> Callable[..., None]:
    """The call itself; with $ONELAUNCH_NVTX=1 in an NVTX range, which is chosen here and not tested at each call."""
    if os.environ.get(NVTX_VARIABLE, "") in ("", "0"):
        return run
    nvtx: Any = torch.cuda.nvtx  # its functions have no annotations
    push, pop = nvtx.range_push, nvtx.range_pop
    try:
        push(name)
        pop()
    except RuntimeError as error:
        warn_once(f"{NVTX_VARIABLE} is set, but this torch has no NVTX ({error}); there are no ranges.")
        return run

    def ranged(*arguments: Any) -> None:
        push(name)
        try:
            run(*arguments)
        finally:
            pop()

    return ranged


class Plan:
    """N backends' buffers bound to one kernel. Made by bind().

    Attributes:
        config: what the kernel is specialized to.
        kernel: the kernel.
        device: the device of all tensors.
        capacity: the largest batch that fits the destinations.
        row_capacity: the most rows that do; with variable extend lengths the caller keeps their sum within it.
        regions: the memory that it writes.
        launches: kernel launches so far.
    """

    def __init__(
        self, destinations: Destinations, config: KernelConfig, req_to_token: Tensor, columns: int, keep: bool
    ):
        assert destinations.device is not None
        self.config = config
        self.device = destinations.device
        self.capacity, self._narrowest = destinations.capacity, destinations.narrowest
        self.row_capacity = destinations.row_capacity
        if self.row_capacity // config.next_n < self.capacity and config.extend == "uniform":
            self.capacity, self._narrowest = self.row_capacity // config.next_n, destinations.narrowest_rows
        self.launches = 0
        self._columns = columns
        self._limit = columns
        self.regions = destinations.regions
        # The kernel holds bare addresses: the tensors must live as long as the plan.
        self._tensors = (destinations.tensors, req_to_token) if keep else None
        self._seq_lens_dtype = getattr(torch, config.seq_lens_dtype)
        self._pool_dtype = getattr(torch, config.req_pool_indices_dtype)
        self._extend_dtype = getattr(torch, config.extend_seq_lens_dtype)
        self._reads_lengths = config.needs_lengths
        self._gathers = bool(config.tables)
        self._variable = config.extend == "variable"
        self._has_rows = config.mode != "draft_extend" or bool(config.row_fields)
        # Kind, request, value and limit of the first violation, which the kernel of a checked plan writes.
        self._violation = torch.zeros(4, dtype=torch.int64, device=self.device) if config.checked else None
        self._bound = BoundKernel(
            config,
            self.device,
            {
                "req_to_token": [req_to_token.data_ptr()],
                "req_to_token_stride": [req_to_token.stride(0)],
                "req_to_token_width": [req_to_token.shape[1]],
                "pool_rows": [req_to_token.shape[0]],
                "row_capacity": [self.row_capacity],
                "real_page_table_width": [destinations.width("real_page_table") or 0],
                "num_sms": [(destinations.length("paged_mqa_schedule_metadata") or 1) - 1],
                "num_sm_parts": [destinations.length("flashmla_metadata") or 0],
                "kv_indices_capacity": [destinations.length("kv_indices") or 0],
                "violation": [0 if self._violation is None else self._violation.data_ptr()],
                **{name: destinations.words(name) for name in config.fields},
            },
        )
        self.kernel: Kernel = self._bound.kernel
        self._run = self._bound.run

    def run(
        self,
        seq_lens: Tensor,
        req_pool_indices: Tensor,
        extend_seq_lens: Tensor | None = None,
        *,
        max_len: int | None = None,
    ) -> None:
        """Refreshes every backend: one launch on the device's current stream, nothing else. Capturable.

        Args:
            seq_lens: int [bs], of the dtype that the plan was bound for, any stride, bs up to ``capacity``.
            req_pool_indices: int [bs], likewise; rows of req_to_token. The caller vouches for their range.
            extend_seq_lens: int [bs], likewise, the rows of each request, for a plan of variable extend lengths; None
                for any other. The caller vouches that they add up to ``row_capacity`` at most.
            max_len: bound on the columns of this call; None is the bound that bind() was given.

        Raises:
            ArgumentError: a tensor doesn't fit; nothing was written.
            LaunchError: CUDA refused the launch.

        In a function that torch.compile compiles it is called as it is, between two graphs. With ``fullgraph=True``
        that is an error; the functions of api.py go into a graph.
        """
        if is_dynamo_compiling():
            # A graph would know neither the addresses that are written to nor when.
            torch._dynamo.skip_frame(
                msg="Plan.run can't be in a graph. fused_metadata_precompute_and_broadcast_cuda can, see onelaunch.ops."
            )
        try:
            self._run(self, seq_lens, req_pool_indices, extend_seq_lens, max_len)
        except RuntimeError as error:
            raise _refused(self, error) from error
        self.launches += 1

    def admit(
        self,
        seq_lens: Tensor,
        req_pool_indices: Tensor,
        extend_seq_lens: Tensor | None = None,
        *,
        max_len: int | None = None,
    ) -> None:
        """Refuses what run() would refuse, and launches nothing.

        Raises:
            ArgumentError: a tensor doesn't fit.
        """
        self._check(seq_lens, req_pool_indices, extend_seq_lens, max_len)

    def _check(
        self,
        seq_lens: Tensor,
        req_pool_indices: Tensor,
        extend_seq_lens: Tensor | None,
        max_len: int | None,
    ) -> list[int]:
        """The words of a call whose arguments differ from the last one's; the binding asks for them."""
        inputs = [
            ("seq_lens", seq_lens, self._seq_lens_dtype, self._reads_lengths),
            ("req_pool_indices", req_pool_indices, self._pool_dtype, self._gathers),
        ]
        if extend_seq_lens is not None:
            if not self._variable and self._has_rows:
                raise ArgumentError(
                    f"extend_seq_lens is a {type(extend_seq_lens).__name__}; the plan's requests have "
                    f"{self.config.next_n} rows each in {self.config.mode}, so it must be None. Bind with "
                    "mode='draft_extend' and extend='variable'."
                )
            inputs.append(("extend_seq_lens", extend_seq_lens, self._extend_dtype, self._variable))
        elif self._variable:
            raise ArgumentError(
                "extend_seq_lens is None; a plan of variable extend lengths needs them, one a request. "
                "Bind with extend='uniform' for next_n rows a request."
            )
        for name, tensor, dtype, read in inputs:
            unread = not read
            check_tensor(name, tensor, dim=1, dtypes=INT_DTYPES if unread else (dtype,), device=self.device)
            region = Region.of(name, tensor)
            for destination in self.regions:
                if region.overlaps(destination):
                    raise ArgumentError(
                        f"{name} overlaps {destination.name} in memory; the kernel would read what it is writing. "
                        "Pass a copy (note that .to(torch.int32) returns the same tensor if it is int32 already)."
                    )
        batch_size = seq_lens.numel()
        for name, tensor, _, _ in inputs[1:]:
            if tensor.numel() != batch_size:
                raise ArgumentError(
                    f"{name} has {tensor.numel()} elements and seq_lens has {batch_size}; "
                    "they must have the same number."
                )
        if batch_size > self.capacity:
            rows = f" of {self.config.next_n} rows each" if self.config.next_n > 1 else ""
            raise ArgumentError(
                f"seq_lens has {batch_size} requests{rows}; {self._narrowest} has room for {self.capacity}. "
                "Bind larger buffers."
            )
        columns = self._columns
        if max_len is not None:
            columns = check_int("max_len", max_len, 0, self._limit, ", the width of the narrowest table")
        words = []
        if self._reads_lengths:
            words += [seq_lens.data_ptr(), seq_lens.stride(0)]
        if self._variable and extend_seq_lens is not None:
            words += [extend_seq_lens.data_ptr(), extend_seq_lens.stride(0)]
        if self._gathers:
            words += [req_pool_indices.data_ptr(), req_pool_indices.stride(0)]
        words.append(batch_size)
        if self._gathers:
            words.append(columns)
        return words

    def check(self) -> None:
        """Raises what the kernel of a checked plan found wrong in its inputs, and forgets it. Waits for the device.

        The kernel goes on after a violation, but reads and writes nothing out of bounds. Only the first one since the
        last call of this function is told.

        Raises:
            ArgumentError: an input was wrong, or the plan wasn't bound with ``checked=True``.
        """
        if self._violation is None:
            raise ArgumentError("the plan checks nothing on the device; bind it with checked=True.")
        if self.device.type == "cuda":  # pragma: gpu
            torch.cuda.synchronize(self.device)  # whatever stream it was launched on
        kind, request, value, limit = self._violation.tolist()
        if kind:
            self._violation.zero_()
            raise ArgumentError(VIOLATIONS[kind - 1].sentence.format(request=request, value=value, limit=limit))

    def limit_columns(self, max_len: int | None) -> None:
        """Sets the bound that run() uses when it is given none."""
        if max_len is not None:
            self._columns = check_int("max_len", max_len, 0, self._limit, ", the width of the narrowest table")

    def __repr__(self) -> str:
        return f"Plan({self.config.symbol}, device={self.device}, capacity={self.capacity})"


def _refused(plan: Plan | CopyPlan, error: RuntimeError) -> LaunchError:
    return LaunchError(f"{plan.config.symbol} wasn't launched on {plan.device}: {error}.")


def backend_field(index: int, name: str) -> str:
    """How bind() names a destination in a message."""
    return f"backends[{index}].{name}"


def bind(
    backends: Sequence[MetadataBuffers],
    *,
    req_to_token: Tensor,
    mode: str = "decode",
    index_topk: int = 2048,
    page_size: int = 64,
    next_n: int = 1,
    seqlen_offsets: Sequence[int] | None = None,
    extent: str = "live",
    max_len: int | None = None,
    seq_lens_dtype: torch.dtype = torch.int64,
    req_pool_indices_dtype: torch.dtype = torch.int64,
    extend: str = "uniform",
    extend_seq_lens_dtype: torch.dtype = torch.int64,
    index_kpool: int = 1,
    page_fill: int | None = None,
    checked: bool = False,
    schedule_remainder: str = "last",
    schedule_per: str = "request",
    schedule_atoms: int = 0,
    flashmla_order: str = "2026",
) -> Plan:
    """Validates N backends' buffers once and returns a plan whose run() refreshes all of them in one launch.

    The first bind of a new configuration builds its kernel. The plan keeps the tensors alive.

    Args:
        backends: N MetadataBuffers with the same fields. A tensor that several backends share is written once.
            In target_verify and draft_extend the fields with an element a row have R of them, request after request.
        req_to_token: int32 or int64 [pool rows, W], unit inner stride, any row stride.
        mode: "decode", "target_verify" (a request has next_n rows, and next_n tokens more than seq_lens says) or
            "draft_extend" (a request has next_n rows, or as many as run() is told, and seq_lens counts them already).
        index_topk: T, 0 or more.
        page_size: P in tokens, 1 or more; 1 means that real_page_table is page_indices.
        next_n: rows a request has; 1 in decode, and where extend is "variable".
        seqlen_offsets: what each backend's lengths have more than seq_lens, from 0 to 32768, such as (1, 2, 3) for
            three draft steps that each see the tokens of those before; None for no difference. Every backend's tables
            are written up to its own length. Backends of different offsets share a table that all of them have, or
            nothing.
        extent: "live" writes the columns below a request's length and leaves the rest untouched; "full" writes every
            column below max_len.
        max_len: bound on the columns; None is the width of the narrowest table.
        seq_lens_dtype, req_pool_indices_dtype, extend_seq_lens_dtype: torch.int32 or torch.int64, of the tensors that
            run() will get.
        extend: in draft_extend, "uniform" for next_n rows a request, or "variable": run() takes extend_seq_lens.
        index_kpool: k, tokens a pool: only complete pools are clamped at index_topk; of the pooled_* fields.
        page_fill: -1 writes -1 to the dead columns of real_page_table, up to its width; None leaves them untouched.
        checked: whether the kernel checks rows of the pool and lengths, for plan.check() to raise; a debugging aid.
        schedule_remainder: of paged_mqa_schedule_metadata, "last" for the convention that DeepGEMM has from 2026-06 on,
            "first" for the one before.
        schedule_per: whether DeepGEMM gets lengths of "request"s ([bs, n], cache_seqlens) or of "row"s ([R, 1],
            seqlens_expanded) in target_verify and draft_extend.
        schedule_atoms: query atoms a request has there; 0 for ceil(next_n / 2).
        flashmla_order: "2026" or "2025", the order of a row of flashmla_metadata (see reference.flashmla_schedule).

    Raises:
        ArgumentError, ConfigError: an argument doesn't fit; nothing was written or built.
        ToolchainError, CompileError, JitPolicyError, StoreError: see loader.load.
    """
    return make_plan(
        backends,
        req_to_token,
        mode=mode,
        index_topk=index_topk,
        page_size=page_size,
        extent=extent,
        max_len=max_len,
        seq_lens_dtype=seq_lens_dtype,
        req_pool_indices_dtype=req_pool_indices_dtype,
        next_n=next_n,
        extend=extend,
        extend_seq_lens_dtype=extend_seq_lens_dtype,
        seqlen_offsets=seqlen_offsets,
        index_kpool=index_kpool,
        page_fill=page_fill,
        checked=checked,
        schedule_remainder=schedule_remainder,
        schedule_per=schedule_per,
        schedule_atoms=schedule_atoms,
        flashmla_order=flashmla_order,
    )


def make_plan(
    backends: Sequence[MetadataBuffers],
    req_to_token: Tensor,
    *,
    mode: str = "decode",
    index_topk: int = 2048,
    page_size: int = 64,
    extent: str = "live",
    max_len: int | None = None,
    seq_lens_dtype: torch.dtype = torch.int64,
    req_pool_indices_dtype: torch.dtype = torch.int64,
    next_n: int = 1,
    extend: str = "uniform",
    extend_seq_lens_dtype: torch.dtype = torch.int64,
    seqlen_offsets: Sequence[int] | None = None,
    index_kpool: int = 1,
    page_fill: int | None = None,
    checked: bool = False,
    schedule_remainder: str = "last",
    schedule_per: str = "request",
    schedule_atoms: int = 0,
    flashmla_order: str = "2026",
    name_of: NameOf = backend_field,
    topk_name: str = "index_topk",
    page_size_name: str = "page_size",
    keep: bool = True,
    launch_shape: Mapping[str, int] | None = None,
) -> Plan:
    """bind(), with the names that another function's arguments have in messages.

    ``launch_shape`` overrides threads, unroll and blocks_per_sm.
    """
    check_int(topk_name, index_topk, 0, 2**31 - 1)
    check_int(page_size_name, page_size, 1, 2**31 - 1)
    check_int("index_kpool", index_kpool, 1, 2**31 - 1)
    if mode == "decode" or extend == "variable":
        check_int("next_n", next_n, 1, 1, " in decode" if mode == "decode" else " with variable extend lengths")
    else:
        check_int("next_n", next_n, 1, MAX_NEXT_N)
    if extend != "uniform" and mode != "draft_extend":
        raise ArgumentError(f"extend is {extend!r} in {mode}; allowed: 'uniform'. Only draft_extend knows 'variable'.")
    for name, dtype in (
        ("seq_lens_dtype", seq_lens_dtype),
        ("req_pool_indices_dtype", req_pool_indices_dtype),
        ("extend_seq_lens_dtype", extend_seq_lens_dtype),
    ):
        if dtype not in INT_DTYPES:
            raise ArgumentError(f"{name} is {dtype}; allowed: torch.int32, torch.int64.")
    destinations = Destinations(backends, page_size, name_of, mode)
    offsets = _offsets(seqlen_offsets, destinations, name_of)
    check_tensor("req_to_token", req_to_token, dim=2, dtypes=INT_DTYPES, device=destinations.device)
    source = Region.of("req_to_token", req_to_token)
    for region in destinations.regions:
        if region.overlaps(source):
            raise ArgumentError(f"{region.name} overlaps req_to_token in memory; allocate it separately.")
    columns = _column_limit(destinations, req_to_token, page_size, index_kpool)
    wide = "page_indices" in destinations.fields
    several = next_n > 1 or extend == "variable"
    assert destinations.device is not None
    config = KernelConfig.from_dict(
        {
            "mode": mode,
            "num_backends": destinations.count,
            "fields": destinations.fields,
            "distinct": destinations.distinct(),
            "seq_lens_dtype": dtype_name(seq_lens_dtype),
            "req_pool_indices_dtype": dtype_name(req_pool_indices_dtype),
            "req_to_token_dtype": dtype_name(req_to_token.dtype),
            "index_topk": index_topk,
            "page_size": page_size,
            "extent": extent,
            "vector_bytes": 16 if wide and destinations.one_phase("page_indices", rows_too=several) else 4,
            "target": destinations.device.type,
            "next_n": next_n,
            "extend": extend,
            "extend_seq_lens_dtype": dtype_name(extend_seq_lens_dtype),
            "seqlen_offsets": offsets,
            "index_kpool": index_kpool,
            "page_fill": page_fill,
            "checked": checked,
            "schedule_remainder": schedule_remainder,
            "schedule_per": schedule_per,
            "schedule_atoms": schedule_atoms,
            "flashmla_order": flashmla_order,
            **(launch_shape or {}),
        }
    )
    if max_len is not None:
        check_int("max_len", max_len, 0, columns, ", the width of the narrowest table")
    plan = Plan(destinations, config, req_to_token, columns, keep)
    plan.limit_columns(max_len)
    return plan


def _offsets(offsets: Any, destinations: Destinations, name_of: NameOf) -> tuple[int, ...]:
    """One offset a backend, or none."""
    if offsets is None:
        return ()
    if isinstance(offsets, (str, Tensor)) or not isinstance(offsets, Sequence) or len(offsets) != destinations.count:
        raise ArgumentError(
            f"seqlen_offsets is {offsets!r}; it must be None, or one whole number for each of the "
            f"{destinations.count} backends."
        )
    for index, offset in enumerate(offsets):
        check_int(f"seqlen_offsets[{index}]", offset, 0, MAX_SEQLEN_OFFSET)
    if len(set(offsets)) > 1:
        for name, tensors in destinations.tensors.items():
            if len(tensors) < destinations.count and (FIELDS[name].kind != "table" or len(tensors) > 1):
                raise ArgumentError(
                    f"{name_of(0, name)} and the other backends' are {len(tensors)} different tensors, and "
                    f"seqlen_offsets is {tuple(offsets)}; backends of different lengths share a table that all of them "
                    "have, or nothing. Allocate one for each."
                )
    return tuple(offsets)


def _column_limit(destinations: Destinations, req_to_token: Tensor, page_size: int, index_kpool: int) -> int:
    """The number of columns that fit every table."""
    # Each table with the tokens that a column of it stands for; the first one that is there decides.
    tables = [("page_indices", 1), ("real_page_table", page_size), ("pooled_real_page_table", page_size * index_kpool)]
    columns, decided = min(req_to_token.shape[1], MAX_COLUMNS), False
    for table, tokens in tables:
        width = destinations.width(table)
        if width is None:
            continue
        if decided and width < -(-columns // tokens):
            name = destinations.names[table, id(destinations.tensors[table][0])]
            raise ArgumentError(
                f"{name} has {width} columns; {columns} tokens in {'pages' if table == 'real_page_table' else 'pools'} "
                f"of {tokens} need {-(-columns // tokens)}. Allocate a wider table, or narrow the others."
            )
        columns, decided = min(columns, width * tokens), True
    return columns


class CopyPlan:
    """Precomputed fields bound to the destinations that they are copied to.

    Attributes:
        config, kernel, device, capacity, row_capacity, launches: as in Plan.
    """

    def __init__(
        self, precomputed: MetadataBuffers, destinations: Destinations, keep: bool, mode: str = "decode"
    ) -> None:
        assert destinations.device is not None
        self.device = destinations.device
        self.launches = 0
        held: dict[str, list[tuple[int, str]]] = {"request": [], "row": []}
        sources: dict[str, Tensor] = {}
        self._widths: dict[str, int] = {}
        for name in destinations.fields:
            label = f"precomputed.{name}"
            tensor = getattr(precomputed, name)
            if tensor is None:
                raise ArgumentError(
                    f"{label} is None but the destinations have {name}; precompute it, or leave it out of the "
                    "destinations."
                )
            table = FIELDS[name].kind == "table"
            check_destination(label, tensor, dim=FIELDS[name].dim, device=self.device)
            sources[name] = tensor
            per = "request" if mode == "decode" else FIELDS[name].per
            held[per].append((tensor.shape[0] - (FIELDS[name].kind == "cumulative"), label))
            region = Region.of(label, tensor)
            for destination in destinations.regions:
                if region.overlaps(destination):
                    raise ArgumentError(
                        f"{destination.name} overlaps {label} in memory; a copy needs separate tensors."
                    )
            if table:
                width = destinations.width(name)
                assert width is not None
                self._widths[name] = width
        # What the source holds, and what fits on either side.
        self._requests = min(held["request"], default=(0, ""))[0]
        self._rows = min(held["row"], default=(0, ""))[0]
        self.capacity, self._narrowest = min([(destinations.capacity, destinations.narrowest), *held["request"]])
        self.row_capacity, self._narrowest_rows = min(
            [(destinations.row_capacity, destinations.narrowest_rows), *held["row"]]
        )
        self._source_widths = {name: sources[name].shape[1] for name in self._widths}
        self._tensors = (destinations.tensors, sources) if keep else None
        vectorized = bool(self._widths) and all(destinations.one_phase(name) for name in self._widths)
        self.config = KernelConfig.from_dict(
            {
                "operation": "copy",
                "mode": mode,
                "num_backends": destinations.count,
                "fields": destinations.fields,
                "distinct": destinations.distinct(),
                "vector_bytes": 16 if vectorized else 4,
                "target": self.device.type,
            }
        )
        self._bound = BoundKernel(
            self.config,
            self.device,
            {
                **{f"from_{name}": _tensor_words(tensor) for name, tensor in sources.items()},
                **{name: destinations.words(name) for name in self.config.fields},
            },
        )
        self.kernel: Kernel = self._bound.kernel
        self._run = self._bound.run

    def run(
        self,
        *,
        bs: int | None = None,
        max_len: int | None = None,
        page_size: int | None = None,
        rows: int | None = None,
    ) -> None:
        """Copies every field to every destination: one launch on the device's current stream.

        Args:
            bs: requests; None is what the precomputed fields hold.
            max_len: columns of page_indices; None is the source's width.
            page_size: P, to bound real_page_table's columns at ceil(max_len / P); None copies its source's width.
            rows: rows of the fields with an element a row; None is what the precomputed fields hold. In decode ``bs``.

        Raises:
            ArgumentError: a number doesn't fit; nothing was written.
            LaunchError: CUDA refused the launch.
        """
        try:
            self._run(self, bs, max_len, page_size, rows)
        except RuntimeError as error:
            raise _refused(self, error) from error
        self.launches += 1

    def _check(self, bs: int | None, max_len: int | None, page_size: int | None, rows: int | None) -> list[int]:
        """The words of a call whose numbers differ from the last one's; the binding asks for them."""
        if page_size is not None:
            check_int("real_page_size", page_size, 1, 2**31 - 1)
        bs = self._requests if bs is None else check_int("bs", bs, 0, None)
        if bs > self.capacity or bs > MAX_BATCH:
            raise ArgumentError(f"bs is {bs}; {self._narrowest} has room for {self.capacity}. Use larger buffers.")
        if max_len is not None:
            check_int("max_len", max_len, 0, self._source_widths.get("page_indices"), ", the width of page_indices")
        words = [bs]
        if self.config.row_fields:
            rows = self._rows if rows is None else check_int("rows", rows, 0, None)
            if rows > self.row_capacity or rows > MAX_BATCH:
                raise ArgumentError(
                    f"rows is {rows}; {self._narrowest_rows} has room for {self.row_capacity}. Use larger buffers."
                )
            words.append(rows)
        for name, width in self._widths.items():
            columns = self._source_widths[name]
            if max_len is not None:
                if name == "page_indices":
                    columns = max_len
                elif page_size is not None and name == "real_page_table":
                    columns = min(columns, -(-max_len // page_size))
            if columns > width:
                raise ArgumentError(
                    f"{name} has {columns} columns to copy, and a destination has {width}. "
                    "Give wider destinations, or a smaller max_len."
                )
            words.append(columns)
        return words
