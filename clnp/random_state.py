"""The state of all global generators that a training may draw from."""

import random
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import nn


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of the generators of Python, NumPy, torch, and torch on a device.

    It is made of numbers, texts, tensors, tuples and lists, so that it can be loaded from a file
    without unpickling anything else.
    """
    numpy: Any = np.random.get_state()  # noqa: NPY002, transforms draw from the global one
    kind, keys, *rest = numpy
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "device": None if device.type == "cpu" else _of_device(device).get_rng_state(*_at(device)),
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Go on from a :func:`random_state` of the same device."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type != "cpu":
        _of_device(device).set_rng_state(state["device"], *_at(device))


def forked(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context after which the CPU's generator and those of a model's GPUs are as before.

    Without naming devices torch forks those of all GPUs, and warns where there are several.
    """
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    fork: AbstractContextManager[None] = torch.random.fork_rng(devices=sorted(devices, key=str))
    return fork


def _of_device(device: torch.device) -> Any:
    return getattr(torch, device.type)


def _at(device: torch.device) -> tuple[torch.device, ...]:
    """Which one of several; torch.mps has one and takes no argument."""
    return () if device.type == "mps" else (device,)
