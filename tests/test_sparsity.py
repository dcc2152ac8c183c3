"""The L1 term: exact gradients, whatever parts it works in, and one small buffer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clnp import sparsity
from clnp.sparsity import L1

ALPHAS = {"fc": 0.25, "conv": 0.5, "off": 0.0, "frozen": 1.0, "unused": 1.0}


def weights() -> dict[str, nn.Parameter]:
    conv = torch.randn(7, 3, 2, 2).to(memory_format=torch.channels_last)
    leaves = {
        "fc": nn.Parameter(torch.randn(20, 5)[3:]),  # rows of a larger matrix
        "conv": nn.Parameter(conv),
        "off": nn.Parameter(torch.randn(4, 4)),
        "frozen": nn.Parameter(torch.randn(4, 4), requires_grad=False),
        "unused": nn.Parameter(torch.randn(4, 4)),
    }
    with torch.no_grad():
        leaves["fc"][0] = 0.0
    for name in ("fc", "conv", "off"):
        leaves[name].grad = torch.randn_like(leaves[name])
    return leaves


@pytest.mark.parametrize("part", [1, 12, 30, 2**19])
def test_alpha_times_the_sign_is_added_whatever_the_parts(
    part: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sparsity, "CPU_PART", part)
    leaves = weights()
    before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    gradients = {n: leaf.grad.clone() for n, leaf in leaves.items() if leaf.grad is not None}
    L1(leaves, ALPHAS).add_to_gradients()
    for name, gradient in gradients.items():
        grad = leaves[name].grad
        assert grad is not None
        assert torch.equal(grad, gradient + ALPHAS[name] * torch.sign(before[name]))
    assert leaves["fc"].grad is not None
    assert torch.equal(leaves["fc"].grad[0], gradients["fc"][0])  # of a weight of 0
    assert leaves["frozen"].grad is None
    assert leaves["unused"].grad is None
    assert all(torch.equal(leaf, before[name]) for name, leaf in leaves.items())


def test_layers_of_two_types_have_each_their_own_signs():
    leaves = {"fc": nn.Parameter(torch.randn(3, 2)), "conv": nn.Parameter(torch.randn(3, 2).half())}
    for leaf in leaves.values():
        leaf.grad = torch.zeros_like(leaf)
    L1(leaves, ALPHAS).add_to_gradients()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, ALPHAS[name] * leaf.detach().sign())
