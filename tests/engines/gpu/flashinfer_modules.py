"""Builds FlashInfer's modules for the model of model.py: bfloat16, heads of 64, int32 indices. bundle.py runs it."""

from __future__ import annotations

import torch
from flashinfer.jit.attention import gen_batch_decode_module, gen_batch_prefill_module
from flashinfer.jit.quantization import gen_quantization_module
from flashinfer.page import gen_page_module
from model import HEAD_DIM

TYPES = (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.int32)
# No position encoding, no window, no soft cap.
SHAPE = (HEAD_DIM, HEAD_DIM, 0, False, False)

if __name__ == "__main__":
    for module in (
        gen_batch_decode_module(*TYPES, *SHAPE),
        gen_batch_prefill_module("fa2", *TYPES, *SHAPE, False),
        gen_page_module(),
        gen_quantization_module(),
    ):
        module.build(verbose=False)
        print("built", module.name, flush=True)
