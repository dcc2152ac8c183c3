"""The files that a cell saves: after each task, within the next one, and a search's candidates."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import records
from benchmarks.errors import UserError
from benchmarks.locks import claimed
from benchmarks.resume import FORMAT, State, load_state, save_state

if TYPE_CHECKING:
    from benchmarks.cell import Cell

STATE, TRAINING, CANDIDATES = "state.pt", "training.pt", "task*-*.pt"
"""Files in the cell's folder: the state after the last learnt task, and within the next one; and
the candidates of a search that have been trained."""


class States:
    """What a cell saves and goes on from.

    Parameters
    ----------
    cell
        Whose states they are.
    folder
        The cell's own.
    device
        Where it trains.
    announce
        Told when a state can't be saved.
    first
        File of the state after the first task, for all cells with the same `Cell.first_hash`.
    """

    def __init__(
        self,
        cell: Cell,
        folder: Path,
        device: torch.device,
        announce: Callable[[dict[str, Any]], None],
        first: Path | None = None,
    ) -> None:
        self.path, self.training, self.first = folder / STATE, folder / TRAINING, first
        self.ignored: list[str] = []
        """What was found and is not used, and why."""
        self._announce = announce
        self._made: State = {
            "format": FORMAT,
            "hash": cell.hash,
            "config": cell.config,
            "device": device.type,
        }
        self._made_first = self._made | {"hash": cell.first_hash, "config": cell.first_config}
        self._unsaved: State | None = None
        for file in (self.path, self.training):
            records.remove_leftovers(file)

    def read(self) -> tuple[State | None, State | None]:
        """Return the state after the last learnt task and that within the next one, if any.

        Raises
        ------
        UserError
            If one was saved on another kind of device, whose numbers differ.
        """
        state = self._read(self.path, self._made)
        if state is None and self.first is not None:
            state = self._read(self.first, self._made_first)
        within = self._read(self.training, self._made)
        learnt = 0 if state is None else len(state["course"]["seconds"])
        if within is not None and within["task"] != learnt:
            within = None  # of a task that has been learnt since
        return state, within

    def write(self, state: State) -> bool:
        """Save the state after a task, in place of that within it; return whether it's saved.

        If the disk is full it is kept, and saved before the next state within a task, which would
        be of no use without it.
        """
        state = self._made | state
        if self.first is not None and len(state["course"]["seconds"]) == 1:
            self._write(self.first, state | self._made_first)
        if self._write(self.path, state):
            self._unsaved = None
            self.training.unlink(missing_ok=True)
            return True
        self._unsaved = copy.deepcopy(state)  # the network moves on
        return False

    def write_within(self, state: State) -> None:
        """Save the state within a task."""
        if self._unsaved is not None and self._write(self.path, self._unsaved):
            self._unsaved = None
        self._write(self.training, self._made | state)

    def _write(self, path: Path, state: State) -> bool:
        try:
            save_state(path, state)
        except UserError as error:  # a full disk must not end what trains
            text = f"{error} The training goes on, not saved."
            self._announce({"event": "warning", "text": text})
            return False
        return True

    def _read(self, path: Path, made: State) -> State | None:
        """Return the state in a file; None if there is none, or one that can't be used."""
        if not path.exists():
            return None
        try:
            state = load_state(path, made["hash"])
            # A default that has changed since is in no hash.
            if wrong := records.disagreements(state["config"], made["config"]):
                raise ValueError(f"it was trained with other settings ({'; '.join(wrong)})")
        except ValueError as error:
            self.ignored.append(f"{path} is not used, what it holds is trained again: {error}")
            return None
        if state["device"] != made["device"]:  # it may hold days of work
            raise UserError(
                f"{path} was saved on {state['device']}, and this is {made['device']}, which "
                f"computes other numbers. Go on there (--device {state['device']}), or delete it "
                "to begin anew."
            )
        return state


def saved_files(folder: Path) -> list[Path]:
    """Return what is saved of a cell."""
    return [path for name in (STATE, TRAINING, CANDIDATES) for path in folder.glob(name)]


def forget(folder: Path, before: float = math.inf) -> None:
    """Delete what is saved of a cell, as far as it is older than `before` (seconds since 1970)."""
    for path in saved_files(folder):
        if path.stat().st_mtime <= before:
            path.unlink(missing_ok=True)


def sweep(folder: Path, before: float = math.inf) -> None:
    """Do the same for a recorded cell that won't be run: its process may have died in between."""
    if saved_files(folder):
        with claimed(folder) as mine:
            if mine:
                forget(folder, before)
