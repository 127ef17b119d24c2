"""What verified writes save: the tiles of the tables that a refresh must write, of all that it reads."""

from __future__ import annotations

import torch
from onelaunch import KernelConfig
from torch import Tensor

# The tiles of a GPU, on any device. A kernel's tiles begin at 16-byte boundaries, so they may begin up to three columns
# earlier.
TILE_COLUMNS = KernelConfig().tile_columns


class TileCounter:
    """Counts from step to step which tiles of page_indices change.

    Args:
        table: page_indices of a backend, before the first step.

    Attributes:
        tiles, changed: tiles of the live columns in all steps, and those of them that a step changed: a word, or how
            many columns are live.
    """

    def __init__(self, table: Tensor) -> None:
        self.tiles = self.changed = 0
        self._ends = torch.zeros(len(table), dtype=torch.int64, device=table.device)
        self._table = table.clone()

    def count(self, table: Tensor, ends: Tensor) -> None:
        """Counts one step.

        Args:
            table: likewise, after the step.
            ends: int64 [bs], live columns of the first rows.
        """
        bs, width = len(ends), int(ends.max())
        tiles = -(-width // TILE_COLUMNS)
        first = torch.arange(tiles, device=table.device) * TILE_COLUMNS
        live, before = (
            (e[:, None] - first).clamp(0, TILE_COLUMNS) for e in (ends.clamp(0, table.shape[1]), self._ends[:bs])
        )
        differs = table[:bs, :width] != self._table[:bs, :width]
        padded = torch.nn.functional.pad(differs, (0, tiles * TILE_COLUMNS - width))
        changed = padded.view(bs, tiles, TILE_COLUMNS).any(2) | (live != before)
        self.tiles += int((live > 0).sum())
        self.changed += int((changed & (live > 0)).sum())
        self._table[:bs, :width] = table[:bs, :width]
        self._ends[:bs] = ends
