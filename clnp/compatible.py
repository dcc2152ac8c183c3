"""What of Avalanche and torch goes with CLNP; what would break its promise is refused by name."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from avalanche.benchmarks.utils.data_loader import ReplayDataLoader
from avalanche.models import MultiHeadClassifier, MultiTaskModule
from avalanche.models.dynamic_modules import IncrementalClassifier
from avalanche.training.plugins import EarlyStoppingPlugin, EvaluationPlugin, LRSchedulerPlugin
from avalanche.training.plugins.clock import Clock
from avalanche.training.templates.base_sgd import PeriodicEval
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clnp.errors import CLNPError, Incompatible, UnsupportedNetwork
from clnp.experiences import class_labels, index_in_stream
from clnp.layout import Layout

COMPATIBLE = (EvaluationPlugin, LRSchedulerPlugin, EarlyStoppingPlugin, Clock, PeriodicEval)
"""Avalanche's own plugins that neither read nor write what CLNP freezes."""

GROWS = (
    "is an IncrementalClassifier, which adds and unmasks outputs of learnt tasks as classes come; "
    "use torch.nn.Linear with an output for each class, or a MultiHeadClassifier"
)
"""What is wrong with a single head that Avalanche adapts."""


def refuse_incompatible(strategy: Any) -> None:
    """Refuse what would break the promise, with the reason.

    Raises
    ------
    Incompatible
        If the strategy has any of it.
    """
    model, optimizer = strategy.model, strategy.optimizer
    if isinstance(model, DistributedDataParallel):
        raise Incompatible(
            "DistributedDataParallel keeps buckets of whole parameters, while CLNP trains "
            "views of their free rows; train on one device"
        )
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise Incompatible(
                f"{repr(name) if name else 'the model'} comes from torch.compile and runs code "
                "compiled for whole layers, past CLNP's views; pass the plain model"
            )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise Incompatible(
            "LBFGS keeps its own list of parameters and would write into frozen weights; use a "
            "first-order optimizer (SGD, Adam, AdamW, RMSprop, ...)"
        )
    for plugin in strategy.plugins:
        modules = [kind.__module__ for kind in type(plugin).__mro__]
        ours = modules[0].startswith("avalanche.") or any(
            module.startswith("avalanche.training.") for module in modules
        )
        if ours and not isinstance(plugin, COMPATIBLE):
            raise Incompatible(
                f"{type(plugin).__name__} trains on or penalises old tasks (replay, "
                "distillation, importance of weights), which frozen units make needless, and "
                "it keeps references to whole parameters; remove it from the plugins"
            )
    if isinstance(strategy.dataloader, ReplayDataLoader):
        raise Incompatible(
            "the batches hold replayed data of old tasks; CLNP needs none: use Naive"
        )


def refuse_broken(model: nn.Module) -> None:
    """Refuse a model whose own first weights, with which the first task begins, are no numbers.

    Raises
    ------
    CLNPError
        If a parameter has NaN or infinity.
    """
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise CLNPError(
                f"{name} has NaN or infinity before the first task: a training before this one has "
                "diverged. Build the model anew, and lower the learning rate"
            )


def check_head(model: nn.Module, layout: Layout, experience: Any) -> None:
    """Refuse labels that the head has no output for.

    Raises
    ------
    UnsupportedNetwork
        If the experience has one.
    """
    weight = model.get_submodule(layout.head)._parameters["weight"]
    assert weight is not None
    largest = max(class_labels(experience), default=-1)
    if largest >= weight.shape[0]:
        raise UnsupportedNetwork(
            f"experience {index_in_stream(experience, 0)} has label {largest}, but the head "
            f"{layout.head!r} has {weight.shape[0]} outputs (labels 0 to "
            f"{weight.shape[0] - 1}); give it more outputs, or remap the labels of each task"
        )


def growing(model: nn.Module) -> list[str]:
    """Single heads that Avalanche adapts to each experience, by name."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, IncrementalClassifier) and module._auto_adapt
    ]


def heads_of(model: nn.Module) -> dict[str, dict[str, list[int]]]:
    """What heads Avalanche has made, learnt or only evaluated.

    Returns
    -------
    dict
        By each ``MultiHeadClassifier``'s name and the task's label: outputs, and the length of the
        mask of active ones (0: it has none).
    """
    return {
        name: {
            label: [head.classifier.out_features, len(container._buffers.get(_mask(label), ()))]
            for label, head in container.classifiers.items()
        }
        for name, container in model.named_modules()
        if isinstance(container, MultiHeadClassifier)
    }


def make_heads(
    model: nn.Module, network: Mapping[str, Any], heads: Mapping[str, Mapping[str, Sequence[int]]]
) -> None:
    """Give a fresh model the heads of another, which Avalanche makes as tasks come.

    Parameters
    ----------
    model
        The model; changed in place where a ``MultiHeadClassifier`` lacks a head, or has one with
        another number of outputs.
    network
        The state of the network that had those of learnt tasks.
    heads
        What :func:`heads_of` gave of the model; empty in states that don't tell.
    """
    containers = [(n, m) for n, m in model.named_modules() if isinstance(m, MultiHeadClassifier)]
    for name, container in containers:
        wanted = {label: tuple(sizes) for label, sizes in heads.get(name, {}).items()}
        prefix = f"{name}.classifiers." if name else "classifiers."
        learnt = set()
        for path in dict.fromkeys(head["layer"] for head in network["heads"]):
            if path.startswith(prefix):
                label = path.removeprefix(prefix).split(".")[0]
                learnt.add(label)
                outputs = len(network["frozen"][f"{path}.weight"])
                wanted.setdefault(label, (outputs, outputs))
        for label, (outputs, mask) in wanted.items():
            _make_head(model, container, label, outputs, mask)
            for module in model.modules():
                if isinstance(module, MultiTaskModule):
                    module.max_class_label = max(module.max_class_label, outputs)
                    if label in learnt:
                        module.known_train_tasks_labels.add(int(label))


def _make_head(
    model: nn.Module, container: MultiHeadClassifier, label: str, outputs: int, mask: int
) -> None:
    device = next(model.parameters()).device
    if label not in container.classifiers:
        container.classifiers[label] = IncrementalClassifier(
            container.in_features,
            container.starting_out_features,
            masking=False,
            auto_adapt=False,
        ).to(device)
    head = container.classifiers[label]
    if head.classifier.out_features != outputs:
        head.classifier = nn.Linear(container.in_features, outputs, device=device)
    units = container._buffers.get(_mask(label))
    # Which of them are masked, the model's own state knows; without it, none.
    if mask and (units is None or len(units) != mask or not units.any()):
        container.register_buffer(_mask(label), torch.ones(mask, dtype=torch.int8, device=device))


def _mask(label: str) -> str:
    """Avalanche's name for the buffer that says which outputs of a head are in use."""
    return f"active_units_T{label}"
