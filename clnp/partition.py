"""Which units belong to which task: a list of frontiers a layer, and what moves with them.

The units of a group are kept sorted by the task that activated them, so that the paper's split of
the weights (Sec. 2.1, Fig. 1) is a matter of integers. After task t the first ``f(t)`` units are
active, and of each weight matrix (rows = its units, columns = the units it reads)

- rows ``[:f(t)]``, columns ``[:f'(t)]`` are W_act: frozen;
- rows ``[:f(t)]``, columns ``[f'(t):]`` are W_int: zero;
- rows ``[f(t):]`` are W_free: drawn anew before each task, then trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from clnp.layers import adapter_of, reset, row_tensors
from clnp.layout import Layout, Part, UnitGroup, put, take


@dataclass
class Partition:
    """The frontiers of each group of units.

    Attributes
    ----------
    widths
        Number of units of each group, in forward order.
    frontiers
        ``frontiers[layer][t]`` units of the layer were active after t tasks; starts with 0.
    widths_then
        Number of units of each group when each task had been learnt; by default as now.

    Raises
    ------
    ValueError
        If frontiers don't rise from 0 to at most the layer's width.
    """

    widths: dict[str, int]
    frontiers: dict[str, list[int]] = field(default_factory=dict)
    widths_then: list[dict[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.frontiers = self.frontiers or {name: [0] for name in self.widths}
        if self.frontiers.keys() != self.widths.keys():
            raise ValueError(
                f"frontiers of layers {list(self.frontiers)}, but the layers are "
                f"{list(self.widths)}"
            )
        for name, f in self.frontiers.items():
            if (
                f[:1] != [0]
                or f != sorted(f)
                or f[-1] > self.widths[name]
                or len(f) - 1 != self.tasks
            ):
                raise ValueError(
                    f"layer {name!r} has the frontiers {f}; they must rise from 0 to at most its "
                    f"{self.widths[name]} units, with one more than the {self.tasks} tasks"
                )
        self.widths_then = self.widths_then or [dict(self.widths) for _ in range(self.tasks)]

    @property
    def tasks(self) -> int:
        """Number of tasks learnt so far."""
        return len(next(iter(self.frontiers.values()), [0])) - 1

    def before(self, task: int) -> dict[str, int]:
        """Units active before the task (0, 1, ...) was learnt: f(t-1)."""
        return {name: f[task] for name, f in self.frontiers.items()}

    def after(self, task: int) -> dict[str, int]:
        """Units active after the task (0, 1, ...) was learnt: f(t)."""
        return {name: f[task + 1] for name, f in self.frontiers.items()}

    def append(self, used: dict[str, int]) -> None:
        """Enter the frontiers of the task just learnt.

        Raises
        ------
        ValueError
            If a frontier is missing, falls, or exceeds the layer's width.
        """
        if used.keys() != self.widths.keys():
            raise ValueError(f"frontiers of layers {list(used)}, not of {list(self.widths)}")
        for name, count in used.items():
            if not self.frontiers[name][-1] <= count <= self.widths[name]:
                raise ValueError(
                    f"layer {name!r} has {self.frontiers[name][-1]} to {self.widths[name]} units "
                    f"to end at, not {count}"
                )
        for name, count in used.items():
            self.frontiers[name].append(count)
        self.widths_then.append(dict(self.widths))

    def widen(self, more: Mapping[str, int]) -> None:
        """Enter units added to groups; they are free."""
        for name, units in more.items():
            self.widths[name] += units


def derived_seed(*numbers: int) -> int:
    """One seed from several numbers (seed, task, layer), so that near seeds don't overlap."""
    generator = torch.Generator()
    value = 0
    for number in numbers:
        generator.manual_seed((value + number) % 2**63)
        value = int(torch.randint(2**62, (1,), generator=generator))
    return value


@torch.no_grad()
def permute(modules: dict[str, nn.Module], group: UnitGroup, order: Tensor) -> None:
    """Reorder the units of a group: rows where they are computed, columns where they are read.

    Parameters
    ----------
    modules
        The network's layers by name; changed in place.
    group
        The group of units.
    order : (width,) int64
        ``order[i]`` is the present place of the unit that goes to place i.
    """

    def move(tensor: Tensor, part: Part, dim: int) -> None:
        channels = tensor.narrow(dim, part.first, group.width * part.block)
        blocks = order[:, None] * part.block + torch.arange(part.block)
        channels.copy_(channels.index_select(dim, blocks.flatten().to(tensor.device)))

    for part in (*group.writers, *group.norms):
        module = modules[part.layer]
        for tensor in row_tensors(module, adapter_of(part.layer, module)).values():
            if tensor is not None:
                move(tensor, part, 0)
    for part in group.readers:
        weight = modules[part.layer]._parameters["weight"]
        assert weight is not None
        move(weight, part, 1)


@torch.no_grad()
def sever(modules: dict[str, nn.Module], layout: Layout, used: dict[str, int]) -> None:
    """Set the interference weights to zero: W_int = W[inactive -> active] = 0 (Sec. 2.1).

    Parameters
    ----------
    modules
        The network's layers by name; changed in place.
    layout
        How its units are grouped.
    used
        Number of active units of each group.
    """
    for group in layout.groups:
        for part in group.readers:
            weight = modules[part.layer]._parameters["weight"]
            assert weight is not None
            rows = weight.shape[0]
            if part.layer != layout.head:
                (span,) = layout.rows[part.layer]
                rows = used[str(span.group)] * span.block
            free = slice(used[group.name] * part.block, group.width * part.block)
            weight[:rows, part.first + free.start : part.first + free.stop] = 0.0


@torch.no_grad()
def reinitialise(
    modules: dict[str, nn.Module],
    layout: Layout,
    used: dict[str, int],
    seed: int,
    head: tuple[str, ...],
) -> None:
    """Draw W_free anew (Alg. 1): rows of inactive units, and their columns in a single head.

    Parameters
    ----------
    modules
        The network's layers by name; changed in place.
    layout
        How its units are grouped.
    used
        Number of active units of each group.
    seed
        Seed of this task's draw.
    head
        The head's tensors that are drawn anew too, in the columns of inactive units: in a single
        head its weight, and its bias if each task has one of its own.
    """
    for index, name in enumerate(layout.order):
        if name in layout.shared:
            continue
        module = modules[name]
        fresh = reset(module, derived_seed(seed, index))
        if name == layout.head:
            free = layout.runs(layout.columns[name], used, layout.widths)
            weight = module._parameters["weight"]
            if "weight" in head and weight is not None:
                put(weight, free, take(fresh["weight"], free, 1).to(weight), 1)
            bias = module._parameters.get("bias")
            if "bias" in head and bias is not None:
                bias.copy_(fresh["bias"])
            continue
        free = layout.runs(layout.rows[name], used, layout.widths)
        for key, tensor in row_tensors(module, adapter_of(name, module)).items():
            if tensor is not None:
                put(tensor, free, take(fresh[key], free).to(tensor))
        batches = module._buffers.get("num_batches_tracked")
        if batches is not None:
            batches.zero_()
