"""HAT: hard attention to the task (Serrà et al. 2018, arXiv 1801.01423).

Each task learns a gate for each hidden unit, by gradient descent on an embedding e of the task:
a = sigmoid(s·e), where s grows within each epoch until the gates are all but binary. Gradients of
weights between units that earlier tasks have open are withheld, and a regulariser asks a task to
open few units that no earlier one has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn

from baselines.experience import index_of
from clnp.random_state import seeded

EMBEDDING_LIMIT = 6.0
"""Embeddings stay within ± this."""
COSH_LIMIT = 50.0
"""s·e is clipped to ± this before its hyperbolic cosine is taken, which would overflow."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
TRANSPARENT = (
    *(nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Flatten),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
"""Modules f without parameters and with f(a·x) = a·f(x) for a gate a >= 0 of each unit, so that a
layer can be gated before them as well as after."""


def annealed(step: int, steps: int, smax: float) -> float:
    """Return the gates' slope s in a step of an epoch: from 1/smax to smax.

    Parameters
    ----------
    step
        From 0 to `steps` - 1.
    steps
        Of the epoch; if it is 1, s is smax.
    smax
        The largest slope, above 1.
    """
    if steps == 1:
        return smax
    return 1 / smax + (smax - 1 / smax) * step / (steps - 1)


def compensation(embedding: Tensor, s: float, smax: float) -> Tensor:
    """Return the factor of an embedding's gradient that undoes the annealing.

    Without it gates would hardly learn, since the slope s of a step is either so small that they
    don't matter or so large that they are saturated.

    Parameters
    ----------
    embedding : (units,)
        e.
    s
        The slope in the step.
    smax
        The largest slope.

    Returns
    -------
    Tensor (units,)
        smax/s · (cosh(s·e) + 1) / (cosh(e) + 1).
    """
    steep = torch.cosh((s * embedding).clamp_(-COSH_LIMIT, COSH_LIMIT)) + 1
    return steep.mul_(smax / s).div_(torch.cosh(embedding) + 1)


def prices(cumulative: Sequence[Tensor]) -> Tensor:
    """Return what it costs a task to open each unit, as a share of all that are free.

    Parameters
    ----------
    cumulative : (units,) each
        By layer: the largest attention of any earlier task, in [0, 1].

    Returns
    -------
    Tensor (units of all layers,)
        (1 - a) / sum(1 - a): the regulariser R is its product with the task's gates. All 0 if
        nothing is free.
    """
    free = 1 - torch.cat(list(cumulative))
    total = free.sum()
    return torch.where(total > 0, free / total, 0.0)


def gradient_factor(units: Tensor, read: Tensor | None, weight: Tensor) -> Tensor:
    """Return by how much the gradient of a layer's weights is multiplied.

    Parameters
    ----------
    units : (rows,)
        Cumulative attention of the layer's units, in [0, 1].
    read : (inputs,) or None
        That of the units that it reads; None: it reads the network's input. Behind a flatten each
        of them stands for a block of columns.
    weight : (rows, columns, ...)
        The layer's weights.

    Returns
    -------
    Tensor
        1 - min(a_i, a_j), of a shape that broadcasts to that of `weight`.
    """
    ones = (1,) * (weight.dim() - 2)
    rows = units.view(-1, 1, *ones)
    if read is None:
        return 1 - rows
    columns = read.repeat_interleave(weight.shape[1] // len(read))
    return 1 - torch.minimum(rows, columns.view(1, -1, *ones))


def find_chain(model: nn.Module) -> tuple[dict[str, nn.Linear | Convolution], nn.Linear]:
    """Return the hidden layers of a chain by name, in forward order, and its head.

    Parameters
    ----------
    model
        An nn.Sequential (of nn.Sequentials) of Linear and Conv layers with a Linear one last, and
        between them what treats each unit alike and scales with it (`TRANSPARENT`).

    Raises
    ------
    ValueError
        It is anything else; the message names the module.
    """
    leaves: dict[str, nn.Module] = {}

    def walk(name: str, module: nn.Module) -> None:
        if type(module) is not nn.Sequential:
            leaves[name] = module
            return
        for child, inner in module.named_children():
            walk(f"{name}.{child}" if name else child, inner)

    walk("", model)
    if "" in leaves:
        raise ValueError(
            f"HAT needs an nn.Sequential, since a unit must belong to one layer and be read by the "
            f"next; the model is a {type(model).__name__}."
        )
    layers: dict[str, nn.Linear | Convolution] = {}
    for name, module in leaves.items():
        known = isinstance(module, nn.Linear | Convolution) or type(module) in TRANSPARENT
        whole = not isinstance(module, CONVOLUTIONS) or module.groups == 1
        flat = not isinstance(module, nn.Flatten) or module.start_dim == 1
        if not (known and whole and flat):
            raise ValueError(
                f"HAT can't gate the units of {name} ({module}): it takes Linear and ungrouped "
                f"Conv layers with ReLU, pooling, dropout and flatten between them. Leave it out."
            )
        if isinstance(module, nn.Linear | Convolution):
            layers[name] = module
    last = next(reversed(leaves), "")
    if len(layers) < 2 or not isinstance(layers.get(last), nn.Linear):
        raise ValueError(
            "HAT needs a hidden layer and an nn.Linear last, which is the head of each task."
        )
    for (name, layer), (reader, by) in pairwise(layers.items()):
        if by.weight.shape[1] % layer.weight.shape[0]:
            raise ValueError(
                f"{reader} reads {by.weight.shape[1]} values, which is no multiple of the "
                f"{layer.weight.shape[0]} units of {name}: HAT can't tell which unit is which."
            )
    head = layers.pop(last)
    assert isinstance(head, nn.Linear)
    return layers, head


@dataclass
class LearntTask:
    """What a task needs at test time beside the shared weights."""

    gates: list[Tensor]
    """(units,) for each hidden layer."""
    head: list[Tensor]
    """Weight and, if there is one, bias of its own head."""


class HATPlugin(SupervisedPlugin):
    """Hard attention to the task, for a chain of Linear and Conv layers under any strategy.

    Make it before the optimizer: each hidden layer gets its embedding as a parameter named
    ``attention``, which the optimizer trains like any other. The model's last layer is the head
    of the task in training; the plugin keeps a head and the gates for each learnt task, and
    evaluates each experience with its own. An experience that has not been learnt yet is evaluated
    with what the model has.

    With `harden` a learnt task's gates are exactly 0 or 1 and nothing that it computes with can
    move: its logits are bitwise the same for ever under any optimizer that leaves alone what has
    no gradient. That excludes weight decay and an optimizer's state from earlier tasks (give
    ``reset_optimizer_state=True`` to ``strategy.train``); both are refused.

    Parameters
    ----------
    model
        See `find_chain`.
    smax
        Slope of the gates at the end of each epoch, above 1.
    lamb
        Weight c of the regulariser.
    harden
        Whether a learnt task's gates are rounded to 0 or 1, or left at sigmoid(smax·e) as in the
        authors' code. Not rounded, an optimizer that divides by the gradient's size, such as Adam,
        undoes the factors that protect earlier tasks.
    clip
        Largest norm of all gradients together; None: no clipping.
    dropout
        Share of the network's inputs, and of each hidden layer's units, dropped in training.
    seed
        Task k's embeddings, and its head if it is not the first, are drawn by (seed, k).

    Raises
    ------
    ValueError
        A model that is no such chain, or a value out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        smax: float = 400.0,
        lamb: float = 0.75,
        harden: bool = True,
        clip: float | None = 10_000.0,
        dropout: tuple[float, float] = (0.0, 0.0),
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, good, value in (
            ("smax", smax > 1, smax),
            ("lamb", lamb >= 0, lamb),
            ("clip", clip is None or clip > 0, clip),
            ("dropout", all(0 <= share < 1 for share in dropout), dropout),
        ):
            if not good:
                raise ValueError(f"{name} of HATPlugin is {value}: out of range.")
        self.smax = smax
        self.lamb = lamb
        self.harden = harden
        self.clip = clip
        self.dropout = dropout
        self.seed = seed
        self.tasks: dict[int, LearntTask] = {}
        """By the experience's index, in the order of training."""
        self.layers, self.head = find_chain(model)
        self.embeddings: list[nn.Parameter] = []
        """Of the task in training, or of the newest one; (units,) for each hidden layer."""
        for place, layer in enumerate(self.layers.values()):
            embedding = nn.Parameter(layer.weight.new_empty(layer.weight.shape[0]))
            layer.register_parameter("attention", embedding)
            self.embeddings.append(embedding)
            layer.register_forward_hook(self._hook(place))
        if dropout[0]:
            next(iter(self.layers.values())).register_forward_pre_hook(self._drop_inputs)
        self._draw_embeddings()
        self._gates = self._final_gates()
        self._s = smax
        self._step = self._steps = 0
        self._guarded: list[Tensor] = []
        self._factors: list[Tensor] = []
        self._prices = prices(self.cumulative())
        self._head_aside: list[Tensor] | None = None

    # --- what the network computes ----------------------------------------------------------------

    def _hook(self, place: int) -> Any:
        """Return the forward hook that gates a hidden layer, before its ReLU."""

        def gate(layer: nn.Module, _: Any, output: Tensor) -> Tensor:
            shape = (1, -1, *(1,) * (output.dim() - 2))
            # In the output's type, lest bfloat16 turn into float32 from here on.
            output = output * self._gates[place].to(output.dtype).view(shape)
            if self.dropout[1]:
                output = F.dropout(output, self.dropout[1], layer.training)
            return output

        return gate

    def _drop_inputs(self, layer: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return F.dropout(inputs[0], self.dropout[0], layer.training)

    @torch.no_grad()
    def _final_gates(self) -> list[Tensor]:
        """Return the gates that the embeddings stand for at test time."""
        if self.harden:
            return [(embedding > 0).to(embedding.dtype) for embedding in self.embeddings]
        return [torch.sigmoid(self.smax * embedding) for embedding in self.embeddings]

    def cumulative(self) -> list[Tensor]:
        """Return the largest attention of any learnt task, (units,) for each hidden layer."""
        total = [torch.zeros_like(embedding.data) for embedding in self.embeddings]
        for task in self.tasks.values():
            total = [torch.maximum(a, b) for a, b in zip(total, task.gates, strict=True)]
        return total

    # --- training ---------------------------------------------------------------------------------

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """Draw the task's embeddings and head, and work out what is withheld from it."""
        index = index_of(strategy.experience)
        if index in self.tasks:
            raise ValueError(f"HAT has learnt experience {index} already; it can't learn it again.")
        if self.tasks:
            _refuse_drift(strategy.optimizer)
            with seeded(self.head, self.seed * 1000 + len(self.tasks)):
                self.head.reset_parameters()
        self._draw_embeddings()
        self._withhold()

    @torch.no_grad()
    def _draw_embeddings(self) -> None:
        generator = torch.Generator().manual_seed(self.seed * 1000 + len(self.tasks))
        for embedding in self.embeddings:
            embedding.copy_(torch.randn(embedding.shape, generator=generator))

    def _withhold(self) -> None:
        """Work out the factors of gradients and the prices of units for the coming task."""
        attention = self.cumulative()
        self._prices = prices(attention)
        self._guarded, self._factors = [], []
        if not self.tasks:
            return
        read: Tensor | None = None
        for layer, units in zip(self.layers.values(), attention, strict=True):
            self._guarded.append(layer.weight)
            self._factors.append(gradient_factor(units, read, layer.weight.detach()))
            if layer.bias is not None:
                self._guarded.append(layer.bias)
                self._factors.append(1 - units)
            read = units

    def before_training_epoch(self, strategy: Any, **_: Any) -> None:
        """Start the annealing anew."""
        self._step, self._steps = 0, len(strategy.dataloader)

    def before_forward(self, _strategy: Any, **_: Any) -> None:
        """Compute the gates of the step."""
        self._s = annealed(self._step, self._steps, self.smax)
        self._step += 1
        self._gates = [torch.sigmoid(self._s * embedding) for embedding in self.embeddings]

    def before_backward(self, strategy: Any, **_: Any) -> None:
        """Add the regulariser, R times its weight, to the loss."""
        strategy.loss = strategy.loss + self.lamb * torch.dot(torch.cat(self._gates), self._prices)

    @torch.no_grad()
    def after_backward(self, strategy: Any, **_: Any) -> None:
        """Withhold gradients from what earlier tasks use, and compensate those of embeddings."""
        if self._guarded:
            pairs = zip(self._guarded, self._factors, strict=True)
            reached = [(p.grad, factor) for p, factor in pairs if p.grad is not None]
            if reached:  # all layers may be frozen by the user
                torch._foreach_mul_(*map(list, zip(*reached, strict=True)))
        for embedding in self.embeddings:
            assert embedding.grad is not None
            embedding.grad.mul_(compensation(embedding, self._s, self.smax))
        if self.clip is not None:
            nn.utils.clip_grad_norm_(strategy.model.parameters(), self.clip)

    @torch.no_grad()
    def after_update(self, _strategy: Any, **_: Any) -> None:
        """Keep embeddings where gates can still learn."""
        for embedding in self.embeddings:
            embedding.clamp_(-EMBEDDING_LIMIT, EMBEDDING_LIMIT)

    def training_state(self) -> dict[str, Any]:
        """Return the step of the epoch, which says how steep the gates are."""
        return {"step": self._step}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Go on from `training_state`."""
        self._step = state["step"]

    def after_training_exp(self, strategy: Any, **_: Any) -> None:
        """Keep the task's gates and its head."""
        self._gates = self._final_gates()
        self.tasks[index_of(strategy.experience)] = LearntTask(self._gates, self._head_copy())

    # --- evaluation -------------------------------------------------------------------------------

    def _head_copy(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.head.parameters()]

    @torch.no_grad()
    def _set_head(self, head: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.head.parameters(), head, strict=True):
            parameter.copy_(value)

    def before_eval(self, _strategy: Any, **_: Any) -> None:
        """Put aside the head that may be in training."""
        self._head_aside = self._head_copy()

    def before_eval_exp(self, strategy: Any, **_: Any) -> None:
        """Take the gates and the head of the experience's own task."""
        assert self._head_aside is not None
        task = self.tasks.get(index_of(strategy.experience)) or LearntTask(
            self._final_gates(), self._head_aside
        )
        self._gates = task.gates
        self._set_head(task.head)

    def after_eval(self, _strategy: Any, **_: Any) -> None:
        """Give the model back its head, and the newest task's gates."""
        assert self._head_aside is not None
        self._set_head(self._head_aside)
        self._head_aside = None
        self._gates = self._final_gates()

    # --- state and accounts -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the learnt tasks' gates and heads; weights and embeddings are the model's."""
        return {
            "tasks": [
                {"experience": index, "gates": list(task.gates), "head": list(task.head)}
                for index, task in self.tasks.items()
            ]
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a `state_dict`, after the model has taken up its own."""
        like = self.head.weight
        self.tasks = {
            task["experience"]: LearntTask(
                [gate.to(like) for gate in task["gates"]],
                [value.to(like) for value in task["head"]],
            )
            for task in state["tasks"]
        }
        self._gates = self._final_gates()

    def capacity(self) -> list[dict[str, Any]]:
        """Return how much of each layer is used, by task; a unit is used if its gate is above 1/2.

        Returns
        -------
        list of dict
            task, layer, used (units of any task so far), new (first used by this task), reused
            (used by an earlier task and this one), free, used_fraction.
        """
        rows = []
        total = [torch.zeros_like(e.data, dtype=torch.bool) for e in self.embeddings]
        for index, task in self.tasks.items():
            for place, (name, gate) in enumerate(zip(self.layers, task.gates, strict=True)):
                mine, before = gate > 0.5, total[place]
                total[place] = mine | before
                used, width = int(total[place].sum()), len(gate)
                rows.append(
                    {
                        "task": index,
                        "layer": name,
                        "used": used,
                        "new": used - int(before.sum()),
                        "reused": int((mine & before).sum()),
                        "free": width - used,
                        "used_fraction": used / width,
                    }
                )
        return rows


def own_rate(optimizer: torch.optim.Optimizer, embeddings: Sequence[Tensor], lr: float) -> None:
    """Move embeddings from an optimizer's first group into one of their own learning rate."""
    first = optimizer.param_groups[0]
    moved = {id(embedding) for embedding in embeddings}
    first["params"] = [p for p in first["params"] if id(p) not in moved]
    optimizer.add_param_group({"params": list(embeddings), "lr": lr})


def _refuse_drift(optimizer: torch.optim.Optimizer) -> None:
    """Refuse what moves parameters that have no gradient.

    Raises
    ------
    ValueError
        Weight decay, or averages of earlier gradients.
    """
    if any(group.get("weight_decay") for group in optimizer.param_groups):
        raise ValueError(
            "The optimizer has weight decay, which moves the weights of earlier tasks whatever "
            "HAT withholds: set weight_decay=0."
        )
    held = (v for state in optimizer.state.values() for v in state.values())
    if any(isinstance(v, Tensor) and math.prod(v.shape) > 1 for v in held):
        raise ValueError(
            "The optimizer goes on with averages of earlier gradients, which move the weights of "
            "earlier tasks whatever HAT withholds: give reset_optimizer_state=True to "
            "strategy.train."
        )
