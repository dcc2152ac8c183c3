"""How much of each layer is used, new, reused and free (paper, Sec. 2.1 and Fig. 3)."""

from collections.abc import Hashable, Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor, nn

from clnp.layout import Layout
from clnp.partition import Partition

REUSED_SHARE = 0.01
"""A unit is reused if what is read of it exceeds this share of the layer's largest."""


@torch.no_grad()
def reused_units(
    modules: Mapping[str, nn.Module],
    layout: Layout,
    before: Mapping[str, int],
    after: Mapping[str, int],
    head_start: Mapping[str, int],
    activity: Mapping[str, Tensor],
    share: float = REUSED_SHARE,
) -> dict[str, int]:
    """Number of older units that a task's new rows really read, by group.

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
    """
    found: dict[str, int] = {}
    for group in layout.groups:
        amount = torch.zeros(group.width, dtype=torch.float64)
        for part in group.readers:
            weight = modules[part.layer]._parameters["weight"]
            assert weight is not None
            rows = weight.detach()
            if part.layer != layout.head:
                (span,) = layout.rows[part.layer]
                name = str(span.group)
                rows = rows[before[name] * span.block : after[name] * span.block]
            columns = rows.narrow(1, part.first, group.width * part.block)
            read = columns.abs().transpose(0, 1).flatten(1).double().sum(1)
            read = read.view(group.width, part.block).sum(1).cpu()
            if part.layer == layout.head:
                read[: head_start[group.name]] = 0.0
            amount += read
        amount *= activity[group.name]
        amount[after[group.name] :] = 0.0
        bound = share * float(amount.max()) if amount.numel() else 0.0
        found[group.name] = int((amount[: before[group.name]] > bound).sum())
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
