"""Synaptic Intelligence (Zenke, Poole, Ganguli 2017, arXiv 1703.04200)."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from baselines.growth import grown


class SIPlugin(SupervisedPlugin):
    """Hold each weight back in proportion to what its path has done for the loss of past tasks.

    While a task trains, omega = sum over steps of -g * (theta' - theta), with g the gradient of
    the *task's* loss alone and theta' - theta the optimizer's real step (eq. 3 of the source). At
    its end

        Omega <- relu(Omega + omega / ((theta_start - theta_end)**2 + xi))          (eq. 5)

    with the relu of the authors' code (pathint's `PATH_INT_PROTOCOL`): a path that has raised the
    task's loss takes importance away, down to none. Later tasks train on loss + strength *
    sum Omega * (theta - theta*)**2 (eq. 4), theta* being the weights at the end of the last task.

    The penalty's gradient, 2 * strength * Omega * (theta - theta*), is added to the task's before
    the optimizer's step, so that it costs no backward pass, and `strategy.loss` stays the task's
    loss. What changes gradients before this plugin does (clipping by a plugin ahead of it) counts
    as the task's gradient.

    All trainable parameters are taken, heads and biases too, as in the source. A head that a task
    doesn't use gets no gradient, and so neither importance nor a step. A parameter that has grown
    keeps its importance in front.

    Parameters
    ----------
    strength
        c, at least 0.
    xi
        Damping, above 0: it bounds the importance of weights that hardly moved.

    Raises
    ------
    ValueError
        If a value is out of its range.
    """

    def __init__(self, strength: float = 0.1, xi: float = 0.1) -> None:
        super().__init__()
        if not strength >= 0:
            raise ValueError(f"strength is {strength}; it must be at least 0")
        if not xi > 0:
            raise ValueError(f"xi is {xi}; it must be above 0")
        self.strength = strength
        self.xi = xi
        self.importance: dict[str, Tensor] = {}
        """Omega by the parameter's name, in its shape; empty before the first task's end."""
        # All lists below are by parameter, in the order of `_names`, and live while a task trains.
        self._names: list[str] = []
        self._parameters: list[Tensor] = []
        self._start: list[Tensor] = []
        self._moved: list[Tensor] = []  # theta - theta_start
        self._path: list[Tensor] = []  # omega
        self._pull: list[Tensor] = []  # 2 * strength * Omega
        self._stepping: list[int] = []  # which of them the running step has gradients for
        self._gradients: list[Tensor] = []  # of the task's loss, by `_stepping`

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """Start a path. theta* is where it starts, since nothing trains between tasks."""
        trained = [(n, p) for n, p in strategy.model.named_parameters() if p.requires_grad]
        self._names = [name for name, _ in trained]
        self._parameters = [parameter.detach() for _, parameter in trained]
        self._start = [parameter.clone() for parameter in self._parameters]
        self._moved = [torch.zeros_like(parameter) for parameter in self._parameters]
        self._path = [torch.zeros_like(parameter) for parameter in self._parameters]
        self._pull = []
        if self.importance:
            for name, parameter in zip(self._names, self._parameters, strict=True):
                self._pull.append(2 * self.strength * self._kept(name, parameter))

    @torch.no_grad()
    def before_update(self, strategy: Any, **_: Any) -> None:
        """Keep the task's gradient, and give the optimizer that of the penalty as well."""
        live = dict(strategy.model.named_parameters())
        stepping = [i for i, name in enumerate(self._names) if live[name].grad is not None]
        self._stepping = stepping
        self._gradients = [live[self._names[i]].grad for i in stepping]
        if self._pull and stepping:
            # New tensors, not in place: the task's own gradients are needed after the step.
            total = torch._foreach_addcmul(
                self._gradients, _of(self._pull, stepping), _of(self._moved, stepping)
            )
            for i, gradient in zip(stepping, total, strict=True):
                live[self._names[i]].grad = gradient

    @torch.no_grad()
    def after_update(self, strategy: Any, **_: Any) -> None:
        """Add the step to the path."""
        if not self._stepping:
            return
        parameters, start, before, path = (
            _of(values, self._stepping)
            for values in (self._parameters, self._start, self._moved, self._path)
        )
        after = torch._foreach_sub(parameters, start)
        torch._foreach_sub_(before, after)  # minus the step
        torch._foreach_addcmul_(path, self._gradients, before)
        for i, moved in zip(self._stepping, after, strict=True):
            self._moved[i] = moved

    @torch.no_grad()
    def after_training_exp(self, strategy: Any, **_: Any) -> None:
        """Turn the path into importance."""
        for name, parameter, moved, path in zip(
            self._names, self._parameters, self._moved, self._path, strict=True
        ):
            before = self._kept(name, parameter)
            self.importance[name] = torch.relu(before + path / (moved.square() + self.xi))
        self._names, self._stepping = [], []
        for values in (self._parameters, self._start, self._moved, self._path, self._pull):
            values.clear()
        self._gradients.clear()

    def _kept(self, name: str, parameter: Tensor) -> Tensor:
        """Return Omega of a parameter: 0 for what is new."""
        kept = self.importance.get(name)
        return torch.zeros_like(parameter) if kept is None else grown(kept, parameter, name)

    def training_state(self) -> dict[str, Any]:
        """Return what a task in training has gathered: omega by name. The rest is the model's."""
        return {"path": dict(zip(self._names, self._path, strict=True))}

    @torch.no_grad()
    def load_training_state(self, state: dict[str, Any]) -> None:
        """Go on from `training_state`, after the model: the path began where the task did."""
        for name, path in zip(self._names, self._path, strict=True):
            path.copy_(state["path"][name])
        self._moved = list(torch._foreach_sub(self._parameters, self._start))

    def state_dict(self) -> dict[str, Any]:
        """Return what later tasks need besides the model: Omega by name."""
        return {"importance": dict(self.importance)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.importance = dict(state["importance"])


def _of(values: list[Tensor], chosen: list[int]) -> list[Tensor]:
    return [values[i] for i in chosen]
