"""onelaunch cache: lists, verifies, limits, packs and unpacks the cache."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from onelaunch.cache import collect, tiers, trust
from onelaunch.cache.manifest import MANIFEST, Entry
from onelaunch.cache.store import Store
from onelaunch.errors import StoreError
from onelaunch.load import loader
from onelaunch.log import short_key

from .arguments import dry_run_option, json_option
from .output import size, write_whole


@click.group()
def app() -> None:
    """The cache of built kernels.

    \b
    Examples:
      onelaunch cache list
      onelaunch cache pack -o kernels.tar.gz
      onelaunch cache gc --max-size 500M --older-than 30d
    """


def _matching(keys: Sequence[str]) -> list[Entry]:
    """The entries whose keys begin with one of these; without any, all entries."""
    store = loader.default_store()
    known = store.stored_keys()
    chosen = []
    for prefix in keys or [""]:
        found = [key for key in known if key.startswith(prefix)]
        if not found and prefix:
            raise StoreError(f"No entry's key begins with {prefix!r}; `onelaunch cache list` shows them.")
        chosen += found
    entries = (store.find(key) for key in dict.fromkeys(chosen))
    return [entry for entry in entries if entry is not None]


def listed(store: Store) -> list[dict[str, Any]]:
    """The entries of a store as JSON values, most recently used first."""

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
            "edited": loader.is_edited(entry.manifest),
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
    click.echo(str(loader.default_store().root))


@app.command("list")
@json_option
def list_entries(as_json: bool) -> None:
    """List the entries, most recently used first.

    \b
    Examples:
      onelaunch cache list
      onelaunch cache list --json
    """
    store = loader.default_store()
    rows = listed(store)
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        archs = "+".join(row["archs"]) or "cpu"
        mark = "  edited by hand" if row["edited"] else ""
        click.echo(
            f"{short_key(row['key'])}  {size(row['bytes']):>8}  {row['used']}  {archs:10}  {row['symbol']}{mark}"
        )
    click.echo(f"{len(rows)} entries, {size(sum(row['bytes'] for row in rows))}, in {store.root}")


@app.command("info")
@click.argument("keys", nargs=-1, required=True)
def info(keys: tuple[str, ...]) -> None:
    """Print the manifests of entries, as JSON.

    A manifest has configuration, compilers, command, resources and the requirements of a host.

    KEYS are the first digits of keys.

    \b
    Examples:
      onelaunch cache info 1f3a
    """
    for entry in _matching(keys):
        click.echo(json.dumps(dict(entry.manifest), indent=1, sort_keys=True))


@app.command("verify")
@json_option
def verify(as_json: bool) -> None:
    """Compare every file of every entry with its checksum.

    Damaged entries are set aside. Exit code 1: there were some.

    \b
    Examples:
      onelaunch cache verify
      onelaunch cache verify --json
    """
    store = loader.default_store()
    before = store.stored_keys()
    good = [entry.key for entry in store.entries()]
    damaged = [key for key in before if key not in good]
    if as_json:
        click.echo(json.dumps({"folder": str(store.root), "whole": good, "damaged": damaged}, indent=1))
    else:
        click.echo(f"{len(good)} of {len(before)} entries are whole, in {store.root}")
    if damaged:
        raise click.exceptions.Exit(1)


@app.command("gc")
@click.option("--max-size", metavar="SIZE", help="Keep at most this, such as 500M.")
@click.option("--older-than", metavar="AGE", help="Remove entries that weren't used for this long, such as 30d.")
@dry_run_option
@json_option
def gc(max_size: str | None, older_than: str | None, dry_run: bool, as_json: bool) -> None:
    """Remove the least recently used entries, and leftovers.

    Without options it applies the default limit. Leftovers are files of killed processes, and old logs.

    \b
    Examples:
      onelaunch cache gc
      onelaunch cache gc --max-size 500M --older-than 30d --dry-run
    """
    limit = max_size or (None if older_than else collect.default_max_size())
    done = collect.collect(
        loader.default_store(),
        collect.parse_size(limit, "--max-size") if limit else None,
        collect.parse_age(older_than, "--older-than") if older_than else None,
        dry_run,
    )
    if as_json:
        click.echo(json.dumps({**dataclasses.asdict(done), "dry_run": dry_run}, indent=1))
        return
    if dry_run:
        for key in done.keys:
            click.echo(short_key(key))
    click.echo(
        f"{_removed(dry_run)} {len(done.keys)} entries ({size(done.freed)}) and {done.remains} leftovers; "
        f"{size(done.kept)} of entries {'would remain' if dry_run else 'remain'}"
    )


@app.command("clear")
@dry_run_option
@json_option
def clear(dry_run: bool, as_json: bool) -> None:
    """Remove everything from the cache that no process is using.

    \b
    Examples:
      onelaunch cache clear --dry-run
      onelaunch cache clear
    """
    store = loader.default_store()
    if store.root.exists():
        trust.check_owner(store.root)
    freed = collect.clear(store, dry_run)
    if as_json:
        click.echo(json.dumps({"folder": str(store.root), "freed": freed, "dry_run": dry_run}, indent=1))
    else:
        click.echo(f"{_removed(dry_run)} {size(freed)} from {store.root}")


@app.command("pack")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, metavar="FILE", help="The file to write."
)
@click.argument("keys", nargs=-1)
@json_option
def pack(output: Path, keys: tuple[str, ...], as_json: bool) -> None:
    """Write built kernels to one file, for hosts without a compiler.

    KEYS are the first digits of keys; without any, all are written.

    \b
    Examples:
      onelaunch cache pack -o kernels.tar.gz
      onelaunch cache pack -o two.tar.gz 1f3a 82be
    """
    # Imported here for start-up time: archives are for two verbs only.
    from onelaunch.load.pack import to_bytes

    entries = _matching(keys)
    write_whole(output, to_bytes(entries))
    if as_json:
        packed = [
            {"key": entry.key, "symbol": entry.manifest["symbol"], "requires": entry.manifest.get("requires", {})}
            for entry in entries
        ]
        click.echo(json.dumps({"file": str(output), "bytes": output.stat().st_size, "entries": packed}, indent=1))
        return
    for entry in entries:
        needs = entry.manifest.get("requires", {})
        click.echo(f"{short_key(entry.key)}  {entry.manifest['symbol']}  needs {_needs(needs)}")
    click.echo(f"wrote {output}, {size(output.stat().st_size)}")


@app.command("unpack")
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def unpack(file: Path, as_json: bool) -> None:
    """Put packed kernels into the cache.

    Exit code 1: some can't run here, and the reason is printed.

    FILE is one that `pack` wrote. Kernels are programs: unpack only packs that you trust.

    \b
    Examples:
      onelaunch cache unpack kernels.tar.gz
    """
    # Imported here for start-up time: archives are for two verbs only.
    from onelaunch.load.pack import read_file

    with tiers.outliving_this_process():
        done = read_file(file, loader.default_store())
    if as_json:
        unpacked = [
            {"key": entry.key, "symbol": entry.manifest["symbol"], "path": str(entry.module_path)}
            for entry in done.entries
        ]
        click.echo(json.dumps({"entries": unpacked, "refused": dict(done.refused)}, indent=1))
    for entry in () if as_json else done.entries:
        click.echo(f"{short_key(entry.key)}  {entry.manifest['symbol']}  {entry.module_path}")
    for name, reason in done.refused:
        click.echo(f"onelaunch: {name} is refused: {reason}", err=True)
    if done.refused:
        raise click.exceptions.Exit(1)


def _removed(dry_run: bool) -> str:
    return "would remove" if dry_run else "removed"


def _needs(needs: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in needs.items()) or "nothing"
