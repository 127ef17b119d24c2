"""Occupancy: the warps that are resident on an SM, as a share of its maximum.

The limits are those of "Technical Specifications per Compute Capability" in the CUDA C++ programming guide; registers
are allocated to a warp in units of 256, as in CUDA's occupancy calculator.
"""

from __future__ import annotations

import re

_REGISTERS = 65_536
_UNIT = 256
# Bytes of shared memory that the driver reserves per block, and the unit of allocation.
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
    """The occupancy of a kernel, from 0 to 1.

    Args:
        arch: such as "90a". An unknown one gets the limits of the highest known one below it.
        threads: per block.
        registers: per thread.
        shared_bytes: static shared memory per block.
    """
    number = int(re.sub(r"\D", "", arch))
    known = max((capability for capability in _LIMITS if capability <= number), default=min(_LIMITS))
    max_threads, max_blocks, shared = _LIMITS[known]
    warps = -(-threads // 32)
    warp_registers = -(-registers * 32 // _UNIT) * _UNIT
    block_bytes = -(-(shared_bytes + _RESERVED) // _SHARED_UNIT) * _SHARED_UNIT
    blocks = min(max_blocks, max_threads // (warps * 32), _REGISTERS // (warp_registers * warps), shared // block_bytes)
    return blocks * warps / (max_threads // 32)
