"""onelaunch build: configurations compiled ahead of time, and onelaunch explain: why one would be."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Arch, Json, Target, architectures, chosen, sentence


def build(
    configs: Annotated[list[str] | None, typer.Argument(help="Presets.")] = None,
    presets: Annotated[list[str] | None, typer.Option("--preset", help="A preset; may be repeated.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Facts as key=value,…; over each preset. Repeated, one build each."),
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="A TOML file of [[build]] tables.")] = None,
    target: Target = None,
    arch: Arch = None,
    jobs: Annotated[
        int | None, typer.Option("-j", "--jobs", min=1, help="Builds at once; memory bounds it too.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds that one build may take; default 600.")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Compile again what failed before.")] = False,
    as_json: Json = False,
) -> None:
    """Compile configurations ahead of time into the cache. Several are built at once, in child processes.

    ONELAUNCH_JIT=error doesn't refuse this: it is for builds that a call would start. A build that takes too long is
    ended and counts as failed; the next attempt compiles it again. With --json standard output is one document, of
    every build in the order asked for, at the end.

    \b
    Examples:
      onelaunch build nsa-decode-3 --arch 90a
      onelaunch build --set num_backends=5 --target cpu
      onelaunch build --preset nsa-decode-3 --set page_size=16 --set page_size=64 --jobs 4 --timeout 120
      onelaunch build --config kernels.toml --arch 90a,100a
      onelaunch build nsa-decode-3 --arch 90a --json
    """

    def run() -> None:
        from onelaunch.build import toolchain
        from onelaunch.load import prebuild

        archs, here = architectures(arch), functools.cache(toolchain.current_architectures)
        names: list[str | None] = [*(configs or ()), *(presets or ())]
        wanted = [
            prebuild.Job(chosen(name, facts, target), archs)
            for name in names or ([None] if config is None or settings else [])
            for facts in settings or ("",)
        ]
        for job in prebuild.read_matrix(config) if config is not None else ():
            changed = job.config.replace(target=target) if target else job.config
            wanted.append(prebuild.Job(changed, archs or job.archs))
        # Settled here: the children don't ask the GPU.
        wanted = prebuild.distinct(
            [job if job.archs or job.config.target == "cpu" else prebuild.Job(job.config, here()) for job in wanted]
        )
        if len(wanted) == 1 and timeout is None:
            _here(wanted[0], retry, as_json)
        else:
            _in_children(wanted, jobs, timeout, retry, as_json)

    sentence(run)


def explain(
    config: Annotated[str | None, typer.Argument(help="A preset; without one, the defaults.")] = None,
    settings: Annotated[str | None, typer.Option("--set", help="Facts as key=value,…; over the preset.")] = None,
    target: Target = None,
    arch: Arch = None,
    as_json: Json = False,
) -> None:
    """Say whether a configuration is in the cache; if not, what the nearest build has that differs. Exit code 1: miss.

    \b
    Examples:
      onelaunch explain nsa-decode-3 --arch 90a
      onelaunch explain --set num_backends=5 --json
    """

    def run() -> Any:
        from onelaunch.build import toolchain
        from onelaunch.inspect.explain import explain as look

        wanted = chosen(config, settings, target)
        archs = () if wanted.target == "cpu" else architectures(arch) or toolchain.current_architectures()
        return look(wanted, archs)

    found = sentence(run)
    if as_json:
        facts = {
            "hit": str(found.hit.path) if found.hit else None,
            "key": found.key,
            "nearest": str(found.nearest.path) if found.nearest else None,
            "differs": {what: {"nearest": was, "wanted": wanted} for what, was, wanted in found.differs},
            "failed": found.failed,
            "looked_in": found.looked_in,
            "missing": found.missing,
        }
        typer.echo(json.dumps(facts, indent=1))
    else:
        typer.echo(str(found))
    if found.hit is None:
        raise typer.Exit(1)


def _here(job: Any, retry: bool, as_json: bool) -> None:
    """One configuration needs no other process."""
    import onelaunch
    from onelaunch.cache import failures
    from onelaunch.errors import OnelaunchError
    from onelaunch.load import loader, prebuild

    start, before = time.perf_counter(), time.time()
    with _set({loader.POLICY_VARIABLE: "allow", **({failures.RETRY_VARIABLE: "1"} if retry else {})}):
        try:
            kernel = onelaunch.specialize(job.config, job.archs)
        except OnelaunchError as error:
            if as_json:
                _document([prebuild.Done(job, "", "", time.perf_counter() - start, False, str(error))])
            raise
    built = prebuild.built_since(kernel.path, before)
    done = prebuild.Done(job, kernel.key, str(kernel.path), time.perf_counter() - start, built, "")
    if as_json:
        _document([done])
    else:
        typer.echo(_row(done.key, done.seconds, job.config.symbol, done.path))


def _in_children(wanted: list[Any], jobs: int | None, timeout: float | None, retry: bool, as_json: bool) -> None:
    from onelaunch.load import prebuild
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    at_once = prebuild.workers(jobs, len(wanted))
    start = time.perf_counter()
    columns = (TextColumn("building"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=len(wanted))

        def report(done: Any) -> None:
            progress.advance(task)
            if as_json:
                return
            text = done.error or done.path
            key = done.key if done.key else "failed"
            # Through the progress bar's console, which moves the bar out of the way.
            (progress.console.print if sys.stderr.isatty() else _plain)(
                _row(key, done.seconds, done.job.config.symbol, text)
            )

        ended = prebuild.build_all(wanted, at_once, timeout or prebuild.DEFAULT_TIMEOUT_SECONDS, report, retry)
    failed = [done for done in ended if done.error]
    built = sum(done.built for done in ended)
    if as_json:
        _document(ended)
    else:
        typer.echo(
            f"{built} built, {len(ended) - built - len(failed)} there before, {len(failed)} failed, in "
            f"{time.perf_counter() - start:.1f} s, {at_once} at once"
        )
    if failed:
        raise typer.Exit(2)


def _document(ended: list[Any]) -> None:
    kernels = [
        {
            "symbol": done.job.config.symbol,
            "configuration": done.job.config.to_dict(),
            "archs": list(done.job.archs or ()),
            "key": done.key,
            "path": done.path,
            "seconds": round(done.seconds, 3),
            "built": done.built,
            "error": done.error,
        }
        for done in ended
    ]
    typer.echo(json.dumps({"kernels": kernels, "failed": sum(bool(done.error) for done in ended)}, indent=1))


def _row(key: str, seconds: float, symbol: str, rest: str) -> str:
    return f"{key[:16]:16}  {seconds:6.2f} s  {symbol}  {rest}"


def _plain(text: str) -> None:
    typer.echo(text)


@contextlib.contextmanager
def _set(variables: dict[str, str]) -> Iterator[None]:
    kept = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
