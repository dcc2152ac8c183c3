"""Learning without Forgetting: Avalanche's, with a teacher that is at rest and a state to save.

Li and Hoiem 2016 (arXiv 1606.09282): while a new task trains, the network is held to what it
answered before, on the new task's own inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from contextlib import nullcontext
from typing import Any

import torch.nn.functional as F
from avalanche.training import LearningWithoutForgetting
from avalanche.training.plugins import LwFPlugin as StockLwFPlugin
from torch import Tensor


class _Distillation(LearningWithoutForgetting):
    """Avalanche's loss, which takes neighbouring classes as a slice.

    An index made of a list has to be copied to a GPU, and the host waits for that, twice a step.
    """

    def _distillation_loss(
        self, out: Tensor, prev_out: Tensor, active_units: Collection[int]
    ) -> Tensor:
        classes = sorted(active_units)
        first, end = classes[0], classes[-1] + 1
        chosen = slice(first, end) if end - first == len(classes) else classes
        # Under autocast a teacher answers in bfloat16; the network's logits are float32 already.
        log_p, q = (
            soft(logits[:, chosen].float() / self.temperature, dim=1)
            for soft, logits in ((F.log_softmax, out), (F.softmax, prev_out))
        )
        return F.kl_div(log_p, q, reduction="batchmean")


class LwFPlugin(StockLwFPlugin):
    """Avalanche's plugin, mended in four places.

    The loss gets ``strength`` times the mean over the batch of KL(teacher || network), both
    softened by the temperature, over the classes of earlier tasks (eq. 2 and 3 of the paper, up to
    a number that does not depend on the network). The teacher is the network at the end of the
    last task.

    The stock teacher stays in training mode, so that dropout would disturb its answers, and batch
    norm's statistics would follow the new task's; here it is evaluated. It is made again from the
    model when a saved experiment goes on. It computes in the precision of a strategy on resident
    data. And no step waits for a GPU.

    Parameters
    ----------
    strength
        lambda_o of the paper.
    temperature
        T of the paper.

    Raises
    ------
    ValueError
        A strength below 0, or a temperature that isn't above.
    """

    def __init__(self, strength: float = 1.0, temperature: float = 2.0) -> None:
        if not strength >= 0:
            raise ValueError(f"strength is {strength}; it must be at least 0")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; it must be above 0")
        super().__init__()
        self.lwf = _Distillation(strength, temperature)

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Add the distance to the old answers, computed as the network's own."""
        with getattr(strategy, "arithmetic", nullcontext)():
            super().before_backward(strategy, **kwargs)

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """Make the teacher from the model if a saved experiment goes on."""
        if self.lwf.expcount and self.lwf.prev_model is None:
            self.lwf.prev_model = copy.deepcopy(strategy.model)
            self._rest()

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Take the network as it is now for the teacher."""
        super().after_training_exp(strategy, **kwargs)
        self._rest()

    def _rest(self) -> None:
        self.lwf.prev_model.eval().requires_grad_(False)

    def state_dict(self) -> dict[str, Any]:
        """Return what the model's own state doesn't hold; between tasks it is the teacher."""
        classes = self.lwf.prev_classes_by_task
        return {
            "learnt": self.lwf.expcount,
            "classes": {int(task): sorted(map(int, seen)) for task, seen in classes.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state, saved between tasks."""
        self.lwf.expcount = state["learnt"]
        self.lwf.prev_model = None
        self.lwf.prev_classes_by_task.clear()
        self.lwf.prev_classes_by_task.update({t: set(s) for t, s in state["classes"].items()})
