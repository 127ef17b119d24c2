"""A kernel's machine code: PTX, SASS and what they use, from its entry in the cache or compiled aside."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from ..build import binary, toolchain
from ..build import compile as compiler
from ..errors import ArgumentError, ToolchainError
from .kernels import Subject


def ptx(kernel: Subject, annotate: bool = False) -> str:
    """The PTX of each architecture, with readable names; compiled aside.

    Args:
        annotate: with the source line that each instruction comes from.

    Raises:
        ArgumentError: the kernel is for the CPU.
        ToolchainError: there is no CUDA toolkit, or it can't compile the source.
    """
    return _of_each(kernel, partial(_ptx, annotate=annotate))


def sass(kernel: Subject, annotate: bool = False) -> str:
    """The SASS of each architecture, with readable names: the entry's own, or compiled aside. As ``ptx`` otherwise."""
    return _of_each(kernel, partial(_sass, annotate=annotate))


def resources(kernel: Subject) -> dict[str, dict[str, int]]:
    """Registers per thread, and bytes of shared, stack and local memory, by architecture.

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


def _ordered(used: Mapping[str, int]) -> dict[str, int]:
    """In the order of binary.resources; a manifest is sorted by name."""
    names = ("registers", "shared_bytes", "stack_bytes", "local_bytes", "spill_bytes")
    return {name: used[name] for name in names}


def _require_gpu(kernel: Subject, what: str) -> None:
    if not kernel.on_gpu:
        raise ArgumentError(f"{kernel.name} is built for the CPU and has no {what}; take its CUDA target.")


def nvcc(archs: Sequence[str], source: Path | str, output: Path | str, stage: str) -> list[str | Path]:
    """nvcc's command with the flags of a build."""
    toolkit, host, _ = toolchain.preflight_cuda()
    gencode = toolchain.gencode_flags(archs, toolkit)
    if stage == "--ptx":
        gencode = [re.sub(r"code=sm_", "code=compute_", flag) for flag in gencode]
    return [toolkit.nvcc, stage, "-ccbin", host.path, *compiler.CUDA_FLAGS, *gencode, source, "-o", output]


def _of_each(kernel: Subject, text_of: Callable[[Subject, str, Path], str]) -> str:
    _require_gpu(kernel, "machine code")
    with tempfile.TemporaryDirectory(prefix="onelaunch-") as folder:
        return "\n".join(_readable(text_of(kernel, arch, Path(folder))) for arch in kernel.archs)


def _compiled(kernel: Subject, arch: str, folder: Path, stage: str) -> Path:
    source, output = folder / f"{kernel.symbol}.cu", folder / f"{kernel.symbol}.{arch}.{stage.lstrip('-')}"
    source.write_text(kernel.source, encoding="utf-8")
    _run(nvcc((arch,), source, output, stage), kernel)
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
    # The rest is debug information as bytes.
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
    """The lines, with each (indentation, file, line number) replaced by that source line unless it repeats the last."""
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
    """The text with names as in the source. Mangled names also carry a hash of the compiled path."""
    return re.sub(r"_Z\w+", lambda found: _demangled(found[0]), text)


def _demangled(name: str) -> str:
    """A mangled name without namespaces and parameters: as much of the Itanium ABI as emitted kernels use."""

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
    # A variable of a function comes after the function's parameters; PTX appends a parameter's number to the name.
    for local in re.finditer(r"E(?=(\d+)([A-Za-z_]))", rest) if name.startswith("_ZZ") else ():
        inner, after = identifiers(rest[local.end() :])
        if not after:
            own += inner
            break
    parameter = re.search(r"_param_\d+$", name)
    # Only characters that PTX allows in a name, so that ptxas accepts the text.
    return "__".join(own) + (parameter[0] if parameter else "")


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
