"""The grid of cells: methods times seeds, one after another in this process."""

from __future__ import annotations

import subprocess
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import cell as cells
from benchmarks import records
from benchmarks.cell import Cell
from benchmarks.errors import UserError, pick
from benchmarks.experiment import Experiment, canonical
from benchmarks.locks import claimed, named
from benchmarks.methods import METHODS
from benchmarks.process import tune
from benchmarks.resume import SAVE_EVERY, Stop, Terminated
from benchmarks.shared import SharedTrials
from benchmarks.tracking import Mode, Tracker, View

if TYPE_CHECKING:
    from benchmarks.data import Images

ROOT = Path(__file__).resolve().parent.parent
CODE = ("*.py", "constraints.txt", "pyproject.toml", ":!tests", ":!benchmarks/reporting")
"""What can change a result: git pathspecs. Reports are made from records, by no training code."""

Keep = Callable[[Cell, records.Record], None]


def git_state(root: Path = ROOT) -> dict[str, Any]:
    """Return the commit of the code, and whether code or constraints differ from it.

    Outside a git checkout nobody can tell what ran: the commit is None and the tree dirty.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        status = git("status", "--porcelain", "--untracked-files=all", "--", *CODE)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(status)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": True}


def pick_device(name: str) -> torch.device:
    """Return the device of that name; ``auto`` is the first GPU if there is one, else the CPU.

    Raises
    ------
    UserError
        If torch does not know it or this machine does not have it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used here: {reason}") from error


@dataclass(frozen=True)
class Places:
    """The folders of a run."""

    records: Path
    runs: Path
    data: Path | None = None


def recorded(cell: Cell, places: Places) -> bool:
    """Return whether a cell already has a record, after checking that the record is its own.

    Raises
    ------
    UserError
        If the record is damaged, or was made under another meaning of a setting.
    """
    path = cell.record_path(places.records)
    if not path.exists():
        return False
    if wrong := records.disagreements(records.read(path)["config"], cell.config):
        raise UserError(
            f"{path} was recorded under another config than {cell.name} has today "
            f"({'; '.join(wrong)}). A default has changed: give it back its value, or run the "
            "cell again with --force."
        )
    return True


def plan(experiment: Experiment, methods: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """Return the cells of a grid, without their data yet.

    Raises
    ------
    UserError
        For an unknown method, a setting that is not possible, a seed twice, or nothing to run.
    """
    for kind, values in (("method", methods), ("seed", seeds)):
        if not values:
            raise UserError(f"No {kind} to run.")
        if twice := sorted({value for value in values if list(values).count(value) > 1}):
            raise UserError(f"The {kind} {twice[0]} is given twice.")
    if min(seeds) < 0:
        raise UserError(f"The seed {min(seeds)} is negative.")
    grid = [
        Cell(experiment, METHODS[pick("method", method, METHODS)], seed, fingerprint="")
        for method in methods
        for seed in seeds
    ]
    for cell in grid:
        cell.method.settings_for(experiment)
    for change in experiment.settings:
        if change.partition(".")[0] not in methods:
            raise UserError(f"{change} changes a method that is not run ({', '.join(methods)}).")
    return grid


def run_grid(
    grid: Sequence[Cell],
    places: Places,
    device: torch.device,
    wandb: Mode = "auto",
    force: bool = False,
    save_every: float = SAVE_EVERY,
) -> int:
    """Run the cells that have no record yet, and record each as it ends.

    A cell that fails leaves its traceback in its folder under runs/; the others go on.

    Parameters
    ----------
    grid
        From `plan`.
    places
        Where records, resume states, logs and data are.
    device
        Where to train.
    wandb
        How to mirror the logs to Weights & Biases.
    force
        Run recorded cells again too.
    save_every
        Seconds of training after which the state within a task is saved.

    Returns
    -------
    int
        Exit code: 0; 1 if a cell failed; 130 or 143 if it was interrupted or terminated.

    Raises
    ------
    UserError
        Before any training: folders that cannot be written, missing data, a damaged record.
    """
    records.check_writable(places.records)
    records.check_writable(places.runs)
    tune()  # first of all: threads that torch starts later inherit it
    git = git_state()
    experiment = grid[0].experiment
    images = experiment.load(places.data, device)
    grid = [Cell(c.experiment, c.method, c.seed, images.fingerprint) for c in grid]
    todo = [cell for cell in grid if force or not recorded(cell, places)]
    print(
        f"{experiment.name}: {len(grid)} cells, {len(grid) - len(todo)} of them recorded already."
    )
    if git["dirty"]:
        print("The code has uncommitted changes: these records will fill no table of the paper.")

    return run_cells(
        todo,
        images,
        device,
        git,
        places.runs,
        lambda cell, record: records.write(cell.record_path(places.records), record),
        wandb,
        recorded=lambda cell: not force and recorded(cell, places),
        save_every=save_every,
    )


def run_cells(
    todo: Sequence[Cell],
    images: Images,
    device: torch.device,
    git: dict[str, Any],
    runs: Path,
    keep: Keep,
    wandb: Mode = "disabled",
    share_first: bool = False,
    lost: Callable[[Cell, Exception], None] | None = None,
    recorded: Callable[[Cell], bool] = lambda cell: False,
    save_every: float = SAVE_EVERY,
) -> int:
    """Run cells of one experiment, one after another, and keep each record as it comes.

    Another process may run the same cells: what it runs at the moment is left to it, what it has
    recorded since is not run again.

    Parameters
    ----------
    todo
        What to run.
    images
        The experiment's data, on `device`.
    device
        Where to train.
    git
        From `git_state`.
    runs
        Folder of logs and resume states.
    keep
        Takes each cell and its record.
    wandb
        How to mirror the logs to Weights & Biases.
    share_first
        Whether cells with the same `Cell.first_hash` train their first task once.
    lost
        Told of each cell that fails, and why.
    recorded
        Tells whether a cell has a record by now.
    save_every
        Seconds of training after which the state within a task is saved.

    Returns
    -------
    int
        Exit code, as of `run_grid`.
    """
    if not todo:
        return 0
    if (threads := todo[0].experiment.threads) is not None:
        torch.set_num_threads(threads)
    failed, elsewhere = [], []
    unfinished: set[str | None] = set()
    stop = Stop()
    try:
        with stop.listening(), View(len(todo)) as view, ExitStack() as claims:
            for place, cell in enumerate(todo):
                folder = cell.run_dir(runs)
                mine = claims.enter_context(claimed(folder))
                if not mine:
                    elsewhere.append(f"{cell.name} ({named(folder)})")
                    unfinished.add(cell.trained_hash)
                if not mine or recorded(cell):
                    view.count()
                    claims.close()
                    continue
                first = first_state(cell, runs) if share_first else None
                others = [*todo[:place], *todo[place + 1 :]]
                shared = trials(cell, others, runs, git, device)
                tracker = Tracker(cell.run_dir(runs), wandb, view)
                options = (tracker, first, shared, lost, stop, save_every)
                error = _run_one(cell, images, device, git, runs, keep, *options)
                if error:
                    failed.append(error)
                    unfinished.add(cell.trained_hash)
                elif first and first not in (first_state(c, runs) for c in todo[place + 1 :]):
                    first.unlink(missing_ok=True)
                claims.close()
        for cell in todo:
            if cell.trained_hash not in unfinished and (
                shared := trials(cell, [], runs, git, device)
            ):
                shared.forget()
    except KeyboardInterrupt as stopped:
        print(
            f"Stopped in {cell.name}. Finished cells are recorded. {saved(cell, runs)} The same "
            "command goes on from there."
        )
        return 143 if isinstance(stopped, Terminated) else 130
    if elsewhere:
        print(f"{len(elsewhere)} of {len(todo)} cells run elsewhere:", *elsewhere, sep="\n  ")
    if failed:
        print(f"{len(failed)} of {len(todo)} cells failed:", *failed, sep="\n  ")
    return 1 if failed else 0


def saved(cell: Cell, runs: Path) -> str:
    """Say what of an unfinished cell is saved, and where."""
    folder = cell.run_dir(runs)
    files = {cells.STATE: "its finished tasks", cells.TRAINING: "the task in training"}
    kept = [what for name, what in files.items() if (folder / name).exists()]
    if not kept:
        return "Of this one there was nothing to save yet."
    return f"Of this one {folder} holds {' and '.join(kept)}."


def first_state(cell: Cell, runs: Path) -> Path:
    """Return where cells with the same first task keep the state after it."""
    return cell.run_dir(runs).with_name(f"first-seed{cell.seed}-{cell.first_hash[:8]}.pt")


def trials(
    cell: Cell, others: Sequence[Cell], runs: Path, git: dict[str, Any], device: torch.device
) -> SharedTrials | None:
    """Return who trains a cell's first task if others share that training, else None."""
    if cell.trained_hash is None:
        return None
    path = runs / "shared" / f"seed{cell.seed}-{cell.trained_hash[:8]}.pt"
    shared = SharedTrials(path, cell.trained_hash, git, device)
    return shared if shares(cell, others) or shared.files() else None


def shares(cell: Cell, others: Sequence[Cell]) -> bool:
    """Return whether some other cell has the same training of the first task."""
    return any(cell.trained_hash == other.trained_hash for other in others)


def _run_one(
    cell: Cell,
    images: Images,
    device: torch.device,
    git: dict[str, Any],
    runs: Path,
    keep: Keep,
    tracker: Tracker,
    first: Path | None,
    shared: SharedTrials | None,
    lost: Callable[[Cell, Exception], None] | None,
    stop: Stop,
    save_every: float,
) -> str | None:
    """Run a cell and hand its record on; return what went wrong, or None."""
    folder = cell.run_dir(runs)
    trace = folder / "traceback.txt"
    failed = True
    try:
        options = (tracker.announce, first, shared, stop, save_every)
        record = cells.run(cell, images, device, folder, git, *options)
        keep(cell, record)
        for name in (cells.STATE, cells.TRAINING):
            (folder / name).unlink(missing_ok=True)
        trace.unlink(missing_ok=True)
        failed = False
    except Exception as error:  # whatever it is, the other cells go on
        text = f"{type(error).__name__}: {error}"
        trace.write_text(f"{cell.name}\n{canonical(cell.config)}\n\n{traceback.format_exc()}")
        tracker.announce({"event": "failed", "cell": cell.name, "error": text})
        if lost is not None:
            lost(cell, error)
        return f"{cell.name}: {text} (see {trace})"
    finally:
        tracker.close(failed)
    return None
