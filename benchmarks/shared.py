"""Trainings kept on file: those of a search, and a first task's for cells that share it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.errors import UserError
from benchmarks.records import remove_leftovers
from benchmarks.resume import FORMAT, load_state, save_state
from clnp.plugin import Outcome
from clnp.search import Trial


class SharedTrials(Executor):
    """An executor for `clnp.search` that trains a candidate unless its training is on file.

    Parameters
    ----------
    path
        Of the candidates' files, each of which has its number behind the stem.
    hash_
        Names the training; see `Cell.trained_hash`.
    git
        Commit and cleanness of the code; trainings of another commit are not used.
    rounding
        What the bits of a training depend on beside its code; see `benchmarks.cell.rounding`.
        Trainings elsewhere are not used: the record could not name them.
    executor
        Where candidates are trained that aren't on file; None: here, one after another.
    """

    def __init__(
        self,
        path: Path,
        hash_: str,
        git: dict[str, Any],
        rounding: dict[str, Any],
        executor: Executor | None = None,
    ) -> None:
        self.executor = executor
        self.path = path
        self.hash = hash_
        self.made = {"commit": git["commit"], **rounding}
        self.dirty = bool(git["dirty"])
        """Whether this code has uncommitted changes."""
        self.saved = 0.0
        """Seconds that the trainings found on file had taken."""

    def map(  # type: ignore[override]  # the one way in which a search calls it
        self, function: Callable[[Any], Trial], grid: Iterable[Any]
    ) -> Iterator[Trial]:
        """Return each candidate's trial, in order."""
        grid = list(grid)
        known = [self._known(candidate) for candidate in grid]
        missing = [c for c, trial in zip(grid, known, strict=True) if trial is None]
        fresh = iter((map if self.executor is None else self.executor.map)(function, missing))
        for candidate, trial in zip(grid, known, strict=True):
            if trial is not None:
                yield trial
                continue
            trial = next(fresh)
            if trial.outcome is not None:
                named = {"format": FORMAT, "hash": self.hash, "made": self.made}
                state = named | {"dirty": self.dirty, "trial": pack(trial)}
                with suppress(UserError):  # a full disk must not end what trains
                    save_state(self._file(candidate), state)
            yield trial

    def _file(self, candidate: Any) -> Path:
        return self.path.with_name(f"{self.path.stem}-{candidate.index}{self.path.suffix}")

    def _known(self, candidate: Any) -> Trial | None:
        """Return the trial that is on file, if it is and can be trusted."""
        try:
            state = load_state(self._file(candidate), self.hash)
            # What changed code has trained would spoil the record of a clean one.
            if state["made"] != self.made or (state["dirty"] and not self.dirty):
                return None
            trial = unpack(state["trial"])
        except (OSError, ValueError, KeyError):
            return None
        self.saved += trial.seconds
        return trial

    def files(self) -> list[Path]:
        """Return the files that are there."""
        return sorted(self.path.parent.glob(f"{self.path.stem}-*{self.path.suffix}"))

    def forget(self) -> None:
        """Delete the files."""
        for path in self.files():
            path.unlink(missing_ok=True)
            remove_leftovers(path)


def pack(trial: Trial) -> dict[str, Any]:
    """Return a trial as tensors, numbers, texts, lists and dicts."""
    state = {field.name: getattr(trial, field.name) for field in dataclasses.fields(trial)}
    assert trial.outcome is not None
    state["outcome"] = vars(trial.outcome) | {"tensors": list(trial.outcome.tensors)}
    return state


def unpack(state: dict[str, Any]) -> Trial:
    """Return the trial that was packed."""
    outcome = Outcome(**state["outcome"] | {"tensors": tuple(state["outcome"]["tensors"])})
    return Trial(**state | {"outcome": outcome})
