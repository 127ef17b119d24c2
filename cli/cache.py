"""onelaunch cache: what is in it, whether it is whole, how large it may be, and how it travels."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Json, sentence, size, write_whole

HELP = """The cache of built kernels.

\b
Examples:
  onelaunch cache list
  onelaunch cache pack -o kernels.tar.gz
  onelaunch cache gc --max-size 500M --older-than 30d
"""

app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)


def _store() -> Any:
    from onelaunch.load.loader import default_store

    return default_store()


def _matching(keys: list[str] | None) -> list[Any]:
    """The entries whose keys begin so; all of them without any."""
    from onelaunch.errors import StoreError

    store = _store()
    known = store.stored_keys()
    chosen = []
    for prefix in keys or [""]:
        found = [key for key in known if key.startswith(prefix)]
        if not found and prefix:
            raise StoreError(f"No entry's key begins with {prefix!r}; `onelaunch cache list` shows them.")
        chosen += found
    entries = (store.find(key) for key in dict.fromkeys(chosen))
    return [entry for entry in entries if entry is not None]


def listed(store: Any) -> list[dict[str, Any]]:
    """What a store holds, the last used first."""
    from onelaunch.cache.store import MANIFEST
    from onelaunch.load.loader import is_edited

    def when(seconds: float) -> str:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))

    return [
        {
            "key": entry.key,
            "symbol": entry.manifest["symbol"],
            "archs": list(entry.manifest.get("archs", entry.manifest.get("resources", ()))),
            "bytes": entry.size,
            "built": when((entry.path / MANIFEST).stat().st_mtime),
            "used": when(store.used(entry.key)),
            "edited": is_edited(entry.manifest),
            "path": str(entry.path),
        }
        for entry in sorted(store.entries(), key=lambda entry: -store.used(entry.key))
    ]


@app.command("path")
def path() -> None:
    """Print the cache's folder.

    \b
    Examples:
      onelaunch cache path
    """
    typer.echo(str(_store().root))


@app.command("list")
def list_entries(as_json: Json = False) -> None:
    """List the entries, the last used first.

    \b
    Examples:
      onelaunch cache list
      onelaunch cache list --json
    """
    store = _store()
    rows = sentence(lambda: listed(store))
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        archs = "+".join(row["archs"]) or "cpu"
        mark = "  edited by hand" if row["edited"] else ""
        typer.echo(f"{row['key'][:16]}  {size(row['bytes']):>8}  {row['used']}  {archs:10}  {row['symbol']}{mark}")
    typer.echo(f"{len(rows)} entries, {size(sum(row['bytes'] for row in rows))}, in {store.root}")


@app.command("info")
def info(keys: Annotated[list[str], typer.Argument(help="The first digits of keys.")]) -> None:
    """Print the manifests of entries: configuration, compilers, command, resources, what a host needs.

    \b
    Examples:
      onelaunch cache info 1f3a
    """
    for entry in sentence(lambda: _matching(keys)):
        typer.echo(json.dumps(dict(entry.manifest), indent=1, sort_keys=True))


@app.command("verify")
def verify() -> None:
    """Read every file of every entry and compare it with its sum. Exit code 1: some were damaged and set aside.

    \b
    Examples:
      onelaunch cache verify
    """
    store = _store()
    before = store.stored_keys()
    good = sentence(lambda: list(store.entries()))
    typer.echo(f"{len(good)} of {len(before)} entries are as they were published, in {store.root}")
    if len(good) < len(before):
        raise typer.Exit(1)


@app.command("gc")
def gc(
    max_size: Annotated[str | None, typer.Option(help="Keep at most this, such as 500M.")] = None,
    older_than: Annotated[str | None, typer.Option(help="Remove what wasn't used for this long, such as 30d.")] = None,
) -> None:
    """Remove the entries that were used longest ago, and what no entry needs.

    Without options it keeps the default bound.

    \b
    Examples:
      onelaunch cache gc
      onelaunch cache gc --max-size 500M --older-than 30d
    """

    def run() -> Any:
        from onelaunch.cache import collect

        limit = max_size or (None if older_than else collect.default_max_size())
        return collect.collect(
            _store(),
            collect.parse_size(limit, "--max-size") if limit else None,
            collect.parse_age(older_than, "--older-than") if older_than else None,
        )

    done = sentence(run)
    typer.echo(
        f"removed {len(done.keys)} entries ({size(done.freed)}) and {done.remains} leftovers; "
        f"{size(done.kept)} of entries are kept"
    )


@app.command("clear")
def clear() -> None:
    """Remove everything from the cache.

    \b
    Examples:
      onelaunch cache clear
    """

    def run() -> int:
        from onelaunch.cache import collect, trust

        store = _store()
        if store.root.exists():
            trust.check_owner(store.root)
        return collect.clear(store)

    typer.echo(f"removed {size(sentence(run))} from {_store().root}")


@app.command("pack")
def pack(
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.")],
    keys: Annotated[list[str] | None, typer.Argument(help="The first digits of keys; all without any.")] = None,
) -> None:
    """Write built kernels to one file, for hosts without a compiler.

    \b
    Examples:
      onelaunch cache pack -o kernels.tar.gz
      onelaunch cache pack -o two.tar.gz 1f3a 82be
    """

    def run() -> Any:
        from onelaunch.load.pack import to_bytes

        entries = _matching(keys)
        write_whole(output, to_bytes(entries))
        return entries

    for entry in sentence(run):
        needs = entry.manifest.get("requires", {})
        typer.echo(f"{entry.key[:16]}  {entry.manifest['symbol']}  needs {_needs(needs)}")
    typer.echo(f"wrote {output}, {size(output.stat().st_size)}")


@app.command("unpack")
def unpack(file: Annotated[Path, typer.Argument(help="A file that pack wrote, from somebody you trust.")]) -> None:
    """Put packed kernels into the cache. Exit code 1: some can't run here, and the reason is printed.

    \b
    Examples:
      onelaunch cache unpack kernels.tar.gz
    """

    def run() -> Any:
        from onelaunch.load.pack import read_file

        return read_file(file, _store())

    done = sentence(run)
    for entry in done.entries:
        typer.echo(f"{entry.key[:16]}  {entry.manifest['symbol']}  {entry.module_path}")
    for name, reason in done.refused:
        typer.echo(f"onelaunch: {name} is refused: {reason}", err=True)
    if done.refused:
        raise typer.Exit(1)


def _needs(needs: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in needs.items()) or "nothing"
