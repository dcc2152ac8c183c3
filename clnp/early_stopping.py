"""Which epoch's weights a task keeps (paper, Sec. 3.2: early stopping on validation data)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clnp.pruning import EPSILON


class LatestWithinMargin:
    """Keep the latest epoch whose validation accuracy is within a margin of the best one.

    Not the best epoch itself: sparsity comes late in a training, and the best epoch would throw it
    away. One copy is enough, since an epoch that raises the best is within the margin itself.

    Parameters
    ----------
    tensors
        What the training changes: weights and running statistics.
    margin
        The absolute drop of validation accuracy allowed.
    """

    def __init__(self, tensors: Iterable[Tensor], margin: float) -> None:
        self._tensors = [tensor.detach() for tensor in tensors]
        self._margin = margin
        self._copies: list[Tensor] = []
        self.epoch = 0

    @torch.no_grad()
    def update(self, accuracies: Sequence[float]) -> None:
        """Take the accuracies of all epochs so far; keep the newest if it is within the margin."""
        if accuracies[-1] < max(accuracies) - self._margin - EPSILON:
            return
        self.epoch = len(accuracies)
        if self._copies:
            torch._foreach_copy_(self._copies, self._tensors)
        else:
            self._copies = [tensor.clone() for tensor in self._tensors]

    @torch.no_grad()
    def restore(self) -> None:
        """Put the kept epoch's values back."""
        if self._copies:
            torch._foreach_copy_(self._tensors, self._copies)

    def state(self) -> dict[str, Any]:
        """The kept epoch and its values, to be saved within a training."""
        return {"epoch": self.epoch, "copies": self._copies}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`, with the same tensors."""
        self.epoch = state["epoch"]
        self._copies = [
            copy.to(tensor.device, copy=True)
            for copy, tensor in zip(state["copies"], self._tensors, strict=bool(state["copies"]))
        ]
