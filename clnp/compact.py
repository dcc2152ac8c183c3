"""A task's network on its own: a plain module of the task's units alone.

A view (:mod:`clnp.network`) computes a task's logits inside the full network. For use without it,
a copy of the model is narrowed: each layer keeps the rows of the task's units and the columns that
they read, so that the model's own forward runs on smaller layers. Where that forward needs
Avalanche (task labels, a head a task), the narrowed copy is traced: the trace is a plain graph.
"""

import copy
import statistics
import time
from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from clnp.errors import UnsupportedNetwork
from clnp.layers import adapter_of, sliced
from clnp.layout import Runs, put, runs
from clnp.network import PartitionedNetwork, View
from clnp.units import Forward

RTOL, ATOL = 1e-4, 1e-5
"""How far logits may be from the sub-network's: other shapes, other order of summation."""


def compact(network: PartitionedNetwork, task: int, forward: Forward, example: Tensor) -> nn.Module:
    """The network of a learnt task, independent of the full one.

    Parameters
    ----------
    network
        The full network.
    task
        The task (0, 1, ... in order of learning).
    forward
        How the model is called for the task.
    example : (N, ...)
        A batch of inputs, on the model's device.

    Returns
    -------
    nn.Module
        In evaluation mode, without gradients, sharing no memory with the model; called with x
        alone. A copy of the model with narrower layers; or, of a model with a head a task or with
        parts of Avalanche's, a ``torch.fx.GraphModule`` whose tensors have the model's names.

    Raises
    ------
    UnsupportedNetwork
        If a forward that needs Avalanche can't be traced, or the result computes something else
        than the sub-network.

    Notes
    -----
    A single head that reads a group which hidden layers read as well (a sum, a concatenation) sees
    older units that it doesn't use; their columns are there, and zero.
    """
    narrow = _narrowed(network, network.task_view(task))
    module = narrow
    if not network.single_head or _from_avalanche(narrow):
        module = _traced(narrow, forward, example)
    with torch.no_grad():
        found, expected = module(example), network.subnetwork(task, forward)(example)
    if not torch.allclose(found, expected, RTOL, ATOL):
        raise UnsupportedNetwork(
            f"the compact network of task {task} is off by {(found - expected).abs().max():.3g} "
            f"from its sub-network: the forward of {type(network.model).__name__} depends on "
            "something else than its layers and x; make it a function of them"
        )
    return module


def _narrowed(network: PartitionedNetwork, view: View) -> nn.Module:
    """A copy of the model whose layers have the view's units alone."""
    layout, head = network.layout, view.head
    model = copy.deepcopy(network.model).eval().requires_grad_(False)
    model.zero_grad()
    for name in layout.order:
        module = model.get_submodule(head.layer if name == layout.head else name)
        module.__dict__.pop("forward", None)  # that of a view, if the model is in one
        if name in layout.shared:
            continue
        if name == layout.head:
            _narrow_head(network, view, module)
            continue
        rows = layout.runs(layout.rows[name], view.start, view.stop)
        columns = layout.columns[name]
        adapter = adapter_of(name, module)
        reads = None
        if adapter.has_columns and columns:
            reads = layout.runs(columns, view.start, view.stop)
        stored = network._stored(name, network.model.get_submodule(name), adapter)
        _fill(module, sliced(stored, rows, reads), _width(rows))
    return model


def _narrow_head(network: PartitionedNetwork, view: View, module: nn.Module) -> None:
    """Give a head the columns of the units that its input holds: zeros where it reads none."""
    layout, head = network.layout, view.head
    columns = layout.columns[layout.head]
    adapter = adapter_of(head.layer, module)
    stored = network._stored(head.layer, network.model.get_submodule(head.layer), adapter)
    read = layout.runs(columns, head.start, view.stop)
    tensors = sliced(stored, None, read)
    weight = tensors["weight"]
    assert weight is not None
    held = _width(layout.runs(columns, view.start, view.stop))
    if held > _width(read):
        wide = weight.new_zeros(weight.shape[0], held, *weight.shape[2:])
        put(wide, runs(columns, head.start, view.stop, view.start, view.stop), weight, 1)
        tensors["weight"] = wide
    if head.bias is not None or not head.use_bias:
        tensors["bias"] = None if head.bias is None else head.bias.to(weight.device)
    _fill(module, tensors, weight.shape[0])


def _width(where: Runs) -> int:
    return sum(run.stop - run.start for run in where)


def _fill(module: nn.Module, tensors: dict[str, Tensor | None], width: int) -> None:
    """Make a layer one of ``width`` output channels with the given tensors, which are copied."""
    if isinstance(module, nn.modules.conv._ConvNd):
        module.groups = module.groups * width // module.out_channels if module.groups > 1 else 1
    for key, tensor in tensors.items():
        copied = None if tensor is None else tensor.detach().clone()
        if key in module._parameters and copied is not None:
            module._parameters[key] = nn.Parameter(copied, requires_grad=False)
        elif key in module._parameters:
            module._parameters[key] = None
        elif key in module._buffers:
            module._buffers[key] = copied
    weight = module._parameters.get("weight")
    if isinstance(module, nn.Linear):
        assert weight is not None
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        assert weight is not None
        module.out_channels, module.in_channels = width, weight.shape[1] * module.groups
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = width
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = module.num_groups * width // module.num_channels
        module.num_channels = width
    else:
        assert isinstance(module, nn.PReLU)
        module.num_parameters = width


def _from_avalanche(model: nn.Module) -> bool:
    """Whether the model can't be used without Avalanche."""
    classes = {base for module in model.modules() for base in type(module).__mro__}
    return any(base.__module__.split(".")[0] == "avalanche" for base in classes)


class _Call(nn.Module):
    """A model called as for one task, to be traced."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model = model
        self.call = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.model, x)


def _traced(model: nn.Module, forward: Forward, example: Tensor) -> nn.Module:
    """What a model computes when called as for one task: a plain graph, any batch size."""
    batch = example if len(example) > 1 else torch.cat([example, example])  # 1 would be a constant
    try:
        program = torch.export.export(
            _Call(model, forward).eval(), (batch,), dynamic_shapes=({0: Dim.DYNAMIC},)
        )
    except Exception as error:
        raise UnsupportedNetwork(
            f"{type(model).__name__} can't be traced for one task by torch.export, so that its "
            f"compact network would need Avalanche ({str(error).splitlines()[0]}); avoid branches "
            "on values in its forward, or use plugin.subnetwork(task)"
        ) from error
    traced = program.module(check_guards=False)
    assert isinstance(traced, fx.GraphModule)
    attributes: dict[str, object] = {}
    for node in list(traced.graph.nodes):
        if node.op == "get_attr" and not node.users:  # other tasks' heads
            traced.graph.erase_node(node)
        elif node.op == "get_attr":
            value = traced
            for part in str(node.target).split("."):
                value = getattr(value, part)
            node.target = str(node.target).removeprefix("model.")
            attributes[node.target] = value
        elif node.target is torch.ops.aten.index_put_.default:
            _as_masked_fill(node)
    # A new module, which gets the tensors that the graph reads and no others.
    return fx.GraphModule(attributes, traced.graph, type(model).__name__).eval()


def _as_masked_fill(node: fx.Node) -> None:
    """Write ``out[..., mask] = number`` (Avalanche's masked heads) in a way that ONNX has too."""
    out, indices, value = node.args[:3]
    assert isinstance(out, fx.Node)
    assert isinstance(indices, list | tuple)
    assert isinstance(value, fx.Node)
    *before, mask = indices
    whole = len(indices) == out.meta["val"].dim() and not any(before)
    if not whole or not isinstance(mask, fx.Node) or len(node.args) > 3:
        return
    if mask.meta["val"].dtype == torch.bool and value.meta["val"].dim() == 0:
        node.target = torch.ops.aten.masked_fill_.Tensor
        node.args = (out, mask, value)


def report(
    compact: nn.Module,
    full: nn.Module,
    x: Tensor,
    call: Forward = lambda model, x: model(x),
    rounds: int = 20,
) -> pd.DataFrame:
    """Size and speed of a task's compact network against the full one.

    Parameters
    ----------
    compact
        The task's network.
    full
        The model that it is from, with all units and heads, between two tasks.
    x : (N, ...)
        A batch of inputs.
    call
        How the full model is called (with a task label, if it takes one).
    rounds
        Batches timed; the two take turns, after two batches each that aren't timed.

    Returns
    -------
    pandas.DataFrame
        Rows ``compact``, ``full`` and ``ratio`` (the first by the second); columns ``parameters``
        (number of entries) and ``seconds`` (for a batch, the median).
    """
    calls: dict[str, Callable[[], object]] = {
        "compact": lambda: compact(x),
        "full": lambda: call(full, x),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    modes = {module: module.training for module in full.modules()}
    full.eval()
    try:
        with torch.no_grad():
            for turn in range(rounds + 2):
                for name, run in calls.items():
                    taken = _seconds(run, x.device)
                    if turn >= 2:
                        seconds[name].append(taken)
    finally:
        for module, mode in modes.items():
            module.training = mode
    table = pd.DataFrame(
        {
            "parameters": {
                "compact": float(sum(p.numel() for p in compact.parameters())),
                "full": float(sum(p.numel() for p in full.parameters())),
            },
            "seconds": {name: statistics.median(taken) for name, taken in seconds.items()},
        }
    )
    table.loc["ratio"] = table.loc["compact"] / table.loc["full"]
    return table


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
