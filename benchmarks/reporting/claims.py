"""Verdicts on the paper's claims; every number of the paper comes from the targets files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from benchmarks.reporting.frames import by_method
from benchmarks.reporting.load import Cell, Targets, label
from benchmarks.reporting.stats import (
    backward_transfer,
    equivalence,
    holm,
    mean_accuracy,
    paired,
    summarise,
)
from benchmarks.reporting.tables import Table
from benchmarks.reporting.text import magnitude, number, p_value, plus_minus, seed_list

NOT_MEASURED = "not yet measured"


@dataclass(frozen=True)
class Verdict:
    """What our records say about one claim."""

    id: str
    text: str
    place: str
    word: str
    """reproduced, partly, not shown, not reproduced, not yet measured; with one seed consistent
    (n = 1), partly consistent (n = 1) or not consistent (n = 1)."""
    evidence: str
    """The numbers that the word rests on, n, and what each part of the claim comes to."""
    reading: str
    """When the claim counts as reproduced."""


@dataclass(frozen=True)
class Part:
    """One testable half of a claim."""

    n: int
    holds: bool
    """The mean lies where the claim says."""
    shown: bool
    """And this is more than chance, as far as n allows to say (TOST or an interval)."""
    evidence: str

    @property
    def state(self) -> str:
        """What the part comes to, in a word or two; one seed shows nothing."""
        if not self.holds:
            return "Fails"
        if self.n == 1:
            return "Holds"
        return "Shown" if self.shown else "Holds, not shown"


class Missing(Exception):
    """Records that a claim needs are not there; the message says which."""


class Unlearnt(Exception):
    """A run was long enough, but a task that a claim is about found no room: it does not hold."""

    def __init__(self, cells: Sequence[Cell], message: str) -> None:
        super().__init__(message)
        self.part = Part(len(cells), holds=False, shown=False, evidence=message)


def verdict(claim: Targets, target: Targets, cells: Sequence[Cell]) -> Verdict:
    """Return the verdict on one claim.

    Parameters
    ----------
    claim
        One entry of ``claims`` in a targets file.
    target
        The whole file.
    cells
        Cells of the file's experiment.
    """
    check = CHECKS.get(claim["id"])
    try:
        if check is None or not cells:
            raise Missing("No records.")
        try:
            parts = check(claim, target, cells)
        except Unlearnt as unlearnt:
            parts = [unlearnt.part]
        word = judge(parts)
        evidence = " ".join(f"{part.evidence} {part.state}." for part in parts)
    except Missing as missing:
        word, evidence = NOT_MEASURED, str(missing)
    return Verdict(
        claim["id"], claim["text"], claim["place"], word, evidence, claim.get("reading", "")
    )


def judge(parts: Sequence[Part]) -> str:
    """Return the word for a claim of several parts.

    With two seeds or more a part counts only if it is *shown*: where some mean lies where the claim
    says, but no part is shown, the claim isn't either. With one seed nothing is ever "reproduced".
    """
    holding = [part.holds for part in parts]
    if min(part.n for part in parts) == 1:
        if all(holding):
            return "consistent (n = 1)"
        return "partly consistent (n = 1)" if any(holding) else "not consistent (n = 1)"
    shown = [part.shown and part.holds for part in parts]
    if all(shown):
        return "reproduced"
    if any(shown):
        return "partly"
    return "not shown" if any(holding) else "not reproduced"


def _cells(cells: Sequence[Cell], method: str) -> list[Cell]:
    mine = [cell for cell in cells if cell.method == method]
    if not mine:
        raise Missing(f"No record of {label(method)}.")
    return mine


def _n(seeds: Sequence[int]) -> str:
    return f"n = {len(seeds)}, seed{'s' if len(seeds) > 1 else ''} {seed_list(seeds)}"


def _near(
    what: str,
    seeds: Sequence[int],
    values: Sequence[float],
    aim: float,
    margin: float,
    alpha: float,
) -> Part:
    """Return whether values lie within `margin` of `aim`: by TOST from two seeds on."""
    summary = summarise(list(values), 1 - alpha)
    p = equivalence(list(values), aim, margin)
    tost = f"; TOST p = {p_value(p)}".replace("= <", "<") if summary.n > 1 else ""
    return Part(
        n=summary.n,
        holds=abs(summary.mean - aim) < margin,
        shown=p < alpha,
        evidence=f"{what}: {plus_minus(summary.mean, summary.sd)} "
        f"against {aim:g} ± {margin:g} ({_n(seeds)}{tost}).",
    )


def _within(
    what: str, seeds: Sequence[int], values: Sequence[float], low: float, high: float, alpha: float
) -> Part:
    """Return whether values lie between two bounds: by the interval of their mean."""
    summary = summarise(list(values), 1 - alpha)
    bounds = f"at most {high:g}" if low == -np.inf else f"between {low:g} and {high:g}"
    if high == np.inf:
        bounds = f"at least {low:g}"
    return Part(
        n=summary.n,
        holds=low <= summary.mean <= high,
        shown=summary.low >= low and summary.high <= high,
        evidence=f"{what}: {plus_minus(summary.mean, summary.sd)} against {bounds} ({_n(seeds)}).",
    )


def _mean_of_all(cells: Sequence[Cell]) -> dict[int, float]:
    """Return the mean test accuracy over all tasks after the last one, in %, by seed."""
    for cell in cells:
        if missing := int(np.isnan(cell.test[-1]).sum()):
            raise Unlearnt(
                cells,
                f"{cell.name} has learnt {len(cell.test) - missing} of {len(cell.test)} tasks.",
            )
    return {cell.seed: mean_accuracy(cell.test) for cell in cells}


def accuracy(claim: Targets, target: Targets, cells: Sequence[Cell]) -> list[Part]:
    """T1: our accuracy is the paper's, and that of single-task training."""
    alpha = target["significance"]
    mine = _cells(cells, claim["method"])
    values = _mean_of_all(mine)
    name, reference = label(claim["method"]), label(claim["reference"])
    near = _near(
        f"{name}, mean test accuracy in %",
        list(values),
        list(values.values()),
        claim["accuracy"],
        claim["margin"],
        alpha,
    )
    theirs = _mean_of_all(_cells(cells, claim["reference"]))
    both = [seed for seed in values if seed in theirs]
    if not both:
        raise Missing(f"{name} and {reference} have no seed in common.")
    differences = [values[seed] - theirs[seed] for seed in both]
    return [
        near,
        _near(
            f"{name} − {reference} in points",
            both,
            differences,
            0,
            claim["reference_margin"],
            alpha,
        ),
    ]


def order(claim: Targets, target: Targets, cells: Sequence[Cell]) -> list[Part]:
    """T1-order: each method is above the next one."""
    absent = [label(m) for m in claim["order"] if m not in {cell.method for cell in cells}]
    if absent:
        raise Missing(f"No record of {', '.join(absent)}.")
    groups = by_method(cells)
    values = {method: _mean_of_all(groups[method]) for method in claim["order"]}
    pairs = list(zip(claim["order"], claim["order"][1:], strict=False))
    seeds = [sorted(values[above].keys() & values[below].keys()) for above, below in pairs]
    if not all(seeds):
        raise Missing("Neighbours in the order have no seed in common.")
    results = [
        paired([values[above][s] for s in common], [values[below][s] for s in common])
        for (above, below), common in zip(pairs, seeds, strict=True)
    ]
    corrected = holm([result.p_t for result in results])
    parts = []
    for (above, below), common, result, p in zip(pairs, seeds, results, corrected, strict=True):
        test = f"; p (Holm) = {p_value(p)}".replace("= <", "<") if result.n > 1 else ""
        parts.append(
            Part(
                n=result.n,
                holds=result.difference > 0,
                shown=result.difference > 0 and p < target["significance"],
                evidence=f"{label(above)} − {label(below)}: "
                f"{number(result.difference, sign=True)} points ({_n(common)}{test}).",
            )
        )
    return parts


def _use(claim: Targets, target: Targets, cells: Sequence[Cell]) -> tuple[str, pd.DataFrame]:
    """Return a layer's name and its use, one row a seed, one column a task (in %, from task 1)."""
    mine = _cells(cells, claim["method"])
    rows = {}
    for cell in mine:
        if cell.capacity.empty:
            raise Missing(f"{cell.name} has no capacity.")
        layers = list(dict.fromkeys(cell.capacity["layer"]))
        if claim["layer"] >= len(layers):
            raise Missing(f"{cell.name} has no hidden layer {claim['layer'] + 1}.")
        name = layers[claim["layer"]]
        of_layer = cell.capacity[cell.capacity["layer"] == name].sort_values("task")
        if len(cell.test) != target["tasks"]:
            raise Missing(f"{cell.name} has {len(cell.test)} of {target['tasks']} tasks.")
        if len(of_layer) != target["tasks"]:
            raise Unlearnt(
                mine, f"{cell.name} has learnt {len(of_layer)} of {target['tasks']} tasks."
            )
        rows[cell.seed] = [100 * share for share in of_layer["used_fraction"]]
    return str(name), pd.DataFrame.from_dict(rows, orient="index")


def _final_use(claim: Targets, target: Targets, name: str, shares: pd.DataFrame) -> Part:
    return _near(
        f"{name} after task {target['tasks']}, used in %",
        list(shares.index),
        list(shares.iloc[:, -1]),
        claim["share"],
        claim["margin"],
        target["significance"],
    )


def slow_growth(claim: Targets, target: Targets, cells: Sequence[Cell]) -> list[Part]:
    """F3-first: little use is added after task 1, and the final share is the paper's."""
    name, shares = _use(claim, target, cells)
    return [
        _within(
            f"{name}, final use over use after task 1",
            list(shares.index),
            list(shares.iloc[:, -1] / shares.iloc[:, 0]),
            -np.inf,
            claim["growth"],
            target["significance"],
        ),
        _final_use(claim, target, name, shares),
    ]


def linear_growth(claim: Targets, target: Targets, cells: Sequence[Cell]) -> list[Part]:
    """F3-second: the second half of the tasks takes as much as the first; final share."""
    name, shares = _use(claim, target, cells)
    half = shares.iloc[:, target["tasks"] // 2 - 1]
    low, high = claim["linear"]
    return [
        _within(
            f"{name}, use added by the second half of the tasks over that of the first",
            list(shares.index),
            list((shares.iloc[:, -1] - half) / half),
            low,
            high,
            target["significance"],
        ),
        _final_use(claim, target, name, shares),
    ]


def lasting(claim: Targets, target: Targets, cells: Sequence[Cell]) -> list[Part]:
    """P-25: only a run of that many tasks can tell; say how far ours got."""
    cell = _cells(cells, claim["method"])[0]
    raise Missing(f"Our runs have {len(cell.test)} tasks; {claim['tasks']} are needed.")


def no_forgetting(claim: Targets, target: Targets, cells: Sequence[Cell]) -> list[Part]:
    """ZERO: neither a logit nor an accuracy on an old task ever changes."""
    mine = _cells(cells, claim["method"])
    if any(np.isnan(cell.drift) for cell in mine):
        raise Missing("A record has no logit drift.")
    drift = max(cell.drift for cell in mine)
    moved = max(float(np.nanmax(np.abs(cell.test - np.diag(cell.test)))) for cell in mine)
    transfer = summarise([backward_transfer(cell.test) for cell in mine]).mean
    exact = max(drift, moved) <= claim["drift"]
    return [
        Part(
            n=len(mine),
            holds=exact,
            shown=exact,
            evidence=f"Largest logit drift {magnitude(drift)}; largest change of an old task's "
            f"test accuracy {magnitude(moved)} points, BWT {number(transfer, sign=True)} "
            f"({_n([cell.seed for cell in mine])}).",
        )
    ]


def _means(cells: Sequence[Cell], method: str, part: str, tasks: slice) -> dict[int, float]:
    """Return the mean accuracy over some tasks after the last one, in %, by seed."""
    found, mine = {}, _cells(cells, method)
    for cell in mine:
        values = getattr(cell, part)[-1, tasks]
        if not len(values):
            raise Missing(f"{cell.name} has {len(cell.test)} tasks; more are needed.")
        if np.isnan(values).any():
            raise Unlearnt(mine, f"{cell.name} has not learnt all tasks that the claim is about.")
        found[cell.seed] = float(values.mean())
    return found


def _difference(
    what: str,
    one: dict[int, float],
    other: dict[int, float],
    low: float,
    high: float,
    alpha: float,
) -> Part:
    """Return whether per-seed differences lie between two bounds."""
    both = [seed for seed in one if seed in other]
    if not both:
        raise Missing(f"{what}: no seed in common.")
    differences = [one[seed] - other[seed] for seed in both]
    summary = summarise(differences, 1 - alpha)
    bounds = f"at least {low:g}" if high == np.inf else f"at most {high:g}"
    return Part(
        n=summary.n,
        holds=low <= summary.mean <= high,
        shown=summary.low >= low and summary.high <= high,
        evidence=f"{what}: {plus_minus(summary.mean, summary.sd)} points, to be {bounds} "
        f"({_n(both)}).",
    )


def _compared(
    claim: Targets,
    cells: Sequence[Cell],
    one: str,
    other: str,
    where: str,
    tasks: slice,
    low: float,
    high: float,
    alpha: float,
) -> Part:
    """Return whether one method's accuracy less another's lies between two bounds."""
    part = claim["part"]
    return _difference(
        f"{label(one)} − {label(other)} on {where}, {part} data",
        _means(cells, one, part, tasks),
        _means(cells, other, part, tasks),
        low,
        high,
        alpha,
    )


def _share(
    cells: Sequence[Cell], method: str, layer: int, task: int
) -> tuple[str, dict[int, float]]:
    """Return a layer's name and its use after a task (from 1), in %, by seed."""
    shares, name, mine = {}, "", _cells(cells, method)
    for cell in mine:
        layers = list(dict.fromkeys(cell.capacity["layer"])) if len(cell.capacity) else []
        if not -len(layers) <= layer < len(layers):
            raise Missing(f"{cell.name} has no hidden layer {layer + 1}.")
        name = str(layers[layer])
        rows = cell.capacity[(cell.capacity["layer"] == name) & (cell.capacity["task"] == task - 1)]
        if len(cell.test) < task:
            raise Missing(f"{cell.name} has {len(cell.test)} tasks; {task} are needed.")
        if len(rows) != 1:
            raise Unlearnt(mine, f"{cell.name} has not learnt task {task}.")
        shares[cell.seed] = 100 * float(rows["used_fraction"].iloc[0])
    return name, shares


def _use_within(
    claim: Targets,
    target: Targets,
    cells: Sequence[Cell],
    layer: int,
    task: int,
    low: float,
    high: float,
) -> Part:
    name, shares = _share(cells, claim["method"], layer, task)
    what = f"{label(claim['method'])}, {name} after task {task}, used in %"
    return _within(what, list(shares), list(shares.values()), low, high, target["significance"])


def above_on_every_task(claim: Targets, target: Targets, cells: Sequence[Cell]) -> list[Part]:
    """F4-order: a method is above another on each task."""
    one, other = claim["method"], claim["reference"]
    alpha = target["significance"] / target["tasks"]
    return [
        _compared(
            claim, cells, one, other, f"task {task + 1}", slice(task, task + 1), 0, np.inf, alpha
        )
        for task in range(target["tasks"])
    ]


def runs_out(claim: Targets, target: Targets, cells: Sequence[Cell]) -> list[Part]:
    """F4-m1: the last hidden layer is full after a task, and later tasks suffer."""
    later, after, alpha = slice(claim["after"], None), claim["after"], target["significance"]
    one, other, where = claim["method"], claim["reference"], f"the tasks after {after}"
    return [
        _use_within(claim, target, cells, claim["layer"], after, claim["share"], np.inf),
        _compared(claim, cells, one, other, where, later, -np.inf, -claim["drop"], alpha),
    ]


def lasts(claim: Targets, target: Targets, cells: Sequence[Cell]) -> list[Part]:
    """F4-m2: units are left before the last task, and the later tasks keep their accuracy."""
    later, before_last = slice(claim["after"], None), target["tasks"] - 1
    one, other, where = claim["method"], claim["reference"], f"the tasks after {claim['after']}"
    low, alpha = -claim["drop"], target["significance"]
    return [
        _use_within(claim, target, cells, claim["layer"], before_last, -np.inf, claim["share"]),
        _compared(claim, cells, one, other, where, later, low, np.inf, alpha),
    ]


def full_at_once(claim: Targets, target: Targets, cells: Sequence[Cell]) -> list[Part]:
    """F4-full: the first task fills some layers."""
    return [
        _use_within(claim, target, cells, layer, 1, claim["share"], np.inf)
        for layer in claim["layers"]
    ]


def fine_tuned(claim: Targets, target: Targets, cells: Sequence[Cell]) -> list[Part]:
    """F4-ft: no loss on task 1 against training it alone; later tasks above those without."""
    one, alone, other = claim["method"], claim["scratch"], claim["reference"]
    first, later, alpha = slice(0, 1), slice(1, None), target["significance"]
    low = -claim["margin"]
    return [
        _compared(claim, cells, one, alone, "task 1", first, low, np.inf, alpha),
        _compared(claim, cells, one, other, "the later tasks", later, 0, np.inf, alpha),
    ]


def holds_tasks(claim: Targets, target: Targets, cells: Sequence[Cell]) -> list[Part]:
    """F5-ten: so many tasks are learnt, and no more."""
    mine = _cells(cells, claim["method"])
    if any(len(cell.test) <= claim["tasks"] for cell in mine):
        raise Missing(f"A run of more than {claim['tasks']} tasks is needed.")
    learnt = [int(np.isfinite(cell.test[-1]).sum()) for cell in mine]
    exact = all(number == claim["tasks"] for number in learnt)
    counts = ", ".join(map(str, learnt))
    return [
        Part(
            n=len(mine),
            holds=exact,
            shown=exact,
            evidence=f"Tasks learnt: {counts} ({_n([cell.seed for cell in mine])}).",
        )
    ]


def _new(cells: Sequence[Cell], method: str, layer: int) -> tuple[str, dict[int, list[int]]]:
    """Return a layer's name and its new units by task, for each seed."""
    name, found = "", {}
    for cell in _cells(cells, method):
        layers = list(dict.fromkeys(cell.capacity["layer"])) if len(cell.capacity) else []
        if not -len(layers) <= layer < len(layers):
            raise Missing(f"{cell.name} has no hidden layer {layer + 1}.")
        name = str(layers[layer])
        rows = cell.capacity[cell.capacity["layer"] == name].sort_values("task")
        found[cell.seed] = [int(number) for number in rows["new"]]
    return name, found


def even_then_short(claim: Targets, target: Targets, cells: Sequence[Cell]) -> list[Part]:
    """F5-linear: early tasks take alike; little is left for a later one, whose accuracy suffers."""
    even, task = claim["even"], claim["task"]
    name, new = _new(cells, claim["method"], claim["layer"])
    mine, most = _cells(cells, claim["method"]), max(even, task)
    if any(len(cell.test) < most for cell in mine):
        raise Missing(f"A run of at least {most} tasks is needed.")
    if any(len(numbers) < most or min(numbers[:even]) == 0 for numbers in new.values()):
        raise Unlearnt(mine, f"Not all of the first {most} tasks took units of {name}.")
    one, other = claim["method"], claim["reference"]
    at, alpha = slice(task - 1, task), target["significance"]

    def gap(tasks: slice) -> dict[int, float]:
        ours, alone = (_means(cells, method, claim["part"], tasks) for method in (one, other))
        return {seed: ours[seed] - alone[seed] for seed in ours if seed in alone}

    less = f"The same less that on tasks 1–{even}, {claim['part']} data"
    return [
        _within(
            f"{name}, most new units of tasks 1–{even} over fewest",
            list(new),
            [max(numbers[:even]) / min(numbers[:even]) for numbers in new.values()],
            -np.inf,
            claim["ratio"],
            target["significance"],
        ),
        _use_within(claim, target, cells, claim["layer"], task, claim["share"], np.inf),
        _compared(claim, cells, one, other, f"task {task}", at, -np.inf, 0, alpha),
        _difference(less, gap(at), gap(slice(even)), -np.inf, 0, alpha),
    ]


def small_drop(claim: Targets, target: Targets, cells: Sequence[Cell]) -> list[Part]:
    """F5-drop: the cut costs task 1 little, and the later tasks nothing."""
    mine = _cells(cells, claim["method"])
    if any(cell.cuts.empty for cell in mine):
        raise Missing("A record does not tell what the first cut cost.")
    drops = [float(cell.cuts["best"].iloc[0] - cell.cuts["pruned"].iloc[0]) for cell in mine]
    return [
        _within(
            "Task 1, validation accuracy lost by the cut in points",
            [cell.seed for cell in mine],
            drops,
            -np.inf,
            claim["drop"],
            target["significance"],
        ),
        *no_forgetting(claim, target, cells),
    ]


def early_layers_stop(claim: Targets, target: Targets, cells: Sequence[Cell]) -> list[Part]:
    """F5-early: each layer but the last of them stops growing after its task."""
    parts = []
    for layer, last in enumerate(claim["last_growth"]):
        name, new = _new(cells, claim["method"], layer)
        grown = {
            seed: max((task + 1 for task, number in enumerate(numbers) if number), default=0)
            for seed, numbers in new.items()
        }
        exact = all(task == last for task in grown.values())
        shown = ", ".join(map(str, grown.values()))
        parts.append(
            Part(
                n=len(grown),
                holds=exact,
                shown=exact,
                evidence=f"{name}: last task with new units {shown} against {last} "
                f"({_n(list(grown))}).",
            )
        )
    return parts


CHECKS: dict[str, Callable[[Targets, Targets, Sequence[Cell]], list[Part]]] = {
    "T1": accuracy,
    "T1-order": order,
    "F3-first": slow_growth,
    "F3-second": linear_growth,
    "P-25": lasting,
    "ZERO": no_forgetting,
    "F4-order": above_on_every_task,
    "F4-m1": runs_out,
    "F4-m2": lasts,
    "F4-full": full_at_once,
    "F4-ft": fine_tuned,
    "F5-ten": holds_tasks,
    "F5-linear": even_then_short,
    "F5-drop": small_drop,
    "F5-early": early_layers_stop,
}
"""How each claim is checked; one without an entry is not measured yet."""


def claims_table(target: Targets, cells: Sequence[Cell]) -> Table:
    """Return the verdicts on all claims of one targets file."""
    verdicts = [verdict(claim, target, cells) for claim in target["claims"]]
    frame = pd.DataFrame([vars(v) for v in verdicts])
    text = frame.rename(
        columns={
            "id": "Claim",
            "text": "The paper says",
            "place": "Where",
            "word": "Verdict",
            "evidence": "Our numbers",
            "reading": "Reproduced means",
        }
    )
    return Table(
        name="claims",
        caption=f"The paper's claims ({target['source']})",
        numbers=frame,
        text=text,
        notes=CLAIM_NOTES,
        widths=(0.17, 0.08, 0.09, 0.27, 0.16),
    )


CLAIM_NOTES = (
    "Reproduced: shown in every part, from two seeds on (accuracies and shares: TOST with the "
    "margin of the targets file; others: the whole interval). Partly: shown in some part. Not "
    "shown: the mean of some part lies where the claim says, but may do so by chance. Not "
    "reproduced: none does. One seed can only be consistent or not.",
)
