"""What a user gives is looked at once, before anything trains on it."""

import math
import operator
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor


def choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse what is none of the choices.

    Raises
    ------
    ValueError
        If so.
    """
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose from {', '.join(map(repr, choices))}")


def check_alphas(l1: Any) -> None:
    """Refuse what is no weight of a penalty.

    Raises
    ------
    TypeError
        If one is no number.
    ValueError
        If an alpha is negative or not finite.
    """
    for alpha in as_numbers("l1", list(l1.values()) if isinstance(l1, Mapping) else l1):
        if not (math.isfinite(alpha) and alpha >= 0):
            raise ValueError(f"l1 is {alpha}, but the weight of a penalty is at least 0")


def check_margins(margin: float | Sequence[float]) -> None:
    """Refuse what is no margin, or no list of them.

    Raises
    ------
    TypeError
        If one is no number.
    ValueError
        If one is out of [0, 1).
    """
    for m in as_numbers("margin", margin):
        if not 0 <= m < 1:
            raise ValueError(
                f"margin is {m}, but it is a share of accuracy in [0, 1): 0.0005 allows a drop "
                "of 0.05 points"
            )


def check_policy(expand: Mapping[str, tuple[int, int]]) -> None:
    """Refuse what is no rule for widening layers.

    Raises
    ------
    TypeError
        If it is no dict.
    ValueError
        If a layer's rule is no pair of numbers that are at least 1.
    """
    if not isinstance(expand, Mapping):
        raise TypeError(f"expand is {expand!r}; give a dict, (below, by) for each layer to widen")
    for layer, rule in expand.items():
        numbers = list(rule) if isinstance(rule, Sequence) and not isinstance(rule, str) else []
        if len(numbers) != 2 or not all(type(n) is int and n >= 1 for n in numbers):
            raise ValueError(
                f"expand has {rule!r} for layer {layer!r}; give (below, by), both integers and at "
                "least 1: fewer free units than the first, and as many more as the second"
            )


def as_numbers(name: str, value: Any) -> list[float]:
    """A number, or a list of them, as a list.

    Raises
    ------
    TypeError
        If one is no number.
    """
    many = isinstance(value, Sequence) and not isinstance(value, str)
    numbers = list(value) if many else [value]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, Real):
            raise TypeError(f"{name} is {value!r}; give a number, or a list of them")
    return numbers


def integer(name: str, value: Any) -> int:
    """Return an integer, one of NumPy's too.

    Raises
    ------
    TypeError
        If it is none.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; give an integer") from None


def shown(value: Any) -> str:
    """What a value is, in a few words."""
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
    return f"a {type(value).__name__}{shape}"
