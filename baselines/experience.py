"""What several baselines ask of an Avalanche experience."""

from __future__ import annotations

from typing import Any


def index_of(experience: Any) -> int:
    """Return an experience's index in its stream, in training too, where Avalanche hides it."""
    return int(experience.logging().current_experience)
