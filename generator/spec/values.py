"""Kinds of setting values. Each kind checks a value, reads it from text and writes it as text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from ..errors import ConfigError, did_you_mean


class Value(Protocol):
    """One kind of value."""

    def check(self, name: str, value: Any) -> Any:
        """The value in its canonical form.

        Raises:
            ConfigError: the value isn't allowed; the message begins with the name.
        """

    def read(self, name: str, text: str) -> Any:
        """The value of a text from ``--set``. It isn't checked yet.

        Raises:
            ConfigError: the text isn't a value of this kind.
        """

    def write(self, value: Any) -> str:
        """The text that read() reads as this value."""


class OneOf:
    """One of a few values."""

    def __init__(self, *choices: Any) -> None:
        self._choices = choices

    def check(self, name: str, value: Any) -> Any:
        check_one_of(name, value, self._choices)
        return value

    def read(self, name: str, text: str) -> Any:
        for choice in self._choices:
            if text in (self.write(choice), str(choice)):
                return choice
        check_one_of(name, text, tuple(map(self.write, self._choices)))
        raise AssertionError(text)

    def write(self, value: Any) -> str:
        return str(value).lower() if isinstance(value, bool) else str(value)


class Whole:
    """A whole number from ``low`` to ``high``, both inclusive; None is no upper limit."""

    def __init__(self, low: int, high: int | None) -> None:
        self._low, self._high = low, high

    def check(self, name: str, value: Any) -> int:
        return check_whole(name, value, self._low, self._high)

    def read(self, name: str, text: str) -> int:
        return read_whole(name, text)

    def write(self, value: Any) -> str:
        return str(value)


class MaybeWhole(Whole):
    """None, or a whole number from ``low`` to ``high``."""

    def check(self, name: str, value: Any) -> Any:
        return None if value is None else super().check(name, value)

    def read(self, name: str, text: str) -> Any:
        return None if text == str(None) else super().read(name, text)


class Names:
    """One or more of the given names, each at most once; as text they are joined by ``+``."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(names)

    def check(self, name: str, value: Any) -> tuple[str, ...]:
        listed = ", ".join(self._names)
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise ConfigError(f"{name} is {value!r}; it must be a tuple of names from {listed}.")
        chosen = tuple(value)
        for each in chosen:
            check_one_of(name, each, self._names)
        if len(set(chosen)) != len(chosen):
            raise ConfigError(f"{name} is {chosen!r}; name each field once.")
        if not chosen:
            raise ConfigError(f"{name} is empty; name at least one of {listed}.")
        return tuple(each for each in self._names if each in chosen)

    def read(self, name: str, text: str) -> tuple[str, ...]:
        return tuple(text.split("+"))

    def write(self, value: Any) -> str:
        return "+".join(value)


class Pairs:
    """(name, value) pairs, or a mapping; as text ``name:value`` joined by ``+``. The configuration checks the names."""

    def __init__(self, value: Value, what: str) -> None:
        self._value, self._what = value, what

    def check(self, name: str, value: Any) -> tuple[tuple[str, Any], ...]:
        try:
            pairs = tuple(dict(value).items())
        except (TypeError, ValueError):
            raise ConfigError(f"{name} is {value!r}; it must be pairs of a field and {self._what}.") from None
        return tuple((field, self._value.check(f"{name}[{field}]", each)) for field, each in pairs)

    def read(self, name: str, text: str) -> tuple[tuple[str, Any], ...]:
        pairs = [pair.partition(":") for pair in text.split("+")]
        return tuple((field, self._value.read(f"{name}[{field}]", value)) for field, _, value in pairs)

    def write(self, value: Any) -> str:
        return "+".join(f"{field}:{self._value.write(each)}" for field, each in value)


class Mapped:
    """A dtype and a whole number, as text ``dtype:number``."""

    def __init__(self, dtype: OneOf) -> None:
        self._dtype = dtype

    def check(self, name: str, value: Any) -> tuple[str, int]:
        try:
            dtype, outside = value
        except (TypeError, ValueError):
            raise ConfigError(f"{name} is {value!r}; it must be a dtype and a whole number.") from None
        return self._dtype.check(name, dtype), check_whole(name, outside, -(2**63), 2**63 - 1)

    def read(self, name: str, text: str) -> tuple[str, int]:
        dtype, _, outside = text.partition(":")
        return self._dtype.read(name, dtype), read_whole(name, outside)

    def write(self, value: Any) -> str:
        return f"{value[0]}:{value[1]}"


class AnyNames:
    """Names, which the configuration checks; as text they are joined by ``+``."""

    def check(self, name: str, value: Any) -> tuple[str, ...]:
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise ConfigError(f"{name} is {value!r}; it must be a tuple of names.")
        return tuple(value)

    def read(self, name: str, text: str) -> tuple[str, ...]:
        return tuple(text.split("+"))

    def write(self, value: Any) -> str:
        return "+".join(value)


class Offsets:
    """One whole number per backend, from 0 to ``high``; one number for all, or none. As text joined by ``+``.

    Equal numbers become a single one, and () if that is 0.
    """

    def __init__(self, high: int) -> None:
        self._high = high

    def check(self, name: str, value: Any) -> tuple[int, ...]:
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise ConfigError(f"{name} is {value!r}; it must be a tuple with one whole number per backend.")
        offsets = tuple(value)
        for index, offset in enumerate(offsets):
            check_whole(f"{name}[{index}]", offset, 0, self._high)
        if len(set(offsets)) == 1:
            return offsets[:1] if offsets[0] else ()
        return offsets

    def read(self, name: str, text: str) -> tuple[int, ...]:
        return tuple(read_whole(name, number) for number in text.split("+"))

    def write(self, value: Any) -> str:
        return "+".join(map(str, value))


def check_one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuses a value that isn't one of the choices, and suggests a similar one.

    Raises:
        ConfigError: the value isn't one of the choices, or only equals one of another type.
    """
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return
    hint = did_you_mean(value, [choice for choice in choices if isinstance(choice, str)])
    raise ConfigError(f"{name} is {value!r}; allowed: {', '.join(map(repr, choices))}.{hint}")


def check_setting(name: str, settings: Iterable[str]) -> None:
    """Refuses an unknown setting; the similar one is in the first line, all of them in the second.

    Raises:
        ConfigError: there is no such setting.
    """
    if name not in settings:
        raise ConfigError(
            f"There is no setting {name!r}.{did_you_mean(name, settings)}\nAllowed: {', '.join(settings)}."
        )


def check_whole(name: str, value: Any, low: int, high: int | None) -> int:
    """Refuses a value that isn't a whole number in a range.

    Raises:
        ConfigError: the value isn't an int (a bool isn't one here), or is outside the range.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; it must be a whole number.")
    if value < low or (high is not None and value > high):
        allowed = f"{low} or more" if high is None else f"{low} to {high}"
        raise ConfigError(f"{name} is {value}; allowed: {allowed}.")
    return value


def read_whole(name: str, text: str) -> int:
    """The whole number that a text spells.

    Raises:
        ConfigError: the text isn't a whole number.
    """
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name} is {text!r}; it must be a whole number.") from None
