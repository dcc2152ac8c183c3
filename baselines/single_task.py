"""Single-task training: a fresh network for each task. What each task could reach by itself."""

from __future__ import annotations

from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn

from baselines.experience import index_of
from clnp.random_state import seeded

Weights = dict[str, Tensor]


def reinitialise(model: nn.Module, seed: int) -> None:
    """Draw all weights of a model anew, in place, by each module's own ``reset_parameters``.

    Parameters
    ----------
    model
        Its parameters keep their identity, so that an optimizer goes on holding them.
    seed
        Of the draw; torch's global generator is left as it was.
    """
    with seeded(model, seed):
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()


def copy_weights(model: nn.Module) -> Weights:
    """Return a copy of a model's parameters and buffers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


class SingleTaskPlugin(SupervisedPlugin):
    """Train a network a task, and evaluate each experience on the network of its own task.

    The first task trains the network as it is given, so that it starts from the same weights as
    every other method with that seed. An experience that has not been learnt yet is evaluated on
    the newest network. Give ``reset_optimizer_state=True`` to ``strategy.train``.

    Parameters
    ----------
    seed
        The network of a task that comes after k others is drawn by (seed, k).

    Raises
    ------
    ValueError
        In training, if the model is not of the size that it had for earlier tasks.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.networks: dict[int, Weights] = {}
        """The weights of each task's network, by the experience's index."""
        self._in_training: Weights | None = None

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """Start the task with a fresh network."""
        for weights in self.networks.values():
            if _shapes(weights) != _shapes(strategy.model.state_dict()):
                raise ValueError(
                    "the model has grown since an earlier task, whose network it can't be again: "
                    "give it all of its heads and outputs before the first one"
                )
        if self.networks:
            reinitialise(strategy.model, self.seed * 1000 + len(self.networks))

    def after_training_exp(self, strategy: Any, **_: Any) -> None:
        """Keep the task's network."""
        self.networks[index_of(strategy.experience)] = copy_weights(strategy.model)

    def before_eval(self, strategy: Any, **_: Any) -> None:
        """Put aside the weights that may be in training."""
        self._in_training = copy_weights(strategy.model)

    def before_eval_exp(self, strategy: Any, **_: Any) -> None:
        """Give the model the weights of the experience's own network."""
        weights = self.networks.get(index_of(strategy.experience), self._in_training)
        if weights is not None:
            strategy.model.load_state_dict(weights)

    def after_eval(self, strategy: Any, **_: Any) -> None:
        """Give the model back the weights that it had before the evaluation."""
        if self._in_training is not None:
            strategy.model.load_state_dict(self._in_training)
        self._in_training = None


def _shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in weights.items()}
