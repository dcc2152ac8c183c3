"""L1 on the weights in training: what makes a task need few units (paper, Sec. 2.2)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

CACHED = 2**18
"""Entries of a part that a CPU handles at once: its signs don't leave the cache."""


class L1:
    """The subgradient of sum_l alpha_l·|W_l|, added to the gradients before the optimizer's step.

    Parameters
    ----------
    leaves
        The weights in training (free rows, the current head) by layer.
    alphas
        alpha by layer.
    """

    def __init__(self, leaves: Mapping[str, nn.Parameter], alphas: Mapping[str, float]) -> None:
        self._terms: list[tuple[nn.Parameter, float, Tensor]] = []
        for layer, leaf in leaves.items():
            if alphas[layer] > 0 and leaf.requires_grad:
                rows = len(leaf)
                if leaf.device.type == "cpu":
                    rows = min(rows, max(1, CACHED // max(1, leaf[0].numel())))
                # The signs get a buffer of their own: allocating it each step costs as much again.
                self._terms.append((leaf, alphas[layer], torch.empty_like(leaf[:rows])))

    @torch.no_grad()
    def add_to_gradients(self) -> None:
        """Add alpha·sign(w) to the gradient of each w."""
        for leaf, alpha, signs in self._terms:
            if leaf.grad is None:
                continue
            rows = len(signs)
            for part, grad in zip(leaf.split(rows), leaf.grad.split(rows), strict=True):
                grad.add_(torch.sign(part, out=signs[: len(part)]), alpha=alpha)
