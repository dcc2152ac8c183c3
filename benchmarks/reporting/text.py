"""Numbers as readers see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

NONE = "—"
"""Where there is no number."""


def number(value: float | None, decimals: int = 2, sign: bool = False) -> str:
    """Return a number with fixed decimals and a true minus; a dash if there is none."""
    if value is None or pd.isna(value):
        return NONE
    value = round(float(value), decimals) + 0.0  # + 0.0: no "-0.00"
    return f"{value:{'+' if sign and value else ''}.{decimals}f}".replace("-", "−")


def plus_minus(mean: float | None, sd: float | None, decimals: int = 2) -> str:
    """Return ``mean ± sd``, or the mean alone."""
    if sd is None or pd.isna(sd):
        return number(mean, decimals)
    return f"{number(mean, decimals)} ± {number(sd, decimals)}"


def interval(low: float, high: float, decimals: int = 2, sign: bool = False) -> str:
    """Return ``low to high``, or a dash."""
    if pd.isna(low):
        return NONE
    return f"{number(low, decimals, sign)} to {number(high, decimals, sign)}"


def magnitude(value: float) -> str:
    """Return a drift: "0" for exactly 0 alone, else two significant digits."""
    if pd.isna(value):
        return NONE
    return "0" if value == 0 else f"{float(f'{value:.2g}'):g}"


def count(value: Any) -> str:
    """Return a number of parameters in thousands or millions, three significant digits."""
    if pd.isna(value):
        return NONE
    for size, unit in ((1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:#.3g}".rstrip(".") + unit
    return str(int(value))


def duration(minutes: float) -> str:
    """Return a time in seconds, minutes or hours."""
    if pd.isna(minutes):
        return NONE
    if minutes < 2:
        return f"{60 * minutes:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def p_value(p: float) -> str:
    """Return a p value with three decimals."""
    if pd.isna(p):
        return NONE
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def seed_list(seeds: Sequence[int]) -> str:
    """Return seeds in order, runs joined: ``0–4, 7``."""
    runs: list[list[int]] = []
    for seed in sorted(seeds):
        if runs and seed == runs[-1][-1] + 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    return ", ".join(f"{r[0]}–{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs) or NONE


def over(learnt: int, tasks: int) -> str:
    """Return over how many tasks a mean is, if not over all."""
    return f", over {learnt} of {tasks} tasks" if learnt < tasks else ""


def yes_no(value: Any) -> str:
    """Return yes, no or a dash."""
    return NONE if pd.isna(value) else "yes" if value else "no"


def setting(value: Any) -> str:
    """Return a setting's value as it is given on the command line."""
    if isinstance(value, list):
        return "/".join(map(setting, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def alphas(value: Any) -> str:
    """Return L1 strengths: one, by layer, or a list."""
    if isinstance(value, dict):
        return ", ".join(f"{layer} {alpha:g}" for layer, alpha in value.items())
    return ", ".join(f"{alpha:g}" for alpha in (value if isinstance(value, list) else [value]))
