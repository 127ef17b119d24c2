"""Bad input, one argument at a time: the error's class, a message that names the argument, and nothing written.

All functions share the checks of destinations and pools, so bind() gets every case. The others get a few, which show
that they check, and that the message has the function's own names.
"""

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
from onelaunch import ArgumentError, ConfigError, MetadataBuffers
from support import ALL_FIELDS, SIX_FIELDS, Poisoned, assert_untouched
from torch import Tensor

BS, WIDTH, PAGE_SIZE, PAGES = 4, 40, 16, 3
META = torch.device("meta")


@dataclass
class Scene:
    """Arguments of a good call. A case changes one of them for the worse."""

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
    """The call raises exactly this class, with each fragment in a sentence that ends like one."""
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message
    assert message.endswith((".", "?")), message


Case = tuple[str, Callable[[Any], Any], tuple[str, ...]]


def case(change: Callable[[Any], Any], *fragments: str) -> Case:
    """A change to a good call, and what the message must have in it; the first of it names the case."""
    return fragments[0], change, fragments


def spoil(name: str, change: Callable[[Tensor], Any], backend: int = 1) -> Callable[[Scene], None]:
    return lambda scene: scene.set(name, change, backend)


def fact(**changes: Any) -> Callable[[Scene], None]:
    return lambda scene: scene.facts.update(changes)


def attribute(name: str, make: Callable[[Scene], Any]) -> Callable[[Scene], None]:
    return lambda scene: setattr(scene, name, make(scene))


def named(cases: Sequence[tuple[Any, ...]]) -> Any:
    return pytest.mark.parametrize(("change", "fragments"), [c[1:] for c in cases], ids=[c[0] for c in cases])


# Bad destinations and pools. {name} stands for what a function calls backend 1's field in its messages.


def engine_object(tensor: Tensor) -> Any:
    """What has a tensor's attributes and isn't one."""
    return SimpleNamespace(dtype=tensor.dtype, shape=tensor.shape, device=tensor.device, tensor=tensor)


def nested(tensor: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls them a prototype
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
    """One element: the last of one is the first of the other."""
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
# Those that the other functions get, too.
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
    """Fills the place of a field's name in with what the function calls it."""
    return [text.format(**{name: pattern.format(name) for name in ALL_FIELDS}) for text in fragments]


# --------------------------------------------------------------------------------------------------------- bind


def bind(scene: Scene) -> onelaunch.Plan:
    facts = {"index_topk": 9, "page_size": PAGE_SIZE, **scene.facts}
    return onelaunch.bind(scene.backends, req_to_token=scene.pool, **facts)


BIND: list[Case] = [
    case(attribute("backends", lambda s: s.backends[0]), "backends is a MetadataBuffers", "list of"),
    case(attribute("backends", lambda s: None), "backends is a NoneType", "list of MetadataBuffers"),
    case(attribute("backends", lambda s: []), "backends is empty", "at least one"),
    case(attribute("backends", lambda s: "ab"), "backends is a str", "list of MetadataBuffers"),
    case(attribute("backends", lambda s: [s.backends[0], None]), "backends[1] is a NoneType"),
    case(attribute("backends", lambda s: [{}, *s.backends]), "backends[0] is a dict"),
    case(attribute("backends", lambda s: [MetadataBuffers()] * 2), "backends have no fields", "at least one"),
    case(spoil("cu_seqlens_k", lambda t: None), "{cu_seqlens_k} is None", "same fields"),
    case(
        lambda s: setattr(s.backends[1], "seqlens_expanded", s.new(BS)),
        "backends[0].seqlens_expanded is None",
        "backends[1].seqlens_expanded is a tensor",
    ),
    case(
        attribute("backends", lambda s: [MetadataBuffers(cache_seqlens=s.new(BS, device=META))]),
        "backends[0].cache_seqlens is on meta",
        "cuda, cpu",
    ),
    case(
        lambda s: [s.set("real_page_table", lambda t: t[:, :2], backend) for backend in (0, 1)],
        "backends[0].real_page_table has 2 columns",
        "40 tokens in pages of 16 need 3",
    ),
    case(fact(page_size=1), "backends[0].real_page_table is a separate tensor", "pages of one token"),
    case(
        lambda s: (fact(page_size=1)(s), [s.set("page_indices", lambda t: None, b) for b in (0, 1)]),
        "backends[0].real_page_table is a separate tensor",
        "pages of one token",
    ),
    *number_facts("index_topk", 0, 2**31 - 1),
    *number_facts("page_size", 1, 2**31 - 1),
    *number_facts("max_len", 0, WIDTH),
    case(fact(next_n=2), "next_n is 2", "allowed: 1 in decode"),
    case(fact(next_n=None), "next_n is None", "must be a Python int"),
    case(fact(mode="target_verify", next_n=0), "next_n is 0", "1 to 32768"),
    case(fact(mode="draft_extend", next_n=2**40), f"next_n is {2**40}", "1 to 32768"),
    case(fact(mode="draft_extend", extend="variable", next_n=2), "next_n is 2", "1 with variable extend lengths"),
    case(fact(extend="variable"), "extend is 'variable' in decode", "'uniform'"),
    case(
        fact(mode="target_verify", next_n=2, extend="variable"), "next_n is 2; allowed: 1 with variable extend lengths"
    ),
    case(fact(extend_seq_lens_dtype=torch.int8), "extend_seq_lens_dtype is torch.int8"),
    case(fact(seqlen_offsets=[0, 1, 2]), "seqlen_offsets is [0, 1, 2]", "each of the 2"),
    case(fact(seqlen_offsets=1), "seqlen_offsets is 1", "None, or one whole number"),
    case(fact(seqlen_offsets="12"), "seqlen_offsets is '12'", "None, or one whole number"),
    case(fact(seqlen_offsets=torch.tensor([1, 2])), "seqlen_offsets is tensor([1, 2])", "None, or one whole number"),
    case(fact(seqlen_offsets=[0, -1]), "seqlen_offsets[1] is -1", "0 to 32768"),
    case(fact(seqlen_offsets=[0.0, 1]), "seqlen_offsets[0] is 0.0 (float)", "Python int"),
    case(
        lambda s: (
            fact(seqlen_offsets=[0, 1])(s),
            setattr(s.backends[1], "cache_seqlens", s.backends[0].cache_seqlens),
        ),
        "backends[0].cache_seqlens",
        "is shared",
        "seqlen_offsets is (0, 1)",
        "one tensor per backend",
    ),
    *number_facts("index_kpool", 1, 2**31 - 1),
    case(
        lambda s: (
            fact(mode="target_verify", next_n=1)(s),
            [setattr(b, "seqlens_expanded", b.cache_seqlens) for b in s.backends],
        ),
        "].seqlens_expanded overlaps backends[",
        "].cache_seqlens",
    ),
    case(
        lambda s: (
            fact(index_kpool=2)(s),
            [setattr(b, "pooled_real_page_table", s.new(BS, 1)) for b in s.backends],
        ),
        "backends[0].pooled_real_page_table has 1 columns",
        "40 tokens in pools of 32 need 2",
    ),
    case(fact(seq_lens_dtype=torch.int16), "seq_lens_dtype is torch.int16", "torch.int32, torch.int64"),
    case(fact(seq_lens_dtype="int64"), "seq_lens_dtype is 'int64'", "torch.int32, torch.int64"),
    case(
        fact(req_pool_indices_dtype=torch.float32),
        "req_pool_indices_dtype is torch.float32",
        "torch.int32, torch.int64",
    ),
]


@named([*DESTINATIONS, *POOLS, *BIND])
def test_bind(device: torch.device, change: Callable[[Scene], None], fragments: tuple[str, ...]) -> None:
    scene = Scene(device)
    change(scene)
    refused(ArgumentError, with_names(fragments, "backends[1].{}"), lambda: bind(scene))
    assert_untouched(scene.poisoned)


@named(
    [
        case(fact(mode="prefill"), "mode is 'prefill'", "'decode', 'target_verify', 'draft_extend'"),
        case(fact(mode=None), "mode is None", "'decode', 'target_verify', 'draft_extend'"),
        case(fact(mode="draft_extend", extend="varied"), "extend is 'varied'", "Did you mean 'variable'?"),
        case(fact(page_fill=-1), "page_fill is -1", "only table"),
        case(fact(page_fill=0), "page_fill is 0", "None, -1"),
        case(fact(checked=1), "checked is 1", "False, True"),
        case(fact(extent="everything"), "extent is 'everything'", "'live', 'full'"),
        case(fact(extent=["full"]), "extent is ['full']", "'live', 'full'"),
    ]
)
def test_bind_of_no_configuration(
    device: torch.device, change: Callable[[Scene], None], fragments: tuple[str, ...]
) -> None:
    scene = Scene(device)
    change(scene)
    refused(ConfigError, fragments, lambda: bind(scene))
    assert_untouched(scene.poisoned)


def test_bind_accepts_what_only_looks_like_an_overlap(device: torch.device) -> None:
    """Column slices of one table, neighbours in one allocation, one tensor in every backend."""
    scene = Scene(device)
    table, sums, cache = scene.new(BS, 2 * WIDTH + 3), scene.new(2 * BS + 2), scene.new(BS)
    for index, buffers in enumerate(scene.backends):
        buffers.page_indices = table[:, index * WIDTH : (index + 1) * WIDTH]
        buffers.cu_seqlens_k = sums[index * (BS + 1) : (index + 1) * (BS + 1)]
        buffers.cache_seqlens = cache
    bind(scene).run(scene.seq_lens, scene.rows)
    assert table[:, 2 * WIDTH :].tolist() == [[0, 0, 0]] * BS
    assert sums.tolist() == [0, 3, 43, 60, 60] * 2


# ---------------------------------------------------------------------------------------------------------- run


def test_a_dtype_error_says_what_to_bind_with(device: torch.device) -> None:
    """Whoever binds with the argument that the message names can then pass the tensor."""
    scene = Scene(device)
    scene.facts |= {"mode": "draft_extend", "extend": "variable"}
    scene.facts |= {
        "declare": {"mine": onelaunch.into(onelaunch.vector("accept", "request"), scene.new(BS))},
        "inputs": {"accept": torch.int64},
    }
    given = {
        "seq_lens": scene.seq_lens,
        "req_pool_indices": scene.rows,
        "extend_seq_lens": scene.seq_lens,
        "accept": scene.seq_lens,
    }
    for name, tensor in given.items():
        others = given | {name: tensor.int()}
        setting = "inputs={'accept': torch.int32}" if name == "accept" else f"{name}_dtype=torch.int32"
        sentence = f"{name} has dtype int32; allowed: int64. Bind with {setting}, or pass {name}.to(torch.int64)."
        with pytest.raises(ArgumentError, match=f"^{re.escape(sentence)}$"):
            bind(scene).admit(**others)
        bound = scene.facts | eval(f"dict({setting})")
        onelaunch.bind(scene.backends, req_to_token=scene.pool, **bound).admit(**others)
        sentence = f"{name} has dtype float32; allowed: int64. Pass {name}.to(torch.int64)."
        with pytest.raises(ArgumentError, match=f"^{re.escape(sentence)}$"):
            bind(scene).admit(**given | {name: tensor.float()})


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


RUN: list[Case] = [
    *INPUTS,
    # What it says to do: test_a_dtype_error_says_what_to_bind_with.
    case(attribute("seq_lens", lambda s: s.seq_lens.int()), "seq_lens has dtype int32; allowed: int64. Bind with"),
    case(attribute("rows", lambda s: s.rows.int()), "req_pool_indices has dtype int32; allowed: int64. Bind with"),
    *number_facts("max_len", 0, WIDTH),
]


@pytest.mark.parametrize("earlier", [False, True], ids=["first call", "later call"])
@named(RUN)
def test_run(device: torch.device, change: Callable[[Scene], None], fragments: tuple[str, ...], earlier: bool) -> None:
    """What a plan remembers of an earlier, good call must not let a bad one through, which leaves the plan usable."""
    scene = Scene(device)
    plan = bind(scene)
    good = scene.seq_lens, scene.rows
    if earlier:
        plan.run(scene.seq_lens, scene.rows, max_len=1)
        plan.run(scene.seq_lens, scene.rows, max_len=16)
        scene.poison()
    change(scene)
    refused(ArgumentError, fragments, lambda: plan.run(scene.seq_lens, scene.rows, **scene.facts))
    assert_untouched(scene.poisoned)
    assert plan.launches == 2 * earlier
    plan.run(*good)
    assert plan.launches == 2 * earlier + 1
    assert all(b.buffers.cache_seqlens.tolist() == [3, 40, 17, 0, support.POISON] for b in scene.poisoned)


@pytest.mark.parametrize("name", ["seq_lens", "req_pool_indices"])
@pytest.mark.parametrize(
    "take",
    [
        lambda s: s.backends[1].cache_seqlens[:BS],
        lambda s: s.backends[0].page_indices[1, 2 : 2 + BS],
        lambda s: s.poisoned[0].storages["cu_seqlens_k"][support.GUARD - BS + 1 :][:BS],
    ],
    ids=["is a destination", "in a table", "touches a destination"],
)
def test_run_on_inputs_that_are_destinations(device: torch.device, take: Callable[[Scene], Tensor], name: str) -> None:
    """The classic: cache_seqlens refreshed in place, because .to(torch.int32) returned the same tensor."""
    scene = Scene(device)
    scene.facts = {"seq_lens_dtype": torch.int32, "req_pool_indices_dtype": torch.int32}
    plan = bind(scene)
    inputs = {"seq_lens": scene.seq_lens.int(), "req_pool_indices": scene.rows.int(), name: take(scene)}
    refused(ArgumentError, (f"{name} overlaps backends[",), lambda: plan.run(**inputs))
    assert_untouched(scene.poisoned)


@pytest.mark.parametrize(
    ("name", "room", "shown"),
    [
        ("cache_seqlens", 3, "backends[1].cache_seqlens has room for 3"),
        ("cu_seqlens_k", 4, "backends[1].cu_seqlens_k has room for 3"),
        ("page_indices", 2, "backends[1].page_indices has room for 2"),
        ("real_page_table", 0, "backends[1].real_page_table has room for 0"),
    ],
)
def test_run_names_the_destination_with_the_least_room(device: torch.device, name: str, room: int, shown: str) -> None:
    scene = Scene(device)
    scene.set(name, lambda t: t[:room])
    plan = bind(scene)
    refused(ArgumentError, ("seq_lens has 4 requests", shown), lambda: plan.run(scene.seq_lens, scene.rows))
    assert_untouched(scene.poisoned)


VARIABLE = {"mode": "draft_extend", "extend": "variable"}


@named(
    [
        case(attribute("extends", lambda s: None), "extend_seq_lens is None", "one element per request"),
        case(attribute("extends", lambda s: [1, 0, 2, 1]), "extend_seq_lens is a list", "torch.Tensor"),
        case(attribute("extends", lambda s: s.extends[:3]), "extend_seq_lens has 3 elements", "seq_lens has 4"),
        case(attribute("extends", lambda s: s.extends.int()), "extend_seq_lens has dtype int32", "int64"),
    ]
)
def test_run_with_extend_lengths(
    device: torch.device, change: Callable[[Scene], None], fragments: tuple[str, ...]
) -> None:
    scene = Scene(device)
    scene.extends = torch.tensor([1, 0, 2, 1], device=device)
    scene.facts = dict(VARIABLE)
    plan = bind(scene)
    plan.run(scene.seq_lens, scene.rows, scene.extends)
    scene.poison()
    change(scene)
    refused(ArgumentError, fragments, lambda: plan.run(scene.seq_lens, scene.rows, scene.extends))
    assert_untouched(scene.poisoned)


def test_run_with_extend_lengths_that_the_plan_does_not_take(device: torch.device) -> None:
    scene = Scene(device)
    plan = bind(scene)
    fragments = ("extend_seq_lens is a Tensor", "1 rows each in decode", "must be None")
    refused(ArgumentError, fragments, lambda: plan.run(scene.seq_lens, scene.rows, scene.rows))
    assert_untouched(scene.poisoned)


def test_run_with_more_rows_than_room(device: torch.device) -> None:
    scene = Scene(device)
    scene.facts = {"mode": "target_verify", "next_n": 2}
    plan = bind(scene)
    assert (plan.capacity, plan.row_capacity) == (2, 5)
    fragments = ("seq_lens has 4 requests of 2 rows each", "room for 2")
    refused(ArgumentError, fragments, lambda: plan.run(scene.seq_lens, scene.rows))
    assert_untouched(scene.poisoned)
    plan.run(scene.seq_lens[:2], scene.rows[:2])


def test_check_of_a_plan_that_checks_nothing(device: torch.device) -> None:
    refused(ArgumentError, ("without device checks", "checked=True"), bind(Scene(device)).check)


# ------------------------------------------------------------------------------------- precompute and broadcast


def broadcast(scene: Scene, lists: dict[str, Any] | None = None) -> None:
    given = {
        f"{name}_list": [getattr(b, name) for b in scene.backends] if hasattr(scene.backends[0], name) else None
        for name in SIX_FIELDS
    }
    facts = {"max_len": WIDTH, "nsa_index_topk": 9, "real_page_size": PAGE_SIZE, **scene.facts}
    onelaunch.fused_metadata_precompute_and_broadcast_cuda(
        scene.seq_lens, scene.rows, scene.pool, **{**given, **(lists or {})}, **facts
    )


BROADCAST: list[Case] = [
    *INPUTS,
    *number_facts("max_len", 0, WIDTH),
    *number_facts("nsa_index_topk", 0, 2**31 - 1),
    *number_facts("real_page_size", 1, 2**31 - 1),
    case(fact(real_page_size=1), "real_page_table_list[0] is a separate tensor", "pages of one token"),
    case(
        lambda s: [s.set("real_page_table", lambda t: t[:, :2], backend) for backend in (0, 1)],
        "real_page_table_list[0] has 2 columns",
        "need 3",
    ),
    case(
        lambda s: [s.set("page_indices", lambda t: t[:, :39], backend) for backend in (0, 1)],
        "max_len is 40; allowed: 0 to 39",
    ),
    case(spoil("cu_seqlens_k", lambda t: t[:4]), "4 requests; cu_seqlens_k_list[1] has room for 3"),
    case(spoil("page_indices", lambda t: t[:3]), "4 requests; page_indices_list[1] has room for 3"),
]


@pytest.mark.parametrize("earlier", [False, True], ids=["first call", "later call"])
@named([*SOME, *BROADCAST])
def test_broadcast(
    device: torch.device, change: Callable[[Scene], None], fragments: tuple[str, ...], earlier: bool
) -> None:
    """A remembered plan of the same tensors must not let a bad argument through."""
    scene = Scene(device)
    if earlier:
        # Equal to the bool and the float of number_facts.
        for value in (1, 16):
            page_table = {"real_page_table_list": None} if value == 1 else {}
            scene.facts = {"max_len": value, "nsa_index_topk": value, "real_page_size": value}
            broadcast(scene, page_table)
        for facts in ({"max_len": 1}, {"nsa_index_topk": 1}, {"max_len": 16}, {"nsa_index_topk": 16}):
            scene.facts = facts
            broadcast(scene)
        scene.poison()
        scene.facts = {}
    change(scene)
    refused(ArgumentError, with_names(fragments, "{}_list[1]"), lambda: broadcast(scene))
    assert_untouched(scene.poisoned)


LISTS: list[tuple[str, dict[str, Callable[[Scene], Any]], tuple[str, ...]]] = [
    case({f"{name}_list": lambda s: None for name in SIX_FIELDS}, "every list is None"),
    (
        "of different lengths",
        {"nsa_cache_seqlens_list": lambda s: [s.backends[0].nsa_cache_seqlens]},
        ("nsa_cache_seqlens_list has 1 tensors", "cache_seqlens_list has 2"),
    ),
    ("one empty", {"page_indices_list": lambda s: []}, ("page_indices_list has 0 tensors", "has 2")),
    case({f"{name}_list": lambda s: [] for name in SIX_FIELDS}, "empty", "at least one"),
    ("a tensor", {"cache_seqlens_list": lambda s: s.new(2, BS)}, ("cache_seqlens_list is a Tensor", "list of tensors")),
    ("a number", {"cache_seqlens_list": lambda s: 2}, ("cache_seqlens_list is a int", "list of tensors")),
    (
        "none in it",
        {"cu_seqlens_k_list": lambda s: [None, s.backends[0].cu_seqlens_k]},
        ("cu_seqlens_k_list[0] is a NoneType", "torch.Tensor"),
    ),
    (
        "a list in it",
        {"cu_seqlens_k_list": lambda s: [s.backends[0].cu_seqlens_k, [0, 1, 2, 3, 4]]},
        ("cu_seqlens_k_list[1] is a list", "torch.Tensor"),
    ),
]


@pytest.mark.parametrize(("lists", "fragments"), [case[1:] for case in LISTS], ids=[case[0] for case in LISTS])
def test_broadcast_lists(
    device: torch.device, lists: dict[str, Callable[[Scene], Any]], fragments: tuple[str, ...]
) -> None:
    scene = Scene(device)
    made = {name: make(scene) for name, make in lists.items()}
    refused(ArgumentError, fragments, lambda: broadcast(scene, made))
    assert_untouched(scene.poisoned)


@pytest.mark.parametrize("extent", ["half", ["full"]], ids=str)
def test_broadcast_extent(device: torch.device, extent: Any) -> None:
    scene = Scene(device)
    scene.facts = {"extent": extent}
    refused(ConfigError, (f"extent is {extent!r}", "'live', 'full'"), lambda: broadcast(scene))
    assert_untouched(scene.poisoned)


@named(
    [
        case(fact(extend_seq_lens=torch.tensor([1, 1, 1, 1])), "extend_seq_lens is a tensor", "draft_"),
        case(fact(mode="draft_extend", extend_seq_lens=[1, 1, 1, 1]), "extend_seq_lens is a list", "torch.Tensor"),
        case(fact(next_n=2), "next_n is 2", "allowed: 1 in decode"),
        case(fact(mode="target_verify", next_n=True), "next_n is True (bool)", "Python int"),
        case(fact(mode="target_verify", next_n=2), "4 requests of 2 rows each", "room for 2"),
    ]
)
def test_broadcast_of_rows(device: torch.device, change: Callable[[Scene], None], fragments: tuple[str, ...]) -> None:
    scene = Scene(device)
    change(scene)
    refused(ArgumentError, fragments, lambda: broadcast(scene))
    assert_untouched(scene.poisoned)


# ---------------------------------------------------------------------------------------------------- precompute


def precompute(scene: Scene) -> MetadataBuffers:
    out = scene.facts.pop("out", scene.backends[1])
    facts = {"max_len": WIDTH, "nsa_index_topk": 9, "real_page_size": PAGE_SIZE, **scene.facts}
    return onelaunch.precompute_decode_metadata_cuda(scene.seq_lens, scene.rows, scene.pool, out=out, **facts)


PRECOMPUTE: list[Case] = [
    *SOME,
    *INPUTS,
    *number_facts("max_len", 0, WIDTH),
    *number_facts("nsa_index_topk", 0, 2**31 - 1),
    *number_facts("real_page_size", 1, 2**31 - 1),
    case(lambda s: s.facts.update(out=[s.backends[1]]), "out is a list", "MetadataBuffers or None"),
    case(lambda s: s.facts.update(out=MetadataBuffers()), "backends have no fields"),
    case(spoil("page_indices", lambda t: t[:3]), "4 requests; out.page_indices has room for 3"),
    case(spoil("page_indices", lambda t: t[:, :39]), "max_len is 40; allowed: 0 to 39"),
    case(spoil("real_page_table", lambda t: t[:, :2]), "out.real_page_table has 2 columns", "need 3"),
]


@named(PRECOMPUTE)
def test_precompute(device: torch.device, change: Callable[[Scene], None], fragments: tuple[str, ...]) -> None:
    scene = Scene(device)
    change(scene)
    refused(ArgumentError, with_names(fragments, "out.{}"), lambda: precompute(scene))
    assert_untouched(scene.poisoned)


# Where it allocates itself, the shapes of ``out`` are no matter.
PRECOMPUTE_NEW = [c for c in PRECOMPUTE if not re.search(r"\{|out|overlaps|no field|8 requests|0 to 39", c[0])]


@named(PRECOMPUTE_NEW)
def test_precompute_of_new_buffers(
    device: torch.device, change: Callable[[Scene], None], fragments: tuple[str, ...]
) -> None:
    """Where it allocates itself, what can be refused is refused before anything is allocated from it."""
    scene = Scene(device)
    change(scene)
    scene.facts["out"] = None
    refused(ArgumentError, fragments, lambda: precompute(scene))


def test_precompute_allocates_only_for_a_known_number_of_rows(device: torch.device) -> None:
    scene = Scene(device)
    facts = {"max_len": WIDTH, "nsa_index_topk": 9, "real_page_size": PAGE_SIZE, "extend_seq_lens": scene.rows}

    def call(**changes: Any) -> None:
        onelaunch.precompute_draft_extend_metadata_cuda(scene.seq_lens, scene.rows, scene.pool, **{**facts, **changes})

    refused(ArgumentError, ("rows is None", "give the sum of extend_seq_lens"), call)
    refused(ArgumentError, ("rows is -1", "0 to"), lambda: call(rows=-1))
    refused(ArgumentError, ("next_n is 0", "1 to"), lambda: call(extend_seq_lens=None, next_n=0))


# ---------------------------------------------------------------------------------------------------------- copy


@dataclass
class CopyScene(Scene):
    """Backend 0's fields filled with numbers are the source of backends 1 and 2."""

    fields: Sequence[str] = ALL_FIELDS

    def __post_init__(self) -> None:
        super().__post_init__()
        self.source: Any = support.destination(self.fields, BS, WIDTH, PAGE_SIZE, device=self.device).buffers
        for _, tensor in self.source.items():
            tensor.fill_(7)

    def set_source(self, name: str, change: Callable[[Tensor], Any]) -> None:
        setattr(self.source, name, change(getattr(self.source, name)))


def copy(scene: CopyScene) -> None:
    onelaunch.fused_metadata_copy_cuda(scene.source, scene.backends, **scene.facts)


def spoil_source(name: str, change: Callable[[Tensor], Any]) -> Callable[[CopyScene], None]:
    return lambda scene: scene.set_source(name, change)


def into_the_source(name: str) -> Callable[[CopyScene], None]:
    return lambda scene: setattr(scene.backends[1], name, getattr(scene.source, name))


COPY: list[tuple[str, Callable[[CopyScene], None], tuple[str, ...]]] = [
    *[c for c in SOME if "req_to_token" not in c[0]],
    case(overlap_of_two_fields, "{nsa_cache_seqlens}", "{cache_seqlens}", "overlaps"),
    case(attribute("source", lambda s: None), "precomputed is a NoneType", "MetadataBuffers"),
    case(attribute("source", lambda s: [s.source]), "precomputed is a list", "MetadataBuffers"),
    case(spoil_source("cu_seqlens_k", lambda t: None), "precomputed.cu_seqlens_k is None"),
    case(spoil_source("cache_seqlens", Tensor.long), "precomputed.cache_seqlens has dtype int64", "int32"),
    case(spoil_source("page_indices", lambda t: t.to(META)), "precomputed.page_indices is on meta"),
    case(spoil_source("cache_seqlens", lambda t: 3), "precomputed.cache_seqlens is a int"),
    *[
        case(into_the_source(name), f"{{{name}}} overlaps precomputed.{name}")
        for name in ("cu_seqlens_k", "page_indices")
    ],
    case(attribute("backends", lambda s: None), "destinations is None", "MetadataBuffers"),
    case(attribute("backends", lambda s: []), "destinations is empty", "at least one"),
    case(attribute("backends", lambda s: [s.backends[0], None]), "destinations is [", "None]"),
    case(attribute("backends", lambda s: [MetadataBuffers()]), "backends have no fields"),
    case(spoil("cu_seqlens_k", lambda t: None), "{cu_seqlens_k} is None", "same fields"),
    case(
        lambda s: [s.set("page_indices", lambda t: t[:, :39], b) for b in (0, 1)],
        "page_indices has 40 columns to copy",
        "has 39",
    ),
    case(
        lambda s: [s.set("real_page_table", lambda t: t[:, :2], b) for b in (0, 1)],
        "real_page_table has 3 columns to copy",
        "has 2",
    ),
    case(spoil("nsa_cu_seqlens_k", lambda t: t[:4]), "bs is 4", "{nsa_cu_seqlens_k} has room for 3"),
    case(fact(bs=5), "bs is 5", "has room for 4"),
    *number_facts("bs", 0, None),
    *number_facts("max_len", 0, WIDTH),
    *number_facts("real_page_size", 1, 2**31 - 1),
]


@named(COPY)
def test_copy(device: torch.device, change: Callable[[CopyScene], None], fragments: tuple[str, ...]) -> None:
    scene = CopyScene(device)
    change(scene)
    refused(ArgumentError, with_names(fragments, "destinations[1].{}"), lambda: copy(scene))
    assert_untouched(scene.poisoned)


@pytest.mark.parametrize("bad", [-1, True], ids=repr)
def test_copy_of_lengths_alone_checks_max_len(device: torch.device, bad: Any) -> None:
    """No table needs the number, but it is as wrong as ever."""
    scene = CopyScene(device, fields=("cache_seqlens", "cu_seqlens_k"))
    scene.facts = {"max_len": bad}
    refused(ArgumentError, (f"max_len is {bad!r}",), lambda: copy(scene))
    assert_untouched(scene.poisoned)


@named(
    [
        case(fact(next_n=2), "next_n is 2", "in decode a request has one row"),
        case(fact(rows=2), "rows is 2", "in decode a request has one row"),
        case(fact(mode="target_verify", bs=2), "bs is 2 in target_verify", "next_n and rows are None"),
        case(fact(mode="draft_extend", bs=2, next_n=0), "next_n is 0", "1 to 32768"),
        case(fact(mode="draft_extend", rows=5), "rows is 5", "has room for 4"),
        case(fact(mode="draft_extend", rows=4.0), "rows is 4.0 (float)", "Python int"),
        case(fact(mode="target_verify", bs=2, next_n=3), "rows is 6", "has room for 4"),
    ]
)
def test_copy_of_rows(device: torch.device, change: Callable[[CopyScene], None], fragments: tuple[str, ...]) -> None:
    scene = CopyScene(device)
    change(scene)
    refused(ArgumentError, fragments, lambda: copy(scene))
    assert_untouched(scene.poisoned)


def test_copy_names_the_only_destination_without_an_index(device: torch.device) -> None:
    scene = CopyScene(device)
    scene.backends = scene.backends[1]
    scene.backends.cache_seqlens = scene.new(BS, dtype=torch.int64)
    refused(ArgumentError, ("destinations.cache_seqlens has dtype int64",), lambda: copy(scene))
    assert_untouched(scene.poisoned)


# ------------------------------------------------------------------------------------------------ other entries


@pytest.mark.parametrize(
    ("call", "fragments"),
    [
        (lambda s: onelaunch.bind_groups(None, [[0]], req_to_token=s.pool), ("backends is a NoneType", "list of")),
        (lambda s: onelaunch.bind_groups(s.backends, None, req_to_token=s.pool), ("groups is None", "each of the 2")),
        (lambda s: onelaunch.bind_groups(s.backends, [[0, 1]], req_to_token=s.pool, fields=()), ("fields isn't an",)),
        (lambda s: onelaunch.specialize(3), ("config is a int", "it must be a KernelConfig")),
        (lambda s: onelaunch.specialize(onelaunch.KernelConfig(), 90), ("arch is 90", 'such as "90a"')),
        (lambda s: onelaunch.specialize(onelaunch.KernelConfig(), [90]), ("arch is [90]", 'such as "90a"')),
    ],
    ids=["no backends", "no groups", "a foreign setting", "no configuration", "a number", "a list of numbers"],
)
def test_other_entries(call: Callable[[Scene], Any], fragments: tuple[str, ...]) -> None:
    refused(ArgumentError, fragments, lambda: call(Scene(torch.device("cpu"))))


@pytest.mark.parametrize("page_size", [2, 64])
def test_pages_of_several_tokens_with_kv_indices(page_size: int) -> None:
    """They were ignored: kv_indptr counts tokens whatever the page size."""
    scene = Scene(torch.device("cpu"))
    scene.backends = [MetadataBuffers(kv_indptr=scene.new(BS + 1), kv_indices=scene.new(400))]
    scene.facts = {"page_size": page_size}
    refused(ArgumentError, (f"page_size is {page_size} with kv_indices", "allowed: 1"), lambda: bind(scene))
    for facts in ({"page_size": 1}, {"page_size": None}):
        scene.facts = facts
        bind(scene).run(scene.seq_lens, scene.rows)
        assert scene.backends[0].kv_indptr.tolist() == [0, 3, 43, 60, 60]


def test_a_checked_plan_bound_in_inference_mode_reports() -> None:
    scene = Scene(torch.device("cpu"))
    scene.facts = {"checked": True}
    with torch.inference_mode():
        plan = bind(scene)
    scene.rows[1] = 17
    plan.run(scene.seq_lens, scene.rows)
    for mode in (False, True):
        with torch.inference_mode(mode):
            refused(ArgumentError, ("req_pool_indices[1] is 17",), plan.check)
            plan.check()
            plan.run(scene.seq_lens, scene.rows)


# --------------------------------------------------------------------------------------- no build for bad input


def test_nothing_is_built_for_a_refused_call(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad input must not cost a build first."""

    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a kernel was loaded")

    monkeypatch.setattr("onelaunch.load.loader.load", load)
    scene = Scene(device)
    scene.facts = {"max_len": WIDTH + 1}
    refused(ArgumentError, ("max_len",), lambda: bind(scene))
    scene.set("page_indices", Tensor.long)
    refused(ArgumentError, ("page_indices",), lambda: broadcast(scene))


def test_a_plan_for_an_exact_number_of_requests(device: torch.device) -> None:
    out = torch.full((3,), -7, dtype=torch.int32, device=device)
    pool = torch.zeros((4, 8), dtype=torch.int32, device=device)
    plan = onelaunch.bind([MetadataBuffers(cache_seqlens=out)], req_to_token=pool)
    plan.exact = 2
    lengths, rows = torch.tensor([3, 4, 5], device=device), torch.arange(3, device=device)
    with pytest.raises(ArgumentError, match=r"seq_lens has 1 elements; the plan is for 2 requests\. Pass as"):
        plan.run(lengths[:1], rows)
    with pytest.raises(ArgumentError, match="req_pool_indices has 1 elements; the plan is for 2 requests"):
        plan.run(lengths, rows[:1])
    assert out.tolist() == [-7] * 3
    for count in (2, 3):  # of longer inputs the first ones count
        out.fill_(-7)
        plan.run(lengths[:count], rows)
        assert out.tolist() == [3, 4, -7]
