"""A cell: one experiment, method and seed. It trains, evaluates, and returns a record."""

from __future__ import annotations

import copy
import json
import math
import platform
import re
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field
from functools import cached_property
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
from benchmarks.resume import SAVE_EVERY, Saver, Stop
from benchmarks.shared import SharedTrials
from benchmarks.states import States
from clnp import LogitDrift

if TYPE_CHECKING:
    from benchmarks.data import Images

Listener = Callable[[dict[str, Any]], None]
Matrix = list[list[float | None]]


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

    @property
    def first_config(self) -> dict[str, Any]:
        """The settings in `config` that can change what the first task learns."""
        method = self.config["method"]
        return self.config | {
            "method": {name: method[name] for name in method if name not in self.method.later}
        }

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


def _unheard(_event: dict[str, Any]) -> None:
    """Hear what happens in another process."""


class Monitor(SupervisedPlugin):
    """Announce each epoch: mean training loss, and the validation accuracy if it is measured.

    Losses stay on their device and are read once an epoch, so that no step waits for them.

    Raises
    ------
    FloatingPointError
        At the end of the epoch in which the loss was no longer finite.
    """

    def __init__(self, announce: Listener) -> None:
        super().__init__()
        self.announce = announce
        self.learner: Learner | None = None
        self._losses: list[torch.Tensor] = []
        self._earlier = torch.zeros(0)  # of an interrupted epoch, before it went on
        self._started = 0.0

    def __deepcopy__(self, memo: dict[int, Any]) -> Monitor:
        """Watch a candidate of a search: the same listener, the candidate's own learner."""
        watching = Monitor(self.announce)
        memo[id(self)] = watching
        watching.learner = copy.deepcopy(self.learner, memo)
        return watching

    def __getstate__(self) -> dict[str, Any]:
        """Leave the listener behind when a candidate trains in another process."""
        return vars(self) | {"announce": _unheard}

    def before_training_epoch(self, _strategy: Any, **_: Any) -> None:
        """Begin a new epoch."""
        self._losses, self._earlier = [], torch.zeros(0)
        self._started = time.perf_counter()

    def after_training_iteration(self, strategy: Any, **_: Any) -> None:
        """Keep the loss of the batch."""
        self._losses.append(strategy.loss.detach())

    def training_state(self) -> dict[str, Any]:
        """Return the epoch's losses so far."""
        return {"losses": self._epoch_losses()}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Go on from `training_state`."""
        self._earlier = state["losses"]

    def _epoch_losses(self) -> torch.Tensor:
        """Return the (steps,) losses of the epoch, on the CPU."""
        new = torch.stack(self._losses).flatten().cpu() if self._losses else torch.zeros(0)
        return torch.cat([self._earlier, new])

    def after_training_epoch(self, strategy: Any, **_: Any) -> None:
        """Tell the epoch's values."""
        # logging(): an experience in training hides its index.
        task = strategy.experience.logging().current_experience
        epoch = strategy.clock.train_exp_epochs
        losses = self._epoch_losses()
        if len(wrong := (~losses.isfinite()).nonzero()):
            step = int(wrong[0])
            raise FloatingPointError(
                f"The loss is {float(losses[step])} in task {task}, epoch {epoch}, step {step} "
                "(counted from 0): try a lower learning rate."
            )
        loss = float(losses.double().mean())
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
        "torch": str(torch.__version__),  # its own class is no plain data for a state
        "avalanche": avalanche.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "hardware": hardware,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "bf16": bf16_kernels(device),
        "deterministic": device.type == "cpu" or torch.are_deterministic_algorithms_enabled(),
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


@dataclass
class Course:
    """What has been measured so far in a cell."""

    git: dict[str, Any]
    accuracy: dict[str, Matrix]
    """By stream, R[i][j]."""
    seconds: list[float] = field(default_factory=list)
    """Of each task, evaluation included."""
    train_seconds: float = 0.0
    environment: dict[str, Any] = field(default_factory=dict)
    """See `environment`; ``earlier``: those with other rounding in which parts were trained."""

    @property
    def learnt(self) -> int:
        """How many tasks have been."""
        return len(self.seconds)


def _joined(git: dict[str, Any], *others: dict[str, Any]) -> dict[str, Any]:
    """Return the code that runs, and what other code has contributed before it."""
    commits = [c for other in others for c in (*other.get("earlier", ()), other["commit"])]
    earlier = [commit for commit in dict.fromkeys(commits) if commit != git["commit"]]
    dirty = git["dirty"] or any(other["dirty"] for other in others)
    return {**git, "dirty": dirty} | ({"earlier": earlier} if earlier else {})


ROUNDING = ("device", "hardware", "threads", "bf16", "torch")
"""What of an environment decides how sums are rounded, and so the last bits of logits."""


def _rounding(environment: dict[str, Any]) -> dict[str, Any]:
    return {key: environment[key] for key in ROUNDING}


def rounding(device: torch.device) -> dict[str, Any]:
    """Return what of the environment decides the bits of a training."""
    here = environment(device)
    return _rounding(here) | {"deterministic": here["deterministic"]}


def _moved(now: dict[str, Any], *before: dict[str, Any]) -> dict[str, Any]:
    """Return the environment that trains, and others in which parts were trained before."""
    found = [_rounding(each) for other in before for each in (*other.get("earlier", ()), other)]
    earlier = [f for i, f in enumerate(found) if f != _rounding(now) and f not in found[:i]]
    return {**now, "earlier": earlier} if earlier else now


def _other_rounding(earlier: list[dict[str, Any]], now: dict[str, Any]) -> str:
    """Say that a cell goes on where sums are rounded otherwise."""
    before = "; ".join(
        ", ".join(f"{key} {facts[key]}" for key in ROUNDING if facts[key] != now[key])
        for facts in earlier
    )
    here = [key for key in ROUNDING if any(facts[key] != now[key] for facts in earlier)]
    return (
        f"A part of this cell was trained with {before}; here it goes on with "
        f"{', '.join(f'{key} {now[key]}' for key in here)}, which rounds sums otherwise, so that "
        "the numbers are not those of one machine. Logits that had not changed there are compared "
        "with those here."
    )


def _record(
    cell: Cell,
    learner: Learner,
    course: Course,
    drift: LogitDrift,
    seconds: float,
) -> records.Record:
    """Put together what is known of a cell at its end, after so many seconds."""
    # A method that learns all at once is never seen to drift.
    drifts = drift.drift() if learner.learnt(1) else {}
    if lost := [task for task, change in drifts.items() if not math.isfinite(change)]:
        raise FloatingPointError(
            f"The logits of task {lost[0]} are no finite numbers any more: try a lower learning "
            "rate."
        )
    accuracy = course.accuracy
    if "validation" not in accuracy:
        accuracy["validation"] = [[None] * len(matrix) for matrix in accuracy["test"]]
    return {
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
            "train": course.train_seconds,
            "total": seconds,
            "tasks": course.seconds,
        },
        "environment": course.environment,
        "git": course.git,
        "history": learner.history(),
        "search": learner.search(),
    }


def run(
    cell: Cell,
    images: Images,
    device: torch.device,
    folder: Path,
    git: dict[str, Any],
    announce: Listener,
    first: Path | None = None,
    shared: SharedTrials | None = None,
    stop: Stop | None = None,
    save_every: float = SAVE_EVERY,
    candidates: Executor | None = None,
) -> records.Record:
    """Train and evaluate a cell, going on from its saved state if there is one.

    The state is saved after every task, and now and then within one; a task's random numbers depend
    on (seed, task) alone. A resumed cell equals an uninterrupted one, bit for bit on a CPU.
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
    stop
        Whose signals end the cell, saved.
    save_every
        Seconds of training after which the state within a task is saved.
    candidates
        Where the candidates of a search are trained; None: here.

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
    monitor, stop = Monitor(announce), stop or Stop()
    states = States(cell, folder, device, announce, first)
    state, within = states.read()
    course = (
        Course(git, {name: [] for name in streams}) if state is None else Course(**state["course"])
    )
    course.git = _joined(git, course.git, *([] if within is None else [within["git"]]))
    begun = [course.environment, {} if within is None else within.get("environment", {})]
    course.environment = _moved(environment(device), *(known for known in begun if known))
    if within is not None and (course.git != git or "earlier" in course.environment):
        # What has begun elsewhere is this cell's alone: its record names where, others' could not.
        shared = None
    if course.git["dirty"] and not git["dirty"]:
        states.ignored.append(f"{folder} was begun by changed code, and the record will say so")
    began = started
    trials: dict[int, SharedTrials] = {}
    here = rounding(device)

    def trials_of(task: int) -> SharedTrials:
        where, name = folder / f"task{task}.pt", f"{cell.hash} task {task}"
        return trials.setdefault(task, SharedTrials(where, name, git, here, candidates))

    def save_training(saved: dict[str, Any]) -> None:
        spent = time.perf_counter() - began
        facts = {"spent": spent, "git": course.git, "environment": course.environment}
        states.write_within(saved | facts)

    saver = Saver(save_training, within, stop, save_every)
    with warnings.catch_warnings():
        # The events are the log; Avalanche's own loggers would run in every step.
        warnings.filterwarnings("ignore", message="No loggers specified")
        evaluator = EvaluationPlugin(
            accuracy_metrics(experience=True), drift, loggers=[], collect_all=False
        )
    harness = (evaluator, [monitor], shared, trials_of, saver)
    learner: Learner = cell.method.build(
        Setup(cell.experiment, scenario, cell.seed, device, *harness), cell.settings
    )
    monitor.learner = learner
    if state is not None:
        learner.restore(state["learner"])
        drift.load_state_dict(state["drift"])
        if begun[0] and _rounding(begun[0]) != _rounding(course.environment):
            drift.rebase()
            stream = streams.get("test", streams.get("validation"))
            measure(learner.strategy, stream, learner.learnt(course.learnt))
        # A task reseeds what it draws; this is for a method that draws between tasks.
        torch.set_rng_state(state["rng"])
    announce(
        {
            "event": "start",
            "cell": cell.name,
            "hash": cell.hash,
            "config": cell.config,
            "tasks": cell.experiment.tasks,
            "learnt": course.learnt,
            "epoch": None if within is None else within["training"]["clock"]["train_exp_epochs"],
            "ignored": "; ".join(states.ignored) or None,
        }
    )
    if earlier := course.environment.get("earlier"):
        announce({"event": "warning", "text": _other_rounding(earlier, course.environment)})

    before = sum(course.seconds)
    for task in range(course.learnt, cell.experiment.tasks):
        spent = within["spent"] if within is not None and within["task"] == task else 0.0
        began = time.perf_counter() - spent
        RNGManager.set_random_seeds(derive(cell.seed, "noise", task))
        learner.train(scenario.streams["train"][task])
        # A training that another cell, or an interrupted run of this one, has paid for counts in
        # each, as if each were alone.
        found = [t for t in (shared if task == 0 else None, trials.get(task)) if t is not None]
        saved = max([spent, *(t.saved for t in found)])
        began -= saved - spent
        started -= saved
        course.train_seconds += time.perf_counter() - began
        for name, stream in streams.items():
            row = measure(learner.strategy, stream, learner.learnt(task + 1))
            course.accuracy[name].append(row)
        course.seconds.append(time.perf_counter() - began)
        state = {
            "learner": learner.state(),
            "drift": drift.state_dict(),
            "course": vars(course),
            "rng": torch.get_rng_state(),
        }
        if states.write(state) and task in trials:
            trials[task].forget()
        announce(
            {
                "event": "task",
                "task": task,
                "accuracy": {name: matrix[-1] for name, matrix in course.accuracy.items()},
                "capacity": [row for row in learner.capacity() if row["task"] == task],
                "sufficiency": [row for row in learner.sufficiency() if row["task"] == task],
                "reused_ablation": next(
                    (entry.get("reused_ablation") for entry in learner.history()[task:]), None
                ),
                "seconds": course.seconds[-1],
            }
        )

    record = _record(cell, learner, course, drift, before + time.perf_counter() - started)
    announce({"event": "end", **{key: record[key] for key in ("accuracy", "logit_drift")}})
    return record
