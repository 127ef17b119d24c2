"""The plugin that attaches onelaunch when SGLang makes its backends and runners, on SGLang's own classes."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import objects
import pytest
import runner_objects
from onelaunch.integrations import plugin
from pairs import backend

pytestmark = pytest.mark.usefixtures("quick_builds", "detached")


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """SGLang's hook registry, emptied before and after. What the plugin hooks is restored."""
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.srt.speculative.draft_utils import DraftBackendFactory
    from sglang.srt.speculative.eagle_worker_v2 import EAGLEWorkerV2

    for variable in (plugin.SGLANG_VARIABLE, plugin.SELECTED_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    for owner, name in (
        (DraftBackendFactory, "create_decode_backend"),
        (DraftBackendFactory, "create_draft_extend_backend"),
        (ModelRunner, "init_attention_backends"),
        (EAGLEWorkerV2, "init_cuda_graphs"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    HookRegistry.reset()
    yield HookRegistry
    HookRegistry.reset()


def test_the_plugin_does_nothing_unless_it_is_asked(hooks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.install()
    assert not hooks._hooks
    for variable, value, count in (
        (plugin.SELECTED_VARIABLE, "another, onelaunch", 4),
        (plugin.SGLANG_VARIABLE, "1", 4),
        (plugin.SGLANG_VARIABLE, "backends", 3),
        (plugin.SGLANG_VARIABLE, "0", 0),
    ):
        monkeypatch.setenv(variable, value)
        plugin.install()
        assert len(hooks._hooks) == count, value
        hooks.reset()


def test_the_engine_loads_the_plugin_and_attaches_what_its_factory_makes(
    hooks: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sglang.srt import plugins
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.speculative.draft_utils import DraftBackendFactory

    made = iter([backend("fa3"), SimpleNamespace(), None])
    monkeypatch.setattr(DraftBackendFactory, "create_decode_backend", lambda self: next(made))
    monkeypatch.setattr(ModelRunner, "init_attention_backends", lambda self: None)
    monkeypatch.setattr(plugins, "_plugins_loaded", False)
    monkeypatch.setenv(plugin.SELECTED_VARIABLE, "onelaunch")
    plugins.load_plugins()
    factory = object.__new__(DraftBackendFactory)
    with caplog.at_level(logging.INFO, "onelaunch"):
        assert "init_forward_metadata_out_graph" in vars(factory.create_decode_backend())
        assert vars(factory.create_decode_backend()) == {}
        assert factory.create_decode_backend() is None
    assert "FlashAttentionMultiStepBackend: one launch refreshes" in caplog.text
    assert "attach backend is a SimpleNamespace; allowed: Deepseek" in caplog.text

    runner = SimpleNamespace(attn_backend=backend("dsa", 0), decode_attn_backend=None)
    ModelRunner.init_attention_backends(runner)
    assert "init_forward_metadata_out_graph" in vars(runner.attn_backend)


def test_backends_that_only_choose_between_others_have_these_attached() -> None:
    """Such a backend holds one for prefill and one for decoding, or one for some of the layers."""
    from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend

    one, other = backend("fa3", 0), backend("dsa", 0)
    runner = objects.model_runner(objects.token_pool(64, seed=1), page=64, mla=True, draft=False)
    hybrid = HybridAttnBackend(runner, one, other)
    plugin._initialized(None, SimpleNamespace(attn_backend=hybrid, decode_attn_backend=other))
    for made in (one, other):
        assert "init_forward_metadata_out_graph" in vars(made)
    assert "init_forward_metadata_out_graph" not in vars(hybrid)
    linear = SimpleNamespace(full_attn_backend=backend("fa3", 0))
    plugin._made(linear)
    assert "init_forward_metadata_out_graph" in vars(linear.full_attn_backend)


def test_the_plugin_names_the_backend_that_is_not_served(caplog: pytest.LogCaptureFixture) -> None:
    single = backend("flashinfer", 0)
    assert isinstance(single.decode_backend, str), "decode_backend is a name here, not a backend to attach"
    plugin._made(single)
    assert "init_forward_metadata_out_graph" in vars(single)
    single = backend("flashinfer_mla").attn_backends[0]
    with caplog.at_level(logging.INFO, "onelaunch"):
        plugin._made(single)
    (said,) = caplog.messages
    assert said.startswith("attach backend is a FlashInferMLAAttnBackend; allowed: Deepseek")


def test_the_plugin_never_raises_and_imports_no_torch() -> None:
    code = (
        "import sys; from onelaunch.integrations import plugin; plugin.install(); "
        "print(sorted({'torch', 'jinja2', 'sglang'} & set(sys.modules)))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ONELAUNCH", "SGLANG"))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_plugin_attaches_the_runners_of_a_worker(caplog: pytest.LogCaptureFixture) -> None:
    pool = objects.token_pool(64, seed=64)
    draft = runner_objects.draft_runner("fa3", pool, 64, 3)
    verify = runner_objects.verify_runner("fa3", pool, 64, 4)
    worker = SimpleNamespace(
        _draft_worker=SimpleNamespace(cuda_graph_runner=draft, cuda_graph_runner_for_draft_extend=None),
        _target_worker=SimpleNamespace(model_runner=SimpleNamespace(decode_cuda_graph_runner=verify)),
    )
    with caplog.at_level(logging.INFO, "onelaunch"):
        plugin._captured(None, worker)
    assert "EAGLEDraftCudaGraphRunner: one launch writes the draft step's seq_lens" in caplog.text
    assert "DecodeCudaGraphRunner: one launch writes verification's seq_lens" in caplog.text
