"""Every preset on small and awkward shapes, against the reference: for pytest, and alone under compute-sanitizer."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from onelaunch import PRESETS, KernelConfig, MetadataBuffers, bind
from onelaunch.run.copy_plan import CopyPlan
from onelaunch.run.destinations import Destinations, backend_field
from onelaunch.spec import reference
from onelaunch.spec.fields import FIELDS
from torch import Tensor

POISON = -858993460

# Too few indices for the largest batch, which then ends within a request.
SIZES = {"paged_mqa_schedule_metadata": (133, 2), "flashmla_metadata": (132, 8), "kv_indices": (70_000,)}
# Batch, table width: the widths give odd row strides, the batches cross a warp and a block.
SHAPES = ((1, 130), (3, 1031), (33, 517), (257, 70), (300, 1291))


def build(config: KernelConfig, bs: int, width: int, device: torch.device, seed: int = 0) -> dict[str, Any]:
    """Poisoned destinations and random inputs for a configuration.

    Args:
        config: operation precompute_and_broadcast, or copy.
        bs: requests; the destinations have room for two more, and two rows more.
        width: columns of page_indices and of the pool.
    """
    generator = torch.Generator().manual_seed(seed)
    extends = torch.tensor([(2, 0, 1, 5, 0)[i % 5] for i in range(bs)], dtype=torch.int64)
    # A copy's rows are any number.
    count = int(extends.sum()) if config.extend == "variable" or config.operation == "copy" else bs * config.next_n
    rows_in_all = bs if config.mode == "decode" else count
    several = config.operation != "copy" and (config.next_n > 1 or config.extend == "variable")
    page = config.page_size if config.page_size > 1 else 16

    def destination(name: str, backend: int) -> Tensor:
        kind = FIELDS[name].kind
        height = 2 + (rows_in_all if FIELDS[name].per == "row" else bs)
        if kind != "table":
            vector = (height + FIELDS[name].extra,)
            return torch.full(SIZES.get(name, vector), POISON, dtype=torch.int32, device=device)
        tokens = {"page_indices": 1, "real_page_table": page}.get(name, page * config.index_kpool)
        columns = -(-width // tokens)
        # Backends of one phase have row strides that differ by 16 bytes; otherwise one word spoils it.
        stride = columns + (4 * backend if config.vector_bytes == 16 else backend % 2)
        if several and config.vector_bytes == 16:
            stride += -stride % 4  # all rows of a request have one phase
        table = torch.full((height, stride), POISON, dtype=torch.int32, device=device)
        return table[:, :columns]

    backends = [
        MetadataBuffers(**{name: destination(name, b) for name in config.fields}) for b in range(config.num_backends)
    ]
    high = 2**30
    pool = torch.randint(0, high, (bs + 3, width), generator=generator)
    lengths = torch.randint(0, width + 40, (bs,), generator=generator)
    if config.checked:
        lengths.clamp_(max=width)  # nothing is wrong
    edges = [0, 1, page - 1, page, page + 1, width - 1, width, width + 1 - config.checked]
    lengths[: min(bs, len(edges))] = torch.tensor(edges[: min(bs, len(edges))])
    rows = torch.randint(0, bs + 3, (bs,), generator=generator)
    return {
        "backends": backends,
        "seq_lens": lengths.to(getattr(torch, config.seq_lens_dtype)).to(device),
        "rows": rows.to(getattr(torch, config.req_pool_indices_dtype)).to(device),
        "pool": pool.to(getattr(torch, config.req_to_token_dtype)).to(device),
        "extends": extends.to(getattr(torch, config.extend_seq_lens_dtype)).to(device),
        "rows_in_all": rows_in_all,
    }


def run(config: KernelConfig, bs: int, width: int, device: torch.device) -> dict[str, Any]:
    """Runs one configuration on one shape and compares every word.

    Returns:
        What build() made, refreshed.

    Raises:
        AssertionError: the plan isn't of this very configuration, or a word differs from the reference's.
    """
    scene = build(config, bs, width, device)
    backends, pool = scene["backends"], scene["pool"]
    expected = [MetadataBuffers(**{f.name: t.clone() for f, t in b.items()}) for b in backends]
    if config.operation == "copy":
        source = build(config.replace(num_backends=1), bs, width, device, seed=1)["backends"][0]
        for _, tensor in source.items():
            tensor.copy_(torch.randint(0, 2**30, tensor.shape, dtype=torch.int32))
        plan = CopyPlan(source, Destinations(backends, 2, backend_field, config.mode), keep=True, mode=config.mode)
        rows = None if config.mode == "decode" else scene["rows_in_all"]
        plan.run(bs=bs, rows=rows)
        reference.copy(source, expected, bs=bs, rows=rows)
        made: KernelConfig = plan.config
    else:
        offsets = config.seqlen_offsets
        facts: dict[str, Any] = {
            "mode": config.mode,
            "index_topk": config.index_topk,
            "page_size": 1 if "kv_indices" in config.fields else config.page_size,
            "extent": config.extent,
            "max_len": None,
            "next_n": config.next_n,
            "seqlen_offsets": offsets * config.num_backends if len(offsets) == 1 else offsets or None,
            "index_kpool": config.index_kpool,
            "page_fill": config.page_fill,
            "schedule_remainder": config.schedule_remainder,
            "schedule_per": config.schedule_per,
            "schedule_atoms": config.schedule_atoms,
            "flashmla_order": config.flashmla_order,
        }
        extends = scene["extends"] if config.extend == "variable" else None
        bound = bind(
            backends,
            req_to_token=pool,
            seq_lens_dtype=scene["seq_lens"].dtype,
            req_pool_indices_dtype=scene["rows"].dtype,
            extend=config.extend,
            extend_seq_lens_dtype=scene["extends"].dtype,
            checked=config.checked,
            **facts,
        )
        bound.run(scene["seq_lens"], scene["rows"], extends)
        if config.checked:
            bound.check()
        reference.refresh(expected, scene["seq_lens"], scene["rows"], pool, extend_seq_lens=extends, **facts)
        made = bound.config
    assert made == config.replace(target=device.type), f"{made} was bound instead of {config}"
    for index, (backend, wanted) in enumerate(zip(backends, expected, strict=True)):
        for (field, got), (_, want) in zip(backend.items(), wanted.items(), strict=True):
            if not torch.equal(got, want):
                where = (got != want).nonzero()[0].tolist()
                raise AssertionError(
                    f"bs {bs}, width {width}: backends[{index}].{field.name}{where} is {got[tuple(where)]}, "
                    f"the reference says {want[tuple(where)]}"
                )
    return scene


def cases(names: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Preset, batch, width."""
    for name in names:
        for bs, width in SHAPES:
            yield name, bs, width


def main() -> None:
    """Runs presets named on the command line (all without any) and prints how many cases agreed."""
    device = torch.device("cuda", 0)
    done = 0
    for name, bs, width in cases(sys.argv[1:] or list(PRESETS)):
        run(PRESETS[name], bs, width, device)
        done += 1
    torch.cuda.synchronize()
    print(f"cases {done}")


if __name__ == "__main__":
    main()
