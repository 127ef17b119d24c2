"""FlashMLA's own schedule for dense attention, from SGLang's wheel of kernels.

Nothing is copied, and of the wheel only FlashMLA's extension is loaded: its op is what SGLang's FlashMLA backend calls,
read in sglang-kernel 0.4.5.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .sglang_modules import Missing

# Query heads for one of keys and values, of which a part takes 64: a part for each multiprocessor.
_HEADS = 64


@cache
def schedule() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """FlashMLA's own: from int32 [bs] lengths on a GPU to (metadata [parts, 8], num_splits [bs + 1]).

    Raises:
        Missing: no wheel of SGLang's kernels, or one for another torch.
    """
    found = importlib.util.find_spec("sgl_kernel")  # without its __init__, which loads everything else
    folders = [] if found is None else list(found.submodule_search_locations or ())
    libraries = [path for folder in folders for path in Path(folder).glob("flashmla_ops*.so")]
    if not libraries:
        raise Missing("SGLang's kernels (sglang-kernel) aren't importable, or without FlashMLA")
    torch_ops: Any = torch.ops  # load_library has no annotations
    try:
        torch_ops.load_library(libraries[0])
        op = torch_ops.sgl_kernel.get_mla_decoding_metadata.default
    except (AttributeError, OSError, RuntimeError) as error:
        raise Missing(f"FlashMLA's extension can't be loaded: {error}") from error
    # seqlens_k, num_q_tokens_per_head_k, h_k, h_q, is_fp8_kvcache, topk: as for dense attention in bfloat16.
    return lambda lengths: tuple(op(lengths, _HEADS, 1, None, False, None))
