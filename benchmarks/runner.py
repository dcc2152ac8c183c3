"""The grid of cells: methods times seeds, one after another in this process, or on Ray."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import cell as cells
from benchmarks import process, records
from benchmarks.cell import Cell
from benchmarks.errors import UserError, pick
from benchmarks.experiment import Experiment, canonical
from benchmarks.locks import claimed, named
from benchmarks.methods import METHODS
from benchmarks.resume import SAVE_EVERY, Stop
from benchmarks.shared import SharedTrials
from benchmarks.states import STATE, TRAINING, forget, sweep
from benchmarks.tracking import Mode, Tracker, View, sync_command

if TYPE_CHECKING:
    from benchmarks.cluster import Parallel
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


def doubt(git: dict[str, Any]) -> str:
    """Say why it isn't known of what code a result is, given `git_state` with ``dirty``."""
    if git["commit"] is None:
        return "No commit is known (git is missing, or this is no checkout of ours)"
    return "The code has uncommitted changes"


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
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used here: {reason}") from error
    if device.type == "meta":
        raise UserError(f"--device {name} holds no numbers: name a CPU or a GPU.")
    return device


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


def renew(cell: Cell, places: Places) -> None:
    """Forget what is saved of a cell from before its record.

    What is younger is of an interrupted run with ``--force``, which goes on.
    """
    path = cell.record_path(places.records)
    if path.exists():
        forget(cell.run_dir(places.runs), path.stat().st_mtime)


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
    if max(seeds) >= 2**63:
        raise UserError(f"The seed {str(max(seeds))[:20]}… is too large: it must be below 2^63.")
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
    parallel: Parallel | None = None,
    deterministic: bool = False,
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
    wandb, save_every, deterministic
        As of `Work`.
    force
        Run recorded cells again too.
    parallel
        How to run cells at once; None: one after another, in this process.

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
    process.tune()  # first of all: threads that torch starts later inherit it
    git = git_state()
    experiment = grid[0].experiment
    images = experiment.load(places.data, device)
    grid = [Cell(c.experiment, c.method, c.seed, images.fingerprint) for c in grid]
    todo = []
    for cell in grid:
        if force or not recorded(cell, places):
            todo.append(cell)
        else:
            made = cell.record_path(places.records).stat().st_mtime
            sweep(cell.run_dir(places.runs), made)  # what is younger is of a run with --force
    print(
        f"{experiment.name}: {len(grid)} cells, {len(grid) - len(todo)} of them recorded already."
    )
    if git["dirty"]:
        print(f"{doubt(git)}: these records will fill no table of the paper.")

    def already(cell: Cell) -> bool:
        if force:
            renew(cell, places)
        return not force and recorded(cell, places)

    return run_cells(
        todo,
        images,
        device,
        Work(places.runs, git, wandb, save_every=save_every, deterministic=deterministic),
        lambda cell, record: write_at_last(
            lambda: records.write(cell.record_path(places.records), record)
        ),
        recorded=already,
        parallel=parallel,
    )


TRACE = "traceback.txt"


@dataclass(frozen=True)
class Work:
    """What the cells of one call have in common, wherever they run; it can be sent elsewhere."""

    runs: Path
    """Folder of logs and resume states."""
    git: dict[str, Any]
    """From `git_state`."""
    wandb: Mode = "disabled"
    """How to mirror the logs to Weights & Biases."""
    share_first: bool = False
    """Whether cells with the same `Cell.first_hash` train their first task once."""
    save_every: float = SAVE_EVERY
    """Seconds of training after which the state within a task is saved."""
    deterministic: bool = False
    """Whether a GPU is to give the same bits each time; on a CPU it does."""

    def first_state(self, cell: Cell) -> Path | None:
        """Return where cells with the same first task keep the state after it, if they share it."""
        name = f"first-seed{cell.seed}-{cell.first_hash[:8]}.pt"
        return cell.run_dir(self.runs).with_name(name) if self.share_first else None


@dataclass(frozen=True)
class Failure:
    """How a cell failed."""

    text: str
    diverged: bool = False
    """Whether a number was no longer finite: a result, in a grid of settings."""


@dataclass
class Book:
    """What becomes of the cells of one call."""

    todo: Sequence[Cell]
    work: Work
    device: torch.device
    keep: Keep
    """Takes each cell and its record."""
    recorded: Callable[[Cell], bool]
    """Tells whether a cell has a record by now."""
    diverged: Callable[[Cell], None] | None
    """Told of each cell in which a number was no longer finite."""
    running: list[Cell] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    unfinished: set[str | None] = field(default_factory=set)
    """Trainings of first tasks that a cell which has not been recorded will need."""

    def others(self, cell: Cell) -> list[Cell]:
        """Return all cells but one."""
        return [other for other in self.todo if other is not cell]

    def label(self, cell: Cell) -> str:
        """Return a cell's name, with its hash where others have it too: a grid's candidates."""
        alike = sum(other.name == cell.name for other in self.todo)
        return cell.name if alike == 1 else f"{cell.name} ({cell.hash[:8]})"

    def taken(self, cell: Cell, claims: ExitStack) -> bool:
        """Claim a cell; return whether another process runs it, or has recorded it."""
        folder = cell.run_dir(self.work.runs)
        if not claims.enter_context(claimed(folder)):
            self.elsewhere.append(f"{self.label(cell)} ({named(folder)})")
            self.unfinished.add(cell.trained_hash)
            return True
        if self.recorded(cell):
            forget(folder)  # of a process that died after recording it
            return True
        return False

    def ended(self, cell: Cell, result: records.Record | Failure) -> None:
        """Keep a record, or what went wrong.

        Raises
        ------
        UserError
            If the record cannot be written. What the cell has saved stays.
        """
        if isinstance(result, Failure):
            self.failed.append(f"{self.label(cell)}: {result.text}")
            self.unfinished.add(cell.trained_hash)
            if result.diverged and self.diverged is not None:
                self.diverged(cell)
                forget(cell.run_dir(self.work.runs))
            return
        self.keep(cell, result)
        forget(cell.run_dir(self.work.runs))

    def tidy(self, left: Sequence[Cell]) -> None:
        """Delete what cells share and none of those that are left needs."""
        firsts = {self.work.first_state(cell) for cell in left}
        trained = {cell.trained_hash for cell in left} | self.unfinished
        for cell in self.todo:
            first = self.work.first_state(cell)
            if first is not None and first not in firsts and not self.failed:
                first.unlink(missing_ok=True)
                records.remove_leftovers(first)
            if cell.trained_hash not in trained and (
                shared := trials(cell, [], self.work.runs, self.work.git, self.device)
            ):
                shared.forget()

    def summary(self) -> int:
        """Say what has not been recorded; return the exit code."""
        for cells_, what in ((self.elsewhere, "run elsewhere"), (self.failed, "failed")):
            if cells_:
                print(f"{len(cells_)} of {len(self.todo)} cells {what}:", *cells_, sep="\n  ")
        return 1 if self.failed else 0


TRIES, PAUSE = 20, 30.0
"""How often the writing of a result is tried, and seconds between two tries."""


def write_at_last(write: Callable[[], None]) -> None:
    """Write a result; if the disk is full, wait for someone to make room.

    Raises
    ------
    UserError
        If it can't be written in ten minutes.
    """
    for left in reversed(range(TRIES)):
        try:
            write()
        except UserError as error:
            if not left:
                raise
            print(f"{error} Trying again in {PAUSE:.0f} s, {left} times more: make room for it.")
            time.sleep(PAUSE)
        else:
            return


def run_cells(
    todo: Sequence[Cell],
    images: Images,
    device: torch.device,
    work: Work,
    keep: Keep,
    diverged: Callable[[Cell], None] | None = None,
    recorded: Callable[[Cell], bool] = lambda cell: False,
    parallel: Parallel | None = None,
) -> int:
    """Run cells of one experiment, one after another or on Ray, and keep each record as it comes.

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
    work
        What the cells have in common.
    keep
        Takes each cell and its record.
    diverged
        Told of each cell in which a number was no longer finite.
    recorded
        Tells whether a cell has a record by now.
    parallel
        How to run cells at once; None: one after another, in this process.

    Returns
    -------
    int
        Exit code, as of `run_grid`.

    Raises
    ------
    UserError
        If a record cannot be written.
    """
    if not todo:
        return 0
    book = Book(todo, work, device, keep, recorded, diverged)
    stop = Stop()
    try:
        with stop.listening(), View(len(todo)) as view:
            if parallel is None:
                _one_after_another(book, images, view, stop)
            else:
                from benchmarks.cluster import run_on_ray

                run_on_ray(book, parallel, view, stop)
    except KeyboardInterrupt:
        print("Stopped. Finished cells are recorded.")
        for cell in book.running:
            print(f"{book.label(cell)}: {saved(cell, work.runs)}")
        print("The same command goes on from there.")
        # Not from what was raised: Ray makes a plain KeyboardInterrupt of it.
        return 128 + (stop.asked or signal.SIGINT)
    if command := sync_command(cell.run_dir(work.runs) for cell in todo):
        print(f"W&B runs are kept on disk; to upload them: {command}")
    return book.summary()


def _one_after_another(book: Book, images: Images, view: View, stop: Stop) -> None:
    if (threads := book.todo[0].experiment.threads) is not None:
        torch.set_num_threads(threads)
    for place, cell in enumerate(book.todo):
        with ExitStack() as claims:
            if book.taken(cell, claims):
                view.count()
                continue
            book.running.append(cell)
            result = run_one(
                cell, book.others(cell), book.work, images, book.device, view.announce, stop
            )
            book.ended(cell, result)
            book.running.remove(cell)
        book.tidy(book.todo[place + 1 :])


def saved(cell: Cell, runs: Path) -> str:
    """Say what of an unfinished cell is saved, and where."""
    folder = cell.run_dir(runs)
    files = {STATE: "its finished tasks", TRAINING: "the task in training"}
    kept = [what for name, what in files.items() if (folder / name).exists()]
    if not kept:
        return "Of this one there was nothing to save yet."
    return f"Of this one {folder} holds {' and '.join(kept)}."


def trials(
    cell: Cell,
    others: Sequence[Cell],
    runs: Path,
    git: dict[str, Any],
    device: torch.device,
    executor: Executor | None = None,
) -> SharedTrials | None:
    """Return who trains a cell's first task if others share that training, else None."""
    if cell.trained_hash is None:
        return None
    path = runs / "shared" / f"seed{cell.seed}-{cell.trained_hash[:8]}.pt"
    shared = SharedTrials(path, cell.trained_hash, git, cells.rounding(device), executor)
    return shared if shares(cell, others) or shared.files() else None


def shares(cell: Cell, others: Sequence[Cell]) -> bool:
    """Return whether some other cell has the same training of the first task."""
    return any(cell.trained_hash == other.trained_hash for other in others)


def run_one(
    cell: Cell,
    others: Sequence[Cell],
    work: Work,
    images: Images,
    device: torch.device,
    show: Callable[[str, dict[str, Any]], None],
    stop: Stop,
    candidates: Executor | None = None,
) -> records.Record | Failure:
    """Run a cell; its log, and what goes wrong, stand in its folder.

    Parameters
    ----------
    cell
        What to run.
    others
        The other cells of the call, with which it may share the training of the first task.
    work
        What they have in common.
    images
        The experiment's data, on `device`.
    device
        Where to train.
    show
        As of `Tracker`.
    stop
        Whose signals end the cell, saved.
    candidates
        Where the candidates of a search are trained; None: in this process.
    """
    if work.deterministic:
        process.deterministic()
    folder = cell.run_dir(work.runs)
    try:
        (folder / TRACE).unlink(missing_ok=True)
        tracker = Tracker(cell.name, folder, work.wandb, show)
    except OSError as error:
        return Failure(f"cannot write {folder}: {error.strerror or error}")
    failed = True
    try:
        shared = trials(cell, others, work.runs, work.git, device, candidates)
        options = (tracker.announce, work.first_state(cell), shared, stop, work.save_every)
        record = cells.run(cell, images, device, folder, work.git, *options, candidates)
        failed = False
        return record
    except Exception as error:  # whatever it is, the other cells go on
        text = f"{type(error).__name__}: {error}"
        trace = folder / TRACE
        with contextlib.suppress(OSError):  # a full disk
            trace.write_text(f"{cell.name}\n{canonical(cell.config)}\n\n{traceback.format_exc()}")
        tracker.announce({"event": "failed", "error": text})
        return Failure(f"{text} (see {trace})", _diverged(error))
    finally:
        tracker.close(failed)


def _diverged(error: BaseException | None) -> bool:
    """Return whether a number that isn't finite is at the root of an error."""
    return error is not None and (
        isinstance(error, FloatingPointError) or _diverged(error.__cause__)
    )
