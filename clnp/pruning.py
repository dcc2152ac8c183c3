"""Activity of units (paper, Sec. 2.2) and graceful forgetting: cut as far as the margin allows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from clnp.arguments import choice
from clnp.errors import CLNPError
from clnp.layout import Layout, Part

EPSILON = 1e-9
"""Accuracies are ratios of counts: differences below this are rounding."""


class Activity:
    """Mean activity E_S[|a|] of each unit where it is read: the largest of its readers.

    For ReLU units this is the paper's mean activation; of a convolution's channel, over images
    and positions.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._sums: dict[tuple[str, Part], Tensor] = {}
        self._counts: dict[tuple[str, Part], int] = {}

    @contextmanager
    def measure(
        self, model: nn.Module, start: dict[str, int], stop: dict[str, int] | None = None
    ) -> Iterator[None]:
        """Watch what readers read during the forward passes inside.

        Parameters
        ----------
        model
            The network.
        start, stop
            The passes compute units [start:stop) of each group (stop None: up to the last);
            others aren't active.
        """
        stop = self._layout.widths if stop is None else stop
        handles = []
        for group in self._layout.groups:
            for part in group.readers:
                key = (group.name, part)
                self._sums[key] = torch.zeros(group.width, dtype=torch.float64)
                self._counts[key] = 0
                module = model.get_submodule(part.layer)
                handles.append(module.register_forward_pre_hook(self._hook(key, start, stop)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(
        self, key: tuple[str, Part], start: dict[str, int], stop: dict[str, int]
    ) -> Callable[..., None]:
        """Add up what a layer reads of a group, of which the passes compute [start:stop)."""
        group, part = key
        width = (stop[group] - start[group]) * part.block
        offset = 0  # where the group's channels begin in what the layer reads
        for span, first in zip(*self._layout.offsets(part.layer), strict=True):
            if first == part.first:
                break
            held = span.units if span.group is None else stop[span.group] - start[span.group]
            offset += held * span.block

        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            dim = -1 if isinstance(module, nn.Linear) else 1
            x = inputs[0].detach().narrow(dim, offset, width).float().abs()
            x = x.unflatten(dim, (-1, part.block)).movedim(dim if dim > 0 else -2, 0)
            each = x.flatten(1).sum(1)
            sums = self._sums[key]
            if sums.device != each.device:
                # MPS has no float64; single precision does there.
                kind = torch.float32 if each.device.type == "mps" else torch.float64
                sums = self._sums[key] = sums.to(each.device, kind)
            sums[start[group] : stop[group]] += each
            self._counts[key] += x[0].numel()

        return hook

    def means(self) -> dict[str, Tensor]:
        """Activity of each unit (width,) float64 on the CPU, by group."""
        found: dict[str, Tensor] = {}
        for (group, reader), total in self._sums.items():
            mean = total.double().cpu() / max(1, self._counts[group, reader])
            found[group] = torch.maximum(found[group], mean) if group in found else mean
        return found


def sorting(activity: Tensor, used: int) -> Tensor:
    """Order of a group's units: used ones where they are, free ones by falling activity.

    Parameters
    ----------
    activity : (width,)
        Mean activity of each unit.
    used
        Units that belong to earlier tasks.

    Returns
    -------
    (width,) int64
        ``order[i]`` is the present place of the unit that goes to place i.
    """
    free = torch.argsort(activity[used:], descending=True, stable=True) + used
    return torch.cat([torch.arange(used), free])


@dataclass(frozen=True)
class Cut:
    """Where the layers are cut.

    Attributes
    ----------
    used
        Active units of each group, older tasks' included.
    thresholds
        theta of each group: its new units are those with activity > theta.
    accuracy
        Validation accuracy after the cut.
    evaluations
        How many candidates were evaluated.
    living
        Validation accuracy without the dead units (theta = 0), with nothing else cut.
    """

    used: dict[str, int]
    thresholds: dict[str, float]
    accuracy: float
    evaluations: int
    living: float


@dataclass(frozen=True)
class Ladder:
    """The counts that a group can be cut to: units of equal activity are never separated.

    Attributes
    ----------
    counts
        Rising numbers of active units, older ones included.
    thresholds
        theta that leaves so many.
    """

    counts: tuple[int, ...]
    thresholds: tuple[float, ...]


def ladder(activity: Tensor, used: int, floor: int) -> Ladder:
    """The rungs of one group, whose free units are sorted by falling activity.

    Parameters
    ----------
    activity : (width,)
        Mean activities, those of the free units ``[used:]`` falling.
    used
        Units that belong to earlier tasks.
    floor
        The smallest count (a layer can't compute no unit at all).
    """
    free = [float(a) for a in activity[used:]]
    alive = sum(a > 0 for a in free)
    edges = [n for n in range(alive + 1) if n in (0, alive) or free[n - 1] > free[n]]
    edges = [n for n in edges if used + n >= floor] or [min(len(free), max(0, floor - used))]
    thetas = [free[n] if n < alive else 0.0 for n in edges]
    return Ladder(tuple(used + n for n in edges), tuple(thetas))


def graceful_forgetting(
    activity: dict[str, Tensor],
    used: dict[str, int],
    floors: dict[str, int],
    evaluate: Callable[[dict[str, int]], float],
    best: float,
    margin: float,
    thresholds: str = "per-layer",
    below: str = "harmless",
) -> Cut:
    """Raise theta as far as validation accuracy stays within the margin of the best (Sec. 2.2).

    Layers are cut from the last to the first, the i-th cut of L up to a total drop of margin·i/L,
    then once more with what is left of the margin. If the model with all its living units is
    already below the margin, what goes costs no more accuracy, or is dead (theta = 0).

    Parameters
    ----------
    activity : {group: (width,)}
        Mean activities in forward order of the groups, free units sorted by falling activity.
    used
        Units of earlier tasks by group.
    floors
        Smallest count by group.
    evaluate
        Validation accuracy of the network cut to given counts; nothing is trained.
    best
        The best validation accuracy: of the grid, or of the training's epochs.
    margin
        m, the absolute drop allowed, as a fraction.
    thresholds
        ``"per-layer"``, or ``"shared"``: one theta for all layers.
    below
        What goes if the model is already below the margin: ``"harmless"`` units, or ``"dead"``
        ones alone.

    Raises
    ------
    ValueError
        If ``thresholds`` or ``below`` is none of its values.
    CLNPError
        If activities aren't finite: units that give no numbers would spoil every later task.
    """
    choice("thresholds", thresholds, ("per-layer", "shared"))
    choice("below", below, ("harmless", "dead"))
    for name, each in activity.items():
        if not bool(torch.isfinite(each).all()):
            raise CLNPError(
                f"units of layer {name!r} give NaN or infinity, so the training diverged and the "
                "task isn't learnt; lower the learning rate, or clip gradients (after a first task "
                "with the model built anew)"
            )
    rungs = {name: ladder(activity[name], used[name], floors[name]) for name in activity}
    cache: dict[tuple[int, ...], float] = {}

    def accuracy(places: dict[str, int]) -> float:
        counts = {name: rungs[name].counts[i] for name, i in places.items()}
        key = tuple(counts.values())
        if key not in cache:
            cache[key] = evaluate(counts)
        return cache[key]

    places = {name: len(r.counts) - 1 for name, r in rungs.items()}  # theta = 0
    living = accuracy(places)
    if living < best - margin - EPSILON and below == "harmless":
        # An epoch can have spent the margin, or sums without the dead units can have rounded
        # otherwise. None of that is a reason to keep what isn't needed.
        best, margin = living, 0.0
    if living >= best - margin - EPSILON:
        if thresholds == "shared":
            places = _shared(rungs, places, accuracy, best - margin)
        else:
            order = list(reversed(rungs))
            drops = [margin * (i + 1) / len(order) for i in range(len(order))]
            for name, drop in [*zip(order, drops, strict=True), *((n, margin) for n in order)]:
                places = _lower(name, places, accuracy, best - drop)
    return Cut(
        {name: rungs[name].counts[i] for name, i in places.items()},
        {name: rungs[name].thresholds[i] for name, i in places.items()},
        accuracy(places),
        len(cache),
        living,
    )


def _lower(
    name: str,
    places: dict[str, int],
    accuracy: Callable[[dict[str, int]], float],
    bound: float,
) -> dict[str, int]:
    """The lowest rung of one layer that a binary search finds at or above the bound.

    Accuracy isn't monotone in theta; the rung returned has been seen to hold (or is where the
    search began).
    """
    low, high = 0, places[name]
    if accuracy(places) < bound - EPSILON:
        return places  # an earlier layer has used this share of the margin up
    while low < high:
        middle = (low + high) // 2
        if accuracy({**places, name: middle}) >= bound - EPSILON:
            high = middle
        else:
            low = middle + 1
    return {**places, name: high}


def _shared(
    rungs: dict[str, Ladder],
    places: dict[str, int],
    accuracy: Callable[[dict[str, int]], float],
    bound: float,
) -> dict[str, int]:
    """The highest theta, one for all layers, that a binary search finds within the bound."""
    thetas = sorted({theta for r in rungs.values() for theta in r.thresholds}, reverse=True)

    def at(theta: float) -> dict[str, int]:
        # Each layer's smallest count whose first cut unit isn't above theta.
        return {
            name: next(i for i, t in enumerate(r.thresholds) if t <= theta)
            for name, r in rungs.items()
        }

    low, high = 0, len(thetas) - 1
    if accuracy(places) < bound - EPSILON:
        return places
    while low < high:
        middle = (low + high) // 2
        if accuracy(at(thetas[middle])) >= bound - EPSILON:
            high = middle
        else:
            low = middle + 1
    return at(thetas[high])


def new_share(
    used: Mapping[str, int], before: Mapping[str, int], widths: Mapping[str, int]
) -> Fraction:
    """How much of the network a cut takes: the sum over layers of new units / width.

    The smaller, the sparser. It is exact, so that equal cuts of different layers tie.

    Parameters
    ----------
    used, before
        Active units of each group after the cut, and before the task.
    widths
        Number of units of each group.
    """
    return sum((Fraction(used[g] - before[g], widths[g]) for g in widths), Fraction(0))


def sparsest(
    accuracies: Sequence[float | None], sizes: Sequence[tuple[Fraction, int]], bound: float
) -> int:
    """Choose among the models of a grid (Sec. 2.2): the sparsest of those within the bound.

    If none is within it (the best epoch of a training can be better than any that was kept), the
    most accurate one, and of several the sparsest.

    Parameters
    ----------
    accuracies
        Validation accuracy of each after its cut; None: it can't be chosen.
    sizes
        For each its share of the network (see :func:`new_share`), then what decides between equal
        shares.
    bound
        The accuracy allowed; exactly that is within it.

    Returns
    -------
    int
        Its place; the first of equal ones.
    """
    found = {i: accuracy for i, accuracy in enumerate(accuracies) if accuracy is not None}
    bound = min(bound, max(found.values()))
    within = [i for i, accuracy in found.items() if accuracy >= bound - EPSILON]
    return min(within, key=lambda i: sizes[i])
