"""Groups of units that move together: found by torch-pruning, proved in :mod:`clnp.proof`.

A unit is a neuron of a linear layer or a channel of a convolution. Its group is everything that
hangs on it: the layers that compute it (rows), the norms that pass it on (rows) and the layers
that read it (columns; a block of H·W columns behind a flatten).
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch_pruning as tp
from torch import Tensor, nn

from clnp.errors import UnsupportedNetwork
from clnp.layers import adapter_of, is_layer

Forward = Callable[[nn.Module, Tensor], Tensor]
"""How the network is called: ``forward(model, x)`` gives the logits (N, classes)."""


@dataclass(frozen=True)
class Reader:
    """A layer that reads a group's units, each through ``repeat`` neighbouring columns."""

    layer: str
    repeat: int


@dataclass(frozen=True)
class UnitGroup:
    """Units that are kept, cut and moved together.

    Attributes
    ----------
    name
        The layer that computes them first.
    width
        Number of units.
    writers
        The layers that compute them (several if they are tied by a sum).
    norms
        The layers that pass them on one by one with parameters of their own.
    readers
        The layers that read them.
    """

    name: str
    width: int
    writers: tuple[str, ...]
    norms: tuple[str, ...]
    readers: tuple[Reader, ...]


@dataclass(frozen=True)
class Layout:
    """How a network's units are grouped.

    Attributes
    ----------
    groups
        The hidden groups in forward order.
    head
        The layer whose units are the output.
    order
        All layers with parameters, the head included, in forward order.
    """

    groups: tuple[UnitGroup, ...]
    head: str
    order: tuple[str, ...]

    @property
    def writes(self) -> dict[str, str]:
        """Layer -> the group whose units it computes or passes on (the head: none)."""
        return {layer: g.name for g in self.groups for layer in (*g.writers, *g.norms)}

    @property
    def reads(self) -> dict[str, tuple[str | None, int]]:
        """Layer with columns or norm -> (group that it reads, columns a unit); None: the input."""
        found: dict[str, tuple[str | None, int]] = dict.fromkeys(self.order, (None, 1))
        for group in self.groups:
            found |= dict.fromkeys(group.norms, (group.name, 1))
            found |= {reader.layer: (group.name, reader.repeat) for reader in group.readers}
        return found

    @property
    def weights(self) -> tuple[str, ...]:
        """The layers with a weight matrix (linear, convolution), the head included, in order."""
        norms = {name for group in self.groups for name in group.norms}
        return tuple(name for name in self.order if name not in norms)

    @property
    def last(self) -> UnitGroup:
        """The last hidden group: the one that the head reads."""
        return next(g for g in self.groups if any(r.layer == self.head for r in g.readers))

    def core(self) -> tuple[tuple[UnitGroup, ...], tuple[str, ...]]:
        """The layout without its head, to compare networks that differ in the head alone."""
        groups = tuple(
            UnitGroup(
                g.name,
                g.width,
                g.writers,
                g.norms,
                tuple(r for r in g.readers if r.layer != self.head),
            )
            for g in self.groups
        )
        return groups, tuple(name for name in self.order if name != self.head)


def find_layout(model: nn.Module, forward: Forward, example: Tensor) -> Layout:
    """Group the units of a network.

    Parameters
    ----------
    model
        The network; it is not changed (a copy is traced).
    forward
        How it is called.
    example : (N, ...)
        A batch of inputs.

    Raises
    ------
    UnsupportedNetwork
        If a layer or the way that layers are joined isn't supported; the message names it.
    """
    traced = copy.deepcopy(model).eval().requires_grad_(True)
    names = {module: name for name, module in traced.named_modules()}
    order, output = _called_layers(traced, names, forward, example)
    _refuse_uses_elsewhere(traced, order, output)
    _refuse_states(model, forward, example)
    if output.dim() != 2:
        raise UnsupportedNetwork(
            f"the model's output has shape {tuple(output.shape)}; CLNP needs logits of shape "
            "(batch, classes)"
        )
    adapters = {name: adapter_of(name, traced.get_submodule(name)) for name in order}
    try:
        graph = tp.DependencyGraph().build_dependency(
            traced, example, forward_fn=forward, verbose=False
        )
        found = [
            _group(graph, traced, names, name, order)
            for name in order
            if adapters[name].has_columns
        ]
    except UnsupportedNetwork:
        raise
    except Exception as error:  # whatever the tracer stumbles on, the user must know of
        raise UnsupportedNetwork(
            f"torch-pruning can't trace the model ({type(error).__name__}: {error}); CLNP needs a "
            "forward pass made of torch operations on tensors, without branches on their values"
        ) from error
    heads = [group for group in found if not group.readers]
    if len(heads) != 1 or len(heads[0].writers) != 1:
        raise UnsupportedNetwork(
            "the output must come from exactly one layer (linear, or convolution and pooling); "
            f"layers whose units nobody reads: {[g.name for g in heads] or 'none'}"
        )
    head = heads[0]
    if head.norms or output.shape[1] != head.width:
        raise UnsupportedNetwork(
            f"the units of the last layer {head.name!r} ({head.width}) aren't the model's outputs "
            f"({output.shape[1]}): a norm, a flatten or an operation that mixes units comes after"
        )
    hidden = _distinct([group for group in found if group is not head])
    if not hidden:
        raise UnsupportedNetwork(
            f"the model has no hidden layer: {head.name!r} reads the input itself, and there are "
            "no units that tasks could share"
        )
    read = [reader.layer for group in hidden for reader in group.readers]
    twice = sorted({name for name in read if read.count(name) > 1})
    if twice:
        raise UnsupportedNetwork(
            f"layer {twice[0]!r} reads several groups of units at once (a concatenation), which is "
            "not supported yet"
        )
    if head.name not in read:
        raise UnsupportedNetwork(f"the head {head.name!r} reads no hidden layer of the model")
    grouped = {name for g in hidden for name in (*g.writers, *g.norms)} | {head.name}
    loose = [name for name in order if name not in grouped]
    if loose:
        raise UnsupportedNetwork(
            f"layer {loose[0]!r} belongs to no group of units (a norm on the input, or a layer "
            "that torch-pruning loses); move it out of the model or remove it"
        )
    return Layout(tuple(hidden), head.name, tuple(order))


def _called_layers(
    model: nn.Module, names: dict[nn.Module, str], forward: Forward, example: Tensor
) -> tuple[list[str], Tensor]:
    """The layers with parameters in the order in which a forward pass calls them."""
    calls: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda m, _: calls.append(names[m]))
        for module in model.modules()
        if is_layer(module)
    ]
    try:
        with torch.enable_grad():
            output = forward(model, example)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(output, Tensor):
        raise UnsupportedNetwork(
            f"the model returns {type(output).__name__}; CLNP needs one tensor of logits"
        )
    again = sorted({name for name in calls if calls.count(name) > 1})
    if again:
        raise UnsupportedNetwork(
            f"layer {again[0]!r} is called more than once in a forward pass; give each use a layer "
            "of its own"
        )
    for name in calls:
        if "forward" in model.get_submodule(name).__dict__:
            raise UnsupportedNetwork(
                f"layer {name!r} has had its forward replaced, which CLNP can't slice; remove what "
                "replaced it"
            )
    return calls, output


def _refuse_uses_elsewhere(model: nn.Module, order: list[str], output: Tensor) -> None:
    """Refuse parameters that two layers share, or that the output reads past any layer."""
    owners: dict[nn.Parameter, str] = {}
    for name in order:
        for parameter in model.get_submodule(name)._parameters.values():
            if parameter is not None:
                owners[parameter] = name
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None and owners.get(parameter, name) != name:
                raise UnsupportedNetwork(
                    f"layers {owners[parameter]!r} and {name!r} share a parameter; CLNP can't "
                    "freeze it for one of them alone"
                )
    loose = [(name, p) for name, p in model.named_parameters() if p not in owners]
    if not loose or not output.requires_grad:
        return
    read = torch.autograd.grad(output.sum(), [p for _, p in loose], allow_unused=True)
    for (name, _), gradient in zip(loose, read, strict=True):
        if gradient is not None:
            raise UnsupportedNetwork(
                f"the parameter {name!r} is used outside a call of the layer that it belongs to, "
                "so that CLNP can't split it; call the layer, or make it part of one"
            )


def _refuse_states(model: nn.Module, forward: Forward, example: Tensor) -> None:
    """Refuse layers that write into buffers while they train, unless an adapter splits them."""
    copied = copy.deepcopy(model).train()
    kept = {
        (name, key): (module, buffer.clone())
        for name, module in copied.named_modules()
        if not is_layer(module)
        for key, buffer in module._buffers.items()
        if buffer is not None
    }
    if not kept:
        return
    cuda = [example.device] if example.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.no_grad():  # dropout draws here
        forward(copied, torch.cat([example, example]))  # batch norm wants two samples
    for (name, key), (module, buffer) in kept.items():
        after = module._buffers[key]
        if after is None or not torch.equal(after, buffer):
            raise UnsupportedNetwork(
                f"layer {name!r} writes into its buffer {key!r} while it trains, and learnt tasks "
                "would read what later ones write; keep it out of the model"
            )


def _group(
    graph: tp.DependencyGraph,
    model: nn.Module,
    names: dict[nn.Module, str],
    writer: str,
    order: list[str],
) -> UnitGroup:
    """The group of the units that a layer computes, as torch-pruning sees it."""
    layer = model.get_submodule(writer)
    width = layer._parameters["weight"].shape[0]  # type: ignore[union-attr]
    prune = graph.get_pruner_of_module(layer).prune_out_channels
    writers, norms, readers = {writer}, set(), set()
    for item in graph.get_pruning_group(layer, prune, list(range(width))):
        member = names.get(item.dep.target.module)
        if member is None or member not in order:
            continue  # an operation without parameters
        adapter = adapter_of(member, model.get_submodule(member))
        repeat, rest = divmod(len(item.idxs), width)
        mapping = [unit for unit in range(width) for _ in range(repeat)]
        if (
            rest
            or list(item.idxs) != list(range(len(item.idxs)))
            or (list(item.root_idxs) != mapping)
        ):
            raise UnsupportedNetwork(
                f"layer {member!r} reads the units of {writer!r} together with something else, or "
                "in another order (a concatenation, a reshape); this is not supported yet"
            )
        reads = graph.is_in_channel_pruning_fn(item.dep.handler)
        if not adapter.has_columns:
            if repeat != 1:
                raise UnsupportedNetwork(
                    f"layer {member!r} is a norm behind a flatten: it has {repeat} entries for "
                    f"each unit of {writer!r}, which is not supported; put it before the flatten"
                )
            norms.add(member)
        elif reads:
            columns = model.get_submodule(member)._parameters["weight"].shape[1]  # type: ignore[union-attr]
            if columns != width * repeat:
                raise UnsupportedNetwork(
                    f"layer {member!r} reads {columns} columns, but {writer!r} computes only "
                    f"{width * repeat} of them (a concatenation); this is not supported yet"
                )
            readers.add(Reader(member, repeat))
        else:
            writers.add(member)
    by_order = sorted(writers, key=order.index)
    return UnitGroup(
        by_order[0],
        width,
        tuple(by_order),
        tuple(sorted(norms, key=order.index)),
        tuple(sorted(readers, key=lambda r: order.index(r.layer))),
    )


def _distinct(groups: list[UnitGroup]) -> list[UnitGroup]:
    """Each group once: layers tied by a sum find the same one."""
    found: dict[str, UnitGroup] = {}
    for group in groups:
        if found.setdefault(group.name, group) != group:
            raise UnsupportedNetwork(
                f"torch-pruning sees two different groups of units that start at {group.name!r}"
            )
    return list(found.values())
