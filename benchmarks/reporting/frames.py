"""Frames: every number of a report, from records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from benchmarks.experiment import canonical
from benchmarks.records import Tuning, tuned_method
from benchmarks.reporting.load import SEARCH, Cell, below_margin, margin, rank
from benchmarks.reporting.stats import (
    NAN,
    backward_transfer,
    holm,
    mean_accuracy,
    mean_of_learnt,
    paired,
    summarise,
)
from benchmarks.reporting.text import alphas, setting

KINDS = ("reused", "not_reused", "new", "free")
"""What a layer's units are for a task."""
REFERENCE = "clnp"
"""The method that the others are compared with, unless a targets file names another."""


def by_method(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Return the cells of each method, in the order of the cells."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.method, []).append(cell)
    return found


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


def accounts(tunings: Sequence[Tuning]) -> list[tuple[Tuning, bool]]:
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
            for account, _ in accounts([tuning])
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
            "l1": alphas(row["l1"]),
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
    for tuning, newest in accounts(tunings):
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
                        f"{name} {setting(candidate['settings'].get(name))}" for name in names
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
