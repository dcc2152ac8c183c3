"""Tuning: a method's grid on validation data, with seeds that no table uses.

``reports/tuning/<experiment>/<method>.json`` holds every candidate and the winner, whose settings
the method is to have in `benchmarks.methods`. Test data are not even loaded.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks import records
from benchmarks.cell import Cell, environment
from benchmarks.errors import UserError, pick
from benchmarks.experiment import Experiment, canonical, changed
from benchmarks.learners import Settings
from benchmarks.locks import claimed, named
from benchmarks.methods import METHODS, Method
from benchmarks.process import tune as tune_process
from benchmarks.records import Tuning
from benchmarks.resume import SAVE_EVERY
from benchmarks.runner import Work, git_state, run_cells, write_at_last
from benchmarks.states import sweep

if TYPE_CHECKING:
    from benchmarks.cluster import Parallel
    from benchmarks.data import Images

FIRST_SEED = 100
"""Seeds below it are those of the tables: nothing is chosen by them."""
TASKS = 3
"""First tasks of the stream that a candidate learns, if the registry does not say otherwise."""


@dataclass(frozen=True)
class Request:
    """One method's grid on one experiment."""

    experiment: Experiment
    """The preset, with as many tasks as a candidate learns."""
    method: Method[Any]
    seeds: tuple[int, ...]

    def path(self, folder: Path) -> Path:
        """Where the result belongs."""
        return folder / self.experiment.preset / f"{self.method.name}.json"

    def cells(self, seeds: Sequence[int], fingerprint: str) -> list[list[Cell]]:
        """Return the cells of each candidate, one a seed."""
        preset = self.experiment.preset
        return [
            [
                Cell(
                    self.experiment,
                    dataclasses.replace(self.method, settings={preset: settings}),
                    seed,
                    fingerprint,
                )
                for seed in seeds
            ]
            for settings in self.method.grid[preset]
        ]


def request(
    method: str,
    preset: type[Experiment],
    seeds: Sequence[int] = (FIRST_SEED,),
    tasks: int | None = None,
) -> Request:
    """Return what is to be run; by default with as many tasks as the registry says for the grid.

    Raises
    ------
    UserError
        For an unknown method, one without a grid, a seed of the tables, or a seed twice.
    """
    chosen = METHODS[pick("method", method, METHODS)]
    if not chosen.grid.get(preset.preset):
        having = sorted(name for name, m in METHODS.items() if m.grid.get(preset.preset))
        raise UserError(
            f"{method} has no grid for {preset.preset}. Methods with one: "
            f"{', '.join(having) or 'none'}. A grid is entered in benchmarks/methods.py: "
            f'grid={{"{preset.preset}": (settings, ...)}}.'
        )
    if not seeds:
        raise UserError("No seed to run.")
    if min(seeds) < FIRST_SEED:
        raise UserError(
            f"The seed {min(seeds)} is one of the tables': nothing may be chosen by it. Tune with "
            f"seeds from {FIRST_SEED} on."
        )
    if len(set(seeds)) < len(seeds):
        raise UserError(f"A seed is given twice: {', '.join(map(str, seeds))}.")
    if tasks is None:
        tasks = chosen.tuning_tasks.get(preset.preset, TASKS)
    return Request(preset(tasks=tasks), chosen, tuple(seeds))


def run(
    asked: Request,
    tuning: Path,
    runs: Path,
    data: Path | None,
    device: torch.device,
    save_every: float = SAVE_EVERY,
    parallel: Parallel | None = None,
) -> tuple[int, Tuning]:
    """Train the candidates that the result lacks, and write the result after each of them.

    Parameters
    ----------
    asked
        From `request`. The seeds of an earlier result of the same method are kept.
    tuning, runs, data
        Folders of the results, of logs and resume states, and of the data sets.
    device
        Where to train.
    save_every
        Seconds of training after which the state within a task is saved.
    parallel
        How to run candidates at once; None: one after another, in this process.

    Returns
    -------
    code : int
        0; 1 if a candidate failed; 130 or 143 if it was interrupted or terminated.
    result : dict
        As it stands in its file.

    Raises
    ------
    UserError
        Before any training: folders that cannot be written, missing data, a result that is
        damaged or of another experiment.
    """
    path = asked.path(tuning)
    records.check_writable(path.parent)
    records.check_writable(runs)
    tune_process()
    images = asked.experiment.load(data, device, test=False)
    folder = runs / "tuning"
    # One process a result, whatever the number of tasks: it is read before and written after.
    lock = folder / asked.experiment.preset / asked.method.name
    with claimed(lock) as mine:
        if not mine:
            raise UserError(f"{asked.method.name} is being tuned already, by {named(lock)}.")
        return _run_missing(asked, path, folder, images, device, save_every, parallel)


def _run_missing(
    asked: Request,
    path: Path,
    folder: Path,
    images: Images,
    device: torch.device,
    save_every: float,
    parallel: Parallel | None,
) -> tuple[int, Tuning]:
    git = git_state()
    config = {
        "experiment": asked.experiment.config(),
        "data": {asked.experiment.dataset: images.fingerprint},
    }
    before = _earlier(path, asked, config)
    seeds = sorted({*asked.seeds, *(before["seeds"] if before else ())})
    grid = asked.cells(seeds, images.fingerprint)
    tried = [candidate for candidate in (before or {}).get("candidates", ()) if candidate["runs"]]
    done = {run["hash"]: run for candidate in tried for run in candidate["runs"]}
    wanted = {cell.hash: cell for row in grid for cell in row}
    # What was tried with another grid has been tried: it stays, and counts.
    left = []
    for candidate in tried:
        same = [wanted[run["hash"]] for run in candidate["runs"] if run["hash"] in wanted]
        if not same:
            left.append(candidate)
        # A default that has changed since is in no hash.
        elif wrong := records.disagreements(candidate["settings"], same[0].config["method"]):
            raise UserError(
                f"{path}: a candidate was trained with other settings ({'; '.join(wrong)}). Delete "
                "it to tune anew, or write elsewhere with --tuning-dir."
            )

    def result() -> Tuning:
        return _result(asked, config, seeds, grid, done, left)

    def enter(cell: Cell, run: dict[str, Any]) -> None:
        done[cell.hash] = run
        write_at_last(lambda: records.write_tuning(path, result()))

    def keep(cell: Cell, record: records.Record) -> None:
        enter(cell, _run(cell, record))

    def diverged(cell: Cell) -> None:
        # A result; what fails otherwise is to be mended and run again.
        run = {"seed": cell.seed, "hash": cell.hash, "validation": None, "mean": None}
        enter(cell, run | {"seconds": 0.0, "environment": environment(device), "git": git})

    todo = [cell for row in grid for cell in row if cell.hash not in done]
    for cell in wanted.values():
        if cell.hash in done:
            sweep(cell.run_dir(folder))
    print(
        f"{asked.experiment.preset} {asked.method.name}: {len(grid)} candidates, "
        f"{len(seeds)} seeds, {len(todo)} of {len(grid) * len(seeds)} runs to do."
    )
    if git["dirty"]:
        print("The code has uncommitted changes; the result will say so.")
    todo.sort(key=lambda cell: (cell.seed, cell.first_hash))
    work = Work(folder, git, share_first=True, save_every=save_every)
    code = run_cells(todo, images, device, work, keep, diverged, parallel=parallel)
    if code == 0:
        records.write_tuning(path, result())
    return code, result()


def _earlier(path: Path, asked: Request, config: dict[str, Any]) -> Tuning | None:
    """Return the result so far; None if there is none of this revision of the method."""
    if not path.exists():
        return None
    before = records.read_tuning(path)
    if before["revision"] != asked.method.revision:
        return None
    if wrong := records.disagreements(before["config"], config):
        raise UserError(
            f"{path} was made under another config ({'; '.join(wrong)}). Delete it to tune anew, "
            "or write elsewhere with --tuning-dir."
        )
    return before


def _run(cell: Cell, record: records.Record) -> dict[str, Any]:
    """Return what a result keeps of one candidate's record."""
    last = record["accuracy"]["validation"][-1]
    return {
        "seed": cell.seed,
        "hash": cell.hash,
        "validation": last,
        "mean": float(np.mean(last)),
        "seconds": record["seconds"]["train"],
        "environment": record["environment"],
        "git": record["git"],
    }


def _result(
    asked: Request,
    config: dict[str, Any],
    seeds: Sequence[int],
    grid: Sequence[Sequence[Cell]],
    done: dict[str, dict[str, Any]],
    left: Sequence[dict[str, Any]],
) -> Tuning:
    candidates = []
    for row in grid:
        runs = [done[cell.hash] for cell in row if cell.hash in done]
        means = [run["mean"] for run in runs if run["mean"] is not None]
        # One that diverges with any seed can't win.
        steady = bool(means) and len(means) == len(runs)
        settings = row[0].settings
        candidates.append(
            {
                "settings": asdict(settings),
                "changed": changed(settings),
                "in_grid": True,
                "runs": runs,
                "mean": float(np.mean(means)) if steady else None,
                "sd": float(np.std(means, ddof=1)) if steady and len(means) > 1 else None,
                "seconds": sum(run["seconds"] for run in runs),
            }
        )
    whole = all(len(candidate["runs"]) == len(seeds) for candidate in candidates)
    able = [i for i, candidate in enumerate(candidates) if candidate["mean"] is not None]
    best = max(able, key=lambda i: candidates[i]["mean"]) if whole and able else None
    everything = [*candidates, *({**candidate, "in_grid": False} for candidate in left)]
    result: Tuning = json.loads(
        canonical(
            {
                "experiment": asked.experiment.preset,
                "method": asked.method.name,
                "revision": asked.method.revision,
                "config": config,
                "seeds": seeds,
                "tasks": asked.experiment.tasks,
                "candidates": everything,
                "winner": best,
                "dirty": any(run["git"]["dirty"] for c in everything for run in c["runs"]),
            }
        )
    )
    return result


def mismatches(result: Tuning, settings: Settings) -> list[str]:
    """Return where a method's settings are not those of the winner.

    Parameters
    ----------
    result
        Of a method's tuning.
    settings
        Those that the method has in the same experiment.

    Returns
    -------
    list of str
        One entry a setting, such as ``"lr = 0.002, not 0.001"``; the winner's value comes first.
        A setting that is younger than the result is held to its default.
    """
    if result["winner"] is None:
        return ["the grid has no winner yet: run the same command again, or widen it"]
    today = json.loads(canonical(asdict(settings)))
    default = {field.name: field.default for field in dataclasses.fields(settings)}
    won = json.loads(canonical(default)) | result["candidates"][result["winner"]]["settings"]
    return [
        f"{name} = {won[name]!r}, not {today.get(name)!r}"
        for name in won
        if name not in today or won[name] != today[name]
    ]


def verdict(result: Tuning) -> str:
    """Return whether the method has the winner's settings, and if not, which ones to enter."""
    preset, method = result["experiment"], result["method"]
    wrong = mismatches(result, METHODS[method].settings[preset])
    if result["winner"] is None:
        return f"{method} for {preset}: {'; '.join(wrong)}."
    if not wrong:
        return f"The settings of {method} for {preset} are the winner's."
    return (
        f"The settings of {method} for {preset} are not the winner's: {'; '.join(wrong)}. "
        "Enter them in benchmarks/methods.py."
    )
