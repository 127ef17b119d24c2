"""Formulas: parsing, refusals, printing, and that emitted C++ computes the same as PyTorch."""

from __future__ import annotations

import importlib.resources
import itertools
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from onelaunch import ConfigError
from onelaunch.build import toolchain
from onelaunch.spec import cpp as emitted
from onelaunch.spec.arithmetic import evaluate, fold
from onelaunch.spec.expressions import (
    MAX_CHARACTERS,
    Constant,
    Dtype,
    LookUp,
    Name,
    Node,
    Number,
    Operation,
    names,
    parse,
    substitute,
    text,
)
from onelaunch.spec.vectors import Local
from torch import Tensor

INPUTS = ("seq_len", "rows", "row")
CONSTANTS = {"page_size": 64, "index_topk": 7, "index_kpool": 1}
DTYPES: tuple[Dtype, ...] = ("int32", "int64")
# Sources of look-ups: elements of any width, and few of them, so that many look-ups fall outside.
_ELEMENTS = torch.randint(-(2**62), 2**62, (3, 41), generator=torch.Generator().manual_seed(4))
TABLES = {"token": _ELEMENTS.int(), "blocks": _ELEMENTS % 2**33 - 2**32, "swa": torch.arange(-9, 50, dtype=torch.int32)}
POOL_ROW = 2
EDGES = (0, 1, -1, 2, 5, 63, 64, 65, 2**31 - 1, -(2**31), 2**30, -(2**30) - 1, 46341, -65536)


def tree(formula: str, dtype: Dtype = "int32") -> Node:
    read = {"token": (1, 2, 0), "blocks": (1, 2, 0), "swa": (1, 1, 0)}
    return parse(formula, "a_field", INPUTS, CONSTANTS, dtype, read)


def folded(formula: str, dtype: Dtype = "int32") -> Node:
    return fold(substitute(tree(formula), {n: Constant(n, value) for n, value in CONSTANTS.items()}), dtype)


def random_formula(chance: random.Random, dtype: Dtype, depth: int = 4) -> Node:
    """A formula of random operators, with edge values among its numbers."""
    bits = 64 if dtype == "int64" else 32

    def leaf() -> Node:
        constants = [Constant(name, value) for name, value in CONSTANTS.items()]
        edge = chance.choice([*EDGES, 2 ** (bits - 1) - 1, -(2 ** (bits - 1))])
        return chance.choice([*map(Name, INPUTS), Number(chance.randint(-70, 70)), Number(edge), *constants])

    def inner() -> Node:
        return random_formula(chance, dtype, depth - 1)

    if depth == 0 or chance.random() < 0.2:
        return leaf()
    match chance.randrange(7):
        case 6:
            source = chance.choice([*TABLES])
            count = 1 if source != "blocks" else chance.randint(1, 2)
            near = [Operation("%", (inner(), Number(chance.choice([2, 40, 45])))) for _ in range(count)]
            places = tuple(chance.choice([place, inner()]) for place in near)
            return LookUp(source, places, chance.choice([0, -1, 7, 2**31 - 1, -(2**31)]))
        case 0:
            op = chance.choice(["<", "<=", ">", ">=", "==", "!="])
            return Operation(op, (inner(), inner()))
        case 1:
            divisor = chance.choice([Number(1), Number(2), Number(3), Number(2**31 - 1), Constant("page_size", 64)])
            return Operation(chance.choice(["//", "%", "ceil_div"]), (inner(), divisor))
        case 2:
            return Operation(chance.choice(["min", "max"]), tuple(inner() for _ in range(chance.randint(2, 3))))
        case 3:
            op = chance.choice(["where", "clamp"])
            return Operation(op, (inner(), inner(), inner()))
        case 4:
            argument = inner()  # the parser folds the negative of a number
            return argument if isinstance(argument, Number) else Operation("negative", (argument,))
    return Operation(chance.choice("+-*"), (inner(), inner()))


# -------------------------------------------------------------------------------------------------- parse and print


@given(st.integers(0, 2**64), st.sampled_from(DTYPES))
def test_what_is_printed_is_read_back(seed: int, dtype: Dtype) -> None:
    written = text(random_formula(random.Random(seed), dtype, 3))
    read = tree(written, dtype)
    assert text(read) == written
    assert tree(text(read), dtype) == read


@pytest.mark.parametrize(
    "formula",
    [
        "seq_len",
        "max(seq_len - rows + row + 1, 0)",
        "seq_len - (rows - row)",
        "(seq_len + 1) * 2 // page_size",
        "seq_len % page_size // 2",
        "seq_len // (page_size * index_kpool)",
        "-seq_len + -3",
        "-(seq_len + 1)",
        "where((seq_len > 0) == (row < 2), clamp(seq_len, 0, 5), ceil_div(seq_len, page_size))",
        "(seq_len < row) * 3",
    ],
)
def test_formulas_print_as_they_were_written(formula: str) -> None:
    assert text(tree(formula)) == formula


def test_names_of_a_formula() -> None:
    assert names(tree("max(row - seq_len, row) // page_size")) == ["row", "seq_len", "page_size"]


@pytest.mark.parametrize(
    ("formula", "column", "reason"),
    [
        ("seq_len + )", 11, "unmatched ')'"),
        ("seq_len / 2", 1, "BinOp isn't allowed"),
        ("seq_len ** 2", 1, "BinOp isn't allowed"),
        ("seq_len + lengths", 11, "there is no 'lengths' here. Allowed: index_kpool, index_topk, page_size"),
        ("  seq_len + lengths", 13, "there is no 'lengths' here"),
        ("1 + abs(seq_len)", 5, "there is no function 'abs'. Allowed: min, max, clamp, where, ceil_div"),
        ("min(seq_len)", 1, "min takes 2 to 8 values"),
        ("clamp(seq_len, 0)", 1, "clamp takes 3 values"),
        ("min(seq_len, key=3)", 1, "min takes 2 to 8 values"),
        ("min(*seq_len, 3)", 1, "min takes 2 to 8 values"),
        ("seq_len // row", 12, "a divisor must be a positive constant; 'row' varies"),
        ("ceil_div(seq_len, 2 * rows)", 19, "a divisor must be a positive constant; 'rows' varies"),
        ("0 < seq_len < 5", 1, "a chain of comparisons isn't allowed"),
        ("seq_len is 5", 1, "Compare isn't allowed"),
        ("seq_len + 2.5", 11, "'2.5' isn't allowed; numbers are whole"),
        ("seq_len + True", 11, "'True' isn't allowed; numbers are whole"),
        ("'x'", 1, "'x' isn't allowed; numbers are whole"),
        ("seq_len + 2147483648", 11, "a number of 32 bits is too large; allowed: -2147483648 to 2147483647"),
        (f"seq_len + {'9' * 900}", 11, "a number of 2990 bits is too large"),
        ("seq_len if row else 3", 1, "IfExp isn't allowed"),
        ("seq_len and row", 1, "BoolOp isn't allowed"),
        ("not seq_len", 1, "UnaryOp isn't allowed"),
        ("seq_len[0]", 1, "Subscript isn't allowed"),
        ("(row := 3)", 2, "NamedExpr isn't allowed"),
        ("__import__('os').system('true')", 1, "Call isn't allowed"),
        ("seq_len\n+ 1", 8, "use printable ASCII"),
        ("seq_len + ſ", 11, "use printable ASCII"),
        ("seq_len; row", 8, "invalid syntax"),
        ("-" * 40 + "row", 33, "nested too deeply; allowed: 32 levels"),
        ("(" * 400 + "row" + ")" * 400, 201, "too many nested parentheses"),
        ("-" * 990 + "row", 33, "nested too deeply"),
        ("row + " * 200 + "row", MAX_CHARACTERS + 1, "it has 1203 characters; allowed: 1000"),
    ],
)
def test_refusals_point_at_the_place(formula: str, column: int, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tree(formula)
    assert str(caught.value).startswith(f"the formula of a_field, column {column} of {formula[:200]!r}: ")
    assert reason in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("formula", ["", "  ", None, 3])
def test_no_formula(formula: Any) -> None:
    with pytest.raises(ConfigError, match="it must be a string such as 'seq_len \\+ 1'"):
        tree(formula)


def test_wide_numbers_are_for_wide_fields() -> None:
    assert tree("seq_len + 2147483648", "int64") == Operation("+", (Name("seq_len"), Number(2**31)))
    assert tree("-2147483648") == Number(-(2**31))
    with pytest.raises(ConfigError, match="a number of 64 bits is too large"):
        tree("9223372036854775808", "int64")


@pytest.mark.parametrize("formula", ["seq_len // 0", "seq_len % (1 - 2)", "ceil_div(row, index_kpool - 1)"])
def test_a_divisor_that_is_not_positive(formula: str) -> None:
    with pytest.raises(ConfigError, match=r"the divisor in .* is (0|-1); allowed: a constant from 1 to 2147483647"):
        folded(formula)


# ---------------------------------------------------------------------------------------------------------- folding


@pytest.mark.parametrize(
    ("formula", "wanted"),
    [
        ("seq_len + 0", "seq_len"),
        ("0 + seq_len - 0", "seq_len"),
        ("seq_len * 1 // 1", "seq_len"),
        ("seq_len % 1 + row", "row"),
        ("seq_len * 0", "0"),
        ("seq_len - seq_len", "0"),
        ("min(seq_len - seq_len % index_kpool, index_topk) + seq_len % index_kpool", "min(seq_len, index_topk)"),
        ("ceil_div(seq_len, index_kpool)", "seq_len"),
        ("where(index_kpool > 1, seq_len, row)", "row"),
        ("where(seq_len > 1, seq_len, row)", "where(seq_len > 1, seq_len, row)"),
        ("max(seq_len, -2147483648)", "seq_len"),
        ("max(-2147483648, -2147483648)", "-2147483648"),
        ("min(seq_len, seq_len, 2147483647)", "seq_len"),
        ("max(seq_len, row, 3)", "max(max(seq_len, row), 3)"),
        ("clamp(seq_len, -2147483648, 5)", "min(seq_len, 5)"),
        # Sums wrap around, so seq_len + 1 isn't always greater than seq_len.
        ("max(seq_len + 1, seq_len)", "max(seq_len + 1, seq_len)"),
        ("2147483647 + 1", "-2147483648"),
        ("page_size * page_size // 3", "1365"),
        ("seq_len % page_size", "seq_len % page_size"),
    ],
)
def test_what_is_known_is_computed(formula: str, wanted: str) -> None:
    assert text(folded(formula)) == wanted


def test_folding_knows_the_width() -> None:
    assert text(folded("2147483647 + 1", "int64")) == "2147483648"
    assert text(folded("max(seq_len, -2147483648)", "int64")) == "max(seq_len, -2147483648)"


# -------------------------------------------------------------------------------------------------------------- C++


@pytest.mark.parametrize(
    ("formula", "dtype", "wanted"),
    [
        ("seq_len", "int32", "seq_len"),
        ("seq_len", "int64", "std::int64_t{seq_len}"),
        ("seq_len - -2", "int32", "wrap(bits(seq_len) + 2)"),
        (
            "max(seq_len - rows + row + 1, 0)",
            "int32",
            "max(wrap(bits(seq_len) - rows + row + 1), 0)",
        ),
        (
            "seq_len - (rows - row)",
            "int32",
            "wrap(bits(seq_len) - (bits(rows) - row))",
        ),
        ("seq_len * 3", "int64", "wrap(bits(std::int64_t{seq_len}) * 3)"),
        ("min(seq_len, index_topk)", "int32", "min(seq_len, kIndexTopk)"),
        ("seq_len // page_size", "int64", "floor_div(std::int64_t{seq_len}, kPageSize)"),
        ("where(row > 0, seq_len % 5, 7)", "int32", "(row > 0 ? floor_mod(seq_len, 5) : 7)"),
        ("where(row, 1, 2)", "bool", "(row != 0 ? 1 : 2)"),
        ("row == 2", "int64", "static_cast<std::int64_t>(row == 2)"),
        ("-2147483648", "int32", "(-2147483647 - 1)"),
    ],
)
def test_how_formulas_look_in_cpp(formula: str, dtype: Dtype, wanted: str) -> None:
    assert emitted.cpp(folded(formula, dtype), dtype) == wanted


HELPERS = ("wrapping", "floor_div", "floor_mod", "ceil_div", "opaque", "look_up")
PRELUDE = """
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <type_traits>
#define __device__
#define __forceinline__ inline
using std::max;
using std::min;
constexpr int kWarpSize = 1;
constexpr int kPageSize = 64;
constexpr std::int32_t kIndexTopk = 7;
constexpr std::int32_t kIndexKpool = 1;
template <typename T>
struct Source {
  const T* data;
  std::int64_t rows, row_stride, columns;
};
template <typename T>
struct Map {
  const T* data;
  std::int64_t size;
};
template <typename T>
T __ldg(const T* at) {
  return *at;
}
ARRAYS
struct Params {
  Source<std::int64_t> user_blocks{blocks, 3, 41, 41};
  Map<std::int32_t> user_swa{swa, 59};
};
const Params p;
constexpr std::int64_t request = 0, pool_row = POOL_ROW;
inline Source<std::int32_t> token_source(const Params&) {
  return {token, 3, 41, 41};
}
inline void check_look_up(const Params&, std::int64_t, std::int64_t, std::int64_t) {}
"""


def prelude() -> str:
    arrays = [
        f"constexpr std::{'int64' if table.dtype == torch.int64 else 'int32'}_t {name}[] = {{"
        + ", ".join("(-2147483647 - 1)" if v == -(2**31) else str(v) for v in table.flatten().tolist())
        + "};"
        for name, table in TABLES.items()
    ]
    return PRELUDE.replace("ARRAYS", "\n".join(arrays)).replace("POOL_ROW", str(POOL_ROW))


def looked_up(node: LookUp, places: list[Tensor]) -> Tensor:
    """Looks up each element by Python's own indexing."""
    table, found = TABLES[node.source], []
    shape = torch.broadcast_shapes(*(place.shape for place in places), (1,))
    for place in zip(*(each.expand(shape).flatten().tolist() for each in places), strict=True):
        at = (POOL_ROW, *place) if len(place) < table.dim() else place
        inside = all(0 <= index < length for index, length in zip(at, table.shape, strict=True))
        found.append(int(table[at]) if inside else node.missing)
    return torch.tensor(found)


def compare(formulas: list[tuple[Node, Dtype]], inputs: list[tuple[int, ...]], folder: Path) -> None:
    """Compiles the formulas into one program, runs them on the inputs, and compares with PyTorch's values."""
    device = importlib.resources.files("onelaunch.templates") / "device"
    helpers = [(device / f"{name}.cuh").read_text() for name in HELPERS]
    source = [prelude(), *helpers, f"constexpr int kInputs[][{len(INPUTS)}] = {{"]
    source += ["{" + ", ".join("(-2147483647 - 1)" if v == -(2**31) else str(v) for v in row) + "}," for row in inputs]
    source += ["};"]
    for number, (node, dtype) in enumerate(formulas):
        kind = "std::int64_t" if dtype == "int64" else "std::int32_t"
        source += [
            f"{kind} formula_{number}({', '.join(f'[[maybe_unused]] int {name}' for name in INPUTS)}) {{",
            f"  return {emitted.cpp(fold(node, dtype), dtype, maps=['swa'])};",
            "}",
        ]
    source += ["int main() {", "  for (const auto& in : kInputs) {"]
    source += [
        f'    std::printf("%lld\\n", (long long)formula_{n}(in[0], in[1], in[2]));' for n in range(len(formulas))
    ]
    source += ["  }", "}"]
    (folder / "formulas.cpp").write_text("\n".join(source), encoding="utf-8")
    found = toolchain.find_host_compiler()
    flags = ["-std=c++17", "-O0", "-Wall", "-Wextra", "-Wno-tautological-compare", "-Wno-type-limits"]
    flags += ["-fsanitize=undefined", "-fno-sanitize-recover", "-o", str(folder / "formulas")]
    done = subprocess.run(
        [str(found.path), *found.flags, str(folder / "formulas.cpp"), *flags], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    ran = subprocess.run([str(folder / "formulas")], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    values = torch.tensor([int(line) for line in ran.stdout.split()]).reshape(len(inputs), len(formulas))
    columns = torch.tensor(inputs).unbind(1)
    for number, (node, dtype) in enumerate(formulas):
        kind = torch.int64 if dtype == "int64" else torch.int32
        of_names = {name: column.to(kind) for name, column in zip(INPUTS, columns, strict=True)}
        expected = evaluate(node, of_names, looked_up)
        assert expected.dtype == kind
        assert torch.equal(expected, evaluate(fold(node, dtype), of_names, looked_up)), (
            f"{text(node)} folded in {dtype}"
        )
        wrong = (values[:, number] != expected).nonzero().flatten().tolist()
        assert not wrong, (
            f"{text(node)} in {dtype} of {inputs[wrong[0]]} is {values[wrong[0], number]}; PyTorch's is "
            f"{expected[wrong[0]]}\n{emitted.cpp(fold(node, dtype), dtype, maps=['swa'])}"
        )


def test_emitted_cpp_agrees_with_pytorch_in_every_operator(tmp_path: Path) -> None:
    """Each operator on all pairs of edge values."""
    formulas = [
        *(f"seq_len {op} row" for op in ("+", "-", "*", "<", "<=", ">", ">=", "==", "!=")),
        *(f"{op}(seq_len, row)" for op in ("min", "max")),
        *(f"seq_len {op} {n}" for op in ("//", "%") for n in (1, 2, 3, "page_size", 2**31 - 1)),
        *(f"ceil_div(seq_len, {n})" for n in (1, 2, 3, "page_size", 2**31 - 1)),
        "-seq_len",
        "clamp(seq_len, row, 5)",
        "where(seq_len, row, 3)",
        "where(seq_len < row, seq_len * row, row - 1)",
        "max(seq_len - rows + row + 1, 0)",
        "seq_len - (row - (rows - seq_len)) * (row + 2) - -3",
        "(seq_len + 2147483647) * -2147483648",
        "min(seq_len - seq_len % 4, index_topk) + seq_len % 4",
    ]
    inputs = [(a, (a ^ b) % 7, b) for a, b in itertools.product(EDGES, EDGES)]
    known = {n: Constant(n, value) for n, value in CONSTANTS.items()}
    compare([(substitute(tree(f, d), known), d) for f in formulas for d in DTYPES], inputs, tmp_path)


@settings(max_examples=3, phases=[Phase.explicit, Phase.generate])
@given(st.integers(0, 2**64))
def test_emitted_cpp_agrees_with_pytorch(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """Random formulas on random inputs, edge values among them; one program for all of them."""
    chance = random.Random(seed)
    inputs = [tuple(chance.choice([chance.randint(-(2**31), 2**31 - 1), *EDGES]) for _ in INPUTS) for _ in range(40)]
    formulas = [(random_formula(chance, dtype), dtype) for dtype in DTYPES * 60]
    compare(formulas, inputs, tmp_path_factory.mktemp("formulas"))


def test_where_declarations_are_broken() -> None:
    """Lines break where clang-format breaks them; `make check` compares the whole of generated/."""
    value = f"f({', '.join(['argument'] * 8)})"
    local = Local("value", "std::int32_t", value, "row")
    line = f"const std::int32_t value = {value};"
    assert len(line) == 109
    assert local.declaration(11) == line
    assert local.declaration(12) == f"const std::int32_t value =\n{' ' * 16}{value};"
