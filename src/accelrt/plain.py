"""Checks of plain data that was read from JSON, which may be anything: each returns the value, typed, or raises."""

from __future__ import annotations

from typing import Any


def text(value: object) -> str:
    """Return text.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def whole(value: object) -> int:
    """Return a whole number; true and false are none.

    Raises:
        TypeError: It is something else.
    """
    if type(value) is not int:
        raise TypeError(f"{value!r} is not a whole number")
    return value


def number(value: object) -> float:
    """Return a number; true and false are none.

    Raises:
        TypeError: It is something else.
        ValueError: It is larger than a float can be, as whole numbers in JSON may be.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"a number of {len(str(value))} digits is none that was measured") from error


def items(value: object) -> list[Any]:
    """Return a list.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is not a list")
    return value


def mapping(value: object) -> dict[str, Any]:
    """Return a mapping; JSON's have texts for keys.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is not a mapping")
    return value


def one_of(value: object, known: tuple[str, ...]) -> Any:
    """Return one of several texts.

    Raises:
        ValueError: It is none of them.
    """
    if value not in known:
        raise ValueError(f"{value!r} is none of {', '.join(known)}")
    return value
