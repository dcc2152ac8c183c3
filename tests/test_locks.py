"""Locks: one process a cell, and none left behind by the dead."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from benchmarks import locks
from benchmarks.cell import Cell
from benchmarks.data import load
from benchmarks.errors import UserError
from benchmarks.locks import claimed, held, named, owner
from benchmarks.methods import METHODS
from benchmarks.quickstart import Quickstart
from benchmarks.runner import ROOT, Work, run_cells
from benchmarks.states import STATE

TINY = Quickstart(tasks=2, epochs=1, method_epochs=False, hidden=(20, 20), validation=300)
GIT = {"commit": None, "dirty": True}


@contextmanager
def another_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a folder until it is told to end."""
    code = (
        "import sys; from pathlib import Path; from benchmarks.locks import claimed\n"
        "with claimed(Path(sys.argv[1])) as mine:\n"
        "    print(mine, flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_lock_is_held_once_and_released(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "cell"
    assert not held(folder)
    with claimed(folder) as mine:
        assert mine
        assert held(folder)
        assert owner(folder)["process"] == os.getpid()
        with claimed(folder) as again:
            assert not again
        assert held(folder)
    assert not held(folder)
    assert owner(folder) == {}
    with pytest.raises(KeyboardInterrupt), claimed(folder):
        raise KeyboardInterrupt
    assert not held(folder)


def test_another_process_is_named_and_its_death_frees_the_lock(tmp_path: Path) -> None:
    with another_process(tmp_path) as process:
        with claimed(tmp_path) as mine:
            assert not mine
        assert str(process.pid) in named(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with claimed(tmp_path) as mine:
            assert mine
            assert owner(tmp_path)["process"] == os.getpid()


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_an_unreadable_owner_is_another_process(tmp_path: Path, text: str) -> None:
    (tmp_path / locks.OWNER).write_text(text)
    assert named(tmp_path) == "another process"


def run(grid: list[Cell], folder: Path, **options: Any) -> tuple[int, list[str]]:
    kept: list[str] = []
    code = run_cells(
        *(grid, load("digits"), torch.device("cpu"), Work(folder, GIT)),
        lambda cell, record: kept.append(cell.method.name),
        **options,
    )
    return code, kept


def test_a_cell_that_runs_elsewhere_is_left_to_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fingerprint = load("digits").fingerprint
    grid = [Cell(TINY, METHODS[name], 0, fingerprint) for name in ("clnp", "finetune")]
    with another_process(grid[0].run_dir(tmp_path)) as process:
        assert run(grid, tmp_path) == (0, ["finetune"])
        told = capsys.readouterr().out
        assert f"1 of 2 cells run elsewhere:\n  {grid[0].name} (process {process.pid}" in told
    # As a process leaves it that dies between a record and what was saved for it.
    state = grid[1].run_dir(tmp_path) / STATE
    state.touch()
    assert run(grid, tmp_path, recorded=lambda c: c is grid[1]) == (0, ["clnp"])
    assert not state.exists()
    assert not any(held(cell.run_dir(tmp_path)) for cell in grid)


def test_a_method_is_tuned_by_one_process(tmp_path: Path) -> None:
    from benchmarks import tune

    asked = tune.request("si", Quickstart, [100], 1)
    assert asked.experiment.name != "quickstart"  # another number of tasks, the same result
    folder = tmp_path / "runs" / "tuning" / "quickstart" / "si"
    with another_process(folder), pytest.raises(UserError, match="being tuned already"):
        tune.run(asked, tmp_path / "tuning", tmp_path / "runs", None, torch.device("cpu"))


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"), claimed(tmp_path / "file" / "cell"):
        pass


def test_a_glance_does_not_hide_a_cell(tmp_path: Path) -> None:
    """Who looks whether a lock is held has it for a moment."""
    (tmp_path / locks.LOCK).touch()
    glance = FileLock(tmp_path / locks.LOCK, thread_local=False)
    glance.acquire()
    threading.Timer(0.05, glance.release).start()
    with claimed(tmp_path) as mine:
        assert mine


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unknown)
    with pytest.raises(UserError, match="has no locks"), claimed(tmp_path):
        pass
