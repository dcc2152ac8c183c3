"""Fine-tuning after the cut: what survives learns on, and nothing else moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from avalanche.benchmarks import tensors_benchmark
from avalanche.models import MultiHeadClassifier, MultiTaskModule
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from torch import Tensor, nn

from clnp import CLNPPlugin, FineTune
from clnp.network import PartitionedNetwork
from clnp.units import find_layout

SHAPE = (2, 4, 4)


def data(task: int, count: int) -> tuple[Tensor, Tensor]:
    places = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(task))
    noise = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(99 * count + task))
    labels = torch.arange(count) % 3
    return places[labels] + noise, labels


def benchmark(tasks: int = 3) -> Any:
    train = [data(task, 300) for task in range(tasks)]
    return tensors_benchmark(
        train_tensors=train, test_tensors=train, task_labels=list(range(tasks))
    )


def features() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(2, 10, 3, padding=1), nn.BatchNorm2d(10), nn.ReLU(), nn.Dropout(0.1)),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(40, 24), nn.ReLU()),
    )


class Heads(MultiTaskModule):
    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = features(), MultiHeadClassifier(24, 3)

    def forward(self, x: Tensor, task_labels: Any) -> Tensor:
        return self.head(self.features(x), task_labels)


def strategy(model: nn.Module, plugin: CLNPPlugin, lr: float = 0.01) -> Any:
    return Naive(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=lr, fused=True),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=16,
        train_epochs=6,
        eval_mb_size=30,
        plugins=[plugin],
        evaluator=EvaluationPlugin(loggers=[]),
    )


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("iterations", [1, 2])
def test_old_tasks_stay_bitwise_and_new_ones_learn_on(multi: bool, iterations: int) -> None:
    stream = benchmark().train_stream
    tuned = FineTune(epochs=4, lr=0.003, l1=1e-4, iterations=iterations)
    plugin = CLNPPlugin(margin=0.25, l1=1e-3, finetune=tuned)
    model = Heads() if multi else nn.Sequential(features(), nn.Linear(24, 3))
    for experience in stream:  # Avalanche's masking of heads takes no sets
        experience.classes_in_this_experience = sorted(experience.classes_in_this_experience)
    learner = strategy(model, plugin)
    kept: list[Tensor] = []
    gains = []
    for task, experience in enumerate(stream):
        learner.train(experience, eval_streams=[])
        for old, logits in enumerate(kept):
            assert torch.equal(plugin.subnetwork(old)(data(old, 90)[0]), logits)
        kept.append(plugin.subnetwork(task)(data(task, 90)[0]))
        rounds = plugin.history[-1]["fine_tuning"]
        assert len(rounds) == iterations
        gains += [r["tuned_validation"] - r["cut_validation"] for r in rounds]
        # Fine-tuning is the last thing that changes the task, but for units that died in it.
        assert plugin.history[-1]["pruned_validation"] == rounds[-1]["tuned_validation"]
        for layer, new in plugin.history[-1]["new"].items():
            assert new <= rounds[-1]["new"][layer]
    assert sum(gains) > 0
    assert [group["lr"] for group in learner.optimizer.param_groups] == [0.01]
    assert {p for group in learner.optimizer.param_groups for p in group["params"]} == set(
        model.parameters()
    )


def test_after_the_last_fine_tuning_none_but_dead_units_go() -> None:
    """Even if validation accuracy would allow it: nothing would train the others afterwards."""

    class Indifferent(CLNPPlugin):
        tuned = False

        def _fine_tune(self, *args: Any) -> Any:
            self.tuned = True
            return super()._fine_tune(*args)

        def _accuracy(self, strategy: Any) -> float:
            return 0.5 if self.tuned else super()._accuracy(strategy)

    plugin = Indifferent(margin=0.05, l1=1e-3, finetune=FineTune(epochs=1, lr=1e-5))
    learner = strategy(nn.Sequential(features(), nn.Linear(24, 3)), plugin)
    learner.train(benchmark().train_stream[0], eval_streams=[])
    (entry,) = plugin.history
    assert entry["new"] == entry["fine_tuning"][-1]["new"]
    assert min(entry["new"].values()) > 1


def test_only_survivors_train_and_only_they_are_read() -> None:
    """Whatever stands in cut rows and columns, the survivors' loss and gradients don't see it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))
    x, y = torch.randn(20, 6), torch.arange(20) % 3
    layout = find_layout(model, lambda m, a: m(a), x)
    network = PartitionedNetwork(model, layout, single_head=True)
    network.begin_task(layout)
    network.end_task()
    network.learn({"0": 3, "2": 2})
    network.begin_task(layout)
    network.end_task()
    with torch.no_grad():  # units 3:5 and 2:4 survive the second task's cut
        model[0].bias.add_(2.0)  # no unit is dead
        model[2].bias.add_(2.0)
        model[0].weight[5:] = float("nan")
        model[0].bias[5:] = float("nan")
        model[2].weight[4:] = float("nan")
        model[2].weight[:, 5:] = float("nan")
        model[4].weight[:, 4:] = float("nan")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = network.subnetwork(0, lambda m, a: m(a))(x)
    leaves = [p for p in network.train_units({"0": 5, "2": 4}).values() if p is not None]
    assert [tuple(p.shape) for p in leaves] == [(2, 6), (2,), (2, 8), (2,), (3, 2)]
    optimizer = torch.optim.SGD(leaves, lr=0.1)
    with network.view(network.training_view):
        loss = F.cross_entropy(network.model(x), y)
        loss.backward()
    assert torch.isfinite(loss)
    optimizer.step()
    network.end_task()
    assert torch.equal(network.subnetwork(0, lambda m, a: m(a))(x), first)
    moved = {name: (p != before[name]) & ~p.isnan() for name, p in model.named_parameters()}
    assert moved["0.weight"].any(1).tolist() == [False] * 3 + [True] * 2 + [False] * 3
    assert moved["2.weight"].any(1).tolist() == [False] * 2 + [True] * 2 + [False] * 3
    assert moved["2.weight"].any(0).tolist() == [True] * 5 + [False] * 3
    assert moved["4.weight"].any(0).tolist() == [False] * 2 + [True] * 2 + [False] * 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs of FineTune is 0"),
        ({"epochs": 1, "iterations": 0}, "iterations of FineTune is 0"),
        ({"epochs": 1, "lr": 0.0}, "lr of FineTune is 0.0"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FineTune(**values)


def test_a_wrong_number_of_alphas_is_found_before_training() -> None:
    plugin = CLNPPlugin(finetune=FineTune(epochs=1, l1=(1e-3, 1e-3)))
    learner = strategy(nn.Sequential(features(), nn.Linear(24, 3)), plugin)
    with pytest.raises(ValueError, match="l1 has 2 values for 3 layers"):
        learner.train(benchmark().train_stream[0], eval_streams=[])
    assert learner.clock.train_iterations == 0


def test_a_negative_alpha_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        CLNPPlugin(finetune=FineTune(epochs=1, l1=-1.0))


def test_an_interruption_leaves_the_network_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = benchmark().train_stream
    plugin = CLNPPlugin(margin=0.25, l1=1e-3, finetune=FineTune(epochs=2, lr=0.003))
    model = nn.Sequential(features(), nn.Linear(24, 3))
    learner = strategy(model, plugin)
    learner.train(stream[0], eval_streams=[])
    x = data(0, 90)[0]
    before = plugin.subnetwork(0)(x)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("clnp.plugin.retrain", interrupt)
        with pytest.raises(KeyboardInterrupt):
            learner.train(stream[1], eval_streams=[])
    assert plugin.tasks == [0]
    assert not plugin.network.in_training
    assert model.eval()(x).shape == (90, 3)
    assert len(plugin.state_dict()["history"]) == 1
    learner.train(stream[1], eval_streams=[])
    assert torch.equal(plugin.subnetwork(0)(x), before)
    assert plugin.tasks == [0, 1]
