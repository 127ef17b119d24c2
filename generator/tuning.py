"""Which launch shape a kernel gets: what `onelaunch tune` found best on this kind of device, else a heuristic.

Threads and unroll are constants of the emitted code, and so is blocks_per_sm, which bounds the grid. A build that was
made ahead of time must be the one that is asked for later, so what isn't tuned always gets the same three.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import files, loader, trust
from .config import KernelConfig
from .errors import ConfigError
from .store import Store, tiers

if TYPE_CHECKING:
    import torch

FACTS = ("threads", "unroll", "blocks_per_sm")
_FOLDER = "tuning"


def shaped(config: KernelConfig, device: torch.device, requests: int, columns: int) -> KernelConfig:
    """The configuration with the launch shape for a device.

    Args:
        config: as it was bound, with the default launch shape.
        requests: the most that a call may have.
        columns: the most that a row may have.
    """
    if config.target != "cuda" or not config.tables:
        return config
    import torch

    properties = torch.cuda.get_device_properties(device)
    shape = launch_shape(
        config,
        properties.name,
        properties.multi_processor_count,
        requests,
        # With extent "live" nothing is known of the lengths yet.
        4 * columns if config.extent == "full" else None,
    )
    return config.replace(**shape)


def launch_shape(
    config: KernelConfig,
    device_name: str,
    sm_count: int,
    requests: int,
    bytes_per_request: int | None = None,
    store: Store | None = None,
) -> dict[str, int]:
    """threads, unroll and blocks_per_sm: the tuned ones of the store, else the heuristic's.

    Args:
        config: what is specialized; its own launch shape doesn't matter.
        device_name: as CUDA calls it.
        sm_count, requests, bytes_per_request: see heuristic.
        store: where tune kept it; None is the user's.
    """
    tuned = recall(store or loader.default_store(), device_name, config)
    return tuned or heuristic(sm_count, requests, bytes_per_request)


def heuristic(sm_count: int, requests: int, bytes_per_request: int | None = None) -> dict[str, int]:
    """The launch shape of what isn't tuned.

    Args:
        sm_count: multiprocessors.
        requests: the most that a call may have.
        bytes_per_request: of one table's row, as far as it is known.

    One shape for all: of 36 that `onelaunch tune` tried on an H100 on nine shapes of work, it was at most 4 % slower
    than the best of each (tests/gpu/NOTES.md). What else there is to choose the launch itself chooses, from the
    multiprocessors, the requests and the columns: the grid, and how it is shared out. How much of it works follows from
    the lengths, in the kernel.
    """
    default = KernelConfig()
    return {name: getattr(default, name) for name in FACTS}


def family(config: KernelConfig) -> str:
    """The key of everything but the launch shape."""
    default = KernelConfig()
    return config.replace(**{name: getattr(default, name) for name in FACTS}).key


def remember(
    store: Store, device_name: str, config: KernelConfig, shape: Mapping[str, int], facts: Mapping[str, Any]
) -> Path:
    """Keeps a launch shape for a kind of device and everything of a configuration but its own launch shape.

    Args:
        facts: what it was chosen from, for people.

    Returns:
        The file.

    Raises:
        ConfigError: a shape that no kernel can have.
        StoreError: somebody else could write to the cache folder.
        OSError: the folder can't be written.
    """
    config.replace(**shape)
    trust.private(store.root)
    path = trust.private(store.root / _FOLDER) / _name(device_name, config)
    noted = {"device": device_name, "config": config.settings(), **{name: shape[name] for name in FACTS}, **facts}
    files.replace(path, json.dumps(noted, indent=1) + "\n")
    trust.restrict(path)
    return path


def recall(store: Store, device_name: str, config: KernelConfig) -> dict[str, int] | None:
    """What remember kept: the first that the prebuilt folders or the store have, None if nothing fits.

    Raises:
        StoreError: somebody else could have written it.
    """
    for tier in tiers(store):
        path = tier.root / _FOLDER / _name(device_name, config)
        try:
            if not path.exists():
                continue
            trust.check_owner(tier.root)
            trust.check_owner(path.parent)
            noted = json.loads(trust.read(path))
            shape = {name: noted[name] for name in FACTS}
            config.replace(**shape)
        except (OSError, ValueError, KeyError, TypeError, ConfigError):
            continue  # a shape is a matter of speed alone: what can't be read isn't there
        return shape
    return None


def forget(store: Store, device_name: str, config: KernelConfig) -> bool:
    """Removes what remember kept; whether there was something."""
    path = store.root / _FOLDER / _name(device_name, config)
    existed = path.exists()
    path.unlink(missing_ok=True)
    return existed


def _name(device_name: str, config: KernelConfig) -> str:
    return hashlib.sha256(f"{device_name}\n{family(config)}".encode()).hexdigest()[:32] + ".json"
