"""Experience replay: Avalanche's, with a memory that depends on seed and task alone.

Chaudhry et al. 2019 (arXiv 1902.10486): each batch of the new task is joined by one from a small
memory of images of earlier tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.training.plugins import ReplayPlugin

from baselines.experience import index_of


class ERPlugin(ReplayPlugin):
    """Avalanche's replay, whose memory can be made again.

    The memory holds as many samples of each learnt task, drawn from all of its training data
    alike, as fit. Which ones depends on the seed and the task alone, so that a saved experiment
    goes on with the same memory and needs to save no image.

    Parameters
    ----------
    experiences
        Those of the training stream.
    memory
        Samples in the memory, of all tasks together.
    seed
        Of the draws; torch's global generator is left alone.

    Raises
    ------
    ValueError
        No room for a sample of each experience; in training, an experience that isn't among them.
    """

    def __init__(self, experiences: Sequence[Any], memory: int = 2000, seed: int = 0) -> None:
        if memory < max(1, len(experiences)):
            raise ValueError(
                f"memory = {memory}; it must hold at least a sample of each of the "
                f"{len(experiences)} experiences"
            )
        super().__init__(mem_size=memory)
        self.experiences = {index_of(experience): experience for experience in experiences}
        """By index, which that in a part of the stream isn't."""
        self.seed = seed
        self.learnt: list[int] = []
        """Indices of the experiences in the memory, in the order in which they were learnt."""

    @property
    def buffer(self) -> AvalancheDataset[Any]:
        """The memory, task by task."""
        return self.storage_policy.buffer

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Let samples of the memory join the batches, by the strategy's own means if it has any."""
        if (index := index_of(strategy.experience)) not in self.experiences:
            raise ValueError(
                f"experience {index} is not among those that ERPlugin was given "
                f"({', '.join(map(str, self.experiences)) or 'none'}): give it the training stream"
            )
        join = getattr(strategy, "join_memory", None)
        if not self.learnt or (join and join(self.buffer, strategy.train_mb_size)):
            return
        super().before_training_exp(strategy, *args, **kwargs)

    def after_training_exp(self, strategy: Any, **_: Any) -> None:
        """Put samples of the experience into the memory."""
        self._remember(index_of(strategy.experience))

    def _remember(self, index: int) -> None:
        state = np.random.SeedSequence(self.seed, spawn_key=(index,)).generate_state(1)[0]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(state))
            self.storage_policy.post_adapt(None, self.experiences[index])
        self.learnt.append(index)

    def state_dict(self) -> dict[str, Any]:
        """Return what the memory can be made from."""
        return {"learnt": list(self.learnt)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make a state's memory."""
        fresh = ReplayPlugin(mem_size=self.mem_size)
        self.storage_policy, self.learnt = fresh.storage_policy, []
        for index in state["learnt"]:
            self._remember(index)
