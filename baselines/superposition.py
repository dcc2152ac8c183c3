"""Superposition of many models into one (Cheung et al. 2019, arXiv 1902.05522).

All tasks share one network. Each layer has a random *context* for each task, which turns what the
layer reads before its weights see it: y = W (o_k * x). For any other task's context the same
weights look like noise, so that one set of weights holds a network for each task, up to the noise.

`superpose` converts a model in place, `SuperpositionPlugin` tells it the task.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from baselines.experience import index_of

Kind = Literal["binary", "complex", "rotation"]
Product = Callable[[Tensor, Tensor], Tensor]

SHARED = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU)
"""Modules whose parameters all tasks share as they are, unless they have norms of their own."""

# -- contexts --------------------------------------------------------------------------------------


def _generator(seed: int, *purpose: int) -> torch.Generator:
    state = np.random.SeedSequence(seed, spawn_key=purpose).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def draw_context(kind: Kind, entries: int, generator: torch.Generator) -> Tensor:
    """Draw one task's context of a layer (Sec. 2 of the paper).

    Parameters
    ----------
    kind
        Of the context.
    entries
        Numbers n that a unit of the layer reads: its weights.
    generator
        On the CPU.

    Returns
    -------
    Tensor
        On the CPU. binary: (n,) int8, +1 or -1 with equal odds. complex: (2, n), real and imaginary
        part of exp(i phi), phi uniform in [-pi, pi). rotation: (n, n), orthogonal, with Haar's
        measure.
    """
    if kind == "binary":
        return torch.randint(0, 2, (entries,), generator=generator, dtype=torch.int8) * 2 - 1
    if kind == "complex":
        phase = (torch.rand(entries, generator=generator) * 2 - 1) * math.pi
        return torch.stack([phase.cos(), phase.sin()])
    q, r = torch.linalg.qr(torch.randn(entries, entries, generator=generator))
    # QR leaves the columns' signs to the library; with these ones Q has Haar's measure.
    rotation: Tensor = q * r.diagonal().sign()
    return rotation


def bind(kind: Kind, x: Tensor, context: Tensor) -> Tensor:
    """Turn vectors (..., n) by a binary context, o * x, or by a rotation, R x."""
    if kind == "binary":
        return x * context
    return F.linear(x, context)


def multiply(re: Tensor, im: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply complex vectors (..., n), given by their parts, by a complex context (2, n)."""
    a, b = context[0], context[1]
    return re * a - im * b, re * b + im * a


# -- layers ----------------------------------------------------------------------------------------


class Superposed(nn.Module):
    """What the layers share: their contexts, and which of them is in use.

    Complex vectors travel as batches of twice the size, all real parts before all imaginary ones,
    so that ReLU, pooling and whatever else works sample by sample treats the parts separately, as
    the source does.
    """

    weight: Tensor
    """Of complex layers the real part."""
    imaginary: Tensor
    bias: Any
    kind: Kind
    tasks: int
    task: int
    """Whose context is in use."""
    seeds: tuple[int, int]
    """The seed, and the layer's index: with the task's index they give its context."""
    contexts: Tensor | nn.ParameterList | None
    """A row (fixed) or a parameter (trained) a task; None for fixed rotations."""
    rotation: tuple[int, Tensor] | None
    """The fixed rotation made last, and its task."""

    def begin(self, kind: Kind, tasks: int, trained: bool, seeds: tuple[int, int]) -> None:
        """Draw the contexts, and the phases of complex weights."""
        self.kind, self.tasks, self.task, self.seeds = kind, tasks, 0, seeds
        self.contexts, self.rotation = None, None
        if trained:
            rows = (nn.Parameter(self.draw(task).to(self.weight.dtype)) for task in range(tasks))
            self.contexts = nn.ParameterList(rows)
        elif kind != "rotation":
            drawn = torch.stack([self.draw(task) for task in range(tasks)])
            del self.contexts
            self.register_buffer("contexts", drawn)
        if kind == "complex":
            phase = torch.rand(self.weight.shape, generator=_generator(*seeds)) * (2 * math.pi)
            phase = phase.to(self.weight)
            self.imaginary = nn.Parameter(self.weight.detach() * phase.sin())
            with torch.no_grad():
                self.weight.mul_(phase.cos())

    @property
    def entries(self) -> int:
        """Numbers that a unit reads; of a convolution: (in channels / groups) x kernel."""
        return self.weight[0].numel()

    def draw(self, task: int) -> Tensor:
        """Draw a task's context, the same whenever it is asked for."""
        context = draw_context(self.kind, self.entries, _generator(*self.seeds, task))
        return context.to(self.weight.device if self.kind == "binary" else self.weight)

    def context(self) -> Tensor:
        """Return the context in use."""
        if self.contexts is not None:
            return self.contexts[self.task]
        if self.rotation is None or self.rotation[0] != self.task:
            self.rotation = (self.task, self.draw(self.task))
        return self.rotation[1].to(self.weight)

    def fixed_numbers(self) -> int:
        """Numbers in the contexts of all tasks, unless they are trained (then they are parameters).

        Rotations count in full, although they are made from their seeds when they are needed.
        """
        if isinstance(self.contexts, nn.ParameterList):
            return 0
        return (
            self.tasks
            * self.entries
            * {"binary": 1, "complex": 2, "rotation": self.entries}[self.kind]
        )

    def complex_product(self, product: Product, x: Tensor, re: Tensor, im: Tensor) -> Tensor:
        """Return a product of complex x and weights (re, im); a bias is added to the real part."""
        a_re, a_im = product(x, re).chunk(2)
        b_re, b_im = product(x, im).chunk(2)
        real = a_re - b_im
        if self.bias is not None:
            real = real + self.bias.view(-1, *[1] * (self.weight.dim() - 2))
        return torch.cat([real, a_im + b_re])


class SuperposedLinear(Superposed, nn.Linear):
    """y = W (o_k * x): the context turns the input, which is the smaller factor."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute (..., out_features) from (..., in_features)."""
        context = self.context()
        if self.kind == "complex":
            re, im = x.chunk(2)
            x = torch.cat(multiply(re, im, context))
            return self.complex_product(F.linear, x, self.weight, self.imaginary)
        return F.linear(bind(self.kind, x, context), self.weight, self.bias)


class _SuperposedConv(Superposed):
    """The context turns each patch that a unit reads, or, which is the same and less, the weights.

    A number for each (input channel, place in the kernel), the same for all units and groups.
    """

    _conv_forward: Any

    def forward(self, x: Tensor) -> Tensor:
        """Convolve as the plain layer does."""
        context, shape = self.context(), self.weight.shape
        weight = self.weight.flatten(1)
        if self.kind == "complex":
            re, im = multiply(weight, self.imaginary.flatten(1), context)
            return self.complex_product(self.convolve, x, re.view(shape), im.view(shape))
        # W (R p) = (W R) p, and R acts on the rows of W from the right.
        context = context.T if self.kind == "rotation" else context
        return self.convolve(x, bind(self.kind, weight, context).view(shape), self.bias)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Convolve with other weights, with the layer's stride, padding and groups."""
        result: Tensor = self._conv_forward(x, weight, bias)
        return result


class SuperposedConv1d(_SuperposedConv, nn.Conv1d):
    """See `_SuperposedConv`."""


class SuperposedConv2d(_SuperposedConv, nn.Conv2d):
    """See `_SuperposedConv`."""


class SuperposedConv3d(_SuperposedConv, nn.Conv3d):
    """See `_SuperposedConv`."""


LAYERS: dict[type[nn.Module], type[Superposed]] = {
    nn.Linear: SuperposedLinear,
    nn.Conv1d: SuperposedConv1d,
    nn.Conv2d: SuperposedConv2d,
    nn.Conv3d: SuperposedConv3d,
}


class OwnNorms(nn.Module):
    """A norm for each task: no context turns the statistics of one task into noise for another.

    Parameters
    ----------
    norm
        Every task's starts as a copy of it.
    tasks
        Their number.
    """

    def __init__(self, norm: nn.Module, tasks: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(copy.deepcopy(norm) for _ in range(tasks))
        self.task = 0
        """Whose norm is in use."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the task's norm."""
        y: Tensor = self.norms[self.task](x)
        return y


# -- models ----------------------------------------------------------------------------------------


def superpose(
    model: nn.Module,
    tasks: int,
    kind: Kind = "binary",
    *,
    trained: bool = False,
    gain: float = 1.0,
    bias: bool = False,
    normalise: bool = True,
    own_norms: bool = False,
    seed: int = 0,
) -> nn.Module:
    """Give every Linear and Conv layer of a model a context for each task, in place.

    Input and output layers included. Layers keep their names, weights and hooks. Make the optimizer
    afterwards: biases go, and parameters are added.

    Parameters
    ----------
    model
        Of Linear and Conv layers, norms, and anything without parameters.
        With complex contexts it must treat each sample by itself.
    tasks
        Number of contexts.
    kind
        binary: random signs. complex: phases; weights become complex, each real weight w turned
        into w exp(i phi) by a random phase, as in the source (so that the sum of squares, and with
        it the size of all activations, stays what the model's own initialisation made it), and
        logits are the real part. rotation: orthogonal matrices.
    trained
        Whether contexts are trained, each by its own task; they start as drawn, and move freely
        (complex ones don't stay at length 1, nor rotations orthogonal), as in the source.
    gain
        Factor on the weights that the model has drawn. The source draws by Xavier's rule, variance
        2 / (inputs + outputs); torch's own layers by 1 / (3 inputs), which a gain of 3 ** 0.5 makes
        the same for layers of equal widths.
    bias
        Whether layers keep their bias, one for all tasks. The source's binary layers make one, but
        never add it.
    normalise
        Whether inputs are shifted and scaled to mean 0 and deviation 1 by two fixed numbers, which
        the plugin measures on the first task's training data.
    own_norms
        Whether each task has batch and instance norms of its own; else all tasks share them.
    seed
        Of contexts and phases; torch's global generator is left alone.

    Returns
    -------
    nn.Module
        The model.

    Raises
    ------
    ValueError
        Impossible arguments, no layer to superpose, or one whose parameters it can't.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind {kind!r} is unknown: choose one of {', '.join(get_args(Kind))}")
    if tasks < 1:
        raise ValueError(f"tasks = {tasks}; there must be at least one")
    if unknown := list(_refused(model)):
        raise ValueError(
            "superposition has no context for "
            + ", ".join(f"{name or 'the model'} ({type(m).__name__})" for name, m in unknown)
            + ": use plain Linear and Conv1d/2d/3d layers, of a model not superposed before"
        )
    mixing = [name for name, m in model.named_modules() if isinstance(m, _BatchNorm)]
    if kind == "complex" and mixing:
        raise ValueError(
            f"with complex contexts {', '.join(mixing)} (batch norm) would take real and imaginary "
            "parts for samples of one batch: use binary contexts or rotations"
        )
    layers = [module for module in model.modules() if type(module) in LAYERS]
    if not layers:
        raise ValueError("the model has no Linear or Conv layer to superpose")
    for index, layer in enumerate(layers):
        # As torch's parametrize and lazy modules do: the layer stays the same object.
        layer.__class__ = LAYERS[type(layer)]
        assert isinstance(layer, Superposed)
        if not bias:
            layer.bias = None
        with torch.no_grad():
            layer.weight.mul_(gain)
        layer.begin(kind, tasks, trained, (seed, index))
    if own_norms:
        made: dict[nn.Module, OwnNorms] = {}  # a norm in several places stays one
        for parent in list(model.modules()):
            for name, norm in parent._modules.items():
                if isinstance(norm, _NormBase):
                    made.setdefault(norm, OwnNorms(norm, tasks))
                    setattr(parent, name, made[norm])
    if normalise:
        parameter = next(model.parameters())
        model.register_buffer("input_mean", parameter.new_zeros(()))
        model.register_buffer("input_deviation", parameter.new_ones(()))
        model.register_forward_pre_hook(_normalise)
    if kind == "complex":
        model.register_forward_pre_hook(_add_imaginary_part)
        model.register_forward_hook(_real_part)
    return model


def superposed_layers(model: nn.Module) -> list[Superposed]:
    """Return the superposed layers of a model."""
    return [module for module in model.modules() if isinstance(module, Superposed)]


def _refused(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        known = type(module) in LAYERS or isinstance(module, SHARED)
        if not known and next(module.parameters(recurse=False), None) is not None:
            yield name, module


def _normalise(model: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return ((args[0] - model.input_mean) / model.input_deviation, *args[1:])


def _add_imaginary_part(_model: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (torch.cat([args[0], torch.zeros_like(args[0])]), *args[1:])


def _real_part(_model: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output.chunk(2)[0]


# -- plugin ----------------------------------------------------------------------------------------


class SuperpositionPlugin(SupervisedPlugin):
    """Tell a superposed model which task's context to use.

    In training that of the experience, by its index in its stream; in evaluation that of each
    experience, or the newest one for an experience that has not been learnt.

    Parameters
    ----------
    model
        The strategy's, from `superpose`.

    Raises
    ------
    ValueError
        If the model is not superposed; in training, if its layers have been replaced or there is no
        context for the experience.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not superposed_layers(model):
            raise ValueError("the model has no superposed layer: pass it to superpose() first")
        self.model = model
        self.begun: list[int] = []
        """The tasks whose contexts have been trained with, the newest one last."""
        self._in_training = 0

    def select(self, task: int) -> None:
        """Put a task's contexts to use."""
        for module in self.model.modules():
            if isinstance(module, Superposed | OwnNorms):
                module.task = task

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """Take the task's contexts; measure the first task's inputs."""
        task = index_of(strategy.experience)
        self._check(strategy, task)
        if not self.begun and hasattr(self.model, "input_mean"):
            self._measure(strategy)
        self.begun = [other for other in self.begun if other != task] + [task]
        self.select(task)

    def before_eval(self, strategy: Any, **_: Any) -> None:
        """Remember the task that may be in training."""
        self._in_training = superposed_layers(self.model)[0].task

    def before_eval_exp(self, strategy: Any, **_: Any) -> None:
        """Take the contexts of the experience's own task."""
        task = index_of(strategy.experience)
        if task not in self.begun:
            task = self.begun[-1] if self.begun else 0
        self.select(task)

    def after_eval(self, strategy: Any, **_: Any) -> None:
        """Go back to the contexts from before the evaluation."""
        self.select(self._in_training)

    def state_dict(self) -> dict[str, Any]:
        """Return what the model's own state doesn't hold."""
        return {"begun": list(self.begun)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state, and use the newest task's contexts."""
        self.begun = list(state["begun"])
        if self.begun:
            self.select(self.begun[-1])

    def _check(self, strategy: Any, task: int) -> None:
        if strategy.model is not self.model:
            raise ValueError("the strategy's model is not the one given to SuperpositionPlugin")
        plain = [name for name, m in self.model.named_modules() if type(m) in LAYERS]
        if plain:
            raise ValueError(
                f"{', '.join(plain)}: made after superpose(), so without contexts; use a model "
                "whose layers stay, with a single head"
            )
        tasks = superposed_layers(self.model)[0].tasks
        if task >= tasks:
            raise ValueError(
                f"experience {task} has no context: the model was superposed for {tasks} tasks; "
                "pass more to superpose()"
            )

    def _measure(self, strategy: Any) -> None:
        """Set the model's normalisation to the mean and deviation of the training data."""
        kept = self.model.get_buffer("input_mean"), self.model.get_buffer("input_deviation")
        sums, count = torch.zeros(2, dtype=torch.float64, device=kept[0].device), 0
        for x in _inputs(strategy):
            x = x.to(sums)
            sums += torch.stack([x.sum(), x.square().sum()])
            count += x.numel()
        mean, square = (sums / count).tolist()
        deviation = math.sqrt(max(square - mean**2, 0.0))
        if deviation == 0:
            raise ValueError(f"all inputs are {mean}: they can't be normalised")
        kept[0].fill_(mean)
        kept[1].fill_(deviation)


def _inputs(strategy: Any) -> Iterator[Tensor]:
    """The inputs of the training data, in order, by the strategy's own loader for evaluation."""
    kept = strategy.dataloader
    # A stock loader draws a seed from the global generator, even if it shuffles nothing.
    with torch.random.fork_rng(devices=[]):
        strategy.make_eval_dataloader()
        try:
            for batch in strategy.dataloader:
                yield batch[0]
        finally:
            strategy.dataloader = kept
