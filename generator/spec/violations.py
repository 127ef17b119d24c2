"""What a checked kernel reports: the kinds, their numbers in the emitted CUDA, the sentences the host makes of them.

Both sides follow the list, as they follow layout.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import KernelConfig


@dataclass(frozen=True)
class Offence:
    """One kind of offence.

    Attributes:
        constant: its name in the emitted CUDA.
        number: what a kernel writes, 1 or more.
        applies: whether a configuration's kernel can report it.
        sentence: for people, with {request}, {value} and {limit}.
    """

    constant: str
    number: int
    applies: Callable[[KernelConfig], bool]
    sentence: str


OFFENCES = tuple(
    Offence(constant, number, applies, sentence)
    for number, (constant, applies, sentence) in enumerate(
        (
            (
                "kPoolIndex",
                lambda config: bool(config.tables),
                "req_pool_indices[{request}] is {value}; allowed: rows of req_to_token, 0 to {limit} exclusive. "
                "Its tables weren't written.",
            ),
            (
                "kNegativeLength",
                lambda config: config.needs_lengths,
                "seq_lens[{request}] is {value}; allowed: 0 or more.",
            ),
            (
                "kLengthBeyondTable",
                lambda config: config.needs_lengths and bool(config.tables),
                "seq_lens[{request}] is {value}; allowed: up to {limit}, as far as the tables of this call go. "
                "Bind wider tables, or raise max_len.",
            ),
            (
                "kExtendLength",
                lambda config: config.extend == "variable",
                "extend_seq_lens[{request}] is {value}; allowed: 0 to {limit}, the rows that the destinations have.",
            ),
            (
                "kRowsBeyondCapacity",
                lambda config: config.extend == "variable",
                "extend_seq_lens add up to {value} rows at request {request}; the destinations have {limit}. "
                "Bind larger buffers.",
            ),
            (
                "kIndicesBeyondCapacity",
                lambda config: "kv_indices" in config.fields,
                "seq_lens up to request {request} need {value} elements of kv_indices; the destinations have {limit}. "
                "Bind larger buffers.",
            ),
        ),
        start=1,
    )
)
