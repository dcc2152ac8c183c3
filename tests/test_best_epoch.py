"""Early stopping: a task keeps the epoch with the best validation accuracy, whatever the method."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from torch import Tensor

from benchmarks.best_epoch import BestEpoch
from benchmarks.data import load
from benchmarks.errors import UserError
from benchmarks.experiment import Experiment
from benchmarks.learners import Learner, Setup
from benchmarks.methods import METHODS
from benchmarks.quickstart import Quickstart

EPOCHS = 6
CHANGES = ("lr=0.01", "decay_from=1", "early_stopping=True")
METHOD_NAMES = ("finetune", "single_task", "superposition", "joint")


class Weights(SupervisedPlugin):
    """The weights after each epoch, by task; the last epoch but one starts from spoilt ones."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[list[list[Tensor]]] = []
        self.at_the_end: list[list[Tensor]] = []

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        self.epochs.append([])

    @torch.no_grad()
    def before_training_epoch(self, strategy: Any, **_: Any) -> None:
        if strategy.clock.train_exp_epochs == EPOCHS - 2:
            generator = torch.Generator().manual_seed(0)
            for parameter in strategy.model.parameters():
                parameter.normal_(std=10.0, generator=generator)

    def after_training_epoch(self, strategy: Any, **_: Any) -> None:
        self.epochs[-1].append(weights(strategy))

    def after_training_exp(self, strategy: Any, **_: Any) -> None:
        self.at_the_end.append(weights(strategy))


def weights(strategy: Any) -> list[Tensor]:
    model = strategy.model
    return [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


def experiment_of(method: str, **fields: Any) -> Experiment:
    settings = tuple(f"{method}.{change}" for change in CHANGES)
    sizes = {"tasks": 2, "hidden": (30, 30), "validation": 300, "method_epochs": False}
    return Quickstart(**{**sizes, "epochs": EPOCHS, "settings": settings, **fields})


def trained(method: str, **fields: Any) -> tuple[Learner, Weights, BestEpoch]:
    experiment, watch = experiment_of(method, **fields), Weights()
    scenario = experiment.scenario(load("digits"), 0)
    cpu, evaluator = torch.device("cpu"), EvaluationPlugin(loggers=[])
    setup = Setup(experiment, scenario, 0, cpu, evaluator, [watch])
    learner = METHODS[method].build(setup, METHODS[method].settings_for(experiment))
    for experience in scenario.streams["train"]:
        learner.train(experience)
    (plugin,) = (p for p in learner.strategy.plugins if isinstance(p, BestEpoch))
    return learner, watch, plugin


def right(learner: Learner, experiences: Any) -> float:
    """The share of images that the strategy classifies correctly."""
    counted: list[Tensor] = []

    class Count(SupervisedPlugin):
        def after_eval_iteration(self, strategy: Any, **_: Any) -> None:
            counted.append(strategy.mb_output.argmax(1) == strategy.mb_y)

    count = Count()
    learner.strategy.plugins.append(count)
    learner.strategy.eval(experiences)
    learner.strategy.plugins.remove(count)
    return float(torch.cat(counted).double().mean())


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_the_latest_of_the_best_epochs_is_kept(method: str) -> None:
    learner, watch, plugin = trained(method)
    assert len(plugin.accuracies) == EPOCHS
    assert learner.validation_accuracy() == plugin.accuracies
    best = max(range(EPOCHS), key=lambda epoch: (plugin.accuracies[epoch], epoch))
    kept, epochs = watch.at_the_end[-1], watch.epochs[-1]
    assert [same(kept, epoch) for epoch in epochs] == [e == best for e in range(EPOCHS)]
    assert best < EPOCHS - 2
    # Judged by its own images, or by those of all tasks that are learnt at once.
    judged = plugin.stream if method == "joint" else plugin.stream[1:]
    assert right(learner, judged) == pytest.approx(plugin.accuracies[best])


def test_an_evaluation_changes_nothing_of_the_training() -> None:
    _, watch, _ = trained("finetune")
    plain = experiment_of("finetune", settings=tuple(f"finetune.{c}" for c in CHANGES[:2]))
    scenario, other = plain.scenario(load("digits"), 0), Weights()
    setup = Setup(plain, scenario, 0, torch.device("cpu"), EvaluationPlugin(loggers=[]), [other])
    learner = METHODS["finetune"].build(setup, METHODS["finetune"].settings_for(plain))
    learner.train(scenario.streams["train"][0])
    assert all(map(same, watch.epochs[0], other.epochs[0]))


def test_it_needs_validation_data() -> None:
    with pytest.raises(UserError, match="--validation"):
        trained("finetune", validation=0)


def test_clnp_has_its_own() -> None:
    settings = METHODS["clnp"].settings["quickstart"]
    with pytest.raises(UserError, match="keep_epoch"):
        dataclasses.replace(settings, early_stopping=True)


@pytest.mark.parametrize(("method", "name"), [("si", "SI"), ("packnet", "PackNet")])
def test_what_gathers_to_the_last_epoch_keeps_that(method: str, name: str) -> None:
    asked = Quickstart(settings=(f"{method}.early_stopping=True",))
    with pytest.raises(UserError, match=f"early_stopping is True; it must be False for {name}"):
        METHODS[method].settings_for(asked)
