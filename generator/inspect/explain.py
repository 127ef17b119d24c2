"""Explains whether and where a configuration's kernel is built, and if not, how the nearest build differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..build import toolchain
from ..cache import failures
from ..cache.manifest import Entry
from ..cache.store import Store
from ..cache.tiers import tiers
from ..errors import ToolchainError
from ..load import loader
from ..spec.config import KernelConfig

# These follow from the others, and are shown only if nothing else differs.
_DERIVED = ("source", "binding", "flags")
_LABELS = {"compilers.nvcc": "nvcc", "compilers.nvcc_build": "nvcc's build", "compilers.host_compiler": "host compiler"}


@dataclass(frozen=True)
class Explanation:
    """The outcome of a lookup.

    Attributes:
        hit: the entry that would be loaded, or None.
        key: the build's key; "" if there is no compiler, whose version is part of it.
        nearest: on a miss, the entry with the fewest differences.
        differs: on a miss, (name, value in the nearest entry, requested value) for each difference.
        failed: the error of an earlier build of this key, if it failed.
        looked_in: the folders that were searched.
        missing: the reason why there is no key; "" if there is one.
    """

    hit: Entry | None
    key: str
    nearest: Entry | None
    differs: tuple[tuple[str, str, str], ...]
    failed: str
    looked_in: tuple[str, ...]
    missing: str

    def __str__(self) -> str:
        if self.hit is not None:
            return f"hit: {self.hit.path}"
        lines = [f"miss: {', '.join(self.looked_in)} {'has' if len(self.looked_in) == 1 else 'have'} no build of it"]
        if self.missing:
            lines.append(f"and it can't be built here: {self.missing}")
        if self.failed:
            lines.append(f"it failed before: {self.failed}")
        if self.nearest is None:
            lines.append("there is no other entry to compare with")
        else:
            lines.append(f"nearest: {self.nearest.path}")
            lines += [f"  {what}: {was} → {wanted}" for what, was, wanted in self.differs]
        return "\n".join(lines)


def explain(config: KernelConfig, archs: tuple[str, ...], store: Store | None = None) -> Explanation:
    """Looks a configuration up as loader.load does, without building or loading it.

    Args:
        config: the configuration.
        archs: GPU architectures; () on the CPU target.
        store: None is the user's.
    """
    store = store or loader.default_store()
    looked_in = tuple(str(tier.root) for tier in tiers(store))
    versions: dict[str, str] = {}
    key = missing = ""
    try:
        versions = toolchain.find_tools(config.target).versions()
        key = loader.content_key(config, archs, versions)
    except ToolchainError as error:
        missing = str(error).splitlines()[0]
    hit = loader.lookup(config, archs, store, key)
    if hit is not None:
        return Explanation(hit[0], hit[0].key, None, (), "", looked_in, "")
    failed = failures.recall(store, key) if key else None
    wanted = _flat(loader.ingredients(config, archs, versions))
    if not versions:
        wanted = {name: value for name, value in wanted.items() if not name.startswith("compilers")}
    nearest: tuple[Entry, tuple[tuple[str, str, str], ...]] | None = None
    for tier in tiers(store):
        for entry in tier.entries():
            if not {"config", "ingredients"} <= set(entry.manifest):  # a kernel of `onelaunch bench`
                continue
            known = _flat(entry.manifest["ingredients"])
            differs = _differences(known, wanted)
            if nearest is None or len(differs) < len(nearest[1]):
                nearest = (entry, differs)
    return Explanation(
        None,
        key,
        nearest[0] if nearest else None,
        nearest[1] if nearest else (),
        str(failed) if failed else "",
        looked_in,
        missing,
    )


def _differences(known: Mapping[str, str], wanted: Mapping[str, str]) -> tuple[tuple[str, str, str], ...]:
    names = [name for name in wanted if known.get(name) != wanted[name]]
    plain = [name for name in names if name not in _DERIVED]
    # A changed source is explained by another configuration, but not by another compiler.
    explained = any(name.startswith("config.") or name == "archs" for name in plain)
    chosen = plain if explained else plain + [name for name in names if name in _DERIVED]
    return tuple(
        (_LABELS.get(name, name.removeprefix("config.")), known.get(name, "unknown"), wanted[name]) for name in chosen
    )


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    out: dict[str, str] = {}
    for name, value in facts.items():
        if isinstance(value, dict) and name in ("config", "compilers"):
            out |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            out[prefix + name] = " ".join(map(str, value)) or "none"
        elif name in ("source", "binding"):
            out[prefix + name] = str(value)[:16]
        else:
            out[prefix + name] = str(value)
    return out
