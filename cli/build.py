"""onelaunch build: configurations compiled ahead of time."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import onelaunch
from onelaunch.build import toolchain
from onelaunch.cache import tiers
from onelaunch.errors import ArgumentError, OnelaunchError
from onelaunch.load import prebuild
from onelaunch.load.prebuild import Done, Job
from onelaunch.log import notice, short_key
from onelaunch.variables import POLICY_VARIABLE, RETRY_VARIABLE

from .arguments import arch_option, architectures, chosen, gone_option, json_option, preset_names, target_option


@click.command()
@click.argument("configs", nargs=-1, shell_complete=preset_names)
@gone_option("--preset", "name presets as arguments: `onelaunch build nsa-decode-3`")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE,…",
    help="Settings over each preset. If repeated, one build per occurrence.",
)
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="A TOML file of [[build]] tables.")
@target_option
@arch_option
@click.option("-j", "--jobs", type=click.IntRange(min=1), help="Simultaneous builds; memory also limits them.")
@click.option("--timeout", type=click.FloatRange(min=0.001), help="Seconds that one build may take; default 600.")
@click.option("--retry", is_flag=True, help="Try failed builds again.")
@json_option
def build(
    configs: tuple[str, ...],
    settings: tuple[str, ...],
    config: Path | None,
    target: str | None,
    arch: str | None,
    jobs: int | None,
    timeout: float | None,
    retry: bool,
    as_json: bool,
) -> None:
    """Compile configurations ahead of time into the cache.

    CONFIGS are presets. --set without one changes the default configuration. Several are built at once, in child
    processes.

    ONELAUNCH_JIT=error doesn't apply here: it refuses builds that a call starts. A build that takes longer than
    --timeout is stopped and counts as failed; the next attempt compiles it again. With --json, standard output is one
    document at the end, of every build in the order requested.

    \b
    Examples:
      onelaunch build nsa-decode-3 --arch 90a
      onelaunch build --set num_backends=5 --target cpu
      onelaunch build nsa-decode-3 --set page_size=16 --set page_size=64 --jobs 4
      onelaunch build --config kernels.toml --arch 90a,100a
      onelaunch build nsa-decode-3 --arch 90a --json
    """
    if not (configs or settings or config):
        raise ArgumentError(
            "No configuration is named. Name presets (`onelaunch list` prints them), settings by --set, or a file of "
            "[[build]] tables by --config."
        )
    archs, here = architectures(arch), functools.cache(toolchain.current_architectures)
    wanted = [
        Job(chosen(name, facts, target), archs)
        for name in configs or ([None] if settings else [])
        for facts in settings or ("",)
    ]
    for job in prebuild.read_matrix(config) if config is not None else ():
        changed = job.config.replace(target=target) if target else job.config
        wanted.append(Job(changed, archs or job.archs))
    # The architecture is resolved here, so that the children needn't initialize CUDA.
    wanted = prebuild.distinct(
        [job if job.archs or job.config.target == "cpu" else Job(job.config, here()) for job in wanted]
    )
    with tiers.outliving_this_process():
        if len(wanted) == 1 and timeout is None:
            _here(wanted[0], retry, as_json)
        else:
            _in_children(wanted, jobs, timeout, retry, as_json)


def _here(job: Job, retry: bool, as_json: bool) -> None:
    """Builds one configuration in this process."""
    start, before = time.perf_counter(), time.time()
    with _set({POLICY_VARIABLE: "allow", **({RETRY_VARIABLE: "1"} if retry else {})}):
        try:
            kernel = onelaunch.specialize(job.config, job.archs)
        except OnelaunchError as error:
            if as_json:
                _document([Done(job, "", "", time.perf_counter() - start, False, str(error))])
            raise
    built = prebuild.built_since(kernel.path, before)
    done = Done(job, kernel.key, str(kernel.path), time.perf_counter() - start, built, "")
    if as_json:
        _document([done])
    else:
        click.echo(_row(done.key, done.seconds, job.config.symbol, done.path))


def _in_children(wanted: list[Job], jobs: int | None, timeout: float | None, retry: bool, as_json: bool) -> None:
    at_once = prebuild.workers(jobs, len(wanted))
    start = time.perf_counter()
    notice(f"building {len(wanted)} kernels, {at_once} at once")

    def report(done: Done) -> None:
        if not as_json:
            click.echo(_row(done.key or "failed", done.seconds, done.job.config.symbol, done.error or done.path))

    ended = prebuild.build_all(wanted, at_once, timeout or prebuild.DEFAULT_TIMEOUT_SECONDS, report, retry)
    failed = [done for done in ended if done.error]
    built = sum(done.built for done in ended)
    if as_json:
        _document(ended)
    else:
        click.echo(
            f"{built} built, {len(ended) - built - len(failed)} there before, {len(failed)} failed, in "
            f"{time.perf_counter() - start:.1f} s, {at_once} at once"
        )
    if failed:
        raise click.exceptions.Exit(2)


def _document(ended: Sequence[Done]) -> None:
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
    click.echo(json.dumps({"kernels": kernels, "failed": sum(bool(done.error) for done in ended)}, indent=1))


def _row(key: str, seconds: float, symbol: str, rest: str) -> str:
    return f"{short_key(key):12}  {seconds:6.2f} s  {symbol}  {rest}"


@contextlib.contextmanager
def _set(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
