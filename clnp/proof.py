"""Is a layout right? Proved on the example batch before the network is trained.

torch-pruning errs silently on some networks (a raw input added to a convolution's output, a
concatenation with the input), and narrower tensors go wrong without an error in some layers. A
wrong group would mean forgetting, so that each one is tested on a copy of the network, all of
whose values are drawn anew: what holds for random values holds for all.
"""

import copy
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from clnp.errors import UnsupportedNetwork
from clnp.layers import adapter_of, row_tensors
from clnp.layout import Layout, pieces
from clnp.network import PartitionedNetwork
from clnp.partition import permute, sever
from clnp.units import Forward

TOLERANCE = 1e-3
"""Largest difference taken for rounding, as a share of the logits' spread (fp32 sums)."""

DRAWS = 3
"""Times that all is drawn anew: the few units of a narrow layer may be dead in one draw."""

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
        A batch of inputs; noise of the shape of a few of them is used, since what holds for an
        empty image needn't hold for others. Where the network can't take noise (whole numbers, a
        logarithm), it is their own entries in random order.
    single_head
        Whether all tasks share the head.

    Raises
    ------
    UnsupportedNetwork
        If one of them fails; the message names the group.
    """
    _check_shapes(model, layout)
    model = copy.deepcopy(model).eval()
    with torch.random.fork_rng(devices=[]), _without_tf32():
        # torch.manual_seed would seed the GPUs' generators as well, for good.
        torch.default_generator.manual_seed(0)
        for _ in range(DRAWS):
            x = _noise(model, forward, example)
            _prove_permutations(model, layout, forward, x)
            _prove_prefixes(model, layout, forward, x, single_head)


def _noise(model: nn.Module, forward: Forward, example: Tensor) -> Tensor:
    """Random inputs that the network takes.

    Raises
    ------
    UnsupportedNetwork
        If it takes no noise, and the example's own entries are all the same: they prove nothing.
    """
    some, entries = example[:8], example.flatten()
    noise = torch.randn(some.shape).to(some)
    try:
        if bool(torch.isfinite(forward(model, noise)).all()):
            return noise
        reason = "gives NaN or infinity"
    except Exception as error:  # whatever the user's own forward asks of its input
        reason = f"{type(error).__name__}: {error}"
    if bool((entries == entries[0]).all()):
        raise UnsupportedNetwork(
            f"the network takes no noise as its input ({reason}), and all entries of the example "
            "are the same, so that nothing can be proved; give the plugin another example_input"
        )
    return entries[torch.randint(len(entries), some.shape).to(entries.device)]


def _without_tf32() -> AbstractContextManager[None]:
    """On a GPU cuDNN takes TF32, of 10 bits, for one convolution and fp32 for another."""
    cudnn = torch.backends.cudnn
    flags: AbstractContextManager[None] = cudnn.flags(
        enabled=cudnn.enabled,
        benchmark=cudnn.benchmark,
        deterministic=cudnn.deterministic,
        allow_tf32=False,
    )
    return flags


def _check_shapes(model: nn.Module, layout: Layout) -> None:
    """Each layer of a group has as many rows, or columns, as the group's units need."""
    for name in layout.order:
        module = model.get_submodule(name)
        adapter = adapter_of(name, module)
        rows, columns = layout.rows[name], layout.columns[name]
        units = ", ".join(repr(s.group) for s in rows)
        for tensor in row_tensors(module, adapter).values():
            if rows and tensor is not None and tensor.shape[0] != sum(s.width for s in rows):
                raise UnsupportedNetwork(
                    f"layer {name!r} has {tensor.shape[0]} channels, but the units of {units} make "
                    f"{sum(s.width for s in rows)}. {ADVICE}"
                )
        if adapter.has_columns and columns:
            weight = module._parameters["weight"]
            assert weight is not None
            if weight.shape[1] != sum(s.width for s in columns):
                units = ", ".join(repr(s.group) for s in columns)
                raise UnsupportedNetwork(
                    f"layer {name!r} has {weight.shape[1]} columns, but the units of {units} take "
                    f"{sum(s.width for s in columns)}. {ADVICE}"
                )


def _draw(model: nn.Module, layout: Layout) -> None:
    """Random values everywhere, of a size that keeps activations alive in deep networks."""
    for name in layout.order:
        module = model.get_submodule(name)
        adapter = adapter_of(name, module)
        for key, tensor in row_tensors(module, adapter).items():
            if tensor is None:
                continue
            noise = torch.randn(tensor.shape).to(tensor)
            if key == "weight" and name in layout.weights:
                tensor.copy_(noise * (2.0 / tensor[0].numel()) ** 0.5)
            elif key in ("weight", "running_var"):
                tensor.copy_(noise.abs() * 0.3 + 0.7)
            else:
                tensor.copy_(noise * 0.3)


def _differs(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not bool(torch.isfinite(a).all()):
        return True
    spread = (a - a.mean()).abs().max().clamp(min=1e-6)
    return bool((a - b).abs().max() > TOLERANCE * spread)


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
    groups = {group.name for group in layout.groups}
    problem = _prefix_problem(model, layout, forward, x, single_head, groups)
    if problem is None:
        return
    # Which layer is it? One that fails where it alone is narrower; else they fail together.
    alone = [
        name
        for name in sorted(groups)
        if _prefix_problem(model, layout, forward, x, single_head, {name})
    ]
    layers = ", ".join(map(repr, alone or sorted(groups)))
    raise UnsupportedNetwork(f"what comes behind layer {layers}: {problem}. {ADVICE}")


def _prefix_problem(
    model: nn.Module,
    layout: Layout,
    forward: Forward,
    x: Tensor,
    single_head: bool,
    narrow: set[str],
) -> str | None:
    """What goes wrong when the given groups are split between two tasks and free units."""
    network = PartitionedNetwork(model, layout, single_head)
    first, second = (
        {g.name: part(g.width) if g.name in narrow else g.width for g in layout.groups}
        for part in (_third, _two_thirds)
    )
    last = layout.last.name
    tasks = [first] if second[last] == first[last] else [first, second]
    for used in tasks:
        network.learn(used)
    _draw(model, layout)
    head = network.modules[layout.head]._parameters["weight"]
    assert head is not None
    drawn = head.clone()
    for used in reversed(tasks):
        sever(network.modules, layout, used)
    head.copy_(drawn)  # the first cut severs the head from what the second task reads
    try:
        before = [network.subnetwork(t, forward)(x) for t in range(len(tasks))]
    except Exception as error:
        return f"the forward fails on fewer units ({type(error).__name__}: {error})"
    for task in range(len(tasks)):
        if _differs(_masked(network, task, forward, x), before[task]):
            return "some units alone compute something else than they do in the whole network"
    _write_free_entries(network, tasks[-1])
    for task, logits in enumerate(before):
        if not torch.equal(logits, network.subnetwork(task, forward)(x)):
            return "free weights reach the output of a task that has been learnt"
    return None


def _third(width: int) -> int:
    return max(1, width // 3)


def _two_thirds(width: int) -> int:
    return min(width, max(_third(width) + 1, 2 * width // 3))


def _masked(network: PartitionedNetwork, task: int, forward: Forward, x: Tensor) -> Tensor:
    """The task's logits by the whole network, with everything beyond its sub-network severed."""
    layout = network.layout
    model = copy.deepcopy(network.model)
    modules = {name: model.get_submodule(name) for name in layout.order}
    used = network.partition.after(task)
    sever(modules, layout, used)
    weight = modules[layout.head]._parameters["weight"]
    assert weight is not None
    start = network.heads[task].start
    older = layout.runs(layout.columns[layout.head], dict.fromkeys(start, 0), start, inputs=False)
    for run in older:
        weight[:, run] = 0.0
    return forward(model, x)


def _write_free_entries(network: PartitionedNetwork, used: dict[str, int]) -> None:
    """Noise in every entry that a later task may write."""
    layout = network.layout
    for name, module in network.modules.items():
        if name in layout.shared:
            continue
        for key, tensor in row_tensors(module, adapter_of(name, module)).items():
            if tensor is None:
                continue
            if name != layout.head:
                free = layout.runs(layout.rows[name], used, layout.widths)
                entries = pieces(tensor, free)
            elif key == "weight":
                free = layout.runs(layout.columns[name], used, layout.widths, inputs=False)
                entries = pieces(tensor, free, 1)
            else:
                continue
            for entry in entries:
                entry.copy_(torch.randn(entry.shape).to(entry).abs() + 1.0)
