"""Calls of a binding with garbage; test_fuzz runs it in a process under ASan and UBSan. No torch, no kernel.

Tensors are of a special class that reports random properties. The kernel is a stand-in that reads
its words, since a real one would dereference the addresses.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.machinery
import importlib.util
import random
import sys
from collections.abc import Iterator
from typing import Any

WORDS, CALL_WORDS = 12, ("a", "b", "c")

# The kernel, and the C functions of a tensor class. They call methods of the object: Python functions that ctypes
# makes callable from C can't raise.
KERNEL = """
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>

extern "C" int fuzz_launch(const std::int64_t* words, void*) {
  std::uint64_t sum = 0;
  for (int i = 0; i < 12; ++i) sum += static_cast<std::uint64_t>(words[i]);
  return sum % 5 == 0 ? 700 : 0;
}
extern "C" int fuzz_prepare(std::int64_t device, std::int64_t* resources) {
  for (int i = 0; i < 3; ++i) resources[i] = device;
  return device == 13 ? 100 : 0;
}
extern "C" const char* fuzz_error(int code) { return code == 700 ? "an error" : ""; }

struct Tensor {
  void* data;
  std::int32_t device_type, device, dims;
  std::uint8_t code, bits;
  std::uint16_t lanes;
  std::int64_t *shape, *strides;
  std::uint64_t byte_offset;
};

static int tell(void* object, Tensor* tensor) {
  static std::int64_t sizes[4];
  PyObject* facts = PyObject_CallMethod(static_cast<PyObject*>(object), "_facts", nullptr);
  if (facts == nullptr) return -1;
  unsigned long long data = 0;
  long long number[4];
  int kind[4], strided = 0;
  const bool read = PyArg_ParseTuple(
      facts, "KiiiiLLLLp", &data, kind, kind + 1, kind + 2, kind + 3, number, number + 1, number + 2, number + 3,
      &strided);
  Py_DECREF(facts);
  if (!read) return -1;
  for (int i = 0; i < 4; ++i) sizes[i] = number[i];
  *tensor = {reinterpret_cast<void*>(data), kind[0], kind[1], kind[2], static_cast<std::uint8_t>(kind[3]), 32, 1,
             sizes, strided ? sizes + 2 : nullptr, 8};
  return 0;
}

static int current_stream(std::int32_t, std::int32_t, void** stream) {
  static int count = 0;
  *stream = nullptr;
  if (++count % 10 != 0) return 0;
  PyErr_SetString(PyExc_RuntimeError, "no stream");
  return -1;
}

struct Exchange {
  std::uint32_t major, minor;
  Exchange* older;
  void (*managed[3])();
  int (*read)(void*, Tensor*);
  int (*current_stream)(std::int32_t, std::int32_t, void**);
};
extern "C" PyObject* fuzz_exchange(unsigned major, int readable, const char* name) {
  auto* made = new Exchange{major, 0, nullptr, {}, readable ? tell : nullptr, current_stream};
  return PyCapsule_New(made, name, nullptr);
}
"""


class Tensor:
    """Its reported properties are redrawn now and then."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self.facts = self._drawn()

    def _drawn(self) -> tuple[int, ...]:
        dice = self.dice
        kind = (dice.choice((1, 2)), dice.choice((0, 3)), dice.choice((0, 1, 1, 2, 2, 3, 7)), dice.choice((0, 2)))
        sizes = (dice.choice((0, 1, 4, -1, 2**62)) for _ in range(4))
        return (dice.choice((0, 4096, 2**63)), *kind, *sizes, dice.random() < 0.9)

    def _facts(self) -> tuple[int, ...]:
        if self.dice.random() < 0.05:
            self.facts = self._drawn()
        if self.dice.random() < 0.05:
            raise BufferError("it has no memory")
        return self.facts


class Strange:
    """Answers every protocol that a binding may use with wrong values and errors."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice

    def _lie(self, *true: Any) -> Any:
        if self.dice.random() < 0.3:
            raise self.dice.choice((ValueError, KeyError, OverflowError, RuntimeError))("not today")
        return self.dice.choice(true)

    def __index__(self) -> int:
        return self._lie(0, 5, 2**70, "no number")

    def __len__(self) -> int:
        return self._lie(0, 3, 9, 2**40, -1)

    def __getitem__(self, at: int) -> Any:
        return self._lie(0, None, self, [self], 2**64)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._lie(None, 3, self)

    def _check(self, *arguments: Any) -> Any:
        return self._lie((1, 2, 3), [0] * 3, (1, 2), None, self, "abc", (2**70, 0, 0))


class Shrinks(list):  # type: ignore[type-arg]
    """A list that gets shorter while it is read."""

    def __getitem__(self, at: Any) -> Any:
        self.clear()
        return 1


class Number(int):
    pass


class Text(str):
    pass


class Buffers:
    """Stands for MetadataBuffers."""

    first: Any = None
    second: Any = None

    def __init__(self, dice: random.Random, values: Iterator[Any]) -> None:
        names = dice.choice((("first", "second"), ("first", "second", "third"), ("second", "first"), ("first",), ()))
        for name in names:
            setattr(self, name, next(values))


class Again:
    """An owner that calls the plan from within its own check, or when it is deleted."""

    def __init__(self, plan: Any, dice: random.Random) -> None:
        self.plan, self.dice, self.depth = plan, dice, 0

    def _check(self, *arguments: Any) -> Any:
        self.depth += 1
        if self.depth < 4:
            self.plan.run(self, *(self.dice.randrange(3) for _ in arguments))
        self.depth = 0
        return [len(arguments)] * 3


class Farewell:
    """Calls back when the memo that holds it releases it."""

    def __init__(self, memo: Any) -> None:
        self.memo = memo

    def __del__(self) -> None:
        self.memo.run(1, "text")
        self.memo.keep(None, lambda *arguments: None, 1, "text")


def load(path: str) -> Any:
    loader = importlib.machinery.ExtensionFileLoader("fuzz_binding", path)
    module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec("fuzz_binding", loader, origin=path))
    loader.exec_module(module)
    return module


def main(path: str, calls: int, seed: int) -> None:
    dice = random.Random(seed)
    module = load(path)

    functions = ctypes.PyDLL(path)
    functions.fuzz_exchange.restype = ctypes.py_object
    kept: list[bytes] = []  # a capsule doesn't own its name

    def a_class(major: int = 1, name: bytes = b"dlpack_exchange_api", readable: bool = True) -> type:
        kept.append(name)
        capsule = functions.fuzz_exchange(major, readable, name)
        return type("Tensor", (Tensor,), {"__dlpack_c_exchange_api__": capsule})

    good = a_class()
    classes = [good, a_class(2), a_class(name=b"another"), a_class(readable=False), Tensor, Strange, int, Text]
    names = [("first", "second"), ("first", "second"), (), ("first", 3), ("no", "such"), ["first"], None]
    memos, plans = [module.memo(3), module.memo(3, 2, 1)], [module.bind([0] * 9)]
    last: list[Any] = []

    def value(depth: int = 0) -> Any:
        how = dice.randrange(20)
        if how < 5:
            return dice.choice(
                (0, 1, -1, 2**62, 2**70, -(2**70), True, Number(3), None, 1.5, b"bytes", object, NotImplemented)
            )
        if how < 9:
            return good(dice)
        if how < 11:
            return dice.choice(("", "text", "\udc80", "é" * 3, "x" * 41, Text("text"), "x" * 100_000))
        if how < 13:
            return Strange(dice)
        if how < 14:
            return Buffers(dice, iter(value, ...))
        if how < 15:
            return dice.choice((Shrinks([1, 2, 3]), range(3), {}, {"first": 1}, dice.choice((memos, plans))[0]))
        if how < 16:
            return [0] * dice.choice((9, 12, 600))
        if depth > 3:
            return None
        return dice.choice((list, tuple))(value(depth + 1) for _ in range(dice.randrange(5)))

    def call() -> None:
        memo, plan = dice.choice(memos), dice.choice(plans)
        arguments = last[:] if dice.random() < 0.5 else [value() for _ in range(dice.randrange(6))]
        last[:] = arguments  # so that a memo has them
        how = dice.randrange(12)
        if how < 3:
            memo.run(*arguments)
        elif how < 5:
            owner = dice.choice((Farewell(memo), Again(plan, dice), Strange(dice), value()))
            memo.keep(owner, dice.choice((plan.run, plan.run, len, memo.run, value())), *arguments)
        elif how < 7:
            plan.run(Again(plan, dice) if dice.random() < 0.3 else Strange(dice), *arguments)
        elif how == 7:
            plan.launch(*(dice.choice((0, 5, value())) for _ in range(dice.choice((4, 4, 4, 0, 3, 9)))))
        elif how == 8:
            plans.append(
                module.bind(
                    dice.choice(([0] * 9, [7] * 9, value())), *([dice.choice((-1, 0, value()))] * dice.randrange(2))
                )
            )
        elif how == 9:
            module.register_classes(
                dice.choice(classes),
                dice.choice((float, type, value())),
                dice.choice((Buffers, value())),
                dice.choice(names),
            )
        elif how == 10:
            numbers = [dice.choice(c) for c in ((1, 2, 50, 0, -1, 2**62, value()), (0, 2, 30), (0, 1, 3, -1))]
            memos.append(module.memo(*numbers[: dice.randrange(1, 4)]))
        else:
            module.prepare(dice.choice((0, 13, 2**70, value())))
        for some in (memos, plans):
            if len(some) > 5:
                del some[dice.randrange(1, 5)]

    refused: dict[str, int] = {}
    for number in range(calls):
        try:
            call()
        except (
            TypeError,
            ValueError,
            OverflowError,
            RuntimeError,
            KeyError,
            AttributeError,
            MemoryError,
            BufferError,
        ) as error:
            refused[type(error).__name__] = refused.get(type(error).__name__, 0) + 1
        except SystemError as error:
            raise AssertionError(f"call {number}: {error}") from error
        if number % 5000 == 0:
            gc.collect()
    print(calls, "calls,", sum(refused.values()), "refused:", dict(sorted(refused.items())))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
