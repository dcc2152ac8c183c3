"""How a network's units are grouped, and which channels of each layer hang on which units.

A unit is a neuron of a linear layer, or a channel of a convolution; of grouped convolutions and
group norms, a whole group of channels. Behind a concatenation a layer's channels are those of
several groups of units, one run after the other. All that CLNP needs to know of that are ranges:
the channels of units [a:b) of each group are a few *runs* of neighbouring channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

Runs = tuple[slice, ...]
"""Neighbouring channels, run after run: rising, and apart from each other."""


@dataclass(frozen=True)
class Part:
    """A run of a layer's channels that hangs on the units of a group.

    Attributes
    ----------
    layer
        The layer's name.
    block
        Neighbouring channels a unit: 1, or H·W behind a flatten, or a whole group of channels.
    first
        The first of them; not 0 behind a concatenation.
    reads
        Channels a unit that the layer reads, where that is another number than it passes on (a
        grouped convolution).
    """

    layer: str
    block: int = 1
    first: int = 0
    reads: int | None = None


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
        The layers that pass them on one by one with parameters of their own: norms, depthwise and
        grouped convolutions.
    readers
        The layers that read them.
    """

    name: str
    width: int
    writers: tuple[Part, ...]
    norms: tuple[Part, ...]
    readers: tuple[Part, ...]


@dataclass(frozen=True)
class Span:
    """What one run of a layer's channels is: ``block`` channels for each unit of a group.

    ``group`` is None for channels of the network's own input, which every task reads.
    """

    group: str | None
    units: int
    block: int

    @property
    def width(self) -> int:
        """Number of channels."""
        return self.units * self.block


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
    weights
        Those of them with a weight matrix (linear, convolution), in forward order.
    inputs
        Columns that read the network's own input beside units (a concatenation with it); ``block``
        is their number.
    shared
        Layers whose parameters belong to no unit (a norm over positions, an activation with one
        slope): they train with the first task alone.
    """

    groups: tuple[UnitGroup, ...]
    head: str
    order: tuple[str, ...]
    weights: tuple[str, ...] = ()
    inputs: tuple[Part, ...] = ()
    shared: tuple[str, ...] = ()

    @cached_property
    def widths(self) -> dict[str, int]:
        """Number of units by group."""
        return {group.name: group.width for group in self.groups}

    @cached_property
    def rows(self) -> dict[str, tuple[Span, ...]]:
        """Layer -> what its output channels are (the head and shared layers: nothing)."""
        found: dict[str, list[tuple[int, Span]]] = {}
        for group in self.groups:
            for part in (*group.writers, *group.norms):
                span = Span(group.name, group.width, part.block)
                found.setdefault(part.layer, []).append((part.first, span))
        return _ordered(self.order, found)

    @cached_property
    def columns(self) -> dict[str, tuple[Span, ...]]:
        """Layer -> what its input channels are; nothing if it reads the network's input alone."""
        found: dict[str, list[tuple[int, Span]]] = {}
        for part in self.inputs:
            found.setdefault(part.layer, []).append((part.first, Span(None, part.block, 1)))
        for group in self.groups:
            for part in (*group.norms, *group.readers):
                span = Span(group.name, group.width, part.reads or part.block)
                found.setdefault(part.layer, []).append((part.first, span))
        return _ordered(self.order, found)

    def offsets(self, layer: str) -> tuple[tuple[Span, ...], tuple[int, ...]]:
        """What a layer's input channels are, and where each span of them begins."""
        spans = self.columns[layer]
        ends = accumulate((span.width for span in spans), initial=0)
        return spans, tuple(ends)[:-1]

    @property
    def writes(self) -> dict[str, str]:
        """Layer -> the one group whose units it computes or passes on."""
        return {layer: str(s[0].group) for layer, s in self.rows.items() if len(s) == 1}

    @cached_property
    def ends(self) -> tuple[str, ...]:
        """The groups that the head reads."""
        return tuple(dict.fromkeys(s.group for s in self.columns[self.head] if s.group is not None))

    @property
    def last(self) -> UnitGroup:
        """The last hidden group that the head reads."""
        return next(g for g in reversed(self.groups) if g.name in self.ends)

    def runs(
        self,
        spans: Sequence[Span],
        low: Mapping[str, int],
        high: Mapping[str, int],
        inputs: bool = True,
    ) -> Runs:
        """The channels of units [low:high) of each group, in a tensor that holds all units."""
        return runs(spans, low, high, dict.fromkeys(self.widths, 0), self.widths, inputs)

    def core(self) -> object:
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
        order = tuple(name for name in self.order if name != self.head)
        return groups, order, self.columns[self.head]


def _ordered(
    order: Sequence[str], found: Mapping[str, list[tuple[int, Span]]]
) -> dict[str, tuple[Span, ...]]:
    return {
        layer: tuple(span for _, span in sorted(found.get(layer, []), key=lambda pair: pair[0]))
        for layer in order
    }


def runs(
    spans: Sequence[Span],
    low: Mapping[str, int],
    high: Mapping[str, int],
    held_low: Mapping[str, int],
    held_high: Mapping[str, int],
    inputs: bool = True,
) -> Runs:
    """Where a tensor has the channels of units [low:high) of each group.

    Parameters
    ----------
    spans
        What its channels are, were all units there.
    low, high
        The units asked for, by group.
    held_low, held_high
        The units that the tensor holds, by group.
    inputs
        Whether channels of the network's input, which belong to no unit, are among them.

    Returns
    -------
    tuple of slice
        Runs that touch are one.
    """
    found: list[slice] = []
    position = 0
    for span in spans:
        if span.group is None:
            begin, end, held = 0, span.width if inputs else 0, span.width
        else:
            base = held_low[span.group]
            begin = (low[span.group] - base) * span.block
            end = (high[span.group] - base) * span.block
            held = (held_high[span.group] - base) * span.block
        if end > begin:
            if found and found[-1].stop == position + begin:
                found[-1] = slice(found[-1].start, position + end)
            else:
                found.append(slice(position + begin, position + end))
        position += held
    return tuple(found)


def pieces(tensor: Tensor, where: Runs, dim: int = 0) -> list[Tensor]:
    """The given runs of a tensor's channels, as views."""
    return [tensor.narrow(dim, run.start, run.stop - run.start) for run in where]


def take(tensor: Tensor, where: Runs, dim: int = 0) -> Tensor:
    """The given channels of a tensor: itself for all, a view of one run, a copy of several."""
    found = pieces(tensor, where, dim)
    if len(found) == 1:
        # A gradient back through a view of everything would be copied into zeros.
        return tensor if found[0].shape == tensor.shape else found[0]
    return torch.cat(found, dim) if found else tensor.narrow(dim, 0, 0)


@torch.no_grad()
def put(tensor: Tensor, where: Runs, values: Tensor, dim: int = 0) -> None:
    """Write values into the given channels of a tensor: the reverse of :func:`take`."""
    sizes = [run.stop - run.start for run in where]
    for piece, value in zip(pieces(tensor, where, dim), values.split(sizes, dim), strict=True):
        piece.copy_(value)
