"""kv_indptr and kv_indices of backends that keep them in two tensors for all captured batch sizes.

A single backend also has ``qo_indptr``, and in target_verify ``mask_indptr``. A multi-step Triton backend has split
counts, which all steps share. FlashInfer's backends have wrappers: see wrappers.py.
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
    """Refreshes by one launch the lists of a single backend, or of all steps of a multi-step draft backend.

    Each captured batch size has a plan. If the pool or the lists are replaced, a new plan is made.

    Args:
        backend: the backend.
        settings: arguments of onelaunch.bind.
    """

    def __init__(self, backend: Any, **settings: Any) -> None:
        self._backend, self._settings = backend, settings
        # Keys are those of plans.
        self._ready: dict[tuple[Any, ...], tuple[Ready, Tensor]] = {}

    @property
    def plans(self) -> dict[tuple[Any, ...], Plan]:
        """The plans by (batch size, mode, seq_lens' dtype, req_pool_indices' dtype)."""
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
        """Makes the plan of a batch size. Don't call it inside a capture.

        Args:
            bs: the batch size.
            mode: "decode"; for a single backend also "target_verify" and "draft_extend".
            seq_lens_dtype, req_pool_indices_dtype: the dtypes of run()'s tensors.
            extend_seq_lens_dtype: the dtype of the lengths that "draft_extend" extends by.
            source: req_to_token; None is the backend's own.

        Raises:
            ArgumentError: see flashinfer.bind_backends.
        """
        backend = self._backend
        if source is None:
            source = flashinfer.pool_of(backend)
        settings = {
            "seq_lens_dtype": seq_lens_dtype,
            "req_pool_indices_dtype": req_pool_indices_dtype,
            **self._settings,
        }
        pairs = self._pairs(bs, mode)
        if extend_seq_lens_dtype is not None and pairs[0][1] is None:
            settings["inputs"] = {EXTENDED: extend_seq_lens_dtype}
        plan = self._bind(source, mode, settings, pairs)
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
        self, bs: int, mode: str, declare: Mapping[str, Declaration | Written], added: int = 0, **settings: Any
    ) -> Ready:
        """A separate plan for a batch size that also writes the declared fields; see Refresher.beside.

        Triton's lists don't include the added tokens. For a single backend, qo_indptr and mask_indptr of ``declare``
        get the backend's own tensors.
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
        plan = self._bind(source, lists, {**self._settings, **settings, "declare": written}, pairs, added)
        return Ready(plan, pairs, [(backend, INDICES, getattr(backend, INDICES))])

    def forget(self) -> None:
        """Plan.forget() of all plans, because other code wrote the lists."""
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
        """The children, each with its FlashInfer wrapper if it is a FlashInferAttnBackend, else with None."""
        backend, several = self._backend, has(self._backend, STEPS)
        children = enumerate(getattr(backend, STEPS[0], [backend]))
        if not has_wrappers(backend):
            return [(child, None) for _, child in children]
        return [(child, Wrapper(child, bs, mode, step if several else None)) for step, child in children]

    def _bind(
        self,
        source: Tensor,
        mode: str,
        settings: dict[str, Any],
        pairs: list[tuple[Any, Wrapper | None]],
        added: int = 0,
    ) -> Plan:
        backend = self._backend
        if has(backend, STEPS):
            return flashinfer.bind_backends(backend, source, **merged(_split_settings(backend), settings))
        if (wrapper := pairs[0][1]) is not None:
            return wrapper.bind(source, added, settings)
        lists = MetadataBuffers(kv_indptr=backend.kv_indptr, kv_indices=getattr(backend, INDICES))
        if mode == "decode":
            return bind([lists], req_to_token=source, **settings)
        settings["constants"] = {"draft_tokens": backend.num_draft_tokens}
        declare = {"qo_indptr": _sum("draft_tokens", backend.qo_indptr)}
        if mode == "target_verify":
            # The lists cover the prefix only; the mask covers the draft tokens too.
            declare["mask_indptr"] = _sum("draft_tokens * (base_len + draft_tokens)", backend.mask_indptr)
            return bind([lists], req_to_token=source, declare=declare, **settings)
        # The lists cover the tokens before those that a request is extended by.
        indices = getattr(backend, INDICES)
        declare["prefix_indptr"] = _sum(f"max(base_len - {EXTENDED}, 0)", backend.kv_indptr)
        prefix = packed("token(column)", at="prefix_indptr", dtype=_dtype(indices))
        declare["prefix_indices"] = into(prefix, indices)
        return bind([MetadataBuffers()], req_to_token=source, declare=declare, **settings)


def splits_are_served(backend: Any) -> bool:
    """Whether a launch can make the split counts that the steps of a multi-step Triton backend share."""
    child = getattr(backend, STEPS[0])[-1]
    known = all(hasattr(child, name) for name in (*_OF_SPLITS, *_HOW_SPLIT, "get_num_kv_splits"))
    return known and bool(_same_for_all(child) or child.device_core_count > 0)


def _same_for_all(child: Any) -> str:
    """The formula of split counts if no count depends on other requests; "" if they do."""
    if child.enable_deterministic and child.split_tile_size is not None:
        return "ceil_div(base_len, split_tile_size)"
    static = child.static_kv_splits or child.device_core_count <= 0
    return "max_kv_splits" if static and not child.enable_deterministic else ""


def _split_settings(backend: Any) -> dict[str, Any]:
    """Arguments of flashinfer.bind_backends for split counts that equal those of SGLang's get_num_kv_splits."""
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
