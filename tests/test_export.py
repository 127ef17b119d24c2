"""Kernels exported for another project: compiled and run through apache-tvm-ffi, without onelaunch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from onelaunch import MetadataBuffers, preset, reference
from onelaunch.build import toolchain
from onelaunch.cli.main import app
from onelaunch.spec.fields import FIELDS
from onelaunch.spec.presets import PRESETS

# Rows of 332 elements begin at multiples of 16 bytes.
WIDTH, POOL, BATCH = 332, 12, 5
# A preset for each kind of parameter. Each takes ten seconds or more to compile.
NAMES = ["nsa-target-verify-3-schedule", "flashinfer-decode-3"]
MORE = ["nsa-decode-3", "nsa-draft-extend-3-variable", "flashmla-dense-decode-3", "nsa-decode-3-kpool"]


def with_ninja() -> dict[str, str]:
    """TVM FFI builds with the ninja on PATH."""
    return {**os.environ, "PATH": os.pathsep.join([str(toolchain.find_ninja().parent), os.environ["PATH"]])}


def export(folder: Path, *words: str) -> Any:
    return CliRunner().invoke(app, ["export", *words, "--for", "tvm-ffi", "-o", str(folder)])


def buffers(name: str, device: str) -> list[MetadataBuffers]:
    config = preset(name)
    rows = BATCH * max(config.next_n, 4 if config.extend == "variable" else 1)
    sizes = {
        "page_indices": (rows, WIDTH),
        "real_page_table": (rows, -(-WIDTH // config.page_size)),
        "pooled_real_page_table": (rows, -(-WIDTH // (config.page_size * config.index_kpool))),
        "kv_indices": (BATCH * WIDTH,),
        "paged_mqa_schedule_metadata": (17, 2),
        "flashmla_metadata": (9, 8),
    }
    return [
        MetadataBuffers(
            **{
                field: torch.full(sizes.get(field, (rows + FIELDS[field].extra,)), -7, dtype=torch.int32, device=device)
                for field in config.fields
            }
        )
        for _ in range(config.num_backends)
    ]


def inputs(name: str, device: str) -> dict[str, torch.Tensor]:
    found = {
        "seq_lens": torch.tensor([5, 0, 300, 64, 129], device=device),
        "req_pool_indices": torch.tensor([3, 1, 7, 11, 2], device=device),
        "req_to_token": torch.randint(0, 1 << 20, (POOL, WIDTH), dtype=torch.int32, device=device),
    }
    if preset(name).extend == "variable":
        found["extend_seq_lens"] = torch.tensor([1, 0, 4, 2, 3], device=device)
    return found


def check(folder: Path, name: str, device: str) -> None:
    """Runs the exported function in a process that can't import onelaunch, and compares with the reference."""
    config, given, got, wanted = preset(name), inputs(name, device), buffers(name, device), buffers(name, device)
    function = name.replace("-", "_")
    fields = {field: [getattr(each, field) for each in got] for field in config.fields}
    torch.save({"inputs": given, "fields": fields}, folder / "given.pt")
    code = f"""
import sys
sys.modules["onelaunch"] = None
sys.path.insert(0, {str(folder)!r})
import torch
from {function} import {function}
given = torch.load({str(folder / "given.pt")!r})
{function}(**given["inputs"], **given["fields"])
torch.save(given["fields"], {str(folder / "got.pt")!r})
short = {{**given["inputs"], "seq_lens": given["inputs"]["seq_lens"].to(torch.int16)}}
try:
    {function}(**short, **given["fields"])
except TypeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], env=with_ninja(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "seq_lens must be of the dtype that the kernel is made for." in done.stdout
    reference.refresh(
        wanted,
        **given,
        mode=config.mode,
        next_n=config.next_n,
        index_topk=config.index_topk,
        page_size=config.page_size,
        index_kpool=config.index_kpool,
        page_fill=config.page_fill,
        extent=config.extent,
        seqlen_offsets=config.seqlen_offsets or None,
        schedule_per=config.schedule_per,
    )
    for field, tensors in torch.load(folder / "got.pt").items():
        for number, tensor in enumerate(tensors):
            torch.testing.assert_close(tensor, getattr(wanted[number], field), rtol=0, atol=0, msg=f"{field} {number}")


@pytest.mark.parametrize("name", [*NAMES, *(pytest.param(name, marks=pytest.mark.long) for name in MORE)])
def test_it_runs_without_onelaunch(name: str, tmp_path: Path) -> None:
    result = export(tmp_path, name, "--target", "cpu")
    assert result.exit_code == 0, result.output
    stem = name.replace("-", "_")
    assert result.stdout.splitlines() == [f"wrote {tmp_path / stem}.{suffix}" for suffix in ("cuh", "cpp", "py")]
    check(tmp_path, name, "cpu")


@pytest.mark.gpu
def test_it_runs_on_a_gpu(tmp_path: Path) -> None:
    assert export(tmp_path, "nsa-decode-3").exit_code == 0
    check(tmp_path, "nsa-decode-3", "cuda")


@pytest.mark.nvcc
def test_the_wrapper_compiles_for_a_gpu(tmp_path: Path) -> None:
    import tvm_ffi.libinfo

    assert export(tmp_path, "nsa-decode-3").exit_code == 0
    toolkit, host, _ = toolchain.preflight_cuda()
    include = [
        f"-I{path}" for path in (tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path())
    ]
    command = [str(toolkit.nvcc), "-ccbin", str(host.path), "-std=c++17", "-arch=sm_90a", "-c", *include]
    subprocess.run([*command, "nsa_decode_3.cu", "-o", "out.o"], cwd=tmp_path, check=True, capture_output=True)


def test_what_every_preset_exports() -> None:
    """Each preset has a wrapper, or a sentence that says why it has none."""
    for name, config in PRESETS.items():
        with CliRunner().isolated_filesystem():
            result = export(Path("out"), name)
            if config.copies or config.checked or config.declare:
                assert result.exit_code == 2
                assert "has no wrapper for TVM FFI; export a plain refresh." in result.stderr
                assert not Path("out").exists()
            else:
                assert result.exit_code == 0, result.output
                header = next(Path("out").glob("*.cuh")).read_text()
                assert header.startswith("// Exported by onelaunch 0.")
                assert f"// key {config.key}" in header


def test_tables_of_another_alignment_are_refused(tmp_path: Path) -> None:
    """The kernel has 16-byte stores, so the wrapper refuses other alignments before it launches."""
    words = ["--set", "num_backends=2,fields=page_indices", "--target", "cpu", "--name", "two"]
    assert export(tmp_path, *words).exit_code == 0
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import torch
from two import two
new = lambda *shape: torch.zeros(shape, dtype=torch.int32)
tables = [new(4, 332), new(4 * 332 + 1)[1:].view(4, 332)]
two(torch.tensor([3]), torch.tensor([0]), new(2, 332), page_indices=tables)
"""
    done = subprocess.run([sys.executable, "-c", code], env=with_ninja(), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert (
        "page_indices must have one alignment to 16 bytes; export the kernel with --set vector_bytes=4." in done.stderr
    )


def test_a_name_that_is_none(tmp_path: Path) -> None:
    result = export(tmp_path / "out", "nsa-decode-3", "--name", "a-b")
    assert result.exit_code == 2
    assert "the name is 'a-b'; it must be an identifier such as refresh_draft. Pass --name." in result.stderr
    assert not (tmp_path / "out").exists()
