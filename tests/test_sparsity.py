"""The L1 term: exact gradients, whatever parts it works in, and one small buffer."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from clnp import one_pass, sparsity
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


@pytest.fixture
def in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its size, a network's L1 goes by the compiled loop alone."""
    if one_pass.compiler() is None or sys.platform == "darwin":  # Apple's has no OpenMP
        pytest.skip("no C++ compiler for it: L1 goes by torch's own operations")
    monkeypatch.setattr(sparsity, "ONE_PASS_FROM", 1)
    monkeypatch.setattr(torch, "sign", None)


@pytest.mark.parametrize("entries", [15, 16, 17, 1000, 100_003])
def test_one_pass_gives_the_bits_of_torchs_operations(entries: int, request: pytest.FixtureRequest):
    # Rows of a larger matrix: what comes before and after them must stay as it is.
    weights, gradients = torch.randn(entries + 40), torch.randn(entries + 40)
    weights[20:30] = torch.tensor([0.0, -0.0, 1e-30, -1e-30, torch.inf, -torch.inf] + 4 * [0.5])
    weights[30:32] = torch.tensor([0.0, 0.0])
    gradients[28:32] = torch.tensor([torch.nan, torch.inf, -0.0, 0.0])
    expected = gradients.clone()
    rows = slice(20, 20 + entries)
    expected[rows].add_(torch.sign(weights[rows]), alpha=1.7e-5)
    leaf = nn.Parameter(weights[rows].view(-1, 1))
    leaf.grad = gradients[rows].view(-1, 1)
    version = leaf.grad._version
    request.getfixturevalue("in_one_pass")
    L1({"fc": leaf}, {"fc": 1.7e-5}).add_to_gradients()
    assert torch.equal(gradients.view(torch.int32), expected.view(torch.int32))
    assert leaf.grad._version > version  # for autograd, as after any change


def test_one_pass_leaves_alone_what_isnt_numbers_at_an_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sparsity, "ONE_PASS_FROM", 1)
    leaf = nn.Parameter(torch.randn(30, 2))
    numbers = torch.randn(30, 2)
    leaf.grad = torch._neg_view(numbers)  # is the negative of what its memory holds
    expected = -numbers + 0.25 * leaf.detach().sign()
    L1({"fc": leaf}, ALPHAS).add_to_gradients()
    assert torch.equal(leaf.grad, expected)
    for odd in (FakeTensorMode(), torch.device("meta")):
        with odd:
            leaf = nn.Parameter(torch.randn(30, 2))
            leaf.grad = torch.randn(30, 2)
            L1({"fc": leaf}, ALPHAS).add_to_gradients()


def test_small_networks_wait_for_no_compiler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sparsity, "one_pass", None)
    L1(weights(), ALPHAS).add_to_gradients()


@pytest.mark.parametrize(
    ("compiler", "said"),
    [
        ("", "no C++ compiler (CXX, g++, clang++)"),
        (sys.executable, f"{sys.executable} fails: "),
        ("g++ '", "CXX is no command: g++ '"),
        (f"{sys.executable} -c pass", "l1.so"),  # ends well, and makes nothing
    ],
)
def test_without_a_compiler_torchs_operations_do_it(
    compiler: str, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sparsity, "one_pass", one_pass.one_pass.__wrapped__)
    monkeypatch.setattr(sparsity, "ONE_PASS_FROM", 1)
    caplog.set_level("INFO", "clnp.one_pass")
    leaf = nn.Parameter(torch.randn(3, 2))
    leaf.grad = torch.zeros_like(leaf)
    L1({"fc": leaf}, ALPHAS).add_to_gradients()
    assert torch.equal(leaf.grad, ALPHAS["fc"] * leaf.detach().sign())
    (message,) = caplog.messages
    assert message.startswith("L1 isn't compiled, which costs time only: ")
    assert said in message
