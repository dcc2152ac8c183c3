"""Groups of units that move together: found by torch-pruning, proved in :mod:`clnp.proof`.

A unit is a neuron of a linear layer or a channel of a convolution. Its group is everything that
hangs on it: the layers that compute it (rows), the norms that pass it on (rows) and the layers
that read it (columns; a block of H·W columns behind a flatten). Where a grouped convolution or a
group norm mixes channels, a unit is as many channels as it mixes.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.dependency import graph as walk

from clnp.errors import UnsupportedNetwork
from clnp.layers import CONV, Adapter, adapter_of, is_layer
from clnp.layout import Layout, Part, UnitGroup

Forward = Callable[[nn.Module, Tensor], Tensor]
"""How the network is called: ``forward(model, x)`` gives the logits (N, classes)."""


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
    try:
        traced = copy.deepcopy(model).eval().requires_grad_(True)
    except Exception as error:  # whatever the user's model holds
        raise UnsupportedNetwork(
            f"the model can't be copied ({type(error).__name__}: {error}), and CLNP tries things "
            "on a copy; keep locks, files and activations with gradients out of it, and remove "
            "old-style norms and masks of weights (torch.nn.utils.weight_norm, .prune)"
        ) from error
    names = {module: name for name, module in traced.named_modules()}
    for module, name in names.items():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedNetwork(
                f"layer {name!r} is scripted, and CLNP changes what a layer computes; keep it as "
                "a plain module"
            )
    order, output = _called_layers(traced, names, forward, example)
    _refuse_uses_elsewhere(traced, order, output)
    _refuse_states(model, forward, example)
    if output.dim() != 2:
        raise UnsupportedNetwork(
            f"the model's output has shape {tuple(output.shape)}; CLNP needs logits of shape "
            "(batch, classes)"
        )
    adapters = {name: adapter_of(name, traced.get_submodule(name)) for name in order}
    shared = tuple(name for name in order if adapters[name].shared)
    for name in shared:
        # torch-pruning takes their positions, or their one slope, for units.
        traced.set_submodule(name, nn.ReLU())
    # It also takes grouped convolutions for depthwise ones. As plain ones they are traced rightly.
    mixers = {name: m for name in order if _mixes(m := traced.get_submodule(name))}
    for name, module in mixers.items():
        plain = _ungrouped(module)
        names[plain] = name
        traced.set_submodule(name, plain)
    try:
        graph = tp.DependencyGraph().build_dependency(
            traced, example, forward_fn=forward, verbose=False
        )
        with _ending(graph, traced):
            roots = _roots(graph, traced, names, adapters, mixers)
        for node in graph.module2node.values():
            # The graph is one big cycle, which would keep the copy of the network for long.
            for others in (node.inputs, node.outputs, node.dependencies):
                others.clear()
    except UnsupportedNetwork:
        raise
    except Exception as error:  # whatever the tracer stumbles on, the user must know of
        raise UnsupportedNetwork(
            f"torch-pruning can't trace the model ({type(error).__name__}: {error}); CLNP needs a "
            "forward pass made of torch operations on tensors, without branches on their values"
        ) from error
    found = [_group(tied, traced, order, mixers) for tied in _tied(roots)]
    found.sort(key=lambda group: order.index(group.name))
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
    hidden = tuple(group for group in found if group is not head)
    if not hidden:
        raise UnsupportedNetwork(
            f"the model has no hidden layer: {head.name!r} reads the input itself, and there are "
            "no units that tasks could share"
        )
    if not any(part.layer == head.name for group in hidden for part in group.readers):
        raise UnsupportedNetwork(f"the head {head.name!r} reads no hidden layer of the model")
    grouped = {p.layer for g in hidden for p in (*g.writers, *g.norms)} | {head.name, *shared}
    loose = [name for name in order if name not in grouped]
    if loose:
        raise UnsupportedNetwork(
            f"layer {loose[0]!r} belongs to no group of units (a norm on the input, or a layer "
            "that torch-pruning loses); move it out of the model or remove it"
        )
    weights = tuple(
        name for name in order if adapters[name].has_columns or CONV.types == adapters[name].types
    )
    inputs = _inputs(hidden, traced)
    return Layout(hidden, head.name, tuple(order), weights, inputs, shared)


def _called_layers(
    model: nn.Module, names: dict[nn.Module, str], forward: Forward, example: Tensor
) -> tuple[list[str], Tensor]:
    """The layers with parameters in the order in which a forward pass calls them."""
    calls: list[str] = []
    handles = []
    for module in model.modules():
        if is_layer(module):
            handles.append(module.register_forward_pre_hook(lambda m, _: calls.append(names[m])))
        if isinstance(module, nn.LayerNorm):
            handles.append(module.register_forward_pre_hook(_refuse_norm_over_units(names[module])))
    try:
        with torch.enable_grad():
            output = forward(model, example)
    except UnsupportedNetwork:
        raise
    except Exception as error:  # whatever the user's own forward stumbles on
        raise UnsupportedNetwork(
            f"the model fails on an example input of shape {tuple(example.shape)} and type "
            f"{example.dtype} ({type(error).__name__}: {error}); give the plugin an example_input "
            "that it takes, or mend its forward"
        ) from error
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


def _refuse_norm_over_units(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that refuses a layer norm over all units, which makes each depend on the others."""

    def check(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.LayerNorm)
        if len(module.normalized_shape) >= inputs[0].dim() - 1:
            raise UnsupportedNetwork(
                f"layer {name!r} ({module}) normalises over all units of a layer, so that each "
                "depends on those of later tasks; use a norm that treats units one by one or in "
                "groups (batch, instance or group norm), or a layer norm over positions alone"
            )

    return check


@dataclass
class _Root:
    """A layer with channels of its own, and what hangs on them, as torch-pruning sees it."""

    name: str
    channels: int
    writers: list[str] = field(default_factory=list)
    norms: list[tuple[str, int]] = field(default_factory=list)
    """Name, and the first of its channels that are these."""
    readers: list[tuple[str, int, int]] = field(default_factory=list)
    """Name, first column, and columns a channel."""
    mixers: list[str] = field(default_factory=list)
    """Grouped convolutions that read these channels and compute others."""
    mixed: list[tuple[str, int]] = field(default_factory=list)
    """Who mixes neighbouring channels, and into how many groups these fall."""


def _roots(
    graph: tp.DependencyGraph,
    model: nn.Module,
    names: dict[nn.Module, str],
    adapters: dict[str, Adapter],
    mixers: dict[str, nn.Module],
) -> list[_Root]:
    """The channels of each layer that computes some; those of layers tied by a sum once."""
    found: list[_Root] = []
    for name, adapter in adapters.items():
        if not (adapter.has_columns or name in mixers):
            continue
        root = _root(graph, model, names, adapters, mixers, name)
        known = [other for other in found if name in other.writers]
        if not known:
            found.append(root)
        elif sorted(known[0].writers) != sorted(root.writers):
            raise UnsupportedNetwork(
                f"torch-pruning sees two different groups of units that start at {name!r}"
            )
    return found


@contextmanager
def _ending(graph: tp.DependencyGraph, model: nn.Module) -> Iterator[None]:
    """End torch-pruning's walks where they would go round for ever, to units that aren't there."""
    most = 100 + 10 * len(graph.module2node)
    largest = sum(sum(parameter.shape[:2]) for parameter in model.parameters())

    class Group(walk.Group):
        def add_dep(self, dep: Any, idxs: Any) -> None:
            if len(self._group) > most or any(index.idx >= largest for index in idxs):
                raise UnsupportedNetwork(
                    "torch-pruning finds no end of what hangs on a layer's units: an operation "
                    "shifts them or makes each depend on its neighbours (circular padding of a "
                    "Conv1d, LocalResponseNorm), which is not supported"
                )
            super().add_dep(dep, idxs)

    kept, walk.Group = walk.Group, Group
    try:
        yield
    finally:
        walk.Group = kept


def _mixes(module: nn.Module) -> bool:
    """Whether a convolution computes each channel from several, but not from all."""
    return isinstance(module, CONV.types) and not (
        module.groups == 1 or module.groups == module.in_channels == module.out_channels
    )


def _ungrouped(module: nn.Module) -> nn.Module:
    """A convolution like a grouped one, in which every channel reads all."""
    assert isinstance(module, nn.modules.conv._ConvNd)
    with torch.random.fork_rng(devices=[]):  # it draws its weights, which nobody uses
        plain = type(module)(  # type: ignore[call-arg]
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            bias=module.bias is not None,
            padding_mode=module.padding_mode,
        )
    return plain.to(module.weight).eval()


def _root(
    graph: tp.DependencyGraph,
    model: nn.Module,
    names: dict[nn.Module, str],
    adapters: dict[str, Adapter],
    mixers: dict[str, nn.Module],
    name: str,
) -> _Root:
    layer = model.get_submodule(name)
    channels = layer._parameters["weight"].shape[0]  # type: ignore[union-attr]
    prune = graph.get_pruner_of_module(layer).prune_out_channels
    root = _Root(name, channels)
    for item in graph.get_pruning_group(layer, prune, list(range(channels))):
        member = names.get(item.dep.target.module)
        if member is None or member not in adapters or adapters[member].shared:
            continue  # an operation, or a layer, that has nothing for each unit
        module, adapter = model.get_submodule(member), adapters[member]
        repeat, rest = divmod(len(item.idxs), channels)
        pairs = sorted(zip(item.idxs, item.root_idxs, strict=True))  # they come in any order
        first = pairs[0][0] if pairs else 0
        mapping = [(first + i, i // max(1, repeat)) for i in range(len(pairs))]
        if rest or pairs != mapping:
            raise UnsupportedNetwork(
                f"layer {member!r} reads the units of {name!r} in another order (a reshape, a "
                "shuffle), which is not supported"
            )
        reads = graph.is_in_channel_pruning_fn(item.dep.handler)
        if adapter.has_columns and reads:
            root.readers.append((member, first, repeat))
        elif adapter.has_columns or (member in mixers and not reads):
            root.writers.append(member)
        elif repeat != 1:
            raise UnsupportedNetwork(
                f"layer {member!r} is a norm behind a flatten: it has {repeat} entries for "
                f"each unit of {name!r}, which is not supported; put it before the flatten"
            )
        elif member in mixers:
            if channels != module.in_channels:
                raise UnsupportedNetwork(
                    f"layer {member!r} is a grouped convolution behind a concatenation, which is "
                    "not supported; use groups=1, or a depthwise convolution"
                )
            root.mixers.append(member)
            root.mixed.append((member, int(mixers[member].groups)))  # type: ignore[arg-type]
        else:
            root.norms.append((member, first))
            if isinstance(module, nn.GroupNorm):
                size = module.num_channels // module.num_groups
                if first % size or channels % size:
                    raise UnsupportedNetwork(
                        f"layer {member!r} ({module}) normalises over units of several layers at "
                        f"once: its groups of {size} channels don't end where those of {name!r} do"
                    )
                root.mixed.append((member, channels // size))
    return root


def _tied(roots: list[_Root]) -> list[list[_Root]]:
    """Roots whose channels are the same units: a grouped convolution's two sides."""
    tied: list[list[_Root]] = []
    for root in roots:
        mine = [
            group
            for group in tied
            if any(
                set(r.mixers) & set(root.writers) or set(root.mixers) & set(r.writers)
                for r in group
            )
        ]
        for group in mine:
            tied.remove(group)
        tied.append([*(r for group in mine for r in group), root])
    return tied


def _group(
    tied: list[_Root], model: nn.Module, order: list[str], mixers: dict[str, nn.Module]
) -> UnitGroup:
    """The group of units of some roots: as many as can be told apart in all of them."""
    mixed = [pair for root in tied for pair in root.mixed]
    width = math.gcd(*(root.channels for root in tied), *(count for _, count in mixed))
    if width == 1 and mixed and min(root.channels for root in tied) > 1:
        mixer = mixers.get(mixed[0][0], model.get_submodule(mixed[0][0]))
        raise UnsupportedNetwork(
            f"layer {mixed[0][0]!r} ({mixer}) mixes all units of {tied[0].name!r}, so that each "
            "depends on those of later tasks; give it more groups"
        )
    writers, norms, readers = [], [], []
    for root in tied:
        block = root.channels // width
        writers += [Part(name, block) for name in root.writers if name not in mixers]
        norms += [Part(name, block, first) for name, first in root.norms]
        readers += [Part(name, block * repeat, first) for name, first, repeat in root.readers]
        for name in root.mixers:
            outputs = int(model.get_submodule(name).out_channels)  # type: ignore[arg-type]
            norms.append(Part(name, outputs // width, reads=block))

    def place(part: Part) -> tuple[int, int]:
        return order.index(part.layer), part.first

    by_order = [tuple(sorted(set(parts), key=place)) for parts in (writers, norms, readers)]
    if not by_order[0]:
        raise UnsupportedNetwork(
            f"layer {tied[0].name!r} is a grouped convolution on the network's input, whose units "
            "would be whole groups of it; use groups=1 there"
        )
    return UnitGroup(by_order[0][0].layer, width, *by_order)


def _inputs(groups: tuple[UnitGroup, ...], model: nn.Module) -> tuple[Part, ...]:
    """The columns beside units, which must be of the network's own input; checks the others."""
    found: dict[str, list[tuple[int, int]]] = {}
    for group in groups:
        for part in group.readers:
            stretch = (part.first, part.first + group.width * part.block)
            found.setdefault(part.layer, []).append(stretch)
    inputs: list[Part] = []
    for layer, stretches in found.items():
        columns = model.get_submodule(layer)._parameters["weight"].shape[1]  # type: ignore[union-attr]
        end = 0
        for first, last in [*sorted(stretches), (columns, columns)]:
            if first < end:
                raise UnsupportedNetwork(
                    f"layer {layer!r} reads two groups of units through the same columns, as "
                    "torch-pruning sees it; CLNP can't tell them apart"
                )
            if first > end:
                inputs.append(Part(layer, first - end, end))
            end = last
    return tuple(inputs)
