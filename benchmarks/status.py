"""The grid as a table: what is recorded, running, failed, stopped or missing."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks import locks, records, runner
from benchmarks.cell import Cell
from benchmarks.errors import UserError
from benchmarks.states import STATE, TRAINING

Word = Literal["recorded", "stale", "running", "failed", "stopped", "missing"]


@dataclass(frozen=True)
class State:
    """Where a cell stands."""

    cell: Cell
    word: Word
    """stale: the record is damaged, or made under another meaning of a setting."""
    detail: str
    """The mean test accuracy; or who runs it, how far, until when; or what went wrong."""


def state(cell: Cell, places: runner.Places, now: float) -> State:
    """Return where a cell stands.

    Parameters
    ----------
    cell
        With its data's fingerprint.
    places
        Where records and the folders of unfinished cells are.
    now
        Seconds since 1970.
    """
    folder = cell.run_dir(places.runs)
    try:
        if runner.recorded(cell, places):
            record = records.read(cell.record_path(places.records))
            final = np.array(record["accuracy"]["test"][-1], dtype=np.float64)
            return State(cell, "recorded", f"{100 * np.nanmean(final):.2f} %")
    except UserError as error:
        return State(cell, "stale", str(error))
    events = _events(folder / "log.jsonl")
    if locks.held(folder):
        return State(cell, "running", f"{_since(folder)}{_progress(events, now)}")
    trace = folder / "traceback.txt"
    if trace.exists():
        lines = trace.read_text(errors="replace").strip().splitlines()
        return State(cell, "failed", f"{lines[-1] if lines else 'unknown'} (see {trace})")
    if any((folder / name).exists() for name in (STATE, TRAINING)):
        known = {"start": lambda e: e.get("learnt", 0), "task": lambda e: e.get("task", 0) + 1}
        learnt = max((known[e["event"]](e) for e in events if e["event"] in known), default=0)
        where = f"after task {learnt}"
        if (folder / TRAINING).exists():
            where = f"in task {learnt + 1}"
        return State(cell, "stopped", f"{where}; run it to go on")
    return State(cell, "missing", "")


def _since(folder: Path) -> str:
    since = locks.owner(folder).get("since")
    began = time.strftime("%d %b %H:%M", time.localtime(since)) if since else "unknown"
    return f"{locks.named(folder)} since {began}"


def _events(path: Path) -> list[dict[str, Any]]:
    """Return the events of the last start in a log; a line that is cut is left out."""
    found: list[dict[str, Any]] = []
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return found
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            found = [event] if event["event"] == "start" else [*found, event]
    return found


def _progress(events: Sequence[dict[str, Any]], now: float) -> str:
    """Return how far a running cell has come, and when it ends at its pace since its start."""
    started = next((event for event in events if event["event"] == "start"), None)
    epochs = [event for event in events if event["event"] == "epoch"]
    if started is None or not epochs:
        return ", no epoch yet"
    last, tasks = epochs[-1], started["tasks"]
    done = last["task"] + (last["epoch"] + 1) / last["epochs"]
    text = f", task {last['task'] + 1}/{tasks} epoch {last['epoch'] + 1}/{last['epochs']}"
    # Where it began: within a task if it went on there; joint training begins with the last task.
    begin = epochs[0]["task"] + (started.get("epoch") or 0) / last["epochs"]
    if done <= begin:  # another candidate of a search
        return text
    pace = (last["time"] - started["time"]) / (done - begin)
    end = max(last["time"] + pace * (tasks - done), now)
    return f"{text}, expected end {time.strftime('%d %b %H:%M', time.localtime(end))}"


def table(grid: Sequence[Cell], places: runner.Places) -> tuple[str, Counter[Word]]:
    """Return the states of a grid as text, a line a cell, and how many there are of each.

    Parameters
    ----------
    grid
        Of one experiment, with the data's fingerprint.
    places
        Where records and the folders of unfinished cells are.
    """
    now = time.time()
    states = [state(cell, places, now) for cell in grid]
    method = max(len(s.cell.method.name) for s in states)
    word = max(len(s.word) for s in states)
    lines = [
        f"{s.cell.method.name:{method}}  seed {s.cell.seed}  {s.word:{word}}  {s.detail}".rstrip()
        for s in states
    ]
    counts = Counter(s.word for s in states)
    total = ", ".join(f"{number} {word}" for word, number in counts.items())
    return "\n".join([f"{grid[0].experiment.name}: {total}", *lines]), counts
