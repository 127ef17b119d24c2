"""onelaunch show: a kernel's source, machine code, resources, commands and key."""

from __future__ import annotations

import json
from pathlib import Path

import click
from onelaunch.errors import ArgumentError
from onelaunch.inspect import editors, views
from onelaunch.inspect.kernels import Subject, find

from .arguments import arch_option, architectures, config_argument, html_option, settings_option, target_option
from .output import write_whole


@click.command()
@config_argument
@click.option("--what", type=click.Choice(views.VIEWS), default="cuda", help="What to print.")
@settings_option
@target_option
@arch_option
@click.option("--annotate", is_flag=True, help="Add the source lines of PTX and SASS.")
@click.option("-o", "--output", metavar="PATH", help="Write to this file, or to <symbol>.cu in a FOLDER/.")
@click.option("--clangd", is_flag=True, help="With -o: write a compile_commands.json beside it, for editors.")
@click.option("--json", "as_json", is_flag=True, help="As JSON: resources, command and key.")
@html_option
def show(
    config: str | None,
    what: str,
    settings: str | None,
    target: str | None,
    arch: str | None,
    annotate: bool,
    output: str | None,
    clangd: bool,
    as_json: bool,
    html: Path | None,
) -> None:
    """Print what a kernel is: the emitted CUDA or, with --what, its machine code, resources, binding, commands or key.

    CONFIG is a preset, the first digits of an entry's key, an entry's folder, or a file of emitted CUDA.
    Without it, the default configuration.

    --html writes one page for a browser, which needs no network: source beside SASS beside PTX, where the lines of one
    source line are highlighted together.

    PTX is compiled in a temporary folder; SASS and resources too, if the kernel isn't in the cache. The cache doesn't
    change.

    To run an edited kernel, write it to a folder, edit it, and name the folder in ONELAUNCH_OVERRIDE_DIR. Every
    output then says so, and `onelaunch replay` checks it as it checks any kernel.

    \b
    Examples:
      onelaunch show nsa-decode-3
      onelaunch show --set num_backends=5,page_size=16 --what sass --annotate
      onelaunch show nsa-decode-3 --what resources --arch 90a --json
      onelaunch show nsa-decode-3 -o edited/ --clangd
      onelaunch show nsa-decode-3 --html kernel.html
    """
    if html is not None:
        if what != "cuda" or annotate or output is not None or clangd or as_json:
            raise ArgumentError("--html shows source, SASS and PTX in one page; give no other option of output.")
        # Imported here for start-up time: it loads the templates' engine.
        from onelaunch.inspect.page import kernel_page

        write_whole(html, kernel_page(kernel(config, settings, target, arch)))
        return
    if as_json and what not in ("resources", "command", "key"):
        raise ArgumentError(f"--json is for resources, command and key; {what} is text.")
    if clangd and (output is None or what != "cuda"):
        raise ArgumentError("--clangd describes the file that -o writes, and reads CUDA: give -o, and no --what.")
    found = kernel(config, settings, target, arch)
    if as_json:
        text = json.dumps(views.facts(found, what), indent=1) + "\n"
    else:
        text = views.view(found, what, annotate)
    if output is None:
        click.echo(text, nl=False)
        return
    path = Path(output)
    if path.is_dir() or output.endswith("/"):
        path.mkdir(parents=True, exist_ok=True)
        path = path / f"{found.symbol}.{'cu' if what == 'cuda' else what}"
    write_whole(path, text)
    if clangd:
        write_whole(path.parent / editors.COMMANDS, editors.commands_of_folder(path.parent))


def kernel(name: str | None, settings: str | None, target: str | None, arch: str | None) -> Subject:
    """The kernel that a verb's arguments name. A line on standard error says if it was edited by hand."""
    found = find(name, settings, target, architectures(arch))
    if found.edited is not None:
        click.echo(f"onelaunch: {found.symbol} is edited by hand: {found.edited}", err=True)
    return found
