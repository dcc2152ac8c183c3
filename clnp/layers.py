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
        group of units. False where it passes its units through one by one (batch norm).
    compute
        ``compute(module, x, tensors, training)``: the layer's output from sliced tensors.
    """

    types: tuple[type[nn.Module], ...]
    unit_dim: int
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    has_columns: bool
    compute: Callable[[nn.Module, Tensor, Tensors, bool], Tensor]


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
    return F.batch_norm(
        x,
        tensors["running_mean"],
        tensors["running_var"],
        tensors["weight"],
        tensors["bias"],
        training,
        momentum,
        module.eps,
    )


ADAPTERS = (
    Adapter((nn.Linear,), -1, ("weight", "bias"), (), True, _linear),
    Adapter((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1, ("weight", "bias"), (), True, _conv),
    Adapter(
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
        1,
        ("weight", "bias"),
        ("running_mean", "running_var"),
        False,
        _batch_norm,
    ),
)

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
        if parametrize.is_parametrized(module) or "weight" not in module._parameters:
            raise UnsupportedNetwork(
                f"{where} computes its weight (a parametrization, weight or spectral norm); "
                "CLNP needs plain parameters: remove the parametrization"
            )
        if getattr(module, "groups", 1) != 1:
            raise UnsupportedNetwork(
                f"{where} has groups={module.groups}; grouped convolutions are not supported yet: "
                "use groups=1"
            )
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise UnsupportedNetwork(
                f"{where} has no running statistics, so that its output depends on the batch; "
                "use track_running_stats=True"
            )
        return adapter
    raise UnsupportedNetwork(
        f"{where} has parameters, and CLNP doesn't know how to split them by unit; supported are "
        f"{SUPPORTED}, and any layer without parameters that treats each unit alike (activations, "
        "pooling, dropout, flatten). Replace the layer, or keep it out of the model (for instance "
        "as a frozen preprocessing of the data)"
    )


def row_tensors(module: nn.Module, adapter: Adapter) -> dict[str, Tensor | None]:
    """The layer's tensors that have one row a unit, by name."""
    return {
        **{name: module._parameters[name] for name in adapter.parameters},
        **{name: module._buffers[name] for name in adapter.buffers},
    }


def sliced(
    tensors: Tensors, rows: slice, columns: slice | None, adapter: Adapter
) -> dict[str, Tensor | None]:
    """The given rows of each tensor, and the given columns of the weight; views, no copies."""
    part = {name: None if t is None else t[rows] for name, t in tensors.items()}
    weight = part.get("weight")
    if adapter.has_columns and columns is not None and weight is not None:
        part["weight"] = weight[:, columns]
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
