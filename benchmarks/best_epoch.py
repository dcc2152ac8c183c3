"""Early stopping on validation data, for methods that have none of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin

from clnp.early_stopping import LatestWithinMargin


class BestEpoch(SupervisedPlugin):
    """Keep the weights of the epoch with the best validation accuracy, the latest of equals.

    To be the first plugin of a strategy, so that the others see the kept weights at a task's end.
    The optimizer's state stays that of the last epoch.

    Parameters
    ----------
    stream
        Validation experiences, one a task.
    together
        How many tasks, the first ones, are learnt at once and judged by all their images; None: one
        after another, each judged by its own.
    """

    def __init__(self, stream: Sequence[Any], together: int | None = None) -> None:
        super().__init__()
        self.stream = stream
        self.together = together
        self.accuracies: list[float] = []
        """After each epoch of the running task, or of the last one."""
        self._kept: LatestWithinMargin | None = None
        self._right: list[torch.Tensor] | None = None  # of each batch, while it is counted
        self._images = 0

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """Begin to look for the task's best epoch."""
        model = strategy.model
        self._kept = LatestWithinMargin([*model.parameters(), *model.buffers()], 0.0)
        self.accuracies = []

    def after_training_epoch(self, strategy: Any, **_: Any) -> None:
        """Evaluate, and keep the weights if none have been better."""
        assert self._kept is not None
        # logging(): an experience in training hides its index.
        task = strategy.experience.logging().current_experience
        judged = slice(task, task + 1) if self.together is None else slice(self.together)
        self._right, self._images = [], 0
        strategy.eval(self.stream[judged])
        self.accuracies.append(int(torch.stack(self._right).sum()) / self._images)
        self._right = None
        self._kept.update(self.accuracies)

    def after_eval_iteration(self, strategy: Any, **_: Any) -> None:
        """Count what is right, on the device."""
        if self._right is not None:
            self._right.append((strategy.mb_output.argmax(1) == strategy.mb_y).sum())
            self._images += len(strategy.mb_y)

    def after_training_exp(self, strategy: Any, **_: Any) -> None:
        """Put the best epoch's weights back."""
        assert self._kept is not None
        self._kept.restore()
        self._kept = None

    def training_state(self) -> dict[str, Any]:
        """Return what a task in training has gathered; see `benchmarks.resume`."""
        assert self._kept is not None
        return {"accuracies": self.accuracies, "kept": self._kept.state()}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Go on from `training_state`."""
        assert self._kept is not None
        self.accuracies = list(state["accuracies"])
        self._kept.load_state(state["kept"])
