"""torchvision's networks, with few blocks: proved and trained without forgetting, or refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models
from torchvision.models.densenet import DenseNet
from torchvision.models.resnet import Bottleneck, ResNet

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Avalanche's own imports warn of
    from benchmarks.models import resnet18
    from clnp import UnsupportedNetwork
    from clnp.network import PartitionedNetwork
    from clnp.proof import prove
    from clnp.units import find_layout

PROVED: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (lambda: resnet18(5), 32),
    "densenet": (lambda: DenseNet(4, (2, 2), 8, bn_size=2, num_classes=5), 32),
    "resnext": (
        lambda: ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5, groups=4, width_per_group=4),
        32,
    ),
    "mobilenet v2": (lambda: models.mobilenet_v2(num_classes=5, width_mult=0.25), 32),
    "mobilenet v3": (lambda: models.mobilenet_v3_small(num_classes=5), 64),
    "squeezenet": (lambda: models.squeezenet1_1(num_classes=5), 64),
}
"""Network and side of its images."""

REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "convnext": (
        lambda: models.convnext_tiny(num_classes=5),
        r"layer 'features\.0\.1' \(LayerNorm2d.*overrides the forward",
    ),
    "shufflenet": (lambda: models.shufflenet_v2_x0_5(num_classes=5), "torch-pruning can't trace"),
}


def call(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)  # type: ignore[no-any-return]


def train(network: PartitionedNetwork, x: Tensor) -> None:
    leaves = [leaf for leaf in network.begin_task(network.layout).values() if leaf is not None]
    optimizer = torch.optim.SGD(leaves, lr=0.01, momentum=0.9, weight_decay=0.01)
    network.model.train()
    with network.view(network.training_view):
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(network.model(x), torch.arange(len(x)) % 5).backward()
            optimizer.step()
    network.end_task()


SLOW = ("resnet18", "mobilenet v3")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in PROVED]
)
def test_proved_and_nothing_is_forgotten(name: str) -> None:
    make, side = PROVED[name]
    model, x = make(), torch.randn(4, 3, side, side)
    layout = find_layout(model, call, x)
    prove(model, layout, call, x, single_head=True)
    network = PartitionedNetwork(model, layout, single_head=True)
    train(network, x)
    network.learn({name: max(1, width // 3) for name, width in layout.widths.items()})
    before, checksum = network.subnetwork(0, call)(x), network.checksum()
    assert before.std() > 0
    train(network, x + 1)
    assert network.checksum() == checksum
    network.learn({name: max(1, 2 * width // 3) for name, width in layout.widths.items()})
    assert torch.equal(network.subnetwork(0, call)(x), before)
    assert not torch.equal(network.subnetwork(1, call)(x), before)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(UnsupportedNetwork, match=message):
        find_layout(make(), call, torch.randn(2, 3, 64, 64))
