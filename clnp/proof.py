"""Is a layout right? Proved on the example batch before the network is trained.

torch-pruning errs silently on some networks (a raw input added to a convolution's output, a
concatenation with the input), and narrower tensors go wrong without an error in some layers. A
wrong group would mean forgetting, so that each one is tested on a copy of the network, all of
whose values are drawn anew: what holds for random values holds for all.
"""

import copy

import torch
from torch import Tensor, nn

from clnp.errors import UnsupportedNetwork
from clnp.layers import adapter_of, row_tensors
from clnp.network import Head, PartitionedNetwork
from clnp.partition import permute, sever
from clnp.units import Forward, Layout

TOLERANCE = 1e-3
"""Largest difference taken for rounding, as a share of the logits' spread (fp32 sums)."""

ADVICE = (
    "CLNP can't split this network without forgetting; look for operations that mix units "
    "(softmax or normalisation over channels, a sum with the raw input, a view with fixed sizes "
    "where flatten would do)"
)


@torch.no_grad()
def prove(
    model: nn.Module, layout: Layout, forward: Forward, example: Tensor, single_head: bool
) -> None:
    """Prove on a copy that the layout's groups can be sorted, cut and frozen.

    1. A random permutation of each group leaves the output as it was, up to rounding.
    2. The sub-network computes what the full network does with its interference weights cut.
    3. Noise in every entry that later tasks may write leaves the sub-networks' outputs bitwise
       as they were.

    Parameters
    ----------
    model
        The network; it is not changed.
    layout
        The groups to be proved.
    forward
        How the network is called.
    example : (N, ...)
        A batch of inputs; a few rows of it are used.
    single_head
        Whether all tasks share the head.

    Raises
    ------
    UnsupportedNetwork
        If one of them fails; the message names the group.
    """
    example = example[:16]
    model = copy.deepcopy(model).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _prove_permutations(model, layout, forward, example)
        _prove_prefixes(model, layout, forward, example, single_head)


def _draw(model: nn.Module, layout: Layout) -> None:
    """Random values everywhere, of a size that keeps activations alive in deep networks."""
    for name in layout.order:
        module = model.get_submodule(name)
        adapter = adapter_of(name, module)
        for key, tensor in row_tensors(module, adapter).items():
            if tensor is None:
                continue
            noise = torch.randn(tensor.shape).to(tensor)
            if key == "weight" and adapter.has_columns:
                tensor.copy_(noise * (2.0 / tensor[0].numel()) ** 0.5)
            elif key in ("weight", "running_var"):
                tensor.copy_(noise.abs() * 0.3 + 0.7)
            else:
                tensor.copy_(noise * 0.3)


def _differs(a: Tensor, b: Tensor) -> bool:
    spread = (a - a.mean()).abs().max().clamp(min=1e-6)
    return bool((a - b).abs().max() > TOLERANCE * spread) or not bool(torch.isfinite(a).all())


def _prove_permutations(model: nn.Module, layout: Layout, forward: Forward, x: Tensor) -> None:
    _draw(model, layout)
    modules = {name: model.get_submodule(name) for name in layout.order}
    before = forward(model, x)
    for group in layout.groups:
        permute(modules, group, torch.randperm(group.width))
        if _differs(before, forward(model, x)):
            raise UnsupportedNetwork(
                f"the units of layer {group.name!r} can't be reordered without changing the "
                f"output, so torch-pruning missed a layer or operation that reads them. {ADVICE}"
            )


def _prove_prefixes(
    model: nn.Module, layout: Layout, forward: Forward, x: Tensor, single_head: bool
) -> None:
    network = PartitionedNetwork(model, layout, single_head)
    first = {g.name: max(1, g.width // 3) for g in layout.groups}
    second = {g.name: min(g.width, max(first[g.name] + 1, 2 * g.width // 3)) for g in layout.groups}
    last = layout.last
    tasks = [first] if second[last.name] == first[last.name] else [first, second]
    for used in tasks:
        network.learn(used)
    _draw(model, layout)
    for used in reversed(tasks):
        sever(network.modules, layout, used)
    try:
        before = [network.subnetwork(t, forward)(x) for t in range(len(tasks))]
    except Exception as error:
        raise UnsupportedNetwork(
            f"the network's forward fails on narrower layers ({type(error).__name__}: {error}). "
            f"{ADVICE}"
        ) from error
    for task in range(len(tasks)):
        if _differs(_masked(network, task, forward, x), before[task]):
            raise UnsupportedNetwork(
                "a part of the network computes something else than the same units do in the whole "
                f"network. {ADVICE}"
            )
    _write_free_entries(network, tasks[-1])
    for task, logits in enumerate(before):
        if not torch.equal(logits, network.subnetwork(task, forward)(x)):
            raise UnsupportedNetwork(
                f"free weights reach the output of a task that has been learnt. {ADVICE}"
            )


def _masked(network: PartitionedNetwork, task: int, forward: Forward, x: Tensor) -> Tensor:
    """The task's logits by the whole network, with everything beyond its sub-network severed."""
    layout = network.layout
    model = copy.deepcopy(network.model)
    modules = {name: model.get_submodule(name) for name in layout.order}
    used = network.partition.after(task)
    head, repeat = modules[layout.head], layout.reads[layout.head][1]
    weight = head._parameters["weight"]
    assert weight is not None
    for group in layout.groups:
        for reader in group.readers:
            if reader.layer != layout.head:
                rows = used[layout.writes[reader.layer]]
                columns = modules[reader.layer]._parameters["weight"]
                assert columns is not None
                columns[:rows, used[group.name] * reader.repeat :] = 0.0
    start: Head = network.heads[task]
    weight[:, : start.start * repeat] = 0.0
    weight[:, used[layout.last.name] * repeat :] = 0.0
    return forward(model, x)


def _write_free_entries(network: PartitionedNetwork, used: dict[str, int]) -> None:
    """Noise in every entry that a later task may write."""
    layout = network.layout
    for name, module in network.modules.items():
        adapter = adapter_of(name, module)
        for key, tensor in row_tensors(module, adapter).items():
            if tensor is None:
                continue
            if name != layout.head:
                free = tensor[used[layout.writes[name]] :]
            elif key == "weight":
                free = tensor[:, used[layout.last.name] * layout.reads[name][1] :]
            else:
                continue
            free.copy_(torch.randn(free.shape).to(free).abs() + 1.0)
