"""CLNPPlugin: continual learning via neural pruning for any Avalanche strategy (Alg. 1)."""

import copy
import math
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
from avalanche.models import MultiHeadClassifier
from avalanche.models.utils import avalanche_forward, is_multi_task_module
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn
from torch.optim import Optimizer

from clnp.arguments import check_alphas, check_margins, check_policy, choice, integer, shown
from clnp.capacity import (
    Sufficiency,
    ablated,
    capacity_table,
    reused,
    sufficiency,
    sufficiency_table,
)
from clnp.compact import compact
from clnp.compatible import (
    GROWS,
    check_head,
    growing,
    heads_of,
    make_heads,
    refuse_broken,
    refuse_incompatible,
)
from clnp.early_stopping import LatestWithinMargin
from clnp.errors import Incompatible, UnsupportedNetwork
from clnp.evaluation import accuracy, outputs, predict
from clnp.experiences import (
    MASKED,
    class_labels,
    distinct_labels,
    index_in_stream,
    task_labels,
    widened,
)
from clnp.finetune import FineTune, retrain
from clnp.layout import Layout
from clnp.network import PartitionedNetwork, SubNetwork
from clnp.partition import Partition, derived_seed
from clnp.proof import prove
from clnp.pruning import Activity, Cut, graceful_forgetting, sorting
from clnp.sparsity import L1, Alphas, alphas_by_layer, plain
from clnp.units import Forward, find_layout

HOLD_OUT = 0.1
"""Share of a task's training data held out for validation where no stream is given."""

PROBE = 16
"""Samples of the first task with which the network is traced."""

LARGE_BATCH = 256
"""Samples of the largest batch for which widening is tried."""


@dataclass(frozen=True)
class Outcome:
    """What the training of a task gave, before anything is cut.

    Attributes
    ----------
    validation
        Validation accuracy after each epoch.
    epoch
        The epoch whose weights these are; 1 is the first.
    activity : {group: (width,)}
        Mean activity of each unit, in the places of the training.
    tensors
        Copies of all that the training changed, on the CPU; none where it stands in the network.
    """

    validation: list[float]
    epoch: int
    activity: dict[str, Tensor]
    tensors: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Scan:
    """Where a trained network can be cut; its units are sorted, and nothing is frozen yet.

    Attributes
    ----------
    outcome
        What was trained.
    best
        The validation accuracy from which the margin counts.
    cut
        How far the layers can be cut.
    activity : {group: (width,)}
        Mean activity of each unit, in the order of the sorted units.
    """

    outcome: Outcome
    best: float
    cut: Cut
    activity: dict[str, Tensor]


class CLNPPlugin(SupervisedPlugin):
    """Learn task after task in one network, with exactly zero forgetting.

    After each task the units that it doesn't need are cut, within a margin of its validation
    accuracy; those that remain are frozen, read by later tasks but never written again; the
    others are drawn anew and train on the next task (Golkar, Kagan, Cho 2019, Alg. 1).

    Parameters
    ----------
    margin : float or sequence of float
        m, the absolute drop of validation accuracy allowed per task (0.0005: 0.05 points); or one
        for each task.
    l1 : float, sequence of float or {layer name: float}
        alpha, the weight of the L1 term of the free weights: one for all layers, one for each
        layer in forward order (the head last), or by name (``"head"`` names the head of any task).
    thresholds : {"per-layer", "shared"}
        Whether each layer has a theta of its own.
    valid_stream : stream or sequence of experiences, optional
        Experience k's validation data; without it 10 % of its training data is held out (seeded).
    example_input : tensor (N, ...), optional
        A batch for tracing the network; without it the first samples of the first task.
    heads : {"auto", "single", "multi"}
        One output layer for all tasks or one for each; auto: multi for a ``MultiTaskModule``.
    head_bias : {"shared", "per-task", "none"}
        Bias of a single head: trained by the first task and then frozen, one for each task, none.
    seed : int
        Of re-initialisation and of the held-out split.
    keep_epoch : {"last", "latest-within-margin"}
        Which epoch's weights are cut and kept: the last one's; or those of the latest epoch whose
        validation accuracy is within the margin of the best, at the price of a copy of the weights
        in training (early stopping: where the last epoch happens to be worse than that, little
        could be cut).
    finetune : FineTune, optional
        Retrain the surviving weights after the cut, and how often to repeat both.
    expand : {layer name: (below, by)}, optional
        Widen the layer by ``by`` units (:meth:`expand`) when a next task begins and finds fewer
        than ``below`` of its units free.
    below_margin : {"harmless", "dead"}
        What is cut if the trained network is already below the margin: units as long as no further
        validation accuracy is lost, or those alone that are never active.

    Attributes
    ----------
    history : list of dict
        For each learnt task: its name, the epoch kept (1 is the first) of how many, best (of the
        epochs, or of the whole grid), trained (of the epoch kept), living (without its dead units)
        and pruned validation accuracy, thresholds, new units, how many cuts were evaluated; for
        each fine-tuning the units and the accuracies before and after; ``reused_ablation``:
        validation accuracy where the task reads no older units but the reused ones, its drop from
        the pruned one, the margin that it is held against, and how many units were cut for it; and
        ``widened``, the units that layers were widened by before it.
    validation_accuracy : list of float
        Validation accuracy after each epoch of the task in training (or just trained).
    candidates : list of dict
        All candidates of all searches, as rows of the table that :func:`clnp.search` returns.
    candidate : int or None
        In a copy that a search trains: the candidate's place in the grid.
    task_margin : float
        m of the task in training (or just trained).

    Raises
    ------
    TypeError
        If an argument is of another kind than told.
    ValueError
        If an argument is out of its range.

    Notes
    -----
    Sub-networks are named by task label if the labels in the experiences' stream are distinct,
    else by the experience's index. The promise: after a task has been learnt, its logits for the
    same batch on the same device, library versions and number of threads are bitwise the same for
    ever.

    Examples
    --------
    >>> plugin = CLNPPlugin(margin=0.001, l1=1e-5)
    >>> strategy = Naive(model=model, optimizer=optimizer, plugins=[plugin])
    >>> for experience in benchmark.train_stream:
    ...     strategy.train(experience)
    >>> plugin.subnetwork(0)(x)
    """

    supports_distributed = False

    def __init__(
        self,
        margin: float | Sequence[float] = 0.0005,
        l1: Alphas = 1e-5,
        thresholds: str = "per-layer",
        valid_stream: Any = None,
        example_input: Tensor | None = None,
        heads: str = "auto",
        head_bias: str = "shared",
        seed: int = 0,
        keep_epoch: str = "last",
        finetune: FineTune | None = None,
        expand: Mapping[str, tuple[int, int]] | None = None,
        below_margin: str = "harmless",
    ) -> None:
        super().__init__()
        choice("keep_epoch", keep_epoch, ("last", "latest-within-margin"))
        choice("thresholds", thresholds, ("per-layer", "shared"))
        choice("heads", heads, ("auto", "single", "multi"))
        choice("head_bias", head_bias, ("shared", "per-task", "none"))
        choice("below_margin", below_margin, ("harmless", "dead"))
        check_margins(margin)
        check_alphas(l1)
        self.seed = integer("seed", seed)
        if finetune is not None:
            if not isinstance(finetune, FineTune):
                raise TypeError(f"finetune is {finetune!r}; give clnp.FineTune(epochs=...) or None")
            if finetune.l1 is not None:
                check_alphas(finetune.l1)
        if expand is not None:
            check_policy(expand)
        if valid_stream is not None and not hasattr(valid_stream, "__getitem__"):
            raise TypeError(
                f"valid_stream is a {type(valid_stream).__name__}; give a stream of the benchmark "
                "or a list of experiences, one for each of the training stream"
            )
        if example_input is not None and (
            not isinstance(example_input, Tensor)
            or example_input.dim() < 2
            or not len(example_input)
        ):
            raise TypeError(
                f"example_input is {shown(example_input)}; give a batch of inputs, a tensor of "
                "shape (N, ...)"
            )
        self.margin = margin
        self.l1: Alphas = l1
        self.thresholds = thresholds
        self.valid_stream = valid_stream
        self.example_input = example_input
        self.heads = heads
        self.head_bias = head_bias
        self.keep_epoch = keep_epoch
        self.below_margin = below_margin
        self.finetune = finetune
        self._policy = dict(expand or {})
        self.history: list[dict[str, Any]] = []
        self.validation_accuracy: list[float] = []
        self.candidates: list[dict[str, Any]] = []
        self.candidate: int | None = None
        self.checked_too: Sequence[Alphas] = ()
        self.decide: Callable[[Any], Scan | None] | None = None
        self._network: PartitionedNetwork | None = None
        self._by_label: bool | None = None
        self._names: list[Hashable] = []
        self._reused: list[dict[str, int]] = []
        self._sufficiency: list[dict[str, Sufficiency | None]] = []
        self._widened_by: dict[str, int] = {}  # since the last task
        self._train_data: Any = None
        self._valid_data: Any = None
        self._l1 = L1({}, {})
        self._optimizer: tuple[Optimizer, list[list[nn.Parameter]]] | None = None
        self.task_margin = 0.0
        self._kept: LatestWithinMargin | None = None
        self._current: Hashable = None
        self._checksum: dict[str, int] = {}  # of all that learnt tasks read, since the newest one
        self._task_view = ExitStack()
        self._eval_view = ExitStack()

    # -- what the user asks ----------------------------------------------------------------------

    @property
    def network(self) -> PartitionedNetwork:
        """The model under its partition.

        Raises
        ------
        RuntimeError
            Before the first task has begun.
        """
        if self._network is None:
            raise RuntimeError(
                "CLNPPlugin has seen no network yet: train a first experience with a strategy that "
                "has it among its plugins"
            )
        return self._network

    @property
    def partition(self) -> Partition:
        """The frontiers by layer."""
        return self.network.partition

    @property
    def tasks(self) -> list[Hashable]:
        """Names of the learnt tasks (labels or indices) in order of learning."""
        return list(self._names)

    def subnetwork(self, task: Hashable) -> SubNetwork:
        """The slice of the network that a task uses, its own head included.

        Parameters
        ----------
        task
            The task's label, or the index of its experience (see Notes of the class).

        Raises
        ------
        KeyError
            If the task hasn't been learnt.
        Incompatible
            If something has written into what learnt tasks read.
        """
        index = self._index(task)
        self._verify()
        return self.network.subnetwork(index, self._forward(self._names[index]))

    def compact(self, task: Hashable) -> nn.Module:
        """A plain module of a task's units alone, for use without the network, CLNP and Avalanche.

        It evaluates, has no gradients and shares no memory with the network; its ``state_dict`` can
        be saved, and ``torch.export`` and ``torch.onnx`` take it.

        Parameters
        ----------
        task
            As in :meth:`subnetwork`.

        Returns
        -------
        nn.Module
            Called with x alone; logits (N, classes) within rounding of the sub-network's. A
            narrower copy of the model, or a graph (see :func:`clnp.compact.compact`).

        Raises
        ------
        KeyError
            If the task hasn't been learnt.
        UnsupportedNetwork
            If the model needs Avalanche and can't be traced.
        """
        index = self._index(task)
        self._verify()
        assert self.example_input is not None
        example = self.example_input.to(next(self.network.model.parameters()).device)
        return compact(self.network, index, self._forward(self._names[index]), example)

    def capacity(self) -> pd.DataFrame:
        """Units by task and hidden layer: used, new, reused, free, used_fraction."""
        if self._network is None:
            return capacity_table(Partition({}), [], [])
        return capacity_table(self.partition, self._names, self._reused)

    def sufficiency(self) -> pd.DataFrame:
        """What new units read, by task and hidden layer: new, old_only, new_only (shares of new).

        NaN where the layer reads the network's input, or the task has no new unit in it.
        """
        if self._network is None:
            return sufficiency_table(Partition({}), [], [])
        return sufficiency_table(self.partition, self._names, self._sufficiency)

    def expand(self, more: Mapping[str, int]) -> None:
        """Widen layers between tasks; learnt tasks' logits stay bitwise the same.

        The new units are free, and the next task trains them. Layers tied to the widened one (by a
        sum, a norm, a grouped convolution), the layers that read it and the heads of all tasks,
        those to come too, get as many rows and columns. The model's parameters stay the same
        objects, so the optimizer goes on with them. It is tried on a copy of the model first.

        Parameters
        ----------
        more
            Units to add, by layer. Of layers that are tied the first in forward order is named (as
            in :meth:`capacity`); of grouped convolutions and group norms a unit is a whole group.

        Raises
        ------
        TypeError
            If it is no dict.
        ValueError
            If a layer is unknown, or a number below 1.
        UnsupportedNetwork
            If the model doesn't run with wider layers, or the logits of a learnt task change.
        Incompatible
            If something has written into what learnt tasks read.
        RuntimeError
            Before the first task, or while one is in training.

        Notes
        -----
        Whatever is raised, nothing has been changed.
        """
        network = self.network
        network.check_expansion(more)
        self._verify()
        trial = copy.deepcopy(network)
        trial.expand(more)
        example = self._kept_example(network.model)
        try:
            name = self._names[-1] if self._names else self._current
            found = find_layout(trial.model, self._forward(name), example)
        except Exception as error:  # whatever the user's own forward stumbles on
            raise UnsupportedNetwork(
                f"the model doesn't run with wider layers ({type(error).__name__}: {error}); its "
                "forward must take sizes from what it gets (x.flatten(1), not x.view(-1, 512))"
            ) from error
        if found.core() != trial.layout.core():
            raise UnsupportedNetwork(
                "the model joins its units in another way when its layers are wider; its forward "
                "must not depend on their sizes"
            )
        # Kernels differ with the batch size: a single sample is a product with a vector.
        many = torch.cat([example] * (1 + LARGE_BATCH // len(example)))
        for index, (name, batch) in (
            (i, (n, x))
            for i, n in enumerate(self._names)
            for x in (example[:1], example[:2], example[:3], example, many)
        ):
            old = network.subnetwork(index, self._forward(name))(batch)
            new = trial.subnetwork(index, self._forward(name))(batch)
            if not torch.equal(old, new):
                raise UnsupportedNetwork(
                    f"with {dict(more)} more units the logits of task {name!r} would differ in the "
                    f"last bits (by up to {float((old - new).abs().max()):.1e}): the kernels for "
                    "this machine depend on how far apart the weights' rows lie; another number of "
                    "units (a multiple of 16) may do"
                )
        network.expand(more)
        self._checksum = network.checksum()
        for layer, units in more.items():
            self._widened_by[layer] = self._widened_by.get(layer, 0) + units

    def _expand_if_short(self, layout: Layout) -> bool:
        """Follow the policy before a task; whether any layer has been widened."""
        unknown = [layer for layer in self._policy if layer not in layout.widths]
        if unknown:
            raise ValueError(
                f"expand names the layer {unknown[0]!r}, but those that can be widened are: "
                f"{', '.join(layout.widths)}"
            )
        if not self._names:
            return False
        free = {layer: layout.widths[layer] - used for layer, used in self.network.frontier.items()}
        more = {layer: by for layer, (below, by) in self._policy.items() if free[layer] < below}
        if more:
            self.expand(more)
        return bool(more)

    def _index(self, task: Hashable) -> int:
        """Place of a task in the order of learning."""
        if task in self._names:
            return self._names.index(task)
        raise KeyError(f"task {task!r} hasn't been learnt; learnt so far: {self._names or 'none'}")

    def _forward(self, name: Hashable) -> Forward:
        """How the model is called for a task."""
        return lambda model, x: avalanche_forward(model, x, name)

    # -- saving ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that learnt tasks need, between tasks: plain tensors, numbers and lists.

        Free weights aren't in it, since they are drawn anew before each task; so it is as small
        as what has been learnt. After a search alpha is in it (the optimizer has the learning
        rate).

        Notes
        -----
        To stop after any task and go on in a new process, bit for bit as if nothing had happened,
        save this and ``model.state_dict()``. There, build model, strategy and plugin as before,
        then load *this first* (it widens layers and makes the heads of Avalanche's
        ``MultiHeadClassifier`` that the saved model had), the model's own second.
        The plugin's draws depend on its ``seed`` alone; the order of the data, dropout, and the
        first weights of heads that Avalanche makes for new tasks come from torch's global
        generator: seed it before each task, or save ``torch.get_rng_state()`` too. The optimizer
        has no state between tasks, but a schedule that runs on over tasks is the user's to save.
        """
        network = self.network
        if not self._names:
            raise RuntimeError("no task has been learnt yet, so that there is nothing to save")
        if network.in_training:
            raise RuntimeError("state_dict() is for between tasks; a task is in training")
        self._verify()
        return {
            "names": list(self._names),
            "by_label": self._by_label,
            "reused": [dict(r) for r in self._reused],
            "sufficiency": [
                {layer: each and asdict(each) for layer, each in task.items()}
                for task in self._sufficiency
            ],
            "history": [dict(h) for h in self.history],
            "candidates": [dict(row) for row in self.candidates],
            "l1": plain(self.l1) if self.candidates else None,
            "example": self.example_input,
            "widened_by": dict(self._widened_by),
            "avalanche_heads": heads_of(network.model),
            "network": network.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], model: nn.Module) -> None:
        """Go on from :meth:`state_dict`.

        Parameters
        ----------
        state
            What :meth:`state_dict` gave.
        model
            A network of the same shape, on its device; its weights are overwritten where learnt
            tasks use them. One that was widened may be as it was before; it is widened again.

        Raises
        ------
        ValueError
            If the network has another shape, or lacks the head of a learnt task and isn't one to
            which Avalanche adds heads (``MultiHeadClassifier``).
        """
        if not isinstance(state, Mapping) or not {"names", "by_label", "network"} <= state.keys():
            raise ValueError(
                f"{shown(state)} is no state of a CLNPPlugin; load what plugin.state_dict() gave, "
                "and the model's own state into the model"
            )
        if self._network is not None and self._network.model is model:
            self._abandon()
        names = list(state["names"])
        make_heads(model, state["network"], state.get("avalanche_heads", {}))
        self._by_label = state["by_label"]
        self.example_input = state["example"]
        example = self._kept_example(model)
        forward = self._forward(names[0])
        network = self._build(model, find_layout(model, forward, example), forward, example)
        network.load_state_dict(state["network"])
        self._network = network
        # Buffers that belong to no unit come with the model's own state, which is loaded next.
        self._checksum = network.checksum(constants=False)
        self._names = names
        self._reused = [dict(r) for r in state["reused"]]
        # A state from before it was measured goes on; what its tasks read isn't known.
        self._sufficiency = [
            {layer: each and Sufficiency(**each) for layer, each in task.items()}
            for task in state.get("sufficiency", [{} for _ in names])
        ]
        self.history = [dict(h) for h in state["history"]]
        self._widened_by = dict(state.get("widened_by", {}))
        self.candidates = [dict(row) for row in state.get("candidates", [])]
        if state.get("l1") is not None:
            self.l1 = state["l1"]

    def training_state(self) -> dict[str, Any]:
        """What a task in training has gathered: tensors, numbers and lists.

        Notes
        -----
        To stop within a task and go on bit for bit, save this, :meth:`state_dict` from before the
        task, ``model.state_dict()`` (which holds nothing but the free rows while a task trains),
        the optimizer's state and all generators. There, load the state from before, begin to train
        the task, and in the first epoch's ``before_training_epoch`` give all the rest back; the
        ``Resumable`` strategies in ``benchmarks/resume.py`` of this project do so.
        """
        kept = self._kept
        return {
            "validation_accuracy": list(self.validation_accuracy),
            "kept": None if kept is None else kept.state(),
        }

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`training_state`, when the task has begun."""
        self.validation_accuracy = list(state["validation_accuracy"])
        if self._kept is not None:
            self._kept.load_state(state["kept"])

    # -- a task's life ---------------------------------------------------------------------------

    def before_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Tidy up after a training that was interrupted, and check what is frozen."""
        if sum(isinstance(plugin, CLNPPlugin) for plugin in strategy.plugins) > 1:
            raise Incompatible(
                "the strategy has more than one CLNPPlugin (the ready strategy CLNP brings its "
                "own), or one of them twice; leave one in its plugins"
            )
        self._abandon()
        self._verify()

    def after_train_dataset_adaptation(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Check the task's data, and hold out validation data if no stream was given."""
        experience, data = strategy.experience, strategy.adapted_dataset
        index = len(self._names)
        position = index_in_stream(experience, index)
        # Before Avalanche adapts the model to a task that is refused.
        self._name(experience)
        if self._names and growing(strategy.model):
            raise Incompatible(f"{growing(strategy.model)[0]!r} {GROWS}")
        if len(data) == 0:
            raise ValueError(f"experience {position} has no training data")
        if len(data) != len(experience.dataset):
            raise Incompatible(
                f"{type(strategy).__name__} trains on {len(data)} samples where the experience has "
                f"{len(experience.dataset)}: data of other tasks among them would train this "
                "task's units on them. CLNP needs no replay; use Naive"
            )
        if self.valid_stream is not None:
            try:
                self._valid_data = self.valid_stream[position].dataset.eval()
            except AttributeError as error:
                raise TypeError(
                    f"valid_stream holds no experience for experience {position} ({error}); give a "
                    "stream of the benchmark or a list of experiences"
                ) from None
            except (IndexError, KeyError):
                raise ValueError(
                    f"valid_stream has {len(self.valid_stream)} experiences, and none for "
                    f"experience {position}"
                ) from None
        else:
            held = max(1, round(HOLD_OUT * len(data)))
            if len(data) < 2:
                raise ValueError(
                    f"experience {position} has {len(data)} sample, of which none can be held out "
                    "for validation; give a valid_stream"
                )
            generator = torch.Generator().manual_seed(derived_seed(self.seed, index, 1))
            order = torch.randperm(len(data), generator=generator)
            self._valid_data = data.subset(sorted(order[:held].tolist())).eval()
            strategy.adapted_dataset = data = data.subset(sorted(order[held:].tolist()))
        if len(self._valid_data) == 0:
            raise ValueError(
                f"experience {position} has no validation data, and the cut is decided on it"
            )
        self._train_data = data

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Draw the free weights anew and let the optimizer see nothing else."""
        refuse_incompatible(strategy)
        name = self._name(strategy.experience)
        model, forward = strategy.model, self._forward(name)
        layout = find_layout(model, forward, self._example(strategy))
        check_head(model, layout, strategy.experience)
        alphas, self.task_margin = alphas_by_layer(layout, self.l1), self._margin(len(self._names))
        if self.finetune is not None and self.finetune.l1 is not None:
            alphas_by_layer(layout, self.finetune.l1)  # a wrong one is found before training
        for l1 in self.checked_too:
            alphas_by_layer(layout, l1)
        self._refuse_other_model(model)
        if self._network is None or self._network.model is not model:
            self._network = self._build(model, layout, forward, self._example(strategy))
        self._verify()
        if not self._names:
            refuse_broken(model)
        self._network.check_layout(layout)
        if self._expand_if_short(layout):
            layout = find_layout(model, forward, self._example(strategy))
        network = self._network
        leaves = network.begin_task(layout)
        self._swap(strategy.optimizer, leaves)
        self._l1 = L1(network.leaves(), alphas)
        self.validation_accuracy = []
        self._kept = None
        if self.keep_epoch == "latest-within-margin":
            self._kept = LatestWithinMargin(network.trained_tensors(), self.task_margin)
        self._task_view.enter_context(network.view(network.training_view))

    def before_update(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """L1 on the free weights."""
        self._l1.add_to_gradients()

    def after_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Validation accuracy: the best epoch's is what the margin counts from."""
        self._validate(strategy)

    def _validate(self, strategy: Any) -> None:
        self.validation_accuracy.append(self._accuracy(strategy))
        if self._kept is not None:
            self._kept.update(self.validation_accuracy)

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Measure activity, sort the task's units by it, cut, sever and freeze."""
        if self.decide is None:
            outcome = self.end_training(strategy)
            scan: Scan | None = self.scan(strategy, outcome, max(outcome.validation))
        else:
            scan = self.decide(strategy)
        if scan is not None:
            self._learn(strategy, scan)
        self._train_data = self._valid_data = None

    # What a search takes a task's end apart into: `decide`, in place of the lines above.

    def end_training(self, strategy: Any, copies: bool = False) -> Outcome:
        """Keep the epoch to keep, measure its activity, and put the full parameters back.

        Parameters
        ----------
        strategy
            The strategy that has just trained the task.
        copies
            Whether the outcome gets copies of what was trained.
        """
        network, kept = self.network, self._kept
        if not self.validation_accuracy:  # a training of no epoch
            self._validate(strategy)
        epochs = len(self.validation_accuracy)
        if kept is not None and kept.epoch < epochs:
            kept.restore()
        activity = Activity(network.layout)
        with activity.measure(network.model, network.training_view.start):
            for _ in outputs(strategy, self._train_data):
                pass
        outcome = Outcome(
            list(self.validation_accuracy),
            epochs if kept is None else kept.epoch,
            activity.means(),
            tuple(t.detach().cpu().clone() for t in self._trained()) if copies else (),
        )
        self.end_without_outcome()
        return outcome

    def end_without_outcome(self) -> None:
        """Put the full parameters back, and check what is frozen."""
        self._kept = None
        self._release()
        self._verify()

    def _trained(self) -> list[Tensor]:
        """All that the training of a task changes in the model."""
        counters = [
            buffer
            for name, buffer in self.network.model.named_buffers()
            if name.endswith("num_batches_tracked")
        ]
        return [*self.network.trained_tensors(), *counters]

    @torch.no_grad()
    def place(self, outcome: Outcome) -> None:
        """Put what another training of this task gave into the network; nothing of it is cut.

        Parameters
        ----------
        outcome
            An outcome with tensors. The task isn't in training (see :meth:`end_training`).
        """
        network = self.network
        network.train_units(dict(network.layout.widths))
        try:
            for tensor, copied in zip(self._trained(), outcome.tensors, strict=True):
                tensor.copy_(copied)
        finally:
            network.end_task()
        self.validation_accuracy = list(outcome.validation)

    def sort(self, activity: dict[str, Tensor]) -> dict[str, Tensor]:
        """Move free units into the order of falling activity; the activities in that order."""
        before = self.network.frontier
        orders = {name: sorting(a, before[name]) for name, a in activity.items()}
        self.network.sort(orders)
        return {name: a[orders[name]] for name, a in activity.items()}

    def scan(self, strategy: Any, outcome: Outcome, best: float) -> Scan:
        """Sort the units of what stands in the network, and find where to cut them.

        Parameters
        ----------
        strategy
            Evaluates.
        outcome
            What stands in the network, its units unsorted.
        best
            The validation accuracy from which the margin counts.
        """
        cut, activity = self._sort_and_cut(strategy, outcome.activity, best)
        return Scan(outcome, best, cut, activity)

    def _learn(self, strategy: Any, scan: Scan) -> None:
        """Fine-tune what survives the cut if asked to, freeze it, and remember the task.

        The margin counts from the best validation accuracy so far. After the last fine-tuning only
        dead units go.
        """
        network, outcome = self.network, scan.outcome
        before, best = network.frontier, scan.best
        cut, activity = scan.cut, scan.activity
        tuned: list[dict[str, Any]] = []
        rounds = 0 if self.finetune is None else self.finetune.iterations
        for left in reversed(range(rounds)):
            activity, accuracy = self._fine_tune(strategy, cut.used)
            tuned.append(
                {
                    "new": {layer: cut.used[layer] - before[layer] for layer in cut.used},
                    "cut_validation": cut.accuracy,
                    "tuned_validation": accuracy,
                }
            )
            best = max(best, accuracy)
            if left:
                cut, activity = self._sort_and_cut(strategy, activity, best)
            else:
                cut, activity = self._sort_and_cut(strategy, activity, math.inf, below="dead")
        name = self._name(strategy.experience)
        modules, layout = network.modules, network.layout
        start = network.candidate(cut.used).head.start
        kept = reused(modules, layout, before, cut.used, start, activity)
        reads = sufficiency(modules, layout, before, cut.used, activity)
        entry = {
            "task": name,
            "epoch": outcome.epoch,
            "epochs": len(outcome.validation),
            "best_validation": scan.best,
            "trained_validation": outcome.validation[outcome.epoch - 1],
            "living_validation": scan.cut.living,
            "pruned_validation": cut.accuracy,
            "thresholds": dict(cut.thresholds),
            "new": {layer: cut.used[layer] - before[layer] for layer in cut.used},
            "evaluations": cut.evaluations,
            **({"fine_tuning": tuned} if tuned else {}),
            **({"widened": self._widened_by} if self._widened_by else {}),
        }
        # All at once, and what takes long afterwards: an interruption finds the task learnt or not.
        network.learn(cut.used)
        self._checksum = network.checksum()
        self._names.append(name)
        self._reused.append({layer: int(units.sum()) for layer, units in kept.items()})
        self._sufficiency.append(reads)
        self.history.append(entry)
        self._widened_by = {}
        entry["reused_ablation"] = self._ablation(strategy, before, kept, cut.accuracy)

    def _sort_and_cut(
        self, strategy: Any, activity: dict[str, Tensor], best: float, below: str | None = None
    ) -> tuple[Cut, dict[str, Tensor]]:
        """Sort the task's units by activity and find where to cut; nothing is frozen yet.

        Parameters
        ----------
        strategy
            Evaluates.
        activity
            Mean activities by group, units unsorted.
        best
            The validation accuracy from which the margin counts.
        below
            What goes below the margin; None: as the plugin's ``below_margin`` says.

        Returns
        -------
        tuple
            The cut, and the activities in the new order of the units.
        """
        network = self.network
        activity = self.sort(activity)

        def evaluate(used: dict[str, int]) -> float:
            with network.view(network.candidate(used)):
                return self._accuracy(strategy)

        cut = graceful_forgetting(
            activity,
            network.frontier,
            network.floors(),
            evaluate,
            best,
            self.task_margin,
            self.thresholds,
            below or self.below_margin,
        )
        return cut, activity

    def _fine_tune(self, strategy: Any, used: dict[str, int]) -> tuple[dict[str, Tensor], float]:
        """Retrain the task's surviving units; their activity and validation accuracy afterwards."""
        assert self.finetune is not None
        network = self.network
        l1 = self.l1 if self.finetune.l1 is None else self.finetune.l1
        self._swap(strategy.optimizer, network.train_units(used))
        penalty = L1(network.leaves(), alphas_by_layer(network.layout, l1))
        activity = Activity(network.layout)
        try:
            with network.view(network.training_view):
                retrain(strategy, self.finetune.epochs, self.finetune.lr, penalty)
                accuracy = self._accuracy(strategy)
                start = network.training_view.start
                with activity.measure(network.model, start, used):
                    for _ in outputs(strategy, self._train_data):
                        pass
        finally:
            self._release()
        self._verify()
        return activity.means(), accuracy

    def _ablation(
        self, strategy: Any, before: dict[str, int], kept: dict[str, Tensor], accuracy: float
    ) -> dict[str, Any]:
        """What the newest task loses without the older units that aren't reused.

        The definition of reuse is a bound on weights; whether it tells what matters, this measures.
        """
        network = self.network
        cut, after = sum(int((~units).sum()) for units in kept.values()), network.frontier
        ablation = accuracy
        if cut:
            start = network.heads[-1].start
            with (
                torch.random.fork_rng(devices=[]),  # a loader draws; a measurement mustn't
                ablated(network.modules, network.layout, before, after, start, kept),
                network.view(network.task_view(len(self._names) - 1)),
            ):
                ablation = self._accuracy(strategy)
        return {
            "accuracy": ablation,
            "drop": accuracy - ablation,
            "margin": self.task_margin,
            "cut": cut,
        }

    # -- evaluation ------------------------------------------------------------------------------

    def before_eval(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Refuse a model on which the sub-networks would have no effect, or a damaged one."""
        self._leave_evaluation()
        self._refuse_other_model(strategy.model)
        self._verify()

    def before_eval_dataset_adaptation(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Refuse classes for which Avalanche would add outputs to a head that is there to stay."""
        experience = strategy.experience
        largest = max(class_labels(experience), default=-1)
        if self._network is None or self._mixed(experience):
            return
        for path in growing(strategy.model):
            head = strategy.model.get_submodule(path).classifier
            if self._names and largest >= head.out_features:
                raise Incompatible(f"{path!r} {GROWS}")
        name = self._task(experience)
        if name not in self._names and not self._is_in_training(experience):
            return
        for module in strategy.model.modules():
            if not isinstance(module, MultiHeadClassifier) or str(name) not in module.classifiers:
                continue
            size = module.classifiers[str(name)].classifier.out_features
            if largest >= size:
                raise Incompatible(
                    f"experience {index_in_stream(experience, 0)} of the stream to evaluate has "
                    f"label {largest}, but the head of task {name} has {size} outputs, and "
                    "Avalanche would add some to it; leave out what the task hasn't been trained on"
                )

    def before_eval_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Run the batch on the sub-network of its experience's task."""
        index = self._eval_index(strategy.experience)
        if index is not None:
            self._eval_view.enter_context(self.network.view(self.network.task_view(index)))

    def after_eval_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Leave the sub-network; give batches of mixed or unlearnt tasks what is theirs."""
        self._leave_evaluation()
        experience = strategy.experience
        if self._mixed(experience):
            strategy.mb_output = self._by_task(strategy)
        elif self._names and self._unlearnt(experience):
            if self._eval_index(experience) is None:  # a head that no task has trained
                strategy.mb_output = self._on_newest(strategy, strategy.mbatch)
            strategy.mb_output = widened(strategy.mb_output, experience)

    def _eval_index(self, experience: Any) -> int | None:
        """Which learnt task's sub-network an experience runs on; None: the model as it stands."""
        if not self._names or self._mixed(experience) or self._is_in_training(experience):
            return None
        if not self._unlearnt(experience):
            return self._index(self._task(experience))
        # The newest one; but in a multi-head network the label picks a head of its own.
        return len(self._names) - 1 if self.network.single_head else None

    def _task(self, experience: Any) -> Hashable:
        """The name of an experience's task."""
        labels = task_labels(experience)
        return labels[0] if self._by_label and labels else index_in_stream(experience, 0)

    def _mixed(self, experience: Any) -> bool:
        return bool(self._by_label) and bool(self._names) and len(task_labels(experience)) > 1

    def _is_in_training(self, experience: Any) -> bool:
        network = self._network
        return (
            network is not None and network.in_training and self._task(experience) == self._current
        )

    def _unlearnt(self, experience: Any) -> bool:
        return self._task(experience) not in self._names and not self._is_in_training(experience)

    def _by_task(self, strategy: Any) -> Tensor:
        """Logits of a batch of several tasks, each sample's by its own task's sub-network."""
        batch = strategy.mbatch
        parts: list[tuple[Tensor, Tensor]] = []
        for label in batch[-1].unique().tolist():
            rows = (batch[-1] == label).nonzero().flatten()
            part = [t[rows] for t in batch]
            if self.network.in_training and label == self._current:
                with self.network.view(self.network.training_view):
                    parts.append((rows, predict(strategy, part)))
            elif label in self._names:
                index = self._index(label)
                with self.network.view(self.network.task_view(index)):
                    parts.append((rows, predict(strategy, part)))
            else:
                parts.append((rows, self._on_newest(strategy, part)))
        width = max(logits.shape[1] for _, logits in parts)
        joined = parts[0][1].new_full((len(batch[0]), width), MASKED)
        for rows, logits in parts:
            joined[rows, : logits.shape[1]] = logits
        return joined

    def _on_newest(self, strategy: Any, batch: list[Tensor]) -> Tensor:
        """Logits of a batch by the sub-network of the task learnt last."""
        labels = (
            torch.full_like(batch[-1], int(str(self._names[-1]))) if self._by_label else batch[-1]
        )
        with self.network.view(self.network.task_view(len(self._names) - 1)):
            return predict(strategy, [*batch[:-1], labels])

    def _accuracy(self, strategy: Any) -> float:
        """Accuracy on the task's validation data."""
        return accuracy(strategy, self._valid_data)

    # -- before a task -----------------------------------------------------------------------------

    def _refuse_other_model(self, model: nn.Module) -> None:
        """Refuse any model but the one whose units the learnt tasks use."""
        if self._names and self.network.model is not model:
            raise Incompatible(
                "the strategy's model isn't the one that this plugin has learnt tasks in; use a "
                "plugin of its own for each model, or, to go on in a copy of the model, "
                "plugin.load_state_dict(plugin.state_dict(), copy)"
            )

    def _name(self, experience: Any) -> Hashable:
        """Name the task: by label if the stream's labels are distinct, else by index."""
        labels = task_labels(experience)
        if self._by_label is None:
            self._by_label = distinct_labels(experience)
        if not self._by_label:
            position = index_in_stream(experience, len(self._names))
            if position in self._names:
                raise ValueError(
                    f"experience {position} has been learnt already and its units are frozen; "
                    "tasks are named by their index, since the stream's task labels aren't "
                    "distinct: give new data an index, or a task label, of its own"
                )
            self._current = position
            return self._current
        if len(labels) != 1:
            raise ValueError(
                f"experience {index_in_stream(experience, 0)} has task labels {labels}; CLNP "
                "learns one task at a time"
            )
        if labels[0] in self._names:
            raise ValueError(
                f"task {labels[0]} has been learnt already and its units are frozen; give new data "
                "a new task label"
            )
        self._current = labels[0]
        return self._current

    def _single_head(self, model: nn.Module) -> bool:
        multi = is_multi_task_module(model)
        if self.heads == "multi" and not multi:
            raise ValueError(
                f"heads='multi' needs a model that takes task labels, but {type(model).__name__} "
                "is no avalanche.models.MultiTaskModule"
            )
        if multi and not self._by_label:
            raise ValueError(
                "a MultiTaskModule picks its head by task label, but the labels of the "
                "experiences aren't distinct; give each experience a task label of its own"
            )
        return not multi if self.heads == "auto" else self.heads == "single"

    def _build(
        self, model: nn.Module, layout: Layout, forward: Forward, example: Tensor
    ) -> PartitionedNetwork:
        """The network under a layout that has been proved."""
        single = self._single_head(model)
        prove(model, layout, forward, example, single)
        return PartitionedNetwork(model, layout, single, self.head_bias, self.seed)

    def _example(self, strategy: Any) -> Tensor:
        if self.example_input is None:
            with torch.random.fork_rng(devices=[]):  # random transforms must not move the run's RNG
                data = self._train_data.eval()
                rows = [data[i][0] for i in range(min(PROBE, len(data)))]
            try:
                self.example_input = torch.stack([torch.as_tensor(row) for row in rows])
            except (TypeError, ValueError, RuntimeError) as error:
                raise UnsupportedNetwork(
                    f"the inputs of the first task don't make a batch, a tensor (N, ...): {error}; "
                    "CLNP needs inputs of one shape, one for each sample"
                ) from error
        return self.example_input.to(strategy.device)

    def _kept_example(self, model: nn.Module) -> Tensor:
        """The batch with which the network has been traced."""
        assert self.example_input is not None
        return self.example_input.to(next(model.parameters()).device)

    def _margin(self, index: int) -> float:
        if not isinstance(self.margin, Sequence):
            return float(self.margin)
        if index >= len(self.margin):
            raise ValueError(
                f"margin has {len(self.margin)} values, and none for task {index} (counted from 0)"
            )
        return float(self.margin[index])

    # -- the optimizer -----------------------------------------------------------------------------

    def _swap(
        self, optimizer: Optimizer, leaves: Mapping[nn.Parameter, nn.Parameter | None]
    ) -> None:
        """Give the optimizer the free rows in place of the parameters, and a fresh state."""
        kept = [list(group["params"]) for group in optimizer.param_groups]
        for group, originals in zip(optimizer.param_groups, kept, strict=True):
            trained = [leaves.get(p, p) for p in originals]
            group["params"] = [leaf for leaf in trained if leaf is not None]
            for original in originals:
                optimizer.state.pop(original, None)
        self._optimizer = (optimizer, kept)

    def _release(self) -> None:
        """Put the parameters back: in the model, and in the optimizer."""
        self._task_view.close()
        if self._network is not None and self._network.in_training:
            self._network.end_task()
        if self._optimizer is not None:
            optimizer, kept = self._optimizer
            # Groups that another plugin has added meanwhile stay as they are.
            for group, originals in zip(optimizer.param_groups, kept, strict=False):
                for leaf in group["params"]:
                    optimizer.state.pop(leaf, None)
                group["params"] = originals
        self._optimizer = None
        self._l1 = L1({}, {})

    def _abandon(self) -> None:
        """Give up a task whose training was interrupted; what was learnt before stands."""
        self._leave_evaluation()
        if self._network is not None and self._network.in_training:
            warnings.warn(
                f"the training of task {self._current!r} was interrupted; CLNP gives it up, learnt "
                "tasks are as they were",
                stacklevel=2,
            )
            self._release()

    def _leave_evaluation(self) -> None:
        """Leave the view of an evaluated task, that of an interrupted evaluation too."""
        # It gives back the gradient mode that it found, which after an interruption is of the past.
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            self._eval_view.close()

    def _verify(self) -> None:
        """Check that nothing has written into what learnt tasks read, since the newest was learnt.

        Within a task it is left to the task's end.

        Raises
        ------
        Incompatible
            If so: the promise is broken, and nobody shall find out later.
        """
        if self._network is None or self._network.in_training:
            return
        now = self._network.checksum()
        changed = [name for name, value in self._checksum.items() if now.get(name) != value]
        if changed:
            raise Incompatible(
                f"something wrote into frozen weights: {', '.join(changed)} changed after task "
                f"{self._names[-1]!r} was learnt. Was the model trained, averaged, cast or given "
                "batches in train mode without this plugin, or does an optimizer or plugin keep "
                "references to parameters from before a task? Learnt tasks are damaged; go back to "
                "a saved state (load_state_dict)"
            )
        self._checksum = now
