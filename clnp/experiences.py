"""What an experience of a stream tells about itself."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

MASKED = -1000.0
"""Logit of classes that a sub-network doesn't have; Avalanche masks with the same value."""


def task_labels(experience: Any) -> list[int]:
    """Distinct task labels of an experience; none where it has none."""
    found = getattr(experience, "task_labels", None)
    return [] if found is None else sorted({int(label) for label in found})


def class_labels(experience: Any) -> list[int]:
    """Class labels of an experience; none where it doesn't tell."""
    return [int(c) for c in getattr(experience, "classes_in_this_experience", None) or []]


def index_in_stream(experience: Any, fallback: int) -> int:
    """The experience's index in its stream."""
    # logging(): an experience in train mode masks its index.
    shown = experience.logging() if hasattr(experience, "logging") else experience
    return int(getattr(shown, "current_experience", fallback))


def distinct_labels(experience: Any) -> bool:
    """Whether each experience of the stream has one label that no other has."""
    stream = getattr(experience, "origin_stream", None)
    members = list(stream) if stream is not None else [experience]
    found = [task_labels(member) for member in members]
    return all(len(each) == 1 for each in found) and len({each[0] for each in found}) == len(found)


def widened(logits: Tensor, experience: Any) -> Tensor:
    """Logits with a column for each label of the experience."""
    missing = max(class_labels(experience), default=0) + 1 - logits.shape[1]
    return F.pad(logits, (0, missing), value=MASKED) if missing > 0 else logits
