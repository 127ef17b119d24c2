"""SGLang: one launch computes what the engine computes before it replays a CUDA graph.

One line attaches it to a backend before the engine captures its graphs, and one line detaches it::

    from onelaunch.integrations import sglang

    attachment = sglang.attach(draft_attn_backend)
    print(attachment)  # what the launch refreshes, and what the engine still does
    ...
    attachment.detach()

It serves the multi-step draft backends of DSA, FA3, TRTLLM-MHA, FlashMLA, TRTLLM-MLA, Triton, FlashInfer and
FlashInfer-MLA, and the single backends of the first seven, in decode, target_verify and draft_extend. The README's
table lists the classes and versions that were compared with the engine's own code. Anything else is refused in one
sentence that names the attribute. For a batch that isn't served (ragged verification, an encoder) and in all other
modes the engine's own code runs.

**Seams.** A graph runner of a speculative step is attached in the same way, after it captured its graphs:
EAGLEDraftCudaGraphRunner, EAGLEDraftExtendCudaGraphRunner, and the DecodeCudaGraphRunner that verifies. Then one launch
also writes the graph's input buffers, with padding: seq_lens, req_pool_indices, positions, out_cache_loc, and what the
engine copies into them (input_ids, topk_index, topk_p, extend_seq_lens, num_accept_tokens, num_correct_drafts,
select_index). The launch replaces the engine's copies and fills of these buffers, and the draft's gather of write
locations. (0.5.23's gather stays, because verification and draft extension write its window too.)

The EagleDraftWorker is attached after its runners. One launch makes the chain that is verified, with its mask and write
locations, and another makes what a draft extension's batch consists of. 0.5.23 has single launches of its own for these
two, which stay. The engine still makes: hidden states; a draft's positions by repeat_interleave (0.5.17); a mask that
isn't its backend's, such as FlashInfer's; the top-k plan; FlashInfer's plans on the host; draft trees. ``bind_seam``
binds a caller's own tensors to the same declarations.

With ``ONELAUNCH_SGLANG=1`` an unmodified engine attaches all of this itself: see ``onelaunch.integrations.plugin``.
With ``ONELAUNCH_DISABLE=1`` nothing is attached.

``Refresher`` is the launch alone, for modified engines. It finds the tensors that were captured for a batch size by the
attribute names of any version of SGLang, and refreshes them.
"""

from .attach import Attachment
from .captured import buffers_from, mode_of
from .refresher import Refresher, bind_backends
from .runners import bind_seam
from .seam import Seam
from .targets import attach
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
