"""SI: the source's formulas, and what Avalanche's own plugin does instead on a CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from avalanche.benchmarks import tensors_benchmark
from avalanche.training.plugins import EvaluationPlugin, SynapticIntelligencePlugin
from avalanche.training.supervised import Naive
from torch import nn

from baselines.si import SIPlugin


def benchmark(tasks: int = 3, samples: int = 64) -> Any:
    generator = torch.Generator().manual_seed(0)
    data = []
    for _ in range(tasks):
        x = torch.randn(samples, 6, generator=generator)
        data.append((x, (x @ torch.randn(6, 3, generator=generator)).argmax(1)))
    return tensors_benchmark(train_tensors=data, test_tensors=data, task_labels=[0] * tasks)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def strategy(model: nn.Module, plugins: Any, lr: float = 0.05, adam: bool = False) -> Any:
    kind = torch.optim.Adam if adam else torch.optim.SGD
    return Naive(
        model=model,
        optimizer=kind(model.parameters(), lr=lr),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=16,
        train_epochs=3,
        plugins=plugins,
        evaluator=EvaluationPlugin(loggers=[]),
    )


def learn(model: nn.Module, plugins: Any, tasks: slice = slice(None), **options: Any) -> Any:
    learner = strategy(model, plugins, **options)
    for experience in benchmark().train_stream[tasks]:
        torch.manual_seed(int(experience.current_experience))
        learner.train(experience)
    return learner


def weights(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


class Squares(nn.Module):
    """Two parameters a, b: the outputs are (a - 1)^2 x and 3 b^2 x."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.0))
        self.b = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.a - 1).square() * x.sum() + 3 * self.b.square() * x.sum()


def squares(plugin: SIPlugin) -> tuple[Squares, Any, Any]:
    model = Squares()
    data = [(torch.ones(2, 1), torch.zeros(2, dtype=torch.long))] * 2
    learner = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=lambda output, _: output / 2,  # two samples
        train_mb_size=2,
        train_epochs=2,
        plugins=[plugin],
        evaluator=EvaluationPlugin(loggers=[]),
    )
    return model, learner, tensors_benchmark(data, data, task_labels=[0, 0]).train_stream


@pytest.mark.parametrize("strength", [0.25, 5.0])
def test_two_parameters_by_hand(strength: float) -> None:
    """Gradient descent on (a-1)^2 + 3 b^2 at rate 0.1, two steps, then two of a second task.

    a: 0 -> 0.2 -> 0.36 by gradients -2, -1.6; b: 1 -> 0.4 -> 0.16 by gradients 6, 2.4.
    omega: a 2*0.2 + 1.6*0.16 = 0.656; b 6*0.6 + 2.4*0.24 = 4.176.
    Omega with xi = 0.1: a 0.656 / (0.36^2 + 0.1); b 4.176 / (0.84^2 + 0.1).
    The second task's first step is free (theta = theta*), its second is pulled back. At strength
    5 so far back that its path raises the task's loss, which takes importance away.
    """
    model, learner, stream = squares(plugin := SIPlugin(strength, xi=0.1))
    learner.train(stream[0])
    omega_a, omega_b = 0.656 / (0.36**2 + 0.1), 4.176 / (0.84**2 + 0.1)
    torch.testing.assert_close(plugin.importance["a"], torch.tensor(omega_a))
    torch.testing.assert_close(plugin.importance["b"], torch.tensor(omega_b))

    learner.train(stream[1])
    a, b, path_a, path_b = 0.36, 0.16, 0.0, 0.0
    for _ in range(2):
        step_a = -0.1 * (2 * (a - 1) + 2 * strength * omega_a * (a - 0.36))
        step_b = -0.1 * (6 * b + 2 * strength * omega_b * (b - 0.16))
        path_a, path_b = path_a - 2 * (a - 1) * step_a, path_b - 6 * b * step_b
        a, b = a + step_a, b + step_b
    torch.testing.assert_close(model.a.detach(), torch.tensor(a))
    torch.testing.assert_close(model.b.detach(), torch.tensor(b))
    assert (path_a < 0, path_b < 0) == (strength == 5.0,) * 2
    both_a = omega_a + path_a / ((a - 0.36) ** 2 + 0.1)
    both_b = omega_b + path_b / ((b - 0.16) ** 2 + 0.1)
    torch.testing.assert_close(plugin.importance["a"], torch.tensor(both_a))
    torch.testing.assert_close(plugin.importance["b"], torch.tensor(both_b))


def test_importance_is_never_negative() -> None:
    _, learner, stream = squares(plugin := SIPlugin(strength=0.25, xi=0.1))
    (group,) = learner.optimizer.param_groups
    group["lr"] = 0.001
    learner.train(stream[0])
    assert min(plugin.importance.values()) > 0
    group.update(lr=0.1, maximize=True)  # uphill: the path takes more than there is
    learner.train(stream[1])
    assert plugin.importance == {"a": 0.0, "b": 0.0}


@pytest.mark.parametrize("adam", [False, True])
def test_equals_the_formula_written_with_autograd(adam: bool) -> None:
    strength, xi = 20.0, 0.01
    model = network()
    plugin = SIPlugin(strength, xi)
    learn(model, [plugin], adam=adam)

    other = network()
    kind = torch.optim.Adam if adam else torch.optim.SGD
    optimizer = kind(other.parameters(), lr=0.05)
    importance = torch.zeros_like(weights(other))
    lowered = 0
    for task, experience in enumerate(benchmark().train_stream):
        torch.manual_seed(task)
        start, path = weights(other), torch.zeros_like(importance)
        # The very batches that the strategy gets: a strategy that doesn't train hands them out.
        watch = Batches()
        strategy(copy.deepcopy(other), [watch], lr=0.0).train(experience)
        for x, y in watch.batches:
            task_loss = nn.functional.cross_entropy(other(x), y)
            gradient = torch.autograd.grad(task_loss, list(other.parameters()))
            flat = nn.utils.parameters_to_vector(gradient)
            now = nn.utils.parameters_to_vector(other.parameters())
            loss = nn.functional.cross_entropy(other(x), y)
            loss = loss + strength * (importance * (now - start).square()).sum()
            optimizer.zero_grad()
            loss.backward()
            before = weights(other)
            optimizer.step()
            path += -flat * (weights(other) - before)
        earned = path / ((weights(other) - start).square() + xi)
        lowered += int(((earned < 0) & (importance > 0)).sum())
        importance = torch.relu(importance + earned)
    assert lowered > 0
    ours = torch.cat([plugin.importance[n].flatten() for n, _ in model.named_parameters()])
    torch.testing.assert_close(ours, importance, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-3, atol=1e-4)


class Batches(SIPlugin):
    """Only keeps the batches that go by."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[torch.Tensor, torch.Tensor]] = []

    def before_training_iteration(self, strategy: Any, **_: Any) -> None:
        self.batches.append((strategy.mb_x.clone(), strategy.mb_y.clone()))


def test_stock_plugin_is_naive_on_a_cpu_and_ours_is_not() -> None:
    naive, stock, ours = network(), network(), network()
    learn(naive, [])
    learn(stock, [SynapticIntelligencePlugin(si_lambda=1e6)])
    learn(ours, [SIPlugin(strength=1.0)])
    assert torch.equal(weights(naive), weights(stock))
    assert not torch.equal(weights(naive), weights(ours))


def test_first_task_and_strength_0_are_naive_bit_for_bit() -> None:
    naive, ours = network(), network()
    learn(naive, [], slice(1), adam=True)
    learn(ours, [SIPlugin(strength=5.0)], slice(1), adam=True)
    assert torch.equal(weights(naive), weights(ours))
    naive, ours = network(), network()
    learn(naive, [])
    learn(ours, [SIPlugin(strength=0.0)])
    assert torch.equal(weights(naive), weights(ours))


def test_a_stronger_penalty_moves_weights_less() -> None:
    moved = []
    for strength in (0.0, 1.0, 5.0):
        model = network()
        plugin = SIPlugin(strength)
        learner = learn(model, [plugin], slice(1))
        before = weights(model)
        learner.train(benchmark().train_stream[1])
        moved.append(float((weights(model) - before).norm()))
    assert moved[0] > moved[1] > moved[2] > 0


def test_goes_on_bit_for_bit_from_its_state() -> None:
    whole = network()
    learn(whole, [SIPlugin(1.0)])

    first, plugin = network(), SIPlugin(1.0)
    learn(first, [plugin], slice(2))
    state, kept = copy.deepcopy(plugin.state_dict()), copy.deepcopy(first.state_dict())
    again, restored = network(), SIPlugin(1.0)
    again.load_state_dict(kept)
    restored.load_state_dict(state)
    learn(again, [restored], slice(2, None))
    assert torch.equal(weights(whole), weights(again))


def test_parameter_without_gradient_is_left_alone() -> None:
    model = network()
    model.spare = nn.Linear(2, 2)  # a head of another task, say
    before = model.spare.weight.detach().clone()
    model.forward = lambda x: model[2](model[1](model[0](x)))  # type: ignore[method-assign]
    plugin = SIPlugin(1.0)
    learn(model, [plugin])
    assert torch.equal(model.spare.weight, before)
    assert not plugin.importance["spare.weight"].any()
    assert plugin.importance["0.weight"].any()


def test_grown_parameter_keeps_its_importance_in_front() -> None:
    model, plugin = network(), SIPlugin(1.0)
    learn(model, [plugin], slice(1))
    old = plugin.importance["2.weight"].clone()
    head = nn.Linear(8, 5)
    with torch.no_grad():
        head.weight[:3] = model[2].weight
    model[2] = head
    learn(model, [plugin], slice(1, 2))
    grown = plugin.importance["2.weight"]
    assert grown.shape == (5, 8)
    assert bool((grown[:3] >= old).all())
    assert bool((grown[:3] > old).any())


@pytest.mark.parametrize("options", [{"strength": -1.0}, {"xi": 0.0}])
def test_bad_values_are_named(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        SIPlugin(**options)


def test_a_parameter_that_shrank_is_named() -> None:
    model = network()
    learner = learn(model, [SIPlugin(1.0)], slice(1))
    model[2] = nn.Linear(model[2].in_features, 2)
    with pytest.raises(ValueError, match=r"2\.weight had the shape"):
        learner.train(benchmark().train_stream[1], eval_streams=[])
