"""Fine-tuning: retrain what has survived the cut (paper, Sec. 2.2 and 3.2)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clnp.arguments import integer
from clnp.sparsity import L1


@dataclass(frozen=True)
class FineTune:
    """How the surviving weights of a task are retrained after its cut.

    The paper does it on the narrow CIFAR network (Sec. 3.2): a cut with m = 4 %, then 20 epochs
    with learning rate 1e-4 and alpha 5e-5. Training is plain: the strategy's forward, loss, batches
    and optimizer (its state fresh), no schedule, and no other plugin's hooks.

    Attributes
    ----------
    epochs
        Epochs after each cut.
    lr
        Learning rate of all parameter groups; None: as it is when training ends.
    l1
        alpha while fine-tuning, in any form that the plugin's ``l1`` takes; None: the same.
    iterations
        How often to cut and fine-tune. Each cut may go as far as the margin allows.

    Raises
    ------
    TypeError
        If a number of epochs or iterations is no integer.
    ValueError
        If a value is out of its range.
    """

    epochs: int
    lr: float | None = None
    l1: float | Sequence[float] | dict[str, float] | None = None
    iterations: int = 1

    def __post_init__(self) -> None:
        for name in ("epochs", "iterations"):
            number = integer(f"{name} of FineTune", getattr(self, name))
            if number < 1:
                raise ValueError(f"{name} of FineTune is {number}; at least 1 is due")
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr of FineTune is {self.lr}; a learning rate is above 0")


def retrain(strategy: Any, epochs: int, lr: float | None, penalty: L1) -> None:
    """Train what the strategy's optimizer holds for some epochs, and nothing else happens.

    Parameters
    ----------
    strategy
        An Avalanche strategy whose training dataloader is there.
    epochs
        Passes over the data.
    lr
        Learning rate of all parameter groups; None: their own.
    penalty
        L1 on the weights that train.
    """
    optimizer, groups = strategy.optimizer, strategy.optimizer.param_groups
    rates = [group["lr"] for group in groups]
    batch, output, loss = strategy.mbatch, strategy.mb_output, strategy.loss
    modes = {module: module.training for module in strategy.model.modules()}
    strategy.model.train()
    try:
        for group in groups:
            group["lr"] = group["lr"] if lr is None else lr
        for _ in range(epochs):
            for new in strategy.dataloader:
                strategy.mbatch = new
                strategy._unpack_minibatch()
                optimizer.zero_grad()
                strategy.mb_output = strategy.forward()
                strategy.loss = strategy.criterion()
                strategy.loss.backward()
                penalty.add_to_gradients()
                optimizer.step()
    finally:
        strategy.mbatch, strategy.mb_output, strategy.loss = batch, output, loss
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        for module, mode in modes.items():
            module.training = mode
