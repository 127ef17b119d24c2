"""What verified plans wrote last: hashes of the tables' tiles, which belong to the tables' memory.

Plans that write the same tables (an engine has one for each captured batch size) share them. So they are as large as
the memory allows, whatever the first plan's batch is: 8 bytes for each tile of 256 columns.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..spec.config import KernelConfig
from .bound import zeros
from .destinations import Destinations
from .memory import Region

# Columns that a row's first tile may begin before the row.
_MAX_OFFSET = 3


class TileHashes:
    """The hashes of the tiles of some tables. Made by hashes_of().

    Args:
        regions: the memory of the tables.
        rows, tiles: rows of the tables, and tiles of a row.

    Attributes:
        regions: likewise, of the plan that was bound first.
        words: int64 [rows, tiles]: the hash of what a tile holds in all tables, 0 where that isn't known.
    """

    def __init__(self, regions: list[Region], rows: int, tiles: int, device: torch.device) -> None:
        self.regions = regions
        self.words = zeros("the hashes of verified writes", (rows, tiles), device)


_known: weakref.WeakValueDictionary[tuple[Any, ...], TileHashes] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def hashes_of(destinations: Destinations, config: KernelConfig) -> TileHashes:
    """The hashes of a verified plan's tables: those of the plans that write the same tables, or new ones.

    Raises:
        ArgumentError: another plan with verified writes writes some of these tables, together with other tables or in
            other tiles: neither would know what the other wrote.
    """
    tables = {name: destinations.tensors[name] for name in config.tables}
    tiling = (config.tile_columns, config.vector_bytes, config.page_size, config.index_kpool, config.page_fill)
    places = tuple((name, *((t.data_ptr(), t.stride(0)) for t in tensors)) for name, tensors in tables.items())
    key = (str(destinations.device), tiling, places)
    regions = destinations.regions_of(config.tables)
    with _lock:
        found = _known.get(key)
        if found is not None:
            return found
        for other in list(_known.values()):
            for mine, theirs in ((mine, theirs) for mine in regions for theirs in other.regions):
                if mine.overlaps(theirs):
                    raise ArgumentError(
                        f"writes is 'verified', and {mine.name} is memory that another verified plan writes, as "
                        f"{theirs.name}, with other tables or settings; neither would know what the other wrote. Bind "
                        "the same tables in both, or one of them with writes='all' and call forget() after its runs."
                    )
        rows = min(_rows(tensor) for tensors in tables.values() for tensor in tensors)
        columns = max(_columns(name, tensors[0], config) for name, tensors in tables.items())
        tiles = -(-(columns + _MAX_OFFSET) // config.tile_columns)
        made = _known[key] = TileHashes(regions, rows, tiles, destinations.device)
    return made


def _row_stride(table: Tensor) -> int:
    """Elements from row to row; a single row may have any stride."""
    return max(table.stride(0), table.shape[1], 1)


def _rows(table: Tensor) -> int:
    """How many rows the table's memory has room for: the tensor's own, and those after them."""
    elements = table.untyped_storage().nbytes() // table.element_size() - table.storage_offset()
    return int(max(table.shape[0], -(-elements // _row_stride(table))))


def _columns(name: str, table: Tensor, config: KernelConfig) -> int:
    """The columns of a table's rows in the unit that tiles have: tokens, or pages if there are no tokens."""
    if config.token_table is not None:
        return _row_stride(table) if name == config.token_table else 0
    return _row_stride(table) * (config.index_kpool if name in config.pooled_tables else 1)
