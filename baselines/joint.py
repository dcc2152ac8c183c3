"""Joint training: all tasks at once, which no method of continual learning may do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from avalanche.benchmarks.utils.utils import concat_datasets
from avalanche.training.plugins import SupervisedPlugin


class JointPlugin(SupervisedPlugin):
    """Train on the data of all tasks, whichever experience is handed over.

    Parameters
    ----------
    experiences
        Those of the training stream.
    """

    def __init__(self, experiences: Sequence[Any]) -> None:
        super().__init__()
        self.experiences = experiences

    def after_train_dataset_adaptation(self, strategy: Any, **_: Any) -> None:
        """Put the data of all tasks in place of the experience's."""
        strategy.adapted_dataset = concat_datasets([e.dataset for e in self.experiences]).train()
