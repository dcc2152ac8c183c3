"""EWC: the Fisher information against torch.func, the penalty against its definition."""

from __future__ import annotations

import copy
import math
from io import BytesIO
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from avalanche.benchmarks import tensors_benchmark
from avalanche.models import IncrementalClassifier, MultiHeadClassifier, MultiTaskModule
from avalanche.models.dynamic_modules import avalanche_model_adaptation
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.plugins import EWCPlugin as StockEWC
from avalanche.training.supervised import Naive
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from baselines import ewc as ewc_module
from baselines import fisher as fisher_module
from baselines.ewc import EWCPlugin
from baselines.fisher import Kind, diagonal_fisher
from benchmarks.data import load
from benchmarks.learners import Setup
from benchmarks.methods import METHODS
from benchmarks.quickstart import Quickstart

# --- the Fisher information -----------------------------------------------------------------------


def batches(x: Tensor, y: Tensor, size: int = 4, task: int = 0) -> list[tuple[Tensor, ...]]:
    return list(
        zip(x.split(size), y.split(size), torch.full_like(y, task).split(size), strict=True)
    )


def oracle(model: nn.Module, x: Tensor, y: Tensor, kind: Kind) -> dict[str, Tensor]:
    """The definition, sample by sample: torch.func differentiates every log-probability."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    model.eval()

    def log_probabilities(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, values, (sample.unsqueeze(0),)).log_softmax(1).squeeze(0)

    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for sample, label in zip(x, y, strict=True):
        p = log_probabilities(parameters, sample).exp()
        weights = p if kind == "exact" else F.one_hot(label, len(p)).to(p)
        for name, slope in jacrev(log_probabilities)(parameters, sample).items():
            total[name] += torch.tensordot(weights, slope.square(), 1) / len(x)
    return total


class Positions(nn.Module):
    """A linear layer at several positions of a sample, and one that takes them as samples."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.flat = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.each(x.flatten(2)).relu()
        return self.flat(out.flatten(0, 1)).unflatten(0, out.shape[:2]).mean(1)


class Tied(nn.Module):
    """A layer used twice, and a weight that a function uses beside its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.also, self.scale = nn.Linear(16, 16), nn.Linear(16, 6), nn.Linear(6, 3)
        self.free = nn.Parameter(torch.ones(3))
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.twice(self.twice(x.flatten(1)).tanh()).tanh()
        hidden = self.also(out).tanh() + F.linear(out.square(), self.also.weight)
        return self.scale(hidden) * self.free


def linear() -> nn.Module:
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(inplace=True), nn.Dropout(0.5)),
        nn.Linear(8, 3, bias=False),
    )


def convolutional() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(4, 6, 2, padding=1, stride=(1, 2)), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
        nn.Conv2d(6, 4, (2, 1), groups=2, padding="same", padding_mode="circular", dilation=2),
        *(nn.Tanh(), nn.Flatten(2), nn.Conv1d(4, 3, 3, bias=False), nn.ReLU(inplace=True)),
        *(nn.Flatten(), nn.LazyLinear(3)),
    )


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("make", [linear, convolutional, Positions, Tied])
@pytest.mark.parametrize("budget", [1, 2**24])
def test_fisher_is_that_of_torch_func(
    make: Any, kind: Kind, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fisher_module, "BUDGET", budget)
    model = make().double()
    x, y = torch.randn(10, 4, 2, 2).double(), torch.arange(10) % 3
    model(x)  # moves the running statistics of batch norm off their start
    # .train() of the oracle's model stays False.
    expected = oracle(copy.deepcopy(model), x, y, kind)
    model.train()
    got = diagonal_fisher(model, batches(x, y), kind)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-15, msg=name)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_layers_of_the_experiments_need_no_differentiation_of_single_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fisher_module, "_add_vmapped", None)
    x, y = torch.randn(10, 4, 2, 2), torch.arange(10) % 3
    diagonal_fisher(linear(), batches(x, y))
    diagonal_fisher(nn.Sequential(nn.Conv2d(4, 3, 2), nn.Flatten()), batches(x, y))


def test_fisher_by_hand() -> None:
    """Logits 2a and 2b: p(0) = sigmoid(2 (a − b)), d log p(0) / da = 2 (1 − p(0))."""
    model = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5 * math.log(3.0)], [0.0]]))
    x, y = torch.tensor([[2.0]]), torch.tensor([1])  # p = 3/4, 1/4
    exact = diagonal_fisher(model, batches(x, y), "exact")["weight"]
    # 3/4 (2 · 1/4)² + 1/4 (2 · 3/4)² = 3/4, for both
    torch.testing.assert_close(exact, torch.tensor([[0.75], [0.75]]))
    empirical = diagonal_fisher(model, batches(x, y), "empirical")["weight"]
    torch.testing.assert_close(empirical, torch.tensor([[2.25], [2.25]]))  # (2 · 3/4)²


def test_confident_and_masked_classes_leave_no_nan() -> None:
    model = nn.Linear(1, 3)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([200.0, 0.0, float("-inf")]))
    got = diagonal_fisher(model, batches(torch.ones(2, 1), torch.tensor([0, 0])))
    assert all(torch.equal(value, torch.zeros_like(value)) for value in got.values())


def test_frozen_parameters_are_left_out() -> None:
    model = linear()
    model[1].weight.requires_grad_(False)
    got = diagonal_fisher(model, batches(torch.randn(4, 16), torch.arange(4) % 3))
    assert set(got) == {"1.bias", "4.weight"}


@pytest.mark.parametrize(
    ("model", "count", "says"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), 0, "No samples"),
        (nn.Linear(2, 3), 4, r"outputs \(4, 4, 2, 3\) for 4 samples"),
        (
            nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten()),
            4,
            "0 is batch norm",
        ),
        (nn.Sequential(nn.Flatten(1, 2), nn.GRU(2, 3)), 4, r"1 is a GRU: .*\(nn.GRUCell\)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Hardtanh(9.0, 9.1)), 4, None),
    ],
)
def test_what_has_no_fisher_information_is_named(
    model: nn.Module, count: int, says: str | None
) -> None:
    data = batches(torch.randn(count, 4, 2, 2), torch.zeros(count, dtype=torch.int64))[:count]
    if says is None:  # gradients that are 0 are no error
        assert not any(value.any() for value in diagonal_fisher(model, data).values())
        return
    with pytest.raises(ValueError, match=says):
        diagonal_fisher(model, data)


def test_what_has_none_is_refused_before_it_trains() -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, track_running_stats=False))
    learner = strategy(model, EWCPlugin(1.0))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="1 is batch norm"):
        learner.train(stream()[0], eval_streams=[])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_layer_may_be_called_by_keyword() -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.layer(input=x.flatten(1))
            return logits

    torch.manual_seed(0)
    named = ByName()
    plain = nn.Sequential(nn.Flatten(), named.layer)
    x, y = torch.randn(4, 16), torch.arange(4) % 3
    got, expected = (diagonal_fisher(m, batches(x, y)) for m in (named, plain))
    assert torch.equal(got["layer.weight"], expected["1.weight"])
    assert got["layer.weight"].any()


def test_outputs_without_a_graph_are_named() -> None:
    class Cut(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    with pytest.raises(ValueError, match="No parameter"):
        diagonal_fisher(Cut(2, 3), batches(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64)))


# --- the plugin -----------------------------------------------------------------------------------


def data(task: int, count: int = 60, classes: int = 3) -> tuple[Tensor, Tensor]:
    places = 2 * torch.randn(classes, 5, generator=torch.Generator().manual_seed(task))
    noise = torch.randn(count, 5, generator=torch.Generator().manual_seed(99 + task))
    labels = torch.arange(count) % classes
    return places[labels] + noise, labels


def stream(tasks: int = 3, labels: list[int] | None = None) -> Any:
    train = [data(task) for task in range(tasks)]
    return tensors_benchmark(
        train_tensors=train, test_tensors=train, task_labels=labels or [0] * tasks
    ).train_stream


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Dropout(0.2), nn.Linear(7, 3))


def strategy(
    model: nn.Module,
    *plugins: Any,
    optimizer: type = torch.optim.SGD,
    lr: float = 0.05,
    **more: Any,
) -> Any:
    options = {"train_mb_size": 20, "train_epochs": 3, "eval_mb_size": 30, **more}
    return Naive(
        model=model,
        optimizer=optimizer(model.parameters(), lr=lr),
        criterion=nn.CrossEntropyLoss(),
        plugins=list(plugins),
        evaluator=EvaluationPlugin(loggers=[]),
        **options,
    )


class Watch(SupervisedPlugin):
    """Note each task's Fisher information and parameters, and each step's penalty gradient."""

    def __init__(self, kind: Kind = "exact") -> None:
        super().__init__()
        self.kind = kind
        self.tasks: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
        self.expected: list[dict[str, Tensor]] = []
        self.got: list[dict[str, Tensor]] = []
        self.losses: list[Tensor] = []
        self.naive: Any = None

    def after_backward(self, strategy: Any, **_: Any) -> None:
        self.before = {n: p.grad.clone() for n, p in strategy.model.named_parameters()}
        values = dict(strategy.model.named_parameters())
        self.losses.append(strategy.loss.detach() - strategy.criterion().detach())
        if self.tasks:
            gradients = torch.autograd.grad(self.naive(self.tasks, values), list(values.values()))
            self.expected.append(dict(zip(values, gradients, strict=True)))

    def after_update(self, strategy: Any, **_: Any) -> None:
        if self.tasks:
            parameters = strategy.model.named_parameters()
            self.got.append({n: p.grad - self.before[n] for n, p in parameters})

    def after_training_exp(self, strategy: Any, **_: Any) -> None:
        x, y = data(len(self.tasks))
        fisher = oracle(copy.deepcopy(strategy.model), x.double(), y, self.kind)
        self.tasks.append(
            (fisher, {n: p.detach().clone() for n, p in strategy.model.named_parameters()})
        )


def check_gradients(plugin: EWCPlugin, watch: Watch) -> None:
    learner = strategy(network().double(), plugin, watch)
    for experience in double(stream()):
        learner.train(experience, eval_streams=[])
    assert len(watch.got) == 2 * 9
    for got, expected in zip(watch.got, watch.expected, strict=True):
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-10)
    assert max(value.abs().max() for value in watch.expected[-1].values()) > 0.01
    assert not any(watch.losses)  # the strategy's loss is the task's own


def double(experiences: Any) -> Any:
    train = [(x.double(), y) for x, y in map(data, range(len(experiences)))]
    return tensors_benchmark(
        train_tensors=train, test_tensors=train, task_labels=[0] * len(train)
    ).train_stream


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_summed_penalty_is_the_sum_over_tasks(kind: Kind) -> None:
    watch = Watch(kind)
    watch.naive = lambda tasks, values: sum(
        5.0 / 2 * (fisher[name] * (values[name] - star[name]) ** 2).sum()
        for fisher, star in tasks
        for name in values
    )
    check_gradients(EWCPlugin(5.0, fisher=kind), watch)


def test_online_penalty_decays_and_stands_on_the_last_task() -> None:
    def naive(tasks: Any, values: dict[str, Tensor]) -> Tensor:
        total: Any = 0.0
        star = tasks[-1][1]
        for name, value in values.items():
            running = torch.zeros_like(value)
            for fisher, _ in tasks:
                running = 0.6 * running + fisher[name]
            total = total + 5.0 / 2 * 0.6 * (running * (value - star[name]) ** 2).sum()
        return total

    watch = Watch()
    watch.naive = naive
    check_gradients(EWCPlugin(5.0, mode="online", gamma=0.6), watch)


def test_two_parameters_by_hand() -> None:
    """Two tasks with F = (3, 1) and (1, 0) at theta* = (0, 5) and (4, 7)."""
    plugin = EWCPlugin(2.0)
    for fisher, star in (((3.0, 1.0), (0.0, 5.0)), ((1.0, 0.0), (4.0, 7.0))):
        plugin._consolidate("theta", torch.tensor(fisher), torch.tensor(star))
    assert plugin.importance["theta"].tolist() == [4.0, 1.0]
    assert plugin.anchor["theta"].tolist() == [1.0, 5.0]  # (3·0 + 1·4) / 4; 5

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([2.0, 4.0]))

    model = Model()
    learner = strategy(model)
    plugin.before_training_exp(learner)
    model.theta.grad = torch.tensor([0.5, 0.25])
    plugin.before_update(learner)
    # 0.5 + 2 (3 (2 − 0) + 1 (2 − 4)); 0.25 + 2 · 1 (4 − 5)
    assert model.theta.grad.tolist() == [8.5, -1.75]


def test_agrees_with_stock_avalanche_at_batch_size_1() -> None:
    """There, F is the square of a batch's mean gradient, and lambda has no 1/2."""
    torch.manual_seed(1)
    model = network()
    model[2].p = 0.0
    runs = []
    for plugin in (EWCPlugin(0.6, fisher="empirical"), StockEWC(0.3)):
        learner = strategy(copy.deepcopy(model), plugin, train_mb_size=1, train_epochs=1, lr=0.01)
        for task, experience in enumerate(stream()):
            RNGManager.set_random_seeds(task)  # the stock one draws from it
            learner.train(experience, eval_streams=[])
        runs.append((plugin, dict(learner.model.named_parameters())))
    (ours, values), (stock, expected) = runs
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value, rtol=1e-4, atol=1e-5)
        importance = sum(stock.importances[task][name].data for task in range(3))
        torch.testing.assert_close(ours.importance[name], importance, rtol=1e-3, atol=1e-5)
    assert ours.importance["0.weight"].max() > 0.01


def train(plugins: list[Any], seed: int = 3, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    learner = strategy(network(), *plugins, **options)
    RNGManager.set_random_seeds(seed)
    for experience in stream():
        learner.train(experience, eval_streams=[])
    return learner.model


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_strength_0_is_naive_bit_for_bit(optimizer: type) -> None:
    """Estimating the Fisher information changes neither weights, modes nor random numbers."""
    plain = train([], optimizer=optimizer)
    ours = train([EWCPlugin(0.0, samples=30)], optimizer=optimizer)
    pulled = train([EWCPlugin(10.0, samples=30)], optimizer=optimizer)
    for a, b in zip(plain.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(plain[0].weight, pulled[0].weight)


def test_a_huge_strength_freezes_what_matters_alone() -> None:
    class Start(SupervisedPlugin):
        def after_training_exp(self, strategy: Any, **_: Any) -> None:
            if strategy.clock.train_exp_counter == 0:
                self.weights = [p.detach().clone() for p in strategy.model.parameters()]
                self.importance = list(ewc.importance.values())

    def moved(strength: float) -> tuple[Tensor, Tensor]:
        nonlocal ewc
        ewc, start = EWCPlugin(strength), Start()
        model = train([ewc, start], optimizer=torch.optim.Adam, lr=0.002)
        distance = torch.cat(
            [(p - w).flatten() for p, w in zip(model.parameters(), start.weights, strict=True)]
        ).abs()
        return distance, torch.cat([value.flatten() for value in start.importance])

    ewc = EWCPlugin(0.0)
    free, importance = moved(0.0)
    held, _ = moved(1e9)
    order = importance.argsort()
    assert (importance[order[-20:]] > 0).all()
    assert held[order[-20:]].mean() < 0.2 * free[order[-20:]].mean()


@pytest.mark.parametrize("add", [ewc_module._add_in_parts, ewc_module._add_at_once])
def test_a_cpu_and_other_devices_add_the_same(add: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ewc_module, "CPU_PART", 10)
    shapes: list[tuple[int, ...]] = [(), (0, 3), (7, 3), (2, 40), (9,)]
    pulls = [tuple(torch.randn(shape) for _ in range(4)) for shape in shapes]
    expected = [g + 3.0 * importance * (p - anchor) for g, p, importance, anchor in pulls]
    add(pulls, 3.0)
    for (gradient, *_), value in zip(pulls, expected, strict=True):
        torch.testing.assert_close(gradient, value)


def test_samples_are_drawn_by_seed_and_task() -> None:
    def importances(**options: Any) -> list[Tensor]:
        plugin = EWCPlugin(1.0, **options)
        train([plugin], train_epochs=1)
        return list(plugin.importance.values())

    def same(a: list[Tensor], b: list[Tensor]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    few = importances(samples=20)
    assert same(few, importances(samples=20))
    assert not same(few, importances(samples=20, seed=1))
    assert same(importances(), importances(samples=10**6, seed=1))
    assert not same(few, importances())


@pytest.mark.parametrize("mode", ["summed", "online"])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(
    mode: Literal["summed", "online"],
) -> None:
    def learner(seed: int) -> tuple[Any, EWCPlugin]:
        torch.manual_seed(seed)
        plugin = EWCPlugin(20.0, samples=40, mode=mode, gamma=0.9 if mode == "online" else 1.0)
        return strategy(network(), plugin, optimizer=torch.optim.Adam, lr=0.01), plugin

    whole, kept = learner(0)
    states = []
    for task, experience in enumerate(stream()):
        RNGManager.set_random_seeds(task)
        whole.train(experience, eval_streams=[], reset_optimizer_state=True)
        buffer = BytesIO()
        torch.save({"model": whole.model.state_dict(), "ewc": kept.state_dict()}, buffer)
        states.append(BytesIO(buffer.getvalue()))
    for done, state in enumerate(states, start=1):
        saved = torch.load(state, weights_only=True)
        resumed, plugin = learner(99)
        resumed.model.load_state_dict(saved["model"])
        plugin.load_state_dict(saved["ewc"])
        for task, experience in enumerate(stream()[done:], start=done):
            RNGManager.set_random_seeds(task)
            resumed.train(experience, eval_streams=[], reset_optimizer_state=True)
        for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(a, b)
        for name, value in kept.importance.items():
            assert torch.equal(plugin.importance[name], value)
            assert torch.equal(plugin.anchor[name], kept.anchor[name])


# --- heads ----------------------------------------------------------------------------------------


class Heads(MultiTaskModule):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.norm = nn.Linear(5, 7), nn.LayerNorm(7)
        self.head = MultiHeadClassifier(7, 3, masking=False)

    def forward(self, x: Tensor, task_labels: Any) -> Tensor:
        return self.head(self.norm(self.hidden(x)).relu(), task_labels)  # type: ignore[no-any-return]


def test_heads_of_other_tasks_have_no_importance_and_stay() -> None:
    plugin = EWCPlugin(10.0)
    model = Heads()
    learner = strategy(model, plugin, optimizer=torch.optim.AdamW, lr=0.01)
    names = [f"head.classifiers.{task}.classifier.weight" for task in range(3)]
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    for task, experience in enumerate(stream(labels=[0, 1, 2])):
        learner.train(experience, eval_streams=[], reset_optimizer_state=True)
        value = dict(model.named_parameters())[names[task]].detach().clone()
        kept[names[task]] = (value, plugin.importance[names[task]].clone())
        assert plugin.importance["norm.weight"].all()  # has no closed form
    for name, (value, importance) in kept.items():
        assert torch.equal(dict(model.named_parameters())[name], value)
        assert torch.equal(plugin.importance[name], importance)
        assert importance.any()


def test_parameters_without_a_closed_form_see_the_head_of_their_task() -> None:
    """With heads of different widths Avalanche fills up the outputs with zeros."""
    model = Heads()
    first, second = (
        tensors_benchmark(train_tensors=[d], test_tensors=[d], task_labels=[task]).train_stream[0]
        for task, d in enumerate([data(0, classes=4), data(1, classes=2)])
    )
    avalanche_model_adaptation(model, first)
    avalanche_model_adaptation(model, second)
    x, y = (value[:10] for value in data(1, classes=2))

    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, sample: Tensor) -> Tensor:
            logits = self.model(sample, 1)
            return F.pad(logits, (0, 4 - logits.shape[1]))

    for kind in ("exact", "empirical"):
        expected = oracle(Alone(), x, y, kind)  # type: ignore[arg-type]
        got = diagonal_fisher(model, batches(x, y, task=1), kind)  # type: ignore[arg-type]
        for name, value in got.items():
            torch.testing.assert_close(value, expected[f"model.{name}"], rtol=1e-4, atol=1e-8)
            assert value.any() == ("classifiers.0" not in name)


def test_a_growing_head_is_kept_by_its_old_rows() -> None:
    parts = [data(0), (data(1)[0], data(1)[1] + 3)]
    experiences = tensors_benchmark(
        train_tensors=parts, test_tensors=parts, task_labels=[0, 0]
    ).train_stream
    plugin = EWCPlugin(50.0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), IncrementalClassifier(7, 2, masking=False))
    learner = strategy(model, plugin)
    learner.train(experiences[0], eval_streams=[])
    before = plugin.importance["2.classifier.weight"]
    assert before.shape == (3, 7)
    plugin.before_training_exp(learner)
    learner.train(experiences[1], eval_streams=[])
    assert plugin.importance["2.classifier.weight"].shape == (6, 7)
    assert (plugin.importance["2.classifier.weight"][:3] >= before).all()


def test_a_parameter_of_another_shape_is_named() -> None:
    plugin = EWCPlugin(1.0)
    plugin._consolidate("0.weight", torch.ones(9, 5), torch.ones(9, 5))
    with pytest.raises(ValueError, match=r"0\.weight had the shape \(9, 5\) and has \(7, 5\)"):
        plugin.before_training_exp(strategy(network()))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"strength": -1.0}, "strength is -1.0"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"fisher": "true"}, "exact, empirical"),
        ({"samples": 0}, "samples is 0"),
        ({"mode": "separate"}, "summed, online"),
        ({"mode": "online", "gamma": 1.5}, "gamma is 1.5"),
        ({"gamma": 0.5}, "only the mode 'online'"),
    ],
)
def test_impossible_arguments_are_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        EWCPlugin(**{"strength": 1.0, **options})


# --- on the digits --------------------------------------------------------------------------------

DIGITS = Quickstart(tasks=3, epochs=15, method_epochs=False, hidden=(100, 100))


def digits(method: str, *changes: str) -> tuple[Any, float]:
    """Learn three permutations of the digits; return the learner and the mean accuracy."""
    experiment = Quickstart(**{**vars(DIGITS), "settings": changes})
    scenario = experiment.scenario(load("digits"), 100)
    evaluator = EvaluationPlugin(loggers=[])
    setup = Setup(experiment, scenario, 100, torch.device("cpu"), evaluator)
    learner = METHODS[method].build(setup, METHODS[method].settings_for(experiment))
    for experience in scenario.streams["train"]:
        learner.train(experience)
    right = []
    learner.strategy.model.eval()
    for experience in scenario.streams["valid"]:
        dataset = experience.dataset
        x = torch.stack([dataset[i][0] for i in range(len(dataset))])
        y = torch.tensor(list(dataset.targets))
        with torch.no_grad():
            right.append((learner.strategy.model(x).argmax(1) == y).float().mean())
    return learner, float(torch.stack(right).mean())


@pytest.mark.parametrize("method", ["ewc", "ewc_online"])
def test_forgets_less_than_finetuning_on_the_digits(method: str) -> None:
    _, naive = digits("finetune")
    learner, accuracy = digits(method)
    assert accuracy > naive + 0.05
    count = sum(p.numel() for p in learner.strategy.model.parameters())
    assert learner.parameters() == {"trainable": count, "stored": 3 * count}


def test_resident_data_serve_the_samples_without_the_stock_loader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stock(*_: Any, **__: Any) -> None:
        raise AssertionError("the stock loader served resident data")

    monkeypatch.setattr("avalanche.training.templates.base_sgd.SingleDatasetDataLoader", stock)
    learner, _ = digits("ewc", "ewc.samples=50", "ewc.lr=0.01")
    assert learner.plugin.tasks == 3
