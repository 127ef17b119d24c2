"""Two equal backends over one token pool: the engine's, and one with onelaunch attached."""

from __future__ import annotations

from typing import Any

import compare
import objects
import results
from objects import FAMILIES, Batch
from onelaunch.integrations import sglang
from torch import Tensor

CAPTURED = (2, 5)


def backend(name: str, steps: int = 3) -> Any:
    """One of a family, over a pool with the first of its page sizes."""
    page = FAMILIES[name].pages[0]
    return objects.backend(name, objects.token_pool(page, seed=1), page=page, steps=steps)


class Pair:
    """The engine's backend, and an equal one with onelaunch attached, over the same pool."""

    def __init__(
        self, name: str, page: int, *, mode: str, steps: int = 0, draft_tokens: int = 4, **attach: Any
    ) -> None:
        self.name, self.mode, self.draft_tokens, self.page, self.steps = name, mode, draft_tokens, page, steps
        self.replays = 0
        self.pool = objects.token_pool(page, seed=page + steps)
        self.engine, self.mine = (
            objects.backend(name, self.pool, page=page, steps=steps, draft_tokens=draft_tokens) for _ in range(2)
        )
        self.attachment = sglang.attach(self.mine, **attach)
        for backend in self.backends:
            backend.init_cuda_graph_state(max(CAPTURED), max(CAPTURED) * self.rows)
        self.drafting = bool(steps) or mode != "decode"
        for bs in CAPTURED:
            for backend in self.backends:
                batch = self.batch((objects.FILL,) * bs, bs, 0)
                backend.init_forward_metadata_out_graph(batch, in_capture=True)
                backend.init_forward_metadata_in_graph(batch)

    def batch(self, lengths: tuple[int, ...], bs: int, seed: int) -> Any:
        """A batch of this pair's mode."""
        masked = self.name == "flashinfer"
        return Batch(lengths, bs, self.mode, self.draft_tokens, seed, self.drafting, masked).make()

    @property
    def backends(self) -> tuple[Any, Any]:
        return self.engine, self.mine

    @property
    def rows(self) -> int:
        return 1 if self.mode == "decode" else self.draft_tokens

    def replay(self, lengths: tuple[int, ...], bs: int, seed: int) -> None:
        """Runs on both backends what precedes a graph's replay, and the part of it that the graph has recorded."""
        if self.mode == "target_verify":  # leaves room for the draft tokens
            lengths = tuple(min(length, objects.WIDTH - self.draft_tokens) for length in lengths)
        elif self.mode == "draft_extend":
            lengths = tuple(max(length, self.draft_tokens) for length in lengths)
        self.replays += 1
        for backend in self.backends:
            compare.poison(backend)
            batch = self.batch(lengths, bs, seed)
            backend.init_forward_metadata_out_graph(batch)
            backend.init_forward_metadata_in_graph(batch)
            self.blank(backend, batch)
            if hasattr(backend, "cuda_graph_kv_indices") and hasattr(backend, "attn_backends"):
                self._blank_unread_lists(backend, len(lengths), bs)

    def blank(self, backend: Any, batch: Any) -> None:
        """Poisons columns of tables that SGLang leaves undefined, or writes although nothing reads them."""
        if self.name == "dsa":
            self._blank_dead_columns(backend, batch.seq_lens)
        elif (self.name, self.mode) == ("fa3", "draft_extend"):
            # FA3 gathers as many pages for each request as the longest request has.
            compare.blank_dead_columns(backend, "page_table", batch.batch_size, -(-batch.seq_lens // self.page))

    def _blank_dead_columns(self, backend: Any, seq_lens: Tensor) -> None:
        """Poisons columns of DSA's tables beyond a row's length, which SGLang leaves undefined.

        SGLang fills page_table_1 up to the width of the pool, including tokens of the row's previous request. In
        real_page_table it leaves these columns uninitialized.
        """
        added = self.draft_tokens if self.mode == "target_verify" else 0
        live = (seq_lens + added).repeat_interleave(self.rows)
        compare.blank_dead_columns(backend, "page_table_1", len(live), live)
        if self.page > 1:
            compare.blank_dead_columns(backend, "real_page_table", len(live), -(-live // self.page))

    def _blank_unread_lists(self, backend: Any, real: int, bs: int) -> None:
        """Poisons values that SGLang doesn't read: its kernel makes lists for one step more than there are backends.

        Also poisons kv_indptr of padding requests, where SGLang is inconsistent: it sums their positions, 0, but places
        their kv_indices by their lengths, 1. With onelaunch both are sums of lengths.
        """
        for lists in (backend.kv_indptr, backend.cuda_graph_kv_indices):
            lists[len(backend.attn_backends) :] = compare.POISON
        backend.kv_indptr[:, real + 1 : bs + 1] = compare.POISON

    def check(self) -> None:
        assert not self.attachment.failed
        different = compare.differences(self.engine, self.mine)
        assert not different, "\n".join(different)

    def record(self) -> None:
        """Records that all replays were equal, each with one launch of onelaunch."""
        attachment, steps = self.attachment, {"steps": self.steps} if self.steps else {}
        assert attachment.launches >= self.replays, "the engine's own code ran"
        results.record(
            type(self.mine).__name__, attachment.refreshed, attachment.stays, self.mode, page=self.page, **steps
        )
