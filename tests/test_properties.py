"""Zero forgetting as a property: random networks x optimizers x schedules x cuts, bit by bit.

`nox -s fuzz` runs the property on 2,000 networks that differ from run to run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from random import Random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import event, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR, StepLR

from clnp.errors import CapacityExhausted, UnsupportedNetwork
from clnp.layers import ADAPTERS, BATCH_NORM, Tensors
from clnp.layout import Layout, UnitGroup, take
from clnp.network import PartitionedNetwork
from clnp.partition import permute, sever
from clnp.proof import prove
from clnp.pruning import Activity, graceful_forgetting, sorting
from clnp.sparsity import L1
from clnp.units import Forward, find_layout

CLASSES = 3
BATCH = 20
STEPS = 6
ROUNDING = 1e-3
"""Largest difference of logits, as a share of the largest, when units are summed in other order."""

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01, amsgrad=True),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.002, momentum=0.5, centered=True),
}

SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], LRScheduler | None]] = {
    "constant": lambda _: None,
    "steps": lambda o: StepLR(o, 2, 0.5),
    "cosine": lambda o: CosineAnnealingLR(o, STEPS),
    "one cycle": lambda o: OneCycleLR(o, 2 * o.defaults["lr"], STEPS),
}


# -- random networks -------------------------------------------------------------------------------


class Sum(nn.Module):
    """A residual sum."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)  # type: ignore[no-any-return]


class Concatenation(nn.Module):
    """What the branches compute, one behind the other."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Gate(nn.Module):
    """Squeeze and excite: each unit times a number that other layers make of all of them."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x * self.body(x).sigmoid()


class Heads(nn.Module):
    """An output layer for each task."""

    def __init__(self, heads: list[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.task = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[self.task](x)  # type: ignore[no-any-return]


def forward_of(task: int) -> Forward:
    """How a network is called for a task: with its head, if each has its own."""

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        for module in model.modules():
            if isinstance(module, Heads):
                module.task = task
        return model(x)  # type: ignore[no-any-return]

    return forward


SMOOTH: list[Callable[[int], nn.Module]] = [
    lambda _: nn.LeakyReLU(),
    lambda _: nn.Tanh(),
    lambda _: nn.SiLU(),
    lambda _: nn.GELU(),
    lambda _: nn.ELU(),
    lambda _: nn.PReLU(),
    lambda channels: nn.PReLU(channels),
]
"""Activations whose units always learn. ReLU's may all be dead on a few samples: then a task whose
last layer has them learns nothing, and the property says nothing."""

RELU: list[Callable[[int], nn.Module]] = [lambda _: nn.ReLU()]


class Builder:
    """Draws a network layer by layer; knows what the next layer reads.

    Attributes
    ----------
    channels, sides
        Of what the next layer reads; sides () are those of vectors.
    joined
        Whether the channels are those of several groups of units, where only layers that treat
        each channel alone are supported.
    """

    def __init__(self, draw: st.DrawFn, channels: int, sides: tuple[int, ...]) -> None:
        self.draw, self.channels, self.sides, self.joined = draw, channels, sides, False

    def kind(self, name: str) -> type[nn.Module]:
        """The layer type for data of these dimensions: Conv1d, AvgPool2d, ..."""
        return getattr(nn, f"{name}{max(1, len(self.sides))}d")  # type: ignore[no-any-return]

    def flip(self) -> bool:
        return self.draw(st.booleans())

    def width(self) -> int:
        return self.draw(st.sampled_from([4, 5, 6, 8]))

    def writer(self, outputs: int) -> nn.Module:
        """A layer that computes units of its own from all that it reads."""
        if not self.sides:
            return nn.Linear(self.channels, outputs, bias=self.flip())
        size = self.draw(st.sampled_from([1, 3]))
        mode = self.draw(st.sampled_from(["zeros", "replicate"])) if size > 1 else "zeros"
        return self.kind("Conv")(
            self.channels, outputs, size, padding=size // 2, padding_mode=mode, bias=self.flip()
        )

    def norm(self) -> list[nn.Module]:
        choices: list[Callable[[], list[nn.Module]]] = [
            list,
            lambda: [self.kind("BatchNorm")(self.channels, affine=self.flip())],
            lambda: [self.kind("BatchNorm")(self.channels, momentum=None)],
        ]
        if len(self.sides) and self.sides[0] > 1:
            choices += [
                lambda: [
                    self.kind("InstanceNorm")(
                        self.channels, affine=self.flip(), track_running_stats=self.flip()
                    )
                ],
                lambda: [nn.LayerNorm(self.sides, elementwise_affine=self.flip())],
            ]
            if self.channels % 4 == 0 and not self.joined:
                choices += [
                    lambda: [nn.GroupNorm(self.channels // 2, self.channels, affine=self.flip())]
                ]
        return self.draw(st.sampled_from(choices))()

    def activation(self, inner: bool) -> nn.Module:
        choices = SMOOTH + RELU if inner else SMOOTH
        return self.draw(st.sampled_from(choices))(self.channels)

    def layer(self, outputs: int, inner: bool, plain: bool = False) -> nn.Sequential:
        """A writer, or a grouped convolution where there can be one; a norm; an activation."""
        groups = [1]
        if self.sides and not self.joined and self.channels % 4 == 0 == outputs % 4 and not plain:
            groups += [2, 4]
        count = self.draw(st.sampled_from(groups))
        if count == 1:
            layers = [self.writer(outputs)]
        else:
            conv = self.kind("Conv")
            layers = [conv(self.channels, outputs, 3, padding=1, groups=count, bias=self.flip())]
        self.channels, self.joined = outputs, False
        return nn.Sequential(*layers, *self.norm(), self.activation(inner))

    def body(self, outputs: int, layers: int) -> nn.Sequential:
        """A branch that reads what the next block would; leaves the builder where it was."""
        kept = self.channels, self.joined
        inner = [self.layer(self.width(), inner=True) for _ in range(layers - 1)]
        found = nn.Sequential(*inner, self.layer(outputs, inner=False))
        self.channels, self.joined = kept
        return found

    def residual(self) -> nn.Module:
        return Sum(self.body(self.channels, self.draw(st.integers(1, 2))))

    def concatenation(self) -> nn.Module:
        """The input itself with a branch (DenseNet), or two branches (Inception)."""
        widths = [self.width(), self.width()]
        dense = self.flip()
        first = nn.Identity() if dense else self.body(widths[0], 1)
        second = self.body(widths[1], self.draw(st.integers(1, 2)))
        self.channels = (self.channels if dense else widths[0]) + widths[1]
        self.joined = True
        return Concatenation(first, second)

    def depthwise(self) -> nn.Module:
        """A filter for each channel, or two where channels are even in number (a unit's pair)."""
        inputs = self.channels
        if not self.joined and inputs % 2 == 0 and self.flip():
            self.channels = 2 * inputs
        conv = self.kind("Conv")
        return nn.Sequential(
            conv(inputs, self.channels, 3, padding=1, groups=inputs, bias=self.flip()),
            *self.norm(),
            self.activation(inner=False),
        )

    def gate(self) -> nn.Module:
        outputs, squeezed = self.channels, self.width()
        pool = [self.kind("AdaptiveAvgPool")(1)] if self.sides else []
        linear = self.kind("Conv") if self.sides else nn.Linear
        size = [1] if self.sides else []
        return Gate(
            nn.Sequential(
                *pool,
                linear(outputs, squeezed, *size),
                nn.SiLU(),
                linear(squeezed, outputs, *size),
            )
        )

    def pool(self) -> nn.Module:
        name = self.draw(st.sampled_from(["Max", "Avg", "AdaptiveAvg", "AdaptiveMax"]))
        self.sides = tuple(side // 2 for side in self.sides)
        return self.kind(f"{name}Pool")(self.sides if name.startswith("Adaptive") else 2)

    def block(self) -> nn.Module:
        choices: list[Callable[[], nn.Module]] = [
            lambda: self.layer(self.width(), inner=False),
            lambda: self.concatenation(),
            lambda: nn.Dropout(0.2),
        ]
        if not self.joined:
            choices += [self.residual, self.gate]
        if self.sides:
            choices += [self.depthwise]
            if min(self.sides) >= 4:
                choices += [self.pool]
        return self.draw(st.sampled_from(choices))()


@st.composite
def networks(draw: st.DrawFn, heads: int) -> tuple[nn.Module, tuple[int, ...]]:
    """A network of supported layers with one head or several, and the shape of its input."""
    torch.manual_seed(draw(st.integers(0, 2**16)))  # of the initial weights
    sides = draw(st.sampled_from([(), (6,), (4, 4), (6, 6)]))
    builder = Builder(draw, 2 if sides else 7, sides)
    shape = (builder.channels, *sides)
    stem = builder.layer(draw(st.sampled_from([6, 8])), inner=False, plain=True)
    layers = [stem, *(builder.block() for _ in range(draw(st.integers(0 if sides else 1, 3))))]
    if sides and draw(st.booleans()) and draw(st.booleans()):
        convolution = builder.kind("Conv")
        made = [convolution(builder.channels, CLASSES, 1) for _ in range(heads)]
        head = made[0] if heads == 1 else Heads(made)
        layers += [head, builder.kind("AdaptiveAvgPool")(1), nn.Flatten()]
        return nn.Sequential(*layers), shape
    if sides:
        if draw(st.booleans()):
            layers += [builder.kind("AdaptiveAvgPool")(1)]
            builder.sides = tuple(1 for _ in sides)
        layers += [nn.Flatten()]
        for side in builder.sides:
            builder.channels *= side
        builder.sides = ()
    for _ in range(draw(st.integers(0, 2))):
        layers += [builder.layer(builder.width(), inner=False), nn.Dropout(0.2)]
    made = [nn.Linear(builder.channels, CLASSES, bias=draw(st.booleans())) for _ in range(heads)]
    layers += [made[0] if heads == 1 else Heads(made)]
    return nn.Sequential(*layers), shape


@dataclass
class Example:
    """A network and all that is done with it.

    Attributes
    ----------
    margin
        Of graceful forgetting; None: cuts at random places instead.
    seed
        Of data, dropout and random cuts.
    """

    model: nn.Module
    shape: tuple[int, ...]
    single_head: bool
    head_bias: str
    optimizer: str
    schedule: str
    l1: float
    margin: float | None
    tasks: int
    seed: int


@st.composite
def examples(draw: st.DrawFn) -> Example:
    single_head, tasks = draw(st.booleans()), draw(st.integers(2, 3))
    model, shape = draw(networks(1 if single_head else tasks))
    return Example(
        model,
        shape,
        single_head,
        draw(st.sampled_from(["shared", "per-task", "none"])),
        draw(st.sampled_from(sorted(OPTIMIZERS))),
        draw(st.sampled_from(sorted(SCHEDULES))),
        draw(st.sampled_from([0.0, 1e-4])),
        draw(st.sampled_from([0.0, 0.02, 0.2, 0.9, None])),
        tasks,
        draw(st.integers(0, 2**16)),
    )


# -- the property ----------------------------------------------------------------------------------


@dataclass
class Kept:
    """What must not change.

    Attributes
    ----------
    x
        Inputs on which logits are compared.
    logits
        Of each learnt task's sub-network.
    entries
        All that each learnt task computes with, by name.
    whole
        Logits of the task just trained with all its units, before they were sorted.
    """

    x: Tensor
    logits: list[Tensor] = field(default_factory=list)
    entries: list[dict[str, Tensor]] = field(default_factory=list)
    whole: Tensor | None = None


def entries_of(network: PartitionedNetwork, task: int) -> dict[str, Tensor]:
    """Copies of what a learnt task computes with, found by its frontiers alone."""
    layout, used, head = network.layout, network.partition.after(task), network.heads[task]
    nothing = dict.fromkeys(used, 0)
    found = {}
    for name in layout.order:
        module = network.model.get_submodule(name)
        rows = None if name in layout.shared else layout.runs(layout.rows[name], nothing, used)
        for key, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None and name != layout.head and key != "num_batches_tracked":
                part = tensor if rows is None else take(tensor, rows)
                found[f"{name}.{key}"] = part.detach().clone()
    module = network.model.get_submodule(head.layer)
    weight, bias = module.weight, module.bias if head.bias is None else head.bias
    assert isinstance(weight, Tensor)
    if network.single_head:
        weight = take(weight, layout.runs(layout.columns[layout.head], head.start, used), 1)
    found["head.weight"] = weight.detach().clone()
    if head.use_bias and isinstance(bias, Tensor):
        found["head.bias"] = bias.detach().clone()
    return found


def interference(network: PartitionedNetwork, task: int) -> Iterator[str]:
    """The layers in which a learnt task's units read later ones."""
    layout, used = network.layout, network.partition.after(task)
    nothing = dict.fromkeys(used, 0)
    for group in layout.groups:
        for part in group.readers:
            weight = network.model.get_submodule(part.layer).weight
            assert isinstance(weight, Tensor)
            if part.layer != layout.head:
                weight = take(weight, layout.runs(layout.rows[part.layer], nothing, used))
            elif network.single_head or network.heads[task].layer != layout.head:
                continue  # the head of another task, or one whose free columns others use
            first = part.first + used[group.name] * part.block
            if weight[:, first : part.first + group.width * part.block].any():
                yield part.layer


def check_untouched(network: PartitionedNetwork, kept: Kept) -> None:
    """No learnt task has changed in any bit, none reads later units, and no unit lost its reader.

    Raises
    ------
    AssertionError
        With all that isn't so.
    """
    problems = []
    for task, (logits, entries) in enumerate(zip(kept.logits, kept.entries, strict=True)):
        now = entries_of(network, task)
        assert now.keys() == entries.keys()
        problems += [
            f"{name} of task {task}" for name in now if not torch.equal(now[name], entries[name])
        ]
        if not torch.equal(network.subnetwork(task, forward_of(task))(kept.x), logits):
            problems.append(f"logits of task {task}")
    for task in range(network.partition.tasks):
        problems += [
            f"interference in {name} of task {task}" for name in interference(network, task)
        ]
    if kept.whole is not None:
        difference = (whole(network, kept.x) - kept.whole).abs().max()
        if not difference <= ROUNDING * kept.whole.abs().max():
            problems.append("logits of the task just sorted")
    assert not problems, problems


def whole(network: PartitionedNetwork, x: Tensor) -> Tensor:
    """Logits of the task just trained, with all units."""
    with network.view(network.candidate(network.layout.widths)):
        return forward_of(network.partition.tasks)(network.model, x)


def blobs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A task: inputs around a place of each class, half for training and half for validation."""
    places = torch.randn(CLASSES, *shape)
    y = torch.arange(2 * BATCH) % CLASSES
    return places[y] * 1.5 + torch.randn(2 * BATCH, *shape), y


def train(network: PartitionedNetwork, example: Example, x: Tensor, y: Tensor) -> None:
    """A few steps, by which something must move and the loss must fall."""
    forward, model = forward_of(network.partition.tasks), network.model
    leaves = [leaf for leaf in network.begin_task(network.layout).values() if leaf is not None]
    before = [leaf.detach().clone() for leaf in leaves]
    optimizer = OPTIMIZERS[example.optimizer](leaves)
    schedule = SCHEDULES[example.schedule](optimizer)
    penalty = L1(network.leaves(), dict.fromkeys(network.layout.weights, example.l1))

    def loss(dropout: bool) -> Tensor:
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.train(dropout)
        return F.cross_entropy(forward(model, x), y)

    with network.view(network.training_view):
        with torch.no_grad():
            losses = [loss(dropout=False).item()]
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss(dropout=True).backward()
            penalty.add_to_gradients()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if schedule is not None:
                schedule.step()
            with torch.no_grad():
                losses.append(loss(dropout=False).item())
    moved = [not torch.equal(*pair) for pair in zip(leaves, before, strict=True)]
    assert any(moved), "nothing moved"
    assert min(losses[1:]) < losses[0], f"the loss didn't fall: {losses}"


def sort_by_activity(network: PartitionedNetwork, kept: Kept, x: Tensor) -> dict[str, Tensor]:
    """End the training and sort the units; their activities in the new order."""
    activity, before = Activity(network.layout), network.frontier
    view = network.training_view
    with network.view(view), activity.measure(network.model, view.start), torch.no_grad():
        network.model.eval()
        forward_of(network.partition.tasks)(network.model, x)
    network.end_task()
    kept.whole = whole(network, kept.x)
    means = activity.means()
    orders = {name: sorting(mean, before[name]) for name, mean in means.items()}
    network.sort(orders)
    return {name: mean[orders[name]] for name, mean in means.items()}


def cut(
    network: PartitionedNetwork, example: Example, activity: dict[str, Tensor], x: Tensor, y: Tensor
) -> dict[str, int]:
    """Where the task just trained and sorted is cut."""
    before, floors, widths = network.frontier, network.floors(), network.layout.widths
    if example.margin is None:
        random = Random(example.seed + network.partition.tasks)
        return {
            name: random.randint(max(before[name], floors[name]), widths[name]) for name in widths
        }

    def evaluate(used: dict[str, int]) -> float:
        with network.view(network.candidate(used)):
            logits = forward_of(network.partition.tasks)(network.model, x)
        return (logits.argmax(1) == y).double().mean().item()

    return graceful_forgetting(
        activity, before, floors, evaluate, evaluate(widths), example.margin
    ).used


def room(network: PartitionedNetwork, used: dict[str, int]) -> bool:
    """Whether a task after these units has some of its own."""
    needed = network.layout.ends if network.single_head else network.layout.widths
    return any(used[name] < network.layout.widths[name] for name in needed)


def frozen_and_free(network: PartitionedNetwork) -> tuple[int, int]:
    """How many units belong to learnt tasks, and how many to none."""
    frozen = sum(network.frontier.values())
    return frozen, sum(network.layout.widths.values()) - frozen


def layout_of(example: Example) -> Layout:
    """The network's groups of units, found and proved."""
    x = torch.randn(7, *example.shape)
    layout = find_layout(example.model, forward_of(0), x)
    prove(example.model, layout, forward_of(0), x, example.single_head)
    return layout


def learn_all(example: Example, layout: Layout) -> int:
    """Learn the example's tasks and check all that is kept after each; the number learnt."""
    torch.manual_seed(example.seed)
    model, kept = example.model, Kept(torch.randn(7, *example.shape))
    network = PartitionedNetwork(model, layout, example.single_head, example.head_bias)
    for task in range(example.tasks):
        x, y = blobs(example.shape)
        if not example.single_head and task > 0:
            network.layout = find_layout(model, forward_of(task), kept.x)
        if not room(network, network.frontier) and example.single_head:
            with pytest.raises(CapacityExhausted):
                network.begin_task(network.layout)
            return task
        if task == 1:
            assert min(frozen_and_free(network)) > 0
        train(network, example, x[:BATCH], y[:BATCH])
        activity = sort_by_activity(network, kept, x[:BATCH])
        check_untouched(network, kept)
        used = cut(network, example, activity, x[BATCH:], y[BATCH:])
        if task == 0 and not room(network, used):  # a margin that leaves nothing is too small
            used = cut(network, replace(example, margin=1.0), activity, x[BATCH:], y[BATCH:])
        kept.whole = None
        network.learn(used)
        kept.logits.append(network.subnetwork(task, forward_of(task))(kept.x))
        kept.entries.append(entries_of(network, task))
        check_untouched(network, kept)
    return example.tasks


@given(example=examples())
@settings(max_examples=2000 if settings.get_current_profile_name() == "fuzz" else 200)
def test_learnt_tasks_stay_bitwise(example: Example) -> None:
    try:
        layout = layout_of(example)
    except UnsupportedNetwork:  # where torch-pruning errs: refused, and no example of learning
        event("refused")
        reject()
    learnt = learn_all(example, layout)
    assert learnt >= 2
    event(f"{learnt} of {example.tasks} tasks learnt")


# -- the property can fail -------------------------------------------------------------------------


def chain() -> Example:
    """An example with whose machinery each way to forget is seen."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(7, 8), nn.BatchNorm1d(8), nn.ReLU()),
        *(nn.Linear(8, 8), nn.LeakyReLU(), nn.Linear(8, CLASSES)),
    )
    return Example(
        model, (7,), True, "shared", "sgd", "constant", l1=1e-4, margin=0.2, tasks=3, seed=0
    )


def write_to_a_frozen_row(patch: pytest.MonkeyPatch) -> None:
    end_task = PartitionedNetwork.end_task

    def end(network: PartitionedNetwork) -> None:
        end_task(network)
        if network.partition.tasks:
            with torch.no_grad():
                network.model.get_submodule("0").weight[0, 1] += 0.5  # type: ignore[index, operator]

    patch.setattr(PartitionedNetwork, "end_task", end)


def train_the_shared_bias(patch: pytest.MonkeyPatch) -> None:
    head_leaf = PartitionedNetwork._head_leaf

    def leaf(
        network: PartitionedNetwork,
        key: str,
        original: nn.Parameter,
        before: dict[str, int],
        stop: dict[str, int],
    ) -> nn.Parameter:
        return original if key == "bias" else head_leaf(network, key, original, before, stop)

    patch.setattr(PartitionedNetwork, "_head_leaf", leaf)


def move_running_statistics(patch: pytest.MonkeyPatch) -> None:
    def compute(module: nn.Module, x: Tensor, tensors: Tensors, training: bool) -> Tensor:
        return BATCH_NORM.compute(module, x, tensors, module.training)

    leaky = replace(BATCH_NORM, compute=compute)
    adapters = tuple(leaky if adapter is BATCH_NORM else adapter for adapter in ADAPTERS)
    patch.setattr("clnp.layers.ADAPTERS", adapters)


def forget_an_interference_block(patch: pytest.MonkeyPatch) -> None:
    def forgetful(modules: dict[str, nn.Module], layout: Layout, used: dict[str, int]) -> None:
        weight = modules["3"].weight.detach()  # type: ignore[operator]
        kept = weight.clone()
        sever(modules, layout, used)
        weight.copy_(kept)

    patch.setattr("clnp.network.sever", forgetful)


def leave_a_reader_unpermuted(patch: pytest.MonkeyPatch) -> None:
    def forgetful(modules: dict[str, nn.Module], group: UnitGroup, order: Tensor) -> None:
        permute(modules, replace(group, readers=group.readers[:-1]), order)

    patch.setattr("clnp.network.permute", forgetful)


SABOTAGE: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "a write to a frozen row": (write_to_a_frozen_row, "'0.weight of task 0', 'logits of task 0'"),
    "an unfrozen bias": (train_the_shared_bias, "'head.bias of task 0', 'logits of task 0'"),
    "moving running statistics": (
        move_running_statistics,
        "'1.running_mean of task 0', '1.running_var of task 0', 'logits of task 0'",
    ),
    "a forgotten interference block": (
        forget_an_interference_block,
        "^\\['interference in 3 of task 0'\\]",
    ),
    "a reader left unpermuted": (
        leave_a_reader_unpermuted,
        "^\\['logits of the task just sorted'\\]",
    ),
}


def test_the_example_of_the_controls_passes() -> None:
    example = chain()
    assert learn_all(example, layout_of(example)) == 3


@pytest.mark.parametrize("name", SABOTAGE)
def test_the_property_can_fail(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls: the same property finds each way to forget, and says what changed."""
    sabotage, message = SABOTAGE[name]
    sabotage(monkeypatch)
    example = chain()
    layout = layout_of(example)
    with pytest.raises(AssertionError, match=message):
        learn_all(example, layout)
