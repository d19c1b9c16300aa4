"""Checks of single values: a ValueError names the field and what it holds."""

from __future__ import annotations

import difflib
import math


def choice(name: str, value, allowed: tuple):
    if not any(value is a or (type(value) is type(a) and value == a) for a in allowed):
        listed = ", ".join(repr(a) for a in allowed if a is not None)
        raise ValueError(f"{name}={value!r} must be one of {listed}")


def integer(name: str, value, low: int, high: float = math.inf):
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        upper = "" if high == math.inf else f" and <= {high}"
        raise ValueError(f"{name}={value!r} must be an integer >= {low}{upper}")


def number(name: str, value, low: float, high: float, above: bool = False, below: bool = False):
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    fits = fits and (low < value if above else low <= value) and (value < high if below else value <= high)
    if not fits:
        lower = f"{'>' if above else '>='} {low}"
        upper = " and finite" if high == math.inf else f" and {'<' if below else '<='} {high}"
        raise ValueError(f"{name}={value!r} must be a number {lower}{upper}")


def optional(check, name: str, value, *limits, **options):
    if value is not None:
        check(name, value, *limits, **options)


def nearest_choice(name: str, value, allowed):
    """Like `choice` among names, with the nearest one in the message."""
    if value in allowed:
        return
    near = difflib.get_close_matches(str(value), list(allowed), 1)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}{meant}")
