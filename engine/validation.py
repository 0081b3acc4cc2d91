"""Check the values of settings and requests."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, TypeVar

P = TypeVar("P")


def is_integer(value: Any) -> bool:
    """Return whether a value is an integer, which a bool is not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return whether a value is a real number, finite as a float; a bool is none."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def make_policy(
    setting: str, policy: str | Callable[[], P], named: Mapping[str, Callable[[], P]], base: type
) -> P:
    """Return the policy that a setting names, or that its function makes.

    Raises:
        ValueError: the function makes something else.
    """
    made = named[policy]() if isinstance(policy, str) else policy()
    if not isinstance(made, base):
        raise ValueError(
            f"{setting} must make a {base.__name__}, and made {made!r}: pass a class derived from it, or a "
            "function that returns an object of one"
        )
    return made
