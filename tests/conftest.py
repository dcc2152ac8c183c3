"""What every test runs under: one thread, fixed seeds, no network, no W&B account."""

from __future__ import annotations

import os
import random
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

# Before torch, numpy or wandb are imported, and inherited by the programs that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MPLBACKEND"] = "Agg"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ.pop("WANDB_API_KEY", None)
os.environ["NETRC"] = os.devnull  # where W&B keeps the key of someone who is logged in

import hypothesis
import numpy as np
import pytest
import torch

# The examples of a run depend on the test alone, so that a failure is there again the next time.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
# Those of `nox -s fuzz` don't: a failure prints what brings it back.
hypothesis.settings.register_profile("fuzz", deadline=None, print_blob=True)
hypothesis.settings.load_profile("repeatable")

connect = socket.socket.connect


def connect_to_this_machine(self: socket.socket, address: object) -> None:
    """Connect as ever to a path or to the loopback address, and refuse anything else."""
    host = address[0] if isinstance(address, tuple) else None
    if host is not None and host not in ("127.0.0.1", "::1", "localhost"):
        raise OSError(f"a test tried to reach {host}: tests run without network")
    connect(self, address)


@pytest.fixture(autouse=True)
def repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test the same random numbers, and no network."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002, for libraries that draw from the global generator
    torch.manual_seed(0)
    monkeypatch.setattr(socket.socket, "connect", connect_to_this_machine)


class Steps:
    """Counts the steps of all trainings of cells, and lets SIGTERM come during one of them."""

    def __init__(self) -> None:
        self.count = 0
        self.stop: int | None = None
        self.between = False

    @contextmanager
    def stopping(self, step: int, between: bool = False) -> Iterator[None]:
        """Let the signal come during the step of that number, counted from 1.

        Or after the epoch that the step ends, while that is evaluated.
        """
        self.stop, self.between = step, between
        yield
        self.stop = None


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """Count the steps that a test trains."""
    from benchmarks.resume import Saver

    counted, after_step, after_epoch = Steps(), Saver.after_step, Saver.after_epoch

    def step(saver: Saver, strategy: object) -> None:
        counted.count += 1
        if counted.count == counted.stop and not counted.between:
            saver.stop.asked = signal.SIGTERM
        after_step(saver, strategy)

    def epoch(saver: Saver, strategy: object) -> None:
        if counted.count == counted.stop and counted.between:
            saver.stop.asked = signal.SIGTERM
        after_epoch(saver, strategy)

    monkeypatch.setattr(Saver, "after_step", step)
    monkeypatch.setattr(Saver, "after_epoch", epoch)
    return counted
