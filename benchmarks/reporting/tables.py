"""Tables: every number of a report, as frames and as Markdown, LaTeX and CSV."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
import pandas as pd

from benchmarks.experiment import canonical
from benchmarks.records import Tuning, tuned_method
from benchmarks.reporting.load import (
    SEARCH,
    Cell,
    Targets,
    below_margin,
    label,
    margin,
    rank,
)
from benchmarks.reporting.stats import (
    NAN,
    Summary,
    backward_transfer,
    holm,
    mean_accuracy,
    mean_of_learnt,
    paired,
    summarise,
)

TEMPLATES = Path(__file__).parent / "templates"
NONE = "—"
KINDS = ("reused", "not_reused", "new", "free")
"""What a layer's units are for a task."""
REFERENCE = "clnp"
"""The method that the others are compared with, unless a targets file names another."""


@dataclass(frozen=True, eq=False)
class Table:
    """One table: numbers for machines, text for readers."""

    name: str
    """Stem of its files."""
    caption: str
    numbers: pd.DataFrame
    """As they go into the CSV."""
    text: pd.DataFrame
    """Strings, with the headings that readers see."""
    notes: tuple[str, ...] = ()
    widths: tuple[float, ...] = ()
    """Shares of the page for columns of sentences (all but the first); () for numbers."""


# ---------------------------------------------------------------- text of numbers


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


def seeds_note(cells: Sequence[Cell]) -> str:
    """Return which seeds a table rests on, methods with the same seeds together."""
    seeds: dict[str, list[str]] = {}
    for method, mine in by_method(cells).items():
        text = f"n = {len(mine)} (seeds {seed_list([cell.seed for cell in mine])})"
        seeds.setdefault(text.replace("seeds", "seed") if len(mine) == 1 else text, []).append(
            label(method)
        )
    if not seeds:
        return "No records yet."
    if len(seeds) == 1 and len(by_method(cells)) == 1:
        return f"{next(iter(seeds))}."
    return "; ".join(f"{', '.join(methods)}: {text}" for text, methods in seeds.items()) + "."


def split_note(cells: Sequence[Cell]) -> str:
    """Return on what is tested, and what the training went without; "" if records don't tell."""
    held = {json.loads(cell.settings)["experiment"].get("validation") for cell in cells}
    if len(held) != 1 or (out := held.pop()) is None:
        return ""
    what = f"{out:,} training images" if out >= 1 else f"{100 * out:g} % of the training images"
    return f"Test set; {what if out else 'nothing'} held out for validation."


def by_method(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Return the cells of each method, in the order of the cells."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.method, []).append(cell)
    return found


# ---------------------------------------------------------------- frames of numbers


def per_seed(cells: Sequence[Cell]) -> pd.DataFrame:
    """Return one row a cell: its result, its cost and where it comes from."""
    rows = [
        {
            "method": cell.method,
            "seed": cell.seed,
            "hash": cell.hash[:8],
            "accuracy": mean_accuracy(cell.test),
            "bwt": backward_transfer(cell.test),
            "logit_drift": cell.drift,
            "task_id_at_test": cell.task_id,
            "trainable": cell.trainable,
            "stored": cell.stored,
            "train_minutes": cell.minutes,
            "commit": cell.commit,
            "hardware": cell.hardware,
            "torch": cell.torch,
            **{f"task_{j + 1}": value for j, value in enumerate(cell.test[-1])},
        }
        for cell in cells
    ]
    return pd.DataFrame(rows)


def _minutes(cells: Sequence[Cell]) -> float:
    """Return the mean training time of a method's cells; NaN if not all ran on the same."""
    alike = len({cell.hardware for cell in cells}) == 1
    return summarise([cell.minutes for cell in cells]).mean if alike else NAN


def main_frame(
    cells: Sequence[Cell],
    paper: dict[str, Any],
    every: Sequence[str],
    tunings: Sequence[Tuning] = (),
) -> pd.DataFrame:
    """Return one row a method: the paper's number, ours, and what it costs.

    Parameters
    ----------
    cells
        Cells of the experiment.
    paper
        Method -> {accuracy, sd}: the paper's numbers.
    every
        Methods that have a row even without a record.
    tunings
        What was tried for the methods, as far as they were tuned.
    """
    groups = by_method(cells)
    tried = {
        name: _configurations(tuning)
        for tuning in tunings
        for name in (tuning["method"], tuned_method(tuning))
    }
    rows = []
    for method in sorted({*every, *groups}, key=rank):
        mine = groups.get(method, [])
        values = [mean_accuracy(cell.test) for cell in mine]
        ours = summarise(values)
        theirs = paper.get(method, {})
        drifts = [cell.drift for cell in mine if not np.isnan(cell.drift)]
        rows.append(
            {
                "method": method,
                "paper": theirs.get("accuracy", NAN),
                "paper_sd": theirs.get("sd", NAN),
                "mean": ours.mean,
                "sd": ours.sd,
                "low": ours.low,
                "high": ours.high,
                "n": ours.n,
                "learnt": min((int(np.isfinite(c.test[-1]).sum()) for c in mine), default=None),
                "tasks": len(mine[0].test) if mine else None,
                "seeds": " ".join(str(cell.seed) for cell in mine),
                "values": " ".join(f"{value:.4f}" for value in values),
                "difference": ours.mean - theirs.get("accuracy", NAN),
                "bwt": summarise([backward_transfer(cell.test) for cell in mine]).mean,
                "logit_drift": max(drifts, default=NAN),
                "task_id_at_test": mine[0].task_id if mine else None,
                "trainable": round(np.mean([c.trainable for c in mine])) if mine else None,
                "stored": round(np.mean([c.stored for c in mine])) if mine else None,
                "train_minutes": _minutes(mine),
                "configurations": tried.get(method),
            }
        )
    integers = ("learnt", "tasks", "trainable", "stored", "configurations")
    whole = dict.fromkeys(integers, "Int64")
    return pd.DataFrame(rows).astype(whole | {"task_id_at_test": "boolean"})


def _accounts(tunings: Sequence[Tuning]) -> list[tuple[Tuning, bool]]:
    """Return the results and what was tried before, and whether each is the newest."""
    return [
        (account, account is tuning)
        for tuning in tunings
        for account in (tuning, *tuning.get("earlier", ()))
    ]


def _configurations(tuning: Tuning) -> int:
    """Return how many different configurations of a method were tried, earlier ones included."""
    return len(
        {
            (account["revision"], canonical(candidate["changed"]))
            for account, _ in _accounts([tuning])
            for candidate in account["candidates"]
            if candidate["runs"]
        }
    )


def matrix_frame(cells: Sequence[Cell]) -> pd.DataFrame:
    """Return R of one method, averaged over its seeds.

    Returns
    -------
    pandas.DataFrame
        Columns after_task and on_task (from 1), accuracy (%): mean over the seeds that have
        learnt the task, and n, their number; no row where n is 0.
    """
    every = np.array([cell.test for cell in cells])
    rows = []
    for i in range(every.shape[1]):
        for j in range(i + 1):
            values = every[np.isfinite(every[:, i, j]), i, j]
            if len(values):
                rows.append((i + 1, j + 1, values.mean(), len(values)))
    return pd.DataFrame(rows, columns=["after_task", "on_task", "accuracy", "n"])


def over_tasks_frame(cells: Sequence[Cell]) -> pd.DataFrame:
    """Return accuracies after each task.

    Returns
    -------
    pandas.DataFrame
        Columns method, seed ("mean" for the mean over seeds), after_task (from 1), learnt_tasks:
        mean accuracy over the tasks that the seed has learnt so far, first_task: accuracy on task
        1, both in %.
    """
    parts = []
    for method, mine in by_method(cells).items():
        seeds = pd.DataFrame(
            [
                (cell.seed, i + 1, mean_of_learnt(cell.test[i, : i + 1]), cell.test[i, 0])
                for cell in mine
                for i in range(len(cell.test))
            ],
            columns=["seed", "after_task", "learnt_tasks", "first_task"],
        )
        mean = seeds.drop(columns="seed").groupby("after_task").mean().reset_index()
        parts.append(pd.concat([seeds, mean.assign(seed="mean")]).assign(method=method))
    columns = ["method", "seed", "after_task", "learnt_tasks", "first_task"]
    frame = pd.concat(parts)[columns]
    return frame.dropna(subset=["learnt_tasks"]).reset_index(drop=True)


def final_frame(cells: Sequence[Cell], part: str) -> pd.DataFrame:
    """Return accuracies on each task after the last one.

    Parameters
    ----------
    cells
        Of one experiment.
    part
        "validation" or "test".

    Returns
    -------
    pandas.DataFrame
        Columns method, task (from 1), accuracy: mean over the seeds that have learnt the task, and
        sd, both in %, n, their number, and depleted: how many of them had no free unit in the last
        hidden layer when the task came; no row where n is 0.
    """
    rows = []
    for method, mine in by_method(cells).items():
        empty = np.array([_depleted(cell) for cell in mine])
        final = np.array([getattr(cell, part)[-1] for cell in mine])
        for task in range(final.shape[1]):
            learnt = np.isfinite(final[:, task])
            values, without = final[learnt, task], int(empty[learnt, task].sum())
            if len(values):
                sd = values.std(ddof=1) if len(values) > 1 else np.nan
                rows.append((method, task + 1, values.mean(), sd, len(values), without))
    return pd.DataFrame(rows, columns=["method", "task", "accuracy", "sd", "n", "depleted"])


def _depleted(cell: Cell) -> npt.NDArray[np.bool_]:
    """Return for each task whether the last hidden layer had no free unit when it came."""
    found = np.zeros(len(cell.test), dtype=bool)
    if len(cell.capacity):
        last = cell.capacity[cell.capacity["layer"] == cell.capacity["layer"].iloc[-1]]
        free = last.set_index("task")["free"].reindex(range(len(found) - 1)).ffill()
        found[1:] = free == 0
    return found


def use_frame(cells: Sequence[Cell]) -> pd.DataFrame:
    """Return the capacity of each layer after each task, over seeds.

    Returns
    -------
    pandas.DataFrame
        Columns method, layer, task (from 1), used (% of the layer), used_sd, new, reused, free
        (units, means), n; no rows if no method has capacity.
    """
    rows = []
    for method, mine in by_method(cells).items():
        frames = [cell.capacity for cell in mine if len(cell.capacity)]
        if not frames:
            continue
        both = pd.concat(frames)
        for layer in dict.fromkeys(both["layer"]):
            for task, part in both[both["layer"] == layer].groupby("task", sort=True):
                used = summarise(list(100 * part["used_fraction"]))
                rows.append(
                    {
                        "method": method,
                        "layer": layer,
                        "task": int(str(task)) + 1,
                        "used": used.mean,
                        "used_sd": used.sd,
                        **{key: part[key].mean() for key in ("new", "reused", "free")},
                        "n": used.n,
                    }
                )
    columns = ["method", "layer", "task", "used", "used_sd", "new", "reused", "free", "n"]
    return pd.DataFrame(rows, columns=columns)


def units_frame(cells: Sequence[Cell]) -> pd.DataFrame:
    """Return what each layer is made of for each task, over seeds.

    Returns
    -------
    pandas.DataFrame
        Columns method, layer, task (from 1), reused and not_reused (older units that the task
        reads, and those that it doesn't), new, free (% of the layer, means; they add up to 100),
        n; no rows if no method has capacity.
    """
    rows = []
    for method, mine in by_method(cells).items():
        frames = [cell.capacity for cell in mine if len(cell.capacity)]
        if not frames:
            continue
        both = pd.concat(frames, ignore_index=True)
        both["not_reused"] = both["used"] - both["new"] - both["reused"]
        width = both["used"] + both["free"]
        for layer in dict.fromkeys(both["layer"]):
            for task, part in both[both["layer"] == layer].groupby("task", sort=True):
                shares = {key: (100 * part[key] / width.loc[part.index]) for key in KINDS}
                rows.append(
                    {
                        "method": method,
                        "layer": layer,
                        "task": int(str(task)) + 1,
                        **{key: share.mean() for key, share in shares.items()},
                        "n": len(part),
                    }
                )
    return pd.DataFrame(rows, columns=["method", "layer", "task", *KINDS, "n"])


def sufficiency_frame(cells: Sequence[Cell]) -> pd.DataFrame:
    """Return what new units read, over seeds.

    Returns
    -------
    pandas.DataFrame
        Columns method, layer, task (from 1), old_only, new_only (% of the task's new units,
        means), old_only_sd, new_only_sd, n (seeds with a number); only rows that have one.
    """
    kinds = ("old_only", "new_only")
    rows = []
    for method, mine in by_method(cells).items():
        both = pd.concat([cell.sufficiency for cell in mine]).dropna(subset=kinds)
        for layer in dict.fromkeys(both["layer"]):
            for task, part in both[both["layer"] == layer].groupby("task", sort=True):
                found = {kind: summarise(list(100 * part[kind])) for kind in kinds}
                rows.append(
                    {
                        "method": method,
                        "layer": layer,
                        "task": int(str(task)) + 1,
                        **{kind: summary.mean for kind, summary in found.items()},
                        **{f"{kind}_sd": summary.sd for kind, summary in found.items()},
                        "n": len(part),
                    }
                )
    columns = ["method", "layer", "task", *kinds, *(f"{kind}_sd" for kind in kinds), "n"]
    return pd.DataFrame(rows, columns=columns)


def cuts_frame(cells: Sequence[Cell]) -> pd.DataFrame:
    """Return which epoch each task kept, and what its cut cost.

    Returns
    -------
    pandas.DataFrame
        Columns method, seed, task (from 1), epoch (the one kept; 1 is the first), epochs (trained),
        best, trained, cut, pruned (validation accuracy, %: of the best epoch, of the one kept,
        after the first cut, after any fine-tuning), margin (m, points), below (whether it was more
        than m below the best before anything but dead units was cut).
    """
    columns = ["method", "seed", "task", "epoch", "epochs"]
    columns += ["best", "trained", "cut", "pruned", "margin", "below"]
    parts = [
        cell.cuts.assign(
            method=cell.method,
            seed=cell.seed,
            task=cell.cuts["task"] + 1,
            margin=margin(cell),
            below=below_margin(cell),
        )[columns]
        for cell in cells
        if len(cell.cuts)
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def ablation_frame(cells: Sequence[Cell]) -> pd.DataFrame:
    """Return what a task loses without the older units that don't count as reused.

    Returns
    -------
    pandas.DataFrame
        Columns method, seed ("mean" for the mean over seeds), task (from 1), drop and margin
        (points of validation accuracy), cut (units); no rows where it wasn't measured.
    """
    parts = []
    for method, mine in by_method(cells).items():
        frames = [cell.ablation.assign(seed=cell.seed) for cell in mine if len(cell.ablation)]
        if not frames:
            continue
        both = pd.concat(frames)
        values = ["drop", "margin", "cut"]
        mean = both.groupby("task", sort=True)[values].mean().reset_index().assign(seed="mean")
        parts.append(pd.concat([both, mean]).assign(method=method))
    columns = ["method", "seed", "task", "drop", "margin", "cut"]
    if not parts:
        return pd.DataFrame(columns=columns)
    frame = pd.concat(parts, ignore_index=True)[columns]
    frame["task"] += 1
    frame[["drop", "margin"]] *= 100
    return frame


def comparison_frame(
    cells: Sequence[Cell], level: float, reference: str = REFERENCE
) -> pd.DataFrame:
    """Return paired per-seed differences of each method to a reference, in points, with tests.

    They are of means over the tasks that both have learnt.
    """
    groups = by_method(cells)
    others = {cell.seed: cell.test[-1] for cell in groups.get(reference, [])}
    rows = []
    for method, mine in groups.items():
        pairs = {
            cell.seed: (cell.test[-1], others[cell.seed]) for cell in mine if cell.seed in others
        }
        if method == reference or not pairs:
            continue
        both = {seed: np.isfinite(one) & np.isfinite(other) for seed, (one, other) in pairs.items()}
        values = {seed: float(pairs[seed][0][both[seed]].mean()) for seed in pairs}
        theirs = [float(pairs[seed][1][both[seed]].mean()) for seed in pairs]
        result = paired(list(values.values()), theirs, level)
        rows.append(
            {
                "method": method,
                "n": result.n,
                "seeds": " ".join(map(str, values)),
                "difference": result.difference,
                "low": result.low,
                "high": result.high,
                "p_t": result.p_t,
                "p_permutation": result.p_permutation,
            }
        )
    frame = pd.DataFrame(
        rows,
        columns=["method", "n", "seeds", "difference", "low", "high", "p_t", "p_permutation"],
    )
    frame["p_t_holm"] = holm(list(frame["p_t"]))
    return frame


def search_frame(cells: Sequence[Cell]) -> pd.DataFrame:
    """Return all candidates of all grid searches.

    Returns
    -------
    pandas.DataFrame
        Columns method, seed, task (from 1), candidate, l1 (text), lr, epoch, best_validation,
        trained_validation and pruned_validation (%), within_margin, new (units by layer, text),
        new_share, new_weights, chosen, train_seconds, scan_seconds.
    """
    rows = [
        {
            "method": cell.method,
            "seed": cell.seed,
            **row,
            "task": int(row["task"]) + 1,
            "l1": _alphas(row["l1"]),
            "new": ", ".join(f"{layer} {units}" for layer, units in (row["new"] or {}).items()),
            **{key: 100 * row[key] for key in row if str(key).endswith("_validation")},
        }
        for cell in cells
        for row in cell.search.to_dict("records")
    ]
    return pd.DataFrame(rows, columns=["method", "seed", *SEARCH])


def tuning_frame(tunings: Sequence[Tuning]) -> pd.DataFrame:
    """Return every configuration that was tried for the methods.

    Returns
    -------
    pandas.DataFrame
        Columns method, candidate, configuration (the settings in which a method's candidates
        differ, text), changed (canonical JSON of those that differ from the defaults), tasks,
        seeds, values (%, one a seed), mean and sd (over seeds, %), n, minutes (of a seed), winner,
        in_grid. Accuracies are means over the tasks after the last one, on validation data.
    """
    rows = []
    for tuning, newest in _accounts(tunings):
        candidates = tuning["candidates"]
        names = [
            name
            for name in candidates[0]["settings"]
            if len({canonical(c["settings"].get(name)) for c in candidates}) > 1
        ]
        for place, candidate in enumerate(candidates):
            runs = candidate["runs"]
            reached = [100 * run["mean"] for run in runs if run["mean"] is not None]
            values = summarise(reached)
            rows.append(
                {
                    "method": tuning["method"],
                    "candidate": place,
                    "configuration": ", ".join(
                        f"{name} {_setting(candidate['settings'].get(name))}" for name in names
                    ),
                    "changed": canonical(candidate["changed"]),
                    "tasks": tuning["tasks"],
                    "seeds": " ".join(str(run["seed"]) for run in runs),
                    "values": " ".join(f"{value:.4f}" for value in reached),
                    "mean": values.mean,
                    "sd": values.sd,
                    "n": values.n,
                    "minutes": candidate["seconds"] / max(values.n, 1) / 60,
                    "winner": newest and place == tuning["winner"],
                    "in_grid": newest and candidate["in_grid"],
                }
            )
    columns = (
        *("method", "candidate", "configuration", "changed", "tasks", "seeds", "values"),
        *("mean", "sd", "n", "minutes", "winner", "in_grid"),
    )
    return pd.DataFrame(rows, columns=list(columns))


def _setting(value: Any) -> str:
    """Return a setting's value as it is given on the command line."""
    if isinstance(value, list):
        return "/".join(map(_setting, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _alphas(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{layer} {alpha:g}" for layer, alpha in value.items())
    return ", ".join(f"{alpha:g}" for alpha in (value if isinstance(value, list) else [value]))


# ---------------------------------------------------------------- tables for readers


def _strings(
    frame: pd.DataFrame, columns: dict[str, Callable[[pd.Series[Any]], str]]
) -> pd.DataFrame:
    """Return a frame of strings: one column a heading, made row by row."""
    return pd.DataFrame(
        {heading: [make(row) for _, row in frame.iterrows()] for heading, make in columns.items()}
    )


def main_table(
    cells: Sequence[Cell], target: Targets | None, tunings: Sequence[Tuning] = ()
) -> Table:
    """Return the main table: Table 1 beside the paper's numbers, or ours alone.

    Parameters
    ----------
    cells
        Cells of the experiment.
    target
        Contents of its targets file; None if the paper has no such table.
    tunings
        What was tried for the methods, as far as they were tuned.
    """
    head = target["table"] if target else {}
    paper = head.get("paper", {})
    every = sorted({*paper, *EXPECTED}, key=rank) if target else []
    frame = main_frame(cells, paper, every, tunings)
    level = confidence(target)
    columns: dict[str, Callable[[pd.Series[Any]], str]] = {"Method": lambda r: label(r["method"])}
    if target:
        columns["Paper, %"] = lambda r: plus_minus(r["paper"], r["paper_sd"])
    columns["Ours, %"] = ours
    columns[f"{100 * level:.0f} % interval"] = lambda r: interval(r["low"], r["high"])
    columns["n"] = lambda r: str(r["n"]) if r["n"] else NONE
    if target:
        columns["Difference"] = lambda r: number(r["difference"], sign=True)
    columns |= {
        "BWT": lambda r: number(r["bwt"], sign=True),
        "Logit drift": lambda r: magnitude(r["logit_drift"]),
        "Task id": lambda r: yes_no(r["task_id_at_test"]),
        "Trainable": lambda r: count(r["trainable"]),
        "Stored": lambda r: count(r["stored"]),
        "Training": lambda r: duration(r["train_minutes"]),
        "Tried": lambda r: NONE if pd.isna(r["configurations"]) else str(r["configurations"]),
    }
    notes = [
        "Ours: mean ± sample deviation over seeds; one seed: n = 1, no deviation, no interval.",
        "BWT: backward transfer in points, mean change of a task's accuracy from just after "
        "learning it to the end. Logit drift: largest change of any old task's logits. Task id: "
        "needed at test. Trainable: numbers in the network. Stored: numbers needed to go on "
        "after all tasks: weights, importances, contexts, masks, images in a memory; without "
        f"the optimizer's. Training: time of one seed, {hardware(cells)}. Tried: configurations "
        "compared on validation data to choose the method's settings; a dash: not tuned.",
        seeds_note(cells),
    ]
    if target:
        notes.insert(0, f"Paper: {target['source']}, {head['place']}; difference: ours − paper.")
    return Table(
        name=head.get("file", "main"),
        caption=head.get("caption", "Mean test accuracy over all tasks after the last one"),
        numbers=frame,
        text=_strings(frame, columns),
        notes=tuple(notes),
    )


def hardware(cells: Sequence[Cell]) -> str:
    """Return what the cells ran on; times on different hardware cannot be compared."""
    found = sorted({cell.hardware for cell in cells})
    if len(found) > 1:
        return (
            "a dash where its seeds ran on different hardware, and not to be compared between "
            f"methods that did ({'; '.join(found)})"
        )
    return f"on {found[0]}" if found else "none yet"


EXPECTED = ("finetune", "joint", "packnet", "lwf", "er", "hat")
"""Methods that belong beside the paper's and have a row in its table before they have a record."""


def ours(row: pd.Series[Any]) -> str:
    """Return our result: ``mean ± sd``, ``mean (n = 1)`` or a dash."""
    text = plus_minus(row["mean"], row["sd"])
    if row["n"] == 1:
        text = f"{number(row['mean'])} (n = 1)"
    return text + over(row["learnt"], row["tasks"]) if row["n"] else text


def over(learnt: int, tasks: int) -> str:
    """Return over how many tasks a mean is, if not over all."""
    return f", over {learnt} of {tasks} tasks" if learnt < tasks else ""


def yes_no(value: Any) -> str:
    """Return yes, no or a dash."""
    return NONE if pd.isna(value) else "yes" if value else "no"


def confidence(target: Targets | None) -> float:
    """Return the level of intervals."""
    return 1.0 - float(target["significance"]) if target else 0.95


def seeds_table(cells: Sequence[Cell]) -> Table:
    """Return every seed's result and where it comes from."""
    frame = per_seed(cells)
    return Table(
        name="seeds",
        caption="Every seed",
        numbers=frame,
        text=_strings(
            frame,
            {
                "Method": lambda r: label(r["method"]),
                "Seed": lambda r: str(r["seed"]),
                "Accuracy, %": lambda r: number(r["accuracy"]),
                "BWT": lambda r: number(r["bwt"], sign=True),
                "Logit drift": lambda r: magnitude(r["logit_drift"]),
                "Training": lambda r: duration(r["train_minutes"]),
                "Cell": lambda r: r["hash"],
                "Commit": lambda r: r["commit"][:8],
                "torch": lambda r: r["torch"],
                "Hardware": lambda r: r["hardware"],
            },
        ),
    )


def per_task_table(
    cells: Sequence[Cell], target: Targets | None = None, whole: Sequence[Cell] = ()
) -> Table:
    """Return the accuracy on each task after the last one, mean over seeds.

    Parameters
    ----------
    cells
        Cells of the experiment.
    target
        Its targets file, with the numbers of others under ``per_task``; None if there is none.
    whole
        Cells of the same experiment in which no training images are held out.
    """
    tasks = range(len(cells[0].test))
    rows, lines = [], []
    for held_out, some in ((True, cells), (False, whole)):
        for method, mine in by_method(some).items():
            last = [_of_learnt([cell.test[-1, j] for cell in mine]) for j in tasks]
            just = [_of_learnt([cell.test[j, j] for cell in mine]) for j in tasks]
            rows += [
                {
                    "method": method,
                    "held_out": held_out,
                    "task": j + 1,
                    "just_learnt": just[j].mean,
                    "at_the_end": last[j].mean,
                    "at_the_end_sd": last[j].sd,
                    "n": last[j].n,
                }
                for j in tasks
            ]
            name = label(str(method))
            if not held_out:
                last_epoch = any("early_stopping=False" in cell.settings for cell in mine)
                name += ", nothing held out" + (" (last epoch)" if last_epoch else "")
            n = len(mine)
            mean = summarise([mean_accuracy(cell.test) for cell in mine]).mean
            short = over(sum(task.n == n for task in last), len(last))
            values = [number(t.mean) + (f" (n = {t.n})" if 0 < t.n < n else "") for t in last]
            lines.append(_task_line(name, str(n), values, number(mean) + short))
    csv = "The CSV also has the accuracy just after learning and deviations."
    notes = [note for note in (split_note(cells), csv, seeds_note(cells)) if note]
    if others := (target or {}).get("per_task"):
        for row in others["rows"]:
            mean = float(np.mean(row["accuracy"]))
            lines.append(_task_line(row["name"], NONE, map(number, row["accuracy"]), number(mean)))
        notes.insert(0, others["note"])
    return Table(
        name="per_task",
        caption="Test accuracy (%) on each task after the last one, mean over seeds",
        numbers=pd.DataFrame(rows),
        text=pd.DataFrame(lines),
        notes=tuple(notes),
    )


def _of_learnt(values: Sequence[float]) -> Summary:
    """Summarise one value a seed, over the seeds that have one."""
    return summarise([value for value in values if np.isfinite(value)])


def _task_line(name: str, n: str, values: Iterable[str], mean: str) -> dict[str, str]:
    """Return a row of accuracies, by task and their mean."""
    by_task = {f"Task {j + 1}": value for j, value in enumerate(values)}
    return {"Method": name, "n": n, **by_task, "Mean": mean}


def capacity_table(cells: Sequence[Cell]) -> Table | None:
    """Return used, new and reused units per layer and task; None if no method has capacity."""
    frame = use_frame(cells)
    if frame.empty:
        return None
    quantities = {"used": "used, %", "new": "new units", "reused": "reused units"}
    tasks = sorted(set(frame["task"]))
    rows = []
    for (method, layer), part in frame.groupby(["method", "layer"], sort=False):
        at = part.set_index("task")
        for key, heading in quantities.items():
            rows.append(
                {
                    "Method": label(str(method)),
                    "Layer": str(layer),
                    "After task": heading,
                    **{
                        str(t): number(at[key].get(t, NAN), 1 if key == "used" else 0)
                        for t in tasks
                    },
                }
            )
    having = [cell for cell in cells if len(cell.capacity)]
    return Table(
        name="capacity",
        caption="Units per hidden layer after each task, mean over seeds",
        numbers=frame,
        text=pd.DataFrame(rows),
        notes=(
            "Used: units of any task so far. New: first used by this task. Reused: older units "
            "that this task reads.",
            seeds_note(having),
        ),
    )


def cuts_table(cells: Sequence[Cell]) -> Table | None:
    """Return the epoch that each task kept and what its cut cost; None if nothing was cut."""
    frame = cuts_frame(cells)
    if frame.empty:
        return None
    rows = []
    for (method, task), part in frame.groupby(["method", "task"], sort=False):
        mean = part[["epoch", "best", "trained", "cut", "pruned"]].mean()
        epochs = sorted({f"{value:.0f}" for value in part["epochs"].dropna()})
        kept = NONE if pd.isna(mean["epoch"]) else f"{number(mean['epoch'], 1)}"
        rows.append(
            {
                "Method": label(str(method)),
                "Task": str(task),
                "n": str(len(part)),
                "Epoch kept": f"{kept} of {' or '.join(epochs)}" if epochs else kept,
                "Best epoch, %": number(mean["best"]),
                "This epoch, %": number(mean["trained"]),
                "After the cut, %": number(mean["cut"]),
                "In the end, %": number(mean["pruned"]),
                "m, points": f"{part['margin'].iloc[0]:g}",
                "Below m": f"{part['below'].sum()} of {len(part)}",
            }
        )
    return Table(
        name="cuts",
        caption="The epoch that a task keeps, and what its cut costs; means over seeds",
        numbers=frame,
        text=pd.DataFrame(rows),
        notes=(
            "Validation accuracies; in the end: after fine-tuning, where there is some. Below m: "
            "seeds whose network was more than m below its best epoch before anything but dead "
            "units was cut.",
            seeds_note([cell for cell in cells if len(cell.cuts)]),
        ),
    )


def search_table(cells: Sequence[Cell]) -> Table | None:
    """Return every candidate of the grid searches; None if there was no search."""
    frame = search_frame(cells)
    if frame.empty:
        return None
    scanning = frame["scan_seconds"].sum() / frame["train_seconds"].sum()
    return Table(
        name="search",
        caption="Grid search: every candidate",
        numbers=frame,
        text=_strings(
            frame,
            {
                "Method": lambda r: label(r["method"]),
                "Seed": lambda r: str(r["seed"]),
                "Task": lambda r: str(r["task"]),
                "Alpha": lambda r: r["l1"],
                "Learning rate": lambda r: f"{r['lr']:g}",
                "Best epoch, %": lambda r: number(r["best_validation"]),
                "Epoch kept, %": lambda r: number(r["trained_validation"]),
                "After the cut, %": lambda r: number(r["pruned_validation"]),
                "Within m": lambda r: yes_no(r["within_margin"]),
                "New units": lambda r: r["new"] or NONE,
                "Sum of shares": lambda r: number(r["new_share"], 4),
                "Chosen": lambda r: yes_no(r["chosen"]),
                "Training": lambda r: duration(r["train_seconds"] / 60),
                "Scan": lambda r: f"{number(r['scan_seconds'], 1)} s",
            },
        ),
        notes=(
            "Validation accuracies. m counts from the best epoch of all candidates of a task; of "
            "those within m after their cut the sparsest is chosen: smallest sum over layers of "
            "new units / width. A dash: the candidate diverged.",
            f"All scans together took {number(100 * scanning, 1)} % of the time that the "
            "candidates trained.",
        ),
    )


def tuning_table(tunings: Sequence[Tuning], untuned: Sequence[str] = ()) -> Table:
    """Return every configuration that was tried, and by what the settings were chosen.

    Parameters
    ----------
    tunings
        Results of the methods' grids, finished or not.
    untuned
        Methods without such a result; each gets a row that says so.
    """
    frame = tuning_frame(tunings)
    text = _strings(
        frame,
        {
            "Method": lambda r: label(r["method"]),
            "Configuration": lambda r: r["configuration"] or NONE,
            "Tasks": lambda r: str(r["tasks"]),
            "Validation, %": lambda r: plus_minus(r["mean"], r["sd"]),
            "n": lambda r: str(r["n"]) if r["n"] else NONE,
            "Training": lambda r: duration(r["minutes"]) if r["n"] else NONE,
            "Winner": lambda r: (
                "yes" if r["winner"] else "no" if r["in_grid"] else "no (earlier grid)"
            ),
        },
    )
    dashes = [dict.fromkeys(text, NONE) | {"Method": label(name)} for name in untuned]
    budgets: dict[str, list[str]] = {}
    for tuning, _ in _accounts(tunings):
        whole, some = len(tuning["candidates"]), sum(bool(c["runs"]) for c in tuning["candidates"])
        tried = f"{whole}" if some == whole else f"{some} of {whole}"
        budget = (
            f"{tried} configurations, first {tuning['tasks']} tasks, "
            f"{'seed' if len(tuning['seeds']) == 1 else 'seeds'} {seed_list(tuning['seeds'])}"
        )
        budgets.setdefault(budget, []).append(label(tuning["method"]))
    notes = [
        "Mean accuracy over the tasks after the last one on held-out validation data, mean over "
        "the seeds; no test data were loaded, and no table uses these seeds. The best one wins "
        "(the first of equals), and its settings are the method's. Training: time of one seed. "
        "n: seeds; where there are fewer than in the budget, the others diverged.",
        *(
            f"{label(tuning['method'])} keeps the settings that its paper prints, whatever wins; "
            f"the winner's are those of the method {label(tuned_method(tuning))}."
            for tuning in tunings
            if tuned_method(tuning) != tuning["method"]
        ),
    ]
    if budgets:
        told = (f"{', '.join(methods)}: {budget}" for budget, methods in budgets.items())
        notes.append(
            f"Budget: {'; '.join(told)}. A grid has up to 4 configurations, over the first 3 "
            "tasks; over all tasks where 3 can't tell, since penalties stiffen, or units or a "
            "memory run out, with the number of tasks. A method that is named more than once has "
            "had an earlier grid as well, so that more of it was tried than of the others."
        )
    return Table(
        name="tuning",
        caption="Tuning: every configuration tried",
        numbers=frame,
        text=pd.concat([text, pd.DataFrame(dashes)], ignore_index=True),
        notes=tuple(notes),
    )


def comparison_table(cells: Sequence[Cell], target: Targets | None) -> Table | None:
    """Return the methods against the reference; None if there is nothing to compare."""
    level = confidence(target)
    reference = (target or {}).get("reference", REFERENCE)
    frame = comparison_frame(cells, level, reference)
    if frame.empty:
        return None
    notes = [
        f"Difference of mean accuracy to {label(reference)} in points, over the seeds that both "
        "have. p: paired t test; Holm: corrected over the methods; permutation: exact, by "
        "flipping signs.",
    ]
    if (frame["n"] < 2).any():
        notes.append("One seed in common allows no test.")
    most = int(frame["n"].max())
    if 2 <= most < 6:
        notes.append(
            f"With {most} seeds the permutation test cannot go below p = {2.0 ** (1 - most):g}."
        )
    text = _strings(
        frame,
        {
            "Method": lambda r: label(r["method"]),
            "n": lambda r: str(r["n"]),
            "Difference": lambda r: number(r["difference"], sign=True),
            f"{100 * level:.0f} % interval": lambda r: interval(r["low"], r["high"], sign=True),
            "p": lambda r: p_value(r["p_t"]),
            "p (Holm)": lambda r: p_value(r["p_t_holm"]),
            "p (permutation)": lambda r: p_value(r["p_permutation"]),
        },
    )
    return Table("comparisons", f"Methods against {label(reference)}", frame, text, tuple(notes))


# ---------------------------------------------------------------- files


def csv(frame: pd.DataFrame) -> str:
    """Return a frame as CSV, rounded to eight significant digits (last bits differ by machine)."""
    return frame.to_csv(index=False, float_format="%.8g", lineterminator="\n")


def markdown(text: pd.DataFrame, prose: bool = False) -> str:
    """Return a frame of strings as a Markdown table; numbers to the right, prose to the left."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |\n"

    rule = ["---", *["---" if prose else "---:"] * (len(text.columns) - 1)]
    return line(list(text.columns)) + line(rule) + "".join(map(line, text.to_numpy().tolist()))


TEX = {
    "\\": r"\textbackslash{}",
    **{character: "\\" + character for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "±": r"$\pm$",
    "−": "$-$",
    "—": "---",
    "–": "--",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
}


def escape_tex(text: str) -> str:
    """Return text with LaTeX's special characters escaped."""
    return "".join(TEX.get(character, character) for character in text)


def latex(table: Table) -> str:
    """Return a table as a LaTeX float (packages booktabs and graphicx)."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        block_start_string=r"\BLOCK{",
        block_end_string="}",
        variable_start_string=r"\VAR{",
        variable_end_string="}",
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["tex"] = escape_tex
    return environment.get_template("table.tex.jinja").render(
        table=table, headings=list(table.text.columns), rows=table.text.to_numpy().tolist()
    )


def whole_markdown(table: Table) -> str:
    """Return a table with its caption and notes as Markdown."""
    notes = "".join(f"\n{note}\n" for note in table.notes)
    return f"**{table.caption}**\n\n{markdown(table.text, bool(table.widths))}{notes}"
