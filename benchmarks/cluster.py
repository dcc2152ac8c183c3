"""Cells at once, on this machine or several: Ray carries them, the runner keeps their records.

A cell is a Ray task. Ray runs it anew if its process or its machine dies, and it goes on from what
it had saved, if the folder of runs is one that all machines see. The process that was started by
the user holds the locks, shows what happens, and alone writes records.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.cell import Cell
from benchmarks.errors import UserError
from benchmarks.experiment import Experiment
from benchmarks.process import tune
from benchmarks.resume import Stop, Terminated
from benchmarks.runner import Book, Failure, Work, git_state, pick_device, run_one
from benchmarks.tracking import Event, View

RETRIES = 3
"""How often a cell is run again whose process or machine died."""
LOOK_EVERY = 0.2
"""Seconds between two looks at what has happened."""
PATIENCE = 30.0
"""Seconds that stopped cells have for saving."""


@dataclass(frozen=True)
class Parallel:
    """How cells run at once.

    Raises
    ------
    UserError
        For numbers that make no sense.
    """

    workers: int | None = None
    """Cells at once; None: as many as Ray has room for."""
    address: str | None = None
    """Of a running Ray cluster; ``auto``: the one of this machine. None: one is started here."""
    gpus_per_cell: float | None = None
    """Share of a GPU that a cell takes; None: a whole one if there is one and `device` allows."""
    device: str = "auto"
    """Where to train, as of `pick_device`, on the machine of the cell."""
    data: Path | None = None
    """Folder of the data sets."""
    test: bool = True
    """Whether test data are loaded."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise UserError(f"--workers {self.workers}: at least 1.")
        share = self.gpus_per_cell
        if share is not None and not (0 < share <= 1 or (share >= 1 and share.is_integer())):
            raise UserError(
                f"--gpus-per-cell {share:g}: a share of a GPU above 0 and up to 1, such as 0.25, "
                "or a whole number."
            )
        if ":" in self.device:
            raise UserError(
                f"--device {self.device}: Ray chooses which GPU a cell gets; give --device "
                f"{self.device.partition(':')[0]}."
            )


def run_on_ray(book: Book, parallel: Parallel, view: View, stop: Stop) -> None:
    """Run the cells of a book.

    Parameters
    ----------
    book
        Of cells of one experiment.
    parallel
        How many at once, and where.
    view
        Shows what happens in each.
    stop
        Whose signals end all of them, saved.

    Raises
    ------
    UserError
        Ray is missing, or not to be reached, or has no room for a cell.
    KeyboardInterrupt
        As `Stop` says.
    """
    # ray.init takes SIGTERM for itself.
    with connected(parallel) as ray, stop.listening():
        needs = resources(ray, parallel, len(book.todo))
        work = replace(book.work, runs=book.work.runs.resolve())
        task = ray.remote(max_calls=needs.calls, max_retries=RETRIES, **needs.options)(_run)
        send = (parallel, needs, work)
        left = list(book.todo)
        running: dict[Any, tuple[Cell, ExitStack]] = {}
        logs: dict[str, _Tail] = {}
        try:
            while left or running:
                for cell in _startable(book, left, len(running), needs.cells):
                    left.remove(cell)
                    claims = ExitStack()
                    if book.taken(cell, claims):
                        view.count()
                        claims.close()
                        continue
                    book.running.append(cell)
                    logs[book.label(cell)] = _Tail(cell.run_dir(work.runs))
                    running[task.remote(cell, book.others(cell), *send)] = (cell, claims)
                done, _ = ray.wait(list(running), timeout=LOOK_EVERY) if running else ([], [])
                for name, log in logs.items():
                    for event in log.read():
                        view.announce(name, event)
                for reference in done:
                    cell, claims = running.pop(reference)
                    del logs[book.label(cell)]
                    with claims:
                        book.ended(cell, _result(ray, reference, book.label(cell), view))
                        book.running.remove(cell)
                    book.tidy([*left, *(cell for cell, _ in running.values())])
        except BaseException:
            _cancel(ray, list(running))
            raise
        finally:
            for _, claims in running.values():
                claims.close()


def _cores() -> int:
    """Return how many cores this process may use: a batch system or taskset may allow it few."""
    allowed = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(allowed(0)) if allowed else os.cpu_count() or 1


@contextmanager
def connected(parallel: Parallel) -> Iterator[Any]:
    """Connect to a Ray cluster, or start one of this machine, and leave it again.

    Raises
    ------
    UserError
        Ray is missing, or the cluster isn't to be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # By default Ray's workers give way to everything else that the machine does (15).
    os.environ.setdefault("RAY_worker_niceness", "0")
    # And an idle one ends after a second; a new one takes seven to import what a cell needs.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "--workers and --ray-address need Ray, which is not installed: "
            "python -m pip install 'clnp[cluster]'."
        ) from error
    ours = not ray.is_initialized()
    if ours:
        where: dict[str, Any] = {"address": parallel.address}
        if parallel.address is None:
            # "local": a new one, even beside another that runs on this machine.
            local = {"num_cpus": _cores(), "_node_ip_address": "127.0.0.1"}
            where = {"address": "local", **local}
        try:
            ray.init(
                **where,
                include_dashboard=None if parallel.address else False,
                log_to_driver=False,
                configure_logging=False,
            )
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0]
            if parallel.address is None:
                raise UserError(f"Ray cannot be started: {reason}") from error
            raise UserError(
                f"No Ray cluster at --ray-address {parallel.address}: {reason} (If it asks for a "
                "token: RAY_AUTH_MODE=token and the same ~/.ray/auth_token on every machine.)"
            ) from error
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


@dataclass(frozen=True)
class Needs:
    """What a cell asks Ray for."""

    options: dict[str, Any]
    threads: int
    cells: int
    """How many run at once."""
    calls: int = 0
    """How many a process of Ray's runs before it ends; 0: all that come."""


def resources(ray: Any, parallel: Parallel, cells: int) -> Needs:
    """Share what Ray has among the cells that run at once.

    Raises
    ------
    UserError
        If there isn't enough for one.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores, gpus = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    # A cell runs on one machine.
    most_cores, most_gpus = (max(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    uses_gpu = parallel.device != "cpu" and (gpus > 0 or parallel.gpus_per_cell is not None)
    share = (parallel.gpus_per_cell or 1.0) if uses_gpu else 0.0
    if share > most_gpus:
        raise UserError(
            f"A cell takes {share:g} GPU, and no machine of Ray's has more than {most_gpus:g}: "
            "lower --gpus-per-cell, or --device cpu."
        )
    most = int(gpus / share + 1e-9) if share else max(int(cores), 1)
    at_once = min(parallel.workers or most, most if share else cells, cells)
    # Threads for the cores that a cell has: more would only wait for each other.
    cpus = min(cores / at_once, most_cores)
    whole = max(int(cpus), 1)
    options = {"num_cpus": float(whole) if cpus >= 1 else cpus, "num_gpus": share}
    # torch keeps the GPU that a process got first, and Ray may give it another one the next time.
    return Needs(options, whole, at_once, calls=1 if share and most_gpus > 1 else 0)


def _startable(book: Book, left: list[Cell], running: int, most: int) -> list[Cell]:
    """Return the cells to start now; one waits while another trains a first task that both need."""
    found: list[Cell] = []
    busy = {name for cell in book.running for name in _shared(book, cell)}
    for cell in left:
        if running + len(found) >= most:
            break
        needed = _shared(book, cell)
        if not busy & needed:
            found.append(cell)
            busy |= needed
    return found


def _shared(book: Book, cell: Cell) -> set[str]:
    """Name the trainings of first tasks that a cell does for others too, if they aren't done.

    One that is on file counts as done; if it can't be used here, each cell trains its own.
    """
    names = set()
    first = book.work.first_state(cell)
    if first is not None and not first.exists():
        names.add(cell.first_hash)
    if cell.trained_hash is not None and any(
        other.trained_hash == cell.trained_hash for other in book.others(cell)
    ):
        folder = book.work.runs / "shared"
        if not list(folder.glob(f"seed{cell.seed}-{cell.trained_hash[:8]}-*.pt")):
            names.add(cell.trained_hash)
    return names


def _result(ray: Any, reference: Any, name: str, view: View) -> records.Record | Failure:
    try:
        result: records.Record | Failure = ray.get(reference)
    except ray.exceptions.RayError as error:
        text = f"{type(error).__name__}: its process died {RETRIES + 1} times"
        if not isinstance(error, ray.exceptions.RaySystemError | ray.exceptions.WorkerCrashedError):
            text = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
        view.announce(name, {"event": "failed", "error": text})  # it could not say so itself
        return Failure(text)
    return result


def _cancel(ray: Any, references: list[Any]) -> None:
    """Let running cells save and stop, as by Ctrl-C."""
    for reference in references:
        ray.cancel(reference, force=False)
    end = time.monotonic() + PATIENCE
    while references and time.monotonic() < end:
        _, references = ray.wait(references, timeout=LOOK_EVERY)


class _Tail:
    """Reads what is added to a cell's log, which its process writes wherever that runs."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "log.jsonl"
        self.place = self.path.stat().st_size if self.path.exists() else 0

    def read(self) -> list[Event]:
        """Return the new events, each of a whole line."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.place)
                new = file.read()
        except OSError:
            return []
        whole = new[: new.rfind(b"\n") + 1]
        self.place += len(whole)
        found: list[Event] = []
        for line in whole.splitlines():
            with suppress(ValueError):  # cut by a process that was killed
                found.append(json.loads(line))
        return found


def _run(
    cell: Cell, others: list[Cell], parallel: Parallel, needs: Needs, work: Work
) -> records.Record | Failure:
    """Run a cell in a process of Ray's."""
    here = git_state()
    if here["commit"] != work.git["commit"]:
        return Failure(
            f"the code on {socket.gethostname()} is that of commit {here['commit']}, and here of "
            f"{work.git['commit']}; all machines need the same checkout"
        )
    work = replace(work, git={**work.git, "dirty": work.git["dirty"] or here["dirty"]})
    tune()  # first of all, as in a process of one's own
    torch.set_num_threads(cell.experiment.threads or needs.threads)
    device = pick_device(parallel.device)
    images = _images(cell.experiment, parallel.data, device, parallel.test)
    stop = Stop()
    # A cell that waits for its candidates gives its cores to them, but would keep its GPU.
    candidates = None if needs.options["num_gpus"] else RayExecutor(needs.options)
    with stop.listening():
        try:
            return run_one(cell, others, work, images, device, _log_alone, stop, candidates)
        except Terminated:  # the machine goes, not the user: Ray runs it again elsewhere
            os._exit(1)


def _log_alone(_cell: str, _event: Event) -> None:
    """Show nothing: the runner reads the log."""


@cache
def _images(experiment: Experiment, data: Path | None, device: torch.device, test: bool) -> Any:
    return experiment.load(data, device, test=test)


class RayExecutor(Executor):
    """Trains the candidates of a search as Ray tasks.

    Parameters
    ----------
    options
        What each of them asks Ray for.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    def map(  # type: ignore[override]  # the one way in which a search calls it
        self, function: Callable[[Any], Any], grid: Any
    ) -> Iterator[Any]:
        """Return each candidate's result, in order."""
        import ray

        task = ray.remote(max_retries=RETRIES, **self.options)(_train)
        shared = ray.put(function)
        for reference in [task.remote(shared, torch.get_num_threads(), c) for c in grid]:
            yield ray.get(reference)


def _train(function: Callable[[Any], Any], threads: int, candidate: Any) -> Any:
    tune()
    torch.set_num_threads(threads)
    return function(candidate)
