"""Tuning: a method's grid on validation data, on seeds that no table uses."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import cell as cells
from benchmarks import records
from benchmarks.cell import Cell
from benchmarks.errors import UserError, pick
from benchmarks.experiment import Experiment, canonical
from benchmarks.learners import Settings
from benchmarks.methods import METHODS, Method
from benchmarks.process import tune as tune_process
from benchmarks.runner import git_state
from benchmarks.tracking import Tracker, View

if TYPE_CHECKING:
    from benchmarks.data import Images

FIRST_SEED = 100
"""Smaller seeds are those of tables, and no choice may see them."""
MOST = 4
"""Candidates a method may have."""


class _Learnt(Exception):
    """The first task has been learnt and saved."""


def candidates(method: Method[Any], experiment: Experiment) -> tuple[Settings, ...]:
    """Return a method's grid in an experiment.

    Raises
    ------
    UserError
        If it has none, more than 4 candidates, or two that are equal.
    """
    grid: tuple[Settings, ...] = method.grid.get(experiment.preset, ())
    if not grid:
        have = sorted(name for name, m in METHODS.items() if experiment.preset in m.grid)
        raise UserError(
            f"{method.name} has no grid for {experiment.preset}. Methods that have one: "
            f"{', '.join(have) or 'none'}."
        )
    if len(grid) > MOST or len(set(grid)) < len(grid):
        raise UserError(f"The grid of {method.name} must be of at most {MOST} different settings.")
    return grid


def cell_of(
    method: Method[Any], settings: Settings, experiment: Experiment, seed: int, fingerprint: str
) -> Cell:
    """Return the cell that trains a candidate."""
    only = dataclasses.replace(method, settings={experiment.preset: settings})
    return Cell(experiment, only, seed, fingerprint)


def share_first_task(source: Path, source_hash: str, cell: Cell, folder: Path) -> None:
    """Give a cell the state of another one after the first task, unless it has its own."""
    target = folder / cells.STATE
    if not target.exists():
        state = cells.load_state(source, source_hash)
        folder.mkdir(parents=True, exist_ok=True)
        cells.save_state(target, {**state, "hash": cell.hash})


def winner(accuracies: Sequence[Sequence[float]]) -> int:
    """Return the first candidate of the highest mean accuracy over its seeds."""
    means = [statistics.fmean(values) for values in accuracies]
    return means.index(max(means))


def tune(
    method: Method[Any],
    preset: Experiment,
    images: Images,
    device: torch.device,
    runs: Path,
    seeds: Sequence[int] = (FIRST_SEED,),
    tasks: int = 3,
    share: bool = True,
) -> dict[str, Any]:
    """Train every candidate of a method's grid, and return the account of it.

    What has been trained before is taken from `runs`, and an interrupted candidate goes on after
    its last task.

    Parameters
    ----------
    method, preset
        Whose grid, in which experiment.
    images
        The experiment's data, loaded without test images.
    device
        Where to train.
    runs
        Folder of states and results.
    seeds
        From 100 on.
    tasks
        How many tasks each candidate learns.
    share
        Train the first task once for candidates that differ in `Method.later` alone.

    Returns
    -------
    dict
        JSON values: what was run, the candidates with their validation accuracies, the winner.

    Raises
    ------
    UserError
        For a seed of the tables, or a method without a grid.
    """
    if not seeds or min(seeds) < FIRST_SEED or len(set(seeds)) < len(seeds):
        raise UserError(
            f"Seeds {list(seeds)}: tuning needs different ones from {FIRST_SEED} on, since smaller "
            "ones are those of the tables."
        )
    grid = candidates(method, preset)
    experiment = dataclasses.replace(preset, tasks=tasks)
    git = git_state()
    found: list[list[dict[str, Any]]] = [[] for _ in grid]
    with View(len(grid) * len(seeds)) as view:
        for seed in seeds:
            for place, settings in enumerate(grid):
                cell = cell_of(method, settings, experiment, seed, images.fingerprint)
                folder = cell.run_dir(runs / "tuning")
                done = folder / "result.json"
                if not done.exists():
                    if share and method.later and tasks > 1:
                        _first_task(cell, images, device, runs, git, view)
                    result = _train(cell, images, device, folder, git, view)
                    records.write_atomically(done, (json.dumps(result) + "\n").encode())
                    (folder / cells.STATE).unlink(missing_ok=True)
                found[place].append(json.loads(done.read_text()))
    scores = [[result["mean"] for result in results] for results in found]
    return {
        "experiment": preset.name,
        "method": method.name,
        "revision": method.revision,
        "data": {preset.dataset: images.fingerprint},
        "tasks": tasks,
        "seeds": list(seeds),
        "measure": "mean validation accuracy over the tasks after the last one",
        "candidates": [
            {
                "settings": json.loads(canonical(dataclasses.asdict(settings))),
                "mean": statistics.fmean(score),
                "runs": results,
            }
            for settings, score, results in zip(grid, scores, found, strict=True)
        ],
        "winner": winner(scores),
    }


def _first_task(
    cell: Cell,
    images: Images,
    device: torch.device,
    runs: Path,
    git: dict[str, Any],
    view: View,
) -> None:
    """Bring a cell to the state after its first task, by another one's if that is the same."""
    method, own = cell.method, cell.settings
    plain = type(own)()
    same = dataclasses.replace(own, **{name: getattr(plain, name) for name in method.later})
    shared = cell_of(method, same, cell.experiment, cell.seed, cell.fingerprint)
    folder = shared.run_dir(runs / "tuning" / "first_task")
    saved = folder / cells.STATE
    if not saved.exists():
        tracker = Tracker(folder, "disabled", view)

        def until_learnt(event: dict[str, Any]) -> None:
            tracker.announce(event)
            if event["event"] == "task":
                raise _Learnt

        try:
            cells.run(shared, images, device, folder, git, until_learnt)
        except _Learnt:
            pass
        finally:
            tracker.close(False)
    share_first_task(saved, shared.hash, cell, cell.run_dir(runs / "tuning"))


def _train(
    cell: Cell,
    images: Images,
    device: torch.device,
    folder: Path,
    git: dict[str, Any],
    view: View,
) -> dict[str, Any]:
    tracker = Tracker(folder, "disabled", view)
    try:
        record = cells.run(cell, images, device, folder, git, tracker.announce)
    finally:
        tracker.close(False)
    last = record["accuracy"]["validation"][-1]
    return {
        "seed": cell.seed,
        "hash": cell.hash,
        "validation": last,
        "mean": statistics.fmean(last),
        "seconds": record["seconds"]["train"],
        "git": record["git"],
        "environment": record["environment"],
    }


def agrees(account: dict[str, Any], method: Method[Any]) -> bool:
    """Return whether a method's settings are those of the winner in an account of tuning."""
    settings = method.settings[account["experiment"]]
    today = json.loads(canonical(dataclasses.asdict(settings)))
    won = account["candidates"][account["winner"]]["settings"]
    return not records.disagreements(won, today)


def main(
    name: str,
    preset: Experiment,
    seeds: Sequence[int],
    tasks: int,
    device: torch.device,
    data_dir: Path | None,
    runs: Path,
    out: Path,
) -> int:
    """Tune a method, write its account and print it; return the exit code."""
    method = METHODS[pick("method", name, METHODS)]
    candidates(method, preset)
    records.check_writable(runs)
    path = out / preset.name / f"{method.name}.json"
    records.check_writable(path.parent)
    tune_process()
    if preset.threads is not None:
        torch.set_num_threads(preset.threads)
    images = preset.load(data_dir, device, test=False)
    account = tune(method, preset, images, device, runs, seeds, tasks)
    records.write_atomically(path, (json.dumps(account, indent=1) + "\n").encode())
    for place, candidate in enumerate(account["candidates"]):
        settings = METHODS[method.name].grid[preset.preset][place]
        chosen = "  <- winner" if place == account["winner"] else ""
        print(f"{candidate['mean']:8.2%}  {_shown(settings, method, preset)}{chosen}")
    if not agrees(account, method):
        print(f"The settings of {method.name} for {preset.name} in benchmarks/methods.py aren't")
        print("the winner's: enter these.")
    print(f"Account: {path}")
    return 0


def _shown(settings: Settings, method: Method[Any], preset: Experiment) -> str:
    """Return the settings in which the candidates of a grid differ."""
    grid = method.grid[preset.preset]
    names = [
        field.name
        for field in dataclasses.fields(settings)
        if len({getattr(other, field.name) for other in grid}) > 1
    ]
    return ", ".join(f"{name}={getattr(settings, name)}" for name in names)
