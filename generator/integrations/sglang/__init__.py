"""SGLang: the metadata of its CUDA graphs, refreshed before a replay by one launch for all draft steps.

One line attaches it to a backend, before the engine captures its graphs, and one detaches it::

    from onelaunch.integrations import sglang

    attachment = sglang.attach(draft_attn_backend)
    print(attachment)  # what the launch refreshes, and what the engine still does
    ...
    attachment.detach()

Served are the multi-step draft backends of DSA, FA3, TRTLLM-MHA, FlashMLA, TRTLLM-MLA, Triton, FlashInfer and
FlashInfer-MLA, and the single backends of the first six, in decode, target_verify and draft_extend; FA3's draft_extend
sums extend_seq_lens, and the engine still does it. The README's table says which classes of which versions were held
against the engine's own code. Whatever isn't served is refused in one sentence that names the attribute. Where a batch
isn't served (ragged verification, an encoder) the engine's own code runs, as it does in all other modes.

With ``ONELAUNCH_SGLANG=1`` an unmodified engine attaches it itself: see ``onelaunch.integrations.plugin``. With
``ONELAUNCH_DISABLE=1`` nothing is attached.

``Refresher`` is the launch alone, for modified engines: it finds the tensors that were captured for a batch size, by
the attribute names of any version of SGLang, and refreshes them.
"""

from .attach import Attachment
from .captured import buffers_from, mode_of
from .refresher import Refresher, bind_backends
from .seam import Seam, attach

__all__ = ["Attachment", "Refresher", "Seam", "attach", "bind_backends", "buffers_from", "mode_of"]
