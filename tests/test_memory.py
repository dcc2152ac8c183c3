"""The peak of memory: known allocations, counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.memory import peak_bytes

CPU = torch.device("cpu")
MIB = 2**20


def ones(mib: int) -> torch.Tensor:
    return torch.ones(mib * MIB // 4)


def test_the_peak_counts_what_lives_at_once():
    def run() -> None:
        one = ones(2)
        two = one + 1  # 4 MiB
        del one, two
        ones(3)

    assert peak_bytes(run, CPU) == 4 * MIB


def test_views_and_in_place_operations_cost_nothing():
    def run() -> None:
        one = ones(2)
        one.view(2, -1)[0].add_(1)

    assert peak_bytes(run, CPU) == 2 * MIB


def test_tensors_that_were_there_before_count_when_they_are_used():
    there = ones(2)
    assert peak_bytes(lambda: ones(1), CPU) == MIB
    assert peak_bytes(lambda: there + 1, CPU) == 4 * MIB


def test_gradients_and_optimizer_states_count():
    layer = nn.Linear(512, 512, bias=False)  # 1 MiB
    optimizer = torch.optim.Adam(layer.parameters(), fused=True)
    x = torch.ones(1, 512)

    def step() -> None:
        layer(x).sum().backward()
        optimizer.step()

    weight_gradient_and_averages = 4 * MIB
    peak = peak_bytes(step, CPU)
    assert weight_gradient_and_averages <= peak < weight_gradient_and_averages * 1.01


@pytest.mark.gpu
def test_on_a_gpu_the_allocator_is_asked():
    there = ones(2).cuda()

    def run() -> None:
        there.add(1)

    assert 2 * MIB <= peak_bytes(run, torch.device("cuda")) < 3 * MIB
