"""PackNet: Avalanche's, with shares for a known number of tasks and a state to save.

Mallya and Lazebnik 2018 (arXiv 1711.05769): a task trains all weights that are free, keeps the
largest, retrains these, and leaves the others to the tasks to come. Unlike CLNP it packs weights,
not units.
"""

from __future__ import annotations

from typing import Any

from avalanche.models.packnet import PackNetModel as StockPackNetModel
from avalanche.models.packnet import PackNetPlugin as StockPackNetPlugin
from avalanche.models.packnet import WeightAndBiasPackNetModule
from torch import Tensor, nn


class PackNetModel(StockPackNetModel):
    """Avalanche's model, which asks a GPU for nothing in a step.

    The stock model keeps on its device which task is in use, and looks there in every forward
    pass, seven times, and each time the host waits for the GPU.

    Parameters
    ----------
    wrappee
        The network; its layers are wrapped in place.
    """

    takes_one_label = True
    """A batch's label may be given as one number; see `benchmarks.scenarios.ResidentData`."""

    def __init__(self, wrappee: nn.Module) -> None:
        super().__init__(wrappee)
        self._label: int | None = None
        """Of the task in use; None: to be looked up."""

    def prune(self, to_prune_proportion: float) -> None:
        """Give up a share of the free weights of each layer."""
        self._label = None
        super().prune(to_prune_proportion)

    def freeze_pruned(self) -> None:
        """Freeze what the task in training keeps."""
        self._label = None
        super().freeze_pruned()

    def activate_task(self, task_id: int) -> None:
        """Use the part of the network that belongs to a task."""
        self._label = None
        super().activate_task(task_id)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._label = None
        super()._load_from_state_dict(*args, **kwargs)

    def forward(self, x: Tensor, task_labels: Tensor | int) -> Any:
        """Return the output of the part of the network that a task uses.

        Parameters
        ----------
        x
            (N, ...), the batch.
        task_labels
            (N,) labels, all of one task, or its number.

        Raises
        ------
        ValueError
            Labels of several tasks.
        """
        label = task_labels if isinstance(task_labels, int) else _one(task_labels)
        if label != self._label:
            self.activate_task(min(label, self.task_count))
            self._label = label
        return self.wrappee(x)


def _one(labels: Tensor) -> int:
    found: list[int] = labels.unique().tolist()
    if len(found) != 1:
        raise ValueError(f"a batch is of one task; these are of tasks {found}")
    return found[0]


class PackNetPlugin(StockPackNetPlugin):
    """Avalanche's plugin, which counts tasks by the model's own count.

    The stock plugin counts the experiences of its own process, and forgets that old biases are
    frozen, when a saved experiment goes on.

    Parameters
    ----------
    model
        The strategy's.
    tasks
        Number of tasks.
    prune
        Share of the free weights of each layer that a task gives up, in [0, 1]; None: such that
        every task keeps the same number, and the last one all that is left.
    retrain
        Share of a task's epochs in which the weights that it keeps are retrained, in [0, 1). Below
        one epoch the cut comes last.

    Raises
    ------
    ValueError
        Impossible shares; in training, a task too many, an optimizer with weight decay, or an
        experience whose task label isn't the number of tasks before it.
    """

    def __init__(
        self,
        model: PackNetModel,
        tasks: int,
        prune: float | None = None,
        retrain: float = 0.25,
    ) -> None:
        if not 0 <= retrain < 1:
            raise ValueError(f"retrain = {retrain}; it must be within [0, 1)")
        if prune is not None and not 0 <= prune <= 1:
            raise ValueError(f"prune = {prune}; it must be within [0, 1]")
        super().__init__(post_prune_epochs=0, prune_proportion=self.share)
        self.model, self.tasks, self.prune, self.retrain = model, tasks, prune, retrain

    def share(self, _experience: int) -> float:
        """Return the share of the free weights that the task in training gives up."""
        left = self.tasks - self.model.task_count
        return (left - 1) / left if self.prune is None else self.prune

    def before_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Set the number of epochs after the cut."""
        self.post_prune_epochs = int(self.retrain * strategy.train_epochs)
        super().before_training(strategy, *args, **kwargs)

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Refuse what can't be learnt or would be forgotten, and open the free weights."""
        if self.model.task_count >= self.tasks:
            raise ValueError(
                f"{self.tasks} tasks are learnt, and no weight is left; say tasks={self.tasks + 1}"
            )
        if any(group.get("weight_decay") for group in strategy.optimizer.param_groups):
            raise ValueError(
                "The optimizer has weight decay, which moves the weights of earlier tasks whatever "
                "PackNet freezes: set weight_decay=0."
            )
        labels = sorted(set(strategy.experience.dataset.targets_task_labels))
        if labels != [self.model.task_count]:
            raise ValueError(
                f"PackNet finds a task's weights by its label: after {self.model.task_count} tasks "
                f"the next one has to have the label {self.model.task_count}, not "
                f"{', '.join(map(str, labels))}"
            )
        super().before_training_exp(strategy, *args, **kwargs)

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Cut if that is still to be done, and freeze what the task keeps."""
        if self.post_prune_epochs == 0:
            self.model.prune(self.share(0))
        super().after_training_exp(strategy, *args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the model's own state holds all."""
        return {}

    def load_state_dict(self, _state: dict[str, Any]) -> None:
        """Freeze the biases again if the model, loaded before, has learnt a task."""
        if self.model.task_count:
            for module in self.model.modules():
                if isinstance(module, WeightAndBiasPackNetModule):
                    module.wrappee.bias.requires_grad_(False)
