"""Fixtures: one build cache for the whole run, the devices, and skips on machines without a GPU or a toolkit."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import headers
import hypothesis
import pytest
import torch
from counting import CountingPlan, counting_plan
from onelaunch import KernelConfig
from onelaunch.build import compile as compiler
from onelaunch.build import environment, toolchain
from onelaunch.build.key import Recipe
from onelaunch.cache.store import Store
from onelaunch.errors import ToolchainError
from onelaunch.load import loader
from onelaunch.run import api, refresh, schedules
from processes import Children
from support import ONE_DEVICE
from torch import Tensor
from usable import forget

CACHE_VARIABLE = "ONELAUNCH_CACHE_DIR"
# A folder that keeps builds between runs. Without it every run starts with an empty cache, as on a fresh machine.
TEST_CACHE_VARIABLE = "ONELAUNCH_TEST_CACHE"
NO_DEVICE = "there is no CUDA device"

# Tests that take long and rarely fail; they run when selected (make test-long) or named.
LONG_MARKER = "long: takes long and rarely finds anything; make test-long runs it"
# Measuring line coverage doubles Python's time.
UNCOUNTED_MARKER = "uncounted: many cases that run the same lines, which other tests count for the coverage"

_own_folder = pytest.StashKey[Path]()


def pytest_configure(config: pytest.Config) -> None:
    """Names cache and compiler before any worker starts: workers inherit the environment, so all of them share both."""
    os.environ.pop(loader.POLICY_VARIABLE, None)
    # Slow examples on a busy machine are not failures, and every run must see the same examples.
    hypothesis.settings.register_profile(
        "tests", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("tests")
    config.addinivalue_line("markers", LONG_MARKER)
    config.addinivalue_line("markers", UNCOUNTED_MARKER)
    # The tests' tensors are small: with several threads, in this process or a child, most of the time would go into
    # synchronization and keep the cores from the other workers.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    # Coverage of child processes includes the builders.
    environment.PASSED_ON += tuple(name for name in os.environ if name.startswith("COVERAGE_"))
    if hasattr(config, "workerinput"):
        return
    own = config.stash[_own_folder] = Path(tempfile.mkdtemp(prefix="onelaunch-tests-"))
    cache = Path(os.environ.get(TEST_CACHE_VARIABLE) or own / "cache").resolve()
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.environ[CACHE_VARIABLE] = str(cache)
    os.environ.update(headers.precompiled(own))


def pytest_unconfigure(config: pytest.Config) -> None:
    folder = config.stash.get(_own_folder, None)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "long" not in config.option.markexpr and not any("::" in argument for argument in config.args):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("long")])
        items[:] = [item for item in items if not item.get_closest_marker("long")]
    has_device = torch.cuda.is_available()
    missing: str | None = None
    if any(item.get_closest_marker("nvcc") for item in items):
        try:
            toolchain.find_toolkit()
        except ToolchainError as error:
            missing = str(error).splitlines()[0]
    for item in items:
        if item.get_closest_marker("gpu") and not has_device:
            item.add_marker(pytest.mark.skip(reason=NO_DEVICE))
        elif item.get_closest_marker("two_devices") and torch.cuda.device_count() < 2:
            item.add_marker(pytest.mark.skip(reason=ONE_DEVICE))
        elif item.get_closest_marker("nvcc") and missing is not None:
            item.add_marker(pytest.mark.skip(reason=f"no CUDA toolkit: {missing}"))


def pytest_collection_finish() -> None:
    """Thousands of collected tests live until the end: every full garbage collection would traverse them all."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    # pytest-cov's marker no_cover starts coverage anew, which patches os.fork once more each time.
    tracer = sys.gettrace()
    if tracer is None or not item.get_closest_marker("uncounted"):
        return (yield)
    sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(tracer)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Adds a line below the list of skipped tests: a run without a GPU must not look complete."""
    yield
    skipped = [
        report
        for report in terminalreporter.stats.get("skipped", [])
        if "gpu" in report.keywords and NO_DEVICE in str(report.longrepr)
    ]
    if skipped:
        terminalreporter.write_line(f"GPU tests: {len(skipped)} skipped, because {NO_DEVICE}.")


@pytest.fixture(
    params=[pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)],
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each target in turn, with the index of the tensors' device."""
    return torch.device("cuda", torch.cuda.current_device()) if request.param == "cuda" else torch.device("cpu")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all workers, for files that are made once per session."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def programs(shared: Path) -> Path:
    """The folder of the emulation's programs."""
    folder = shared / "emulation"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    """Starts processes that share a cache. In place of a compiler they copy a finished build."""
    some = Children(tmp_path)
    some.made = loader.load(KernelConfig(fields=("cache_seqlens",), target="cpu"), store=Store()).path.parent
    yield some
    for child in some.started:
        if child.poll() is None:
            child.kill()
            child.wait()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(tmp_path / "cache")


@pytest.fixture
def fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of a fresh process. Temporary stores are made below tmp_path."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    forget(monkeypatch)


@pytest.fixture
def warnings_are_errors() -> Iterator[None]:
    """A warning that a test doesn't expect fails it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def out(device: torch.device) -> Tensor:
    """Eight lengths, not written yet."""
    return torch.full((8,), -7, dtype=torch.int32, device=device)


@pytest.fixture
def counting(out: Tensor) -> CountingPlan:
    return counting_plan(out)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the modules that are built from here on."""
    names: list[str] = []
    build = compiler.build

    def counted(recipe: Recipe, *args: Any, **kwargs: Any) -> compiler.Build:
        names.append(recipe.module)
        return build(recipe, *args, **kwargs)

    monkeypatch.setattr(compiler, "build", counted)
    return names


@pytest.fixture
def quick_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that run many kernels and check only results: a compiler that doesn't optimize, and its own store.

    All other tests optimize as users do, those of presets and of random configurations among them. So do
    these on a machine with a GPU, which has the cores for it.
    """
    if headers.QUICK_VARIABLE in os.environ and not torch.cuda.is_available():
        store = Store(Path(os.environ[CACHE_VARIABLE]) / "quick")
        monkeypatch.setenv("CXX", os.environ[headers.QUICK_VARIABLE])
        monkeypatch.setattr(loader, "default_store", lambda: store)  # otherwise found once per process


@pytest.fixture(autouse=True)
def _no_policy_is_left_behind() -> Iterator[None]:
    """A test that freezes the process, or fills the table of plans, must not decide what the next one sees."""
    frozen = loader._frozen
    yield
    loader._frozen = frozen
    for plans in (refresh.plans, api.copy_plans, schedules.mqa_plans):
        plans.clear()
