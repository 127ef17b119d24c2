"""A paged KV pool: which request owns which pages and which row of req_to_token. The layout is SGLang's."""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray
from onelaunch.errors import ArgumentError

Ints = NDArray[np.int64]
INT32_MAX = 2**31 - 1


def row_width(context_len: int, num_draft_tokens: int, page_size: int) -> int:
    """Columns of ``req_to_token``: the context, and room for what drafting writes past it. Always odd.

    The formula is SGLang's; with 4 draft tokens and pages of 64 it adds 71. An even result gets one more
    column, so that rows are 4-byte aligned and no better, the case that production pools have.
    """
    extra = max(4 + num_draft_tokens, 2 * num_draft_tokens + page_size - 1)
    return (context_len + extra) | 1


class PagedAllocator:
    """Hands out KV pages and rows of ``req_to_token``, and writes the rows.

    Page p holds the token slots p * page_size ... (p + 1) * page_size - 1. Page 0 and row 0 are for padding:
    they are never handed out. Free pages are shuffled once, so that the pages of a request are scattered.

    Attributes:
        req_to_token: int32 [max_requests + 1, width] on the CPU, contiguous, the master copy. Element
            [row, i] is the slot of token i of the request that owns the row. Freed rows keep old values.
    """

    def __init__(self, *, max_requests: int, width: int, page_size: int, pages: int, rng: np.random.Generator) -> None:
        if pages * page_size > INT32_MAX:
            raise ArgumentError(
                f"{pages} pages of {page_size} tokens need slots above int32; lower the number of pages."
            )
        self.page_size = page_size
        self.width = width
        self.pages = pages
        self.req_to_token = torch.zeros((max_requests + 1, width), dtype=torch.int32)
        self._table = self.req_to_token.numpy()
        self._in_page = np.arange(page_size)
        # A stack: the first _free_count elements are free.
        self._free = rng.permutation(np.arange(1, pages))
        self._free_count = pages - 1
        self._free_rows = deque(range(1, max_requests + 1))
        self._owned = np.zeros((max_requests + 1, self.pages_for(width)), np.int64)
        self._owned_count = np.zeros(max_requests + 1, np.int64)
        self._changes: list[tuple[int, int, int]] = []

    @property
    def free_pages(self) -> int:
        return self._free_count

    @property
    def free_rows(self) -> int:
        return len(self._free_rows)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold ``tokens`` tokens."""
        return -(-tokens // self.page_size)

    def pages_of(self, row: int) -> Ints:
        """The pages that ``row`` owns, in the order of its tokens; int64 [pages]."""
        return self._owned[row, : self._owned_count[row]].copy()

    def can_admit(self, tokens: int) -> bool:
        """Whether a row and the pages for ``tokens`` tokens are free."""
        return bool(self._free_rows) and self.pages_for(tokens) <= self._free_count

    def admit(self, tokens: int) -> int:
        """Take a row with pages for ``tokens`` tokens and return it.

        Raises:
            ArgumentError: no row or too few pages are free, or a row isn't that wide. Nothing was taken.
        """
        if not self.can_admit(tokens):
            raise ArgumentError(
                f"{tokens} tokens can't be admitted: {self.free_rows} rows and {self.free_pages} pages of "
                f"{self.page_size} are free. Ask can_admit first."
            )
        if not 1 <= tokens <= self.width:
            raise ArgumentError(f"{tokens} tokens don't fit a row: 1 to {self.width} do.")
        row = self._free_rows.popleft()
        self._extend(row, self.pages_for(tokens))
        return row

    def short_of_pages(self, rows: Ints, tokens: Ints) -> NDArray[np.bool_]:
        """Which ``rows`` own too few pages for ``tokens`` tokens; all three [n]."""
        return -(-tokens // self.page_size) > self._owned_count[rows]

    def grow(self, row: int, tokens: int) -> bool:
        """Give ``row`` pages up to ``tokens`` tokens. False, and nothing given, if too few are free.

        Raises:
            ArgumentError: no request owns the row, or it isn't that wide.
        """
        self._check_owned(row)
        if tokens > self.width:
            raise ArgumentError(f"{tokens} tokens don't fit row {row}: it is {self.width} wide.")
        missing = self.pages_for(tokens) - int(self._owned_count[row])
        if missing > self._free_count:
            return False
        if missing > 0:
            self._extend(row, missing)
        return True

    def free(self, row: int) -> None:
        """Give back a row and its pages.

        Raises:
            ArgumentError: no request owns the row.
        """
        self._check_owned(row)
        pages = self.pages_of(row)
        self._free[self._free_count : self._free_count + len(pages)] = pages
        self._free_count += len(pages)
        self._owned_count[row] = 0
        self._free_rows.append(row)

    def drain_changes(self) -> tuple[Ints, NDArray[np.int32]] | None:
        """What was written since the last call: (flat positions, values), both [n]; None if nothing was."""
        if not self._changes:
            return None
        positions = np.concatenate([np.arange(start, stop) + row * self.width for row, start, stop in self._changes])
        self._changes.clear()
        # Read now and not when it was written: a row that changed hands in between then appears twice with
        # the same values, and the order of a scatter doesn't matter.
        return positions, self._table.reshape(-1)[positions]

    def _check_owned(self, row: int) -> None:
        if not (0 < row < len(self._owned_count) and self._owned_count[row]):
            raise ArgumentError(f"Row {row} isn't owned by a request; use a row that admit returned.")

    def _extend(self, row: int, count: int) -> None:
        pages = self._free[self._free_count - count : self._free_count].copy()
        self._free_count -= count
        held = int(self._owned_count[row])
        self._owned[row, held : held + count] = pages
        self._owned_count[row] += count
        start = held * self.page_size
        stop = min((held + count) * self.page_size, self.width)
        slots = (pages[:, None] * self.page_size + self._in_page).reshape(-1)
        self._table[row, start:stop] = slots[: stop - start]
        self._changes.append((row, start, stop))
