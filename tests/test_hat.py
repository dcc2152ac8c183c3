"""HAT: its equations by hand, what it withholds, and that learnt tasks stay bitwise the same."""

from __future__ import annotations

import math
from io import BytesIO
from itertools import pairwise
from typing import Any

import pytest
import torch
from avalanche.benchmarks import tensors_benchmark
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive
from torch import Tensor, nn

from baselines.hat import (
    EMBEDDING_LIMIT,
    HATPlugin,
    annealed,
    compensation,
    find_chain,
    gradient_factor,
    own_rate,
    prices,
)
from benchmarks.data import load
from benchmarks.errors import UserError
from benchmarks.learners import Learner, Setup
from benchmarks.methods import METHODS, HATSettings
from benchmarks.quickstart import Quickstart
from clnp import LogitDrift

# --- the equations --------------------------------------------------------------------------------


def test_annealing_goes_from_one_end_to_the_other_in_equal_steps() -> None:
    slopes = [annealed(step, 5, 400.0) for step in range(5)]
    assert slopes[0] == 1 / 400
    assert slopes[-1] == 400
    gaps = [b - a for a, b in pairwise(slopes)]
    assert gaps == pytest.approx([(400 - 1 / 400) / 4] * 4)
    assert annealed(0, 1, 400.0) == 400


def test_compensation_by_hand() -> None:
    """e = ln 2: cosh e = 5/4; s = 2: cosh 2e = 17/8; 8/2 · (25/8) / (9/4) = 50/9."""
    e = torch.tensor([math.log(2.0), -math.log(2.0), 0.0])
    expected = torch.tensor([50 / 9, 50 / 9, 4.0])
    torch.testing.assert_close(compensation(e, 2.0, 8.0), expected)


def test_compensated_gradient_is_that_of_a_gate_of_slope_one() -> None:
    """smax/s · (cosh(se) + 1) / (cosh e + 1) · s σ'(se) = smax σ'(e), whatever s."""
    e = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
    for s in (1 / 50, 1.0, 7.0):
        (slope,) = torch.autograd.grad(torch.sigmoid(s * e).sum(), e)
        got = slope * compensation(e.detach(), s, 50.0)
        (one,) = torch.autograd.grad(torch.sigmoid(e).sum(), e)
        torch.testing.assert_close(got, 50 * one)


def test_compensation_stays_finite() -> None:
    e = torch.tensor([EMBEDDING_LIMIT, -EMBEDDING_LIMIT])
    assert torch.isfinite(compensation(e, 400.0, 400.0)).all()


def test_regulariser_by_hand() -> None:
    """1 − a = 1, 0, 1/2 | 1/2; gates 1/2, 1, 1 | 1/4: R = (1/2 + 1/2 + 1/8) / 2."""
    price = prices([torch.tensor([0.0, 1.0, 0.5]), torch.tensor([0.5])])
    torch.testing.assert_close(price, torch.tensor([0.5, 0.0, 0.25, 0.25]))
    assert float(torch.tensor([0.5, 1.0, 1.0, 0.25]) @ price) == pytest.approx(1.125 / 2)
    # The first task pays for the mean of its gates; with nothing free, nobody pays.
    assert prices([torch.zeros(4)]).tolist() == [0.25] * 4
    assert prices([torch.ones(3), torch.ones(2)]).tolist() == [0.0] * 5


def test_gradient_factor_by_hand() -> None:
    units, read = torch.tensor([1.0, 0.25]), torch.tensor([0.5, 0.0])
    weight = torch.empty(2, 4)  # behind a flatten: two columns a unit
    expected = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.75, 0.75, 1.0, 1.0]])
    assert torch.equal(gradient_factor(units, read, weight), expected)
    first = gradient_factor(units, None, weight)
    assert torch.equal(first.expand(2, 4), torch.tensor([[0.0] * 4, [0.75] * 4]))
    kernels = gradient_factor(units, read, torch.empty(2, 2, 3, 3)).expand(2, 2, 3, 3)
    assert torch.equal(kernels[:, :, 2, 1], torch.tensor([[0.5, 1.0], [0.75, 1.0]]))


# --- networks and streams -------------------------------------------------------------------------


def mlp(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(12, 60, bias), nn.ReLU(), nn.Linear(60, 50, bias), nn.ReLU()),
        nn.Linear(50, 3, bias),
    )


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 16, 2, padding=1), nn.ReLU(), nn.MaxPool2d(2, stride=1)),
        *(nn.Conv2d(16, 20, 1), nn.LeakyReLU(), nn.Flatten(), nn.Linear(80, 40), nn.ReLU()),
        *(nn.Dropout(0.1), nn.Linear(40, 3)),
    )


def data(task: int, count: int = 120, shape: tuple[int, ...] = (12,)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(task)
    centres = torch.randn(3, 12, generator=generator)
    labels = torch.arange(count) % 3
    x = centres[labels] + 0.5 * torch.randn(count, 12, generator=generator)
    return x.view(-1, *shape), labels


def benchmark(tasks: int = 3, shape: tuple[int, ...] = (12,)) -> Any:
    tensors = [data(task, shape=shape) for task in range(tasks)]
    return tensors_benchmark(
        train_tensors=tensors, test_tensors=tensors, task_labels=list(range(tasks))
    )


def strategy(
    model: nn.Module,
    plugin: HATPlugin,
    optimizer: Any = torch.optim.Adam,
    watch: tuple[SupervisedPlugin, ...] = (),
    metrics: tuple[Any, ...] = (),
    epochs: int = 6,
    **options: Any,
) -> Any:
    return Naive(
        model=model,
        optimizer=optimizer(model.parameters(), **{"lr": 0.01, **options}),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=24,
        train_epochs=epochs,
        eval_mb_size=40,
        plugins=[plugin, *watch],
        evaluator=EvaluationPlugin(*metrics, loggers=[], collect_all=False),
    )


def learn(learner: Any, experience: Any) -> None:
    learner.train(experience, eval_streams=[], reset_optimizer_state=True)


class Logits(SupervisedPlugin):
    """Keep what the strategy predicts while it evaluates."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def after_eval_iteration(self, strategy: Any, **_: Any) -> None:
        self.kept.append(strategy.mb_output.detach().clone())


def logits(learner: Any, experience: Any) -> Tensor:
    keep = Logits()
    learner.plugins.append(keep)
    learner.eval([experience])
    learner.plugins.remove(keep)
    return torch.cat(keep.kept)


class Watch(SupervisedPlugin):
    """Note the gates and the largest gradient that the optimizer is given for guarded entries."""

    def __init__(self, plugin: HATPlugin) -> None:
        super().__init__()
        self.hat = plugin
        self.gates: list[list[Tensor]] = []
        self.guarded = 0.0
        self.free = 0.0
        self.embedded = 0.0

    def after_forward(self, strategy: Any, **_: Any) -> None:
        self.gates.append([gate.detach() for gate in self.hat._gates])

    def before_update(self, strategy: Any, **_: Any) -> None:
        for parameter, factor in zip(self.hat._guarded, self.hat._factors, strict=True):
            assert parameter.grad is not None
            size, closed = parameter.grad.abs(), factor.expand_as(parameter) == 0
            self.guarded = max(self.guarded, float((size * closed).max()))
            self.free = max(self.free, float((size * ~closed).max()))

    def after_training_iteration(self, strategy: Any, **_: Any) -> None:
        sizes = [e.detach().abs().max().item() for e in self.hat.embeddings]
        self.embedded = max(self.embedded, *sizes)


# --- what is learnt, and what stays ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "shape"), [(mlp, (12,)), (lambda: mlp(False), (12,)), (cnn, (3, 2, 2))]
)
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.Adam, {"fused": True}),
        (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9}),
        (torch.optim.RMSprop, {}),
    ],
)
def test_old_logits_stay_bitwise_and_withheld_gradients_are_zero(
    make: Any, shape: tuple[int, ...], optimizer: Any, options: dict[str, Any]
) -> None:
    stream = benchmark(shape=shape).train_stream
    model = make()
    plugin = HATPlugin(model, smax=20.0, lamb=0.1, dropout=(0.1, 0.1))
    watch, drift = Watch(plugin), LogitDrift(stream="train")
    learner = strategy(model, plugin, optimizer, (watch,), (drift,), 30, **options)
    kept: list[Tensor] = []
    for task, experience in enumerate(stream):
        learn(learner, experience)
        for old, expected in enumerate(kept):
            assert torch.equal(logits(learner, stream[old]), expected)
        kept.append(logits(learner, experience))
        right = float((kept[-1].argmax(1) == data(task)[1]).float().mean())
        assert right > 0.8
        for gate in plugin.tasks[task].gates:
            assert ((gate == 0) | (gate == 1)).all()
            assert gate.sum() > 0
    assert drift.drift() == {0: 0.0, 1: 0.0, 2: 0.0}
    assert watch.guarded == 0
    assert watch.free > 0
    assert watch.embedded <= EMBEDDING_LIMIT


def test_without_guards_old_logits_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the test above."""
    stream = benchmark(2).train_stream
    model = mlp()
    plugin = HATPlugin(model, smax=50.0)
    learner = strategy(model, plugin)
    learn(learner, stream[0])
    before = logits(learner, stream[0])
    monkeypatch.setattr("baselines.hat.gradient_factor", lambda units, read, w: torch.ones_like(w))
    learn(learner, stream[1])
    assert not torch.equal(logits(learner, stream[0]), before)


def test_soft_gates_drift_little_under_sgd() -> None:
    """As in the authors' code: gates at smax are all but binary, and so is what they withhold."""
    stream = benchmark().train_stream
    drifts = {}
    for smax in (3.0, 400.0):
        torch.manual_seed(0)
        model = mlp()
        plugin = HATPlugin(model, smax=smax, harden=False, lamb=0.1)
        drift = LogitDrift(stream="train")
        learner = strategy(model, plugin, torch.optim.SGD, metrics=(drift,), lr=0.1)
        for experience in stream:
            learn(learner, experience)
            learner.eval(stream)
        drifts[smax] = drift.result()
        undecided = torch.cat([g for t in plugin.tasks.values() for g in t.gates])
        if smax == 400.0:
            assert float(torch.minimum(undecided, 1 - undecided).mean()) < 0.01
    assert drifts[400.0] < 0.5
    assert drifts[400.0] < drifts[3.0]


def test_gates_are_annealed_in_each_epoch_and_binary_at_its_end() -> None:
    stream = benchmark(1).train_stream
    model = mlp()
    plugin = HATPlugin(model, smax=400.0)
    watch = Watch(plugin)
    learn(strategy(model, plugin, watch=(watch,)), stream[0])
    steps = 5
    assert len(watch.gates) == 6 * steps
    for start in range(0, 6 * steps, steps):
        first, last = (torch.cat(watch.gates[start + k]) for k in (0, steps - 1))
        assert (first - 0.5).abs().max() < EMBEDDING_LIMIT / 400 / 4 + 1e-6
        # Only an embedding within 0.02 of 0 has a gate further than 3e-4 from 0 or 1.
        assert (torch.minimum(last, 1 - last) < 3e-4).float().mean() > 0.9


def test_loss_holds_the_regulariser() -> None:
    stream = benchmark(2).train_stream
    model = mlp()
    plugin = HATPlugin(model, smax=50.0, lamb=1.5)
    seen: list[tuple[float, float]] = []

    class Loss(SupervisedPlugin):
        def before_backward(self, strategy: Any, **_: Any) -> None:
            task = strategy.criterion()
            free = [1 - a for a in plugin.cumulative()]
            spent = sum((g * f).sum() for g, f in zip(plugin._gates, free, strict=True))
            r = spent / sum(f.sum() for f in free)
            seen.append((strategy.loss.item(), (task + 1.5 * r).item()))

    learner = strategy(model, plugin, watch=(Loss(),))
    for experience in stream:
        learn(learner, experience)
    assert len(seen) == 60
    assert [a for a, _ in seen] == pytest.approx([b for _, b in seen], rel=1e-5)


def test_a_larger_lambda_opens_fewer_units() -> None:
    used = []
    for lamb in (0.0, 5.0):
        torch.manual_seed(0)
        model = mlp()
        plugin = HATPlugin(model, smax=20.0, lamb=lamb)
        learner = strategy(model, plugin, lr=0.05)
        learn(learner, benchmark(1).train_stream[0])
        used.append(sum(row["used"] for row in plugin.capacity()))
    assert used[1] < used[0]


def test_gradients_are_clipped_together() -> None:
    model = mlp()
    norms: list[float] = []

    class Norm(SupervisedPlugin):
        def before_update(self, strategy: Any, **_: Any) -> None:
            grads = [p.grad for p in strategy.model.parameters()]
            norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))

    learner = strategy(model, HATPlugin(model, clip=0.25), watch=(Norm(),))
    learn(learner, benchmark(1).train_stream[0])
    assert max(norms) == pytest.approx(0.25, rel=1e-3)


def test_capacity_counts_units_by_hand() -> None:
    plugin = HATPlugin(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)))
    head = plugin._head_copy()
    state = [
        {"experience": 0, "gates": [torch.tensor([1.0, 1.0, 0.0, 0.0])], "head": head},
        {"experience": 1, "gates": [torch.tensor([0.0, 1.0, 1.0, 0.0])], "head": head},
    ]
    plugin.load_state_dict({"tasks": state})
    assert plugin.cumulative()[0].tolist() == [1.0, 1.0, 1.0, 0.0]
    first, second = plugin.capacity()
    assert first == {
        **{"task": 0, "layer": "0", "used": 2, "new": 2, "reused": 0, "free": 2},
        "used_fraction": 0.5,
    }
    assert second == {
        **{"task": 1, "layer": "0", "used": 3, "new": 1, "reused": 1, "free": 1},
        "used_fraction": 0.75,
    }


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.Linear(2, 2), "is a Linear"),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 2)), "of 1 "),
        (nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)), "of 1 "),
        (nn.Sequential(nn.Conv2d(2, 2, 1, groups=2), nn.Flatten(), nn.Linear(2, 2)), "of 0 "),
        (nn.Sequential(nn.Conv2d(2, 2, 1), nn.Flatten(2), nn.Linear(2, 2)), "of 1 "),
        (nn.Sequential(nn.Sequential(nn.Bilinear(2, 2, 2)), nn.Linear(2, 2)), "of 0.0 "),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "nn.Linear last"),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Conv1d(2, 2, 1)), "nn.Linear last"),
        (nn.Sequential(nn.Linear(2, 2)), "a hidden layer"),
        (nn.Sequential(), "a hidden layer"),
        (nn.Sequential(nn.Conv1d(2, 4, 1), nn.Flatten(), nn.Linear(10, 2)), "2 reads 10 values"),
    ],
)
def test_what_is_no_chain_is_refused_by_name(model: nn.Module, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        find_chain(model)


@pytest.mark.parametrize(
    "values", [{"smax": 1.0}, {"lamb": -1.0}, {"clip": 0.0}, {"dropout": (0.0, 1.0)}]
)
def test_values_out_of_range_are_named(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        HATPlugin(mlp(), **values)


def test_what_would_move_old_weights_is_refused() -> None:
    stream = benchmark(2).train_stream
    model = mlp()
    learner = strategy(model, HATPlugin(model), torch.optim.AdamW)
    learn(learner, stream[0])
    with pytest.raises(ValueError, match="weight_decay=0"):
        learn(learner, stream[1])
    model = mlp()
    learner = strategy(model, HATPlugin(model))
    learn(learner, stream[0])
    with pytest.raises(ValueError, match="reset_optimizer_state=True"):
        learner.train(stream[1], eval_streams=[])


def test_an_experience_is_learnt_once() -> None:
    stream = benchmark(1).train_stream
    model = mlp()
    learner = strategy(model, HATPlugin(model))
    learn(learner, stream[0])
    with pytest.raises(ValueError, match="experience 0 already"):
        learn(learner, stream[0])


@pytest.mark.parametrize(
    "values",
    [
        *({"smax": 1.0}, {"lamb": -0.1}, {"embedding_lr": 0.0}, {"harden": False}),
        *({"reset_optimizer": False}, {"clip": -1.0}, {"dropout": 1.0}, {"input_dropout": -0.1}),
    ],
)
def test_impossible_settings_are_named(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(values))):
        HATSettings(**values)


@pytest.mark.parametrize("frozen", [["0.weight"], ["0.weight", "0.bias", "2.weight", "2.bias"]])
def test_what_the_user_has_frozen_stays_and_the_rest_learns(frozen: list[str]) -> None:
    torch.manual_seed(0)
    model, stream = mlp(), benchmark(2).train_stream
    values = dict(model.named_parameters())
    for name in frozen:
        values[name].requires_grad_(False)
    before = {name: value.detach().clone() for name, value in values.items()}
    learner = strategy(model, HATPlugin(model))
    for experience in stream:
        learn(learner, experience)
    moved = {name for name, value in values.items() if not torch.equal(value, before[name])}
    assert moved == set(values) - set(frozen)


# --- in the harness -------------------------------------------------------------------------------

DIGITS = Quickstart(tasks=3, epochs=12, method_epochs=False, hidden=(150, 150))


def built(
    method: str = "hat", experiment: Quickstart = DIGITS, plugins: Any = (), **arguments: Any
) -> tuple[Learner, Any, LogitDrift]:
    scenario = experiment.scenario(load("digits"), 100)
    drift = LogitDrift(stream="valid")
    evaluator = EvaluationPlugin(drift, loggers=[], collect_all=False)
    setup = Setup(experiment, scenario, 100, torch.device("cpu"), evaluator, plugins)
    learner = METHODS[method].build(setup, METHODS[method].settings_for(experiment))
    return learner, scenario, drift


def taught(learner: Learner, scenario: Any, tasks: range) -> Learner:
    for task in tasks:
        torch.manual_seed(task)  # of dropout, as in a cell
        learner.train(scenario.streams["train"][task])
    return learner


def accuracies(learner: Learner, scenario: Any) -> list[float]:
    found = []
    for experience in scenario.streams["valid"]:
        labels = torch.tensor(list(experience.dataset.targets))
        right = logits(learner.strategy, experience).argmax(1) == labels
        found.append(float(right.float().mean()))
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_digits_are_not_forgotten(precision: Any) -> None:
    experiment = Quickstart(
        tasks=3, epochs=12, method_epochs=False, hidden=(150, 150), precision=precision
    )
    learner, scenario, drift = built(experiment=experiment)
    for task in range(3):
        taught(learner, scenario, range(task, task + 1))
        learner.strategy.eval(scenario.streams["valid"][: task + 1])
    assert drift.drift() == {0: 0.0, 1: 0.0, 2: 0.0}
    ours = accuracies(learner, scenario)
    assert min(ours) > 0.9
    naive, scenario, _ = built("finetune", experiment=experiment)
    forgetting = accuracies(taught(naive, scenario, range(3)), scenario)
    assert ours[0] - forgetting[0] > 0.2


def test_a_resumed_learner_is_bitwise_an_uninterrupted_one() -> None:
    changes = ("hat.dropout=0.1", "hat.clip=10000", "hat.embedding_lr=0.02")
    experiment = Quickstart(
        tasks=3, epochs=3, method_epochs=False, hidden=(40, 40), settings=changes
    )
    whole, scenario, _ = built(experiment=experiment)
    taught(whole, scenario, range(2))
    buffer = BytesIO()
    torch.save(whole.state(), buffer)
    taught(whole, scenario, range(2, 3))
    buffer.seek(0)
    resumed, scenario, _ = built(experiment=experiment)
    resumed.restore(torch.load(buffer, weights_only=True))
    taught(resumed, scenario, range(2, 3))
    state, other = whole.strategy.model.state_dict(), resumed.strategy.model.state_dict()
    assert all(torch.equal(state[name], other[name]) for name in state)
    for experience in scenario.streams["valid"]:
        assert torch.equal(logits(whole.strategy, experience), logits(resumed.strategy, experience))
    assert whole.capacity() == resumed.capacity()
    assert whole.parameters() == resumed.parameters()


def test_stored_numbers_are_the_network_gates_and_heads() -> None:
    experiment = Quickstart(tasks=2, epochs=1, method_epochs=False, hidden=(40, 30))
    learner, scenario, _ = built(experiment=experiment)
    taught(learner, scenario, range(2))
    network = 64 * 40 + 40 + 40 * 30 + 30 + 30 * 10 + 10
    assert learner.parameters() == {
        "trainable": network + 70,
        "stored": network + 70 + 2 * (70 + 30 * 10 + 10),
    }


def test_evaluations_between_epochs_change_nothing() -> None:
    experiment = Quickstart(tasks=2, epochs=3, method_epochs=False, hidden=(40, 40))

    ends = []
    for every in (-1, 1):
        scenario = experiment.scenario(load("digits"), 100)
        evaluator = EvaluationPlugin(loggers=[], collect_all=False)
        setup = Setup(experiment, scenario, 100, torch.device("cpu"), evaluator)
        model = setup.model()
        plugin = HATPlugin(model, smax=50.0)
        learner = setup.strategy(HATSettings(), [plugin], model=model, eval_every=every)
        for experience in scenario.streams["train"]:
            learner.train(
                experience, eval_streams=[scenario.streams["valid"]], reset_optimizer_state=True
            )
        ends.append((model.state_dict(), plugin.tasks))
    (plain, tasks), (watched, others) = ends
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert all(torch.equal(tasks[1].gates[k], others[1].gates[k]) for k in range(2))


def test_embeddings_have_their_own_rate() -> None:
    learner, _, _ = built(experiment=Quickstart(settings=("hat.embedding_lr=0.02",)))
    weights, embeddings = learner.strategy.optimizer.param_groups
    assert embeddings["lr"] == 0.02
    assert [id(p) for p in embeddings["params"]] == [id(e) for e in learner.plugin.embeddings]
    held = {id(p) for p in weights["params"] + embeddings["params"]}
    assert held == {id(p) for p in learner.strategy.model.parameters()}


def test_own_rate_leaves_other_parameters_where_they_are() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([a, b], lr=0.1)
    own_rate(optimizer, [b], 0.5)
    assert [(g["lr"], [id(p) for p in g["params"]]) for g in optimizer.param_groups] == [
        (0.1, [id(a)]),
        (0.5, [id(b)]),
    ]
