"""Read records and targets; nothing doubtful gets through without a note that names it."""

from __future__ import annotations

import json
import re
import tomllib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from benchmarks.errors import UserError
from benchmarks.experiment import canonical
from benchmarks.methods import METHODS as REGISTRY
from benchmarks.records import Tuning, disagreements, read, read_tuning

METHODS = {
    "single_task": "Single task",
    "ewc": "EWC",
    "ewc_online": "Online EWC",
    "si": "SI",
    "superposition": "Superposition",
    "clnp": "CLNP",
    "clnp_best": "CLNP, tuned",
    "clnp_m1": "CLNP, m = 1 %",
    "clnp_m2": "CLNP, m = 2 %",
    "clnp_m4_ft": "CLNP, m = 4 %, fine-tuned",
    "finetune": "Fine-tuning",
    "joint": "Joint",
    "packnet": "PackNet",
    "lwf": "LwF",
    "er": "ER",
    "hat": "HAT",
}
"""Names for readers, in the order of the rows: the paper's Table 1 first."""

SEARCH = (
    *("task", "candidate", "l1", "lr", "epoch"),
    *("best_validation", "trained_validation", "pruned_validation", "within_margin"),
    *("new", "new_share", "new_weights", "chosen", "train_seconds", "scan_seconds"),
)
"""What a row of a search's table holds."""

Targets = dict[str, Any]

ROUNDING = 1e-9
"""Accuracies are ratios of counts: differences below this are rounding."""


def label(method: str) -> str:
    """Return the name of a method for readers."""
    return METHODS.get(method, method)


def rank(method: str) -> tuple[int, str]:
    """Return the sorting key of a method: known ones in the order of `METHODS`, then by name."""
    return (list(METHODS).index(method) if method in METHODS else len(METHODS), method)


def is_custom(experiment: str) -> bool:
    """Tell whether an experiment is a preset with overrides, such as ``pmnist-custom-ab12``."""
    return re.search(r"-custom-[0-9a-f]+$", experiment) is not None


@dataclass(frozen=True, eq=False)
class Cell:
    """One record, decoded for tables."""

    method: str
    seed: int
    hash: str
    test: npt.NDArray[np.float64]
    """R, shape (tasks, tasks): test accuracy (%) on task j after task i; NaN if not measured."""
    validation: npt.NDArray[np.float64]
    """Likewise, on validation data."""
    cuts: pd.DataFrame
    """Columns task (from 0), epoch (the one kept; 1 is the first), epochs (trained), and validation
    accuracies (%): best (of the epochs), trained (of the one kept), living (without its dead
    units), cut (after the cut, the first where there are several), pruned (in the end: after any
    fine-tuning)."""
    capacity: pd.DataFrame
    """Columns task, layer, used, new, reused, free, used_fraction; no rows without capacity."""
    sufficiency: pd.DataFrame
    """Columns task, layer, new, old_only, new_only; no rows in records from before it was told."""
    ablation: pd.DataFrame
    """Columns task (from 0), accuracy, drop, margin (fractions), cut (units); may have no rows."""
    search: pd.DataFrame
    """All candidates of grid searches, as in `clnp.search`; no rows without a search."""
    drift: float
    """Largest logit drift over the tasks; NaN if it was not measured on each old one."""
    trainable: int
    stored: int
    task_id: bool
    minutes: float
    """Training time."""
    hardware: str
    """What it ran on: hardware, device and number of threads; and on what before, if it moved."""
    torch: str
    commit: str
    dirty: bool
    settings: str
    """Canonical JSON of the config."""

    @property
    def name(self) -> str:
        """The cell's name in notes and tables, as in its file's name."""
        return f"{self.method} seed{self.seed}-{self.hash[:8]}"


def decode(record: dict[str, Any]) -> Cell:
    """Turn a valid record into a cell.

    Raises
    ------
    KeyError, TypeError, ValueError
        If a field lacks what tables need.
    """
    test = 100 * np.array(record["accuracy"]["test"], dtype=np.float64)
    environment = record["environment"]
    columns = ["task", "layer", "used", "new", "reused", "free", "used_fraction"]
    reads = ["task", "layer", "new", "old_only", "new_only"]
    ablation = ["accuracy", "drop", "margin", "cut"]
    ablated = [
        {"task": task, **{c: entry["reused_ablation"][c] for c in ablation}}
        for task, entry in enumerate(record.get("history", []))
        if "reused_ablation" in entry
    ]
    return Cell(
        method=record["method"],
        seed=record["seed"],
        hash=record["hash"],
        test=test,
        validation=100 * np.array(record["accuracy"]["validation"], dtype=np.float64),
        cuts=pd.DataFrame(
            [
                (
                    task,
                    entry.get("epoch"),
                    entry.get("epochs"),
                    100 * entry["best_validation"],
                    100 * entry.get("trained_validation", entry["best_validation"]),
                    100 * _living(entry),
                    100 * _cut(entry),
                    100 * entry["pruned_validation"],
                )
                for task, entry in enumerate(record.get("history", []))
                if "pruned_validation" in entry
            ],
            columns=["task", "epoch", "epochs", "best", "trained", "living", "cut", "pruned"],
        ).astype({"epoch": float, "epochs": float}),
        capacity=pd.DataFrame([{c: row[c] for c in columns} for row in record["capacity"]]),
        sufficiency=pd.DataFrame(
            [{c: row[c] for c in reads} for row in record.get("sufficiency", [])], columns=reads
        ).astype({"old_only": float, "new_only": float}),
        ablation=pd.DataFrame(ablated, columns=["task", *ablation]),
        search=pd.DataFrame([{c: row[c] for c in SEARCH} for row in record.get("search", [])]),
        drift=_largest(record["logit_drift"], test),
        trainable=int(record["parameters"]["trainable"]),
        stored=int(record["parameters"]["stored"]),
        task_id=record["task_id_at_test"],
        minutes=float(record["seconds"]["train"]) / 60,
        hardware=" after ".join(
            dict.fromkeys(
                f"{place['hardware']}, {place['device']}, {place['threads']} threads"
                for place in (environment, *reversed(environment.get("earlier", [])))
            )
        ),
        torch=str(environment["torch"]),
        commit=str(record["git"]["commit"]),
        dirty=bool(record["git"]["dirty"]),
        settings=canonical(record["config"]),
    )


def _largest(drift: Sequence[float | None], test: npt.NDArray[np.float64]) -> float:
    """Return the largest drift; NaN if there is none, or none of a task that was learnt before."""
    tasks = list(zip(drift, np.isfinite(np.diag(test)), strict=True))
    known = [value for value, _ in tasks if value is not None]
    if not known or any(value is None and learnt for value, learnt in tasks[:-1]):
        return float("nan")
    return float(max(known))


def changes(cell: Cell, preset: Cell) -> dict[str, Any]:
    """Return the experiment's fields in which a cell differs from a cell of the preset."""
    ours, theirs = (json.loads(c.settings)["experiment"] for c in (cell, preset))
    return {
        name: value
        for name, value in ours.items()
        if name != "name" and value != theirs.get(name, value)
    }


def without_holdout(records_dir: Path, experiment: str, presets: Sequence[Cell]) -> list[Cell]:
    """Return the cells that differ from the preset's in nothing but that no image is held out.

    Without images to stop early by they keep the last epoch, if the method's settings do not.
    """
    found = []
    for name in experiments(records_dir):
        if is_custom(name) and name.rpartition("-custom-")[0] == experiment:
            mine, _ = cells(records_dir, name, paper=True)
            found += [
                cell
                for cell in mine
                if any(p.method == cell.method and _holds_nothing_out(cell, p) for p in presets)
            ]
    return found


def _holds_nothing_out(cell: Cell, preset: Cell) -> bool:
    follows = {"settings": [f"{cell.method}.early_stopping=False"]}
    if changes(cell, preset) not in ({"validation": 0}, {"validation": 0, **follows}):
        return False
    mine, its = (json.loads(c.settings) for c in (cell, preset))
    stopping = {"early_stopping": None}
    same = mine["method"] | stopping == its["method"] | stopping
    return bool(same and mine["revision"] == its["revision"])


def experiments(records_dir: Path) -> list[str]:
    """Return the names of the experiments that have records, presets before custom ones."""
    found = {path.parts[-3] for path in records_dir.glob("*/*/*.json")}
    return sorted(found, key=lambda name: (is_custom(name), name))


def cells(records_dir: Path, experiment: str, paper: bool) -> tuple[list[Cell], list[str]]:
    """Read an experiment's cells.

    Parameters
    ----------
    records_dir
        Folder with ``<experiment>/<method>/seed<n>-<hash8>.json``.
    experiment
        Name of the experiment.
    paper
        Whether it is an experiment of the paper's, in full or reduced: then no record from a dirty
        tree is used.

    Returns
    -------
    cells : list of Cell
        In the order of the rows, then by seed.
    notes : list of str
        What was left out or needs a reader's attention, by name.
    """
    found: dict[tuple[str, int], list[Cell]] = defaultdict(list)
    notes = []
    for path in sorted((records_dir / experiment).glob("*/*.json")):
        where = path.relative_to(records_dir).as_posix()
        try:
            record = read(path)
        except UserError as error:
            notes.append(f"Not used: {error}".replace(str(path), where))
            continue
        if (record["experiment"], record["method"]) != (experiment, path.parent.name):
            notes.append(
                f"Not used: {where} holds {record['method']} of {record['experiment']}; "
                "it lies in the wrong folder."
            )
            continue
        try:
            cell = decode(record)
        except (KeyError, TypeError, ValueError) as error:
            notes.append(f"Not used: {where} is damaged: {error!r}.")
            continue
        if cell.dirty and paper:
            notes.append(f"Not used: {where} comes from uncommitted code (git.dirty).")
            continue
        found[cell.method, cell.seed].append(cell)
    kept = []
    for same in found.values():
        if len(same) == 1:
            kept += same
        else:
            names = " and ".join(cell.name for cell in same)
            notes.append(f"Not used: {names} are the same cell twice; delete the stale one.")
    kept.sort(key=lambda cell: (rank(cell.method), cell.seed))
    lengths = sorted({len(cell.test) for cell in kept})
    if len(lengths) > 1:
        # Means over streams of different lengths would have no meaning at all.
        named = "; ".join(
            f"{n} tasks: " + ", ".join(cell.name for cell in kept if len(cell.test) == n)
            for n in lengths
        )
        notes.append(
            f"Not used: any record of {experiment}, since they differ in their number of tasks "
            f"({named}). Delete those that do not belong there."
        )
        kept = []
    return kept, notes + _remarks(kept)


def _cut(entry: dict[str, Any]) -> float:
    """Return a task's validation accuracy after its first cut, before any fine-tuning."""
    first: dict[str, Any] = next(iter(entry.get("fine_tuning", [])), {})
    cut: float = first.get("cut_validation", entry["pruned_validation"])
    return cut


def _living(entry: dict[str, Any]) -> float:
    """Return the validation accuracy of a task's network without its dead units.

    Records before 2026-11-28 don't tell it. If it was below the margin, their cut took nothing
    else, and its accuracy is the one after the cut; if not, so is that.
    """
    living: float = entry.get("living_validation", _cut(entry))
    return living


def margin(cell: Cell) -> float:
    """Return m in points, as the cell's settings have it; 0 if they have none."""
    return 100 * float(json.loads(cell.settings)["method"].get("margin") or 0)


def below_margin(cell: Cell) -> pd.Series[bool]:
    """Tell for each of a cell's cuts whether even without dead units it was more than m too low."""
    return cell.cuts["living"] < cell.cuts["best"] - margin(cell) - ROUNDING


def _differences(one: Cell, other: Cell) -> set[str]:
    """Return the names of the settings in which two cells of a method differ.

    A setting that is younger than one of the records had its default there.
    """
    first, second = (json.loads(cell.settings) for cell in (one, other))
    if one.method in REGISTRY:
        kind = type(next(iter(REGISTRY[one.method].settings.values())))
        default = json.loads(canonical({field.name: field.default for field in fields(kind)}))
        first, second = ({**part, "method": default | part["method"]} for part in (first, second))
    return {text.partition(":")[0] for text in disagreements(first, second)}


def _remarks(kept: Sequence[Cell]) -> list[str]:
    notes = []
    for method in dict.fromkeys(cell.method for cell in kept):
        mine = [cell for cell in kept if cell.method == method]
        if wrong := sorted(
            {text for pair in combinations(mine, 2) for text in _differences(*pair)}
        ):
            notes.append(
                f"The seeds of {label(method)} ran with different settings: {', '.join(wrong)}."
            )
    for cell in kept:
        missing = [str(task + 1) for task in np.flatnonzero(np.isnan(cell.test[-1]))]
        if missing:
            notes.append(
                f"{cell.name} has not learnt task{'s' if len(missing) > 1 else ''} "
                f"{', '.join(missing)}; its means are over the others."
            )
    for cell in kept:
        settings = json.loads(cell.settings)["method"]
        below = cell.cuts.loc[below_margin(cell), "task"]
        if len(below):
            harmless = settings.get("below_margin") == "harmless"
            cut = "only what costs no accuracy" if harmless else "none but dead units"
            notes.append(
                f"{cell.name}: after task{'s' if len(below) > 1 else ''} "
                f"{', '.join(str(task + 1) for task in below)} the network without its dead units "
                f"was more than m below its best epoch, so that {cut} could be cut."
            )
    for cell in kept:
        over = cell.ablation[cell.ablation["drop"] > cell.ablation["margin"] + ROUNDING]
        if len(over):
            told = ", ".join(
                f"task {task + 1}: {100 * drop:.2f} points (m = {100 * margin:g})"
                for task, drop, margin in zip(
                    over["task"], over["drop"], over["margin"], strict=True
                )
            )
            notes.append(
                f"{cell.name}: without the older units that don't count as reused, validation "
                f"accuracy falls by more than m; {told}."
            )
    dirty = [cell.name for cell in kept if cell.dirty]
    if dirty:
        notes.append(f"From uncommitted code (git.dirty): {', '.join(dirty)}.")
    return notes


def tunings(tuning_dir: Path, experiment: str) -> tuple[list[Tuning], list[str]]:
    """Read what was tried for each method of an experiment.

    Parameters
    ----------
    tuning_dir
        Folder with ``<experiment>/<method>.json``, and in ``<experiment>/earlier/`` what was tried
        before with fewer tasks.
    experiment
        Name of the experiment.

    Returns
    -------
    found : list of dict
        Results of finished grids, in the order of the rows; ``earlier`` of each is a list of what
        was tried before.
    notes : list of str
        What was left out or needs a reader's attention, by name.
    """
    found, notes = [], []
    folder = tuning_dir / experiment
    for path in sorted(folder.glob("*.json")):
        where = path.relative_to(tuning_dir).as_posix()
        try:
            result = read_tuning(path)
        except UserError as error:
            notes.append(f"Not used: {error}".replace(str(path), where))
            continue
        if (result["experiment"], result["method"]) != (experiment, path.stem):
            notes.append(
                f"Not used: tuning {where} holds {result['method']} of {result['experiment']}."
            )
        elif result["winner"] is None:
            notes.append(f"Not used: tuning {where} is not finished.")
        else:
            earlier, before = [], folder / "earlier" / path.name
            if before.exists():
                try:
                    earlier.append(read_tuning(before))
                except UserError as error:
                    there = before.relative_to(tuning_dir).as_posix()
                    notes.append(f"Not used: {error}".replace(str(before), there))
            found.append(result | {"earlier": earlier})
            if result["dirty"]:
                notes.append(f"Tuning {where} comes from uncommitted code (git.dirty).")
    return sorted(found, key=lambda result: rank(result["method"])), notes


def targets(targets_dir: Path) -> dict[str, Targets]:
    """Read the paper's numbers and claims.

    Returns
    -------
    dict
        Contents of each ``*.toml``, by experiment.

    Raises
    ------
    UserError
        If a file cannot be read, is not TOML or names no experiment.
    """
    found = {}
    for path in sorted(targets_dir.glob("*.toml")):
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
            found[str(content["experiment"])] = content
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} is no targets file: {error}. Restore it from git.") from error
    return found
