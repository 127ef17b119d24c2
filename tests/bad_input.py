"""Bad input, one argument at a time: a good call, the changes that make it bad, and what each message must say."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import onelaunch
import pytest
import support
import torch
from support import ALL_FIELDS, SIX_FIELDS, Poisoned
from torch import Tensor

BS, WIDTH, PAGE_SIZE, PAGES = 4, 40, 16, 3
META = torch.device("meta")


@dataclass
class Scene:
    """Arguments of a good call. A case makes one of them bad."""

    device: torch.device
    fields: Sequence[str] = SIX_FIELDS
    backends: list[Any] = field(default_factory=list)
    poisoned: list[Poisoned] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.poisoned = [
            support.destination(self.fields, BS + 1, WIDTH, PAGE_SIZE, device=self.device) for _ in range(2)
        ]
        self.backends = list(support.buffers_of(self.poisoned))
        self.pool: Any = support.token_pool(6, WIDTH, device=self.device)
        self.seq_lens: Any = torch.tensor([3, 40, 17, 0], device=self.device)
        self.rows: Any = torch.tensor([1, 2, 3, 4], device=self.device)
        self.extends: Any = None

    def poison(self) -> None:
        """Poisons all destinations again."""
        for backend in self.poisoned:
            for storage in backend.storages.values():
                storage.fill_(support.POISON)

    def set(self, name: str, change: Callable[[Tensor], Any], backend: int = 1) -> None:
        """Changes one destination."""
        buffers = self.backends[backend]
        setattr(buffers, name, change(getattr(buffers, name)))

    def new(self, *shape: int, dtype: torch.dtype = torch.int32, device: torch.device | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device or self.device)


def refused(error: type[Exception], fragments: Sequence[str], call: Callable[[], Any]) -> None:
    """The call raises exactly this class; the message contains each fragment and ends like a sentence."""
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message
    assert message.endswith((".", "?")), message


Case = tuple[str, Callable[[Any], Any], tuple[str, ...]]


def case(change: Callable[[Any], Any], *fragments: str) -> Case:
    """A change to a good call, and the fragments that its message must contain; the first one names the case."""
    return fragments[0], change, fragments


def spoil(name: str, change: Callable[[Tensor], Any], backend: int = 1) -> Callable[[Scene], None]:
    return lambda scene: scene.set(name, change, backend)


def fact(**changes: Any) -> Callable[[Scene], None]:
    return lambda scene: scene.facts.update(changes)


def attribute(name: str, make: Callable[[Scene], Any]) -> Callable[[Scene], None]:
    return lambda scene: setattr(scene, name, make(scene))


def named(cases: Sequence[tuple[Any, ...]]) -> Any:
    return pytest.mark.parametrize(("change", "fragments"), [c[1:] for c in cases], ids=[c[0] for c in cases])


# Bad destinations and pools. {name} stands for the name of backend 1's field in a function's messages.


def engine_object(tensor: Tensor) -> Any:
    """What has a tensor's attributes and isn't one."""
    return SimpleNamespace(dtype=tensor.dtype, shape=tensor.shape, device=tensor.device, tensor=tensor)


def nested(tensor: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that they are a prototype
        return torch.nested.nested_tensor([tensor[0], tensor[1, 1:]])


def overlap_by_a_column(scene: Scene) -> None:
    table = scene.new(BS, 2 * WIDTH)
    scene.backends[0].page_indices, scene.backends[1].page_indices = table[:, :WIDTH], table[:, WIDTH - 1 : -1]


def overlap_by_a_row(scene: Scene) -> None:
    table = scene.new(2 * BS, WIDTH)
    scene.backends[0].page_indices, scene.backends[1].page_indices = table[:BS], table[BS - 1 :]


def overlap_of_two_fields(scene: Scene) -> None:
    scene.backends[1].nsa_cache_seqlens = scene.backends[1].cache_seqlens


def overlap_of_a_vector_with_a_table(scene: Scene) -> None:
    scene.backends[1].cache_seqlens = scene.backends[0].page_indices[2, 3 : 3 + BS]


def overlap_of_other_row_strides(scene: Scene) -> None:
    memory = scene.new(BS * 2 * WIDTH)
    scene.backends[0].page_indices = memory.as_strided((BS, WIDTH), (WIDTH, 1))
    scene.backends[1].page_indices = memory.as_strided((BS, WIDTH), (2 * WIDTH, 1), 8)


def overlap_of_cumulative_tails(scene: Scene) -> None:
    """They overlap in one element: the last of one is the first of the other."""
    memory = scene.new(2 * BS + 1)
    scene.backends[0].cu_seqlens_k, scene.backends[1].cu_seqlens_k = memory[: BS + 1], memory[BS:]


def overlap_of_the_pool(scene: Scene) -> None:
    memory = torch.full((7 * WIDTH,), support.POISON, dtype=torch.int32, device=scene.device)
    scene.pool = memory[: 6 * WIDTH].view(6, WIDTH)
    scene.set("cache_seqlens", lambda t: memory[6 * WIDTH - 1 :][:BS])


DESTINATIONS: list[Case] = [
    case(
        spoil("page_indices", Tensor.long),
        "{page_indices} has dtype int64; allowed: int32. Allocate it with dtype=torch.int32.",
    ),
    case(spoil("nsa_cu_seqlens_k", Tensor.float), "{nsa_cu_seqlens_k} has dtype float32", "int32"),
    case(spoil("cache_seqlens", lambda t: t.to(META)), "{cache_seqlens} is on meta"),
    case(spoil("real_page_table", lambda t: t.to(META)), "{real_page_table} is on meta"),
    case(spoil("cache_seqlens", lambda t: t[None]), "{cache_seqlens} has shape (1, 5)", "1 dimension."),
    case(spoil("cu_seqlens_k", lambda t: t[0]), "{cu_seqlens_k} has shape ()", "1 dimension."),
    case(spoil("page_indices", lambda t: t[0]), "{page_indices} has shape (40,)", "2 dimensions."),
    case(spoil("real_page_table", lambda t: t[None]), "{real_page_table} has shape (1, 5, 3)", "2 dimensions."),
    case(spoil("cache_seqlens", Tensor.tolist), "{cache_seqlens} is a list", "torch.Tensor"),
    case(spoil("page_indices", engine_object), "{page_indices} is a SimpleNamespace", "torch.Tensor"),
    case(spoil("page_indices", Tensor.to_sparse), "{page_indices} has layout torch.sparse_coo"),
    case(spoil("page_indices", nested), "{page_indices} is a nested tensor", "one shape"),
    case(spoil("page_indices", lambda t: t[:, :-1]), "{page_indices} has 39 columns", "40"),
    case(spoil("real_page_table", lambda t: t[:, :-1]), "{real_page_table} has 2 columns", "3"),
    case(spoil("nsa_cu_seqlens_k", lambda t: t[:0]), "{nsa_cu_seqlens_k} is empty", "bs + 1"),
    case(spoil("cache_seqlens", lambda t: t.repeat(2)[::2]), "{cache_seqlens} has stride 2"),
    case(spoil("cache_seqlens", lambda t: t[:1].expand(5)), "{cache_seqlens} has stride 0"),
    case(
        spoil("page_indices", lambda t: t.repeat(1, 2)[:, ::2]),
        "{page_indices} has strides (80, 2)",
        "inner stride must be 1",
    ),
    case(spoil("page_indices", lambda t: t.repeat(8, 1).T[:, :40]), "{page_indices} has strides (1, 40)"),
    case(
        spoil("page_indices", lambda t: t[:1].expand(5, -1)),
        "{page_indices} has strides (0, 1) and 40 columns",
        "40 or more",
    ),
    case(
        spoil("page_indices", lambda t: t.as_strided((3, 40), (39, 1))),
        "{page_indices} has strides (39, 1) and 40 columns",
    ),
    case(overlap_by_a_column, "{page_indices} overlaps", "in memory"),
    case(overlap_by_a_row, "{page_indices} overlaps", "in memory"),
    case(overlap_of_two_fields, "{nsa_cache_seqlens}", "{cache_seqlens}", "overlaps"),
    case(overlap_of_a_vector_with_a_table, "{cache_seqlens} overlaps", "page_indices"),
    case(overlap_of_other_row_strides, "{page_indices} overlaps", "in memory"),
    case(overlap_of_cumulative_tails, "{cu_seqlens_k} overlaps", "in memory"),
]

POOLS: list[Case] = [
    case(
        attribute("pool", lambda s: s.pool.short()),
        "req_to_token has dtype int16",
        "int32 or int64. Pass it converted, by .to(torch.int32).",
    ),
    case(attribute("pool", lambda s: s.pool.to(META)), "req_to_token is on meta"),
    case(attribute("pool", lambda s: s.pool[0]), "req_to_token has shape (40,)", "2 dimensions"),
    case(attribute("pool", lambda s: s.pool.tolist()), "req_to_token is a list", "torch.Tensor"),
    case(attribute("pool", lambda s: None), "req_to_token is a NoneType", "torch.Tensor"),
    case(attribute("pool", lambda s: engine_object(s.pool)), "req_to_token is a SimpleNamespace", "torch.Tensor"),
    case(attribute("pool", lambda s: nested(s.pool)), "req_to_token is a nested tensor"),
    case(
        attribute("pool", lambda s: s.pool.repeat(1, 2)[:, ::2]),
        "req_to_token has strides (80, 2)",
        "inner stride must be 1",
    ),
    case(
        attribute("pool", lambda s: s.pool[:1].expand(6, -1)),
        "req_to_token has strides (0, 1) and 40 columns",
        "40 or more",
    ),
    case(lambda s: setattr(s, "pool", s.backends[1].page_indices), "{page_indices} overlaps req_to_token"),
    case(overlap_of_the_pool, "{cache_seqlens} overlaps req_to_token"),
]
# Also used for the other functions.
SHARED = re.compile(r"\S+ (is a (list|SimpleNamespace)|has dtype int|overlaps req)")
SOME: list[Case] = [c for c in [*DESTINATIONS, *POOLS] if SHARED.match(c[0])]


def number_facts(name: str, low: int, high: int | None) -> list[Case]:
    """Values that a whole-number argument refuses."""
    return [
        case(fact(**{name: low - 1}), f"{name} is {low - 1}; allowed: {low}"),
        case(fact(**{name: True}), f"{name} is True (bool)", "Python int"),
        case(fact(**{name: 16.0}), f"{name} is 16.0 (float)", "Python int"),
        case(fact(**{name: torch.tensor(16)}), f"{name} is tensor(16) (Tensor)", "Python int"),
        *([] if high is None else [case(fact(**{name: high + 1}), f"{name} is {high + 1}; allowed: {low} to {high}")]),
    ]


def with_names(fragments: Sequence[str], pattern: str) -> list[str]:
    """Replaces {name} with the function's name for the field."""
    return [text.format(**{name: pattern.format(name) for name in ALL_FIELDS}) for text in fragments]


def bind(scene: Scene) -> onelaunch.Plan:
    facts = {"index_topk": 9, "page_size": PAGE_SIZE, **scene.facts}
    return onelaunch.bind(scene.backends, req_to_token=scene.pool, **facts)


INPUTS: list[Case] = [
    case(attribute("seq_lens", lambda s: s.seq_lens.float()), "seq_lens has dtype float32; allowed: int"),
    case(attribute("rows", lambda s: s.rows.short()), "req_pool_indices has dtype int16"),
    case(attribute("rows", lambda s: s.rows.to(META)), "req_pool_indices is on meta"),
    case(attribute("seq_lens", lambda s: s.seq_lens[None]), "seq_lens has shape (1, 4)", "1 dim"),
    case(attribute("seq_lens", lambda s: s.seq_lens[0]), "seq_lens has shape ()", "1 dimension."),
    case(attribute("rows", lambda s: s.rows[:3]), "req_pool_indices has 3 elements", "seq_lens has 4"),
    case(attribute("seq_lens", lambda s: s.seq_lens[:1]), "req_pool_indices has 4 elements", "has 1"),
    case(attribute("seq_lens", lambda s: None), "seq_lens is a NoneType", "torch.Tensor"),
    case(attribute("rows", lambda s: [1, 2]), "req_pool_indices is a list", "torch.Tensor"),
    case(attribute("seq_lens", lambda s: engine_object(s.seq_lens)), "seq_lens is a SimpleNamespace", "torch.Tensor"),
    case(
        lambda s: (setattr(s, "seq_lens", s.seq_lens.repeat(2)), setattr(s, "rows", s.rows.repeat(2))),
        "seq_lens has 8 requests",
        "room for 5",
    ),
]
