"""Tuning: a method's grid on validation data, with seeds that no table uses.

``reports/tuning/<experiment>/<method>.json`` holds every candidate and the winner, whose settings
the method is to have in `benchmarks.methods`. Test data are not even loaded.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
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
from benchmarks.runner import Work, doubt, git_state, run_cells, write_at_last
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
    account = _account(asked, path, images.fingerprint)

    def enter(cell: Cell, run: dict[str, Any]) -> None:
        account.done[cell.hash] = run
        write_at_last(lambda: records.write_tuning(path, account.result()))

    def keep(cell: Cell, record: records.Record) -> None:
        enter(cell, _run(cell, record))

    def diverged(cell: Cell) -> None:
        # A result; what fails otherwise is to be mended and run again.
        run = {"seed": cell.seed, "hash": cell.hash, "validation": None, "mean": None}
        enter(cell, run | {"seconds": 0.0, "environment": environment(device), "git": git})

    todo = []
    for cell in account.cells:
        if cell.hash in account.done:
            sweep(cell.run_dir(folder))
        else:
            todo.append(cell)
    print(
        f"{asked.experiment.preset} {asked.method.name}: {len(account.grid)} candidates, "
        f"{len(account.seeds)} seeds, {len(todo)} of {len(account.cells)} runs to do."
    )
    if git["dirty"]:
        print(f"{doubt(git)}; the result will say so.")
    todo.sort(key=lambda cell: (cell.seed, cell.first_hash))
    work = Work(folder, git, share_first=True, save_every=save_every)
    if parallel is not None:
        parallel = replace(parallel, test=False)  # each process loads the data itself
    code = run_cells(todo, images, device, work, keep, diverged, parallel=parallel)
    if code == 0:
        records.write_tuning(path, account.result())
    return code, account.result()


@dataclass
class Account:
    """A result as it grows: what has been tried of a grid, and of earlier ones."""

    asked: Request
    config: dict[str, Any]
    """Of the experiment and its data."""
    seeds: list[int]
    grid: list[list[Cell]]
    """Of each candidate, a cell a seed."""
    done: dict[str, dict[str, Any]]
    """What is kept of each cell that has been run, by its hash."""
    left: list[dict[str, Any]]
    """Candidates of an earlier grid alone: what was tried has been tried, and counts."""

    @property
    def cells(self) -> list[Cell]:
        """Those of all candidates."""
        return [cell for row in self.grid for cell in row]

    def candidate(self, row: Sequence[Cell]) -> dict[str, Any]:
        """Return what the result says of a candidate, given its cells."""
        runs = [self.done[cell.hash] for cell in row if cell.hash in self.done]
        means = [run["mean"] for run in runs if run["mean"] is not None]
        # One that diverges with any seed can't win.
        steady = bool(means) and len(means) == len(runs)
        settings = row[0].settings
        return {
            "settings": asdict(settings),
            "changed": changed(settings),
            "in_grid": True,
            "runs": runs,
            "mean": float(np.mean(means)) if steady else None,
            "sd": float(np.std(means, ddof=1)) if steady and len(means) > 1 else None,
            "seconds": sum(run["seconds"] for run in runs),
        }

    def result(self) -> Tuning:
        """Return the result; it has a winner once all cells have been run."""
        candidates = [self.candidate(row) for row in self.grid]
        whole = all(cell.hash in self.done for cell in self.cells)
        able = [i for i, candidate in enumerate(candidates) if candidate["mean"] is not None]
        best = max(able, key=lambda i: candidates[i]["mean"]) if whole and able else None
        everything = [*candidates, *({**candidate, "in_grid": False} for candidate in self.left)]
        result: Tuning = json.loads(
            canonical(
                {
                    "experiment": self.asked.experiment.preset,
                    "method": self.asked.method.name,
                    "revision": self.asked.method.revision,
                    "config": self.config,
                    "seeds": self.seeds,
                    "tasks": self.asked.experiment.tasks,
                    "candidates": everything,
                    "winner": best,
                    "dirty": any(run["git"]["dirty"] for c in everything for run in c["runs"]),
                }
            )
        )
        return result


def _account(asked: Request, path: Path, fingerprint: str) -> Account:
    """Return the account of a grid, with what the result in a file knows already."""
    config = {
        "experiment": asked.experiment.config(),
        "data": {asked.experiment.dataset: fingerprint},
    }
    before = _earlier(path, asked, config)
    seeds = sorted({*asked.seeds, *(before["seeds"] if before else ())})
    account = Account(asked, config, seeds, asked.cells(seeds, fingerprint), {}, [])
    wanted = {cell.hash: cell for cell in account.cells}
    for candidate in (before or {}).get("candidates", ()):
        runs = {run["hash"]: run for run in candidate["runs"]}
        same = [wanted[hash_] for hash_ in runs if hash_ in wanted]
        if not same:
            account.left += [candidate] if runs else []
        # A default that has changed since is in no hash.
        elif wrong := records.disagreements(candidate["settings"], same[0].config["method"]):
            raise UserError(
                f"{path}: a candidate was trained with other settings ({'; '.join(wrong)}). Delete "
                "it to tune anew, or write elsewhere with --tuning-dir."
            )
        account.done |= runs
    return account


def _earlier(path: Path, asked: Request, config: dict[str, Any]) -> Tuning | None:
    """Return the result so far; None if there is none of this revision of the method."""
    if not path.exists():
        return None
    before = records.read_tuning(path)
    if before["revision"] != asked.method.revision:
        print(
            f"{path} is of revision {before['revision']} of {asked.method.name}, which is at "
            f"{asked.method.revision}: it is tuned anew, and the file written over."
        )
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
        # A task that found no room has no accuracy, and a mean over fewer tasks can't win.
        "mean": None if None in last else float(np.mean(last)),
        "seconds": record["seconds"]["train"],
        "environment": record["environment"],
        "git": record["git"],
    }


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
    """Return whether the winner's settings are entered, and if not, which ones to enter.

    They are the method's own, or those of the method that `benchmarks.records.PRINTED` names.
    """
    preset, method = result["experiment"], records.tuned_method(result)
    wrong = mismatches(result, METHODS[method].settings[preset])
    if result["winner"] is None:
        return f"{method} for {preset}: {'; '.join(wrong)}."
    if not wrong:
        return f"The settings of {method} for {preset} are the winner's."
    return (
        f"The settings of {method} for {preset} are not the winner's: {'; '.join(wrong)}. "
        "Enter them in benchmarks/methods.py."
    )
