"""The diagonal of a classifier's Fisher information, from the gradients of single samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from avalanche.models.utils import avalanche_forward, is_multi_task_module
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.batchnorm import _BatchNorm

Kind = Literal["exact", "empirical"]
Batch = tuple[Tensor, Tensor, Tensor]

BUDGET = 2**24
"""Numbers that gradients of single samples may take at a time (64 MB in float32)."""

LINEAR = (nn.Linear,)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class _Call:
    """What a layer read and gave in one forward pass."""

    layer: nn.Module
    x: Tensor
    out: Tensor


def diagonal_fisher(
    model: nn.Module, batches: Iterable[Batch], kind: Kind = "exact"
) -> dict[str, Tensor]:
    """Estimate the diagonal of the Fisher information, in eval mode and without autocast.

    With p(c|x) the softmax of the model's outputs, for each parameter theta,

    - "exact": F = mean over samples of sum_c p(c|x) (d log p(c|x) / d theta)², the expectation over
      the model's own predictions;
    - "empirical": F = mean over samples of (d log p(y|x) / d theta)², with the true labels y.

    Weights and biases of Linear, Conv1d and Conv2d layers that a forward pass uses once have a
    closed form; for all others `torch.func.vmap` differentiates each sample.

    Parameters
    ----------
    model
        Its outputs are logits (N, C), each computed from its own sample alone. Samples are the
        first dimension of what a layer reads. Parameters without ``requires_grad`` are left out.
    batches
        Inputs (N, ...), labels (N,) int64 and task labels (N,), on the model's device. As large
        batches as fit into memory with their graph.
    kind
        Over which labels the expectation is.

    Returns
    -------
    dict of str to Tensor
        By the parameter's name, in its shape and type; 0 where the outputs do not depend on it, as
        on heads of other tasks.

    Raises
    ------
    ValueError
        If there are no samples, outputs are no logits (N, C), no parameter has an effect on them,
        or a layer of `refuse_mixing`.

    Notes
    -----
    "exact" and "empirical" are the terms of van de Ven (2025), "On the computation of the Fisher
    information in continual learning".
    """
    total = {
        name: torch.zeros_like(p, memory_format=torch.contiguous_format)
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    count = 0
    with _evaluating(model):
        for x, y, labels in batches:
            for task in labels.unique().tolist():
                chosen = (labels == task).nonzero().squeeze(1)
                _add_squares(model, x[chosen], y[chosen], task, kind, total)
            count += len(x)
    if count == 0:
        raise ValueError("No samples to estimate the Fisher information from.")
    return {name: value.div_(count) for name, value in total.items()}


def refuse_mixing(model: nn.Module) -> None:
    """Refuse layers through which single samples have no gradient that can be computed.

    Raises
    ------
    ValueError
        Batch norm without running statistics mixes the samples; torch can't batch the gradients of
        its recurrent layers, unless these are frozen.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"{name} is batch norm without running statistics: outputs depend on other samples "
                "of the batch, so that single samples have no gradient. Give it running statistics."
            )
        if isinstance(module, nn.RNNBase) and any(p.requires_grad for p in module.parameters()):
            raise ValueError(
                f"{name} is a {type(module).__name__}: torch.func.vmap, which gives the gradients "
                "of single samples, has no rule for torch's recurrent layers. Build it from cells "
                f"(nn.{type(module).__name__}Cell)."
            )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, in its own precision and with gradients; then all back."""
    refuse_mixing(model)
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device.type
    model.eval()
    try:
        with torch.enable_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _add_squares(
    model: nn.Module, x: Tensor, y: Tensor, task: int, kind: Kind, total: dict[str, Tensor]
) -> None:
    """Add a batch's squared gradients of log-likelihoods, summed over samples, to `total`."""
    calls: list[_Call] = []
    with _recording(model, calls):
        logits = avalanche_forward(model, x, torch.full((len(x),), task, device=x.device))
    if logits.ndim != 2 or len(logits) != len(x):
        raise ValueError(
            f"The model gives outputs {tuple(logits.shape)} for {len(x)} samples; the Fisher "
            "information is that of a classifier with logits (N, C)."
        )
    uses = _uses(logits)
    if total and not any(uses[id(p)] for p in model.parameters()):
        raise ValueError("No parameter of the model has a gradient from its outputs.")
    directions = list(_directions(logits.detach(), y, kind))

    times = Counter(id(call.layer) for call in calls)
    closed: set[str] = set()
    layers: list[tuple[_Call, str | None, str | None]] = []
    names = {id(p): name for name, p in model.named_parameters() if name in total}
    for call in calls:
        weight, bias = (
            names[id(p)]
            if p is not None
            and id(p) in names
            and uses[id(p)] == times[id(call.layer)] == 1
            and len(call.x) == len(x)
            else None
            for p in (call.layer._parameters.get(key) for key in ("weight", "bias"))
        )
        if weight or bias:
            layers.append((call, weight, bias))
            closed.update(name for name in (weight, bias) if name)

    _add_closed(logits, directions, layers, total)
    rest = [name for key, name in names.items() if uses[key] and name not in closed]
    if rest:
        _add_vmapped(model, rest, x, directions, task, total)


def _directions(logits: Tensor, y: Tensor, kind: Kind) -> Iterator[Tensor]:
    """Yield (N, C) derivatives by the logits whose squares add up to the Fisher information."""
    p = logits.softmax(1)
    identity = torch.eye(logits.shape[1], dtype=p.dtype, device=p.device)
    if kind == "empirical":
        yield identity[y] - p
    else:
        for label, probability in enumerate(p.unbind(1)):
            yield probability.sqrt().unsqueeze(1) * (identity[label] - p)


@contextmanager
def _recording(model: nn.Module, calls: list[_Call]) -> Iterator[None]:
    """Note what each layer with a closed form reads and gives."""

    def note(
        layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], out: Tensor
    ) -> Tensor:
        (x,) = (*inputs, *named.values())
        calls.append(_Call(layer, x.detach(), out))
        # What comes next may work in place; `out` stays the layer's own output.
        return out.clone()

    # By exact type: a subclass may compute something else.
    hooks = [
        module.register_forward_hook(note, with_kwargs=True)
        for module in model.modules()
        if type(module) in LINEAR + CONVOLUTIONS
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _uses(output: Tensor) -> Counter[int]:
    """Count how often each parameter is used in computing an output, by the parameter's id."""
    counts: Counter[int] = Counter()
    stack = [output.grad_fn] if output.grad_fn is not None else []
    seen = set(stack)
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None:
                continue
            if hasattr(node, "variable"):  # where gradients of a leaf are collected
                counts[id(node.variable)] += 1
            elif node not in seen:
                seen.add(node)
                stack.append(node)
    return counts


def _add_closed(
    logits: Tensor,
    directions: Sequence[Tensor],
    layers: Sequence[tuple[_Call, str | None, str | None]],
    total: dict[str, Tensor],
) -> None:
    """Add squared gradients of layers with a closed form.

    Where a layer reads one vector x a sample, and g is the derivative by what it gives, the
    gradient is g xᵀ, its square (g∘g)(x∘x)ᵀ, and the sum over directions needs the sum of g∘g
    alone. At several positions gradients add up before they are squared.
    """
    if not layers:
        return
    outputs = [call.out for call, _, _ in layers]
    squares: list[Tensor | int] = [0] * len(layers)
    for direction in directions:
        slopes = torch.autograd.grad(logits, outputs, direction, retain_graph=True)
        for i, ((call, weight, bias), g) in enumerate(zip(layers, slopes, strict=True)):
            if type(call.layer) in LINEAR and g.ndim == 2:
                squares[i] = squares[i] + g.square()
            else:
                _add_positions(call, g, weight, bias, total)
    for (call, weight, bias), square in zip(layers, squares, strict=True):
        if isinstance(square, Tensor):
            if weight:
                total[weight].addmm_(square.T, call.x.square())
            if bias:
                total[bias].add_(square.sum(0))


def _add_positions(
    call: _Call, g: Tensor, weight: str | None, bias: str | None, total: dict[str, Tensor]
) -> None:
    """Add a direction's squared gradients of a layer with a sum over positions, in chunks."""
    layer = call.layer
    channel = 1 if type(layer) in CONVOLUTIONS else -1
    if bias:
        total[bias].add_(g.movedim(channel, 1).flatten(2).sum(2).square().sum(0))
    if not weight:
        return
    size = total[weight].numel()
    width = max(1, BUDGET // size)
    for x_part, g_part in zip(call.x.split(width), g.split(width), strict=True):
        columns = _columns(layer, x_part)
        slopes = g_part.movedim(channel, 1).flatten(2)
        groups = columns.shape[1]
        slopes = slopes.unflatten(1, (groups, -1))
        gradients = slopes @ columns.transpose(2, 3)  # N, groups, outputs, inputs of a group
        total[weight].add_(gradients.square_().sum(0).view_as(total[weight]))


def _columns(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what a layer's weights read, (N, groups, inputs of a group, positions)."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        return x.flatten(1, -2).transpose(1, 2).unsqueeze(1)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    kernel, dilation, stride = layer.kernel_size, layer.dilation, layer.stride
    if isinstance(layer, nn.Conv1d):
        x, kernel, dilation, stride = x.unsqueeze(2), (1, *kernel), (1, *dilation), (1, *stride)
    columns = F.unfold(x, kernel, dilation=dilation, stride=stride)
    groups: Tensor = columns.unflatten(1, (layer.groups, -1))
    return groups


def _add_vmapped(
    model: nn.Module,
    names: Sequence[str],
    x: Tensor,
    directions: Sequence[Tensor],
    task: int,
    total: dict[str, Tensor],
) -> None:
    """Add squared gradients of the named parameters, each sample differentiated by torch.func."""
    fixed = {name: p.detach() for name, p in model.named_parameters()}
    chosen = {name: fixed.pop(name) for name in names}

    def along(parameters: dict[str, Tensor], sample: Tensor, direction: Tensor) -> Tensor:
        inputs = (sample.unsqueeze(0), task)[: 1 + is_multi_task_module(model)]
        logits: Tensor = functional_call(model, {**fixed, **parameters}, inputs).squeeze(0)
        # Given a number as the task, Avalanche does not fill up the outputs of a narrower head.
        return logits @ direction[: len(logits)]

    gradients = vmap(grad(along), in_dims=(None, 0, 0))
    width = max(1, BUDGET // sum(value.numel() for value in chosen.values()))
    for direction in directions:
        for samples, part in zip(x.split(width), direction.split(width), strict=True):
            for name, value in gradients(chosen, samples, part).items():
                total[name].add_(value.square().sum(0))
