"""How much of each layer is used, new, reused and free (paper, Sec. 2.1 and Fig. 3)."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from clnp.layout import Layout
from clnp.partition import Partition

REUSED_SHARE = 0.01
"""A unit is reused if what is read of it exceeds this share of the layer's largest; and a unit
reads old ones only if what it reads of new ones is at most this share of all that it reads."""


@dataclass(frozen=True)
class Sufficiency:
    """Of a task's new units of one group, the shares that read one kind of units only.

    Attributes
    ----------
    old_only
        Share that reads older tasks' units only: the features there were enough for them.
    new_only
        Share that reads units of the task itself only.
    """

    old_only: float
    new_only: float


def _rows_of_task(
    modules: Mapping[str, nn.Module],
    layout: Layout,
    layer: str,
    before: Mapping[str, int],
    after: Mapping[str, int],
) -> Tensor:
    """The rows of a layer's weight that a task has trained (of the head: all), not copied."""
    weight = modules[layer]._parameters["weight"]
    assert weight is not None
    if layer == layout.head:
        return weight.detach()
    (span,) = layout.rows[layer]
    name = str(span.group)
    return weight.detach()[before[name] * span.block : after[name] * span.block]


@torch.no_grad()
def reused(
    modules: Mapping[str, nn.Module],
    layout: Layout,
    before: Mapping[str, int],
    after: Mapping[str, int],
    head_start: Mapping[str, int],
    activity: Mapping[str, Tensor],
    share: float = REUSED_SHARE,
) -> dict[str, Tensor]:
    """Which older units a task's new rows really read, by group.

    What new rows read of unit u is the sum over them of |w_ru|·E[a_u]; u is reused if that exceeds
    ``share`` of the largest of its layer. (That a weight isn't 0 says nothing: all are.)

    Parameters
    ----------
    modules
        The network's layers by name.
    layout
        How units are grouped.
    before, after
        Frontiers before and after the task, by group.
    head_start
        The first unit of each group that the task's head reads.
    activity : {group: (width,)}
        Mean activity of each unit on the task.
    share
        The share of the largest above which a unit counts.

    Returns
    -------
    {group: (before[group],) bool}
        True where a unit is reused.
    """
    found: dict[str, Tensor] = {}
    for group in layout.groups:
        amount = torch.zeros(group.width, dtype=torch.float64)
        for part in group.readers:
            rows = _rows_of_task(modules, layout, part.layer, before, after)
            columns = rows.narrow(1, part.first, group.width * part.block)
            read = columns.abs().transpose(0, 1).flatten(1).double().sum(1)
            read = read.view(group.width, part.block).sum(1).cpu()
            if part.layer == layout.head:
                read[: head_start[group.name]] = 0.0
            amount += read
        amount *= activity[group.name]
        amount[after[group.name] :] = 0.0
        bound = share * float(amount.max()) if amount.numel() else 0.0
        found[group.name] = amount[: before[group.name]] > bound
    return found


@contextmanager
def ablated(
    modules: Mapping[str, nn.Module],
    layout: Layout,
    before: Mapping[str, int],
    after: Mapping[str, int],
    head_start: Mapping[str, int],
    kept: Mapping[str, Tensor],
) -> Iterator[None]:
    """Inside, a task's new rows and its head read none of the older units but those kept.

    Older rows read them still, since reused units are computed from them. Weights are set to zero
    in place, and are bitwise what they were afterwards; a view has to be entered inside, for it
    may hold copies of them.

    Parameters
    ----------
    modules
        The network's layers by name.
    layout
        How units are grouped.
    before, after
        Frontiers before and after the task, by group.
    head_start
        The first unit of each group that the task's head reads.
    kept : {group: (before[group],) bool}
        The older units that may be read, as :func:`reused` tells them.
    """
    changed: list[tuple[Tensor, Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for group in layout.groups:
                cut = (~kept[group.name]).nonzero().flatten()
                for part in group.readers:
                    rows = _rows_of_task(modules, layout, part.layer, before, after)
                    head = part.layer == layout.head
                    units = cut[cut >= head_start[group.name]] if head else cut
                    channels = units[:, None] * part.block + torch.arange(part.block)
                    columns = (part.first + channels.flatten()).to(rows.device)
                    changed.append((rows, columns, rows.index_select(1, columns)))
                    rows.index_fill_(1, columns, 0.0)
        yield
    finally:
        for rows, columns, values in reversed(changed):
            rows.index_copy_(1, columns, values)


@torch.no_grad()
def sufficiency(
    modules: Mapping[str, nn.Module],
    layout: Layout,
    before: Mapping[str, int],
    after: Mapping[str, int],
    activity: Mapping[str, Tensor],
    share: float = REUSED_SHARE,
) -> dict[str, Sufficiency | None]:
    """Whether a task's new units read older units or each other, by group (paper, Sec. 2.1).

    What new unit r reads of unit u is |w_ru|·E[a_u], summed over the weights of all layers that
    compute r. It reads old ones only if new ones have at most ``share`` of its sum over u, and
    vice versa; a unit that reads nothing at all is neither.

    Parameters
    ----------
    modules
        The network's layers by name.
    layout
        How units are grouped.
    before, after
        Frontiers before and after the task, by group.
    activity : {group: (width,)}
        Mean activity of each unit on the task.
    share
        The share up to which what is read doesn't count.

    Returns
    -------
    {group: Sufficiency or None}
        None where there is no new unit, or where the network's own input is read, which is neither
        old nor new.
    """
    found: dict[str, Sufficiency | None] = {}
    for group in layout.groups:
        new = after[group.name] - before[group.name]
        spans = [span for part in group.writers for span in layout.columns[part.layer]]
        reads_input = any(not layout.columns[part.layer] for part in group.writers)
        if new == 0 or reads_input or any(span.group is None for span in spans):
            found[group.name] = None
            continue
        of_old, of_new = (torch.zeros(new, dtype=torch.float64) for _ in range(2))
        for part in group.writers:
            weight = modules[part.layer]._parameters["weight"]
            assert weight is not None
            rows = weight.detach()[before[group.name] * part.block :][: new * part.block]
            for span, first in zip(*layout.offsets(part.layer), strict=True):
                name = str(span.group)
                columns = rows.narrow(1, first, span.width).abs().double().cpu()
                each = columns.reshape(new, part.block, span.units, span.block, -1).sum((1, 3, 4))
                each *= activity[name]
                of_old += each[:, : before[name]].sum(1)
                of_new += each[:, before[name] : after[name]].sum(1)
        total = of_old + of_new
        alive, bound = total > 0, share * total
        found[group.name] = Sufficiency(
            int((alive & (of_new <= bound)).sum()) / new,
            int((alive & (of_old <= bound)).sum()) / new,
        )
    return found


def capacity_table(
    partition: Partition, names: Sequence[Hashable], reused: Sequence[Mapping[str, int]]
) -> pd.DataFrame:
    """Units per task and hidden layer, in forward order.

    Parameters
    ----------
    partition
        The frontiers.
    names
        Name of each learnt task (its label, or its index).
    reused
        For each learnt task, older units that it reads, by layer.

    Returns
    -------
    DataFrame
        Columns task, layer, used, new, reused, free (numbers of units after the task) and
        used_fraction (of the layer's width then).
    """
    rows = []
    for index, name in enumerate(names):
        before, after = partition.before(index), partition.after(index)
        for layer, width in partition.widths_then[index].items():
            rows.append(
                {
                    "task": name,
                    "layer": layer,
                    "used": after[layer],
                    "new": after[layer] - before[layer],
                    "reused": reused[index][layer],
                    "free": width - after[layer],
                    "used_fraction": after[layer] / width,
                }
            )
    columns = ["task", "layer", "used", "new", "reused", "free", "used_fraction"]
    return pd.DataFrame(rows, columns=columns)


def sufficiency_table(
    partition: Partition,
    names: Sequence[Hashable],
    found: Sequence[Mapping[str, Sufficiency | None]],
) -> pd.DataFrame:
    """What new units read, per task and hidden layer, in forward order.

    Parameters
    ----------
    partition
        The frontiers.
    names
        Name of each learnt task (its label, or its index).
    found
        For each learnt task, what :func:`sufficiency` gave; a layer that isn't in it has not been
        measured.

    Returns
    -------
    DataFrame
        Columns task, layer, new (number of units), old_only and new_only (shares of them; NaN
        where there is none).
    """
    rows = []
    for index, name in enumerate(names):
        before, after = partition.before(index), partition.after(index)
        for layer in partition.widths:
            each = found[index].get(layer)
            rows.append(
                {
                    "task": name,
                    "layer": layer,
                    "new": after[layer] - before[layer],
                    "old_only": float("nan") if each is None else each.old_only,
                    "new_only": float("nan") if each is None else each.new_only,
                }
            )
    return pd.DataFrame(rows, columns=["task", "layer", "new", "old_only", "new_only"])
