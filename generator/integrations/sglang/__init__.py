"""SGLang: what it computes before its CUDA graphs are replayed, by one launch for each of them.

One line attaches it to a backend, before the engine captures its graphs, and one detaches it::

    from onelaunch.integrations import sglang

    attachment = sglang.attach(draft_attn_backend)
    print(attachment)  # what the launch refreshes, and what the engine still does
    ...
    attachment.detach()

Served are the multi-step draft backends of DSA, FA3, TRTLLM-MHA, FlashMLA, TRTLLM-MLA, Triton, FlashInfer and
FlashInfer-MLA, and the single backends of the first seven, in decode, target_verify and draft_extend. The README's
table says which classes of which versions were held against the engine's own code. Whatever isn't served is refused in
one sentence that names the attribute. Where a batch isn't served (ragged verification, an encoder) the engine's own
code runs, as it does in all other modes.

**Seams.** The graph runners of a speculative step are attached likewise, after they captured:
EAGLEDraftCudaGraphRunner, EAGLEDraftExtendCudaGraphRunner and the DecodeCudaGraphRunner that verifies. Then one launch
also writes the graph's input buffers, with padding: seq_lens, req_pool_indices, positions, out_cache_loc, and what is
copied there (input_ids, topk_index, topk_p, extend_seq_lens, num_accept_tokens, num_correct_drafts, select_index). The
engine's copies and fills of them are left out, and so is the draft's gather of write locations, but for 0.5.23's, whose
window verification and draft extension write too. Then the EagleDraftWorker is attached. One launch makes the chain
that is verified, with its mask and write locations, and one what a draft extension's batch is made of; 0.5.23's own
single launches of these two stay. The engine's own are: hidden states; positions of a draft by repeat_interleave
(0.5.17); a mask that isn't its backend's, such as FlashInfer's; the top-k plan, FlashInfer's plans on the host; draft
trees. ``bind_seam`` makes the same with tensors of a caller's own.

With ``ONELAUNCH_SGLANG=1`` an unmodified engine attaches it itself: see ``onelaunch.integrations.plugin``. With
``ONELAUNCH_DISABLE=1`` nothing is attached.

``Refresher`` is the launch alone, for modified engines: it finds the tensors that were captured for a batch size, by
the attribute names of any version of SGLang, and refreshes them.
"""

from .attach import Attachment
from .captured import buffers_from, mode_of
from .refresher import Refresher, bind_backends
from .runners import bind_seam
from .seam import Seam, attach
from .worker import Producers

__all__ = [
    "Attachment",
    "Producers",
    "Refresher",
    "Seam",
    "attach",
    "bind_backends",
    "bind_seam",
    "buffers_from",
    "mode_of",
]
