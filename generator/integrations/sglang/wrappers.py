"""FlashInfer's wrappers in SGLang: one launch refreshes their lists, and plans use the host's lengths.

FlashInfer plans on the host, and copies lists that it is given on the device to the host, which waits. SGLang has a
batch's lengths on the host too (``seq_lens_cpu``), and its fast_decode_plan and fast_prefill_plan accept host values.
Here they get all of them, so nothing waits, and the wrapper's own lists, so nothing is copied on the device.

The mask of a verification is the engine's, for any draft tree. FlashInfer's own kernel packs it from the engine's
tensor straight into the buffer that attention reads. The launch writes where each request's bits and bytes begin.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from ...errors import ArgumentError
from ...run.bind import bind
from ...run.declared import into
from ...run.plan import Plan
from ...spec.fields import MetadataBuffers, packed, running_sum
from ..attributes import merged, read
from ..flashinfer import plan_inputs
from .captured import VERSION

# Where a FlashInferAttnBackend keeps the wrappers of its graphs.
_GRAPHS = {
    "decode": "decode_cuda_graph_metadata",
    "target_verify": "prefill_cuda_graph_metadata",
    "draft_extend": "draft_extend_cuda_graph_metadata",
}
_SPEC_TYPES = {"target_verify": "EAGLE_VERIFY", "draft_extend": "EAGLE_DRAFT_EXTEND"}
_DECODE_PLAN, _PREFILL_PLAN = "fast_decode_plan", "fast_prefill_plan"
_PACKING, _MODULE = "flashinfer.quantization.packbits", "get_quantization_module"


def has_wrappers(backend: Any) -> bool:
    """Whether a backend, or a multi-step backend's children, are FlashInferAttnBackends (not FlashInfer's MLA ones)."""
    return hasattr(next(iter(getattr(backend, "attn_backends", [backend]))), "kv_last_page_len")


def wrappers_refusal(backend: Any) -> str:
    """Why a FlashInferAttnBackend isn't served: the attribute and its meaning; "" if it is served."""
    if getattr(backend, "dispatch_reason", None) is not None:
        return "dispatch_reason is set: sliding windows or an encoder have wrappers of their own"
    if getattr(backend, "prefill_backend", "fa2") != "fa2":
        return f"prefill_backend is {backend.prefill_backend!r}: {_PREFILL_PLAN} is fa2's"
    return ""


def host_lengths(backend: Any, batch: Any, mode: str) -> tuple[Tensor, ...] | None:
    """(): no further inputs. None if the host lacks what a plan needs, or the batch isn't EAGLE's as captured."""
    if getattr(batch, "seq_lens_cpu", None) is None:
        return None
    if mode == "decode":
        return ()
    spec_info = batch.spec_info
    (wrapper,) = getattr(backend, _GRAPHS[mode])[batch.batch_size]
    mask = getattr(spec_info, "custom_mask", None)
    same = (
        spec_info.spec_input_type.name == _SPEC_TYPES[mode]
        and spec_info.num_tokens_per_req * batch.batch_size == wrapper._max_total_num_rows
        and (mask is None) == (wrapper._custom_mask_buf is None)
        and (mask is None or (mask.dtype == torch.bool and mask.is_contiguous()))
    )
    return () if same else None


def plan_on_the_host(pairs: list[tuple[Any, Any]], batch: Any, mode: str, schedules: bool) -> None:
    """Makes FlashInfer's plans of all wrappers, after their lists were refreshed."""
    for _, wrapper in pairs:
        wrapper.plan(batch)


class Wrapper:
    """FlashInfer's wrapper for a captured batch size.

    Args:
        child: the FlashInferAttnBackend that has it.
        bs: the batch size.
        mode: the name of its mode.
        step: the child's index in a multi-step backend; None for a single backend.

    Raises:
        ArgumentError: nothing was captured for bs, or an attribute is missing.
    """

    def __init__(self, child: Any, bs: int, mode: str, step: int | None = None) -> None:
        graphs = read("the backend", child, (_GRAPHS[mode],), VERSION)
        if bs not in graphs:
            raise ArgumentError(
                f"bs is {bs}, and {type(child).__name__}.{_GRAPHS[mode]} has "
                f"{', '.join(map(str, graphs)) or 'no batch size'}: there is no {mode} graph of it. Capture first."
            )
        (self._wrapper,) = graphs[bs]
        self._bs, self._mode = bs, mode
        decode = mode == "decode"
        updater = child.indices_updater_decode if decode else child.indices_updater_prefill
        self.lists: Any = plan_inputs(self._wrapper)
        self._shape = updater.num_qo_heads, updater.num_kv_heads, updater.head_dim, 1
        self._settings: dict[str, Any] = {"q_data_type": updater.q_data_type, "non_blocking": True}
        self.tokens = 1 if decode else read("the wrapper", self._wrapper, ("_max_total_num_rows",), VERSION) // bs
        # A request's tokens beyond those of seq_lens_cpu.
        self._added = self.tokens if mode == "target_verify" else 0 if step is None else step + 1
        self._packed: Any = None if decode else self._wrapper._custom_mask_buf
        if decode:
            self._settings |= {"data_type": updater.data_type, "disable_split_kv": child.disable_cuda_graph_kv_split}
            if getattr(getattr(self._wrapper.begin_forward, "func", None), "__name__", "") != _DECODE_PLAN:
                raise ArgumentError(f"the wrapper's begin_forward isn't {_DECODE_PLAN}. {VERSION}")
        else:
            self._settings |= {"kv_data_type": updater.data_type, "custom_mask": None}
            engine = sys.modules[type(updater).__module__]
            self._plan = read(engine.__name__, engine, (_PREFILL_PLAN,), VERSION)
            if self._wrapper._backend != "fa2":
                raise ArgumentError(f"the wrapper's backend is {self._wrapper._backend!r}; allowed: 'fa2'. {VERSION}")
        if self._packed is not None:
            self._bits = torch.zeros(bs + 1, dtype=torch.int32, device=self._packed.device)
            packing = sys.modules.get(_PACKING)
            self._segments = read(_PACKING, packing, (_MODULE,), VERSION)().segment_packbits
        self._on_host()

    def _on_host(self) -> None:
        """Makes the host tensors that plans read. A plan has finished reading them when it returns."""
        self._lengths = torch.zeros(self._bs, dtype=torch.int32, device="cpu")
        self._indptr = torch.zeros(self._bs + 1, dtype=torch.int32, device="cpu")
        self._sums = self._indptr[1:]
        self._starts = torch.arange(self._bs + 1, dtype=torch.int32, device="cpu") * self.tokens
        # A plan copies to the device from pinned memory that the next plan overwrites: marks the end of that copy.
        self._copied: Any = torch.cuda.Event() if self._wrapper.device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def bind(self, source: Tensor, added: int, settings: dict[str, Any]) -> Plan:
        """Binds its lists to one launch.

        Args:
            source: req_to_token.
            added: how many tokens an extension adds to run()'s lengths: 0, or the draft tokens. A verification always
                adds the draft tokens.
            settings: arguments of onelaunch.bind.

        Raises:
            ArgumentError: see onelaunch.bind.
        """
        declare: dict[str, Any] = {}
        if self._mode != "decode":
            declare["qo_indptr"] = into(running_sum("draft_tokens"), self.lists.qo_indptr)
        if self._packed is not None:
            mask = "draft_tokens * (base_len + draft_tokens)"
            declare["mask_indptr"] = into(running_sum(mask), self._bits)
            declare["packed_mask_indptr"] = into(running_sum(f"ceil_div({mask}, 8)"), self._wrapper._mask_indptr_buf)
        buffers = MetadataBuffers(kv_indptr=self.lists.kv_indptr, kv_indices=self.lists.kv_indices)
        if added:  # run()'s lengths of padding requests may be below 0, and these aren't
            declare["extended_indptr"] = into(running_sum("max(base_len + draft_tokens, 0)"), self.lists.kv_indptr)
            declare["extended_indices"] = into(packed("token(column)", at="extended_indptr"), self.lists.kv_indices)
            buffers = MetadataBuffers()
        return bind(
            [buffers],
            req_to_token=source,
            seqlen_offsets=[self.tokens] if self._mode == "target_verify" else None,
            **merged(settings, {"declare": declare, "constants": {"draft_tokens": self.tokens}}),
        )

    def plan(self, batch: Any) -> None:
        """Makes FlashInfer's plan from the batch's lengths on the host, without a copy of its own.

        It waits only for the copy of the previous plan, which is usually over.

        Args:
            batch: SGLang's ForwardBatch, as backends get it before a replay.

        Raises:
            ArgumentError: its tokens, or its mask, don't fit.
        """
        lengths = torch.add(batch.seq_lens_cpu[: self._bs], self._added, out=self._lengths)
        torch.cumsum(lengths, 0, dtype=torch.int32, out=self._sums)
        values = lengths.tolist()
        total = sum(values)
        if total > len(self.lists.kv_indices):
            raise ArgumentError(
                f"the batch has {total} tokens, and kv_indices has room for {len(self.lists.kv_indices)}."
            )
        if self._copied is not None and not self._copied.query():  # pragma: gpu
            self._copied.synchronize()
        lists = self._wrapper._paged_kv_indptr_buf, self.lists.kv_indices, self._wrapper._paged_kv_last_page_len_buf
        if self._mode == "decode":
            self._wrapper.begin_forward(*lists, *self._shape, global_override_indptr_cpu=self._indptr, **self._settings)
        else:
            if self._packed is not None:
                self._pack(batch.spec_info.custom_mask, self.tokens * total)
            self._plan(
                self._wrapper,
                self.lists.qo_indptr,
                *lists,
                *self._shape,
                qo_indptr_host=self._starts,
                kv_indptr_host=self._indptr,
                kv_lens_host=lengths,
                max_q_len=self.tokens,
                max_kv_len=max(values),
                **self._settings,
            )
        if self._copied is not None:  # pragma: gpu
            self._copied.record()

    def _pack(self, mask: Tensor, size: int) -> None:
        """Packs a mask: bool, the requests' [tokens, length] concatenated. Padding requests see everything.

        ``size`` is its number of elements with padding.
        """
        if size // 8 + self._bs > self._packed.numel():
            raise ArgumentError(f"the mask has {size} bits, and its buffer has {self._packed.numel()} bytes.")
        if size > mask.numel():
            mask = torch.cat([mask, mask.new_ones(size - mask.numel())])
        self._segments(mask, self._bits, self._wrapper._mask_indptr_buf, "little", self._packed)
