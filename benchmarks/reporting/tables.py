"""Tables: frames of numbers made readable, with their notes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.records import Tuning, tuned_method
from benchmarks.reporting.frames import (
    REFERENCE,
    accounts,
    by_method,
    comparison_frame,
    cuts_frame,
    main_frame,
    per_seed,
    search_frame,
    tuning_frame,
    use_frame,
)
from benchmarks.reporting.load import Cell, Targets, label, rank
from benchmarks.reporting.stats import NAN, Summary, mean_accuracy, summarise
from benchmarks.reporting.text import (
    NONE,
    count,
    duration,
    interval,
    magnitude,
    number,
    over,
    p_value,
    plus_minus,
    seed_list,
    yes_no,
)


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
        "learning it to the end. Logit drift: largest change of an old task's logits, on the first "
        "batch of its test images, in any task and seed. Task id: "
        "needed at test. Trainable: numbers in the network. Stored: numbers needed to go on "
        "after all tasks: weights, importances, contexts, masks, images in a memory; without "
        f"the optimizer's. Training: time of one seed, {hardware(cells)}. Tried: configurations "
        "compared on validation data by the method's grid; a dash: it has none.",
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
    for tuning, _ in accounts(tunings):
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
        "n: seeds; where there are fewer than in the budget, the others diverged or left a task "
        "unlearnt, or the grid changed before they ran.",
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
            "memory run out, with the number of tasks. A method with more of them, or that is "
            "named more than once, has had an earlier grid as well, so that more of it was tried "
            "than of the others."
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
