"""The methods: their settings by experiment, and how each is built into a learner."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, get_args, get_type_hints

import pandas as pd
import torch
import tyro
from avalanche.benchmarks import CLScenario
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive
from torch import nn

from baselines.single_task import SingleTaskPlugin
from benchmarks.errors import UserError
from benchmarks.experiment import Experiment, derive
from benchmarks.scenarios import ResidentData
from clnp import CLNPPlugin, FineTune, search

State = dict[str, Any]


def pick(kind: str, name: str, known: Iterable[str]) -> str:
    """Return `name` if it is known.

    Raises
    ------
    UserError
        If not; it suggests the nearest one and lists them all.
    """
    names = sorted(known)
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UserError(f"There is no {kind} {name!r}.{hint} Known: {', '.join(names)}.")


# ---------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What every method has: Adam, its learning rate and schedule, and the epochs of a task."""

    lr: float = 0.001
    """Learning rate of Adam."""
    epochs: int | None = None
    """Epochs a task; None: the experiment's."""
    decay_from: float = 0.7
    """Share of a task's steps after which the learning rate falls linearly to 0."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, "lr", self.lr, "positive")
        _require(self.epochs is None or self.epochs >= 1, "epochs", self.epochs, "at least 1")
        _require(0 <= self.decay_from <= 1, "decay_from", self.decay_from, "within [0, 1]")


@dataclass(frozen=True)
class CLNPSettings(Settings):
    """CLNP's own settings; see clnp/README.md."""

    margin: float = 0.0005
    """The absolute drop of validation accuracy that a task's cut may cost, in [0, 1)."""
    l1: tuple[float, ...] = (1e-7, 1e-5, 1e-6)
    """L1 strength of each layer, in forward order; one number for all layers."""
    thresholds: Literal["per-layer", "shared"] = "per-layer"
    """Whether each layer has a threshold of activity of its own."""
    head_bias: Literal["shared", "per-task", "none"] = "shared"
    """Whether all tasks share the head's bias, each has its own, or there is none."""
    keep_epoch: Literal["last", "latest-within-margin"] = "last"
    """Which epoch's weights a task keeps; see `clnp.CLNPPlugin`."""
    finetune_epochs: int = 0
    """Epochs in which the surviving weights are retrained after the cut; 0: none."""
    finetune_lr: float = 1e-4
    """Learning rate of fine-tuning."""
    finetune_l1: tuple[float, ...] = ()
    """L1 strength of each layer while fine-tuning; none: as in training."""
    finetune_iterations: int = 1
    """How often to cut and fine-tune."""
    grid_l1: tuple[tuple[float, ...], ...] = ()
    """L1 strengths to try, each in the form of `l1`; none: `l1` alone."""
    grid_lr: tuple[float, ...] = ()
    """Learning rates to try; none: `lr` alone."""
    grid_tasks: Literal["first", "each"] = "first"
    """Whether the first task alone is searched for, and the others use what it chose, or each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("grid_l1", "grid_lr"):
            values = getattr(self, name)
            _require(len(set(values)) == len(values), name, values, "a list of different values")
        for alphas in self.grid_l1:
            _require(all(alpha >= 0 for alpha in alphas), "grid_l1", self.grid_l1, "not negative")
        _require(all(lr > 0 for lr in self.grid_lr), "grid_lr", self.grid_lr, "positive")
        _require(0 <= self.margin < 1, "margin", self.margin, "within [0, 1)")
        _require(all(alpha >= 0 for alpha in self.l1), "l1", self.l1, "not negative")
        _require(self.finetune_epochs >= 0, "finetune_epochs", self.finetune_epochs, "at least 0")
        _require(self.finetune_lr > 0, "finetune_lr", self.finetune_lr, "positive")
        positive = all(alpha >= 0 for alpha in self.finetune_l1)
        _require(positive, "finetune_l1", self.finetune_l1, "not negative")
        rounds = self.finetune_iterations
        _require(rounds >= 1, "finetune_iterations", rounds, "at least 1")

    @property
    def finetune(self) -> FineTune | None:
        """What is asked for of fine-tuning."""
        if self.finetune_epochs == 0:
            return None
        l1 = _alphas(self.finetune_l1) if self.finetune_l1 else None
        return FineTune(self.finetune_epochs, self.finetune_lr, l1, self.finetune_iterations)


def _alphas(values: tuple[float, ...]) -> float | tuple[float, ...]:
    """Return L1 strengths as the plugin takes them: one number for all layers, or one for each."""
    return values[0] if len(values) == 1 else values


def _require(true: bool, setting: str, value: object, must: str) -> None:
    if not true:
        raise UserError(f"The setting {setting} is {value}; it must be {must}.")


# ---------------------------------------------------------------------------------------------
# Learners
# ---------------------------------------------------------------------------------------------


class LinearDecay(SupervisedPlugin):
    """Keep the learning rate for a share of each task's steps, then lower it linearly to 0.

    Unlike LRSchedulerPlugin it needs no scheduler that knows the number of steps beforehand.
    """

    def __init__(self, decay_from: float) -> None:
        super().__init__()
        self.decay_from = decay_from
        self._base: list[float] = []
        self._steps = self._step = 0

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """Start the schedule anew."""
        groups = strategy.optimizer.param_groups
        self._base = [group["lr"] for group in groups]
        self._steps, self._step = strategy.train_epochs * len(strategy.dataloader), 0

    def before_update(self, strategy: Any, **_: Any) -> None:
        """Set the learning rate of the coming step."""
        done, self._step = self._step / self._steps, self._step + 1
        if done > self.decay_from:
            factor = (1 - done) / (1 - self.decay_from)
            for group, base in zip(strategy.optimizer.param_groups, self._base, strict=True):
                group["lr"] = base * factor

    def after_training_exp(self, strategy: Any, **_: Any) -> None:
        """Give the optimizer its own learning rate back."""
        for group, base in zip(strategy.optimizer.param_groups, self._base, strict=True):
            group["lr"] = base


@dataclass(frozen=True)
class Setup:
    """All that a method may need to build its learner for one cell."""

    experiment: Experiment
    scenario: CLScenario
    seed: int
    device: torch.device
    evaluator: EvaluationPlugin
    plugins: Sequence[SupervisedPlugin] = ()
    """The harness's own plugins; they run after the method's."""

    def epochs(self, settings: Settings) -> int:
        """Return the epochs of a task: the method's own if it has any and may use them."""
        if settings.epochs is not None and self.experiment.method_epochs:
            return settings.epochs
        return self.experiment.epochs

    def model(self) -> nn.Module:
        """Return the network with the seed's initial weights, the same for every method."""
        with torch.random.fork_rng():
            torch.manual_seed(derive(self.seed, "weights"))
            return self.experiment.model().to(self.device)

    def strategy(
        self, settings: Settings, plugins: Sequence[SupervisedPlugin] = (), base: type = Naive
    ) -> Any:
        """Return an Avalanche strategy on resident data, with Adam and the method's plugins."""
        model = self.model()
        # A strategy is told by its class where its data come from.
        resident = type(f"Resident{base.__name__}", (ResidentData, base), {})
        return resident(
            model=model,
            optimizer=torch.optim.Adam(model.parameters(), lr=settings.lr, fused=True),
            criterion=nn.CrossEntropyLoss(),
            train_mb_size=self.experiment.batch_size,
            train_epochs=self.epochs(settings),
            eval_mb_size=self.experiment.eval_batch_size,
            device=self.device,
            plugins=[*plugins, LinearDecay(settings.decay_from), *self.plugins],
            evaluator=self.evaluator,
            data_seed=derive(self.seed, "order"),
            precision=self.experiment.precision,
        )


class Learner:
    """A strategy, and what the harness asks of it between tasks. This one: plain finetuning."""

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy

    def train(self, experience: Any) -> None:
        """Learn an experience, with a fresh optimizer state."""
        self.strategy.train(experience, eval_streams=[], reset_optimizer_state=True)

    def state(self) -> State:
        """Return what the coming tasks need of the past ones (tensors, numbers, lists, dicts).

        The optimizer is not in it, since every task starts with a fresh one.
        """
        return {"model": self.strategy.model.state_dict()}

    def restore(self, state: State) -> None:
        """Take up a `state` into a newly built learner."""
        self.strategy.model.load_state_dict(state["model"])

    def capacity(self) -> list[dict[str, Any]]:
        """Return the units used by layer and task; [] for a method that does not count them."""
        return []

    def sufficiency(self) -> list[dict[str, Any]]:
        """Return what new units read by layer and task; [] for a method that doesn't tell."""
        return []

    def history(self) -> list[dict[str, Any]]:
        """Return what the method has to tell about each learnt task, as JSON values."""
        return []

    def search(self) -> list[dict[str, Any]]:
        """Return all candidates of all searches for hyperparameters, as JSON values."""
        return []

    def candidate(self) -> int | None:
        """Return the place in the grid of the candidate in training; None outside a search."""
        return None

    def validation_accuracy(self) -> list[float]:
        """Return the validation accuracy after each epoch of the running task, if measured."""
        return []

    def parameters(self) -> dict[str, int]:
        """Return the numbers in the network, and those needed to run all learnt tasks."""
        count = sum(parameter.numel() for parameter in self.strategy.model.parameters())
        return {"trainable": count, "stored": count}


class SingleTaskLearner(Learner):
    """A network a task."""

    def __init__(self, strategy: Any, plugin: SingleTaskPlugin) -> None:
        super().__init__(strategy)
        self.plugin = plugin

    def state(self) -> State:
        """Return the networks of the learnt tasks."""
        return {"networks": self.plugin.networks}

    def restore(self, state: State) -> None:
        """Take up the networks; the model is the newest one."""
        self.plugin.networks = list(state["networks"])
        self.strategy.model.load_state_dict(self.plugin.networks[-1])

    def parameters(self) -> dict[str, int]:
        """Count one network as trainable, and all as stored."""
        count = super().parameters()["trainable"]
        return {"trainable": count, "stored": count * len(self.plugin.networks)}


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a frame's rows as JSON values."""
    return [
        {
            str(key): None if pd.isna(value) else getattr(value, "item", lambda v=value: v)()
            for key, value in row.items()
        }
        for row in frame.to_dict("records")
    ]


class CLNPLearner(Learner):
    """The network under CLNP, with a grid search for the first task or each if settings ask."""

    def __init__(self, strategy: Any, plugin: CLNPPlugin, settings: CLNPSettings) -> None:
        super().__init__(strategy)
        self.plugin = plugin
        self.settings = settings

    def train(self, experience: Any) -> None:
        """Learn an experience, or the best of the grid on it."""
        asked = self.settings
        first = not self.plugin.tasks
        if not (asked.grid_l1 or asked.grid_lr) or not (first or asked.grid_tasks == "each"):
            super().train(experience)
            return
        search(
            self.strategy,
            experience,
            l1=[_alphas(values) for values in asked.grid_l1] or None,
            lr=asked.grid_lr or None,
            eval_streams=[],
            reset_optimizer_state=True,
        )

    def state(self) -> State:
        """Return the plugin's state, which holds the used part of the weights, and the rate."""
        rates = [group["lr"] for group in self.strategy.optimizer.param_groups]
        return {"plugin": dict(self.plugin.state_dict()), "lr": rates}

    def restore(self, state: State) -> None:
        """Give the state back to the plugin, which writes the weights, and to the optimizer."""
        self.plugin.load_state_dict(state["plugin"], self.strategy.model)
        for group, lr in zip(self.strategy.optimizer.param_groups, state["lr"], strict=True):
            group["lr"] = lr

    def capacity(self) -> list[dict[str, Any]]:
        """Return the rows of `CLNPPlugin.capacity`."""
        return _rows(self.plugin.capacity())

    def sufficiency(self) -> list[dict[str, Any]]:
        """Return the rows of `CLNPPlugin.sufficiency`; None where there is no number."""
        return _rows(self.plugin.sufficiency())

    def history(self) -> list[dict[str, Any]]:
        """Return the plugin's account of each task."""
        return list(self.plugin.history)

    def search(self) -> list[dict[str, Any]]:
        """Return the rows of the tables of `clnp.search`."""
        return list(self.plugin.candidates)

    def candidate(self) -> int | None:
        """Return which copy this is, when a search has copied it."""
        return self.plugin.candidate

    def validation_accuracy(self) -> list[float]:
        """Return what the plugin has measured after each epoch."""
        return list(self.plugin.validation_accuracy)


# ---------------------------------------------------------------------------------------------
# Registry
# ---------------------------------------------------------------------------------------------

S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class Method(Generic[S]):
    """How a method is built, and what it is given."""

    name: str
    build: Callable[[Setup, S], Learner]
    settings: dict[str, S]
    """Its settings, by preset."""
    task_id_at_test: bool
    """Whether it is told the task of a test image."""
    revision: int = 1
    """Raised when a fix changes the method's results."""

    def settings_for(self, experiment: Experiment) -> S:
        """Return the settings in an experiment, with the changes that it asks for.

        Raises
        ------
        UserError
            If the method has no settings for the preset, or a change is not possible.
        """
        if experiment.preset not in self.settings:
            raise UserError(f"{self.name} has no settings for {experiment.preset}.")
        settings = self.settings[experiment.preset]
        for change in experiment.settings:
            target, separator, value = change.partition("=")
            method, dot, name = target.partition(".")
            if not (separator and dot):
                raise UserError(f"{change!r} is not of the form METHOD.SETTING=VALUE.")
            if pick("method", method, METHODS) == self.name:
                pick(f"setting of {method}", name, (f.name for f in dataclasses.fields(settings)))
                settings = _change(settings, name, value)
        return settings


def _change(settings: S, name: str, value: str) -> S:
    """Return settings with one of them changed to what a text says, such as ``"1e-5,1e-4"``."""
    kind = get_type_hints(type(settings))[name]
    inner = get_args(kind)[:1]
    try:
        if inner and get_args(inner[0]):  # a list of lists: "1e-7,1e-5;1e-6,1e-4"
            parsed: Any = tuple(_parsed(inner[0], part) for part in value.split(";"))
        else:
            parsed = _parsed(kind, value)
    except SystemExit:
        raise UserError(f"{value!r} is no value for the setting {name} ({kind}).") from None
    return dataclasses.replace(settings, **{name: parsed})


def _parsed(kind: Any, value: str) -> Any:
    return tyro.cli(kind, args=value.split(","), console_outputs=False)


def _finetune(setup: Setup, settings: Settings) -> Learner:
    return Learner(setup.strategy(settings))


def _single_task(setup: Setup, settings: Settings) -> Learner:
    plugin = SingleTaskPlugin(seed=derive(setup.seed, "fresh networks"))
    return SingleTaskLearner(setup.strategy(settings, [plugin]), plugin)


def _clnp(setup: Setup, settings: CLNPSettings) -> Learner:
    plugin = CLNPPlugin(
        margin=settings.margin,
        l1=_alphas(settings.l1),
        thresholds=settings.thresholds,
        head_bias=settings.head_bias,
        keep_epoch=settings.keep_epoch,
        finetune=settings.finetune,
        valid_stream=setup.scenario.streams["valid"],
        seed=derive(setup.seed, "clnp"),
    )
    return CLNPLearner(setup.strategy(settings, [plugin]), plugin, settings)


METHODS: dict[str, Method[Any]] = {
    method.name: method
    for method in (
        Method(
            name="clnp",
            build=_clnp,
            settings={
                "pmnist": CLNPSettings(lr=0.002, epochs=60, keep_epoch="latest-within-margin"),
                "quickstart": CLNPSettings(lr=0.004, margin=0.01, l1=(2e-4, 1e-3, 1e-4)),
            },
            task_id_at_test=True,
        ),
        Method(
            name="finetune",
            build=_finetune,
            settings={
                "pmnist": Settings(epochs=20),
                "quickstart": Settings(lr=0.004, epochs=40),
            },
            task_id_at_test=False,
        ),
        Method(
            name="single_task",
            build=_single_task,
            settings={
                "pmnist": Settings(epochs=20),
                "quickstart": Settings(lr=0.004, epochs=40),
            },
            task_id_at_test=True,
        ),
    )
}
