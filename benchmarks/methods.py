"""The registry of methods: their settings by experiment, and how each is built into a learner."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar, get_args, get_type_hints

import pandas as pd
import tyro
from avalanche.training.plugins import LRSchedulerPlugin
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR

from baselines.er import ERPlugin
from baselines.ewc import EWCPlugin
from baselines.experience import index_of
from baselines.hat import HATPlugin, own_rate
from baselines.joint import JointPlugin
from baselines.lwf import LwFPlugin
from baselines.packnet import PackNetModel, PackNetPlugin
from baselines.si import SIPlugin
from baselines.single_task import SingleTaskPlugin
from baselines.superposition import Kind, SuperpositionPlugin, superpose, superposed_layers
from benchmarks.errors import UserError, pick
from benchmarks.experiment import Experiment, changed, derive
from benchmarks.learners import Learner, Settings, Setup, State, require
from benchmarks.models import MultiHead, PartedHead
from clnp import CapacityExhausted, CLNPPlugin, FineTune, search

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
    below_margin: Literal["harmless", "dead"] = "dead"
    """What is cut if the trained network is below the margin already; see `clnp.CLNPPlugin`, whose
    default is another (reports/trials/quickstart_below_margin.csv). The records are of this one."""
    grid_l1: tuple[tuple[float, ...], ...] = ()
    """L1 strengths to try, each in the form of `l1`; none: `l1` alone."""
    grid_lr: tuple[float, ...] = ()
    """Learning rates to try; none: `lr` alone."""
    grid_tasks: Literal["first", "each"] = "first"
    """Whether the first task alone is searched for, and the others use what it chose, or each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # Of CLNP it would throw the sparsity away; it has keep_epoch.
        require(not self.early_stopping, "early_stopping", True, "False for CLNP: see keep_epoch")
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

    def first_training(self) -> dict[str, Any] | None:
        """Return all but what acts after training; the margin does if the last epoch is kept."""
        after = {"thresholds", "below_margin"}
        after |= {name for name in vars(self) if name.startswith("finetune_")}
        if self.keep_epoch == "last":
            after.add("margin")
        values = dataclasses.asdict(self)
        return {"kind": "clnp", **{name: values[name] for name in values if name not in after}}

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
    shared: Executor | None = None
    """Trains the first task, or knows what another cell's training gave."""
    trials: Callable[[int], Executor] | None = None
    """Gives who trains a task's candidates."""

    def train(self, experience: Any) -> None:
        """Learn an experience, or the best of the grid on it; or nothing, if nothing is free."""
        try:
            self._train(experience)
        except CapacityExhausted:
            # A result of the paper's (single head, Sec. 3.2): that task and the later ones have no
            # accuracy.
            if not self.plugin.tasks:
                raise

    def learnt(self, trained: int) -> int:
        """Return how many tasks have found room."""
        return min(trained, len(self.plugin.tasks))

    def _train(self, experience: Any) -> None:
        asked = self.settings
        first = not self.plugin.tasks
        grid = bool(asked.grid_l1 or asked.grid_lr) and (first or asked.grid_tasks == "each")
        shared = self.shared if first else None
        if not grid and shared is None:
            super().train(experience)
            return
        # logging(): an experience in training hides its index.
        own = self.trials and self.trials(experience.logging().current_experience)
        search(
            self.strategy,
            experience,
            l1=[_alphas(values) for values in asked.grid_l1] or None,
            lr=asked.grid_lr or None,
            executor=shared or own,
            eval_streams=[],
            reset_optimizer_state=True,
        )
        if not grid:
            self.plugin.candidates.clear()

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
    if "valid" not in setup.scenario.streams:
        raise UserError(
            "CLNP cuts within a margin of validation accuracy: --validation is above 0."
        )
    plugin = CLNPPlugin(
        margin=settings.margin,
        l1=_alphas(settings.l1),
        thresholds=settings.thresholds,
        head_bias=settings.head_bias,
        keep_epoch=settings.keep_epoch,
        below_margin=settings.below_margin,
        finetune=settings.finetune,
        valid_stream=setup.scenario.streams["valid"],
        seed=derive(setup.seed, "clnp"),
    )
    learner = CLNPLearner(setup.strategy(settings, [plugin]), settings, plugin)
    learner.shared, learner.trials = setup.shared, setup.trials
    return learner


# ---------------------------------------------------------------------------------------------
# si
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SISettings(Settings):
    """SI's own settings; see baselines/si.md."""

    strength: float = 0.1
    """c, the strength of the penalty."""
    xi: float = 0.1
    """The damping of the importance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.strength >= 0, "strength", self.strength, "at least 0")
        require(self.xi > 0, "xi", self.xi, "positive")
        # The path is the last epoch's: an earlier one's weights are not where it ended.
        require(not self.early_stopping, "early_stopping", True, "False for SI")


def _si(setup: Setup, settings: SISettings) -> Learner:
    plugin = SIPlugin(settings.strength, settings.xi)
    return Learner(setup.strategy(settings, [plugin]), settings, plugin)


SI_PMNIST = SISettings(epochs=20, reset_optimizer=False, strength=0.1)
SI_QUICKSTART = SISettings(lr=0.004, epochs=40, strength=3.0)
SI_CIFAR = SISettings(decay_from=1.0, strength=0.01, xi=0.001)


# ---------------------------------------------------------------------------------------------
# finetune, single_task
# ---------------------------------------------------------------------------------------------


def _finetune(setup: Setup, settings: Settings) -> Learner:
    return Learner(setup.strategy(settings), settings)


@dataclass(frozen=True)
class SingleTaskSettings(Settings):
    """Those of networks that train apart from each other; see baselines/single_task.md."""

    later_lr: float | None = None
    """Learning rate from the second task on, for tasks of another size; None: `lr`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rate = self.later_lr
        require(rate is None or rate > 0, "later_lr", rate, "positive")
        # The next task's network is another.
        require(self.reset_optimizer, "reset_optimizer", False, "True for networks of their own")


class SingleTaskLearner(Learner):
    """A network a task."""

    plugin: SingleTaskPlugin
    settings: SingleTaskSettings

    def train(self, experience: Any) -> None:
        """Learn an experience at its own rate."""
        if self.settings.later_lr is not None and index_of(experience) > 0:
            for group in self.strategy.optimizer.param_groups:
                group["lr"] = self.settings.later_lr
        super().train(experience)

    def state(self) -> State:
        """Return the networks of the learnt tasks."""
        return {"networks": list(self.plugin.networks.values())}

    def restore(self, state: State) -> None:
        """Take up the networks; the model is the newest one."""
        self.plugin.networks = dict(enumerate(state["networks"]))
        self.strategy.model.load_state_dict(state["networks"][-1])

    def parameters(self) -> dict[str, int]:
        """Count one network as trainable, and all as stored, each with the one head it uses."""
        model = self.strategy.model
        count = sum(parameter.numel() for parameter in model.parameters())
        if isinstance(model, MultiHead):
            count -= sum(p.numel() for head in model.heads[1:] for p in head.parameters())
        return {"trainable": count, "stored": count * len(self.plugin.networks)}


def _single_task(setup: Setup, settings: SingleTaskSettings) -> Learner:
    plugin = SingleTaskPlugin(seed=derive(setup.seed, "fresh networks"))
    return SingleTaskLearner(setup.strategy(settings, [plugin]), settings, plugin)


# ---------------------------------------------------------------------------------------------
# ewc, ewc_online
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EWCSettings(Settings):
    """Settings of EWC in its summed form; see baselines/ewc.md."""

    strength: float = 100.0
    """lambda: the loss has lambda/2 times the sum of F (theta - theta*)^2."""
    fisher: Literal["exact", "empirical"] = "exact"
    """Labels in the Fisher information: those predicted, with their probabilities, or the true."""
    samples: int | None = None
    """Training images from which a task's Fisher information is estimated; None: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.strength >= 0, "strength", self.strength, "at least 0")
        require(self.samples is None or self.samples >= 1, "samples", self.samples, "at least 1")


@dataclass(frozen=True)
class OnlineEWCSettings(EWCSettings):
    """Settings of online EWC; see baselines/ewc.md."""

    gamma: float = 1.0
    """How much of the old tasks' Fisher information remains after a new task."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.gamma <= 1, "gamma", self.gamma, "within [0, 1]")


def _ewc(setup: Setup, settings: EWCSettings) -> Learner:
    online = isinstance(settings, OnlineEWCSettings)
    plugin = EWCPlugin(
        settings.strength,
        fisher=settings.fisher,
        samples=settings.samples,
        mode="online" if online else "summed",
        gamma=settings.gamma if isinstance(settings, OnlineEWCSettings) else 1.0,
        seed=derive(setup.seed, "ewc"),
    )
    return Learner(setup.strategy(settings, [plugin]), settings, plugin)


EWC_PMNIST = EWCSettings(epochs=10, samples=10_000, strength=1000.0)
EWC_SLOW = dataclasses.replace(
    EWC_PMNIST, lr=1e-4, batch_size=128, decay_from=1.0, reset_optimizer=False
)
"""Learning rate and its schedule, size of batches and state of the optimizer as van de Ven's."""
EWC_QUICKSTART = EWCSettings(lr=0.004, epochs=40, decay_from=1.0, strength=300.0)
EWC_CIFAR = EWCSettings(decay_from=1.0, samples=5000)
EWC_ONLINE_PMNIST = OnlineEWCSettings(epochs=10, samples=10_000)
EWC_ONLINE_QUICKSTART = OnlineEWCSettings(lr=0.004, epochs=40, decay_from=1.0, strength=300.0)
EWC_STRENGTHS = (30.0, 100.0, 300.0, 1000.0)
"""Of the grids on quickstart."""


# ---------------------------------------------------------------------------------------------
# joint
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JointSettings(Settings):
    """Settings of joint training; see baselines/joint.md."""

    joint_tasks: int | None = None
    """How many tasks are learnt, the first ones of the stream; None: all."""
    per_task: tuple[int, ...] = ()
    """Images in a batch of the first task, and of each other one; none: as they come."""
    milestones: tuple[int, ...] = ()
    """Epochs after which the learning rate falls; none: `decay_from` counts."""
    gamma: float = 0.05
    """Factor by which it falls there."""
    parts: bool = False
    """Whether each task reads a part of the last hidden layer of its own, and is told."""

    def __post_init__(self) -> None:
        super().__post_init__()
        tasks = self.joint_tasks
        require(tasks is None or tasks >= 1, "joint_tasks", tasks, "at least 1")
        sizes = self.per_task
        fits = not sizes or (len(sizes) == 2 and min(sizes) >= 1)
        require(fits, "per_task", sizes, "two numbers, both at least 1")
        rising = list(self.milestones) == sorted(set(self.milestones))
        rising = rising and min(self.milestones, default=1) >= 1
        require(rising, "milestones", self.milestones, "rising numbers, at least 1")
        require(0 < self.gamma <= 1, "gamma", self.gamma, "within (0, 1]")


class JointLearner(Learner):
    """All tasks at once, as soon as the last one of them has come."""

    def __init__(self, strategy: Any, settings: Settings, tasks: int) -> None:
        super().__init__(strategy, settings)
        self.tasks = tasks

    def train(self, experience: Any) -> None:
        """Train on all tasks if this is the last one."""
        if experience.logging().current_experience == self.tasks - 1:
            super().train(experience)

    def learnt(self, trained: int) -> int:
        """Return 0 until all have come."""
        return self.tasks if trained >= self.tasks else 0


def _joint(setup: Setup, settings: JointSettings) -> Learner:
    tasks = min(settings.joint_tasks or setup.experiment.tasks, setup.experiment.tasks)
    model = setup.model()
    if settings.parts:
        assert isinstance(model, nn.Sequential)
        model = PartedHead(model, tasks).to(setup.device)
    per_task = None
    if settings.per_task:
        first, others = settings.per_task
        per_task = [first] + [others] * (tasks - 1)
    plugin = JointPlugin(setup.scenario.streams["train"][:tasks])
    # With milestones the linear decay doesn't count.
    common = dataclasses.replace(settings, decay_from=1.0) if settings.milestones else settings
    strategy = setup.strategy(common, [plugin], model=model, together=tasks, per_task=per_task)
    if settings.milestones:
        schedule = MultiStepLR(strategy.optimizer, list(settings.milestones), settings.gamma)
        strategy.plugins.append(LRSchedulerPlugin(schedule))
    return JointLearner(strategy, settings, tasks)


JOINT_WIDE = JointSettings(
    epochs=120,
    decay_from=1.0,
    joint_tasks=10,
    per_task=(50, 10),
    milestones=(50, 90),
    parts=True,
    early_stopping=True,
)
"""Appendix A of the paper."""


# ---------------------------------------------------------------------------------------------
# superposition
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SuperpositionSettings(Settings):
    """Superposition's own settings; see baselines/superposition.md."""

    kind: Kind = "binary"
    """Of the contexts: random signs, phases (the weights are complex, too), or rotations."""
    trained: bool = False
    """Whether a task trains its contexts."""
    gain: float = 1.0
    """Factor on the initial weights."""
    bias: bool = False
    """Whether layers keep a bias, shared by all tasks."""
    normalise: bool = True
    """Whether inputs are brought to mean 0 and deviation 1, as in the source."""
    own_norms: bool = False
    """Whether each task has batch norms of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.gain > 0, "gain", self.gain, "positive")


class SuperpositionLearner(Learner):
    """A superposed network."""

    def parameters(self) -> dict[str, int]:
        """Count the contexts of all tasks as stored, those made from a seed when needed too."""
        model = self.strategy.model
        count = sum(parameter.numel() for parameter in model.parameters())
        contexts = sum(layer.fixed_numbers() for layer in superposed_layers(model))
        return {"trainable": count, "stored": count + contexts}


def _superposition(setup: Setup, settings: SuperpositionSettings) -> Learner:
    model = superpose(
        setup.model(),
        setup.experiment.tasks,
        settings.kind,
        trained=settings.trained,
        gain=settings.gain,
        bias=settings.bias,
        normalise=settings.normalise,
        own_norms=settings.own_norms,
        seed=derive(setup.seed, "contexts"),
    )
    plugin = SuperpositionPlugin(model)
    return SuperpositionLearner(setup.strategy(settings, [plugin], model=model), settings, plugin)


SUPERPOSITION_SOURCE = SuperpositionSettings(
    lr=1e-4,
    epochs=10,
    decay_from=1.0,
    optimizer="rmsprop",
    reset_optimizer=False,
    batch_size=128,
    gain=1.73,
)
SUPERPOSITION_PMNIST = dataclasses.replace(SUPERPOSITION_SOURCE, decay_from=0.7)
SUPERPOSITION_GRID = (
    SUPERPOSITION_SOURCE,
    dataclasses.replace(SUPERPOSITION_SOURCE, epochs=3),  # the source's number of steps
    SUPERPOSITION_PMNIST,
    dataclasses.replace(SUPERPOSITION_PMNIST, optimizer="adam", lr=3e-4),
)
SUPERPOSITION_QUICKSTART = SuperpositionSettings(
    lr=0.001, epochs=40, decay_from=1.0, optimizer="rmsprop", reset_optimizer=False
)


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
    if isinstance(model, MultiHead):  # HAT makes the heads itself
        model = model.chain()
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


HAT_PMNIST = HATSettings(epochs=25, smax=100.0, embedding_lr=0.01, lamb=0.25)


# ---------------------------------------------------------------------------------------------
# packnet, lwf, er
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackNetSettings(Settings):
    """PackNet's own settings; see baselines/packnet.md."""

    prune: float | None = None
    """Share of the free weights that a task gives up; None: each task keeps the same number."""
    retrain: float = 0.25
    """Share of a task's epochs in which the weights that it keeps are retrained."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.prune is None or 0 <= self.prune <= 1, "prune", self.prune, "within [0, 1]")
        require(0 <= self.retrain < 1, "retrain", self.retrain, "within [0, 1)")
        # The best epoch may lie before the cut, whose masks would then be lost.
        require(not self.early_stopping, "early_stopping", True, "False for PackNet")
        # The plugin makes a fresh optimizer a task: an old state would move frozen weights.
        require(self.reset_optimizer, "reset_optimizer", False, "True")


class PackNetLearner(Learner):
    """A network of packed tasks."""

    def parameters(self) -> dict[str, int]:
        """Count the task of each weight as stored; the masks follow from it."""
        model = self.strategy.model
        count = sum(parameter.numel() for parameter in model.parameters())
        tasks = sum(m.numel() for name, m in model.named_buffers() if name.endswith("task_index"))
        return {"trainable": count, "stored": count + tasks}


def _packnet(setup: Setup, settings: PackNetSettings) -> Learner:
    model = PackNetModel(setup.model()).to(setup.device)
    plugin = PackNetPlugin(model, setup.experiment.tasks, settings.prune, settings.retrain)
    return PackNetLearner(setup.strategy(settings, [plugin], model=model), settings, plugin)


@dataclass(frozen=True)
class LwFSettings(Settings):
    """Settings of Learning without Forgetting; see baselines/lwf.md."""

    strength: float = 1.0
    """Weight of the old answers in the loss."""
    temperature: float = 2.0
    """That softens old and new answers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.strength >= 0, "strength", self.strength, "at least 0")
        require(self.temperature > 0, "temperature", self.temperature, "positive")


def _lwf(setup: Setup, settings: LwFSettings) -> Learner:
    plugin = LwFPlugin(settings.strength, settings.temperature)
    return Learner(setup.strategy(settings, [plugin]), settings, plugin)


@dataclass(frozen=True)
class ERSettings(Settings):
    """Settings of experience replay; see baselines/er.md."""

    memory: int = 2000
    """Images kept, of all tasks together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.memory >= 1, "memory", self.memory, "at least 1")


class ERLearner(Learner):
    """A network with a memory of images."""

    plugin: ERPlugin

    def parameters(self) -> dict[str, int]:
        """Count the images in the memory as stored."""
        count = super().parameters()
        memory = self.plugin.buffer
        size = memory[0][0].numel() if len(memory) else 0
        return {**count, "stored": count["stored"] + len(memory) * size}


def _er(setup: Setup, settings: ERSettings) -> Learner:
    train = setup.scenario.streams["train"]
    plugin = ERPlugin(train, settings.memory, derive(setup.seed, "memory"))
    return ERLearner(setup.strategy(settings, [plugin]), settings, plugin)


PACKNET_PMNIST = PackNetSettings(epochs=20)
LWF_PMNIST = LwFSettings(epochs=10, lr=0.0001)
LWF_QUICKSTART = LwFSettings(lr=0.004, epochs=40)


# ---------------------------------------------------------------------------------------------
# Registry
# ---------------------------------------------------------------------------------------------

S = TypeVar("S", bound=Settings)


def strengths(settings: S, values: tuple[float, ...]) -> tuple[S, ...]:
    """Return a grid of settings that differ in their `strength`."""
    changes: list[dict[str, Any]] = [{"strength": value} for value in values]
    return tuple(dataclasses.replace(settings, **change) for change in changes)


@dataclass(frozen=True)
class Method(Generic[S]):
    """How a method is built, and what it is given."""

    name: str
    build: Callable[[Setup, S], Learner]
    settings: dict[str, S]
    """Its settings, by preset."""
    task_id_at_test: bool | frozenset[str]
    """Whether it is told the task of a test image; or the presets in which it is."""
    grid: dict[str, tuple[S, ...]] = field(default_factory=dict)
    """The settings that `python -m benchmarks tune` compares, by preset; at most 4."""
    later: frozenset[str] = frozenset()
    """Names of settings that have no effect before the second task."""
    tuning_tasks: dict[str, int] = field(default_factory=dict)
    """How many tasks a candidate of the grid learns, by preset, where it isn't 3."""
    revision: int = 1
    """Raised when a fix changes the method's results."""

    def told_task(self, experiment: Experiment) -> bool:
        """Return whether it is told the task of a test image; with a head a task all are."""
        told = self.task_id_at_test
        own = told if isinstance(told, bool) else experiment.preset in told
        return own or experiment.multi_head

    def settings_for(self, experiment: Experiment) -> S:
        """Return the settings in an experiment, with the changes that it asks for.

        Raises
        ------
        UserError
            If the method has no settings for the preset, or a change is not possible.
        """
        if experiment.preset not in self.settings:
            there = (
                name for name, method in METHODS.items() if experiment.preset in method.settings
            )
            raise UserError(
                f"{self.name} has no settings for {experiment.preset}. These have: "
                f"{', '.join(there)}."
            )
        settings = self.settings[experiment.preset]
        for change in experiment.settings:
            target, separator, value = change.partition("=")
            method, dot, name = target.partition(".")
            if not (separator and dot):
                raise UserError(f"{change!r} is not of the form METHOD.SETTING=VALUE.")
            if pick("method", method, METHODS) == self.name:
                pick(f"setting of {method}", name, (f.name for f in dataclasses.fields(settings)))
                settings = _change(settings, name, value)
        if getattr(settings, "parts", False) and not self.told_task(experiment):
            raise UserError(
                f"{self.name}.parts picks outputs by the task of an image, and on "
                f"{experiment.preset} {self.name} is not told the task."
            )
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
    with contextlib.redirect_stderr(io.StringIO()):  # the caller says what is wrong
        return tyro.cli(kind, args=value.split(","), console_outputs=False)


_CLNP = CLNPSettings(lr=0.002, epochs=60, keep_epoch="latest-within-margin")
"""On permuted MNIST: the paper's learning rate and L1 strengths. The winner of the grid around them
is `clnp_best`."""
_NARROW = ("split_cifar", "split_cifar_reduced")
_WIDE = ("split_cifar_wide", "split_cifar_wide_reduced")
_WHOLE = {"pmnist": 10} | dict.fromkeys(_NARROW, 6)
"""Tasks in the tuning of methods whose tasks disturb or crowd out each other: three can't see that
a penalty is too stiff for ten, or that units, contexts or a memory run out."""
_CLNP_WIDE = CLNPSettings(
    margin=0.02,
    l1=(5e-5,),
    keep_epoch="latest-within-margin",
    grid_l1=((1e-5,), (5e-5,)),
    grid_lr=(0.001, 0.0005),
    grid_tasks="each",
)
"""The paper's margin, its search for every task, and early stopping; the grid is ours."""
_CLNP_WIDE_REDUCED = dataclasses.replace(
    _CLNP_WIDE, grid_l1=(), grid_lr=(), lr=0.002, l1=(1e-3, 1e-3, 1e-3, 2e-3, 1.5e-2, 1.5e-2)
)
"""With few steps and channels the last hidden layer would be full after few tasks, at less:
reports/trials/split_cifar_wide_reduced_12_epochs.csv."""
_PLAIN = {
    "pmnist": Settings(epochs=20),
    "quickstart": Settings(lr=0.004, epochs=40),
    **dict.fromkeys((*_NARROW, *_WIDE), Settings(early_stopping=True)),
}
"""Of finetune and, but for the narrow network, of single_task: they differ in what is forgotten and
nothing else."""
_SINGLE_TASK = {
    preset: SingleTaskSettings(**changed(settings)) for preset, settings in _PLAIN.items()
} | dict.fromkeys(_NARROW, SingleTaskSettings(later_lr=0.002))
"""On the narrow network the first task has ten times as many images as each of the others."""


def _margin(margin: float) -> CLNPSettings:
    """Return the paper's settings for the narrow network.

    At a constant rate the last epoch is often more than m below the best one (of 500 validation
    images), and then nothing but dead units may go: reports/trials/split_cifar_reduced_decay.csv.
    """
    return CLNPSettings(margin=margin, l1=(5e-5,))


METHODS: dict[str, Method[Any]] = {
    method.name: method
    for method in (
        Method(
            name="clnp",
            build=_clnp,
            settings={
                "pmnist": _CLNP,
                "quickstart": CLNPSettings(lr=0.004, margin=0.01, l1=(2e-4, 1e-3, 1e-4)),
            },
            task_id_at_test=True,
            grid={
                "pmnist": tuple(
                    dataclasses.replace(_CLNP, lr=lr, l1=(first, *_CLNP.l1[1:]))
                    for lr in (0.002, 0.001)
                    for first in (1e-7, 1e-6)
                ),
            },
            tuning_tasks=_WHOLE,
        ),
        Method(
            name="clnp_best",
            build=_clnp,
            settings={"pmnist": dataclasses.replace(_CLNP, l1=(1e-6, 1e-5, 1e-6))},
            task_id_at_test=True,
        ),
        Method(
            name="clnp_m1",
            build=_clnp,
            settings={name: _margin(0.01) for name in _NARROW},
            task_id_at_test=True,
        ),
        Method(
            name="clnp_m2",
            build=_clnp,
            settings={name: _margin(0.02) for name in _NARROW}
            | {_WIDE[0]: _CLNP_WIDE, _WIDE[1]: _CLNP_WIDE_REDUCED},
            task_id_at_test=True,
        ),
        Method(
            name="clnp_m4_ft",
            build=_clnp,
            settings={
                name: dataclasses.replace(
                    _margin(0.04), finetune_epochs=epochs, finetune_lr=1e-4, finetune_l1=(5e-5,)
                )
                for name, epochs in zip(_NARROW, (20, 3), strict=True)
            },
            task_id_at_test=True,
        ),
        Method(
            name="finetune",
            build=_finetune,
            settings=_PLAIN,
            task_id_at_test=False,
        ),
        Method(
            name="si",
            revision=2,  # importance can fall
            build=_si,
            settings={
                "pmnist": SI_PMNIST,
                "quickstart": SI_QUICKSTART,
                **dict.fromkeys(_NARROW, dataclasses.replace(SI_CIFAR, decay_from=0.7)),
            },
            task_id_at_test=False,
            grid={
                "pmnist": (
                    dataclasses.replace(SI_PMNIST, decay_from=1.0),  # its authors'
                    *strengths(SI_PMNIST, (0.1, 0.3, 1.0)),
                ),
                "quickstart": strengths(SI_QUICKSTART, (0.3, 1.0, 3.0, 10.0)),
                **dict.fromkeys(
                    _NARROW,
                    (
                        *strengths(SI_CIFAR, (0.01, 0.1)),  # both are its authors'
                        *strengths(dataclasses.replace(SI_CIFAR, decay_from=0.7), (0.01, 0.1)),
                    ),
                ),
            },
            later=frozenset({"strength"}),
            tuning_tasks=_WHOLE,
        ),
        Method(
            name="joint",
            build=_joint,
            settings={
                "pmnist": JointSettings(epochs=20, lr=0.0005),
                "quickstart": JointSettings(lr=0.004, epochs=40),
                _WIDE[0]: JOINT_WIDE,
                _WIDE[1]: dataclasses.replace(
                    JOINT_WIDE, epochs=14, per_task=(14, 14), milestones=(6, 10)
                ),
            },
            task_id_at_test=frozenset(_WIDE),
            grid={
                "pmnist": tuple(
                    JointSettings(epochs=20, lr=lr) for lr in (0.00025, 0.0005, 0.001, 0.002)
                ),
            },
        ),
        Method(
            name="single_task",
            build=_single_task,
            settings=_SINGLE_TASK,
            task_id_at_test=True,
            grid={
                "pmnist": (
                    *(SingleTaskSettings(epochs=20, lr=lr) for lr in (0.001, 0.0005, 0.002)),
                    SingleTaskSettings(epochs=40, lr=0.0005),
                ),
                **dict.fromkeys(
                    _NARROW,
                    # The first is that of SI's authors. Not among them: the best epoch, whose
                    # accuracy on the images that choose it would beat any other's.
                    (
                        *(SingleTaskSettings(decay_from=decay) for decay in (1.0, 0.7)),
                        SingleTaskSettings(lr=0.002),
                        SingleTaskSettings(later_lr=0.002),
                    ),
                ),
            },
        ),
        Method(
            name="ewc",
            build=_ewc,
            settings={
                "pmnist": EWC_PMNIST,
                "quickstart": EWC_QUICKSTART,
                _NARROW[0]: dataclasses.replace(EWC_CIFAR, strength=1000.0),
                # All images would take the Fisher information longer than the training.
                _NARROW[1]: dataclasses.replace(EWC_CIFAR, strength=1000.0, samples=500),
            },
            task_id_at_test=False,
            grid={
                "pmnist": (
                    *strengths(EWC_SLOW, (100.0, 1000.0)),
                    *strengths(EWC_PMNIST, (100.0, 1000.0)),
                ),
                "quickstart": strengths(EWC_QUICKSTART, EWC_STRENGTHS),
                **dict.fromkeys(
                    _NARROW,
                    (
                        *strengths(EWC_CIFAR, (100.0, 1000.0)),
                        *strengths(dataclasses.replace(EWC_CIFAR, decay_from=0.7), (100.0, 1000.0)),
                    ),
                ),
            },
            later=frozenset({"strength"}),
            tuning_tasks=_WHOLE,
        ),
        Method(
            name="ewc_online",
            build=_ewc,
            settings={
                "pmnist": dataclasses.replace(EWC_ONLINE_PMNIST, strength=1000.0),
                "quickstart": EWC_ONLINE_QUICKSTART,
            },
            task_id_at_test=False,
            grid={
                "pmnist": strengths(EWC_ONLINE_PMNIST, (300.0, 1000.0, 3000.0, 10_000.0)),
                "quickstart": strengths(EWC_ONLINE_QUICKSTART, EWC_STRENGTHS),
            },
            later=frozenset({"strength", "gamma"}),
            tuning_tasks=_WHOLE,
        ),
        Method(
            name="superposition",
            build=_superposition,
            settings={
                "pmnist": SUPERPOSITION_PMNIST,
                "quickstart": SUPERPOSITION_QUICKSTART,
                **dict.fromkeys(_WIDE, SuperpositionSettings(early_stopping=True, own_norms=True)),
            },
            task_id_at_test=True,
            grid={"pmnist": SUPERPOSITION_GRID},
            tuning_tasks=_WHOLE,
        ),
        Method(
            name="hat",
            build=_hat,
            settings={
                "pmnist": HAT_PMNIST,
                "quickstart": HATSettings(lr=0.004, epochs=40),
                **dict.fromkeys(_NARROW, HATSettings(smax=100.0, embedding_lr=0.01, lamb=0.05)),
            },
            task_id_at_test=True,
            grid={
                "pmnist": (
                    HATSettings(epochs=25),  # smax and lamb of the authors
                    HATSettings(epochs=25, embedding_lr=0.01),
                    HAT_PMNIST,
                    dataclasses.replace(HAT_PMNIST, lamb=0.1),
                ),
                **dict.fromkeys(
                    _NARROW,
                    (
                        HATSettings(),  # smax and lamb of the authors
                        *(
                            HATSettings(smax=100.0, embedding_lr=0.01, lamb=lamb)
                            for lamb in (0.25, 0.05)
                        ),
                        HATSettings(smax=100.0, lamb=0.25),
                    ),
                ),
            },
            tuning_tasks=_WHOLE,
        ),
        Method(
            name="packnet",
            build=_packnet,
            settings={
                "pmnist": dataclasses.replace(PACKNET_PMNIST, retrain=0.5),
                "quickstart": PackNetSettings(lr=0.004, epochs=40),
            },
            task_id_at_test=True,
            grid={
                "pmnist": (
                    PACKNET_PMNIST,
                    dataclasses.replace(PACKNET_PMNIST, lr=0.0005),
                    dataclasses.replace(PACKNET_PMNIST, retrain=0.5),
                    dataclasses.replace(PACKNET_PMNIST, prune=0.75),  # its authors'
                ),
            },
            tuning_tasks=_WHOLE,
        ),
        Method(
            name="lwf",
            build=_lwf,
            settings={
                "pmnist": LWF_PMNIST,
                "quickstart": LWF_QUICKSTART,
            },
            task_id_at_test=False,
            grid={
                "pmnist": tuple(
                    dataclasses.replace(LWF_PMNIST, lr=lr, strength=strength)
                    for lr in (0.001, 0.0001)
                    for strength in (1.0, 10.0)
                ),
            },
            later=frozenset({"strength"}),
            tuning_tasks=_WHOLE,
        ),
        Method(
            name="er",
            build=_er,
            settings={
                "pmnist": ERSettings(epochs=10, lr=0.0005),
                "quickstart": ERSettings(lr=0.004, epochs=40, memory=200),
            },
            task_id_at_test=False,
            grid={
                "pmnist": (
                    *(ERSettings(epochs=10, lr=lr) for lr in (0.0001, 0.0005, 0.001)),
                    ERSettings(epochs=3),
                ),
            },
            tuning_tasks=_WHOLE,
        ),
    )
}
