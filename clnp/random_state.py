"""The state of all global generators that a training may draw from."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Let a model draw by a seed, and leave torch's generators as they were.

    Those of the CPU and of the GPUs that hold its parameters; torch.manual_seed would touch all.
    """
    found = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(found, key=str)):
        torch.default_generator.manual_seed(seed)
        for device in found:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _of_device(device: torch.device) -> Any:
    return getattr(torch, device.type)


def _at(device: torch.device) -> tuple[torch.device, ...]:
    """Which one of several; torch.mps has one and takes no argument."""
    return () if device.type == "mps" else (device,)
