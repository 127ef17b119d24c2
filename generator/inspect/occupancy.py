"""The number of a kernel's warps that are resident on an SM.

The limits are those of "Technical Specifications per Compute Capability" in the CUDA C++ programming guide; registers
are allocated to a warp in units of 256, as in CUDA's occupancy calculator.
"""

from __future__ import annotations

import re

_REGISTERS = 65_536
_UNIT = 256
# What the driver takes of a block's shared memory, and the unit of allocation.
_RESERVED, _SHARED_UNIT = 1024, 128
# By compute capability: threads, blocks, and bytes of shared memory per SM.
_LIMITS = {
    80: (2048, 32, 164 * 1024),
    86: (1536, 16, 100 * 1024),
    87: (1536, 16, 164 * 1024),
    89: (1536, 24, 100 * 1024),
    90: (2048, 32, 228 * 1024),
    100: (2048, 32, 228 * 1024),
    103: (2048, 32, 228 * 1024),
    110: (1536, 24, 228 * 1024),
    120: (1536, 24, 100 * 1024),
    121: (1536, 24, 100 * 1024),
}


def of(arch: str, threads: int, registers: int, shared_bytes: int) -> float:
    """The share of an SM's warps that resident blocks have, from 0 to 1.

    Args:
        arch: such as "90a". One that isn't known has the limits of the nearest before it.
        threads: a block.
        registers: a thread.
        shared_bytes: a block's static shared memory.
    """
    number = int(re.sub(r"\D", "", arch))
    known = max((capability for capability in _LIMITS if capability <= number), default=min(_LIMITS))
    most_threads, most_blocks, shared = _LIMITS[known]
    warps = -(-threads // 32)
    a_warp = -(-registers * 32 // _UNIT) * _UNIT
    a_block = -(-(shared_bytes + _RESERVED) // _SHARED_UNIT) * _SHARED_UNIT
    blocks = min(most_blocks, most_threads // (warps * 32), _REGISTERS // (a_warp * warps), shared // a_block)
    return blocks * warps / (most_threads // 32)
