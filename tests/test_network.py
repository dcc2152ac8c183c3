"""Views against masked networks of full width, and what a task's training can't reach."""

import contextlib
import copy
import io
import itertools
import warnings
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Avalanche's own imports warn of
    from clnp import CapacityExhausted, UnsupportedNetwork
    from clnp.layout import Layout, pieces, put, take
    from clnp.network import PartitionedNetwork, _fingerprint
    from clnp.pruning import Activity
    from clnp.units import Forward, find_layout


class Residual(nn.Module):
    """The last hidden group is read by a hidden layer too; the norm has cumulative statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(12, 8), nn.BatchNorm1d(8, momentum=None)
        self.a, self.b, self.head = nn.Linear(8, 7), nn.Linear(7, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.stem(x)))
        return self.head(F.relu(h + self.b(F.relu(self.a(h)))))  # type: ignore[no-any-return]


def mlp() -> nn.Module:
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3))
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 2), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 8, 1, bias=False), nn.ReLU(), nn.Dropout(0.5), nn.Flatten()),
        *(nn.Linear(8, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3)),
    )


def conv_head() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 8, 2), nn.BatchNorm2d(8, affine=False), nn.ReLU()),
        *(nn.Conv2d(8, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


def flat_head() -> nn.Module:
    """The head reads blocks of columns."""
    return nn.Sequential(nn.Conv2d(3, 7, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(63, 3))


class Dense(nn.Module):
    """Each layer reads what all before it compute, norms included, and so does the head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
        self.b, self.norm_b = nn.Conv2d(6, 7, 1), nn.BatchNorm2d(13, momentum=None)
        self.c, self.norm_c = nn.Conv2d(13, 8, 1), nn.BatchNorm2d(21)
        self.head = nn.Linear(21 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = torch.cat([a, self.b(F.relu(self.norm_a(a)))], 1)
        c = torch.cat([b, self.c(F.relu(self.norm_b(b)))], 1)
        return self.head(F.relu(self.norm_c(c)).flatten(1))  # type: ignore[no-any-return]


class Grouped(nn.Module):
    """Units are pairs of channels: of the group norm, and of the grouped convolution's input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 14, 1), nn.GroupNorm(7, 14)
        self.b = nn.Conv2d(14, 21, 3, padding=1, groups=7, padding_mode="reflect", bias=False)
        self.depthwise = nn.Conv2d(21, 21, 3, padding=1, groups=21)
        self.c, self.head = nn.Conv2d(21, 8, 1), nn.Linear(8 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.b(F.relu(self.norm(self.a(x)))))
        h = F.gelu(self.c(F.relu(self.depthwise(h))))
        return self.head(F.adaptive_max_pool2d(h, 2).flatten(1))  # type: ignore[no-any-return]


def norms() -> nn.Module:
    """Norms and activations that treat units alike, or have parameters for each."""
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 1), nn.InstanceNorm2d(6, affine=True), nn.PReLU(6)),
        *(nn.Conv2d(6, 7, 1), nn.InstanceNorm2d(7, track_running_stats=True), nn.PReLU()),
        *(nn.Conv2d(7, 9, 1), nn.LayerNorm([2, 2]), nn.SiLU(), nn.Conv2d(9, 8, 2), nn.Flatten()),
        nn.Linear(8, 3),
    )


NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "conv head": conv_head,
    "flat head": flat_head,
    "residual": Residual,
    "dense": Dense,
    "grouped": Grouped,
    "norms": norms,
}


def inputs(name: str, size: int = 16) -> Tensor:
    return torch.randn(size, 12) if name == "residual" else torch.randn(size, 3, 2, 2)


class Heads(nn.Module):
    """One output layer for each task, in place of a network's last layer."""

    def __init__(self, head: nn.Module, tasks: int = 5) -> None:
        super().__init__()
        self.heads = nn.ModuleList(copy.deepcopy(head) for _ in range(tasks))
        for each in self.heads:
            each.reset_parameters()  # type: ignore[operator]
        self.task = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[self.task](x)  # type: ignore[no-any-return]


def call_of(task: int) -> Forward:
    """How a network is called for a task: with its head, if each has its own."""

    def call(model: nn.Module, x: Tensor) -> Tensor:
        for module in model.modules():
            if isinstance(module, Heads):
                module.task = task
        return model(x)  # type: ignore[no-any-return]

    return call


call = call_of(0)


def logits(network: PartitionedNetwork, task: int, x: Tensor) -> Tensor:
    return network.subnetwork(task, call_of(task))(x)


def begin(network: PartitionedNetwork, x: Tensor) -> dict[nn.Parameter, nn.Parameter | None]:
    """Begin the next task, with its own head if it has one."""
    return network.begin_task(find_layout(network.model, call_of(network.partition.tasks), x))


def partitioned(
    name: str, single_head: bool, head_bias: str = "shared", seed: int = 0
) -> PartitionedNetwork:
    torch.manual_seed(seed)
    model = NETS[name]()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
    if not single_head:
        head = find_layout(model, call, inputs(name)).head
        model.set_submodule(head, Heads(model.get_submodule(head)))
    layout = find_layout(model, call, inputs(name))
    return PartitionedNetwork(model, layout, single_head, head_bias, seed)


def next_frontiers(network: PartitionedNetwork, random: Random) -> dict[str, int]:
    """Frontiers of a next task that leave free units; of the last group it takes one at least."""
    ends, found = network.layout.ends, {}
    for name, width in network.partition.widths.items():
        now = network.partition.frontiers[name][-1]
        least = max(1, now + (name in ends))
        found[name] = random.randint(least, max(least, min(width - 2, now + width // 3)))
    return found


def learnt(
    name: str, single_head: bool, tasks: int = 2, head_bias: str = "shared", seed: int = 0
) -> PartitionedNetwork:
    """A network that has learnt tasks (without training: its weights are random all the same)."""
    network, random = partitioned(name, single_head, head_bias, seed), Random(seed)
    for _ in range(tasks):
        begin(network, inputs(name))
        network.end_task()
        network.learn(next_frontiers(network, random))
    return network


def severed(network: PartitionedNetwork, task: int) -> nn.Module:
    """A copy of full width in which a task's units see nothing else, nor does its head."""
    model, layout = copy.deepcopy(network.model), network.layout
    used, head = network.partition.after(task), network.heads[task]
    with torch.no_grad():
        for name in layout.weights:
            columns = layout.columns[name]
            if name == layout.head:
                weight = model.get_submodule(head.layer).weight
                assert isinstance(weight, Tensor)
                own = layout.runs(columns, head.start, used)
                kept = take(weight, own, 1).clone()
                weight.zero_()
                put(weight, own, kept, 1)
            elif any(name == part.layer for group in layout.groups for part in group.readers):
                weight = model.get_submodule(name).weight
                assert isinstance(weight, Tensor)
                nothing = dict.fromkeys(used, 0)
                for rows in pieces(weight, layout.runs(layout.rows[name], nothing, used)):
                    for free in pieces(rows, layout.runs(columns, used, layout.widths), 1):
                        free.zero_()
    return model


def equal_states(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# -- sub-networks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("single_head", [True, False])
@pytest.mark.parametrize("name", NETS)
@settings(max_examples=5)
@given(seed=st.integers(0, 100))
def test_subnetworks_against_masked_networks(name: str, single_head: bool, seed: int) -> None:
    network = learnt(name, single_head, tasks=3, seed=seed)
    x = inputs(name)
    for task in range(3):
        before = network.partition.before(task)
        assert network.heads[task].start == (before if single_head else dict.fromkeys(before, 0))
        with torch.no_grad():
            expected = call_of(task)(severed(network, task).eval(), x)
        found = logits(network, task, x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert not found.requires_grad
        assert found.std() > 0


@pytest.mark.parametrize("name", NETS)
def test_a_candidate_is_the_subnetwork_to_be(name: str) -> None:
    for single_head in (True, False):
        network, x = learnt(name, single_head), inputs(name)
        begin(network, x)
        network.end_task()
        used = next_frontiers(network, Random(1))
        with network.view(network.candidate(used)):
            expected = call_of(2)(network.model, x)
        network.learn(used)
        assert torch.equal(logits(network, 2, x), expected)


@pytest.mark.parametrize("name", NETS)
def test_a_subnetwork_only_ever_evaluates(name: str) -> None:
    network, x = learnt(name, single_head=True), inputs(name)
    subnetwork = network.subnetwork(0, call)
    expected, kept = subnetwork(x), snapshot(network.model)
    subnetwork.train()
    network.model.train()
    assert not subnetwork.training
    assert torch.equal(subnetwork(x), expected)
    subnetwork.training = True
    assert torch.equal(subnetwork(x), expected)
    assert equal_states(snapshot(network.model), kept)
    assert all(module.training for module in network.model.modules())
    assert list(subnetwork.parameters()) == []
    assert subnetwork.state_dict() == {}


def test_a_view_leaves_nothing_behind() -> None:
    network, x = learnt("cnn", single_head=True), inputs("cnn")
    network.model.train()
    network.model[2].eval()
    modes = [module.training for module in network.model.modules()]
    network.begin_task(network.layout)
    with network.view(network.training_view):
        inner = {name: module.forward for name, module in network.modules.items()}
        network.subnetwork(0, call)(x)
        with pytest.raises(RuntimeError), network.view(network.task_view(1)):
            network.model(x[:, :2])
        assert {name: module.forward for name, module in network.modules.items()} == inner
    network.end_task()
    assert not any("forward" in module.__dict__ for module in network.model.modules())
    assert [module.training for module in network.model.modules()] == modes


def test_free_entries_reach_no_subnetwork() -> None:
    for name in NETS:
        network, x = learnt(name, single_head=True), inputs(name)
        before = [logits(network, task, x) for task in range(2)]
        network.begin_task(network.layout)
        with torch.no_grad():
            for module in network.modules.values():
                for leaf in module.parameters():
                    if leaf.requires_grad:
                        leaf.fill_(float("nan"))
        during = [logits(network, task, x) for task in range(2)]
        network.end_task()
        after = [logits(network, task, x) for task in range(2)]
        for found in (during, after):
            assert all(torch.equal(a, b) for a, b in zip(before, found, strict=True)), name


# -- a task in training ----------------------------------------------------------------------------


@pytest.mark.parametrize("single_head", [True, False])
@pytest.mark.parametrize("name", NETS)
@settings(max_examples=4)
@given(seed=st.integers(0, 100))
def test_training_against_a_masked_network(name: str, single_head: bool, seed: int) -> None:
    """Logits, and the gradients of free rows, are those of the dense network severed by hand."""
    network, x = learnt(name, single_head, seed=seed), inputs(name)
    used = {group: f[-1] for group, f in network.partition.frontiers.items()}
    layout = network.layout
    start = used if single_head else dict.fromkeys(used, 0)
    leaves = begin(network, x)
    dense = partitioned(name, single_head).model
    with torch.no_grad():
        # What the task in training sees: all units, older ones severed, its own head columns.
        full = {key: network._original(*key.rsplit(".", 1)) for key, _ in dense.named_parameters()}
        dense.load_state_dict({**network.model.state_dict(), **full} | dense_buffers(network))
        head = dense.get_submodule(network.layout.head)
        assert isinstance(head.weight, Tensor)
        nothing = dict.fromkeys(used, 0)
        for older in pieces(
            head.weight, layout.runs(layout.columns[layout.head], nothing, start), 1
        ):
            older.zero_()
    network.model.eval()
    dense.eval()
    y = torch.randint(0, 3, (len(x),))
    with network.view(network.training_view):
        found = call_of(2)(network.model, x)
        F.cross_entropy(found, y).backward()
    expected = call_of(2)(dense, x)
    F.cross_entropy(expected, y).backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    originals = dict(network._originals)
    for (layer, key), original in originals.items():
        reference = getattr(dense.get_submodule(layer), key).grad
        leaf = leaves[original]
        assert original.grad is None or leaf is original
        if layer == network.layout.head:
            if key == "bias" and single_head:
                assert leaf is None  # shared: the first task's, frozen
                continue
            if key == "weight":
                own = layout.runs(layout.columns[layout.head], start, layout.widths)
                reference = take(reference, own, 1)
        elif layer in layout.shared:
            assert leaf is None  # trained by the first task, frozen
            continue
        else:
            reference = take(reference, layout.runs(layout.rows[layer], used, layout.widths))
        assert leaf is not None
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, reference, rtol=1e-3, atol=1e-5)
    network.end_task()


def dense_buffers(network: PartitionedNetwork) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in network.model.named_buffers()}


def test_batch_norm_in_training_moves_the_free_units_alone() -> None:
    for name in ("cnn", "conv head", "residual", "dense", "norms"):
        network, x = learnt(name, single_head=True), inputs(name)
        layout, used = network.layout, network.frontier
        nothing = dict.fromkeys(used, 0)
        network.begin_task(network.layout)
        kept = snapshot(network.model)
        network.model.train()
        with network.view(network.training_view):
            network.model(x)
        network.end_task()
        moved = 0
        for layer, rows in layout.rows.items():
            for key in ("running_mean", "running_var"):
                if f"{layer}.{key}" in kept:
                    before = kept[f"{layer}.{key}"]
                    now = network.model.state_dict()[f"{layer}.{key}"]
                    old, free = (
                        layout.runs(rows, nothing, used),
                        layout.runs(rows, used, layout.widths),
                    )
                    assert torch.equal(take(now, old), take(before, old))
                    assert (take(now, free) != take(before, free)).all()
                    moved += 1
        assert moved > 0


def test_batch_norm_statistics_are_those_of_torch() -> None:
    """Of the empty network, where all units are free, with and without a momentum."""
    for name in ("cnn", "residual"):
        network = partitioned(name, single_head=True)
        plain = copy.deepcopy(network.model)
        network.begin_task(network.layout)
        with network.view(network.training_view):
            for step in range(3):
                torch.manual_seed(step)
                x = inputs(name)
                found = network.model(x)
                torch.manual_seed(step)
                expected = plain(inputs(name))
                torch.testing.assert_close(found, expected)
        network.end_task()
        for key, buffer in plain.named_buffers():
            torch.testing.assert_close(network.model.state_dict()[key], buffer)


def test_dropout_acts_in_training_alone() -> None:
    network, x = learnt("cnn", single_head=True), inputs("cnn")
    network.begin_task(network.layout)
    with network.view(network.training_view):
        network.model.train()
        assert not torch.equal(network.model(x), network.model(x))
        network.model.eval()
        assert torch.equal(network.model(x), network.model(x))
    network.end_task()


@pytest.mark.parametrize("single_head", [True, False])
def test_the_same_parameters_come_back(single_head: bool) -> None:
    network = learnt("cnn", single_head)
    before = dict(network.model.named_parameters())
    leaves = begin(network, inputs("cnn"))
    assert leaves.keys() == set(before.values())
    inside = dict(network.model.named_parameters())
    used = {group: f[-1] for group, f in network.partition.frontiers.items()}
    for key, parameter in inside.items():
        layer = key.rsplit(".", 1)[0]
        if ".heads." in layer:
            assert parameter is before[key]
        elif layer != network.layout.head:
            assert parameter is not before[key]
            assert parameter.is_leaf
            assert (
                parameter.data_ptr() == before[key][used[network.layout.writes[layer]] :].data_ptr()
            )
    network.end_task()
    after = dict(network.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[key] is before[key] for key in before)
    assert not network.in_training


def test_a_full_layer_trains_nothing_and_the_others_do() -> None:
    network, x = partitioned("mlp", single_head=True), inputs("mlp")
    network.learn({"1": 9, "3": 4})
    leaves = network.begin_task(network.layout)
    first = network._originals["1", "weight"]
    assert leaves[first] is None
    with network.view(network.training_view):
        F.cross_entropy(network.model(x), torch.zeros(16, dtype=torch.int64)).backward()
    assert network.leaves().keys() == {"3", "5"}
    assert all(leaf.grad is not None for leaf in network.leaves().values())
    network.end_task()


def test_no_free_unit_for_a_single_head() -> None:
    network = partitioned("mlp", single_head=True)
    network.learn({"1": 5, "3": 8})
    with pytest.raises(CapacityExhausted, match=r"last hidden layer '3' .8 units, all used by 1"):
        network.begin_task(network.layout)
    assert not network.in_training


def test_heads_of_their_own_learn_on_a_full_network() -> None:
    network, x = partitioned("mlp", single_head=False), inputs("mlp")
    network.learn({"1": 9, "3": 8})
    leaves = begin(network, x)
    trained = {leaf for leaf in leaves.values() if leaf is not None}
    head = network.model.get_submodule(network.layout.head)
    assert trained == set(head.parameters())
    with network.view(network.training_view):
        F.cross_entropy(call_of(1)(network.model, x), torch.zeros(16, dtype=torch.int64)).backward()
    assert all(p.grad is not None for p in head.parameters())
    network.end_task()


def test_frozen_layers_stay_frozen() -> None:
    network = partitioned("mlp", single_head=True)
    network.model.requires_grad_(requires_grad=False)
    assert set(network.begin_task(network.layout).values()) == {None}
    network.end_task()


def test_another_network_is_refused() -> None:
    network = learnt("mlp", single_head=True)
    other = nn.Sequential(*list(mlp())[:-1], nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(UnsupportedNetwork, match="has changed since"):
        network.begin_task(find_layout(other, call, inputs("mlp")))


def test_a_head_is_not_trained_twice() -> None:
    network = learnt("mlp", single_head=False)
    with pytest.raises(UnsupportedNetwork, match=r"head '5.heads.1' is that of a task learnt"):
        network.begin_task(network.layout)
    assert not network.in_training


def test_a_head_that_reads_another_layer_is_refused() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 6), nn.Linear(6, 6)
            self.early, self.late, self.later = (nn.Linear(6, 3) for _ in range(3))

        def forward(self, x: Tensor, head: str) -> Tensor:
            h = F.relu(self.a(x))
            h2 = F.relu(self.b(h))
            return self.early(h + 0 * h2) if head == "early" else getattr(self, head)(h2)  # type: ignore[no-any-return]

    def layout(head: str) -> Layout:
        return find_layout(model, lambda m, x: m(x, head), torch.randn(4, 12))

    model = TwoHeads()
    network = PartitionedNetwork(model, layout("late"), single_head=False)
    network.learn({"a": 2, "b": 2})
    network.begin_task(layout("later"))  # a head of its own is welcome
    network.end_task()
    with pytest.raises(UnsupportedNetwork):
        network.begin_task(layout("early"))


# -- bias of a single head -------------------------------------------------------------------------


def train_bias(network: PartitionedNetwork, value: float) -> None:
    """One task whose training fills what trains of the head with a value, and uses few units."""
    network.begin_task(network.layout)
    with torch.no_grad():
        for leaf in network.model.get_submodule(network.layout.head).parameters():
            if leaf.requires_grad:
                leaf.fill_(value)
    network.end_task()
    network.learn({name: f[-1] + 2 for name, f in network.partition.frontiers.items()})


@pytest.mark.parametrize(
    ("head_bias", "expected"),
    [("shared", (1.0, 1.0, 1.0)), ("per-task", (1.0, 2.0, 3.0)), ("none", (0.0, 0.0, 0.0))],
)
def test_bias_of_a_single_head(head_bias: str, expected: tuple[float, ...]) -> None:
    network, x = partitioned("mlp", True, head_bias), inputs("mlp")
    weights = (1.0, 2.0, 3.0)
    for value in weights:
        train_bias(network, value)
    for task, (weight, bias) in enumerate(zip(weights, expected, strict=True)):
        seen: list[Tensor] = []
        head = network.model.get_submodule(network.layout.head)
        handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # noqa: B023
        found = logits(network, task, x)
        handle.remove()
        assert seen[0].shape[1] == 2  # its own slice of the last hidden layer
        torch.testing.assert_close(found, (weight * seen[0].sum(1) + bias)[:, None].expand(-1, 3))


# -- out of the optimizer's reach ------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "fused sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1),
    "fused adam": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
    "fused adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1, fused=True),
    "foreach adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1, foreach=True),
    "fused adagrad": lambda p: torch.optim.Adagrad(p, 0.1, weight_decay=0.1, fused=True),
}


def train(network: PartitionedNetwork, optimizer: str, x: Tensor, steps: int = 3) -> None:
    """A task's training by the given optimizer, with noise in the running statistics too."""
    call = call_of(network.partition.tasks)
    leaves = begin(network, x)
    step = OPTIMIZERS[optimizer]([leaf for leaf in leaves.values() if leaf is not None])
    network.model.train()
    with network.view(network.training_view):
        for _ in range(steps):
            step.zero_grad()
            F.cross_entropy(call(network.model, x), torch.randint(0, 3, (len(x),))).backward()
            nn.utils.clip_grad_norm_(network.model.parameters(), 1.0)
            step.step()
    network.end_task()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("single_head", [True, False])
@pytest.mark.parametrize("name", ["cnn", "conv head", "residual", "dense", "grouped", "norms"])
def test_optimizers_leave_frozen_entries_bitwise(
    name: str, single_head: bool, optimizer: str
) -> None:
    network, x = learnt(name, single_head), inputs(name)
    if name == "conv head":
        network.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    used = {group: f[-1] for group, f in network.partition.frontiers.items()}
    checksum, kept = network.checksum(), snapshot(network.model)
    frozen = {key: tensor.clone() for key, tensor in network._frozen().items()}
    before = [logits(network, task, x) for task in range(2)]
    train(network, optimizer, x)
    assert network.checksum() == checksum
    assert equal_states({k: t.clone() for k, t in network._frozen().items()}, frozen)
    for task, expected in enumerate(before):
        assert torch.equal(logits(network, task, x), expected)
    for key, parameter in network.model.named_parameters():  # and all that is free has learnt
        layer = key.rsplit(".", 1)[0]
        if ".heads." in key:
            learns = layer == network.layout.head
            assert learns != torch.equal(parameter, kept[key])
        elif layer == network.layout.head:
            if key.endswith("bias"):
                continue
            free = network.layout.runs(network.layout.columns[layer], used, network.layout.widths)
            assert not torch.equal(take(parameter, free, 1), take(kept[key], free, 1))
        elif layer in network.layout.shared:
            assert torch.equal(parameter, kept[key])
        else:
            free = network.layout.runs(network.layout.rows[layer], used, network.layout.widths)
            assert not torch.equal(take(parameter, free), take(kept[key], free))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_optimizer_state_is_as_small_as_what_trains(optimizer: str) -> None:
    network = learnt("cnn", single_head=True)
    leaves = network.begin_task(network.layout)
    trained = [leaf for leaf in leaves.values() if leaf is not None]
    made = OPTIMIZERS[optimizer](trained)
    for leaf in trained:
        leaf.grad = torch.ones_like(leaf)
    made.step()
    for leaf in trained:
        for value in made.state[leaf].values():
            assert not isinstance(value, Tensor) or value.numel() in (1, leaf.numel())
    network.end_task()


def test_columns_of_the_head_train_as_a_copy() -> None:
    """Fused optimizers silently write past a view of columns (torch 2.14), rows are right."""
    network = learnt("mlp", single_head=True)
    head = network.model.get_submodule(network.layout.head)
    original = head.weight
    assert isinstance(original, nn.Parameter)
    network.begin_task(network.layout)
    leaf = head.weight
    assert isinstance(leaf, nn.Parameter)
    assert leaf.is_contiguous()
    assert leaf.untyped_storage().data_ptr() != original.untyped_storage().data_ptr()
    start = original.shape[1] - leaf.shape[1]
    assert torch.equal(leaf, original[:, start:])
    kept = original.detach().clone()
    with torch.no_grad():
        leaf.add_(1.0)
    assert torch.equal(original, kept)
    network.end_task()
    torch.testing.assert_close(original[:, start:], kept[:, start:] + 1.0)
    assert torch.equal(original[:, :start], kept[:, :start])


# -- state -----------------------------------------------------------------------------------------


def test_the_checksum_sees_every_frozen_entry() -> None:
    for name in NETS:
        network = learnt(name, single_head=True)
        before = network.checksum()
        assert network.checksum() == before
        for key, tensor in network._frozen().items():
            if tensor.numel() == 0:
                continue
            entry = tensor[(-1,) * tensor.dim()]
            kept = entry.clone()
            entry.copy_(torch.nextafter(kept, kept + 1))  # the last bit alone
            assert network.checksum() != before, (name, key)
            entry.copy_(kept)
            assert network.checksum() == before


@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (3, 2, 2, 2)])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.int8, torch.bool]
)
def test_a_fingerprint_sees_each_change_and_each_exchange(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    tensor = (torch.randn(shape) * 9).to(dtype)
    before = int(_fingerprint(tensor))
    entries = list(itertools.product(*map(range, shape)))
    for index in entries:
        changed = tensor.clone()
        changed[index] = ~changed[index] if dtype == torch.bool else changed[index] + 1
        assert int(_fingerprint(changed)) != before
    for a, b in itertools.combinations(entries, 2):
        changed = tensor.clone()
        changed[a], changed[b] = tensor[b], tensor[a]
        assert (int(_fingerprint(changed)) != before) != torch.equal(changed, tensor)


def test_the_checksum_does_not_see_free_entries() -> None:
    network, x = learnt("cnn", single_head=True), inputs("cnn")
    before = network.checksum()
    network.begin_task(network.layout)
    assert network.checksum() == before
    with network.view(network.training_view):
        network.model(x)
    network.end_task()
    assert network.checksum() == before


@pytest.mark.parametrize("head_bias", ["shared", "per-task", "none"])
@pytest.mark.parametrize("single_head", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_state_goes_round_bitwise(name: str, single_head: bool, head_bias: str) -> None:
    network, x = learnt(name, single_head, head_bias=head_bias), inputs(name)
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    other = partitioned(name, single_head, head_bias, seed=1)
    other.seed = network.seed
    other.load_state_dict(state)
    assert other.partition == network.partition
    assert other.checksum() == network.checksum()
    for task in range(2):
        assert torch.equal(logits(other, task, x), logits(network, task, x))
    if single_head and head_bias != "none":  # what comes is the same too: nothing else was needed
        for each in (network, other):
            torch.manual_seed(5)
            train(each, "adam", x)
            each.learn(next_frontiers(each, Random(3)))
        assert torch.equal(logits(other, 2, x), logits(network, 2, x))


def test_a_state_is_no_reference() -> None:
    network = learnt("mlp", single_head=True)
    state = network.state_dict()
    frozen = state["frozen"]
    assert isinstance(frozen, dict)
    for name, tensor in network._frozen().items():
        assert frozen[name].untyped_storage().nbytes() == tensor.numel() * 4
        assert frozen[name].data_ptr() != tensor.data_ptr()


def test_a_state_of_another_network_is_refused() -> None:
    state = learnt("mlp", single_head=True).state_dict()
    wider = nn.Sequential(
        *(nn.Flatten(), nn.Linear(24, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3))
    )
    layout = find_layout(wider, call, torch.randn(4, 24))
    for network in (
        partitioned("cnn", single_head=True),
        PartitionedNetwork(wider, layout, single_head=True),
    ):
        kept = snapshot(network.model)
        with pytest.raises(ValueError, match="the state is of"):
            network.load_state_dict(state)
        assert network.partition.tasks == 0
        assert network.heads == []
        assert equal_states(snapshot(network.model), kept)


# -- widening -------------------------------------------------------------------------------------

MORE = 3


def new_entries(network: PartitionedNetwork, group: str, old: dict[str, int]) -> dict[str, Tensor]:
    """The weights of a widened group's new units: where they are computed, and where read."""
    units = next(g for g in network.layout.groups if g.name == group)
    found: dict[str, Tensor] = {}
    for parts, dim in (((*units.writers, *units.norms), 0), (units.readers, 1)):
        for part in parts:
            weight = network.model.get_submodule(part.layer)._parameters["weight"]
            if weight is not None:
                first = part.first + old[group] * part.block
                new = weight.detach().narrow(dim, first, MORE * part.block)
                found[f"{part.layer} {dim}"] = new.clone()
    return found


@pytest.mark.parametrize("single_head", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_old_logits_stay_and_new_units_train(name: str, single_head: bool) -> None:
    made, x = learnt(name, single_head), inputs(name)
    for group in made.layout.widths:
        widen_and_train(copy.deepcopy(made), group, x)


def widen_and_train(network: PartitionedNetwork, group: str, x: Tensor) -> None:
    single_head = network.single_head
    before, old = [logits(network, task, x) for task in range(2)], dict(network.layout.widths)
    identities = {key: id(p) for key, p in network.model.named_parameters()}
    network.expand({group: MORE})
    assert network.partition.widths == network.layout.widths == {**old, group: old[group] + MORE}
    assert network.partition.widths_then == [old, old]
    for task in range(4):  # the heads of tasks to come too
        found = find_layout(network.model, call_of(task), x)
        assert found.core() == network.layout.core()
    assert find_layout(network.model, call_of(0 if single_head else 1), x) == network.layout
    assert {key: id(p) for key, p in network.model.named_parameters()} == identities

    def unchanged() -> bool:
        return all(
            torch.equal(logits(network, task, x), expected) for task, expected in enumerate(before)
        )

    assert unchanged()
    train(network, "adam", x, steps=0)
    drawn = new_entries(network, group, old)
    assert unchanged()
    train(network, "adam", x)
    trained = new_entries(network, group, old)
    assert unchanged()
    assert drawn
    for key, weight in trained.items():
        assert not torch.equal(weight, drawn[key]), key


@pytest.mark.parametrize("single_head", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_all_groups_at_once_and_again(name: str, single_head: bool) -> None:
    network, x = learnt(name, single_head), inputs(name)
    before = [logits(network, task, x) for task in range(2)]
    old = dict(network.layout.widths)
    for each in (1, 2):
        network.expand(dict.fromkeys(old, each))
    assert network.layout.widths == {group: width + 3 for group, width in old.items()}
    assert find_layout(network.model, call_of(0 if single_head else 1), x) == network.layout
    train(network, "sgd", x)
    for task, expected in enumerate(before):
        assert torch.equal(logits(network, task, x), expected)


def test_channels_last_stays_channels_last() -> None:
    network, x = learnt("conv head", single_head=True), inputs("conv head")
    network.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    before = logits(network, 0, x)
    network.expand({"3": MORE})
    weight = network.model.get_submodule("3").weight
    assert isinstance(weight, Tensor)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(logits(network, 0, x), before)


@pytest.mark.parametrize("name", NETS)
def test_a_widened_state_widens_a_fresh_network(name: str) -> None:
    for single_head in (True, False):
        network, x = learnt(name, single_head), inputs(name)
        group = next(iter(network.layout.widths))
        network.expand({group: MORE})
        file = io.BytesIO()
        torch.save(network.state_dict(), file)
        file.seek(0)
        state: dict[str, Any] = torch.load(file, weights_only=True)
        other = partitioned(name, single_head, seed=1)
        other.load_state_dict(state)
        assert other.partition == network.partition
        for task in range(2):
            assert torch.equal(logits(other, task, x), logits(network, task, x))


def test_only_what_was_widened_is_widened_again() -> None:
    state = learnt("mlp", single_head=True).state_dict()
    narrow = nn.Sequential(
        *(nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, 3))
    )
    layout = find_layout(narrow, call_of(0), inputs("mlp"))
    network = PartitionedNetwork(narrow, layout, single_head=True)
    with pytest.raises(ValueError, match="the state is of a network with layers"):
        network.load_state_dict(state)
    assert network.layout.widths["1"] == 7


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"nowhere": 1}, "no group of units 'nowhere'.*the groups are: 1, 3"),
        ({"1": 2, "5": 1}, "no group of units '5'"),
        ({"1": 0}, "layer '1' is to get 0 units"),
        ({"3": 2, "1": -1}, "layer '1' is to get -1 units"),
    ],
)
def test_what_cannot_be_widened_is_refused(more: dict[str, int], message: str) -> None:
    network = learnt("mlp", single_head=True)
    kept, layout = snapshot(network.model), network.layout
    with pytest.raises(ValueError, match=message):
        network.expand(more)
    assert network.layout == layout
    assert equal_states(snapshot(network.model), kept)


class TwoEnds(nn.Module):
    """A head that reads two layers, of which one may be full before the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 6, 1), nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.a(x), self.b(x)], 1)
        return self.head(F.silu(h).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("full", ["a", "b"])
def test_a_single_head_learns_on_while_one_of_its_layers_is_full(full: str) -> None:
    torch.manual_seed(0)
    model, x = TwoEnds(), inputs("cnn")
    network = PartitionedNetwork(model, find_layout(model, call, x), single_head=True)
    begin(network, x)
    network.end_task()
    network.learn({"a": 2, "b": 2, full: network.layout.widths[full]})
    first = logits(network, 0, x)
    leaves = [leaf for leaf in begin(network, x).values() if leaf is not None]
    optimizer = torch.optim.Adam(leaves, lr=0.1)
    activity = Activity(network.layout)
    with network.view(network.training_view):
        with activity.measure(network.model, network.training_view.start):
            before = F.cross_entropy(network.model(x), torch.arange(len(x)) % 3)
        before.backward()
        optimizer.step()
        assert F.cross_entropy(network.model(x), torch.arange(len(x)) % 3) < before
    network.end_task()
    assert (activity.means()["b" if full == "a" else "a"] > 0).any()
    floors = network.floors()
    assert floors == {"a": 3, "b": 3, full: network.layout.widths[full]}
    with network.view(network.candidate(floors)):
        expected = network.model(x)
    network.learn(floors)
    assert torch.equal(logits(network, 0, x), first)
    assert torch.equal(logits(network, 1, x), expected)
    # The newer task reads nothing of the full layer.
    with torch.no_grad():
        model.get_submodule(full).weight.fill_(1.0)
    assert torch.equal(logits(network, 1, x), expected)


class _BatchNorms(TorchDispatchMode):
    """The tensors as large as a batch that batch norm's kernels are given, forwards and back."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards: list[Tensor] = []
        self.backwards: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if "batch_norm" in str(func):
            given = [a for a in args if isinstance(a, Tensor) and a.dim() == 4]
            (self.backwards if "backward" in str(func) else self.forwards).extend(given)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_batch_norm_runs_on_dense_tensors_beside_frozen_channels(
    memory: torch.memory_format,
) -> None:
    """Its kernels for the CPU take several times as long on slices of the channels."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 9, 3, padding=1), nn.BatchNorm2d(9), nn.ReLU(), nn.Conv2d(9, 3, 4)),
        nn.Flatten(),
    ).to(memory_format=memory)
    x = torch.randn(6, 3, 4, 4).to(memory_format=memory)
    network = PartitionedNetwork(model, find_layout(model, call, x), single_head=True)
    network.learn({group.name: 3 for group in network.layout.groups})
    begin(network, x)
    with network.view(network.training_view), _BatchNorms() as seen:
        F.cross_entropy(network.model(x), torch.arange(6) % 3).backward()
    # Frozen and free of the first layer, the free ones that the head reads of the second.
    assert len(seen.forwards) == 3
    assert len(seen.backwards) == 4  # of free ones: the input, and the gradient of the output
    for tensor in (*seen.forwards, *seen.backwards):
        assert tensor.is_contiguous(memory_format=memory)


class _Operations(TorchDispatchMode):
    """What is done with tensors, forwards and back, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["mlp", "cnn", "conv head", "residual"])
def test_an_empty_network_works_no_more_than_a_plain_one(name: str) -> None:
    """A gradient back through a slice of everything would be copied into zeros, at each norm."""
    x = inputs(name)
    network = partitioned(name, single_head=True)
    plain = copy.deepcopy(network.model).train()
    network.begin_task(network.layout)
    network.model.train()
    found = []
    for model, view in ((network.model, network.view(network.training_view)), (plain, None)):
        with view or contextlib.nullcontext(), _Operations() as seen:
            F.cross_entropy(model(x), torch.arange(len(x)) % 3).backward()
        # Views of the parameters and running statistics cost nothing.
        found.append([o for o in seen.names if "slice.Tensor" not in o and "detach" not in o])
    ours, bare = found
    assert ours == bare
