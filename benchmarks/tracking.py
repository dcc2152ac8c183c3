"""What happens in a cell, as events: a JSONL log, a view on the terminal, a mirror at W&B.

An event is a dict whose key ``event`` is start, epoch, task, warning, end or failed (see
`benchmarks.cell`).
It is announced once; each of the three here makes of it what it can show.
"""

from __future__ import annotations

import json
import netrc
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

Mode = Literal["auto", "online", "offline", "disabled"]
Event = dict[str, Any]

LINE_EVERY = 60.0
"""Seconds between two lines on epochs where there is no terminal."""


def percent(fraction: float) -> str:
    """Return an accuracy as people read it."""
    return f"{100 * fraction:.2f} %"


class View:
    """Progress of the grid: bars on a terminal, now and then a line elsewhere."""

    def __init__(self, cells: int, console: Console | None = None) -> None:
        self.console = console or Console()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._grid = self.progress.add_task("cells", total=cells, detail=f"0/{cells}")
        self._cells = cells
        self._shown: dict[str, tuple[TaskID, int]] = {}
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        """Show the bars."""
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the bars down."""
        self.progress.stop()

    def count(self) -> None:
        """Count a cell that has ended, or isn't run after all."""
        done = self.progress.tasks[0].completed + 1
        self.progress.update(self._grid, completed=done, detail=f"{done:.0f}/{self._cells}")

    def line(self, text: str) -> None:
        """Print a line above the bars."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._last_line = time.monotonic()

    def announce(self, cell: str, event: Event) -> None:
        """Show an event of a cell, one of those that may run at once."""
        bar, tasks = self._shown.get(cell, (None, 0))
        match event["event"]:
            case "start":
                self._remove(cell)  # one that stopped without an end
                tasks = event["tasks"]
                if event["ignored"]:
                    self.line(f"{cell}: {event['ignored']}")
                if event["learnt"] or event["epoch"] is not None:
                    where = f"after task {event['learnt']}/{tasks}"
                    if event["epoch"] is not None:
                        where = f"in task {event['learnt'] + 1}/{tasks}, epoch {event['epoch'] + 1}"
                    self.line(f"{cell}: going on {where}")
                bar = self.progress.add_task(
                    cell, total=tasks, completed=event["learnt"], detail=""
                )
                self._shown[cell] = (bar, tasks)
            case "epoch":
                detail = _epoch(event, tasks)
                if bar is not None:
                    done = event["task"] + (event["epoch"] + 1) / event["epochs"]
                    self.progress.update(bar, completed=done, detail=detail)
                silent = time.monotonic() - self._last_line
                if not self.console.is_terminal and silent > LINE_EVERY:
                    self.line(f"{cell}: {detail}")
            case "task":
                kind = "test" if "test" in event["accuracy"] else "validation"
                seen = [value for value in event["accuracy"][kind] if value is not None]
                if seen:  # else nothing has been learnt yet
                    self.line(
                        f"{cell}: task {event['task'] + 1}/{tasks} in "
                        f"{event['seconds']:.0f} s, {kind} {percent(seen[-1])}, "
                        f"mean of the learnt {percent(sum(seen) / len(seen))}"
                    )
            case "warning":
                self.line(f"{cell}: {event['text']}")
            case "end" | "failed":
                self._remove(cell)
                self.count()
                if event["event"] == "failed":
                    self.line(f"{cell} failed: {event['error']}")

    def _remove(self, cell: str) -> None:
        if cell in self._shown:
            self.progress.remove_task(self._shown.pop(cell)[0])


def _epoch(event: Event, tasks: int) -> str:
    """Return how far an epoch's event says that a cell has come."""
    candidate = event["candidate"]
    detail = (
        f"task {event['task'] + 1}/{tasks} "
        f"{'' if candidate is None else f'candidate {candidate} '}"
        f"epoch {event['epoch'] + 1}/{event['epochs']} "
        f"loss {event['loss']:.4f}"
    )
    if event["validation"] is not None:
        detail += f" validation {percent(event['validation'])}"
    return detail


class Log:
    """The JSONL file of a cell: an event a line, each with the time in seconds since 1970.

    A disk that is full is told once, and training goes on.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # Unbuffered: what could not be written is not tried again later.
        self._file = (folder / "log.jsonl").open("a+b", buffering=0)
        self._off = False
        if self._file.tell():  # a process that was killed may have left half a line
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._write(b"\n")

    def announce(self, event: Event) -> None:
        """Append an event."""
        self._write((json.dumps({"time": round(time.time(), 3), **event}) + "\n").encode())

    def _write(self, line: bytes) -> None:
        if self._off:
            return
        try:
            self._file.write(line)
        except OSError as error:
            self._off = True
            print(f"{self._file.name} is not written on: {error.strerror}.", file=sys.stderr)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def logged_in() -> bool:
    """Return whether this machine can log on to W&B: by a variable's key or a netrc entry."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _fresh(event: Event) -> str:
    """Return an id for a new run of a cell."""
    return f"{event['hash'][:8]}-{uuid.uuid4().hex[:8]}"


INIT_TIMEOUT = 30.0
"""Seconds in which W&B's server must answer."""


class Mirror:
    """The cell's run at Weights & Biases. Whatever fails there is told once, and training goes on.

    A server that isn't to be reached is asked once a process: this run and those after it are kept
    on disk, to be uploaded later.

    Parameters
    ----------
    folder
        The cell's folder; W&B writes into its ``wandb`` folder.
    mode
        ``auto``: WANDB_MODE if it is set, else online when logged in, else offline.
    """

    unreachable = False

    def __init__(self, folder: Path, mode: Mode) -> None:
        self.folder = folder
        self.mode: Any = mode
        if mode == "auto":
            self.mode = os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
        if self.mode == "online" and not Mirror.unreachable and not logged_in():
            # In a terminal W&B would ask who we are, and wait for an answer for ever.
            Mirror.unreachable = True
            print("Not logged in to W&B (wandb login): runs are kept on disk.", file=sys.stderr)
        if self.mode == "online" and Mirror.unreachable:
            self.mode = "offline"
        self._run: Any = None
        self._off = self.mode == "disabled"

    def announce(self, event: Event) -> None:
        """Mirror an event."""
        if self._off:
            return
        try:
            if event["event"] == "start":
                self._start(event)
            else:
                self._log(event)
        except Exception as error:  # W&B may fail in any way; the record does not depend on it
            self._give_up(error)

    def close(self, failed: bool = False) -> None:
        """End the run."""
        if self._run is None or self._off:
            return
        try:
            self._run.finish(exit_code=int(failed))
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._off = True
        print(f"W&B is off for this cell: {type(error).__name__}: {error}", file=sys.stderr)

    def _start(self, event: Event) -> None:
        # A resumed cell goes on in its run; a new start of the same cell is a new run.
        name = self.folder / "wandb-id"
        going_on = event["learnt"] or event["epoch"] is not None
        if not (going_on and name.exists()):
            name.write_text(_fresh(event))
        try:
            self._run = self._init(event, name.read_text())
        except Exception as error:
            if self.mode != "online":
                raise
            Mirror.unreachable, self.mode = True, "offline"
            print(
                f"W&B can't be reached, runs are kept on disk: {type(error).__name__}: {error}",
                file=sys.stderr,
            )
            name.write_text(_fresh(event))  # W&B takes the other one for in use
            self._run = self._init(event, name.read_text())

    def _init(self, event: Event, name: str) -> Any:
        import wandb

        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "clnp"),
            name=event["cell"],
            group=event["config"]["experiment"]["name"],
            id=name,
            resume="allow",
            config={**event["config"], "hash": event["hash"]},
            dir=self.folder,
            mode=self.mode,
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                init_timeout=INIT_TIMEOUT,
                finish_timeout=60,
            ),
        )

    def _log(self, event: Event) -> None:
        import wandb

        match event["event"]:
            case "epoch":
                keys = ("task", "candidate", "epoch", "loss", "validation", "seconds")
                values = {f"epoch/{key}": event[key] for key in keys if event[key] is not None}
                self._run.log(values)
            case "task":
                values = {"task": event["task"], "task/seconds": event["seconds"]}
                for stream, row in event["accuracy"].items():
                    for task, value in enumerate(row):
                        if value is not None:
                            values[f"{stream}/task {task}"] = value
                for row in event["capacity"]:
                    for key in ("used", "new", "reused", "free"):
                        values[f"capacity/{row['layer']}/{key}"] = row[key]
                for row in event["sufficiency"]:
                    for key in ("old_only", "new_only"):
                        if row[key] is not None:
                            values[f"sufficiency/{row['layer']}/{key}"] = row[key]
                for key, value in (event["reused_ablation"] or {}).items():
                    values[f"reused_ablation/{key}"] = value
                self._run.log(values)
            case "end":
                for stream, matrix in event["accuracy"].items():
                    table = wandb.Table(
                        columns=["after task", *(f"task {j}" for j in range(len(matrix)))],
                        data=[[i, *row] for i, row in enumerate(matrix)],
                    )
                    self._run.log({f"{stream}/matrix": table})
                    self._run.summary[f"{stream}/accuracy"] = matrix
                self._run.summary["logit_drift"] = event["logit_drift"]


def sync_command(folders: Iterable[Path]) -> str | None:
    """Return the command that uploads what cells have kept on disk; None if there is nothing.

    Parameters
    ----------
    folders
        The cells' folders.
    """
    runs = [run for folder in folders for run in folder.glob("wandb/offline-run-*")]
    # W&B leaves a mark beside what it has uploaded.
    waiting = [run for run in runs if not list(run.glob("*.wandb.synced"))]
    if not waiting:
        return None
    parents = sorted({run.parents[2] for run in waiting})
    return " ".join(["wandb sync", *(f"{parent}/*/wandb/offline-run-*" for parent in parents)])


class Tracker:
    """All that follows one cell.

    Parameters
    ----------
    cell
        Its name.
    folder
        The cell's folder, made if need be.
    mode
        See `Mirror`.
    show
        Takes the cell's name and each event, as `View.announce` does.
    """

    def __init__(
        self, cell: str, folder: Path, mode: Mode, show: Callable[[str, Event], None]
    ) -> None:
        self._cell = cell
        self._log = Log(folder)
        self._mirror = Mirror(folder, mode)
        self._show = show

    def announce(self, event: Event) -> None:
        """Pass an event on to the log, the view and the mirror."""
        self._log.announce(event)
        self._show(self._cell, event)
        self._mirror.announce(event)

    def close(self, failed: bool = False) -> None:
        """Close the log and end the mirror's run."""
        self._log.close()
        self._mirror.close(failed)
