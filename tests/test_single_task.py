"""single_task by itself: each experience on the network of its own, in any order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from avalanche.benchmarks import tensors_benchmark
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.models import SimpleMLP, as_multitask
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from torch import nn

from baselines.single_task import SingleTaskPlugin

TASKS = 3


def benchmark() -> Any:
    """Tasks whose labels contradict each other: no network can do two of them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 8, generator=generator)
    data = [(x, (x[:, :4].argmax(1) + task) % 4) for task in range(TASKS)]
    labels = list(range(TASKS))
    return tensors_benchmark(train_tensors=data, test_tensors=data, task_labels=labels)


def strategy(model: nn.Module) -> Any:
    return Naive(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=20,
        train_epochs=20,
        eval_mb_size=120,
        plugins=[SingleTaskPlugin()],
        evaluator=EvaluationPlugin(accuracy_metrics(experience=True), loggers=[]),
    )


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 0, 1, 2)])
def test_each_experience_is_evaluated_on_its_own_network(order: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    learner = strategy(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)))
    bench = benchmark()
    for index in order:
        learner.train(bench.train_stream[index], eval_streams=[], reset_optimizer_state=True)
    values = learner.eval(bench.test_stream)
    accuracies = [value for key, value in values.items() if "Top1_Acc_Exp/eval" in key]
    assert len(accuracies) == TASKS
    assert min(accuracies) > 0.9


def test_a_model_that_grows_is_refused_before_it_trains() -> None:
    torch.manual_seed(0)
    model = as_multitask(SimpleMLP(num_classes=4, input_size=8, hidden_size=16), "classifier")
    learner, bench = strategy(model), benchmark()
    learner.train(bench.train_stream[0], eval_streams=[], reset_optimizer_state=True)
    with pytest.raises(ValueError, match="has grown"):
        learner.train(bench.train_stream[1], eval_streams=[], reset_optimizer_state=True)
