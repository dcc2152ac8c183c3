"""Search: candidates start alike, the sparsest within the margin is learnt, nothing else moves."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from avalanche.benchmarks import tensors_benchmark
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.logging import BaseLogger
from avalanche.models import MultiHeadClassifier, MultiTaskModule
from avalanche.training.plugins import EvaluationPlugin, LRSchedulerPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive
from joblib.externals.loky import get_reusable_executor
from torch import Tensor, nn

from clnp import CLNPError, CLNPPlugin, FineTune, Incompatible, LogitDrift, search
from clnp.pruning import new_share, sparsest
from clnp.search import COLUMNS, new_weights
from clnp.units import find_layout

SHAPE = (2, 4, 4)
GRID: dict[str, Any] = {"l1": [1e-4, (3e-3, 1e-3, 1e-3)], "lr": [0.003, 0.01]}
TIMES = ["train_seconds", "scan_seconds"]


def data(task: int, count: int) -> tuple[Tensor, Tensor]:
    places = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(task))
    noise = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(99 * count + task))
    labels = torch.arange(count) % 3
    return places[labels] + 1.5 * noise, labels


def benchmark(tasks: int = 3) -> Any:
    made = tensors_benchmark(
        train_tensors=[data(task, 150) for task in range(tasks)],
        test_tensors=[data(task, 40) for task in range(tasks)],
        task_labels=list(range(tasks)),
    )
    for stream in made.streams.values():  # Avalanche's masking of heads takes no sets
        for experience in stream:
            experience.classes_in_this_experience = sorted(experience.classes_in_this_experience)
    return made


def mlp() -> nn.Module:
    layers = (nn.Linear(32, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3))
    return nn.Sequential(nn.Flatten(), *layers)


def features() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(2, 10, 3, padding=1), nn.BatchNorm2d(10), nn.ReLU(), nn.Dropout(0.1)),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(40, 24), nn.ReLU()),
    )


def convnet() -> nn.Module:
    return nn.Sequential(features(), nn.Linear(24, 3))


class Heads(MultiTaskModule):
    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = features(), MultiHeadClassifier(24, 3)

    def forward(self, x: Tensor, task_labels: Any) -> Tensor:
        return self.head(self.features(x), task_labels)


def learner(
    network: Callable[[], nn.Module] = mlp,
    *plugins: Any,
    scheduled: bool = False,
    metrics: Any = (),
    loggers: Any = (),
    eval_every: int = -1,
    **options: Any,
) -> tuple[Any, CLNPPlugin]:
    """A strategy whose weights and random numbers are always the same."""
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.8**epoch)
    plugin = CLNPPlugin(**({"margin": 0.1, "l1": 1e-3} | options))
    strategy = Naive(
        model=model,
        optimizer=optimizer,
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=16,
        train_epochs=3,
        eval_mb_size=40,
        plugins=[plugin, *plugins, *([LRSchedulerPlugin(schedule)] if scheduled else [])],
        evaluator=EvaluationPlugin(*metrics, loggers=list(loggers)),
        eval_every=eval_every,
    )
    return strategy, plugin


def assert_same(first: tuple[Any, CLNPPlugin], second: tuple[Any, CLNPPlugin]) -> None:
    """Both strategies stand exactly where the other does."""
    (one, its), (other, others) = first, second
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name]), name
    assert its.history == others.history
    assert its.validation_accuracy == others.validation_accuracy
    assert its.capacity().equals(others.capacity())
    assert its.partition == others.partition
    assert vars(one.clock) == vars(other.clock)
    for a, b in zip(one.optimizer.param_groups, other.optimizer.param_groups, strict=True):
        assert a["lr"] == b["lr"]
    assert len(one.optimizer.state) == len(other.optimizer.state) == 0


def without_times(table: pd.DataFrame) -> list[dict[str, Any]]:
    return list(table.drop(columns=TIMES).to_dict("records"))


@pytest.mark.parametrize(
    ("network", "scheduled", "keep_epoch"),
    [
        (mlp, True, "last"),
        (convnet, False, "latest-within-margin"),
        (Heads, False, "last"),
        (Heads, True, "latest-within-margin"),
    ],
)
def test_a_grid_of_one_is_plain_training_bit_by_bit(
    network: Callable[[], nn.Module], scheduled: bool, keep_epoch: str
) -> None:
    """Also what follows: the generators stand where plain training leaves them."""
    stream = benchmark().train_stream
    options = {"scheduled": scheduled, "keep_epoch": keep_epoch, "margin": 0.02}
    plain = learner(network, **options)
    for experience in stream:
        plain[0].train(experience, eval_streams=[])
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[2]  # noqa: NPY002
    searched = learner(network, **options)
    search(searched[0], stream[0], l1=[1e-3], lr=[0.01], eval_streams=[])
    searched[0].train(stream[1], eval_streams=[])
    search(searched[0], stream[2], l1=[1e-3], eval_streams=[])
    assert torch.equal(torch.get_rng_state(), after[0])
    assert (random.getstate(), np.random.get_state()[2]) == after[1:]  # noqa: NPY002
    assert_same(plain, searched)


STARTS: list[list[Tensor]] = []


class Watch(SupervisedPlugin):  # type: ignore[misc]
    """Keep what a training starts from: weights, first batch, first outputs (with dropout)."""

    def after_forward(self, strategy: Any, **_: Any) -> None:
        if strategy.clock.train_exp_iterations == 0:
            tensors = strategy.model.state_dict().values()
            STARTS.append([t.clone() for t in (*tensors, strategy.mb_x, strategy.mb_output)])


@pytest.mark.parametrize("network", [mlp, Heads])
def test_candidates_start_alike_and_frozen_tasks_stay_bitwise(
    network: Callable[[], nn.Module],
) -> None:
    stream = benchmark().train_stream
    strategy, plugin = learner(network, Watch())
    kept: list[Tensor] = []
    for task, experience in enumerate(stream):
        own = [t.clone() for t in strategy.model.parameters()]
        frozen = {name: t.clone() for name, t in plugin.network._frozen().items()} if task else {}
        STARTS.clear()
        search(strategy, experience, **GRID, eval_streams=[])
        assert len(STARTS) == 4
        for start in STARTS[1:]:
            assert all(torch.equal(a, b) for a, b in zip(start, STARTS[0], strict=True))
        if task == 0 and network is mlp:  # the user's own weights
            assert all(torch.equal(a, b) for a, b in zip(own, STARTS[0][:-2], strict=True))
        now = plugin.network._frozen()
        for name, before in frozen.items():
            assert torch.equal(now[name][tuple(slice(n) for n in before.shape)], before), name
        for old, logits in enumerate(kept):
            assert torch.equal(plugin.subnetwork(old)(data(old, 40)[0]), logits)
        kept.append(plugin.subnetwork(task)(data(task, 40)[0]))
    assert [row["task"] for row in plugin.candidates] == [0] * 4 + [1] * 4 + [2] * 4


def test_equal_candidates_are_bitwise_equal_and_the_first_is_learnt() -> None:
    strategy, _ = learner(convnet)
    table = search(
        strategy, benchmark().train_stream[0], l1=[1e-3, 1e-3], lr=[0.01, 0.01], eval_streams=[]
    )
    first, *others = without_times(table.drop(columns=["candidate", "chosen"]))
    assert all(row == first for row in others)
    assert table.chosen.tolist() == [True, False, False, False]


def test_each_candidate_is_what_plain_training_with_its_values_gives() -> None:
    stream = benchmark().train_stream
    strategy, plugin = learner(margin=0.05)
    table = search(strategy, stream[0], **GRID, eval_streams=[])
    logits = plugin.subnetwork(0)(data(0, 40)[0])
    assert list(table.columns) == list(COLUMNS)
    assert list(zip(table.l1.map(str), table.lr, strict=True)) == [
        (str(l1), lr) for l1 in (1e-4, [3e-3, 1e-3, 1e-3]) for lr in (0.003, 0.01)
    ]
    best = table.best_validation.max()
    for row in table.to_dict("records"):
        alone, its = learner(margin=0.05, l1=row["l1"])
        for group in alone.optimizer.param_groups:
            group["lr"] = row["lr"]
        if row["chosen"]:  # its cut counts from the best of the grid
            its.end_training = lifted(its, best)  # type: ignore[method-assign]
        alone.train(stream[0], eval_streams=[])
        assert its.history[0]["trained_validation"] == row["trained_validation"]
        if row["chosen"]:
            assert torch.equal(its.subnetwork(0)(data(0, 40)[0]), logits)
            assert plugin.history == its.history
            assert its.history[0]["new"] == row["new"]
    # The choice, done again from the table.
    within = table[table.pruned_validation >= best - 0.05 - 1e-9]
    assert table.within_margin.tolist() == table.index.isin(within.index).tolist()
    assert table.chosen.tolist() == (table.index == within.new_share.idxmin()).tolist()
    for row in table.to_dict("records"):
        assert row["new_share"] == pytest.approx(row["new"]["1"] / 20 + row["new"]["3"] / 16)
        one, two = row["new"]["1"], row["new"]["3"]
        assert row["new_weights"] == 32 * one + one * two + 3 * two
    assert table.new_share.nunique() > 1


def lifted(plugin: CLNPPlugin, best: float) -> Callable[..., Any]:
    """End training as ever, with another best accuracy among the epochs' for the cut."""
    end = plugin.end_training

    class Higher(list[float]):
        def __iter__(self) -> Any:
            return iter([best])  # what max() sees

    def end_training(*args: Any, **kwargs: Any) -> Any:
        outcome = end(*args, **kwargs)
        object.__setattr__(outcome, "validation", Higher(outcome.validation))
        return outcome

    return end_training


def searched(executor: Executor | None) -> tuple[pd.DataFrame, tuple[Any, CLNPPlugin]]:
    stream = benchmark().train_stream
    made = learner(convnet)
    tables = [
        search(made[0], experience, lr=[0.003, 0.01], executor=executor, eval_streams=[])
        for experience in stream[:2]
    ]
    return pd.concat(tables), made


def test_a_thread_gives_what_no_executor_gives() -> None:
    table, made = searched(None)
    with ThreadPoolExecutor(max_workers=1) as executor:
        again, other = searched(executor)
    assert without_times(table) == without_times(again)
    assert_same(made, other)


@pytest.mark.slow
def test_processes_give_what_no_executor_gives() -> None:
    table, made = searched(None)
    # Avalanche's streams hold functions that only cloudpickle, which this executor uses, takes.
    with get_reusable_executor(max_workers=2) as executor:
        again, other = searched(executor)
    assert without_times(table) == without_times(again)
    assert_same(made, other)


# --- the choice -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracies", "shares", "bound", "place"),
    [
        ([0.9, 0.8, 0.85], [3, 1, 2], 0.84, 2),  # the sparsest of those within
        ([0.9, 0.8, 0.85], [3, 1, 2], 0.8, 1),  # exactly at the bound
        ([0.9, 0.3 - 0.1, 0.1], [3, 1, 2], 0.2, 1),  # at the bound, but for rounding
        ([0.9, 0.9, 0.8999], [3, 2, 1], 0.9, 1),  # margin 0
        ([0.9, 0.9, 0.9], [2, 2, 2], 0.9, 0),  # all equal
        ([0.9, 0.9, 0.9], [2, 1, 1], 0.5, 1),  # the first of equally sparse ones
        ([0.7, 0.8, 0.8], [1, 3, 2], 0.9, 2),  # none within: the most accurate, then the sparsest
        ([None, 0.8, 0.85], [0, 3, 4], 0.8, 1),  # what diverged isn't chosen
        ([None, 0.3], [0, 3], 0.8, 1),
    ],
)
def test_the_sparsest_within_the_bound(
    accuracies: list[float | None], shares: list[int], bound: float, place: int
) -> None:
    assert sparsest(accuracies, [(Fraction(s, 7), 0) for s in shares], bound) == place


def test_equal_shares_are_decided_by_weights() -> None:
    widths, before = {"a": 30, "b": 10, "c": 3}, {"a": 3, "b": 1, "c": 0}
    cuts = [{"a": 6, "b": 3, "c": 1}, {"a": 9, "b": 2, "c": 1}, {"a": 4, "b": 4, "c": 1}]
    shares = [new_share(cut, before, widths) for cut in cuts]
    assert len(set(shares)) > 1
    equal = [shares[0], new_share({"a": 9, "b": 2, "c": 1}, before, widths)]
    assert equal == [Fraction(19, 30)] * 2
    # In floats the same sums, taken in another order, would differ: 0.1 + 0.2 + 1/3.
    assert sparsest([0.9, 0.9], [(equal[0], 50), (equal[1], 40)], 0.9) == 1
    assert sparsest([0.9, 0.9], [(equal[0], 40), (equal[1], 40)], 0.9) == 0


def test_weights_of_new_units() -> None:
    model = convnet()
    layout = find_layout(model, lambda m, x: m(x), torch.randn(4, *SHAPE))
    modules = {name: model.get_submodule(name) for name in layout.order}
    before, used = {"0.0": 2, "0.6": 5}, {"0.0": 6, "0.6": 8}
    # Conv rows of 2x3x3, linear rows that read 4 places of 6 channels, 3 outputs.
    expected = 4 * 18 + 3 * 24
    assert new_weights(modules, layout, before, used, before) == expected + 3 * 3
    none = {"0.0": 0, "0.6": 0}
    assert new_weights(modules, layout, before, used, none) == expected + 3 * 8
    assert new_weights(modules, layout, before, before, before) == 0


def test_candidates_that_diverge_are_out() -> None:
    stream = benchmark().train_stream
    strategy, plugin = learner()
    table = search(strategy, stream[0], lr=[1e30, 0.01], eval_streams=[])
    assert table.chosen.tolist() == [False, True]
    assert table.within_margin.tolist() == [False, True]
    assert table.new.tolist()[0] is None
    assert pd.isna(table.best_validation[0])
    assert plugin.history[0]["best_validation"] == table.best_validation[1]

    class Check(SupervisedPlugin):  # type: ignore[misc]
        def before_training_exp(self, strategy: Any, **_: Any) -> None:
            if strategy.optimizer.param_groups[0]["lr"] > 0.01:
                raise FloatingPointError("the loss is nan")

    other, its = learner(mlp, Check())
    again = search(other, stream[0], lr=[0.02, 0.01], eval_streams=[])
    assert without_times(again)[1] == without_times(table)[1]
    assert its.history == plugin.history

    strategy, plugin = learner()
    strategy.train(stream[0], eval_streams=[])
    logits = plugin.subnetwork(0)(data(0, 40)[0])
    with pytest.raises(CLNPError, match="all 2 candidates diverged"):
        search(strategy, stream[1], l1=[0.0], lr=[1e30, 1e31], eval_streams=[])
    assert plugin.tasks == [0]
    assert plugin.l1 == 1e-3
    assert plugin.candidates == []
    assert [g["lr"] for g in strategy.optimizer.param_groups] == [0.01]
    strategy.train(stream[1], eval_streams=[])
    assert torch.equal(plugin.subnetwork(0)(data(0, 40)[0]), logits)


# --- what stays as it was -------------------------------------------------------------------------


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("go_on", [False, True])
def test_later_tasks_go_on_with_what_was_chosen(scheduled: bool, go_on: bool) -> None:
    stream = benchmark(2).train_stream
    strategy, plugin = learner(scheduled=scheduled)
    rates: list[float] = []

    class Rates(SupervisedPlugin):  # type: ignore[misc]
        def after_training_epoch(self, strategy: Any, **_: Any) -> None:
            rates.append(strategy.optimizer.param_groups[0]["lr"])

    table = search(strategy, stream[0], l1=[2e-3], lr=[0.02], go_on=go_on, eval_streams=[])
    assert table.chosen.tolist() == [True]
    assert plugin.l1 == (2e-3 if go_on else 1e-3)
    strategy.plugins.insert(0, Rates())
    strategy.train(stream[1], eval_streams=[])
    start = 0.02 if go_on else 0.01
    assert rates == pytest.approx([start * 0.8**e if scheduled else start for e in range(3)])


def test_groups_of_parameters_keep_their_ratio() -> None:
    strategy, _ = learner()
    weights = [p for p in strategy.model.parameters() if p.dim() > 1]
    biases = [p for p in strategy.model.parameters() if p.dim() == 1]
    strategy.optimizer = torch.optim.SGD(
        [{"params": weights, "lr": 0.1}, {"params": biases, "lr": 0.2}, {"params": [], "lr": 0.1}]
    )
    search(strategy, benchmark().train_stream[0], lr=[0.03], eval_streams=[])
    assert [g["lr"] for g in strategy.optimizer.param_groups] == pytest.approx([0.03, 0.06, 0.03])


L = torch.optim.lr_scheduler
WARM: dict[str, Callable[[Any], Any]] = {
    "linear": lambda o: L.LinearLR(o, start_factor=0.1, total_iters=2),
    "from zero": lambda o: L.LambdaLR(o, lambda epoch: min(1.0, epoch / 2)),
    "in turn": lambda o: L.SequentialLR(
        o, [L.LinearLR(o, 0.1, total_iters=1), L.ExponentialLR(o, 0.5)], [1]
    ),
    "chained": lambda o: L.ChainedScheduler(
        [L.ConstantLR(o, 0.3, total_iters=1), L.ExponentialLR(o, 0.5)]
    ),
}


@pytest.mark.parametrize("schedule", WARM)
def test_a_schedule_that_warms_up_starts_from_the_rate_of_the_grid(schedule: str) -> None:
    """The rate of the moment is a share of it, and two groups keep their ratio."""

    def make() -> tuple[Any, CLNPPlugin]:
        strategy, plugin = learner()
        first, *others = strategy.model.parameters()
        strategy.optimizer = torch.optim.SGD(
            [{"params": [first], "lr": 0.1}, {"params": others, "lr": 0.02}], momentum=0.9
        )
        strategy.plugins.append(LRSchedulerPlugin(WARM[schedule](strategy.optimizer)))
        return strategy, plugin

    experience = benchmark().train_stream[0]
    plain = make()
    plain[0].train(experience, eval_streams=[])
    searched = make()
    table = search(searched[0], experience, lr=[0.1], eval_streams=[])
    assert table.lr.tolist() == [0.1]
    assert_same(plain, searched)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # Avalanche's own
def test_beside_a_schedule_by_a_metric() -> None:
    strategy, plugin = learner()
    schedule = L.ReduceLROnPlateau(strategy.optimizer)
    strategy.plugins.append(LRSchedulerPlugin(schedule, metric="train_loss"))
    search(strategy, benchmark().train_stream[0], l1=[1e-3, 1e-2], lr=[0.02], eval_streams=[])
    assert plugin.tasks == [0]


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: L.OneCycleLR(o, max_lr=0.1, total_steps=9),
        lambda o: L.CyclicLR(o, base_lr=0.01, max_lr=0.1, cycle_momentum=False),
    ],
)
def test_rates_that_no_grid_reaches_are_refused(schedule: Callable[[Any], Any]) -> None:
    strategy, plugin = learner()
    strategy.plugins.append(LRSchedulerPlugin(schedule(strategy.optimizer)))
    experience = benchmark().train_stream[0]
    with pytest.raises(Incompatible, match=r"(OneCycle|Cyclic)LR sets rates of its own"):
        search(strategy, experience, lr=[0.1], eval_streams=[])
    search(strategy, experience, l1=[1e-3], eval_streams=[])
    assert plugin.tasks == [0]


def test_a_first_group_without_a_rate_is_refused() -> None:
    strategy, plugin = learner()
    first, *others = strategy.model.parameters()
    groups = [{"params": [first], "lr": 0.0}, {"params": others, "lr": 0.1}]
    strategy.optimizer = torch.optim.SGD(groups)
    with pytest.raises(Incompatible, match="first group of parameters has a learning rate of 0"):
        search(strategy, benchmark().train_stream[0], lr=[0.1], eval_streams=[])
    assert plugin.tasks == []


def test_one_experience_at_a_time() -> None:
    strategy, plugin = learner()
    stream = benchmark().train_stream
    with pytest.raises(ValueError, match="learns one experience, and this holds 3"):
        search(strategy, stream, l1=[1e-3])
    search(strategy, [stream[0]], l1=[1e-3], eval_streams=[])
    assert plugin.tasks == [0]


def test_a_capturable_optimizers_rate_stays_a_tensor() -> None:
    strategy, _ = learner()
    strategy.optimizer = torch.optim.SGD(strategy.model.parameters(), lr=torch.tensor(0.1))
    table = search(strategy, benchmark().train_stream[0], lr=[0.05, 0.02], eval_streams=[])
    rate = strategy.optimizer.param_groups[0]["lr"]
    assert isinstance(rate, Tensor)
    assert float(rate) == pytest.approx(table[table.chosen].lr.item())


def test_the_table_and_alpha_are_in_the_state() -> None:
    stream = benchmark().train_stream
    strategy, plugin = learner()
    search(strategy, stream[0], l1=[{"1": 2e-3, "head": 1e-4}], lr=[0.02, 0.03], eval_streams=[])
    state = copy.deepcopy(plugin.state_dict())
    other, fresh = learner()
    fresh.load_state_dict(state, other.model)
    assert fresh.candidates == plugin.candidates
    assert fresh.l1 == {"1": 2e-3, "head": 1e-4}
    unsearched, its = learner()
    unsearched.train(stream[0], eval_streams=[])
    other, fresh = learner(l1=0.5)
    fresh.load_state_dict(its.state_dict(), other.model)
    assert fresh.l1 == 0.5  # what the user says; nothing was searched


class Logger(BaseLogger):  # type: ignore[misc]
    """Holds what can't be copied, and counts what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.lock, self.calls = threading.Lock(), 0

    def after_training_exp(self, *_: Any, **__: Any) -> None:
        self.calls += 1


def test_metrics_and_loggers_see_one_training() -> None:
    bench = benchmark(2)
    logger, drift = Logger(), LogitDrift()
    metrics = (accuracy_metrics(experience=True), drift)
    strategy, plugin = learner(metrics=metrics, loggers=[logger], eval_every=1)
    for experience in bench.train_stream:
        search(strategy, experience, lr=[0.003, 0.01], eval_streams=[bench.test_stream])
    assert logger.calls == 2
    assert drift.drift() == {0: 0.0, 1: 0.0}
    assert strategy.train_epochs == 3
    # The evaluation at the end of the experience is that of the candidate learnt.
    x, y = data(1, 40)
    accuracy = float((plugin.subnetwork(1)(x).argmax(1) == y).float().mean())
    key = "Top1_Acc_Exp/eval_phase/test_stream/Task001/Exp001"
    assert strategy.evaluator.get_last_metrics()[key] == pytest.approx(accuracy)
    assert strategy.clock.train_iterations == 2 * 3 * 9


def test_an_interrupted_search_has_changed_nothing() -> None:
    stream = benchmark(2).train_stream

    class Stop(SupervisedPlugin):  # type: ignore[misc]
        armed = True

        def before_training_epoch(self, strategy: Any, **_: Any) -> None:
            if self.armed and strategy.optimizer.param_groups[0]["lr"] == 0.01:
                raise KeyboardInterrupt

    stop = Stop()
    strategy, plugin = learner(convnet, stop)
    before = copy.deepcopy(strategy.model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        search(strategy, stream[0], lr=[0.003, 0.01], eval_streams=[])
    for name, tensor in strategy.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    stop.armed = False
    table = search(strategy, stream[0], lr=[0.003, 0.01], eval_streams=[])
    untroubled = learner(convnet)
    assert without_times(table) == without_times(
        search(untroubled[0], stream[0], lr=[0.003, 0.01], eval_streams=[])
    )
    assert_same((strategy, plugin), untroubled)


def test_a_search_after_an_interrupted_training() -> None:
    stream = benchmark(2).train_stream

    class Stop(SupervisedPlugin):  # type: ignore[misc]
        armed = True

        def after_training_epoch(self, strategy: Any, **_: Any) -> None:
            if self.armed:
                raise KeyboardInterrupt

    stop = Stop()
    strategy, plugin = learner(mlp, stop)
    with pytest.raises(KeyboardInterrupt):
        strategy.train(stream[0], eval_streams=[])
    stop.armed = False
    with pytest.warns(UserWarning, match="task 0 was interrupted"):
        search(strategy, stream[0], lr=[0.003, 0.01], eval_streams=[])
    assert plugin.tasks == [0]


def test_fine_tuning_follows_the_choice() -> None:
    stream = benchmark(2).train_stream
    strategy, plugin = learner(convnet, finetune=FineTune(epochs=1))
    for experience in stream:
        table = search(strategy, experience, lr=[0.003, 0.01], eval_streams=[])
        row = table[table.chosen].iloc[0]
        (tuned,) = plugin.history[-1]["fine_tuning"]
        assert tuned["cut_validation"] == row.pruned_validation
        assert tuned["new"] == row.new


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"l1": []}, r"l1 is \[\], but a grid needs a list"),
        ({"lr": 0.1}, "lr is 0.1, but a grid needs a list"),
        ({"l1": [1e-3, (1e-3, -1.0, 0.0)]}, "l1 is -1.0"),
        ({"lr": [0.1, 0.0]}, "lr holds 0.0"),
        ({"lr": [float("nan")]}, "lr holds nan"),
        ({"l1": [1e-3, (1e-3, 1e-3)]}, "l1 has 2 values for 3 layers"),
    ],
)
def test_a_grid_that_is_none(grid: dict[str, Any], message: str) -> None:
    """Whatever is wrong with any candidate is found before the first trains."""
    strategy, _ = learner(mlp, Watch())
    STARTS.clear()
    with pytest.raises(ValueError, match=message):
        search(strategy, benchmark().train_stream[0], **grid, eval_streams=[])
    assert STARTS == []


def test_a_strategy_that_cannot_be_searched_with() -> None:
    strategy, plugin = learner()
    strategy.plugins.remove(plugin)
    with pytest.raises(Incompatible, match="one CLNPPlugin among its plugins; this one has 0"):
        search(strategy, benchmark().train_stream[0], lr=[0.1])

    class Locked(SupervisedPlugin):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()

    strategy, _ = learner(mlp, Locked())
    with pytest.raises(Incompatible, match=r"can't be copied \(cannot pickle"):
        search(strategy, benchmark().train_stream[0], lr=[0.1])


@pytest.mark.parametrize("grid", [{"l1": [None]}, {"l1": "ab"}, {"lr": ["0.1"]}, {"lr": [None]}])
def test_what_is_no_number_is_refused(grid: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"(l1|lr) is .*; give a number"):
        search(learner()[0], benchmark().train_stream[0], **grid)
