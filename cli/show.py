"""onelaunch show: what a kernel is, from its source to its machine code; onelaunch diff: what two have that differs."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import (
    Arch,
    Config,
    Settings,
    Target,
    kernel,
    preset_names,
    print_text,
    sentence,
    write_commands,
    write_whole,
)


class What(StrEnum):
    cuda = "cuda"
    ptx = "ptx"
    sass = "sass"
    resources = "resources"
    binding = "binding"
    command = "command"
    key = "key"


class Compared(StrEnum):
    cuda = "cuda"
    ptx = "ptx"
    sass = "sass"
    resources = "resources"


# How each is highlighted; the GNU assembler's rules fit SASS well enough.
LEXERS = {
    "cuda": "cuda",
    "ptx": "ptx",
    "sass": "gas",
    "resources": "text",
    "binding": "cpp",
    "command": "bash",
    "key": "text",
}


def show(
    config: Config = None,
    what: Annotated[What, typer.Option(help="What to print.")] = What.cuda,
    settings: Settings = None,
    target: Target = None,
    arch: Arch = None,
    annotate: Annotated[
        bool, typer.Option("--annotate", help="With the source line that PTX and SASS come from.")
    ] = False,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="PATH", help="Write to this file, or to <symbol>.cu in a FOLDER/."),
    ] = None,
    clangd: Annotated[
        bool, typer.Option("--clangd", help="With -o: write a compile_commands.json beside it, for editors.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON: resources, command and key.")] = False,
) -> None:
    """Print what a kernel is: the emitted CUDA or, with --what, its machine code, resources, binding, commands or key.

    PTX is compiled aside; SASS and resources too, if the kernel isn't in the cache. Nothing is put into the cache.

    To run an edited kernel, write it to a folder, edit it, and name the folder in ONELAUNCH_OVERRIDE_DIR. Every
    output then says so, and `onelaunch replay` checks it as it checks any kernel.

    \b
    Examples:
      onelaunch show nsa-decode-3
      onelaunch show --set num_backends=5,page_size=16 --what sass --annotate
      onelaunch show nsa-decode-3 --what resources --arch 90a --json
      onelaunch show nsa-decode-3 -o edited/ --clangd
    """

    def run() -> str:
        from onelaunch.errors import ArgumentError
        from onelaunch.inspect import kernels as inspect

        if as_json and what not in (What.resources, What.command, What.key):
            raise ArgumentError(f"--json is for resources, command and key; {what} is text.")
        if clangd and (output is None or what != What.cuda):
            raise ArgumentError("--clangd describes the file that -o writes, and reads CUDA: give -o, and no --what.")
        found = kernel(config, settings, target, arch)
        if as_json:
            text = json.dumps(inspect.facts(found, what), indent=1) + "\n"
        else:
            text = inspect.view(found, what, annotate)
        if output is None:
            return text
        path = Path(output)
        if path.is_dir() or output.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
            path = path / f"{found.symbol}.{'cu' if what == What.cuda else what}"
        write_whole(path, text)
        if clangd:
            write_commands(path.parent)
        return ""

    print_text(sentence(run), "json" if as_json else LEXERS[what])


def diff(
    one: Annotated[
        str,
        typer.Argument(
            metavar="A", help="As CONFIG of `onelaunch show`, or key=value,… of --set.", autocompletion=preset_names
        ),
    ],
    other: Annotated[str, typer.Argument(metavar="B", help="Likewise.", autocompletion=preset_names)],
    what: Annotated[Compared, typer.Option(help="What to compare.")] = Compared.cuda,
    target: Target = None,
    arch: Arch = None,
    context: Annotated[int, typer.Option("-U", "--unified", min=0, help="Equal lines around a difference.")] = 3,
) -> None:
    """Print what changes from one kernel to another: keys, symbols and addresses aside, which differ anyway.

    Exit codes, as those of diff: 0 for no difference, 1 for some, 2 if they can't be compared.

    \b
    Examples:
      onelaunch diff nsa-decode-3 nsa-decode-3-page16
      onelaunch diff nsa-decode-3 num_backends=3,unroll=4 --what sass
      onelaunch diff nsa-decode-1 nsa-decode-7 --what resources
    """

    def run() -> str:
        from onelaunch.inspect import kernels as inspect

        def subject(text: str) -> Any:
            # A setting has an equals sign, which no preset and no key has.
            is_settings = "=" in text and not Path(text).exists()
            return kernel(None if is_settings else text, text if is_settings else None, target, arch)

        return inspect.difference(subject(one), subject(other), what, context)

    difference = sentence(run)
    if not difference:
        typer.echo(f"no difference in {what}")
        return
    print_text(difference, "diff")
    raise typer.Exit(1)
