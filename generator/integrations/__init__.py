"""Engines: helpers that find the tensors to refresh in an engine's own objects, by attribute names alone.

No engine is imported. Each module's docstring has the lines that put onelaunch into its engine:

* ``sglang``: DSA (once NSA), FA3, TRTLLM-MHA, FlashMLA and TRTLLM-MLA.
* ``vllm``: block tables and lengths.
* ``flashinfer``: kv_indptr and kv_indices, of SGLang's FlashInfer and Triton draft backends and of wrappers.
"""
