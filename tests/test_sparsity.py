"""The L1 term: exact gradients, whatever parts it works in, and one small buffer."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from clnp import sparsity
from clnp.sparsity import L1

COMPILER = any(shutil.which(name) for name in ("g++", "clang++"))

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


@pytest.mark.parametrize("one_pass_from", [1, 2**20])
@pytest.mark.parametrize("part", [1, 12, 30, 2**19])
def test_alpha_times_the_sign_is_added_whatever_the_parts(
    part: int, one_pass_from: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sparsity, "CPU_PART", part)
    monkeypatch.setattr(sparsity, "ONE_PASS_FROM", one_pass_from)
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


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler: L1 goes by torch's own operations")
@pytest.mark.parametrize("entries", [1, 15, 16, 17, 1000, 100_003])
def test_one_pass_gives_the_bits_of_torchs_operations(
    entries: int, monkeypatch: pytest.MonkeyPatch
):
    # Rows of a larger matrix: what comes before and after them must stay as it is.
    matrix, gradients = torch.randn(entries + 40), torch.randn(entries + 40)
    matrix[20:25] = torch.tensor([0.0, -0.0, 1e-30, -1e-30, torch.inf])
    expected = gradients.clone()
    rows = slice(20, 20 + entries)
    expected[rows].add_(torch.sign(matrix[rows]), alpha=1.7e-5)
    leaf = nn.Parameter(matrix[rows].view(-1, 1))
    leaf.grad = gradients[rows].view(-1, 1)
    # By nothing else than the compiled loop.
    monkeypatch.setattr(sparsity, "ONE_PASS_FROM", 1)
    monkeypatch.setattr(torch, "sign", None)
    L1({"fc": leaf}, {"fc": 1.7e-5}).add_to_gradients()
    assert torch.equal(gradients, expected)


def test_small_networks_wait_for_no_compiler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sparsity, "one_pass", None)
    L1(weights(), ALPHAS).add_to_gradients()


def test_without_a_compiler_torchs_operations_do_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def missing(*_: object, **__: object) -> None:
        raise RuntimeError("No working C++ compiler found\nand much more")

    codecache = pytest.importorskip("torch._inductor.codecache")
    monkeypatch.setattr(codecache.CppCodeCache, "load", missing)
    monkeypatch.setattr(sparsity, "one_pass", sparsity.one_pass.__wrapped__)
    monkeypatch.setattr(sparsity, "ONE_PASS_FROM", 1)
    caplog.set_level("INFO", "clnp.sparsity")
    leaf = nn.Parameter(torch.randn(3, 2))
    leaf.grad = torch.zeros_like(leaf)
    L1({"fc": leaf}, ALPHAS).add_to_gradients()
    assert torch.equal(leaf.grad, ALPHAS["fc"] * leaf.detach().sign())
    assert caplog.messages == [
        "L1 isn't compiled, which costs time only: No working C++ compiler found"
    ]
