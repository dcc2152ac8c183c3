"""Cells that are killed at random moments, and end as if they had not been.

`nox -s fuzz` kills at 100 moments. The processes are forked from this one, which has imported
Avalanche already; that takes seven seconds.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from benchmarks import resume
from benchmarks.quickstart import Quickstart
from benchmarks.runner import Places, plan, run_grid

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows can't fork")

MOMENTS = 100 if settings.get_current_profile_name() == "fuzz" else 20
KILLED = ("clnp", "ewc", "si", "superposition")
TINY = Quickstart(
    tasks=3,
    epochs=3,
    method_epochs=False,
    hidden=(40, 40),
    batch_size=128,
    validation=300,
    settings=("clnp.finetune_epochs=1", "ewc.samples=200"),
)
SAVE_EVERY = 0.05


def grid(method: str) -> list[Any]:
    changes = tuple(change for change in TINY.settings if change.startswith(f"{method}."))
    experiment = Quickstart(**{**vars(TINY), "settings": changes})
    return plan(experiment, [method], [0])


def start(method: str, folder: Path) -> int:
    """Run the cell in a process of its own; return its number."""
    sys.stdout.flush()
    if process := os.fork():
        return process
    code = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        places = Places(folder / "records", folder / "runs")
        cpu = torch.device("cpu")
        code = run_grid(grid(method), places, cpu, "disabled", save_every=SAVE_EVERY)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def finish(method: str, folder: Path) -> None:
    """Run the cell to its end."""
    _, status = os.waitpid(start(method, folder), 0)
    assert os.waitstatus_to_exitcode(status) == 0


def record_of(folder: Path) -> dict[str, Any]:
    """Return the one record, without times and their checksum."""
    (path,) = (folder / "records").rglob("*.json")
    record: dict[str, Any] = json.loads(path.read_text())
    return {key: value for key, value in record.items() if key not in ("seconds", "checksum")}


def begun(folder: Path) -> int:
    """Return how often the cell has begun to train."""
    logs = [path.read_bytes() for path in folder.rglob("log.jsonl")]
    return sum(log.count(b'"event": "start"') for log in logs)


def wait_for_training(process: int, folder: Path, times: int) -> None:
    """Wait until the cell has begun so often, or the process has ended."""
    how = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while begun(folder) < times and os.waitid(os.P_PID, process, how) is None:
        time.sleep(0.001)


def length(folder: Path) -> float:
    """Return the seconds that the cell's training took."""
    (log,) = folder.rglob("log.jsonl")
    times = [json.loads(line)["time"] for line in log.read_text().splitlines()]
    return float(times[-1] - times[0])


def killed_at_random(method: str, folder: Path, starts: int | None, last: float) -> bool:
    """Start the cell, kill it after a random part of `last`; tell whether it had not ended.

    The time counts from when the cell begins to train for that many times, or (None) from when its
    process starts.
    """
    process = start(method, folder)
    if starts is not None:
        wait_for_training(process, folder, starts)
    time.sleep(random.uniform(0, last))
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def test_what_is_killed_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "LEAST_RATIO", 2.0)  # a slow disk would hardly be asked
    whole, lasts = {}, {}
    for method in KILLED:
        finish(method, tmp_path / method)
        lasts[method] = length(tmp_path / method)
        whole[method] = record_of(tmp_path / method)
    killed = saved = 0
    for moment in range(MOMENTS):
        method = KILLED[moment % len(KILLED)]
        folder = tmp_path / str(moment)
        for again in range(1 + moment % 2):  # every other one is killed again as it goes on
            starts = 1 + again if moment % 5 else None
            caught = killed_at_random(method, folder, starts, lasts[method])
            if not caught and not again:  # the machine was busier when the length was taken
                lasts[method] = length(folder)
                shutil.rmtree(folder)
                caught = killed_at_random(method, folder, starts, lasts[method])
            killed += caught
            saved += bool(list(folder.rglob("training.pt")))
        finish(method, folder)
        assert record_of(folder) == whole[method], f"{method}, moment {moment}"
        left = [path.name for path in folder.rglob("*") if path.is_file()]
        assert not [name for name in left if name.endswith(("tmp", ".pt"))], left
    # The moments do fall into the training, and what is saved within a task is used.
    assert killed >= MOMENTS
    assert saved >= MOMENTS // 5
