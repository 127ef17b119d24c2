"""A loaded kernel bound to buffers, and the calls of a step."""

from .. import torch_version

# The modules of this room import torch, so an older one is refused before they do.
torch_version.check()
