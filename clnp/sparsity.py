"""L1 on the weights in training: what makes a task need few units (paper, Sec. 2.2)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from clnp.layout import Layout
from clnp.one_pass import is_plain, one_pass

CPU_PART, GPU_PART = 2**19, 2**20
"""Entries handled at once: on a CPU their signs stay in the cache (smaller parts cost more in calls
than they save: reports/trials/pmnist_l1_cost.csv); on a GPU they take 4 MB."""

ONE_PASS_FROM = 2**16
"""Entries on a CPU from which on a loop is compiled for them: with fewer a step costs little."""

Alphas = float | Sequence[float] | Mapping[str, float]
"""alpha: one for all layers, one for each in forward order (the head last), or by name."""


def alphas_by_layer(layout: Layout, l1: Alphas) -> dict[str, float]:
    """Alpha of each layer with a weight matrix.

    Raises
    ------
    ValueError
        If a layer is unknown, or the list has another length than there are layers.
    """
    layers = layout.weights
    shown = ", ".join(layers)
    if isinstance(l1, Mapping):
        head = {layout.head: l1["head"]} if "head" in l1 else {}
        unknown = [name for name in l1 if name not in (*layers, "head")]
        if unknown:
            raise ValueError(f"l1 names the layer {unknown[0]!r}, but the layers are: {shown}")
        return (
            dict.fromkeys(layers, 0.0)
            | {name: alpha for name, alpha in l1.items() if name != "head"}
            | head
        )
    if not isinstance(l1, Sequence):
        return dict.fromkeys(layers, float(l1))
    if len(l1) != len(layers):
        raise ValueError(
            f"l1 has {len(l1)} values for {len(layers)} layers; in forward order they are: {shown}"
        )
    return dict(zip(layers, l1, strict=True))


def plain(l1: Alphas) -> float | list[float] | dict[str, float]:
    """Alphas as they can be saved: Python's own numbers, not NumPy's."""
    if isinstance(l1, Mapping):
        return {name: float(alpha) for name, alpha in l1.items()}
    return [float(alpha) for alpha in l1] if isinstance(l1, Sequence) else float(l1)


class L1:
    """The subgradient of sum_l alpha_l·|W_l|, added to the gradients before the optimizer's step.

    On a CPU with a C++ compiler a large network gets it in one pass over weights and gradients, for
    which a loop is compiled; elsewhere by torch's own operations.

    Parameters
    ----------
    leaves
        The weights in training (free rows, the current head) by layer.
    alphas
        alpha by layer.
    """

    def __init__(self, leaves: Mapping[str, nn.Parameter], alphas: Mapping[str, float]) -> None:
        parts: list[tuple[nn.Parameter, float, Tensor]] = []
        for layer, leaf in leaves.items():
            if alphas[layer] > 0 and leaf.requires_grad:
                entries = CPU_PART if leaf.device.type == "cpu" else GPU_PART
                rows = min(len(leaf), max(1, entries // max(1, leaf[0].numel())))
                parts.append((leaf, alphas[layer], torch.empty_like(leaf[:rows], device="meta")))
        # The layers share one buffer for signs: allocating it each step costs as much again as the
        # signs themselves, and one for each layer is memory that plain training doesn't need.
        sizes: dict[tuple[torch.device, torch.dtype], int] = {}
        for leaf, _, part in parts:
            kind = leaf.device, leaf.dtype
            sizes[kind] = max(sizes.get(kind, 0), part.numel())
        buffers = {
            (device, dtype): torch.empty(size, device=device, dtype=dtype)
            for (device, dtype), size in sizes.items()
        }
        self._terms = [
            (leaf, alpha, buffers[leaf.device, leaf.dtype].as_strided(part.shape, part.stride()))
            for leaf, alpha, part in parts
        ]
        entries = sum(leaf.numel() for leaf, _, _ in parts if is_plain(leaf))
        self._in_one_pass = entries >= ONE_PASS_FROM

    @torch.no_grad()
    def add_to_gradients(self) -> None:
        """Add alpha·sign(w) to the gradient of each w."""
        for leaf, alpha, signs in self._terms:
            if leaf.grad is None:
                continue
            add = one_pass() if self._in_one_pass and is_plain(leaf) else None
            if add is not None and is_plain(leaf.grad):
                add(leaf, leaf.grad, alpha)
                continue
            rows = len(signs)
            for part, grad in zip(leaf.split(rows), leaf.grad.split(rows), strict=True):
                grad.add_(torch.sign(part, out=signs[: len(part)]), alpha=alpha)
