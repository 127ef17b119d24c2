"""What must hold after any fault: nothing is left behind, and the next load of the same kernel is right."""

from __future__ import annotations

import onelaunch
import pytest
import torch
from onelaunch import KernelConfig, MetadataBuffers
from onelaunch.cache import tiers
from onelaunch.cache.manifest import MANIFEST
from onelaunch.cache.store import Store
from onelaunch.load import loader
from onelaunch.run import refresh

SMALL = KernelConfig(fields=("cache_seqlens",), target="cpu")
SMALL_CUDA = SMALL.replace(target="cuda")


def forget(patch: pytest.MonkeyPatch) -> None:
    """The state of a fresh process: without loaded kernels, a temporary store and earlier warnings."""
    patch.setattr(loader, "_loaded", {})
    patch.setattr(tiers, "_fallback", None)
    patch.setattr("onelaunch.log._warned", set())


def leftovers(store: Store) -> list[str]:
    """What a build must not leave behind: staging folders, and entries without a manifest."""
    entries, staging = ([*folder.glob("*")] for folder in (store.root / "entries", store.root / "staging"))
    return [*map(str, staging), *(str(path) for path in entries if not (path / MANIFEST).is_file())]


def assert_usable(store: Store) -> loader.Kernel:
    """The default store builds (or finds) SMALL, which computes the right result, and loads it again from the disk."""
    assert loader.default_store() is store
    assert leftovers(store) == []
    for _ in range(2):
        loader._loaded.clear()
        refresh.plans.clear()
        out = torch.full((4,), -1, dtype=torch.int32)
        plan = onelaunch.bind([MetadataBuffers(cache_seqlens=out)], req_to_token=torch.zeros(1, 1, dtype=torch.int32))
        plan.run(torch.tensor([5, 6]), torch.tensor([0, 0]))
        assert out.tolist() == [5, 6, -1, -1]
        assert plan.kernel.path.is_relative_to(store.root)
    assert leftovers(store) == []
    assert [entry.key for entry in store.entries()] == [plan.kernel.key]
    return plan.kernel
