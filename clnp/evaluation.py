"""A strategy's own evaluation, on any data and in the midst of its training."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def predict(strategy: Any, batch: list[Tensor]) -> Tensor:
    """The strategy's own forward (its precision, its way of calling the model) on a batch."""
    kept = strategy.mbatch
    strategy.mbatch = batch
    try:
        logits: Tensor = strategy.forward()
    finally:
        strategy.mbatch = kept
    return logits


@contextmanager
def evaluation(strategy: Any, data: Any) -> Iterator[Any]:
    """The strategy's own evaluation loader over a data set; leaves the strategy as it was."""
    names = ("adapted_dataset", "dataloader", "mbatch", "mb_output", "is_training")
    kept = {name: getattr(strategy, name) for name in names}
    modes = {module: module.training for module in strategy.model.modules()}
    strategy.adapted_dataset, strategy.is_training = data, False
    strategy.model.eval()
    try:
        strategy.make_eval_dataloader()
        yield strategy.dataloader
    finally:
        for name, value in kept.items():
            setattr(strategy, name, value)
        for module, mode in modes.items():
            module.training = mode


def outputs(strategy: Any, data: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and labels of a data set, batch by batch, in evaluation mode."""
    with evaluation(strategy, data) as loader, torch.no_grad():
        for strategy.mbatch in loader:
            strategy._unpack_minibatch()
            yield strategy.forward(), strategy.mb_y


def accuracy(strategy: Any, data: Any) -> float:
    """Accuracy on a data set."""
    right = torch.zeros((), dtype=torch.int64, device=strategy.device)
    for logits, labels in outputs(strategy, data):
        right += (logits.argmax(1) == labels).sum()
    return int(right) / len(data)
