"""Widen groups of units between tasks: free rows at the end of each group, nothing else moves.

A group's new units stand behind its old ones wherever its channels are: in the rows of the layers
that compute and pass them on, and in the columns of those that read them; behind a concatenation
that is in the middle. What learnt tasks read keeps its values, and sees none of the new units.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from clnp.layers import adapter_of, reset, resize, row_tensors
from clnp.layout import Layout, Part, Span, UnitGroup, put, runs, take
from clnp.partition import derived_seed, sever


def widened_layout(layout: Layout, more: Mapping[str, int]) -> Layout:
    """The layout after widening, as :func:`clnp.units.find_layout` finds it in the wider model.

    Parameters
    ----------
    layout
        How the units are grouped now.
    more
        Units to add, by group; those not named keep their width.
    """

    def moved(part: Part, spans: Sequence[Span]) -> Part:
        first = shift = 0
        for span in spans:
            if first == part.first:
                return replace(part, first=first + shift)
            first += span.width
            shift += more.get(str(span.group), 0) * span.block
        raise AssertionError(f"{part} isn't in its own layer")

    def wider(group: UnitGroup) -> UnitGroup:
        return UnitGroup(
            group.name,
            group.width + more.get(group.name, 0),
            group.writers,
            tuple(moved(part, layout.rows[part.layer]) for part in group.norms),
            tuple(moved(part, layout.columns[part.layer]) for part in group.readers),
        )

    return replace(
        layout,
        groups=tuple(wider(group) for group in layout.groups),
        inputs=tuple(moved(part, layout.columns[part.layer]) for part in layout.inputs),
    )


def other_heads(model: nn.Module, layout: Layout, learnt: Iterable[str]) -> tuple[str, ...]:
    """The heads of other tasks: learnt ones, and those that wait for theirs.

    A layer waits for its task if the network doesn't call it now, and it is of the head's type and
    reads as many channels.
    """
    head = model.get_submodule(layout.head)
    found = [name for name in learnt if name != layout.head]
    for name, module in model.named_modules():
        if (
            name not in layout.order
            and type(module) is type(head)
            and _reads(module) == _reads(head)
        ):
            found.append(name)
    return tuple(dict.fromkeys(found))


@torch.no_grad()
def widen(
    model: nn.Module,
    layout: Layout,
    more: Mapping[str, int],
    used: dict[str, int],
    learnt: Sequence[str],
    heads: Sequence[str],
    seed: int,
) -> Layout:
    """Add free units to groups of a model.

    Parameters are the same objects as before, with longer tensors, so that optimizers that hold
    them go on. New rows, and new columns of free rows, are drawn by the layers' own
    ``reset_parameters``; new columns of frozen rows are zero (W_int, paper Sec. 2.1).

    Parameters
    ----------
    model
        The network; changed in place.
    layout
        How its units are grouped.
    more
        Units to add, by group.
    used
        Number of active units of each group.
    learnt
        The heads of learnt tasks, where each task has one of its own: their new columns are zero.
    heads
        All heads besides ``layout.head``.
    seed
        Of the draw.

    Returns
    -------
    Layout
        How the units are grouped now.
    """
    wide = widened_layout(layout, more)
    layers = [name for name in layout.order if name not in layout.shared]
    for index, name in enumerate([*layers, *heads]):
        is_head = name in heads or name == layout.head
        columns = layout.columns[layout.head if is_head else name]
        rows = () if is_head else layout.rows[name]
        grows = any(more.get(str(span.group), 0) for span in (*rows, *columns))
        if grows:
            _widen_layer(name, model, (rows, columns), layout, wide, derived_seed(seed, index))
    for name in heads:
        _tell_containers(model, name, layout, wide)
    _tell_containers(model, layout.head, layout, wide)
    modules = {name: model.get_submodule(name) for name in layout.order}
    if used and any(used.values()):
        sever(modules, wide, used)
    new = wide.runs(wide.columns[wide.head], layout.widths, wide.widths, inputs=False)
    for name in learnt:
        weight = model.get_submodule(name)._parameters["weight"]
        assert weight is not None
        for run in new:
            weight[:, run] = 0.0
    return wide


def _widen_layer(
    name: str,
    model: nn.Module,
    spans: tuple[Sequence[Span], Sequence[Span]],
    layout: Layout,
    wide: Layout,
    seed: int,
) -> None:
    """Lengthen a layer's tensors: draw them anew in full, then put the old values back."""
    module = model.get_submodule(name)
    adapter = adapter_of(name, module)
    tensors = {key: t for key, t in row_tensors(module, adapter).items() if t is not None}
    rows, columns = spans
    old = _places(rows, layout, wide)
    old_columns = _places(columns, layout, wide) if adapter.has_columns and columns else None
    kept = {key: tensor.detach() for key, tensor in tensors.items()}
    length = _length(rows, wide) if rows else None
    reads = _length(columns, wide) if columns else None
    for key, tensor in tensors.items():
        shape = list(tensor.shape)
        shape[0] = shape[0] if length is None else length
        if key == "weight" and old_columns is not None:
            shape[1] = reads if reads is not None else shape[1]
        tensor.data = _empty_like(tensor, shape)
        tensor.grad = None
    resize(module, length, reads)
    fresh = reset(module, seed)
    for key, tensor in tensors.items():
        tensor.copy_(fresh[key])
        part = tensor if length is None else take(tensor, old)
        if key == "weight" and old_columns is not None:
            put(part, old_columns, kept[key], 1)
        else:
            part.copy_(kept[key])
        if length is not None:
            put(tensor, old, part)


def _places(spans: Sequence[Span], layout: Layout, wide: Layout) -> tuple[slice, ...]:
    """Where old channels are in the longer tensor."""
    nothing = dict.fromkeys(layout.widths, 0)
    return runs(spans, nothing, layout.widths, nothing, wide.widths)


def _length(spans: Sequence[Span], wide: Layout) -> int:
    return sum(
        span.width if span.group is None else wide.widths[span.group] * span.block for span in spans
    )


def _empty_like(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A longer tensor in the same memory format, on which it depends which kernels run."""
    kinds = {4: torch.channels_last, 5: torch.channels_last_3d}
    kind = kinds.get(tensor.dim(), torch.contiguous_format)
    if tensor.is_contiguous() or not tensor.is_contiguous(memory_format=kind):
        kind = torch.contiguous_format
    return torch.empty(*shape, dtype=tensor.dtype, device=tensor.device, memory_format=kind)


def _reads(module: nn.Module) -> int | None:
    """How many channels a layer reads, by its own account."""
    for key in ("in_features", "in_channels"):
        count = getattr(module, key, None)
        if isinstance(count, int):
            return count
    return None


def _tell_containers(model: nn.Module, head: str, layout: Layout, wide: Layout) -> None:
    """Let a module that makes heads make later ones as wide (Avalanche's MultiHeadClassifier)."""
    old = _length(layout.columns[layout.head], layout)
    parts = head.split(".")
    for depth in range(1, len(parts)):
        container = model.get_submodule(".".join(parts[:depth]))
        for key in ("in_features", "in_channels"):
            if container.__dict__.get(key) == old:
                setattr(container, key, _length(wide.columns[wide.head], wide))
