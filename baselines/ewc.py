"""Elastic weight consolidation (Kirkpatrick et al. 2017) and its online form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from baselines.fisher import Batch, Kind, diagonal_fisher, refuse_mixing
from baselines.growth import grown

Mode = Literal["summed", "online"]

CPU_PART = 2**17
"""Entries handled at once on a CPU."""
Pull = tuple[Tensor, Tensor, Tensor, Tensor]
"""A parameter's gradient, the parameter, its importance and its anchor."""


class EWCPlugin(SupervisedPlugin):
    """Keep parameters near the values of earlier tasks, the nearer the more these depend on them.

    While task k trains, the loss is the task's plus

    - "summed": lambda/2 · sum_{t<k} sum_i F_t,i (theta_i − theta*_t,i)² (Kirkpatrick et al. 2017,
      Eq. 3, with a term for each earlier task);
    - "online": lambda/2 · sum_i gamma · F~_i (theta_i − theta*_{k−1,i})², F~_t = gamma · F~_{t−1}
      + F_t (Schwarz et al. 2018, Sec. 4, where the penalty, too, has gamma),

    with theta*_t the parameters at the end of task t and F_t the diagonal of the Fisher information
    there, a mean over single samples of the task's own training data (`baselines.fisher`).

    A sum of parabolas is a parabola: up to a constant, the summed penalty is lambda/2 · sum_i S_i
    (theta_i − a_i)² with S = sum_t F_t and the anchor a = sum_t F_t theta*_t / S. So both forms
    keep two numbers a parameter, however many tasks there are. Its gradient lambda · S (theta − a)
    equals lambda · (sum_t F_t · theta − sum_t F_t theta*_t), but no digits cancel near the anchor.
    It is added to the parameters' gradients right before the optimizer's step: no graph, two passes
    over the parameters, and `strategy.loss` stays the task's own. So a plugin that clips gradients
    in ``after_backward`` clips the task's alone.

    The likelihood is the softmax of the model's outputs, whatever the strategy's criterion is.
    Parameters that came after a task (new heads, new rows of a growing head) have no importance for
    it. Those that a batch's loss does not reach (no gradient: other tasks' heads) stay where they
    are.

    Parameters
    ----------
    strength
        lambda, at least 0.
    fisher
        Whether F is the expectation over the labels that the model predicts, with their
        probabilities ("exact"), or over the true labels ("empirical").
    samples
        Training samples from which a task's F is estimated, drawn without replacement; None: all,
        as in van de Ven's code and Avalanche.
    mode
        Which of the two penalties.
    gamma
        How much of the old F~ remains, in [0, 1]; 1 in "summed".
    seed
        Task t's samples are drawn by (seed, t).

    Raises
    ------
    ValueError
        An argument out of its range.
    """

    def __init__(
        self,
        strength: float,
        fisher: Kind = "exact",
        samples: int | None = None,
        mode: Mode = "summed",
        gamma: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not strength >= 0:
            raise ValueError(f"strength is {strength}; it must be at least 0")
        if fisher not in get_args(Kind):
            raise ValueError(f"fisher is {fisher!r}; choose one of {', '.join(get_args(Kind))}")
        if samples is not None and samples < 1:
            raise ValueError(f"samples is {samples}; it must be at least 1, or None for all")
        if mode not in get_args(Mode):
            raise ValueError(f"mode is {mode!r}; choose one of {', '.join(get_args(Mode))}")
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma is {gamma}; it must be within [0, 1]")
        if mode == "summed" and gamma != 1:
            raise ValueError(f"gamma is {gamma}, but only the mode 'online' forgets old tasks")
        self.strength = strength
        self.fisher = fisher
        self.samples = samples
        self.mode = mode
        self.gamma = gamma
        self.seed = seed
        self.tasks = 0
        """How many tasks have been learnt."""
        self.importance: dict[str, Tensor] = {}
        """S or F~, by the parameter's name."""
        self.anchor: dict[str, Tensor] = {}
        """Where the penalty is least, by the parameter's name."""
        self._penalised: list[tuple[Tensor, Tensor, Tensor]] = []

    def state_dict(self) -> dict[str, Any]:
        """Return what the coming tasks need of the past ones: tensors, numbers and dicts."""
        return {
            "tasks": self.tasks,
            "importance": dict(self.importance),
            "anchor": dict(self.anchor),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a `state_dict`; its tensors go to the model's device when a task begins."""
        self.tasks = state["tasks"]
        self.importance = dict(state["importance"])
        self.anchor = dict(state["anchor"])

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """Find the parameters of earlier tasks in the model, which may have grown."""
        refuse_mixing(strategy.model)  # now, not once the task has been trained
        self._penalised = []
        for name, parameter in strategy.model.named_parameters():
            if name in self.importance:
                for kept in (self.importance, self.anchor):
                    kept[name] = grown(kept[name], parameter, name)
                if parameter.requires_grad:
                    self._penalised.append((parameter, self.importance[name], self.anchor[name]))

    @torch.no_grad()
    def before_update(self, _strategy: Any, **_: Any) -> None:
        """Add the penalty's gradient, lambda · S · (theta − a)."""
        reached = [
            (parameter.grad, parameter, importance, anchor)
            for parameter, importance, anchor in self._penalised
            if parameter.grad is not None
        ]
        if reached:
            add = _add_in_parts if reached[0][1].device.type == "cpu" else _add_at_once
            add(reached, self.strength * self.gamma)

    def after_training_exp(self, strategy: Any, **_: Any) -> None:
        """Take the task's F and theta* into the penalty."""
        # A stock loader draws a seed for its workers from the global generator.
        with self._samples_of(strategy) as batches, torch.random.fork_rng(devices=[]):
            fisher = diagonal_fisher(strategy.model, batches, self.fisher)
        for name, parameter in strategy.model.named_parameters():
            if name in fisher:
                self._consolidate(name, fisher[name], parameter.detach())
        self.tasks += 1
        self._penalised = []

    def _consolidate(self, name: str, fisher: Tensor, parameter: Tensor) -> None:
        old = self.importance.get(name)
        if old is None:
            self.importance[name], self.anchor[name] = fisher, parameter.clone()
        elif self.mode == "online":
            self.importance[name], self.anchor[name] = self.gamma * old + fisher, parameter.clone()
        else:
            total = old + fisher
            share = fisher / total.clamp_min(torch.finfo(total.dtype).tiny)
            self.importance[name] = total
            self.anchor[name] = torch.lerp(self.anchor[name], parameter, share)

    @contextmanager
    def _samples_of(self, strategy: Any) -> Iterator[Iterator[Batch]]:
        """Serve the chosen training samples as in evaluation (no augmentation), in small batches.

        The strategy's own loader for evaluation serves them, since only it knows how its data are
        stored; the strategy is left as it was.
        """
        dataset, loader = strategy.adapted_dataset, strategy.dataloader
        chosen = dataset
        if self.samples is not None and self.samples < len(dataset):
            generator = torch.Generator().manual_seed(self.seed * 1000 + self.tasks)
            order = torch.randperm(len(dataset), generator=generator)
            chosen = dataset.subset(order[: self.samples].sort().values.tolist())

        def batches() -> Iterator[Batch]:
            for batch in strategy.dataloader:
                values = [batch[i].to(strategy.device) for i in (0, 1, -1)]
                # What fits into memory in training fits here.
                yield from zip(*(v.split(strategy.train_mb_size) for v in values), strict=True)

        try:
            strategy.adapted_dataset = chosen.eval()
            strategy.make_eval_dataloader()
            yield batches()
        finally:
            strategy.adapted_dataset, strategy.dataloader = dataset, loader


def _add_at_once(reached: Sequence[Pull], strength: float) -> None:
    """Add strength · importance · (parameter − anchor) to the gradients, in few kernels."""
    gradients, parameters, importances, anchors = map(list, zip(*reached, strict=True))
    distances = torch._foreach_sub(parameters, anchors)
    torch._foreach_addcmul_(gradients, importances, distances, value=strength)


def _add_in_parts(reached: Sequence[Pull], strength: float) -> None:
    """Do the same in parts whose distances from the anchor stay in a CPU's cache."""
    for pull in reached:
        values = [torch.atleast_1d(value) for value in pull]
        rows = max(1, CPU_PART // max(1, values[0][:1].numel()))
        parts = (value.split(rows) for value in values)
        for gradient, parameter, importance, anchor in zip(*parts, strict=True):
            gradient.addcmul_(importance, parameter - anchor, value=strength)
