"""The registry of methods: their settings by experiment, and how each is built into a learner."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar, get_args, get_type_hints

import pandas as pd
import tyro

from baselines.hat import HATPlugin, own_rate
from baselines.single_task import SingleTaskPlugin
from benchmarks.errors import UserError, pick
from benchmarks.experiment import Experiment, derive
from benchmarks.learners import Learner, Settings, Setup, State, require
from clnp import CLNPPlugin, FineTune, search

# ---------------------------------------------------------------------------------------------
# clnp
# ---------------------------------------------------------------------------------------------


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
            require(len(set(values)) == len(values), name, values, "a list of different values")
        for alphas in self.grid_l1:
            require(all(alpha >= 0 for alpha in alphas), "grid_l1", self.grid_l1, "not negative")
        require(all(lr > 0 for lr in self.grid_lr), "grid_lr", self.grid_lr, "positive")
        require(0 <= self.margin < 1, "margin", self.margin, "within [0, 1)")
        require(all(alpha >= 0 for alpha in self.l1), "l1", self.l1, "not negative")
        require(self.finetune_epochs >= 0, "finetune_epochs", self.finetune_epochs, "at least 0")
        require(self.finetune_lr > 0, "finetune_lr", self.finetune_lr, "positive")
        positive = all(alpha >= 0 for alpha in self.finetune_l1)
        require(positive, "finetune_l1", self.finetune_l1, "not negative")
        rounds = self.finetune_iterations
        require(rounds >= 1, "finetune_iterations", rounds, "at least 1")

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

    settings: CLNPSettings
    plugin: CLNPPlugin

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

    def parameters(self) -> dict[str, int]:
        """Count the network alone: the plugin's state is a part of it, and a few frontiers."""
        count = sum(parameter.numel() for parameter in self.strategy.model.parameters())
        return {"trainable": count, "stored": count}


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
    return CLNPLearner(setup.strategy(settings, [plugin]), settings, plugin)


# ---------------------------------------------------------------------------------------------
# finetune, single_task
# ---------------------------------------------------------------------------------------------


def _finetune(setup: Setup, settings: Settings) -> Learner:
    return Learner(setup.strategy(settings), settings)


class SingleTaskLearner(Learner):
    """A network a task."""

    plugin: SingleTaskPlugin

    def state(self) -> State:
        """Return the networks of the learnt tasks."""
        return {"networks": self.plugin.networks}

    def restore(self, state: State) -> None:
        """Take up the networks; the model is the newest one."""
        self.plugin.networks = list(state["networks"])
        self.strategy.model.load_state_dict(self.plugin.networks[-1])

    def parameters(self) -> dict[str, int]:
        """Count one network as trainable, and all as stored."""
        count = sum(parameter.numel() for parameter in self.strategy.model.parameters())
        return {"trainable": count, "stored": count * len(self.plugin.networks)}


def _single_task(setup: Setup, settings: Settings) -> Learner:
    plugin = SingleTaskPlugin(seed=derive(setup.seed, "fresh networks"))
    return SingleTaskLearner(setup.strategy(settings, [plugin]), settings, plugin)


# ---------------------------------------------------------------------------------------------
# hat
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HATSettings(Settings):
    """HAT's own settings; see baselines/hat.md."""

    smax: float = 400.0
    """Slope of the gates at the end of each epoch, above 1."""
    lamb: float = 0.75
    """Weight of the regulariser of attention."""
    embedding_lr: float | None = None
    """Learning rate of the embeddings; None: `lr`."""
    harden: bool = True
    """Whether the gates of a learnt task are rounded to 0 or 1; only SGD can do without."""
    clip: float = 0.0
    """Largest norm of all gradients together; 0: no clipping."""
    dropout: float = 0.0
    """Share of each hidden layer's units dropped in training."""
    input_dropout: float = 0.0
    """Share of the network's inputs dropped in training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.smax > 1, "smax", self.smax, "above 1")
        require(self.lamb >= 0, "lamb", self.lamb, "at least 0")
        rate = self.embedding_lr
        require(rate is None or rate > 0, "embedding_lr", rate, "positive")
        require(self.harden or self.optimizer == "sgd", "harden", False, "True but with SGD")
        require(self.reset_optimizer, "reset_optimizer", False, "True, or old weights would move")
        require(self.clip >= 0, "clip", self.clip, "at least 0")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "within [0, 1)")
        require(0 <= self.input_dropout < 1, "input_dropout", self.input_dropout, "within [0, 1)")


class HATLearner(Learner):
    """The network under HAT."""

    plugin: HATPlugin

    def capacity(self) -> list[dict[str, Any]]:
        """Return the rows of `HATPlugin.capacity`."""
        return self.plugin.capacity()


def _hat(setup: Setup, settings: HATSettings) -> Learner:
    model = setup.model()
    plugin = HATPlugin(
        model,
        smax=settings.smax,
        lamb=settings.lamb,
        harden=settings.harden,
        clip=settings.clip or None,
        dropout=(settings.input_dropout, settings.dropout),
        seed=derive(setup.seed, "hat"),
    )
    strategy = setup.strategy(settings, [plugin], model=model)
    own_rate(strategy.optimizer, plugin.embeddings, settings.embedding_lr or settings.lr)
    return HATLearner(strategy, settings, plugin)


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
    grid: dict[str, tuple[S, ...]] = field(default_factory=dict)
    """The settings that `python -m benchmarks tune` compares, by preset; at most 4."""
    later: frozenset[str] = frozenset()
    """Names of settings that have no effect before the second task."""
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
            name="hat",
            build=_hat,
            settings={
                "pmnist": HATSettings(epochs=25, smax=100.0, embedding_lr=0.01),
                "quickstart": HATSettings(lr=0.004, epochs=40),
            },
            task_id_at_test=True,
            grid={
                "pmnist": (
                    HATSettings(epochs=25),  # smax and lamb of the authors
                    HATSettings(epochs=25, embedding_lr=0.01),
                    HATSettings(epochs=25, smax=100.0, embedding_lr=0.01),
                    HATSettings(epochs=25, smax=100.0, embedding_lr=0.01, lamb=0.25),
                ),
            },
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
