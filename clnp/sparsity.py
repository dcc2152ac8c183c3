"""L1 on the weights in training: what makes a task need few units (paper, Sec. 2.2)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


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
        self._terms: list[tuple[nn.Parameter, float, Tensor]] = [
            # The signs get a buffer of their own: allocating one a step costs as much as the rest.
            (leaf, alphas[layer], torch.empty_like(leaf))
            for layer, leaf in leaves.items()
            if alphas[layer] > 0 and leaf.requires_grad
        ]

    @torch.no_grad()
    def add_to_gradients(self) -> None:
        """Add alpha·sign(w) to the gradient of each w."""
        for leaf, alpha, sign in self._terms:
            if leaf.grad is not None:
                leaf.grad.add_(torch.sign(leaf, out=sign), alpha=alpha)
