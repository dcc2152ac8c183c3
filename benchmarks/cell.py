"""A cell: one experiment, method and seed. It trains, evaluates, and returns a record."""

from __future__ import annotations

import copy
import hashlib
import json
import platform
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin

from benchmarks import records
from benchmarks.experiment import Experiment, canonical, changed, derive, digest
from benchmarks.learners import Learner, Settings, Setup
from benchmarks.methods import Method
from benchmarks.precision import bf16_kernels

if TYPE_CHECKING:
    from benchmarks.shared import SharedTrials
from clnp import LogitDrift

if TYPE_CHECKING:
    from benchmarks.data import Images

Listener = Callable[[dict[str, Any]], None]
Matrix = list[list[float | None]]

STATE = "state.pt"
FORMAT = 2
"""Of the resume state; raised when its contents change."""


@dataclass(frozen=True)
class Cell:
    """One experiment, method and seed on known data; its hash names what can change its result."""

    experiment: Experiment
    method: Method[Any]
    seed: int
    fingerprint: str

    @cached_property
    def settings(self) -> Settings:
        """The method's settings in this experiment."""
        settings: Settings = self.method.settings_for(self.experiment)
        return settings

    @cached_property
    def hash(self) -> str:
        """SHA-256 of everything that can change the result.

        Of fields with a default only those with another value count, so that a new field leaves
        the names of old cells alone. Paths, devices and W&B do not count.
        """
        return digest(self._named(changed(self.settings)))

    @cached_property
    def first_hash(self) -> str:
        """SHA-256 of everything that can change what the first task learns.

        Cells that differ in the method's `later` settings alone have it in common.
        """
        settings = changed(self.settings)
        first = {name: settings[name] for name in settings if name not in self.method.later}
        return digest({**self._named(first), "learnt": 1})

    @cached_property
    def trained_hash(self) -> str | None:
        """SHA-256 of everything that can change the first task's training, before what follows it.

        None if the method can't share that with others.
        """
        training = self.settings.first_training()
        if training is None:
            return None
        named = self._named({}) | {"method": training.pop("kind"), "settings": training}
        named["experiment"].pop("settings", None)  # of methods; they are in
        return digest(named)

    def _named(self, settings: dict[str, Any]) -> dict[str, Any]:
        return {
            "experiment": {"preset": self.experiment.preset, **changed(self.experiment)},
            "method": self.method.name,
            "revision": self.method.revision,
            "settings": settings,
            "seed": self.seed,
            "data": {self.experiment.dataset: self.fingerprint},
        }

    @cached_property
    def config(self) -> dict[str, Any]:
        """Every setting, as JSON values."""
        config: dict[str, Any] = json.loads(
            canonical(
                {
                    "experiment": self.experiment.config(),
                    "method": asdict(self.settings),
                    "revision": self.method.revision,
                    "data": {self.experiment.dataset: self.fingerprint},
                }
            )
        )
        return config

    @property
    def name(self) -> str:
        """For people, such as ``pmnist clnp seed 0``."""
        return f"{self.experiment.name} {self.method.name} seed {self.seed}"

    def record_path(self, folder: Path) -> Path:
        """Where the record belongs."""
        return records.path_of(folder, self.experiment.name, self.method.name, self.seed, self.hash)

    def run_dir(self, folder: Path) -> Path:
        """Where the resume state and the logs belong."""
        return self.record_path(folder).with_suffix("")


class Monitor(SupervisedPlugin):
    """Announce each epoch: mean training loss, and the validation accuracy if it is measured.

    The loss is summed on its device and read once an epoch, so that no step waits for it.

    Raises
    ------
    FloatingPointError
        At the end of the epoch in which the loss was no longer finite.
    """

    def __init__(self, announce: Listener) -> None:
        super().__init__()
        self.announce = announce
        self.learner: Learner | None = None
        self._sum: torch.Tensor | float = 0.0
        self._steps = 0
        self._started = 0.0

    def __deepcopy__(self, memo: dict[int, Any]) -> Monitor:
        """Watch a candidate of a search: the same listener, the candidate's own learner."""
        watching = Monitor(self.announce)
        memo[id(self)] = watching
        watching.learner = copy.deepcopy(self.learner, memo)
        return watching

    def before_training_epoch(self, _strategy: Any, **_: Any) -> None:
        """Begin a new sum."""
        self._sum, self._steps, self._started = 0.0, 0, time.perf_counter()

    def after_training_iteration(self, strategy: Any, **_: Any) -> None:
        """Add the loss of the batch."""
        self._sum = self._sum + strategy.loss.detach()
        self._steps += 1

    def after_training_epoch(self, strategy: Any, **_: Any) -> None:
        """Tell the epoch's values."""
        # logging(): an experience in training hides its index.
        task = strategy.experience.logging().current_experience
        epoch = strategy.clock.train_exp_epochs
        loss = float(self._sum) / max(self._steps, 1)
        if not torch.isfinite(torch.tensor(loss)):
            raise FloatingPointError(f"The loss is {loss} in task {task}, epoch {epoch}.")
        measured = self.learner.validation_accuracy() if self.learner else []
        self.announce(
            {
                "event": "epoch",
                "task": task,
                "epoch": epoch,
                "epochs": strategy.train_epochs,
                "loss": loss,
                "validation": measured[-1] if measured else None,
                "candidate": self.learner.candidate() if self.learner else None,
                "seconds": time.perf_counter() - self._started,
            }
        )


def environment(device: torch.device) -> dict[str, Any]:
    """Return what a result may depend on besides its config: versions, hardware, threads."""
    import avalanche
    import numpy

    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        # platform.processor() is empty or just the architecture on Linux.
        cpuinfo = Path("/proc/cpuinfo")
        text = cpuinfo.read_text() if cpuinfo.exists() else ""
        found = re.search(r"model name\s*: (.*)", text)
        hardware = found[1] if found else platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "avalanche": avalanche.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "hardware": hardware,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "bf16": bf16_kernels(device),
    }


def measure(strategy: Any, stream: Any, learnt: int) -> list[float | None]:
    """Evaluate the learnt tasks of a stream.

    Returns
    -------
    list of float or None
        The accuracy on each experience as a fraction; None for those not learnt yet.
    """
    row: list[float | None] = [None] * len(stream)
    if learnt == 0:
        return row
    strategy.evaluator.reset_last_metrics()
    values = strategy.eval(stream[:learnt])
    for key, value in values.items():
        if found := re.fullmatch(r"Top1_Acc_Exp/.*/Exp(\d+)", key):
            row[int(found[1])] = float(value)
    return row


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a resume state, after the SHA-256 of its bytes: all of it or nothing."""
    buffer = BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    records.write_atomically(path, hashlib.sha256(data).digest() + data)


def load_state(path: Path, hash_: str) -> dict[str, Any]:
    """Return a resume state; nothing in it is unpickled but tensors, numbers, lists and dicts.

    Raises
    ------
    ValueError
        If it is damaged or of another cell.
    """
    content = path.read_bytes()
    # torch.load notices a cut file, but not a flipped bit.
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        raise ValueError("it is damaged")
    state: dict[str, Any] = torch.load(BytesIO(content[32:]), map_location="cpu", weights_only=True)
    if state.get("format") != FORMAT:
        raise ValueError("it was written by another version of the code")
    if state["hash"] != hash_:
        raise ValueError("it belongs to another cell")
    return state


def run(
    cell: Cell,
    images: Images,
    device: torch.device,
    folder: Path,
    git: dict[str, Any],
    announce: Listener,
    first: Path | None = None,
    shared: SharedTrials | None = None,
) -> records.Record:
    """Train and evaluate a cell, going on from its saved state if there is one.

    The state is saved after every task. A task's random numbers depend on (seed, task) alone, and
    each task starts with a fresh optimizer, so that a resumed cell equals an uninterrupted one.
    Images that were loaded without test data give a record without test accuracy.

    Parameters
    ----------
    cell
        What to run.
    images
        The experiment's data, on `device`.
    device
        Where to train.
    folder
        The cell's own folder for its state; made if need be.
    git
        Commit and cleanness of the code that runs.
    announce
        Called with each event: start, epoch, task, end.
    first
        File of the state after the first task, for all cells with the same `Cell.first_hash`: a
        cell without a state of its own starts from it, or writes it. None: each trains its own.
    shared
        Trains the first task of cells with the same `Cell.trained_hash`; see `benchmarks.shared`.

    Returns
    -------
    dict
        The record, to be written by the caller.
    """
    started = time.perf_counter()
    scenario = cell.experiment.scenario(images, cell.seed)
    # Without test images (tuning) there is no test stream, and drift is seen on validation data.
    kinds = {"validation": "valid", "test": "test"}
    streams = {n: scenario.streams[k] for n, k in kinds.items() if k in scenario.streams}
    drift = LogitDrift("test" if "test" in streams else "valid")
    monitor = Monitor(announce)
    with warnings.catch_warnings():
        # The events are the log; Avalanche's own loggers would run in every step.
        warnings.filterwarnings("ignore", message="No loggers specified")
        evaluator = EvaluationPlugin(
            accuracy_metrics(experience=True), drift, loggers=[], collect_all=False
        )
    learner: Learner = cell.method.build(
        Setup(cell.experiment, scenario, cell.seed, device, evaluator, [monitor], shared),
        cell.settings,
    )
    monitor.learner = learner
    accuracy: dict[str, Matrix] = {name: [] for name in streams}
    seconds: list[float] = []
    train_seconds = 0.0

    path, ignored = folder / STATE, None
    starts = {path: cell.hash} | ({} if first is None else {first: cell.first_hash})
    for start, hash_ in starts.items():
        if not start.exists():
            continue
        try:
            state = load_state(start, hash_)
        except ValueError as error:
            ignored = f"{start} is not used, what it holds is trained again: {error}"
        else:
            learner.restore(state["learner"])
            drift.load_state_dict(state["drift"])
            accuracy, seconds, train_seconds = (
                state["accuracy"],
                state["seconds"],
                state["train_seconds"],
            )
            # A task reseeds what it draws; this is for a method that draws between tasks.
            torch.set_rng_state(state["rng"])
            git = {**git, "dirty": git["dirty"] or state["git"]["dirty"]}
            break
    announce(
        {
            "event": "start",
            "cell": cell.name,
            "hash": cell.hash,
            "config": cell.config,
            "tasks": cell.experiment.tasks,
            "learnt": len(seconds),
            "ignored": ignored,
        }
    )

    before = sum(seconds)
    for task in range(len(seconds), cell.experiment.tasks):
        began = time.perf_counter()
        RNGManager.set_random_seeds(derive(cell.seed, "noise", task))
        learner.train(scenario.streams["train"][task])
        if shared is not None and task == 0:
            # A training that another cell has paid for counts in each, as if each were alone.
            began -= shared.saved
            started -= shared.saved
            git = {**git, "dirty": git["dirty"] or shared.dirty}
        train_seconds += time.perf_counter() - began
        for name, stream in streams.items():
            accuracy[name].append(measure(learner.strategy, stream, learner.learnt(task + 1)))
        seconds.append(time.perf_counter() - began)
        state = {
            "format": FORMAT,
            "hash": cell.hash,
            "learner": learner.state(),
            "drift": drift.state_dict(),
            "accuracy": accuracy,
            "seconds": seconds,
            "train_seconds": train_seconds,
            "rng": torch.get_rng_state(),
            "git": git,
        }
        save_state(path, state)
        if task == 0 and first is not None:
            save_state(first, state | {"hash": cell.first_hash})
        announce(
            {
                "event": "task",
                "task": task,
                "accuracy": {name: matrix[-1] for name, matrix in accuracy.items()},
                "capacity": [row for row in learner.capacity() if row["task"] == task],
                "sufficiency": [row for row in learner.sufficiency() if row["task"] == task],
                "reused_ablation": next(
                    (entry.get("reused_ablation") for entry in learner.history()[task:]), None
                ),
                "seconds": seconds[-1],
            }
        )

    # A method that learns all at once is never seen to drift.
    drifts = drift.drift() if learner.learnt(1) else {}
    if "validation" not in accuracy:
        accuracy["validation"] = [[None] * len(matrix) for matrix in accuracy["test"]]
    record = {
        "experiment": cell.experiment.name,
        "method": cell.method.name,
        "seed": cell.seed,
        "hash": cell.hash,
        "config": cell.config,
        "accuracy": accuracy,
        "capacity": learner.capacity(),
        "sufficiency": learner.sufficiency(),
        "logit_drift": [drifts.get(task) for task in range(cell.experiment.tasks)],
        "parameters": learner.parameters(),
        "task_id_at_test": cell.method.told_task(cell.experiment),
        "seconds": {
            "train": train_seconds,
            "total": before + time.perf_counter() - started,
            "tasks": seconds,
        },
        "environment": environment(device),
        "git": git,
        "history": learner.history(),
        "search": learner.search(),
    }
    announce({"event": "end", **{key: record[key] for key in ("accuracy", "logit_drift")}})
    return record
