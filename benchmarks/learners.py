"""What methods share: settings, the schedule, and the learner that a cell trains."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Literal

import torch
from avalanche.benchmarks import CLScenario
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive
from torch import nn

from benchmarks.best_epoch import BestEpoch
from benchmarks.errors import UserError
from benchmarks.experiment import Experiment, derive
from benchmarks.resume import Saver
from benchmarks.scenarios import ResidentData

State = dict[str, Any]


def require(true: bool, setting: str, value: object, must: str) -> None:
    """Refuse a setting's value unless `true`; `must` says what it has to be."""
    if not true:
        raise UserError(f"The setting {setting} is {value}; it must be {must}.")


@dataclass(frozen=True)
class Settings:
    """What every method has: the optimizer, its rate and schedule, the epochs and the batches."""

    lr: float = 0.001
    """Learning rate."""
    epochs: int | None = None
    """Epochs a task; None: the experiment's."""
    decay_from: float = 0.7
    """Share of a task's steps after which the learning rate falls linearly to 0; 1: never."""
    optimizer: Literal["adam", "sgd", "rmsprop"] = "adam"
    """The optimizer, with torch's defaults for all but the learning rate."""
    reset_optimizer: bool = True
    """Whether each task starts with a fresh state of the optimizer."""
    batch_size: int | None = None
    """Images in a training batch; None: the experiment's."""
    early_stopping: bool = False
    """Whether a task keeps the epoch with the best validation accuracy, not the last one."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            finite = all(math.isfinite(n) for n in _flat(value) if isinstance(n, float))
            require(finite, name, value, "finite")
        require(self.lr > 0, "lr", self.lr, "positive")
        require(self.epochs is None or self.epochs >= 1, "epochs", self.epochs, "at least 1")
        require(0 <= self.decay_from <= 1, "decay_from", self.decay_from, "within [0, 1]")
        size = self.batch_size
        require(size is None or size >= 1, "batch_size", size, "at least 1")

    def first_training(self) -> dict[str, Any] | None:
        """Return what acts on the training of the first task, if cells may share that.

        Returns
        -------
        dict or None
            With the method's kind; None: each cell trains its own.
        """
        return None

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer over `parameters`, fused where torch has such a one."""
        match self.optimizer:
            case "adam":
                return torch.optim.Adam(parameters, lr=self.lr, fused=True)
            case "sgd":
                return torch.optim.SGD(parameters, lr=self.lr, fused=True)
            case "rmsprop":
                return torch.optim.RMSprop(parameters, lr=self.lr)


def _flat(value: object) -> Iterator[object]:
    """Give the values within tuples, and within those in them."""
    if isinstance(value, tuple):
        for part in value:
            yield from _flat(part)
    else:
        yield value


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

    def training_state(self) -> State:
        """Return the step of the task, to be saved within it; see `benchmarks.resume`."""
        return {"step": self._step}

    def load_training_state(self, state: State) -> None:
        """Go on from `training_state`."""
        self._step = state["step"]

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
    shared: Executor | None = None
    """Trains the first task's candidates, or knows what another cell's training gave."""
    trials: Callable[[int], Executor] | None = None
    """Gives who trains a task's candidates, and remembers those that are done."""
    saver: Saver | None = None
    """Saves the training within a task."""

    def epochs(self, settings: Settings) -> int:
        """Return the epochs of a task: the method's own if it has any and may use them."""
        if settings.epochs is not None and self.experiment.method_epochs:
            return settings.epochs
        return self.experiment.epochs

    def model(self) -> nn.Module:
        """Return the network with the seed's initial weights, the same for every method."""
        with torch.random.fork_rng(devices=[]):  # it is drawn on the CPU
            torch.default_generator.manual_seed(derive(self.seed, "weights"))
            return self.experiment.model().to(self.device)

    def strategy(
        self,
        settings: Settings,
        plugins: Sequence[SupervisedPlugin] = (),
        base: type = Naive,
        model: nn.Module | None = None,
        together: int | None = None,
        **arguments: Any,
    ) -> Any:
        """Return an Avalanche strategy on resident data, with the method's plugins.

        Parameters
        ----------
        settings
            The method's; they give the optimizer, the epochs and the size of the batches.
        plugins
            The method's; they run before the schedule and the harness's own.
        base
            The class of the strategy.
        model
            The network, on the device; None: `Setup.model`.
        together
            How many tasks are learnt at once; None: one after another.
        **arguments
            More for the class of the strategy.
        """
        model = self.model() if model is None else model
        first = [self._best_epoch(together)] if settings.early_stopping else []
        # A strategy is told by its class where its data come from.
        resident: Any = type(f"Resident{base.__name__}", (ResidentData, base), {})
        strategy = resident(
            model=model,
            optimizer=settings.make_optimizer(model.parameters()),
            criterion=nn.CrossEntropyLoss(),
            train_mb_size=settings.batch_size or self.experiment.batch_size,
            train_epochs=self.epochs(settings),
            eval_mb_size=self.experiment.eval_batch_size,
            device=self.device,
            plugins=[*first, *plugins, LinearDecay(settings.decay_from), *self.plugins],
            evaluator=self.evaluator,
            data_seed=derive(self.seed, "order"),
            precision=self.experiment.precision,
            augment=self.experiment.augmentation(),
            **arguments,
        )
        strategy.saver = self.saver
        return strategy

    def _best_epoch(self, together: int | None) -> BestEpoch:
        if "valid" not in self.scenario.streams:
            raise UserError(
                "early_stopping needs validation images: --validation above 0, or the last epoch's "
                "weights by --set METHOD.early_stopping=False."
            )
        return BestEpoch(self.scenario.streams["valid"], together)


class Learner:
    """A strategy, and what the harness asks of it between tasks.

    As it is: the strategy with the plugin of a method, or plain finetuning.

    Parameters
    ----------
    strategy
        From `Setup.strategy`.
    settings
        The method's.
    plugin
        What the method keeps between tasks, if anything. Its ``state_dict()`` gives all of that as
        tensors, numbers, lists and dicts, of which the tensors count as stored numbers;
        ``load_state_dict(state)`` takes it up.
    """

    def __init__(self, strategy: Any, settings: Settings, plugin: Any = None) -> None:
        self.strategy = strategy
        self.settings = settings
        self.plugin = plugin

    def train(self, experience: Any) -> None:
        """Learn an experience."""
        fresh = self.settings.reset_optimizer
        self.strategy.train(experience, eval_streams=[], reset_optimizer_state=fresh)

    def learnt(self, trained: int) -> int:
        """Return how many tasks can be evaluated after so many calls of `train`."""
        return trained

    def state(self) -> State:
        """Return what the coming tasks need of the past ones (tensors, numbers, lists, dicts)."""
        state: State = {"model": self.strategy.model.state_dict()}
        if self.plugin is not None:
            state["plugin"] = self.plugin.state_dict()
        if not self.settings.reset_optimizer:
            state["optimizer"] = self.strategy.optimizer.state_dict()
        return state

    def restore(self, state: State) -> None:
        """Take up a `state` into a newly built learner."""
        self.strategy.model.load_state_dict(state["model"])
        if self.plugin is not None:
            self.plugin.load_state_dict(state["plugin"])
        if not self.settings.reset_optimizer:
            # Avalanche throws the optimizer's state away when it first sees the optimizer.
            self.strategy.make_optimizer(reset_optimizer_state=True)
            self.strategy.optimizer.load_state_dict(state["optimizer"])

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
        found = (plugin for plugin in self.strategy.plugins if isinstance(plugin, BestEpoch))
        return [accuracy for plugin in found for accuracy in plugin.accuracies]

    def parameters(self) -> dict[str, int]:
        """Return the numbers that are trained, and those needed to go on after all tasks."""
        count = sum(parameter.numel() for parameter in self.strategy.model.parameters())
        kept = 0 if self.plugin is None else numbers(self.plugin.state_dict())
        return {"trainable": count, "stored": count + kept}


def numbers(state: Any) -> int:
    """Return how many numbers the tensors in a state hold, however they are nested."""
    if isinstance(state, torch.Tensor):
        return state.numel()
    if isinstance(state, dict):
        state = state.values()
    elif not isinstance(state, list | tuple):
        return 0
    return sum(numbers(value) for value in state)
