"""What somebody else said becomes a checked value, or an error that says what is wrong with it. Used at every border.

JSON of a peer, a file or a person is bounded in bytes, depth and digits, holds no number that Python alone can write,
no text that cannot be encoded, no name twice. `Fields` then takes typed members out of an object. What passes here
needs no check behind it; what does not raises the error its reader asks for, never a ``RecursionError``,
``OverflowError``, ``KeyError`` or ``TypeError``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, TypeVar

from vring.errors import UsageError, VirtioError, quoted

__all__ = ["DECODER", "MAX_DEPTH", "U16", "U32", "U64", "Fields", "Refusal", "check_value", "parse_json", "visible"]

MAX_DEPTH = 32
"""Objects and lists within each other; nothing this project says has more than six."""
MAX_DIGITS = 20
"""Digits of 2**64 - 1, and a sign: what has more is no integer of this project."""
U16, U32, U64 = (1 << 16) - 1, (1 << 32) - 1, (1 << 64) - 1
T = TypeVar("T")
Refusal = Callable[[str], VirtioError]
"""Makes the error from its text: the class of who is at fault."""


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS + 1:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has two members of the same name")
    return found


DECODER = json.JSONDecoder(
    parse_constant=_no_constant, parse_float=_finite, parse_int=_integer, object_pairs_hook=_unique
)
"""Takes JSON as the standard has it, with numbers that fit; raises ValueError or, of deep nesting, RecursionError."""


def check_value(value: Any, depth: int = MAX_DEPTH) -> None:
    """See that a decoded value is not nested too deeply, and that its text can be encoded.

    Raises
    ------
    ValueError
        If not.
    """
    level, levels = [value], 0
    while level:
        inner: list[Any] = []
        containers = False
        for item in level:
            if isinstance(item, dict):
                containers = True
                inner += item.keys()
                inner += item.values()
            elif isinstance(item, list):
                containers = True
                inner += item
            elif isinstance(item, str) and not item.isascii():
                try:
                    item.encode()
                except UnicodeEncodeError:
                    raise ValueError("a text has half a surrogate pair, which cannot be encoded") from None
        level, levels = inner, levels + containers
        if levels > depth:
            raise ValueError(f"nested more than {depth} deep")


def parse_json(
    data: bytes | bytearray | memoryview | str,
    what: str,
    *,
    refusal: Refusal = UsageError,
    most: int = 1 << 16,
    depth: int = MAX_DEPTH,
) -> Any:
    """Parse JSON that somebody else wrote.

    Parameters
    ----------
    data
        All of it.
    what
        Begins the error: ``READY record``.
    refusal
        Makes the error from its text: the class of who is at fault.
    most
        Bytes (of a str: characters) that are read at all.
    depth
        How deep it may be nested.

    Returns
    -------
    object
        dict, list, str, int, float, bool or None.

    Raises
    ------
    VirtioError
        What `refusal` makes, for anything that is not such JSON.
    """
    if len(data) > most:
        raise refusal(f"{what}: {len(data)} bytes of JSON, at most {most} are read")
    try:
        value = DECODER.decode(data if isinstance(data, str) else bytes(data).decode())
        check_value(value, depth)
    except RecursionError:
        raise refusal(f"{what}: nested more than {depth} deep") from None
    except ValueError as error:
        raise refusal(f"{what}: not JSON: {error}") from error
    return value


class Fields:
    """Typed members of a JSON object that somebody else made.

    Each method takes the member's name, raises the error of who made it if it is not there or not such a value, and
    returns `default`, where one is given, if it is not there. A bool is no number here, and a float no integer.

    Parameters
    ----------
    value
        The object; anything that is not one is refused.
    what
        Begins each error: ``saved device state``.
    refusal
        Makes the error from its text: the class of who is at fault.

    Raises
    ------
    VirtioError
        What `refusal` makes, here and in each method.
    """

    _NONE: Any = object()

    def __init__(self, value: Any, what: str, refusal: Refusal = UsageError) -> None:
        if not isinstance(value, dict):
            raise refusal(f"{what}: {_shown(value)} is no JSON object")
        self._value: dict[str, Any] = value
        self.what, self.refusal = what, refusal

    def _member(self, name: str, default: Any) -> Any:
        value = self._value.get(name, self._NONE)
        if value is self._NONE:
            if default is self._NONE:
                raise self.refusal(f"{self.what}: {visible(name, 60)} is missing")
            return default
        return value

    def _wrong(self, name: str, value: Any, must: str) -> VirtioError:
        return self.refusal(f"{self.what}: {visible(name, 60)} is {_shown(value)}, it must be {must}")

    def integer(self, name: str, low: int = 0, high: int = U64, *, default: int = _NONE) -> int:
        """Return an integer from `low` to `high`."""
        value = self._member(name, default)
        if type(value) is not int or not low <= value <= high:
            raise self._wrong(name, value, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, low: float = 0.0, high: float = 1e12, *, default: float = _NONE) -> float:
        """Return a finite number from `low` to `high`."""
        value = self._member(name, default)
        if type(value) not in (int, float) or not low <= value <= high:
            raise self._wrong(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def boolean(self, name: str, *, default: bool = _NONE) -> bool:
        """Return true or false."""
        value = self._member(name, default)
        if type(value) is not bool:
            raise self._wrong(name, value, "true or false")
        return value

    def text(self, name: str, most: int = 4096, *, default: str = _NONE) -> str:
        """Return a text of at most `most` characters that can be encoded; it may hold control characters."""
        value = self._member(name, default)
        if not isinstance(value, str) or len(value) > most:
            raise self._wrong(name, value, f"a text of at most {most} characters")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self._wrong(name, value, "a text that can be encoded") from None
        return value

    def hexadecimal(self, name: str, size: int) -> bytes:
        """Return `size` bytes that are written as hexadecimal digits."""
        value = self.text(name, 2 * size)
        try:
            data = bytes.fromhex(value)
        except ValueError:
            data = b""
        if len(data) != size or len(value) != 2 * size:
            raise self._wrong(name, value, f"{size} bytes in hexadecimal")
        return data

    def items(self, name: str, most: int, *, default: list[Any] = _NONE) -> list[Any]:
        """Return a list of at most `most` values, which are not checked."""
        value = self._member(name, default)
        if not isinstance(value, list) or len(value) > most:
            raise self._wrong(name, value, f"a list of at most {most} items")
        return value

    def objects(self, name: str, most: int, *, default: list[Any] = _NONE) -> list[Fields]:
        """Return the objects of a list of at most `most`."""
        found = self.items(name, most, default=default)
        return [Fields(item, f"{self.what}: {name}[{i}]", self.refusal) for i, item in enumerate(found)]

    def pairs(self, name: str, most: int, high: int = U64, *, default: list[Any] = _NONE) -> list[tuple[int, int]]:
        """Return a list of at most `most` pairs of integers from 0 to `high`."""
        found = []
        for i, item in enumerate(self.items(name, most, default=default)):
            if (
                not isinstance(item, (list, tuple))
                or len(item) != 2
                or any(type(part) is not int or not 0 <= part <= high for part in item)
            ):
                raise self._wrong(f"{name}[{i}]", item, f"two integers from 0 to {high}")
            found.append((item[0], item[1]))
        return found

    def members(self, name: str, *, default: dict[str, Any] = _NONE) -> Fields:
        """Return the members of an object within."""
        return Fields(self._member(name, default), f"{self.what}: {visible(name, 60)}", self.refusal)

    def choice(self, name: str, among: dict[str, T], *, default: str = _NONE) -> T:
        """Return what a text that is one of the names in `among` stands for."""
        value = self._member(name, default)
        if not isinstance(value, str) or value not in among:
            raise self._wrong(name, value, f"one of {', '.join(among)}")
        return among[value]

    def any(self, name: str) -> Any:
        """Return whatever is there, not checked."""
        return self._member(name, self._NONE)

    def __contains__(self, name: str) -> bool:
        return name in self._value

    @property
    def names(self) -> list[str]:
        """Names of all members."""
        return list(self._value)


def _shown(value: Any) -> str:
    """Return a value for an error: short, printable, whatever it is."""
    if isinstance(value, str):
        return quoted(value, 60)
    if isinstance(value, dict):
        return f"an object of {len(value)} members"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)} items"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    return quoted(repr(value), 60)[1:-1] if value is not None else "null"


def visible(text: str, most: int = 400) -> str:
    r"""Return a text of somebody else's so that a terminal only shows it: escapes as ``\x1b``, shortened.

    Letters of any script stay; line ends, control characters, direction marks and half surrogates do not.
    """
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: most + 1])
    return shown if len(text) <= most else f"{shown[:most]}... ({len(text)} characters)"
