"""SGLang: the metadata of its CUDA graphs, refreshed before a replay by one launch for all draft steps.

Supported are DSA (formerly NSA, also with its old names), FA3, TRTLLM-MHA, FlashMLA and TRTLLM-MLA, as multi-step draft
backends (``attn_backends``) or as a single backend that verifies or extends. Objects are known by their attributes.

DSA, draft steps. One launch refreshes all children, in place of one precomputation and the copies::

    from onelaunch.integrations.sglang import Refresher

    # DeepseekSparseAttnMultiStepBackend.__init__, at its end
    self.refresher = Refresher(self)

    # init_forward_metadata_out_graph, in place of what follows `bs = forward_batch.batch_size`
    for child, metadata in self.refresher.run(bs, forward_batch.seq_lens, forward_batch.req_pool_indices):
        child.set_dsa_prefill_impl(forward_batch=None)
        # a view of cache_seqlens_int32, so it is new already
        child._refresh_paged_mqa_schedule_metadata(metadata, metadata.paged_mqa_ctx_lens_2d)
        child._refresh_topk_v2_plan(metadata)
        child.forward_metadata = metadata

With ``Refresher(self, schedules=True)`` the launch writes DeepGEMM's schedules too, and the call of
``_refresh_paged_mqa_schedule_metadata`` goes; on SM100 add ``schedule_remainder="first"``. All other schedules stay
DSA's own, as do the write plan and the schedule of k-pools. ``flashmla_metadata`` of the sparse kernel depends on the
batch size alone, so it stays as the capture left it.

DSA, verification and draft extension. ``forward_mode`` may be SGLang's enumeration or a name of bind()'s modes::

    # DeepseekSparseAttnBackend.__init__, at its end
    self.refresher = Refresher(self)

    # _apply_cuda_graph_metadata, in place of what follows `req_pool_indices = req_pool_indices[:bs]`
    self.refresher.run(bs, seq_lens, req_pool_indices, mode=forward_mode)
    metadata = self.decode_cuda_graph_metadata[bs]
    lengths = self._build_paged_mqa_schedule_2d_ctx_lens(
        forward_mode, metadata.cache_seqlens_int32, metadata.dsa_seqlens_expanded, bs
    )
    self._refresh_paged_mqa_schedule_metadata(metadata, lengths)
    metadata.paged_mqa_ctx_lens_2d.copy_(lengths)  # for a verification on SM100; itself elsewhere
    self._refresh_topk_v2_plan(metadata)
    self.forward_metadata = metadata

Where requests are extended by different numbers of tokens, ``run`` takes them as ``extend_seq_lens``.

FA3, draft steps. Step i sees i + 1 more tokens, still in one launch that reads each token once. ``max_seq_len_k`` of a
metadata object is a number on the host and stays the engine's::

    # FlashAttentionMultiStepBackend.__init__, at its end
    self.refresher = Refresher(self)

    # init_forward_metadata_out_graph, in place of its loop over the children
    for child, metadata in self.refresher.run(bs, forward_batch.seq_lens, forward_batch.req_pool_indices):
        child.forward_metadata = metadata

TRTLLM-MHA records its own kernels in the graph, which would run after a launch outside of it: call ``run`` during the
capture, in their place. FlashMLA and TRTLLM-MLA: call ``run`` where the engine fills ``block_kv_indices``; dead columns
are filled with -1.

What stays the engine's, and is stale if it doesn't refresh it: dense FlashMLA's ``get_mla_metadata`` and its
draft_extend's ``seq_lens_k``, TRTLLM-MLA's ``global_seq_lens_k`` in verification, and of FA3 as a single backend
``scheduler_metadata`` in decode and ``cu_seqlens_q`` where extend lengths differ.

The kernel is the same for all batch sizes. ``Refresher.prepare`` makes the plan of one batch size, best right after its
capture, so that nothing is built or loaded while serving.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..run.plan import Plan, bind
from ..spec.fields import MetadataBuffers
from .attributes import REQUIRED, described, has, read

_Names = dict[str, tuple[str, ...]]

# Names of the attribute that is each field, newest first; ? marks a field whose attribute may be missing.
_DSA: _Names = {
    "cache_seqlens": ("cache_seqlens_int32", "cache_seqlens"),
    "cu_seqlens_k": ("cu_seqlens_k",),
    "page_indices": ("page_table_1", "page_indices"),
    "nsa_cache_seqlens": (
        "dsa_cache_seqlens_int32",
        "nsa_cache_seqlens_int32",
        "dsa_cache_seqlens",
        "nsa_cache_seqlens",
    ),
    "nsa_cu_seqlens_k": ("dsa_cu_seqlens_k", "nsa_cu_seqlens_k"),
    "real_page_table": ("real_page_table",),
    "seqlens_expanded": ("dsa_seqlens_expanded", "nsa_seqlens_expanded", "seqlens_expanded"),
    "pooled_cache_seqlens?": ("pooled_cache_seqlens_int32",),
    "pooled_real_page_table?": ("pooled_real_page_table",),
}
_MHA: _Names = {
    "cache_seqlens": ("cache_seqlens_int32",),
    "cu_seqlens_k?": ("cu_seqlens_k",),
    "real_page_table": ("page_table",),
}
_MLA: _Names = {"cache_seqlens?": ("seq_lens_k",), "real_page_table": ("block_kv_indices",)}

# Tensors that onelaunch has no field for: the engine must refresh them, or they are stale.
_FOREIGN = ("swa_page_table", "local_attn_metadata", "encoder_page_table")

_STEPS = ("attn_backends",)
_GRAPHS = {
    "decode": "decode_cuda_graph_metadata",
    "target_verify": "target_verify_metadata",
    "draft_extend": "draft_extend_metadata",
}
_TABLE = "cuda_graph_kv_indices"  # FlashMLA's, [max_bs, blocks]
_SCHEDULE = "paged_mqa_schedule_metadata"
_VERSION = "onelaunch doesn't know this version of the engine: fill a MetadataBuffers and call onelaunch.bind."


def buffers_from(
    metadata: Any, *, page_size: int = 64, leave: Collection[str] = (), schedules: bool = False
) -> MetadataBuffers:
    """The tensors of one of SGLang's metadata objects, under onelaunch's names.

    Args:
        metadata: DSAMetadata or NSAMetadata, or their precomputed form; FlashAttentionMetadata; TRTLLMMHAMetadata;
            FlashMLADecodeMetadata or TRTLLMMLADecodeMetadata. An attribute that is None is a field that is None.
        page_size: tokens a page. With 1, FA3's page_table holds tokens: it is page_indices.
        leave: names of tensors that onelaunch has no field for and that the engine refreshes itself.
        schedules: whether DSA's paged_mqa_schedule_metadata is refreshed too, if there is one.

    Raises:
        ArgumentError: the object lacks an attribute, or has a tensor that onelaunch can't refresh.
    """
    names = _names(metadata)
    for name in _FOREIGN:
        if getattr(metadata, name, None) is not None and name not in leave:
            raise ArgumentError(
                f"metadata.{name} is set, and onelaunch has no such field: it would be stale. Refresh it with the "
                f"engine's own code, and pass leave=({name!r},)."
            )
    found = {}
    for field, aliases in names.items():
        optional: dict[str, Any] = {"default": None} if field.endswith("?") else {}
        found[field.rstrip("?")] = read("metadata", metadata, aliases, _VERSION, **optional)
    if names is _MHA and page_size == 1:
        found["page_indices"] = found.pop("real_page_table")
    if schedules and names is _DSA:
        found[_SCHEDULE] = getattr(metadata, _SCHEDULE, None)
    return MetadataBuffers(**found)


def _names(metadata: Any) -> _Names:
    """The attribute names of a metadata object's family."""
    for names, marks in (
        (_DSA, _DSA["nsa_cache_seqlens"]),
        (_MLA, _MLA["real_page_table"]),
        (_MHA, _MHA["real_page_table"]),
    ):
        if has(metadata, marks):
            return names
    looked = [mark for names in (_DSA["nsa_cache_seqlens"], ("block_kv_indices", "page_table")) for mark in names]
    raise ArgumentError(f"metadata has no attribute {' or '.join(looked)}; it is {described(metadata)}. {_VERSION}")


def mode_of(forward_mode: Any) -> str:
    """The name that bind() has for a forward mode.

    Args:
        forward_mode: SGLang's ForwardMode, or bind()'s name, which is returned.

    Raises:
        ArgumentError: it is another mode, such as EXTEND.
    """
    if isinstance(forward_mode, str):
        if forward_mode not in _GRAPHS:
            raise ArgumentError(f"mode is {forward_mode!r}; allowed: {', '.join(map(repr, _GRAPHS))}.")
        return forward_mode
    for question, mode in (
        ("is_decode_or_idle", "decode"),
        ("is_target_verify", "target_verify"),
        ("is_draft_extend_v2", "draft_extend"),
        ("is_draft_extend", "draft_extend"),
    ):
        if hasattr(forward_mode, question) and getattr(forward_mode, question)():
            return mode
    raise ArgumentError(
        f"mode is {forward_mode!r} of type {type(forward_mode).__name__}; allowed: SGLang's decode, target_verify and "
        "draft_extend modes, or their names."
    )


class _Captured(NamedTuple):
    """What one child captured for a batch size.

    Attributes:
        child: the backend.
        attribute: its attribute with the captures.
        held: the value there: the metadata object, or FlashMLA's whole table.
        metadata: the object that has the tensors.
    """

    child: Any
    attribute: str
    held: Any
    metadata: Any

    def current(self, bs: int) -> bool:
        """Whether the child still holds that capture."""
        value = getattr(self.child, self.attribute)
        return (value.get(bs) if isinstance(value, Mapping) else value) is self.held


def _captured(backend: Any, bs: int, mode: str) -> list[_Captured]:
    """The children that captured a batch size. SGLang's last child often captures nothing; it isn't used."""
    several = has(backend, _STEPS)
    children = read("backend", backend, _STEPS, _VERSION) if several else [backend]
    if not isinstance(children, Sequence):
        raise ArgumentError(f"backend.attn_backends is a {type(children).__name__}; it must be a list. {_VERSION}")
    found: list[_Captured] = []
    missing = ""
    for index, child in enumerate(children):
        label = f"backend.attn_backends[{index}]" if several else "backend"
        table = getattr(child, _TABLE, None)
        if isinstance(table, Tensor) and table.dim() == 2:
            found.append(_Captured(child, _TABLE, table, _FlashMLATable(table[:bs])))
            continue
        # DSA and TRTLLM-MLA keep the captures of all modes in one dictionary, the others in one for each mode.
        apart = has(child, (_GRAPHS["target_verify"], _GRAPHS["draft_extend"]))
        attribute = _GRAPHS[mode if apart else "decode"]
        graphs = read(label, child, (attribute,), _VERSION, {} if found else REQUIRED)
        if isinstance(graphs, Mapping) and bs in graphs:
            if missing:
                raise ArgumentError(f"{missing} But {label} has it: capture all steps, in order.")
            found.append(_Captured(child, attribute, graphs[bs], graphs[bs]))
        elif not missing:
            sizes = sorted(size for size in graphs if isinstance(size, int)) if isinstance(graphs, Mapping) else []
            missing = (
                f"bs is {bs}, and {label}.{attribute} has {', '.join(map(str, sizes)) or 'no batch size'}: there is no "
                f"{mode} graph of it. Capture first."
            )
    if not found:
        raise ArgumentError(missing or "backend.attn_backends is empty; there is nothing to refresh.")
    return found


class _FlashMLATable(NamedTuple):
    """FlashMLA has no metadata object for a batch size, only the table."""

    block_kv_indices: Tensor


def bind_backends(
    backend: Any,
    bs: int,
    req_to_token: Tensor | None = None,
    *,
    mode: Any = "decode",
    leave: Collection[str] = (),
    schedules: bool = False,
    **settings: Any,
) -> Plan:
    """Binds what an SGLang backend captured for a batch size: all children of a multi-step one, or itself.

    Unless ``settings`` give them, these are read from the children: page_size, index_topk, index_kpool, next_n (the
    number of draft tokens) and, for FA3 and TRTLLM-MHA, the offsets of the steps. The tables of all but DSA have a row
    for each request in every mode, so there target_verify is decode with lengths that are next_n longer.

    Args:
        backend: a multi-step backend with ``attn_backends``, or a single backend.
        bs: a batch size that it captured.
        req_to_token: int32 [pool rows, W]; None is the children's own.
        mode: SGLang's ForwardMode or a name of bind()'s modes.
        leave: see buffers_from.
        schedules: whether to refresh DSA's paged_mqa_schedule_metadata, as DeepGEMM's own function does. In
            target_verify and draft_extend it has an item for each row if the captured paged_mqa_ctx_lens_2d has one
            column; otherwise for each request, and schedule_atoms must be given.
        settings: arguments of onelaunch.bind, in place of what the children say. page_fill is -1 for block_kv_indices.

    Raises:
        ArgumentError: an attribute is missing, or nothing was captured for ``bs``; and see onelaunch.bind.
    """
    mode = mode_of(mode)
    return _bind(_captured(backend, bs, mode), has(backend, _STEPS), req_to_token, mode, leave, schedules, settings)


def _bind(
    captured: list[_Captured],
    steps: bool,
    req_to_token: Tensor | None,
    mode: str,
    leave: Collection[str],
    schedules: bool,
    settings: Mapping[str, Any],
) -> Plan:
    child = captured[0].child
    names = _names(captured[0].metadata)
    given = dict(settings)

    def setting(name: str, attributes: tuple[str, ...], **default: Any) -> Any:
        if name not in given:
            given[name] = read("the backend", child, attributes, f"Pass {name}=.", **default)
        return given[name]

    if req_to_token is None:
        req_to_token = read("the backend", child, ("req_to_token",), "Pass req_to_token=.")
        assert req_to_token is not None
    branches = getattr(child, "topk", None) or 1
    if (steps or mode != "decode") and branches > 1:
        raise ArgumentError(
            f"the backend's topk is {branches}; allowed: 0 and 1. A draft tree has rows for each branch, which "
            "onelaunch doesn't support."
        )
    block_size = {"default": 64} if names is _MLA else {}
    page_size = setting("page_size", ("physical_page_size", "real_page_size", "page_size"), **block_size)
    if mode == "decode" or given.get("extend") == "variable":
        given.pop("next_n", None)
    else:
        setting("next_n", ("speculative_num_draft_tokens", "num_draft_tokens"))
    if names is _DSA:
        setting("index_topk", ("dsa_index_topk", "nsa_index_topk"))
        setting("index_kpool", ("dsa_index_kpool", "nsa_index_kpool"), default=1)
        given["mode"] = mode
        if schedules and getattr(captured[0].metadata, _SCHEDULE, None) is not None:
            _schedule_settings(captured[0].metadata, given)
    else:
        added = given.pop("next_n", 0)
        for name in ("extend", "extend_seq_lens_dtype"):  # one row for each request, whatever its extend length
            given.pop(name, None)
        if mode == "target_verify":
            given.setdefault("seqlen_offsets", [added] * len(captured))
        elif mode == "decode" and steps and names is _MHA:
            given.setdefault(
                "seqlen_offsets",
                [1 + read("the backend", c.child, ("speculative_step_id",), "Pass seqlen_offsets=.") for c in captured],
            )
        if names is _MLA:
            given.setdefault("page_fill", -1)
    buffers = [buffers_from(c.metadata, page_size=page_size, leave=leave, schedules=schedules) for c in captured]
    return bind(buffers, req_to_token=req_to_token, **given)


def _schedule_settings(metadata: Any, given: dict[str, Any]) -> None:
    """Sets schedule_per from the shape of the lengths that DeepGEMM gets."""
    if given["index_kpool"] > 1:
        raise ArgumentError(
            f"schedules is True and index_kpool is {given['index_kpool']}; DSA keeps a schedule of pools apart, which "
            "onelaunch doesn't support. Leave the schedules to the engine."
        )
    if given["mode"] == "decode" or "schedule_per" in given:
        return
    lengths = read("metadata", metadata, ("paged_mqa_ctx_lens_2d",), "Pass schedule_per=.")
    if not isinstance(lengths, Tensor) or lengths.dim() != 2:
        raise ArgumentError(
            "metadata.paged_mqa_ctx_lens_2d isn't a 2-D tensor, so its rows are unknown. Pass schedule_per=."
        )
    given["schedule_per"] = "row" if lengths.shape[1] == 1 else "request"
    if lengths.shape[1] > 1 and "schedule_atoms" not in given:
        raise ArgumentError(
            f"metadata.paged_mqa_ctx_lens_2d has shape {tuple(lengths.shape)}, several rows for each request; their "
            "number of atoms is up to DeepGEMM. Pass schedule_atoms=, or leave the schedules to the engine."
        )


class _Bound(NamedTuple):
    plan: Plan
    captured: list[_Captured]
    pairs: list[tuple[Any, Any]]


class Refresher:
    """Refreshes an SGLang backend's captured metadata, with a plan for each captured batch size and mode.

    A plan is made at the first call for its batch size, or by prepare(); after that a call is one launch. A batch size
    that was captured again, into other objects, gets a new plan.

    Args:
        backend, req_to_token, leave, schedules, settings: see bind_backends.
    """

    def __init__(
        self,
        backend: Any,
        req_to_token: Tensor | None = None,
        *,
        leave: Collection[str] = (),
        schedules: bool = False,
        **settings: Any,
    ) -> None:
        self._backend, self._pool, self._leave, self._schedules = backend, req_to_token, leave, schedules
        self._settings = settings
        self._bound: dict[tuple[Any, ...], _Bound] = {}

    @property
    def plans(self) -> dict[tuple[Any, ...], Plan]:
        """The plans by (batch size, mode, dtypes of seq_lens, req_pool_indices and extend_seq_lens or None)."""
        return {key: bound.plan for key, bound in self._bound.items()}

    def prepare(
        self,
        bs: int,
        *,
        mode: Any = "decode",
        seq_lens_dtype: torch.dtype = torch.int64,
        req_pool_indices_dtype: torch.dtype = torch.int64,
        extend_seq_lens_dtype: torch.dtype | None = None,
    ) -> Plan:
        """The plan of a captured batch size, made now if there is none. Must not be called inside a capture.

        The dtypes are those of run()'s tensors; extend_seq_lens_dtype is None where run() gets no extend_seq_lens.

        Raises:
            ArgumentError: see bind_backends.
        """
        key = (bs, mode_of(mode), seq_lens_dtype, req_pool_indices_dtype, extend_seq_lens_dtype)
        return self._prepared(key).plan

    def run(
        self,
        bs: int,
        seq_lens: Tensor,
        req_pool_indices: Tensor,
        extend_seq_lens: Tensor | None = None,
        *,
        mode: Any = "decode",
    ) -> list[tuple[Any, Any]]:
        """Refreshes all metadata captured for a batch size: one launch on the current stream.

        Args:
            bs: the captured batch size.
            seq_lens, req_pool_indices: int32 or int64, bs elements or more, of which the first bs are read.
            extend_seq_lens: likewise, the number of tokens that draft_extend extends each request by; None if it is
                next_n for all. The caller guarantees that the captured tensors have room for their sum.
            mode: SGLang's ForwardMode or a name of bind()'s modes.

        Returns:
            Each child with its metadata, for the engine's own work on it. FlashMLA's is its table alone.

        Raises:
            ArgumentError: see bind_backends and Plan.run; nothing was written.
            LaunchError: CUDA refused the launch.
        """
        tensors = {"seq_lens": seq_lens, "req_pool_indices": req_pool_indices}
        if extend_seq_lens is not None:
            tensors["extend_seq_lens"] = extend_seq_lens
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or tensor.dim() != 1 or len(tensor) < bs:
                shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ArgumentError(f"{name} is {shape} and bs is {bs}; it must be a tensor of {bs} elements or more.")
        extend_dtype = None if extend_seq_lens is None else extend_seq_lens.dtype
        bound = self._prepared((bs, mode_of(mode), seq_lens.dtype, req_pool_indices.dtype, extend_dtype))
        variable = bound.plan.config.extend == "variable"
        bound.plan.run(
            seq_lens if len(seq_lens) == bs else seq_lens[:bs],
            req_pool_indices if len(req_pool_indices) == bs else req_pool_indices[:bs],
            extend_seq_lens[:bs] if extend_seq_lens is not None and variable else None,
        )
        return bound.pairs

    def _prepared(self, key: tuple[Any, ...]) -> _Bound:
        bs, mode, seq_lens_dtype, pool_dtype, extend_dtype = key
        bound = self._bound.get(key)
        if bound is None or not all(captured.current(bs) for captured in bound.captured):
            captured = _captured(self._backend, bs, mode)
            settings = {**self._settings, "seq_lens_dtype": seq_lens_dtype, "req_pool_indices_dtype": pool_dtype}
            if extend_dtype is not None:
                if mode != "draft_extend":
                    raise ArgumentError(
                        f"extend_seq_lens is a tensor and mode is {mode!r}; they are for 'draft_extend'."
                    )
                settings |= {"extend": "variable", "extend_seq_lens_dtype": extend_dtype}
            several = has(self._backend, _STEPS)
            plan = _bind(captured, several, self._pool, mode, self._leave, self._schedules, settings)
            bound = self._bound[key] = _Bound(plan, captured, [(c.child, c.metadata) for c in captured])
        return bound
