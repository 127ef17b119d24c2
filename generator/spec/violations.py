"""The violations that a checked kernel or an audit reports: their numbers in the emitted CUDA, and the host's messages.

The templates and Plan.check both use them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import KernelConfig


@dataclass(frozen=True)
class Violation:
    """One kind of violation.

    Attributes:
        constant: name of the constant in the emitted CUDA.
        number: the number that a kernel records for this kind, 1 or more.
        applies: whether the kernel of a configuration can report it.
        sentence: the message, a format string with {request}, {value} and {limit}.
    """

    constant: str
    number: int
    applies: Callable[[KernelConfig], bool]
    sentence: str


VIOLATIONS = tuple(
    Violation(constant, number, applies, sentence)
    for number, (constant, applies, sentence) in enumerate(
        (
            (
                "kPoolIndex",
                lambda config: config.reads_tokens and config.reads_rows,
                "req_pool_indices[{request}] is {value}; allowed: rows of req_to_token, 0 to {limit} exclusive. "
                "The request's table rows weren't written.",
            ),
            (
                "kNegativeLength",
                lambda config: config.needs_lengths,
                "seq_lens[{request}] is {value}; allowed: 0 or more.",
            ),
            (
                "kLengthBeyondTable",
                lambda config: config.needs_lengths and bool(config.tables),
                "seq_lens[{request}] is {value}; allowed: up to {limit}, the columns of this call's tables. "
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
                lambda config: config.packed is not None,
                "seq_lens up to request {request} need {value} elements of kv_indices; the destinations have {limit}. "
                "Bind larger buffers.",
            ),
            (
                "kLookUp",
                lambda config: bool(config.look_ups),
                "a formula looked up place {value} for request {request}; its source has 0 to {limit} exclusive. The "
                "field got what it declares as missing.",
            ),
        ),
        start=1,
    )
)

# Of an audit, whose record holds an element's address, what is there, and what should be: see run/audit.py.
DIFFERS = Violation("kDiffers", len(VIOLATIONS) + 1, lambda config: config.audits, "")


def violations_of(config: KernelConfig) -> list[Violation]:
    """The violations that the kernel of a configuration can report."""
    inputs = [violation for violation in VIOLATIONS if config.checked and violation.applies(config)]
    return inputs + [DIFFERS] * config.audits
