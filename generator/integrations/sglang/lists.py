"""kv_indptr and kv_indices of a backend, which keeps them in two tensors for all captured batch sizes.

A single backend has sums beside them: ``qo_indptr``, and in target_verify ``mask_indptr``. A multi-step one of Triton
has split counts, which all steps share. FlashInfer's have wrappers, see wrappers.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...run.bind import bind
from ...run.declared import Written, into
from ...run.plan import Plan
from ...spec.expressions import Dtype
from ...spec.fields import Declaration, MetadataBuffers, packed, running_sum, vector
from .. import flashinfer
from ..attributes import has, merged
from .captured import EXTENDED, STEPS
from .refresher import Ready
from .wrappers import Wrapper, has_wrappers

INDICES = "cuda_graph_kv_indices"
SPLITS = "cuda_graph_num_kv_splits"
# What SGLang's get_num_kv_splits reads.
_OF_SPLITS = ("num_head", "num_kv_head", "max_kv_splits", "device_core_count")
_HOW_SPLIT = ("static_kv_splits", "enable_deterministic", "split_tile_size")


class Lists:
    """Refreshes the lists of a multi-step draft backend, all steps by one launch, or of a single one.

    Each captured batch size has a plan. A pool or lists that were exchanged get a new one.

    Args:
        backend: the backend.
        facts: arguments of onelaunch.bind.
    """

    def __init__(self, backend: Any, **facts: Any) -> None:
        self._backend, self._facts = backend, facts
        # By batch size, mode and the dtypes of run()'s tensors.
        self._ready: dict[tuple[Any, ...], tuple[Ready, Tensor]] = {}

    @property
    def plans(self) -> dict[tuple[Any, ...], Plan]:
        """The plans by (batch size, mode, dtypes of seq_lens and req_pool_indices)."""
        return {key: ready.plan for key, (ready, _) in self._ready.items()}

    def ready(
        self,
        bs: int,
        mode: str,
        seq_lens_dtype: torch.dtype,
        req_pool_indices_dtype: torch.dtype,
        extend_seq_lens_dtype: torch.dtype | None = None,
        source: Tensor | None = None,
    ) -> Ready:
        """A plan for a batch size. Must not be called inside a capture.

        Args:
            bs: the batch size.
            mode: "decode", which all multi-step backends have; a single one has "target_verify" and "draft_extend" too.
            seq_lens_dtype, req_pool_indices_dtype: of run()'s tensors.
            extend_seq_lens_dtype: of what "draft_extend" extends by.
            source: req_to_token; None is the backend's own.

        Raises:
            ArgumentError: see flashinfer.bind_backends.
        """
        backend = self._backend
        if source is None:
            source = flashinfer.pool_of(backend)
        facts = {"seq_lens_dtype": seq_lens_dtype, "req_pool_indices_dtype": req_pool_indices_dtype, **self._facts}
        pairs = self._pairs(bs, mode)
        if extend_seq_lens_dtype is not None and pairs[0][1] is None:
            facts["inputs"] = {EXTENDED: extend_seq_lens_dtype}
        plan = self._bind(source, mode, facts, pairs)
        plan.exact = bs
        plan.follow_addresses()
        pool = getattr(backend, "req_to_token_pool", None)
        owner = pairs[0][0] if pool is None else pool
        held = [(backend, INDICES, getattr(backend, INDICES))]
        if owner.req_to_token is source:
            held.append((owner, "req_to_token", source))
        ready = Ready(plan, pairs, held)
        self._ready[bs, mode, seq_lens_dtype, req_pool_indices_dtype] = ready, source
        return ready

    def beside(
        self, bs: int, mode: str, declare: Mapping[str, Declaration | Written], added: int = 0, **facts: Any
    ) -> Ready:
        """A plan of its own for a batch size that also writes what is declared; see Refresher.beside.

        Triton's lists have a request's tokens without those that are added. Of ``declare``, a single backend's
        qo_indptr and mask_indptr get the backend's own tensors.
        """
        backend = self._backend
        source = flashinfer.pool_of(backend)
        pairs, written = self._pairs(bs, mode), dict(declare)
        if not has(backend, STEPS) and pairs[0][1] is None:
            for name in ("qo_indptr", "mask_indptr"):
                declaration: Any = declare.get(name)
                own = getattr(backend, name, None)
                if declaration is not None and own is not None:
                    written[name] = _sum(declaration.formula, own)
        lists = "decode" if pairs[0][1] is None else mode
        plan = self._bind(source, lists, {**self._facts, **facts, "declare": written}, pairs, added)
        return Ready(plan, pairs, [(backend, INDICES, getattr(backend, INDICES))])

    def forget(self) -> None:
        """Plan.forget() of all plans: somebody else wrote what they write."""
        for ready, _ in self._ready.values():
            ready.plan.forget()

    def run(self, bs: int, seq_lens: Tensor, req_pool_indices: Tensor, source: Tensor | None = None) -> None:
        """Refreshes the lists of the first bs requests.

        Args:
            bs: the batch size.
            seq_lens, req_pool_indices: int32 or int64, bs elements or more, of which the first bs count.
            source: req_to_token; None is the backend's own.

        Raises:
            ArgumentError: see flashinfer.bind_backends and Plan.run; nothing was written.
            LaunchError: CUDA refused the launch.
        """
        ready, known = self._ready.get((bs, "decode", seq_lens.dtype, req_pool_indices.dtype), (None, None))
        if ready is None or (source is not None and source is not known) or ready.exchanged():
            ready = self.ready(bs, "decode", seq_lens.dtype, req_pool_indices.dtype, source=source)
        ready.plan.run(seq_lens, req_pool_indices)

    def _pairs(self, bs: int, mode: str) -> list[tuple[Any, Wrapper | None]]:
        """The children, each with FlashInfer's wrapper of it, if it is a FlashInferAttnBackend."""
        backend, several = self._backend, has(self._backend, STEPS)
        children = enumerate(getattr(backend, STEPS[0], [backend]))
        if not has_wrappers(backend):
            return [(child, None) for _, child in children]
        return [(child, Wrapper(child, bs, mode, step if several else None)) for step, child in children]

    def _bind(
        self, source: Tensor, mode: str, facts: dict[str, Any], pairs: list[tuple[Any, Wrapper | None]], added: int = 0
    ) -> Plan:
        backend = self._backend
        if has(backend, STEPS):
            return flashinfer.bind_backends(backend, source, **merged(_split_facts(backend), facts))
        if (wrapper := pairs[0][1]) is not None:
            return wrapper.bind(source, added, facts)
        lists = MetadataBuffers(kv_indptr=backend.kv_indptr, kv_indices=getattr(backend, INDICES))
        if mode == "decode":
            return bind([lists], req_to_token=source, **facts)
        facts["constants"] = {"draft_tokens": backend.num_draft_tokens}
        declare = {"qo_indptr": _sum("draft_tokens", backend.qo_indptr)}
        if mode == "target_verify":
            # The lists have the prefix, and the mask has the draft tokens too.
            declare["mask_indptr"] = _sum("draft_tokens * (base_len + draft_tokens)", backend.mask_indptr)
            return bind([lists], req_to_token=source, declare=declare, **facts)
        # The lists have what lies before the tokens that a request is extended by.
        indices = getattr(backend, INDICES)
        declare["prefix_indptr"] = _sum(f"max(base_len - {EXTENDED}, 0)", backend.kv_indptr)
        prefix = packed("token(column)", at="prefix_indptr", dtype=_dtype(indices))
        declare["prefix_indices"] = into(prefix, indices)
        return bind([MetadataBuffers()], req_to_token=source, declare=declare, **facts)


def splits_are_served(backend: Any) -> bool:
    """Whether a launch makes the split counts that the steps of a multi-step Triton backend share."""
    child = getattr(backend, STEPS[0])[-1]
    known = all(hasattr(child, name) for name in (*_OF_SPLITS, *_HOW_SPLIT, "get_num_kv_splits"))
    return known and bool(_same_for_all(child) or child.device_core_count > 0)


def _same_for_all(child: Any) -> str:
    """The formula of split counts of which none depends on other requests; "" where they do."""
    if child.enable_deterministic and child.split_tile_size is not None:
        return "ceil_div(base_len, split_tile_size)"
    static = child.static_kv_splits or child.device_core_count <= 0
    return "max_kv_splits" if static and not child.enable_deterministic else ""


def _split_facts(backend: Any) -> dict[str, Any]:
    """Arguments of flashinfer.bind_backends for the split counts, as SGLang's get_num_kv_splits makes them."""
    child = getattr(backend, STEPS[0])[-1]
    if not hasattr(child, SPLITS) or not splits_are_served(backend):
        return {}
    counts = getattr(child, SPLITS)
    if formula := _same_for_all(child):
        constants = {"split_tile_size": child.split_tile_size or 1, "max_kv_splits": child.max_kv_splits}
        return {"declare": {"kv_splits": into(vector(formula, "request"), counts)}, "constants": constants}
    return {"num_kv_splits": counts, **{name: getattr(child, name) for name in _OF_SPLITS}}


def _sum(formula: str, destination: Tensor) -> Written:
    return into(running_sum(formula, dtype=_dtype(destination)), destination)


def _dtype(tensor: Tensor) -> Dtype:
    return "int64" if tensor.dtype == torch.int64 else "int32"
