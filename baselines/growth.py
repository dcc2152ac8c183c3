"""Importance of parameters that grow, as heads and outputs do with the classes."""

from __future__ import annotations

import torch
from torch import Tensor


def grown(kept: Tensor, parameter: Tensor, name: str) -> Tensor:
    """Return what is kept of a parameter in its shape and place, with 0 for entries that are new.

    Parameters
    ----------
    kept
        As many dimensions as the parameter, each at most as long.
    parameter
        As it is now.
    name
        The parameter's, for the error.

    Raises
    ------
    ValueError
        The parameter is smaller than it was, or another one.
    """
    if kept.shape == parameter.shape:
        return kept.to(parameter.device)
    if kept.ndim != parameter.ndim or any(
        old > new for old, new in zip(kept.shape, parameter.shape, strict=True)
    ):
        raise ValueError(
            f"{name} had the shape {tuple(kept.shape)} and has {tuple(parameter.shape)}: its "
            "importance for earlier tasks can be kept if it grows, not if it shrinks or is another"
        )
    result = torch.zeros_like(parameter, requires_grad=False)
    result[tuple(map(slice, kept.shape))] = kept.to(parameter.device)
    return result
