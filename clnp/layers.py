"""One small adapter a layer type: compute some of its units from some of what it reads.

Everything that CLNP does with a network (train a task on the free units, run an old task's
sub-network, try a cut) is a forward pass in which each layer computes a *range* of its units
from a *range* of its columns. An adapter does just that for tensors already sliced; which
ranges, :mod:`clnp.network` knows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from clnp.errors import UnsupportedNetwork
from clnp.layout import Runs, take

Tensors = Mapping[str, Tensor | None]


@dataclass(frozen=True)
class Adapter:
    """What CLNP must know of a layer type.

    Attributes
    ----------
    types
        The layer types it serves (their own ``forward`` must not be overridden).
    unit_dim
        The dimension of input and output along which units lie.
    parameters, buffers
        Names of the tensors with one row a unit; any of them may be None.
    has_columns
        True where ``weight`` has rows (units) x columns (units read): the layer *writes* a new
        group of units. False where it passes its units through one by one (norms, depthwise and
        grouped convolutions).
    compute
        ``compute(module, x, tensors, training)``: the layer's output from sliced tensors.
    shared
        True where the parameters belong to no unit (a norm over positions): then every view uses
        the layer as it is.
    """

    types: tuple[type[nn.Module], ...]
    unit_dim: int
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    has_columns: bool
    compute: Callable[[nn.Module, Tensor, Tensors, bool], Tensor]
    shared: bool = False


def _linear(module: nn.Module, x: Tensor, tensors: Tensors, training: bool) -> Tensor:
    weight = tensors["weight"]
    assert weight is not None
    return F.linear(x, weight, tensors["bias"])


def _conv(module: nn.Module, x: Tensor, tensors: Tensors, training: bool) -> Tensor:
    # The module's own helper knows its stride, dilation and padding mode.
    return module._conv_forward(x, tensors["weight"], tensors["bias"])  # type: ignore[operator, no-any-return]


def _batch_norm(module: nn.Module, x: Tensor, tensors: Tensors, training: bool) -> Tensor:
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    momentum = 0.0 if module.momentum is None else module.momentum
    if training and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if module.momentum is None:
            momentum = 1.0 / float(module.num_batches_tracked)
    out = F.batch_norm(
        _dense(x),
        tensors["running_mean"],
        tensors["running_var"],
        tensors["weight"],
        tensors["bias"],
        training,
        momentum,
        module.eps,
    )
    if out.requires_grad:  # what comes back is a slice too
        out.register_hook(_dense)
    return out


def _dense(x: Tensor) -> Tensor:
    """The tensor, or a copy of it if it is a slice: a CPU's batch norm is slow on slices."""
    span = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    return x if span == x.numel() else x.clone()


def _grouped_conv(module: nn.Module, x: Tensor, tensors: Tensors, training: bool) -> Tensor:
    assert isinstance(module, nn.modules.conv._ConvNd)
    weight = tensors["weight"]
    assert weight is not None
    if module.padding_mode == "zeros":
        padding = module.padding
    else:  # as in the module's own forward, which takes its number of groups from itself
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        padding = (0,) * len(module.kernel_size)
    groups = weight.shape[0] * module.groups // module.out_channels
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(module.kernel_size) - 1]
    return convolve(x, weight, tensors["bias"], module.stride, padding, module.dilation, groups)


def _group_norm(module: nn.Module, x: Tensor, tensors: Tensors, training: bool) -> Tensor:
    assert isinstance(module, nn.GroupNorm)
    groups = x.shape[1] * module.num_groups // module.num_channels
    return F.group_norm(x, groups, tensors["weight"], tensors["bias"], module.eps)


def _instance_norm(module: nn.Module, x: Tensor, tensors: Tensors, training: bool) -> Tensor:
    assert isinstance(module, nn.modules.instancenorm._InstanceNorm)
    batched = x.dim() == module._get_no_batch_dim() + 1
    if not batched:
        raise UnsupportedNetwork(f"{module} reads inputs without a batch dimension")
    return F.instance_norm(
        x,
        tensors["running_mean"],
        tensors["running_var"],
        tensors["weight"],
        tensors["bias"],
        training or not module.track_running_stats,
        0.0 if module.momentum is None else module.momentum,
        module.eps,
    )


def _prelu(module: nn.Module, x: Tensor, tensors: Tensors, training: bool) -> Tensor:
    weight = tensors["weight"]
    assert weight is not None
    return F.prelu(x, weight)


def _as_it_is(module: nn.Module, x: Tensor, tensors: Tensors, training: bool) -> Tensor:
    return module(x)  # type: ignore[no-any-return]


AFFINE = ("weight", "bias")
STATISTICS = ("running_mean", "running_var")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

LINEAR = Adapter((nn.Linear,), -1, AFFINE, (), True, _linear)
CONV = Adapter(CONVOLUTIONS, 1, AFFINE, (), True, _conv)
GROUPED_CONV = Adapter(CONVOLUTIONS, 1, AFFINE, (), False, _grouped_conv)
BATCH_NORM = Adapter(BATCH_NORMS, 1, AFFINE, STATISTICS, False, _batch_norm)
GROUP_NORM = Adapter((nn.GroupNorm,), 1, AFFINE, (), False, _group_norm)
INSTANCE_NORM = Adapter(INSTANCE_NORMS, 1, AFFINE, STATISTICS, False, _instance_norm)
PRELU = Adapter((nn.PReLU,), 1, ("weight",), (), False, _prelu)
LAYER_NORM = Adapter((nn.LayerNorm,), 1, AFFINE, (), False, _as_it_is, shared=True)
ONE_SLOPE = Adapter((nn.PReLU,), 1, ("weight",), (), False, _as_it_is, shared=True)

ADAPTERS = (LINEAR, CONV, BATCH_NORM, GROUP_NORM, INSTANCE_NORM, PRELU, LAYER_NORM)
"""One a type; :func:`adapter_of` tells the variants of a type apart."""

SUPPORTED = ", ".join(t.__name__ for adapter in ADAPTERS for t in adapter.types)


def is_layer(module: nn.Module) -> bool:
    """Whether CLNP must know the module: it has parameters, or is of a type that it splits."""
    known = any(isinstance(module, adapter.types) for adapter in ADAPTERS)
    return known or any(p is not None for p in module._parameters.values())


def adapter_of(name: str, module: nn.Module) -> Adapter:
    """The adapter of a layer.

    Raises
    ------
    UnsupportedNetwork
        If no adapter knows the layer, or it is used in a way that the adapter can't honour; the
        message names the layer and what is supported.
    """
    if not name and list(module.children()):
        own = next(key for key, p in module._parameters.items() if p is not None)
        raise UnsupportedNetwork(
            f"the model has a parameter of its own, {own!r}, and CLNP doesn't know how to split it "
            f"by unit; put it into a layer ({SUPPORTED})"
        )
    where = f"layer {name!r} ({module})"
    for adapter in ADAPTERS:
        if not isinstance(module, adapter.types):
            continue
        base = next(t for t in adapter.types if isinstance(module, t))
        if type(module).forward is not base.forward:
            raise UnsupportedNetwork(
                f"{where} overrides the forward of {base.__name__}, which CLNP can't slice; "
                f"use a plain {base.__name__}"
            )
        affine = getattr(module, "affine", getattr(module, "elementwise_affine", True))
        if parametrize.is_parametrized(module) or (affine and "weight" not in module._parameters):
            raise UnsupportedNetwork(
                f"{where} computes its weight (a parametrization, weight or spectral norm); "
                "CLNP needs plain parameters: remove the parametrization"
            )
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise UnsupportedNetwork(
                f"{where} has no running statistics, so that its output depends on the batch; "
                "use track_running_stats=True"
            )
        if adapter is CONV and getattr(module, "groups", 1) > 1:
            return GROUPED_CONV
        if isinstance(module, nn.PReLU) and module.num_parameters == 1:
            return ONE_SLOPE
        return adapter
    raise UnsupportedNetwork(
        f"{where} has parameters, and CLNP doesn't know how to split them by unit; supported are "
        f"{SUPPORTED}, and any layer without parameters that treats each unit alike (activations, "
        "pooling, dropout, flatten). Replace the layer, or keep it out of the model (for instance "
        "as a frozen preprocessing of the data)"
    )


def row_tensors(module: nn.Module, adapter: Adapter) -> dict[str, Tensor | None]:
    """The layer's tensors that have one row a channel (a shared layer: any), by name."""
    return {
        **{name: module._parameters.get(name) for name in adapter.parameters},
        **{name: module._buffers.get(name) for name in adapter.buffers},
    }


def resize(module: nn.Module, rows: int | None, columns: int | None) -> None:
    """Tell a layer whose tensors have been lengthened how many channels it has.

    Parameters
    ----------
    module
        The layer; its sizes are changed, not its tensors.
    rows, columns
        Channels that it computes, and that it reads; None: as many as before.
    """
    if isinstance(module, nn.Linear):
        module.out_features = module.out_features if rows is None else rows
        module.in_features = module.in_features if columns is None else columns
    elif isinstance(module, nn.modules.conv._ConvNd):
        if module.groups > 1 and rows is not None:  # a group has as many channels as before
            module.groups = module.groups * rows // module.out_channels
        module.out_channels = module.out_channels if rows is None else rows
        module.in_channels = module.in_channels if columns is None else columns
    elif rows is None:
        return
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = module.num_groups * rows // module.num_channels
        module.num_channels = rows
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = rows
    elif isinstance(module, nn.PReLU):
        module.num_parameters = rows


def sliced(tensors: Tensors, rows: Runs | None, columns: Runs | None) -> dict[str, Tensor | None]:
    """The given rows of each tensor, and the given columns of the weight (None: all)."""
    part = {name: t if t is None or rows is None else take(t, rows) for name, t in tensors.items()}
    weight = part.get("weight")
    if columns is not None and weight is not None:
        part["weight"] = take(weight, columns, dim=1)
    return part


def reset(module: nn.Module, seed: int) -> dict[str, Tensor]:
    """Fresh values of the layer's tensors, drawn by its own ``reset_parameters``.

    Drawn on the CPU from a generator of their own, so that they depend neither on the device nor on
    anything that happened before, and nothing else is disturbed.

    Parameters
    ----------
    module
        The layer; it is not changed.
    seed
        Seed of the draw.
    """
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed the GPUs' generators as well, for good.
        torch.default_generator.manual_seed(seed)
        # A new object of the layer's shape, not a deep copy: hooks and graphs stay behind.
        fresh = module.__class__.__new__(module.__class__)
        fresh.__dict__ = {
            k: v for k, v in module.__dict__.items() if k not in ("_parameters", "_buffers")
        }
        fresh._parameters = {
            k: None if p is None else nn.Parameter(torch.empty_like(p, device="cpu"))
            for k, p in module._parameters.items()
        }
        fresh._buffers = {
            k: None if b is None else torch.empty_like(b, device="cpu")
            for k, b in module._buffers.items()
        }
        fresh.reset_parameters()  # type: ignore[operator]
    return {k: v.detach() for k, v in (fresh._parameters | fresh._buffers).items() if v is not None}
