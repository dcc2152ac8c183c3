"""Mixed devices, caught without a GPU: under FakeTensorMode, "cuda" tensors run forward."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from clnp.network import PartitionedNetwork
from clnp.pruning import Activity
from clnp.units import find_layout


def network_of(device: str) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, device=device),
        nn.BatchNorm2d(6, device=device),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(54, 12, device=device),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(12, 3, device=device),
    )


@pytest.mark.parametrize("head_bias", ["shared", "per-task"])
def test_views_and_activity_keep_to_the_models_device(
    head_bias: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It reads a number off a tensor, which fake tensors don't have.
    monkeypatch.setattr("clnp.network.derived_seed", lambda *_: 1)
    monkeypatch.setattr("clnp.partition.derived_seed", lambda *_: 1)
    layout = find_layout(network_of("cpu"), lambda m, x: m(x), torch.randn(4, 1, 8, 8))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = network_of("cuda")
        network = PartitionedNetwork(model, layout, single_head=True, head_bias=head_bias)
        x = torch.randn(5, 1, 8, 8, device="cuda")
        for used in ({"0": 2, "5": 4}, {"0": 4, "5": 9}):
            network.begin_task(layout)
            with network.view(network.training_view):
                assert model(x).device.type == "cuda"
                activity = Activity(layout)
                with activity.measure(model, network.training_view.start):
                    model(x)
                assert all(total.device.type == "cuda" for total in activity._sums.values())
            network.end_task()
            with network.view(network.candidate(used)):
                model(x)
            network.sort({name: torch.arange(width) for name, width in (("0", 6), ("5", 12))})
            network.learn(used)
        for task in range(2):
            logits = network.subnetwork(task, lambda m, batch: m(batch))(x)
            assert logits.device.type == "cuda"
            assert logits.shape == (5, 3)


def test_a_tasks_own_bias_follows_the_model() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    layout = find_layout(model, lambda m, x: m(x), torch.randn(2, 4))
    network = PartitionedNetwork(model, layout, single_head=True, head_bias="per-task")
    network.learn({"0": 3})
    model.to("meta")  # as far from a CPU as a GPU is
    logits = network.subnetwork(0, lambda m, x: m(x))(torch.empty(2, 4, device="meta"))
    assert logits.device.type == "meta"


def test_the_check_itself_can_fail() -> None:
    with FakeTensorMode(), pytest.raises(RuntimeError, match="device"):
        network_of("cuda")(torch.randn(5, 1, 8, 8))
