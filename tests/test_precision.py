"""bfloat16 by float32 kernels: the same arithmetic as torch's own autocast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from torch import Tensor, nn

from benchmarks import precision
from benchmarks.cell import environment
from benchmarks.data import Images
from benchmarks.precision import Float32Kernels, bf16, has_fast_bf16
from benchmarks.scenarios import ResidentData, permuted
from clnp import CLNPPlugin

CPU = torch.device("cpu")


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU seem to have no fast bfloat16."""
    monkeypatch.setattr(precision, "has_fast_bf16", lambda _device: False)


def mlp() -> tuple[nn.Sequential, Tensor]:
    network = nn.Sequential(
        nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 5)
    )
    return network, torch.randn(40, 20)


def convnet() -> tuple[nn.Sequential, Tensor]:
    """One image, and places that don't overlap: torch's slow kernels sum over both in bfloat16."""
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 10, 2, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(40, 5),
    )
    return network, torch.randn(1, 3, 8, 8)


class RoundsNoOperand(Float32Kernels):
    """A negative control: only results are rounded."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func not in precision.PRODUCTS:
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            plain = [a.float() if isinstance(a, Tensor) else a for a in args]
            return func(*plain, **(kwargs or {})).bfloat16()


def trained(
    make: Callable[[], tuple[nn.Sequential, Tensor]], kernels: Any
) -> tuple[list[Tensor], list[torch.dtype]]:
    """Return logits and gradients under autocast with the given kernels, and each layer's type."""
    torch.manual_seed(0)
    network, x = make()
    types: list[torch.dtype] = []
    for layer in network:
        layer.register_forward_hook(lambda _layer, _x, y: types.append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16), kernels:
        logits = network(x)
    F.cross_entropy(logits.float(), torch.arange(len(x)) % 5).backward()
    return [logits, *(p.grad for p in network.parameters() if p.grad is not None)], types


def unequal(ours: list[Tensor], theirs: list[Tensor]) -> list[float]:
    return [float((a != b).float().mean()) for a, b in zip(ours, theirs, strict=True)]


@pytest.mark.parametrize("make", [mlp, convnet])
def test_the_same_as_torchs_own_autocast(make: Callable[[], tuple[nn.Sequential, Tensor]]):
    native, native_types = trained(make, nullcontext())
    ours, types = trained(make, Float32Kernels())
    assert types == native_types == [torch.bfloat16] * len(types)
    # Another order of the sums changes a rounded result once in thousands of times.
    assert max(unequal(ours, native)) <= 0.01
    forgotten, _ = trained(make, RoundsNoOperand())
    assert min(unequal(forgotten, native)) > 0.1


A, B = 1 + 2**-9, 3 + 2**-7
"""In bfloat16 these are 1 and 3; without that, a sum of four products or more is not what it is."""


@pytest.mark.parametrize(
    ("product", "shapes"),
    [
        (F.linear, ((2, 4), (3, 4))),
        (F.conv1d, ((2, 4, 5), (3, 4, 2))),
        (F.conv2d, ((2, 4, 5, 5), (3, 4, 2, 2))),
        (F.conv3d, ((1, 2, 3, 3, 3), (2, 2, 2, 2, 2))),
        (torch.matmul, ((2, 4), (4, 3))),
        (Tensor.matmul, ((2, 4), (4, 3))),
        (lambda a, b: a @ b, ((2, 4), (4, 3))),
        (torch.mm, ((2, 4), (4, 3))),
        (torch.bmm, ((2, 2, 4), (2, 4, 3))),
        (lambda a, b: torch.addmm(torch.ones(3), a, b) - 1, ((2, 4), (4, 3))),
    ],
)
def test_operands_are_rounded(
    product: Callable[..., Tensor], shapes: tuple[tuple[int, ...], tuple[int, ...]], emulated: None
):
    a, b = torch.full(shapes[0], A), torch.full(shapes[1], B)
    exact = product(a, b)
    with bf16(CPU):
        result = product(a, b)
    assert result.dtype == torch.bfloat16
    terms = int((exact / (A * B)).round().flatten()[0])
    assert torch.equal(result.float(), torch.full(exact.shape, 3.0 * terms))


def test_results_and_gradients_are_rounded(emulated: None):
    x = torch.tensor([[1.0], [2**-9]], requires_grad=True)
    weight = torch.tensor([[1.0], [2**-9]], requires_grad=True)
    with bf16(CPU):
        assert F.linear(torch.ones(1, 2), weight.T).item() == 1.0  # not 1 + 2**-9
        y = F.linear(x, weight)
    y.float().sum().backward()
    for operand in (x, weight):
        assert operand.grad is not None
        assert operand.grad.dtype == torch.float32
        assert operand.grad.tolist() == [[1.0], [1.0]]  # not 1 + 2**-9


def test_what_autocast_leaves_alone_is_left_alone(emulated: None):
    with bf16(CPU):
        assert torch.matmul(torch.ones(2, 2, dtype=torch.float64), torch.eye(2).double()).dtype == (
            torch.float64
        )
        whole = torch.arange(4).reshape(2, 2)
        assert torch.equal(whole @ whole, torch.tensor([[2, 3], [6, 11]]))
    assert F.linear(torch.ones(1, 1), torch.ones(1, 1)).dtype == torch.float32


@pytest.mark.parametrize("own", [True, False])
def test_gpus_that_emulate_take_float32_kernels(own: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device", lambda _device: nullcontext())
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or own
    )
    assert has_fast_bf16.__wrapped__(torch.device("cuda")) is own


@pytest.mark.parametrize(
    ("machine", "taken", "instructions", "fast"),
    [
        ("x86_64", True, {"avx512_bf16": True, "amx_tile": True}, True),
        ("x86_64", True, {"avx512_bf16": True, "amx_tile": False}, True),  # Zen 4
        ("AMD64", True, {"avx512_bf16": False, "amx_tile": True}, True),
        ("x86_64", True, {"avx512_bf16": False, "amx_tile": False}, False),  # AVX512 alone
        ("AMD64", False, {"avx512_bf16": False, "amx_tile": False}, False),
        ("x86_64", True, {}, True),  # an old torch, which can't say
        ("x86_64", False, {}, False),
        ("aarch64", True, {"avx512_bf16": False, "amx_tile": False}, True),
        ("aarch64", False, {"avx512_bf16": False, "amx_tile": False}, False),
    ],
)
def test_cpus_without_instructions_take_float32_kernels(
    machine: str,
    taken: bool,
    instructions: dict[str, bool],
    fast: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    """OneDNN's bf16 kernels run on AVX512 alone too, slower than those for float32."""
    monkeypatch.setattr(precision.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: taken)
    for name in precision.INSTRUCTIONS:
        monkeypatch.delattr(torch.cpu, name, raising=False)
    for name, has in instructions.items():
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda has=has: has, raising=False)
    assert has_fast_bf16.__wrapped__(CPU) is fast


def test_devices_with_kernels_of_their_own_keep_them(monkeypatch: pytest.MonkeyPatch):
    assert has_fast_bf16(torch.device("mps"))
    calls = []
    monkeypatch.setattr(Float32Kernels, "__enter__", lambda _mode: calls.append("entered"))
    monkeypatch.setattr(precision, "has_fast_bf16", lambda _device: True)
    with bf16(CPU):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
    assert calls == []


@pytest.mark.parametrize(("fast", "name"), [(True, "native"), (False, "fp32 kernels")])
def test_a_record_says_which_kernels_ran(fast: bool, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(precision, "has_fast_bf16", lambda _device: fast)
    assert environment(CPU)["bf16"] == name


def test_nothing_is_forgotten(emulated: None):
    """CLNP's promise, bit by bit, when its views compute by float32 kernels."""
    x = torch.randint(0, 256, (80, 3, 4), dtype=torch.uint8)
    y = x.flatten(1).argmax(1) % 3
    images = Images("made", x[:60], y[:60], x[60:], y[60:], "", 3)
    scenario = permuted(images, tasks=3, seed=0, validation=10)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 3))
    drawn = model[0].weight.detach().clone()
    plugin = CLNPPlugin(margin=0.05, l1=1e-3, valid_stream=scenario.streams["valid"])
    types: set[torch.dtype] = set()
    model[1].register_forward_hook(lambda _layer, _x, y: types.add(y.dtype))
    resident = type("Resident", (ResidentData, Naive), {})
    learner = resident(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01, fused=True),
        train_mb_size=16,
        train_epochs=3,
        device=CPU,
        plugins=[plugin],
        evaluator=EvaluationPlugin(loggers=[]),
        precision="bf16",
    )
    probe = torch.rand(20, 12)
    kept: list[Tensor] = []
    for task, experience in enumerate(scenario.train_stream):
        learner.train(experience)
        with bf16(CPU):
            logits = [plugin.subnetwork(t)(probe) for t in range(task + 1)]
        assert all(torch.equal(now, old) for now, old in zip(logits, kept, strict=False))
        kept = logits
    assert torch.bfloat16 in types  # in float32 the network is proved
    assert all(logits.dtype == torch.bfloat16 and logits.std() > 0 for logits in kept)
    assert not torch.equal(model[0].weight, drawn)
