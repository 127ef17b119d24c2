"""A kernel as files that another project takes: a header, a wrapper and a Python function, without onelaunch."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..errors import ConfigError
from ..spec import layout
from ..spec.config import KernelConfig
from ..spec.fields import FIELDS
from .render import render, render_template

# The interfaces that a wrapper can be written for.
INTERFACES = ("tvm-ffi",)

_INPUTS = {
    "seq_lens": "[bs], the requests' lengths",
    "extend_seq_lens": "[bs], the rows of each request; their sum must fit the destinations",
    "req_pool_indices": "[bs], rows of req_to_token",
    "req_to_token": "[pool rows, W], tokens of KV slots",
}


def export(name: str, config: KernelConfig, version: str) -> dict[str, str]:
    """The files by name: NAME.cuh as it is emitted, NAME.cu (.cpp on the CPU target) and NAME.py for TVM FFI.

    The wrapper checks dtypes, devices, dimensions and the number of rows. It doesn't check that req_pool_indices are in
    range, nor that destinations don't overlap.

    Args:
        name: of the files and of the function; an identifier.
        version: of onelaunch, for the files to name.

    Raises:
        ConfigError: the name is no identifier, or the configuration has no such wrapper.
    """
    if not re.fullmatch(r"[a-z_][a-z0-9_]*", name):
        raise ConfigError(f"the name is {name!r}; it must be an identifier such as refresh_draft. Pass --name.")
    refused = {
        "a copy": config.copies,
        "a checked kernel": config.checked,
        "a kernel with verified writes": config.verified,
        "an audit": config.audits,
        "a kernel with declared fields": any(field not in FIELDS for field in config.fields),
    }
    for kind in (kind for kind, is_one in refused.items() if is_one):
        raise ConfigError(f"{name} is {kind}, which has no wrapper for TVM FFI; export a plain refresh.")
    cuda = config.target == "cuda"
    members = layout.members(config)
    inputs = [member.name for member in members if member.name in _INPUTS]
    tables = bool(config.tables)
    values = {
        "name": name,
        "version": version,
        "symbol": config.symbol,
        "stream": "TVMFFIEnvGetStream(device.device_type, device.device_id)" if cuda else "nullptr",
        "backends": config.num_backends,
        "suffix": "cu" if cuda else "cpp",
        "kind": "cuda" if cuda else "cpp",
        "flags_of": "cuda_cflags" if cuda else "cflags",
        "flags": '["-O3"]' if cuda else '["-O2", "-Wno-unknown-pragmas"]',
        "first": inputs[0],
        "inputs": inputs,
        "tables": tables,
        "row_strides": any(member.type == "table" for member in members),
        "fields": list(config.fields),
        "parameters": list(_parameters(config, inputs)),
        "arguments": [*inputs, *(["max_len"] if tables else []), *(f"list({field})" for field in config.fields)],
        "lines": list(_lines(config, members)),
        "described": list(_described(config, inputs)),
    }
    banner = f"// Exported by onelaunch {version}.\n#pragma once\n\n"
    return {
        f"{name}.cuh": banner + render(config),
        f"{name}.{values['suffix']}": render_template("export/tvm_ffi.cu.j2", values),
        f"{name}.py": render_template("export/tvm_ffi.py.j2", values),
    }


def _parameters(config: KernelConfig, inputs: list[str]) -> Iterator[str]:
    yield from (f"Tensor {name}" for name in inputs)
    if config.tables:
        yield "std::int64_t max_len"
    yield from (f"Array<Tensor> {name}" for name in config.fields)


def _described(config: KernelConfig, inputs: list[str]) -> Iterator[tuple[str, str]]:
    for name in inputs:
        yield name, f"{getattr(config, f'{name}_dtype')} {_INPUTS[name]}"
    if config.tables:
        yield "max_len", "columns from here on aren't written"
    for name in config.fields:
        yield name, f"{config.destinations(name)} tensors, {config.dtype(name)} {FIELDS[name].shape_in(config.mode)}"


def _lines(config: KernelConfig, members: list[layout.Member]) -> Iterator[str]:
    """The statements that fill the parameter block."""
    for member in members:
        name = member.name
        if name in FIELDS:
            field = FIELDS[name]
            rows = "0"
            if field.sized_by_batch:
                per_row = field.per == "row" and config.extend != "variable"
                rows = f"requests * {config.next_n}" if per_row and config.next_n > 1 else "requests"
                rows += f" + {field.extra}" if field.extra else ""
            yield f'put_all(p.{name}, "{name}", {name}, {field.dim}, {rows}, device);'
            if name == "page_indices" and config.vector_bytes == 16:
                yield "check_alignment(page_indices);"
        elif name in _INPUTS:
            rows, dim = ("0", 2) if name == "req_to_token" else ("requests", 1)
            yield f'put(p.{name}, "{name}", {name}, {dim}, {rows}, device);'
        elif name == "sm_count" and config.target == "cpu":
            yield "p.sm_count = 1;"
        elif name in _VALUES:
            yield f"p.{name} = {_VALUES[name]};"
        elif name == "columns":
            yield "p.columns = std::max<std::int64_t>(max_len, 0);"
            yield from (f"p.columns = std::min<std::int64_t>(p.columns, {width});" for width in _widths(config))
        elif name.endswith("_stride"):
            yield f"p.{name} = {name.removesuffix('_stride')}.stride(0);"
        else:
            raise ConfigError(f"{name} is a parameter that the wrapper for TVM FFI doesn't know; leave its field out.")


_VALUES = {
    "batch_size": "requests",
    "req_to_token_width": "req_to_token.size(1)",
    "device": "device.device_id",
    "sm_count": "count_sms(device)",
    "filled_width": "least(real_page_table, 1)",
    "packed_capacity": "least(kv_indices, 0)",
    "num_sms": "paged_mqa_schedule_metadata[0].size(0) - 1",
    "num_sm_parts": "flashmla_metadata[0].size(0)",
}


def _widths(config: KernelConfig) -> Iterator[str]:
    """What bounds the columns: the source, and each table by the tokens that it has columns for."""
    yield "req_to_token.size(1)"
    for name in (name for name in config.tables if FIELDS[name].kind == "table"):
        tokens = config.tokens_per_column(name)
        yield f"least({name}, 1)" + (f" * {tokens}" if tokens > 1 else "")
