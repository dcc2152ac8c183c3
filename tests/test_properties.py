"""Zero forgetting as a property: random chains x optimizers x cuts, bit by bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clnp.layers import adapter_of, row_tensors
from clnp.network import PartitionedNetwork
from clnp.proof import prove
from clnp.pruning import Activity, sorting
from clnp.sparsity import L1
from clnp.units import find_layout

CLASSES = 3
TASKS = 3

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01, amsgrad=True),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.005, momentum=0.5, centered=True),
}


def forward(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)  # type: ignore[no-any-return]


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """A random chain of the supported layers, and the shape of its input."""
    torch.manual_seed(draw(st.integers(0, 2**16)))  # of the initial weights
    activation = draw(st.sampled_from([nn.ReLU, nn.Tanh, nn.LeakyReLU]))
    layers: list[nn.Module] = []
    if draw(st.booleans()):
        shape, channels, side = (2, 8, 8), 2, 8
        for _ in range(draw(st.integers(1, 2))):
            width = draw(st.integers(4, 8))
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=draw(st.booleans()))]
            if draw(st.booleans()):
                layers += [nn.BatchNorm2d(width, affine=draw(st.booleans()))]
            layers += [activation()]
            if draw(st.booleans()) and side > 2:
                pool = draw(st.sampled_from([nn.MaxPool2d, nn.AvgPool2d]))
                layers += [pool(2)]
                side //= 2
            channels = width
        if draw(st.booleans()):
            layers += [nn.AdaptiveAvgPool2d(1)]
            side = 1
        layers += [nn.Flatten(), nn.Dropout(0.2)]
        inputs = channels * side * side
    else:
        inputs = draw(st.integers(3, 9))
        shape = (inputs,)
    for _ in range(draw(st.integers(0 if len(shape) > 1 else 1, 2))):
        width = draw(st.integers(6, 12))
        layers += [nn.Linear(inputs, width)]
        if draw(st.booleans()):
            layers += [nn.BatchNorm1d(width)]
        layers += [activation()]
        inputs = width
    layers += [nn.Linear(inputs, CLASSES, bias=draw(st.booleans()))]
    return nn.Sequential(*layers), shape


def train(network: PartitionedNetwork, optimizer: str, x: Tensor, y: Tensor) -> tuple[float, float]:
    """A few steps; the loss before and after them."""
    leaves = [leaf for leaf in network.begin_task(network.layout).values() if leaf is not None]
    steps = OPTIMIZERS[optimizer](leaves)
    penalty = L1(network.leaves(), dict.fromkeys(network.layout.weights, 1e-3))
    losses = []
    network.model.train()
    with network.view(network.training_view):
        for _ in range(8):
            steps.zero_grad()
            loss = F.cross_entropy(network.model(x), y)
            loss.backward()
            penalty.add_to_gradients()
            torch.nn.utils.clip_grad_norm_(network.model.parameters(), 5.0)
            steps.step()
            losses.append(loss.item())
    return losses[0], min(losses[1:])


def cut(network: PartitionedNetwork, x: Tensor, data: st.DataObject) -> None:
    """Sort by activity and cut at random places, with something left for the next task."""
    activity = Activity(network.layout)
    with (
        network.view(network.training_view),
        activity.measure(network.model, network.training_view.start),
        torch.no_grad(),
    ):
        network.model(x)
    network.end_task()
    before = {name: f[-1] for name, f in network.partition.frontiers.items()}
    network.sort({name: sorting(a, before[name]) for name, a in activity.means().items()})
    last = network.layout.last.name
    used = {}
    for name, width in network.partition.widths.items():
        low = before[name] + (1 if name == last or before[name] == 0 else 0)
        left = TASKS - 1 - network.partition.tasks  # a unit of the last layer for each coming task
        high = width - left if name == last else width
        used[name] = data.draw(st.integers(low, max(low, high)))
    network.learn(used)


@settings(max_examples=40)
@given(chain=networks(), optimizer=st.sampled_from(sorted(OPTIMIZERS)), data=st.data())
def test_learnt_tasks_stay_bitwise(
    chain: tuple[nn.Module, tuple[int, ...]], optimizer: str, data: st.DataObject
) -> None:
    model, shape = chain
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    x = torch.randn(24, *shape)
    layout = find_layout(model, forward, x)
    prove(model, layout, forward, x, single_head=True)
    bias = data.draw(st.sampled_from(["shared", "per-task", "none"]))
    network = PartitionedNetwork(model, layout, single_head=True, head_bias=bias)
    kept: list[Tensor] = []
    for task in range(TASKS):
        y = torch.randint(CLASSES, (24,))
        first, best = train(network, optimizer, x, y)
        assert best < first, "the loss didn't fall"
        cut(network, x, data)
        for old, logits in enumerate(kept):
            assert torch.equal(network.subnetwork(old, forward)(x), logits)
        used = network.partition.after(task)
        for group in layout.groups:
            for reader in group.readers:
                if reader.layer != layout.head:
                    rows = used[layout.writes[reader.layer]]
                    weight = network.modules[reader.layer].weight
                    assert not weight[:rows, used[group.name] * reader.block :].any()
        kept.append(network.subnetwork(task, forward)(x))
    assert network.partition.tasks == TASKS


def frozen_and_one_more_task() -> tuple[PartitionedNetwork, Tensor, Tensor]:
    """A network with a learnt task, its input, and the task's logits."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    x, y = torch.randn(24, 5), torch.arange(24) % 3
    network = PartitionedNetwork(model, find_layout(model, forward, x), single_head=True)
    train(network, "adam", x, y)
    network.end_task()
    network.learn({"0": 4, "3": 4})
    return network, x, network.subnetwork(0, forward)(x)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda n: n.modules["0"].weight.data[1, 2].add_(0.5),
        lambda n: n.modules["3"].bias.data[2].add_(0.5),
        lambda n: n.modules["1"].running_mean[:4].add_(0.5),
        lambda n: n.modules["5"].weight.data[:, 1].add_(0.5),
    ],
    ids=["a frozen row", "a frozen bias", "moving running statistics", "a frozen head column"],
)
def test_the_check_can_fail(break_it: Callable[[PartitionedNetwork], None]) -> None:
    """Negative controls: each of these writes is forgetting, and is seen as such."""
    network, x, logits = frozen_and_one_more_task()
    before = network.checksum()
    assert torch.equal(network.subnetwork(0, forward)(x), logits)
    break_it(network)
    assert not torch.equal(network.subnetwork(0, forward)(x), logits)
    assert network.checksum() != before


def test_a_forgotten_interference_block_or_permutation_changes_the_whole_network() -> None:
    """The sub-network is the whole network with W_int = 0: forget either half, and they differ."""
    network, x, logits = frozen_and_one_more_task()
    model = network.model.eval()

    def whole() -> Tensor:
        with torch.no_grad():
            head = network.modules["5"].weight
            kept = head[:, 4:].clone()
            head[:, 4:] = 0.0
            out = forward(model, x)
            head[:, 4:] = kept
            return out

    for module in (network.modules["0"], network.modules["3"]):
        for tensor in row_tensors(module, adapter_of("", module)).values():
            if tensor is not None:
                tensor.data[4:] = torch.rand_like(tensor[4:])  # free units are alive
    torch.testing.assert_close(whole(), logits)
    network.modules["3"].weight.data[:4, 4:] = 1.0  # W_int
    assert not torch.allclose(whole(), logits)
    network.modules["3"].weight.data[:4, 4:] = 0.0
    network.modules["0"].weight.data[:4] = network.modules["0"].weight.data[:4].flip(0)
    assert not torch.allclose(whole(), logits)  # rows moved without their readers
