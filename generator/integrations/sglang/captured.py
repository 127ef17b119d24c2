"""Finds the metadata that an SGLang backend captured, and the tensors in it, by attribute names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ...errors import ArgumentError
from ...spec.fields import MetadataBuffers
from ..attributes import REQUIRED, described, has, read

Names = dict[str, tuple[str, ...]]

# The attribute names of each field, newest first. A ? marks a field that an object may lack.
DSA: Names = {
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
MHA: Names = {
    "cache_seqlens": ("cache_seqlens_int32",),
    "cu_seqlens_k?": ("cu_seqlens_k",),
    "real_page_table": ("page_table",),
}
MLA: Names = {"cache_seqlens?": ("seq_lens_k",), "real_page_table": ("block_kv_indices",)}

WIDE_TABLE = "page_table_1"
SCHEDULE = "paged_mqa_schedule_metadata"
STEPS = ("attn_backends",)
# The plan input with the number of tokens that draft_extend extends each request by.
EXTENDED = "extended"
VERSION = "onelaunch doesn't know this version of the engine: fill a MetadataBuffers and call onelaunch.bind."

# onelaunch has no fields for these tensors; unless refused, they would silently become stale.
_FOREIGN = (
    "swa_page_table",
    "swa_out_cache_loc",
    "local_attn_metadata",
    "encoder_page_table",
    "scheduler_metadata",
)
_GRAPHS = {
    "decode": "decode_cuda_graph_metadata",
    "target_verify": "target_verify_metadata",
    "draft_extend": "draft_extend_metadata",
}
_FLASHMLA_TABLE = "cuda_graph_kv_indices"
_FLASHMLA_LENGTHS = "cuda_graph_draft_extend_seq_lens_k"


def buffers_from(
    metadata: Any, *, page_size: int = 64, leave: Collection[str] = (), schedules: bool = False
) -> MetadataBuffers:
    """The tensors of one of SGLang's metadata objects, by onelaunch's names.

    Args:
        metadata: DSAMetadata or NSAMetadata, or their precomputed form; FlashAttentionMetadata; TRTLLMMHAMetadata;
            FlashMLADecodeMetadata or TRTLLMMLADecodeMetadata. If an attribute is None, so is its field.
        page_size: tokens per page. With 1, FA3's page_table holds tokens and becomes the field page_indices.
        leave: names of tensors to leave out: "page_table_1" of DSA (see attach), and tensors without a field in
            onelaunch, which the engine's own code refreshes.
        schedules: whether to include DSA's paged_mqa_schedule_metadata, if there is one.

    Raises:
        ArgumentError: the object lacks an attribute, or has a tensor that onelaunch can't refresh.
    """
    names = family_of(metadata)
    for name in _FOREIGN:
        if getattr(metadata, name, None) is not None and name not in leave:
            raise ArgumentError(
                f"metadata.{name} is set, and onelaunch has no such field, so it would become stale. Refresh it with "
                f"the engine's own code, and pass leave=({name!r},)."
            )
    found = {}
    for field, aliases in names.items():
        optional: dict[str, Any] = {"default": None} if field.endswith("?") else {}
        found[field.rstrip("?")] = read("metadata", metadata, aliases, VERSION, **optional)
    if names is MHA and page_size == 1:
        found["page_indices"] = found.pop("real_page_table")
    if names is DSA and WIDE_TABLE in leave:
        if page_size == 1:
            raise ArgumentError(
                "leave has 'page_table_1', which is the only table if pages have one token. Remove it from leave."
            )
        found["page_indices"] = None
    if schedules and names is DSA:
        found[SCHEDULE] = getattr(metadata, SCHEDULE, None)
    return MetadataBuffers(**found)


def family_of(metadata: Any) -> Names:
    """The attribute names of a metadata object's family: DSA, MHA or MLA."""
    for names, marks in (
        (DSA, DSA["nsa_cache_seqlens"]),
        (MLA, MLA["real_page_table"]),
        (MHA, MHA["real_page_table"]),
    ):
        if has(metadata, marks):
            return names
    marks = (*DSA["nsa_cache_seqlens"], *MLA["real_page_table"], *MHA["real_page_table"])
    raise ArgumentError(f"metadata has no attribute {' or '.join(marks)}; it is {described(metadata)}. {VERSION}")


def mode_of(forward_mode: Any) -> str:
    """bind()'s name for a forward mode: SGLang's ForwardMode, or a name, which is returned unchanged.

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


class FlashMLATable(NamedTuple):
    """What FlashMLA's graphs read: views of whole buffers, because it keeps no metadata object per batch size.

    Attributes:
        block_kv_indices: the table, int32 [bs, blocks].
        seq_lens_k: the lengths in a draft extension, int32 [bs]; None in other modes.
    """

    block_kv_indices: Tensor
    seq_lens_k: Tensor | None


class Captured(NamedTuple):
    """One child and what it captured for a batch size.

    Attributes:
        child: the backend.
        attribute: the attribute in which it keeps its captures.
        held: the value that it keeps there: the metadata object, or FlashMLA's whole table.
        metadata: the object that has the tensors.
    """

    child: Any
    attribute: str
    held: Any
    metadata: Any

    def current(self, bs: int) -> bool:
        """Whether the child still holds that capture."""
        kept = getattr(self.child, self.attribute)
        return (kept.get(bs) if isinstance(kept, Mapping) else kept) is self.held


def captured_for(backend: Any, bs: int, mode: str) -> list[Captured]:
    """The children that captured a batch size. In older versions the last child is unused and captures nothing.

    Raises:
        ArgumentError: no child captured it, or a child captured it but an earlier one didn't.
    """
    several = has(backend, STEPS)
    children = list(read("backend", backend, STEPS, VERSION)) if several else [backend]
    found: list[Captured] = []
    missing = ""
    for index, child in enumerate(children):
        label = f"backend.attn_backends[{index}]" if several else "backend"
        table = getattr(child, _FLASHMLA_TABLE, None)
        if isinstance(table, Tensor) and table.dim() == 2:
            found.append(Captured(child, _FLASHMLA_TABLE, table, _flashmla_table(child, table, bs, mode)))
            continue
        # DSA and TRTLLM-MLA keep all modes' captures in one attribute; the others have one per mode.
        apart = has(child, (_GRAPHS["target_verify"], _GRAPHS["draft_extend"]))
        attribute = _GRAPHS[mode if apart else "decode"]
        graphs = read(label, child, (attribute,), VERSION, {} if found else REQUIRED)
        if isinstance(graphs, Mapping) and bs in graphs:
            if missing:
                raise ArgumentError(f"{missing} But {label} has it: capture all steps, in order.")
            found.append(Captured(child, attribute, graphs[bs], graphs[bs]))
        elif not missing:
            sizes = sorted(size for size in graphs if isinstance(size, int)) if isinstance(graphs, Mapping) else []
            missing = (
                f"bs is {bs}, and {label}.{attribute} has {', '.join(map(str, sizes)) or 'no batch size'}: there is no "
                f"{mode} graph of it. Capture first."
            )
    if not found:
        raise ArgumentError(missing or "backend.attn_backends is empty; there is nothing to refresh.")
    return found


def _flashmla_table(child: Any, table: Tensor, bs: int, mode: str) -> FlashMLATable:
    lengths = getattr(child, _FLASHMLA_LENGTHS, None) if mode == "draft_extend" else None
    return FlashMLATable(table[:bs], None if lengths is None else lengths[:bs])
