"""What a kernel is, seen from outside: its source, PTX, SASS and resources, and how two kernels differ.

Nothing here loads a kernel or writes to the cache. What is built is read from its entry; what isn't is compiled aside.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..build import binary, toolchain
from ..build import compile as compiler
from ..cache.store import MANIFEST, Entry, Store
from ..cache.tiers import tiers
from ..emit import override
from ..emit.render import render, render_binding
from ..errors import ArgumentError, ConfigError, StoreError, ToolchainError
from ..load import loader
from ..spec.config import PRESETS, KernelConfig, parse_settings, preset

VIEWS = ("cuda", "ptx", "sass", "resources", "binding", "command", "key")
# Those that two kernels are compared by.
COMPARED = ("cuda", "ptx", "sass", "resources")

_KEY_PREFIX = re.compile(r"[0-9a-f]{4,64}")


def fingerprint(config: KernelConfig) -> str:
    """sha256 (hex) of the emitted source: what evidence of a run on a GPU is filed under."""
    return hashlib.sha256(render(config).encode()).hexdigest()


@dataclass(frozen=True)
class Subject:
    """A kernel to look at.

    Attributes:
        name: what it was called by.
        source: what is, or would be, compiled.
        symbol: the stem of its exported names.
        archs: GPU architectures; () on the CPU target.
        config: what it is specialized to; None where that isn't known.
        entry: its build in the cache; None if there is none.
        edited: where its source was edited by hand: the file, or the entry's folder; None if it wasn't.
    """

    name: str
    source: str
    symbol: str
    archs: tuple[str, ...]
    config: KernelConfig | None
    entry: Entry | None
    edited: Path | None

    @property
    def on_gpu(self) -> bool:
        """Whether it is CUDA."""
        return "#include <cuda_runtime.h>" in self.source


def of_config(
    name: str, config: KernelConfig, archs: Sequence[str] | None = None, store: Store | None = None
) -> Subject:
    """The kernel of a configuration, built or not; as it is edited, if $ONELAUNCH_OVERRIDE_DIR has an edit of it.

    Raises:
        ToolchainError, StoreError: see loader.load.
    """
    targets = () if config.target == "cpu" else tuple(archs or toolchain.current_architectures())
    edit = override.edited(config)
    return Subject(
        name,
        override.source(config),
        config.symbol,
        targets,
        config,
        _built(config, targets, store or loader.default_store()),
        edit.path if edit else None,
    )


def of_entry(entry: Entry, name: str = "") -> Subject:
    """What an entry of the cache was built from, whichever version of onelaunch built it."""
    facts = entry.manifest
    try:
        config = KernelConfig.from_dict(facts["config"])
    except (ConfigError, KeyError, TypeError):
        config = None
    edited = loader.is_edited(facts)
    source = entry.source
    # The CPU target's compiled file holds the binding as well.
    if config is not None and not edited and facts.get("ingredients", {}).get("source") == fingerprint(config):
        source = render(config)
    archs = tuple(str(arch) for arch in facts.get("archs", facts.get("resources", ())))
    return Subject(
        name or entry.key[:16], source, str(facts["symbol"]), archs, config, entry, entry.path if edited else None
    )


def of_file(path: Path, archs: Sequence[str] | None = None) -> Subject:
    """An emitted source, edited or not; what it says of itself leads to its configuration.

    Raises:
        ConfigError: onelaunch didn't emit it.
        OSError: it can't be read.
    """
    source = path.read_text(encoding="utf-8")
    symbol = re.search(r"\b(onelaunch_\w+)_launch\(", source)
    if symbol is None:
        raise ConfigError(f"{path} isn't a kernel's source: onelaunch emitted no such file.")
    config = None
    if told := re.search(r"^//   onelaunch show (?:--set )?(\S+)$", source, re.M):
        try:
            config = preset(told[1]) if told[1] in PRESETS else parse_settings(told[1])
        except ConfigError:
            config = None
    targets = () if config is not None and config.target == "cpu" else tuple(archs or toolchain.current_architectures())
    edited = config is not None and source != render(config)
    return Subject(str(path), source, symbol[1], targets, config, None, path if edited else None)


def find(
    name: str | None,
    settings: str | None = None,
    target: str | None = None,
    archs: Sequence[str] | None = None,
    store: Store | None = None,
) -> Subject:
    """The kernel that a preset's name, settings, the first digits of a key, or a path stand for.

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
                raise ConfigError(f"--set and --target change a preset; {name} is a kernel that is there already.")
            return kernel
    config = parse_settings(settings or "", preset(name) if name else None)
    config = config.replace(target=target) if target else config
    label = " ".join(filter(None, (name, settings))) or "the defaults"
    return of_config(label, config, archs, store)


def view(kernel: Subject, what: str, annotate: bool = False) -> str:
    """What `onelaunch show` prints.

    Args:
        what: one of VIEWS.
        annotate: with the source line that each instruction of PTX or SASS comes from.

    Raises:
        ArgumentError: the kernel has no such view.
        ToolchainError: a program that it takes is missing.
    """
    if annotate and what not in ("ptx", "sass"):
        raise ArgumentError(f"--annotate is for ptx and sass; {what} has no instructions.")
    if what == "cuda":
        return kernel.source
    if what == "binding":
        config = _known(kernel)
        return render_binding(config, loader.module_name(config))
    if what == "ptx":
        return _of_each(kernel, partial(_ptx, annotate=annotate))
    if what == "sass":
        return _of_each(kernel, partial(_sass, annotate=annotate))
    return table(facts(kernel, what))


def facts(kernel: Subject, what: str) -> dict[str, Any]:
    """What `onelaunch show --what resources`, `command` or `key` prints, as JSON values."""
    if what == "resources":
        return _marked(kernel, dict(resources(kernel)))
    if what == "command":
        return _marked(kernel, _commands(kernel))
    return _marked(kernel, _key(kernel))


def table(values: Mapping[str, Any], indent: str = "") -> str:
    """Facts as lines ``name  value``, those inside others indented."""
    width = max((len(name) for name, value in values.items() if not isinstance(value, dict)), default=0)
    lines = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines.append(f"{indent}{name}\n{table(value, indent + '  ')}")
        else:
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            lines.append(f"{indent}{name:{width}}  {text}\n")
    return "".join(lines)


def resources(kernel: Subject) -> dict[str, dict[str, int]]:
    """Registers a thread, and bytes of shared, stack and local memory, by architecture.

    Raises:
        ArgumentError: it is for the CPU.
        ToolchainError: it isn't built, and a program that it takes is missing.
    """
    _require_gpu(kernel, "resources")
    recorded = kernel.entry.manifest.get("resources") if kernel.entry is not None else None
    if recorded and set(kernel.archs) <= set(recorded):
        return {arch: _ordered(recorded[arch]) for arch in kernel.archs}
    program = _program("cuobjdump")
    with tempfile.TemporaryDirectory(prefix="onelaunch-") as folder:
        found = {arch: binary.resources(_cubin(kernel, arch, Path(folder)), program) for arch in kernel.archs}
    return {arch: _ordered(next(iter(of_one.values()))) for arch, of_one in found.items()}


def difference(one: Subject, other: Subject, what: str, context: int = 3) -> str:
    """A unified diff of one view of two kernels; "" if they don't differ.

    What differs by name alone is made equal first: keys and symbols, in PTX the numbers of virtual registers and
    labels, in SASS addresses and labels.

    Args:
        what: one of COMPARED.
        context: equal lines around each difference.
    """
    before, after = (_comparable(kernel, what).splitlines(keepends=True) for kernel in (one, other))
    was, now = (f"{kernel.name} ({what}{', edited by hand' if kernel.edited else ''})" for kernel in (one, other))
    return "".join(difflib.unified_diff(before, after, was, now, n=context))


def compile_commands(files: Mapping[Path, Subject]) -> str:
    """A compile_commands.json for clangd, by which an editor reads emitted sources.

    CUDA is spelled as clang takes it, since clangd knows few of nvcc's flags.
    See https://clang.llvm.org/docs/JSONCompilationDatabase.html and https://llvm.org/docs/CompileCudaWithLLVM.html.

    Raises:
        ToolchainError: there is no CUDA toolkit, and a source is CUDA.
    """
    commands = []
    for path, kernel in files.items():
        arguments = ["clang++", "-std=c++17", "-fsyntax-only"]
        if kernel.on_gpu:
            toolkit = toolchain.find_toolkit()
            arguments += ["-xcuda", f"--cuda-path={toolkit.home}", f"-I{toolkit.include}", "-Wno-unknown-cuda-version"]
            arguments += [f"--cuda-gpu-arch=sm_{arch}" for arch in kernel.archs]
        else:
            arguments += ["-xc++", "-Wno-unknown-pragmas"]
        absolute = path.resolve()
        commands.append(
            {"directory": str(absolute.parent), "file": str(absolute), "arguments": [*arguments, str(absolute)]}
        )
    return json.dumps(commands, indent=1) + "\n"


# ------------------------------------------------------------------------------------------------ what is built


def _built(config: KernelConfig, archs: tuple[str, ...], store: Store) -> Entry | None:
    """What a load would find."""
    try:
        key = loader.content_key(config, archs, compiler.find_tools(config.target).versions())
    except ToolchainError:
        key = ""
    found = loader.lookup(config, archs, store, key, any_compiler=not key)
    return found[0] if found else None


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


def _known(kernel: Subject) -> KernelConfig:
    if kernel.config is None:
        raise ArgumentError(f"{kernel.name} doesn't say which configuration it is for; name a preset, or use --set.")
    return kernel.config


def _ordered(used: Mapping[str, int]) -> dict[str, int]:
    """As binary.resources has them; a manifest is sorted by name."""
    names = ("registers", "shared_bytes", "stack_bytes", "local_bytes", "spill_bytes")
    return {name: used[name] for name in names}


def _require_gpu(kernel: Subject, what: str) -> None:
    if not kernel.on_gpu:
        raise ArgumentError(f"{kernel.name} is built for the CPU and has no {what}; take its CUDA target.")


def _marked(kernel: Subject, values: dict[str, Any]) -> dict[str, Any]:
    return {"edited by hand": str(kernel.edited), **values} if kernel.edited else values


# ------------------------------------------------------------------------------------------------ keys and commands


def _key(kernel: Subject) -> dict[str, Any]:
    config = _known(kernel)
    values: dict[str, Any] = {"symbol": kernel.symbol, "configuration": config.key}
    if kernel.entry is not None:
        made_of = dict(kernel.entry.manifest.get("ingredients", {}))
        values |= {"build": kernel.entry.key, "built": str(kernel.entry.path)}
    else:
        try:
            versions = compiler.find_tools(config.target).versions()
        except ToolchainError as error:
            return {**values, "build": f"unknown, as it can't be built here: {str(error).splitlines()[0]}"}
        made_of = loader.ingredients(config, kernel.archs, versions)
        values |= {"build": loader.content_key(config, kernel.archs, versions), "built": "no"}
    return {**values, "made of": {name: value for name, value in made_of.items() if name != "config"}}


def _commands(kernel: Subject) -> dict[str, Any]:
    """What builds it: onelaunch's command, and the compiler's, as it was recorded or as it would be."""
    values = {}
    if kernel.config is not None:
        values["onelaunch"] = loader.build_command(kernel.config, kernel.archs)
    if kernel.entry is not None and kernel.entry.manifest.get("command"):
        values["recorded"] = str(kernel.entry.manifest["command"])
    elif kernel.on_gpu:
        values["compiler"] = shlex.join(
            map(str, _nvcc(kernel.archs, f"{kernel.symbol}.cu", f"{kernel.symbol}.o", "-c"))
        )
    else:
        host = toolchain.find_host_compiler()
        flags = [*host.flags, *compiler.HOST_FLAGS, "-fPIC", "-xc++"]
        values["compiler"] = shlex.join(
            [str(host.path), *flags, "-c", f"{kernel.symbol}.cu", "-o", f"{kernel.symbol}.o"]
        )
    return values


def _nvcc(archs: Sequence[str], source: Path | str, output: Path | str, stage: str) -> list[str | Path]:
    """nvcc's command with the flags of a build."""
    toolkit, host, _ = toolchain.preflight_cuda()
    gencode = toolchain.gencode_flags(archs, toolkit)
    if stage == "--ptx":
        gencode = [re.sub(r"code=sm_", "code=compute_", flag) for flag in gencode]
    return [toolkit.nvcc, stage, "-ccbin", host.path, *compiler.CUDA_FLAGS, *gencode, source, "-o", output]


# ------------------------------------------------------------------------------------------------ machine code


def _of_each(kernel: Subject, text_of: Callable[[Subject, str, Path], str]) -> str:
    _require_gpu(kernel, "machine code")
    with tempfile.TemporaryDirectory(prefix="onelaunch-") as folder:
        return "\n".join(_readable(text_of(kernel, arch, Path(folder))) for arch in kernel.archs)


def _compiled(kernel: Subject, arch: str, folder: Path, stage: str) -> Path:
    source, output = folder / f"{kernel.symbol}.cu", folder / f"{kernel.symbol}.{arch}.{stage.lstrip('-')}"
    source.write_text(kernel.source, encoding="utf-8")
    _run(_nvcc((arch,), source, output, stage), kernel)
    return output


def _cubin(kernel: Subject, arch: str, folder: Path) -> Path:
    """One architecture's object: from the entry that holds it, else compiled by the same flags."""
    program = binary.find_cuobjdump(_home())
    if kernel.entry is None or program is None:
        return _compiled(kernel, arch, folder, "--cubin")
    inside = folder / arch
    inside.mkdir()
    _run([program, "-xelf", "all", kernel.entry.module_path], kernel, inside)
    found = [path for path in inside.glob("*.cubin") if re.search(rf"sm_{arch}\.", path.name)]
    return found[0] if found else _compiled(kernel, arch, folder, "--cubin")


def _ptx(kernel: Subject, arch: str, folder: Path, *, annotate: bool) -> str:
    text = _compiled(kernel, arch, folder, "--ptx").read_text(encoding="utf-8")
    # From here on there is debug information as bytes.
    body = re.split(r"^\t\.(?:file|section)\b", text, maxsplit=1, flags=re.M)[0]
    files = {number: Path(name).name for number, name in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M)}
    lines: list[str | tuple[str, str, int]] = []
    for line in body.splitlines():
        if at := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
            if annotate and at[2] != "0":
                lines.append(("\t", files.get(at[1], ""), int(at[2])))
        else:
            lines.append(line)
    return _annotated(kernel, lines)


def _sass(kernel: Subject, arch: str, folder: Path, *, annotate: bool) -> str:
    options = ["--print-code", *(["--print-line-info"] if annotate else [])]
    done = _run([_program("nvdisasm"), *options, _cubin(kernel, arch, folder)], kernel)
    lines: list[str | tuple[str, str, int]] = []
    for line in done.splitlines():
        if at := re.match(r'\s*//## File "([^"]*)", line (\d+)', line):
            lines.append(("        ", Path(at[1]).name, int(at[2])))
        else:
            lines.append(line)
    return _annotated(kernel, lines)


def _annotated(kernel: Subject, lines: Iterable[str | tuple[str, str, int]]) -> str:
    """The lines, with the text of the source line in place of each (indentation, file, line number) that is new."""
    source = kernel.source.splitlines()
    out: list[str] = []
    last: tuple[str, str, int] | None = None
    for line in lines:
        if isinstance(line, str):
            out.append(line)
        elif line != last:
            last = line
            indent, file, number = line
            own = file.endswith(".cu") and number <= len(source)
            out.append(f"{indent}// {number}: {source[number - 1].strip()}" if own else f"{indent}// {file}:{number}")
    return "\n".join(out).strip("\n") + "\n"


def _readable(text: str) -> str:
    """The names as they are in the source. Mangled ones also carry a hash of the path that was compiled."""
    return re.sub(r"_Z\w+", lambda found: _demangled(found[0]), text)


def _demangled(name: str) -> str:
    """What a mangled name names, without namespaces and parameters; enough of the Itanium ABI for emitted kernels."""

    def identifiers(rest: str) -> tuple[list[str], str]:
        found = []
        while length := re.match(r"\d+", rest):
            start = length.end()
            found.append(rest[start : start + int(length[0])])
            rest = rest[start + int(length[0]) :]
        return found, rest

    path, rest = identifiers(re.sub(r"^_ZZ?N?", "", name))
    own = [part for part in path if not part.startswith(("_GLOBAL__N_", "_INTERNAL_"))]
    if not own:
        return name
    # A variable of a function comes after the function's parameters; PTX hangs the number of a parameter on the name.
    for local in re.finditer(r"E(?=(\d+)([A-Za-z_]))", rest) if name.startswith("_ZZ") else ():
        inner, after = identifiers(rest[local.end() :])
        if not after:
            own += inner
            break
    parameter = re.search(r"_param_\d+$", name)
    # What PTX takes in a name, so that ptxas takes the text.
    return "__".join(own) + (parameter[0] if parameter else "")


def _comparable(kernel: Subject, what: str) -> str:
    if what == "resources":
        return table(resources(kernel))
    text = view(kernel, what).replace(kernel.symbol, "onelaunch_kernel")
    if what == "cuda":
        text = re.sub(r"^//   onelaunch show .*$", "//   onelaunch show …", text, flags=re.M)
        return re.sub(r"^// key [0-9a-f]{64}$", "// key …", text, flags=re.M)
    if what == "ptx":
        text = re.sub(r"(%[a-z]+)\d+", r"\1", text)
        return re.sub(r"(\$L__\w+?)[_\d]+\b", r"\1", text)
    text = re.sub(r"/\*[0-9a-f]{4,}\*/", "", text)
    return re.sub(r"\.L_x_\d+", ".L_x", text)


# ------------------------------------------------------------------------------------------------ programs


def _home() -> Path | None:
    try:
        return toolchain.find_toolkit().home
    except ToolchainError:
        return None


def _program(name: str) -> Path:
    """cuobjdump or nvdisasm."""
    found = binary.find_program(name, _home())
    if found is None:
        raise ToolchainError(
            f"{name} is missing: it is in no CUDA toolkit here, not on PATH, and triton's wheel isn't installed. "
            f"Install the toolkit's package cuda-{name}, or `pip install triton`."
        )
    return found


def _run(command: Sequence[str | Path], kernel: Subject, folder: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode != 0:
        output = (done.stderr or done.stdout).strip().splitlines()
        first = next((line for line in output if re.search(r"\b(error|fatal)\b", line)), output[0] if output else "")
        raise ToolchainError(f"{Path(command[0]).name} can't take {kernel.name}: {first or 'it gave no reason'}.")
    return done.stdout
