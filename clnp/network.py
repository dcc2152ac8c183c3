"""A network under a partition: the sub-network of each task, and the task in training.

A view is a forward pass in which each layer computes a range of its units from a prefix of what
it reads. Inside a view the adapters stand in for the layers' own ``forward``; outside, and for
everybody who holds the model, nothing has changed.

=============================  ====================================================================
view                           what each layer computes
=============================  ====================================================================
sub-network of task t          units [:f(t)] from columns [:f'(t)], without gradients, evaluating
task t in training             units [:f(t-1)] as their tasks see them, without gradients; units
                               [f(t-1):] from all columns, with gradients; joined
=============================  ====================================================================

While a task trains, each parameter of the model *is* its free rows: a leaf view on the same
storage. Frozen values aren't masked but out of reach of optimizer, weight decay and clipping.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clnp.errors import CapacityExhausted, UnsupportedNetwork
from clnp.layers import Adapter, adapter_of, is_layer, row_tensors, sliced
from clnp.layout import Layout, Runs, Span, pieces, put, runs, take
from clnp.partition import Partition, derived_seed, permute, reinitialise, sever
from clnp.units import Forward
from clnp.widening import other_heads, widen


@dataclass(frozen=True)
class Head:
    """What the head computes for one task: its layer, what it reads from, and its bias.

    Attributes
    ----------
    layer
        Name of the layer.
    start
        The first unit that it reads of each hidden group before it (f(t-1) in a single head).
    bias : (classes,) or None
        A bias of the task's own in place of the layer's.
    use_bias
        False: no bias at all.
    """

    layer: str
    start: dict[str, int]
    bias: Tensor | None = None
    use_bias: bool = True


@dataclass(frozen=True)
class View:
    """Ranges of units, by group: [start, split) as stored, [split, stop) in training."""

    start: dict[str, int]
    split: dict[str, int]
    stop: dict[str, int]
    head: Head
    trains: bool


class SubNetwork(nn.Module):
    """The slice of the network that one task uses, its head included; called with x alone.

    Always evaluates (dropout off, running statistics), without gradients, whatever is called on
    it. It has no parameters of its own: it reads the network's, of which those that it uses are
    never written again.
    """

    def __init__(self, network: "PartitionedNetwork", view: View, forward: Forward) -> None:
        super().__init__()
        self.training = False
        # Plain references: as sub-modules they would be moved, trained and saved with this one.
        object.__setattr__(self, "_network", network)
        object.__setattr__(self, "_view", view)
        object.__setattr__(self, "_forward", forward)

    def train(self, mode: bool = True) -> "SubNetwork":
        """Nothing: a learnt task's sub-network only ever evaluates."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of the task for inputs x (N, ...)."""
        network: PartitionedNetwork = self._network  # type: ignore[assignment]
        with network.view(self._view):  # type: ignore[arg-type]
            return self._forward(network.model, x)  # type: ignore[no-any-return, operator]


class PartitionedNetwork:
    """A model whose units are divided among tasks.

    Parameters
    ----------
    model
        The network; trained in place.
    layout
        How its units are grouped, from :func:`clnp.units.find_layout`.
    single_head
        One output layer for all tasks, each with its own slice of the last hidden group; or
        (False) an output layer of its own for each task (paper, Sec. 2.1, Fig. 2).
    head_bias
        Of a single head: ``"shared"`` (trained by the first task, then frozen), ``"per-task"``,
        ``"none"``.
    seed
        Of the draws of W_free.

    Attributes
    ----------
    partition
        The frontiers of each group.
    heads
        The head of each learnt task.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        single_head: bool,
        head_bias: str = "shared",
        seed: int = 0,
    ) -> None:
        if single_head and any(part.layer == layout.head for part in layout.inputs):
            raise UnsupportedNetwork(
                f"the single head {layout.head!r} reads the network's input beside units, and what "
                "it makes of that would have to change with each task; use one head a task"
            )
        self.model = model
        self.layout = layout
        self.single_head = single_head
        self.head_bias = head_bias
        self.seed = seed
        self.partition = Partition({g.name: g.width for g in layout.groups})
        self.heads: list[Head] = []
        self._originals: dict[tuple[str, str], nn.Parameter] = {}
        # Where the values of each leaf that trains belong in the original: (dimension, runs).
        self._places: dict[tuple[str, str], tuple[int, Runs]] = {}
        self._training_view: View | None = None

    # -- what the layers are -------------------------------------------------------------------

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The layers with parameters by name, in forward order, the current head last."""
        return {name: self.model.get_submodule(name) for name in self.layout.order}

    @property
    def in_training(self) -> bool:
        """True between :meth:`begin_task` and :meth:`end_task`."""
        return self._training_view is not None

    def _start(self, before: dict[str, int], stop: dict[str, int]) -> dict[str, int]:
        """The first unit that a view computes, by group, of a task that began at ``before``.

        In a single head, older units that only the head reads are read by nobody else. Where there
        is no newer one, the last of them is computed all the same: no layer computes nothing.
        """
        alone = {
            group.name
            for group in self.layout.groups
            if self.single_head and {part.layer for part in group.readers} == {self.layout.head}
        }
        return {
            name: max(0, min(f, stop[name] - 1)) if name in alone else 0
            for name, f in before.items()
        }

    def floors(self) -> dict[str, int]:
        """The smallest counts that the newest task can be cut to, by group.

        A layer can't compute no unit at all, and in a single head a task without a unit of its own
        before the head has no output. Units whose weights don't train (``requires_grad=False``: a
        pretrained body) are all kept, for every task: cut, they would be drawn anew.
        """
        before = self.frontier
        floors = {
            name: first + 1 for name, first in self._start(before, self.layout.widths).items()
        }
        if self.single_head:
            open_ends = [g for g in self.layout.ends if before[g] < self.layout.widths[g]]
            floors[open_ends[-1]] = before[open_ends[-1]] + 1
        for group in self.layout.groups:
            if any(self._is_fixed(part.layer) for part in group.writers):
                floors[group.name] = group.width
        return {name: min(floor, self.layout.widths[name]) for name, floor in floors.items()}

    def _is_fixed(self, layer: str) -> bool:
        kept = self._originals.get((layer, "weight"))
        weight = self.model.get_submodule(layer)._parameters["weight"] if kept is None else kept
        return weight is not None and not weight.requires_grad

    @property
    def frontier(self) -> dict[str, int]:
        """Units active after all tasks learnt so far, by group."""
        return {name: f[-1] for name, f in self.partition.frontiers.items()}

    # -- views ---------------------------------------------------------------------------------

    def subnetwork_view(self, before: dict[str, int], used: dict[str, int], head: Head) -> View:
        """Units [:used], evaluated; for a task that began at the frontiers ``before``."""
        return View(self._start(before, used), used, used, head, trains=False)

    def task_view(self, task: int) -> View:
        """The view of a learnt task (0, 1, ... in order of learning)."""
        before, used = self.partition.before(task), self.partition.after(task)
        return self.subnetwork_view(before, used, self.heads[task])

    def subnetwork(self, task: int, forward: Forward) -> SubNetwork:
        """The sub-network of a learnt task, as a module."""
        return SubNetwork(self, self.task_view(task), forward)

    def candidate(self, used: dict[str, int]) -> View:
        """The sub-network that the task just trained would be, cut to ``used`` units."""
        before = self.frontier
        return self.subnetwork_view(before, used, self._new_head(before))

    @contextmanager
    def view(self, view: View) -> Iterator[None]:
        """Run the model's forward as a view; nests, and restores what it found."""
        modules = self.modules | {view.head.layer: self.model.get_submodule(view.head.layer)}
        modules = {name: m for name, m in modules.items() if name not in self.layout.shared}
        outer = {name: module.__dict__.get("forward") for name, module in modules.items()}
        modes = {module: module.training for module in self.model.modules()}
        try:
            for name, module in modules.items():
                if name == view.head.layer or name != self.layout.head:
                    module.forward = self._layer(name, module, view)
            if not view.trains:
                for module in modes:
                    module.training = False
                with torch.no_grad():
                    yield
            else:
                yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for name, module in modules.items():
                module.__dict__.pop("forward", None)
                replaced = outer[name]
                if replaced is not None:
                    module.forward = replaced

    def _layer(self, name: str, module: nn.Module, view: View) -> Callable[[Tensor], Tensor]:
        """What stands in for a layer's forward inside a view."""
        adapter = adapter_of(name, module)
        if name == view.head.layer:
            return self._head_layer(name, module, adapter, view)
        rows, columns = self.layout.rows[name], self.layout.columns[name]
        start, split, stop = view.start, view.split, view.stop
        stored = self._stored(name, module, adapter)
        reads = None  # columns of the weight: all, unless it has some and they are units
        if adapter.has_columns and columns:
            reads = self.layout.runs(columns, start, split)
        frozen = sliced(stored, self.layout.runs(rows, start, split), reads)
        if not view.trains:
            return lambda x: adapter.compute(module, x, frozen, False)
        # What x holds are units [start:stop) of each group that the layer reads.
        dim = adapter.unit_dim
        seen = runs(columns, start, split, start, stop) if columns else None

        def frozen_part(x: Tensor) -> Tensor:
            with torch.no_grad():
                x = x if seen is None else take(x, seen, dim)
                return adapter.compute(module, x, frozen, False)

        free_part = self._free_part(name, module, adapter, view)
        older = [(split[s.group] - start[s.group]) * s.block for s in rows if s.group]
        newer = [(stop[s.group] - split[s.group]) * s.block for s in rows if s.group]
        if not any(newer):
            return frozen_part
        if not any(older):
            return free_part
        if len(rows) == 1:
            return lambda x: torch.cat([frozen_part(x), free_part(x)], dim=dim)

        def joined(x: Tensor) -> Tensor:
            parts = (frozen_part(x).split(older, dim), free_part(x).split(newer, dim))
            return torch.cat([part for pair in zip(*parts, strict=True) for part in pair], dim)

        return joined

    def _free_part(
        self, name: str, module: nn.Module, adapter: Adapter, view: View
    ) -> Callable[[Tensor], Tensor]:
        """What a layer computes of the task in training: units [split:stop)."""
        rows, columns = self.layout.rows[name], self.layout.columns[name]
        start, split, stop, dim = view.start, view.split, view.stop, adapter.unit_dim
        free = self.layout.runs(rows, split, stop)
        # A norm sees its own units alone; a layer with columns reads all that there is.
        seen = None
        if not adapter.has_columns:
            seen = runs(columns, split, stop, start, stop)
        reads = self.layout.runs(columns, start, stop)
        narrower = columns and sum(r.stop - r.start for r in reads) < sum(s.width for s in columns)

        def free_part(x: Tensor) -> Tensor:
            tensors = row_tensors(module, adapter)  # the leaves: already the free rows alone
            if adapter.has_columns and narrower:
                assert tensors["weight"] is not None
                tensors["weight"] = take(tensors["weight"], reads, 1)
            buffers = {key: tensors[key] for key in adapter.buffers}
            for key, buffer in buffers.items():
                tensors[key] = None if buffer is None else take(buffer, free)
            x = x if seen is None else take(x, seen, dim)
            out = adapter.compute(module, x, tensors, module.training)
            if len(free) > 1 and module.training:  # running statistics were copies
                for key, buffer in buffers.items():
                    moved = tensors[key]
                    if buffer is not None and moved is not None:
                        put(buffer, free, moved)
            return out

        return free_part

    def _head_layer(
        self, name: str, module: nn.Module, adapter: Adapter, view: View
    ) -> Callable[[Tensor], Tensor]:
        head, dim = view.head, adapter.unit_dim
        # All heads read what the present one reads.
        columns = self.layout.columns[self.layout.head]
        stored = sliced(
            self._stored(name, module, adapter),
            None,
            self.layout.runs(columns, head.start, view.stop),
        )
        if head.bias is not None or not head.use_bias:
            # A task's own bias is no part of the model, which may have moved to another device.
            device = module.get_parameter("weight").device
            stored["bias"] = None if head.bias is None else head.bias.to(device)
        seen = None  # what it reads of x; all of it, unless older units are there too
        if any(head.start[group] > view.start[group] for group in self.layout.ends):
            seen = runs(columns, head.start, view.stop, view.start, view.stop)
        reads = self.layout.runs(columns, head.start, view.stop)

        def forward(x: Tensor) -> Tensor:
            tensors = stored
            if view.trains:  # the leaves: in a single head already the columns of this task alone
                tensors = row_tensors(module, adapter)
                if not self.single_head:
                    tensors = sliced(tensors, None, reads)
                tensors = tensors if head.use_bias else {**tensors, "bias": None}
            x = x if seen is None else take(x, seen, dim)
            return adapter.compute(module, x, tensors, module.training)

        return forward

    def _original(self, name: str, key: str) -> Tensor:
        """A parameter in full, whether its task is in training or not."""
        kept = self._originals.get((name, key))
        tensor = kept if kept is not None else self.model.get_submodule(name)._parameters[key]
        assert tensor is not None
        return tensor.detach()

    def _stored(self, name: str, module: nn.Module, adapter: Adapter) -> dict[str, Tensor | None]:
        """The layer's tensors in full, without gradients."""
        tensors = row_tensors(module, adapter)
        return {
            key: None
            if tensor is None
            else self._original(name, key)
            if key in adapter.parameters
            else tensor
            for key, tensor in tensors.items()
        }

    # -- a task's life ---------------------------------------------------------------------------

    def check_layout(self, layout: Layout) -> None:
        """Refuse a layout of a next task with other hidden layers, or the head of a learnt one.

        Raises
        ------
        UnsupportedNetwork
            If so.
        """
        if layout.core() != self.layout.core():
            raise UnsupportedNetwork(
                "the network has changed since the last task (layers added, removed or resized "
                "outside the head, or a head that reads another layer); CLNP needs the same hidden "
                "layers for all tasks"
            )
        if not self.single_head and layout.head in {head.layer for head in self.heads}:
            raise UnsupportedNetwork(
                f"the head {layout.head!r} is that of a task learnt before, which would forget; "
                "give each task an output layer of its own, or use a single head"
            )

    def begin_task(self, layout: Layout) -> dict[nn.Parameter, nn.Parameter | None]:
        """Draw W_free anew and put each parameter's free rows in its place.

        Parameters
        ----------
        layout
            The layout with this task's head.

        Returns
        -------
        dict
            Original parameter -> the leaf that trains in its stead (None: nothing of it trains),
            for all parameters of the model.

        Raises
        ------
        UnsupportedNetwork
            As :meth:`check_layout`.
        CapacityExhausted
            If a single head has no free unit left in the last hidden layer.
        """
        self.check_layout(layout)
        self.layout = layout
        before, task = self.frontier, self.partition.tasks
        if self.single_head and all(before[g] == layout.widths[g] for g in layout.ends):
            last = layout.last
            raise CapacityExhausted(
                f"no unit is free in the last hidden layer {last.name!r} ({last.width} units, all "
                f"used by {task} tasks), and a single head can't learn without one; add some "
                f"(plugin.expand({{{last.name!r}: n}})), or start anew with a wider layer, a "
                "larger margin or l1 (sparser tasks), or one head a task"
            )
        if task > 0:
            anew: tuple[str, ...] = ("weight",) if self.single_head else ()
            if self.single_head and self.head_bias == "per-task":
                anew = ("weight", "bias")
            reinitialise(self.modules, layout, before, derived_seed(self.seed, task), anew)
        return self.train_units(dict(layout.widths))

    def train_units(self, stop: dict[str, int]) -> dict[nn.Parameter, nn.Parameter | None]:
        """Let units from the frontier up to ``stop`` train, reading no other than those before it.

        All free units at a task's beginning; for fine-tuning those that have survived the cut.

        Parameters
        ----------
        stop
            The number of units that take part, by group.

        Returns
        -------
        dict
            As :meth:`begin_task`.
        """
        layout, before = self.layout, self.frontier
        leaves: dict[nn.Parameter, nn.Parameter | None] = dict.fromkeys(self.model.parameters())
        for name, module in self.modules.items():
            for key, original in list(module._parameters.items()):
                if original is None:
                    continue
                if name == layout.head:
                    leaf = self._head_leaf(key, original, before, stop)
                elif name in layout.shared:
                    leaf = original if self.partition.tasks == 0 else _frozen_copy(original)
                else:
                    free = layout.runs(layout.rows[name], before, stop)
                    self._places[name, key] = (0, free)
                    rows = take(original.detach(), free)
                    leaf = nn.Parameter(rows, requires_grad=original.requires_grad)
                self._originals[name, key] = original
                module._parameters[key] = leaf
                trains = leaf.numel() > 0 and leaf.requires_grad
                leaves[original] = leaf if trains else None
        self._training_view = View(
            start=self._start(before, stop),
            split=before,
            stop=stop,
            head=self._new_head(before),
            trains=True,
        )
        return leaves

    def _head_leaf(
        self, key: str, original: nn.Parameter, before: dict[str, int], stop: dict[str, int]
    ) -> nn.Parameter:
        if not self.single_head:
            return original
        if key == "weight":
            # Optimizers, fused ones above all, are right on row views only: columns are copied.
            free = self.layout.runs(self.layout.columns[self.layout.head], before, stop)
            self._places[self.layout.head, key] = (1, free)
            columns = take(original.detach(), free, 1).clone()
            return nn.Parameter(columns, requires_grad=original.requires_grad)
        first = self.partition.tasks == 0
        trains = {"shared": first, "per-task": True, "none": False}[self.head_bias]
        if trains and original.requires_grad:
            return original
        return _frozen_copy(original)

    def _new_head(self, before: dict[str, int]) -> Head:
        """The head of the task in training, with the layer's bias as it stands."""
        start = {group: before[group] if self.single_head else 0 for group in self.layout.widths}
        use = not self.single_head or self.head_bias != "none"
        return Head(self.layout.head, start, None, use)

    @property
    def training_view(self) -> View:
        """The view of the task in training."""
        if self._training_view is None:
            raise RuntimeError("no task is in training")
        return self._training_view

    def leaves(self) -> dict[str, nn.Parameter]:
        """Free rows of each weight matrix in training, the head's included, by layer (for L1)."""
        found = {
            name: self.model.get_submodule(name)._parameters["weight"]
            for name in self.layout.weights
        }
        return {name: leaf for name, leaf in found.items() if leaf is not None and leaf.numel()}

    def trained_tensors(self) -> list[Tensor]:
        """Everything that the task in training changes: its leaves and free running statistics."""
        view = self.training_view
        found: list[Tensor] = []
        for name, module in self.modules.items():
            adapter = adapter_of(name, module)
            tensors = row_tensors(module, adapter)
            for key in adapter.parameters:
                leaf = tensors[key]
                if leaf is not None:
                    found.append(leaf)
            for key in adapter.buffers:
                buffer = tensors[key]
                if buffer is not None:
                    free = self.layout.runs(self.layout.rows[name], view.split, view.stop)
                    found += pieces(buffer, free)
        return found

    @torch.no_grad()
    def end_task(self) -> None:
        """Put the full parameters back, with what the task has learnt in them."""
        for (name, key), original in self._originals.items():
            module = self.model.get_submodule(name)
            leaf = module._parameters[key]
            # Copies; and views that somebody has given a storage of their own (p.data = ...).
            if (name, key) in self._places and leaf is not None and _apart(leaf, original):
                dim, where = self._places[name, key]
                put(original, where, leaf, dim)
            module._parameters[key] = original
            original.grad = None
        self._originals, self._places = {}, {}
        self._training_view = None

    def sort(self, orders: dict[str, Tensor]) -> None:
        """Move units within their groups; ``orders[group][i]`` goes to place i (used ones stay)."""
        modules = self.modules
        for group in self.layout.groups:
            permute(modules, group, orders[group.name])

    def learn(self, used: dict[str, int]) -> None:
        """Make the first ``used`` units of each group active for good: cut, sever, remember."""
        head = self._new_head(self.frontier)
        bias = self.model.get_submodule(head.layer)._parameters["bias"]
        if self.single_head and self.head_bias == "per-task" and bias is not None:
            head = Head(head.layer, head.start, bias.detach().clone(), True)
        self.partition.append(used)
        sever(self.modules, self.layout, used)
        self.heads.append(head)

    def expand(self, more: Mapping[str, int]) -> None:
        """Widen groups by free units; learnt tasks don't see them.

        Parameters
        ----------
        more
            Units to add, by group (the layer that computes it first). Of grouped convolutions and
            group norms a unit is a whole group of channels.

        Raises
        ------
        ValueError, RuntimeError
            As :meth:`check_expansion`; nothing has been changed then.
        """
        self.check_expansion(more)
        learnt: list[str] = []
        heads: tuple[str, ...] = ()
        if not self.single_head:
            learnt = list(dict.fromkeys(head.layer for head in self.heads))
            heads = other_heads(self.model, self.layout, learnt)
        used, task = self.frontier, self.partition.tasks
        seed = derived_seed(self.seed, task, *self.layout.widths.values())
        self.layout = widen(self.model, self.layout, more, used, learnt, heads, seed)
        self.partition.widen(more)

    def check_expansion(self, more: Mapping[str, int]) -> None:
        """Refuse what can't be widened.

        Raises
        ------
        TypeError
            If it is no dict.
        ValueError
            If a group is unknown or a number below 1.
        RuntimeError
            If a task is in training.
        """
        if self.in_training:
            raise RuntimeError("layers are widened between tasks, and a task is in training")
        if not isinstance(more, Mapping):
            raise TypeError(
                f"the units to add are {more!r}; give a dict of numbers by layer, such as "
                f"{{{next(iter(self.layout.widths))!r}: 16}}"
            )
        for name, units in more.items():
            if name not in self.layout.widths:
                shown = ", ".join(self.layout.widths)
                raise ValueError(
                    f"there is no group of units {name!r} to widen; named by the layer that "
                    f"computes them first, the groups are: {shown}"
                )
            if isinstance(units, bool) or not isinstance(units, int) or units < 1:
                raise ValueError(f"layer {name!r} is to get {units!r} units; 1 is the least")

    # -- what is frozen ------------------------------------------------------------------------

    def _frozen(self) -> dict[str, Tensor]:
        """Everything that learnt tasks read, as views, by a name that stands in the state."""
        found: dict[str, Tensor] = {}
        if self.partition.tasks == 0:
            return found
        layout, used = self.layout, self.frontier

        def enter(name: str, tensor: Tensor, spans: tuple[Span, ...], dim: int) -> None:
            """Used channels of each span by a name of their own, whatever touches by now."""
            for index, (span, part) in enumerate(
                zip(spans, tensor.split([s.width for s in spans], dim), strict=True)
            ):
                count = span.width if span.group is None else used[span.group] * span.block
                key = name if len(spans) == 1 else f"{name}[{index}]"
                found[key] = part.narrow(dim, 0, count)

        for name in layout.order:
            if name == layout.head:
                continue
            module = self.model.get_submodule(name)
            tensors = self._stored(name, module, adapter_of(name, module))
            for key, tensor in tensors.items():
                if tensor is None:
                    continue
                if name in layout.shared:
                    found[f"{name}.{key}"] = tensor
                else:
                    enter(f"{name}.{key}", tensor, layout.rows[name], 0)
        for layer in dict.fromkeys(head.layer for head in self.heads):
            module = self.model.get_submodule(layer)
            own_bias = self.single_head and self.head_bias == "per-task"
            for key, tensor in self._stored(layer, module, adapter_of(layer, module)).items():
                if tensor is None or (key == "bias" and own_bias):
                    continue
                if key == "weight" and self.single_head:
                    enter(f"{layer}.{key}", tensor, layout.columns[layout.head], 1)
                else:
                    found[f"{layer}.{key}"] = tensor
        return found

    def _constants(self) -> dict[str, Tensor]:
        """Buffers that belong to no unit, by name: every task reads them as they are."""
        found: dict[str, Tensor] = {}
        for name, module in self.model.named_modules():
            own: tuple[str, ...] = ()
            if is_layer(module):
                if name not in self.layout.order:
                    continue  # no task's forward reads it
                own = (*adapter_of(name, module).buffers, "num_batches_tracked")
            for key, buffer in module._buffers.items():
                # active_units: Avalanche's masks, which grow with the classes of later heads.
                if buffer is not None and key not in own and not key.startswith("active_units"):
                    found[f"{name}.{key}" if name else key] = buffer
        return found

    @torch.no_grad()
    def checksum(self, constants: bool = True) -> dict[str, int]:
        """A number for the bits of each tensor that learnt tasks read.

        Parameters
        ----------
        constants
            Whether buffers that belong to no unit are among the tensors.

        Returns
        -------
        dict
            By name. A write changes it, and so do entries that change places. Empty before the
            first task has been learnt.
        """
        tensors = self._frozen()
        if tensors and constants:
            tensors |= self._constants()
        sums = [_fingerprint(tensor) for tensor in tensors.values()]
        values = torch.stack([s.to(sums[0].device) for s in sums]).tolist() if sums else []
        return dict(zip(tensors, values, strict=True))

    def state_dict(self) -> dict[str, object]:
        """Frontiers, heads and frozen entries; free ones are drawn anew before each task."""
        return {
            "widths": dict(self.partition.widths),
            "widths_then": [dict(widths) for widths in self.partition.widths_then],
            "frontiers": {name: list(f) for name, f in self.partition.frontiers.items()},
            "heads": [
                {"layer": h.layer, "start": dict(h.start), "bias": h.bias, "use_bias": h.use_bias}
                for h in self.heads
            ],
            "frozen": {name: tensor.clone() for name, tensor in self._frozen().items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`; frozen entries are written into the model.

        A network that was widened may be given as it was before: it is widened again.

        Raises
        ------
        ValueError
            If the network hasn't the shape of the one saved.
        """
        widths, now = dict(state["widths"]), self.partition.widths
        then = [dict(each) for each in state.get("widths_then", [])]
        first = then[0] if then else widths
        if widths.keys() != now.keys() or any(
            not first[name] <= width <= widths[name] for name, width in now.items()
        ):
            before = "" if first == widths else f" (at first {first})"
            raise ValueError(
                f"the state is of a network with layers {widths}{before}, this one has {now}"
            )
        more = {name: widths[name] - width for name, width in now.items() if widths[name] > width}
        if more:
            trial = copy.deepcopy(self)  # where the state doesn't fit, this network stays as it is
            trial.expand(more)
            trial.load_state_dict(state)
            self.expand(more)
        frontiers = {name: list(f) for name, f in state["frontiers"].items()}
        partition = Partition(widths, frontiers, then)
        device = next(self.model.parameters()).device
        heads = [
            Head(
                h["layer"],
                dict(h["start"]),
                None if h["bias"] is None else h["bias"].to(device),
                h["use_bias"],
            )
            for h in state["heads"]
        ]
        loaded = state["frozen"]
        kept = self.partition, self.heads
        self.partition, self.heads = partition, heads
        try:
            frozen = self._frozen()
            shapes = {name: tuple(tensor.shape) for name, tensor in frozen.items()}
            saved = {name: tuple(tensor.shape) for name, tensor in loaded.items()}
            if shapes != saved:
                raise ValueError(f"the state holds the tensors {saved}, this network {shapes}")
        except (AttributeError, ValueError) as error:
            self.partition, self.heads = kept
            raise ValueError(
                f"the state is of another network ({error}); build the model as it was, with the "
                "heads of all learnt tasks (heads that are made as tasks come: adapt it first, by "
                "avalanche_model_adaptation(model, experience) for each of them)"
            ) from error
        for name, tensor in frozen.items():
            tensor.copy_(loaded[name])
        sever(self.modules, self.layout, self.frontier)


COLUMNS = 0x1E3779B97F4A7C16
"""Weight of columns against rows in a fingerprint: even, so that no single change goes unseen."""


def _fingerprint(tensor: Tensor) -> Tensor:
    """Sums over the bits of each row and column, each times an odd number of its own, mod 2^64."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    bits = tensor.view(kinds[tensor.element_size()])
    bits = bits.flatten(1) if bits.dim() > 1 else bits.reshape(-1, 1)
    rows, columns = (
        (sums * (2 * torch.arange(len(sums), device=bits.device) + 1)).sum()
        for sums in (bits.sum(1), bits.sum(0))
    )
    return rows + COLUMNS * columns


def _apart(leaf: Tensor, original: Tensor) -> bool:
    # Not the pointer to the data, which tensors without any have not.
    same: bool = leaf.untyped_storage()._cdata == original.untyped_storage()._cdata
    return not same


def _frozen_copy(parameter: nn.Parameter) -> nn.Parameter:
    """What stands in for a parameter of which nothing trains: no gradient, no way to its values."""
    return nn.Parameter(parameter.detach().clone(), requires_grad=False)
