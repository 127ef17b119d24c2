"""Finds the kernel that a preset, settings, a key or a path names.

Nothing in this folder loads a kernel or writes to the cache. A built kernel is read from its entry; any other is
compiled in a temporary folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..build import toolchain
from ..cache.manifest import MANIFEST, Entry
from ..cache.store import Store
from ..cache.tiers import tiers
from ..emit import override
from ..emit.render import render
from ..errors import ConfigError, StoreError, ToolchainError
from ..load import loader
from ..spec.config import KernelConfig
from ..spec.presets import PRESETS, preset
from ..spec.settings import parse_settings

_KEY_PREFIX = re.compile(r"[0-9a-f]{4,64}")
_MAX_SOURCE_BYTES = 16 * 2**20


def fingerprint(config: KernelConfig) -> str:
    """sha256 (hex) of the emitted source; the evidence of GPU runs is stored under it."""
    return hashlib.sha256(render(config).encode()).hexdigest()


@dataclass(frozen=True)
class Subject:
    """A kernel to look at.

    Attributes:
        name: the name that it was requested by.
        symbol: the stem of its exported names.
        config: its configuration; None if unknown.
        edited: the hand-edited file, or the folder of its entry; None if it isn't edited.
        text: the source as it was read; None if it follows from the configuration.
        requested: the requested GPU architectures; None if none were.
        published: the entry of the cache that it was found by, if any.
        store: the store to search for its build; None searches nowhere.
    """

    name: str
    symbol: str
    config: KernelConfig | None
    edited: Path | None
    text: str | None = None
    requested: tuple[str, ...] | None = None
    published: Entry | None = None
    store: Store | None = None

    # These are computed when they are needed: rendering loads Jinja, and the others query the GPU and the compilers,
    # which takes seconds.
    @cached_property
    def source(self) -> str:
        """The source that is, or would be, compiled."""
        if self.text is not None:
            return self.text
        assert self.config is not None
        return render(self.config)

    @cached_property
    def on_gpu(self) -> bool:
        """Whether it is CUDA."""
        return "#include <cuda_runtime.h>" in self.source

    @cached_property
    def archs(self) -> tuple[str, ...]:
        """GPU architectures; () on the CPU target.

        Raises:
            ToolchainError: none were requested, and the GPU's isn't supported.
        """
        if not self.on_gpu:
            return ()
        return self.requested or toolchain.current_architectures()

    @cached_property
    def entry(self) -> Entry | None:
        """Its build in the cache; None if there is none."""
        if self.published is not None or self.config is None or self.store is None:
            return self.published
        try:
            key = loader.content_key(self.config, self.archs, toolchain.find_tools(self.config.target).versions())
        except ToolchainError:
            key = ""
        found = loader.lookup(self.config, self.archs, self.store, key, any_compiler=not key)
        return found[0] if found else None


def of_config(
    name: str, config: KernelConfig, archs: Sequence[str] | None = None, store: Store | None = None
) -> Subject:
    """The kernel of a configuration, built or not; as it is edited, if $ONELAUNCH_OVERRIDE_DIR has an edit of it.

    Raises:
        StoreError: the edit can't be trusted.
    """
    edit = override.edited(config)
    return Subject(
        name,
        config.symbol,
        config,
        edit.path if edit else None,
        edit.text if edit else None,
        requested=tuple(archs) if archs else None,
        store=store or loader.default_store(),
    )


def of_entry(entry: Entry, name: str = "") -> Subject:
    """The kernel of an entry of the cache, whichever version of onelaunch built it."""
    facts = entry.manifest
    try:
        config = KernelConfig.from_dict(facts["config"])
    except (ConfigError, KeyError, TypeError):
        config = None
    edited = loader.is_edited(facts)
    source = entry.source
    # On the CPU target the compiled file also contains the binding.
    if config is not None and not edited and facts.get("ingredients", {}).get("source") == fingerprint(config):
        source = render(config)
    archs = tuple(str(arch) for arch in facts.get("archs", facts.get("resources", ())))
    edited_in = entry.path if edited else None
    return Subject(name or entry.key[:16], str(facts["symbol"]), config, edited_in, source, archs, entry)


def of_file(path: Path, archs: Sequence[str] | None = None) -> Subject:
    """An emitted source, edited or not. Its banner has the command that shows it, and so its configuration.

    Raises:
        ConfigError: onelaunch didn't emit it.
        OSError: it can't be read.
    """
    # A device, such as /dev/zero, may have no end.
    if path.exists() and (not path.is_file() or path.stat().st_size > _MAX_SOURCE_BYTES):
        raise ConfigError(
            f"{path} isn't a kernel's source: it isn't a file, or is larger than any source. Name a .cu file."
        )
    try:
        source = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} isn't a kernel's source: it isn't UTF-8 ({error}). Name a .cu file.") from None
    symbol = re.search(r"\b(onelaunch_\w+)_launch\(", source)
    if symbol is None:
        raise ConfigError(f"{path} isn't a kernel's source: onelaunch emitted no such file.")
    config = None
    if shown := re.search(r"^//   onelaunch show (?:--set )?(.+)$", source, re.M):
        # A setting that this version doesn't have, or quotes that somebody edited.
        with contextlib.suppress(ConfigError, ValueError):
            (named,) = shlex.split(shown[1])
            config = preset(named) if named in PRESETS else parse_settings(named)
    edited = config is not None and source != render(config)
    return Subject(str(path), symbol[1], config, path if edited else None, source, tuple(archs) if archs else None)


def find(
    name: str | None,
    settings: str | None = None,
    target: str | None = None,
    archs: Sequence[str] | None = None,
    store: Store | None = None,
) -> Subject:
    """The kernel that a preset's name, settings, the first digits of a key, or a path name.

    Args:
        name: a preset; 4 or more digits of an entry's key; an entry's folder; or a file of emitted source. None is the
            default configuration.
        settings: ``key=value,…`` over the preset.
        target: "cuda" or "cpu", over the preset.
        archs: GPU architectures; None is those of an entry, else see toolchain.current_architectures.
        store: None is the user's.

    Raises:
        ConfigError, StoreError: there is no such kernel.
    """
    store = store or loader.default_store()
    if name is not None and name not in PRESETS:
        kernel: Subject | None = None
        if Path(name).is_dir():
            kernel = of_entry(_entry_in(Path(name)), name)
        elif Path(name).exists() or "/" in name or name.endswith(".cu"):
            kernel = of_file(Path(name), archs)
        elif _KEY_PREFIX.fullmatch(name):
            kernel = of_entry(_entry_of(name, store))
        if kernel is not None:
            if settings or target:
                raise ConfigError(f"--set and --target change a preset; {name} already is a kernel. Leave them out.")
            return kernel
    config = parse_settings(settings or "", preset(name) if name else None)
    config = config.replace(target=target) if target else config
    label = " ".join(filter(None, (name, settings))) or "the defaults"
    return of_config(label, config, archs, store)


def _entry_of(prefix: str, store: Store) -> Entry:
    found = {key: tier for tier in reversed(tiers(store)) for key in tier.stored_keys() if key.startswith(prefix)}
    if len(found) > 1:
        raise StoreError(f"{len(found)} entries' keys begin with {prefix!r}; give more digits.")
    for key, tier in found.items():
        if (entry := tier.find(key)) is not None:
            return entry
    raise StoreError(f"No entry's key begins with {prefix!r}; `onelaunch list` shows them.")


def _entry_in(folder: Path) -> Entry:
    folder = folder.absolute()
    if not (folder / MANIFEST).is_file() or folder.parent.name != "entries":
        raise StoreError(f"{folder} isn't an entry of a cache; `onelaunch list` shows them.")
    entry = Store(folder.parent.parent, read_only=True).find(folder.name)
    if entry is None:
        raise StoreError(f"{folder} is damaged; build it again.")
    return entry
