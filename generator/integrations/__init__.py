"""Finds the tensors to refresh in an engine's objects by attribute names. Imports no engine.

The docstring of each module shows the lines that put onelaunch into its engine:

* ``sglang``: DSA (formerly NSA), FA3, TRTLLM-MHA, FlashMLA, TRTLLM-MLA, Triton, FlashInfer and FlashInfer-MLA.
* ``vllm``: a draft step's slot mappings and indexer tensors, and the decode metadata of the sparse indexer.
* ``flashinfer``: what the plans of FlashInfer's wrappers read, and the lists of SGLang's draft backends.
"""
