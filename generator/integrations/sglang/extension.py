"""FA3's draft extension in versions of SGLang that capture no graph of it, such as 0.5.17.

The engine makes new tensors in each step, with eleven kernels and copies. Here the tensors are kept, and one launch
refreshes them.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from ...run.bind import bind
from ...run.declared import into
from ...spec.fields import MetadataBuffers, running_sum
from ..refusals import batch_refusal
from .captured import EXTENDED
from .refresher import launch

EAGER = "init_forward_metadata"
# Bounds the kept table. Larger batches run the engine's own code.
_MAX_TABLE_BYTES = 2**26


def extends_without_a_graph(backend: Any) -> bool:
    """Whether this version has no graph of FA3's draft extension, and this backend runs draft extensions."""
    return (
        not hasattr(backend, "stage_draft_extend_metadata")
        and bool(getattr(backend, "is_draft_runner", False))
        and not getattr(backend, "skip_prefill", True)
        and getattr(backend, "attn_cp_size", 1) == 1
    )


class Extension:
    """Refreshes by one launch what FA3 reads in a draft extension without a graph. One plan serves all batch sizes.

    Args:
        backend: a FlashAttentionBackend.
        settings: arguments of onelaunch.bind.
    """

    def __init__(self, backend: Any, **settings: Any) -> None:
        self._backend = backend
        engine = sys.modules[type(backend).__module__]
        self._metadata, self._mode = engine.FlashAttentionMetadata, engine.ForwardMode.DRAFT_EXTEND_V2
        # By batch size: views of the lengths, the sums, the starts and the widest table.
        self._heads: dict[int, tuple[torch.Tensor, ...]] = {}
        self._pool, page_size = backend.req_to_token, backend.page_size
        self._widest = -(-backend.max_context_len // page_size)
        pages = -(-self._pool.shape[1] // page_size)
        self.capacity = max(1, min(self._pool.shape[0], _MAX_TABLE_BYTES // (4 * pages)))

        def new(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=self._pool.device)

        self._lengths, self._table = new(self.capacity), new(self.capacity, pages)
        self._sums, self._starts = new(self.capacity + 1), new(self.capacity + 1)
        lengths = {"cache_seqlens": self._lengths, "cu_seqlens_k": self._sums}
        table = {"page_indices" if page_size == 1 else "real_page_table": self._table}
        self.plan = bind(
            [MetadataBuffers(**lengths, **table)],
            req_to_token=self._pool,
            page_size=page_size,
            declare={"cu_seqlens_q": into(running_sum(EXTENDED), self._starts)},
            inputs={EXTENDED: torch.int32},
            **settings,
        )
        self.plan.follow_addresses()

    def run(self, batch: Any) -> bool:
        """Refreshes the metadata and gives it to the backend. Returns False and writes nothing if it can't serve.

        Args:
            batch: SGLang's ForwardBatch, with seq_lens and req_pool_indices int64 [bs], extend_seq_lens int32 [bs].

        Raises:
            ArgumentError, RuntimeError: see refresher.launch; nothing was written.
        """
        bs, extended, backend = batch.batch_size, batch.extend_seq_lens, self._backend
        if (
            batch.forward_mode is not self._mode
            or not 0 < bs <= self.capacity
            or extended is None
            or batch_refusal(batch)
            or backend.req_to_token is not self._pool
        ):
            return False
        launch(self.plan, batch.seq_lens, batch.req_pool_indices, (extended,))
        if bs not in self._heads:
            tensors = self._lengths[:bs], self._sums[: bs + 1], self._starts[: bs + 1]
            self._heads[bs] = *tensors, self._table[:bs, : self._widest]
        lengths, sums, starts, table = self._heads[bs]
        longest, widths = batch.seq_lens_cpu, batch.extend_seq_lens_cpu
        columns = backend.max_context_len
        if longest is not None:
            # For a few numbers Python's max() is faster than PyTorch's.
            columns = max(longest.tolist())
            table = self._table[:bs, : -(-columns // backend.page_size)]
        backend.forward_metadata = self._metadata(
            cache_seqlens_int32=lengths,
            max_seq_len_q=backend.speculative_num_draft_tokens if widths is None else max(widths),
            max_seq_len_k=columns,
            cu_seqlens_q=starts,
            cu_seqlens_k=sums,
            page_table=table,
        )
        return True
