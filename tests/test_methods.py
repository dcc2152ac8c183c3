"""Methods: settings that are checked, learners that keep the harness's promises."""

from __future__ import annotations

import copy
import dataclasses
from io import BytesIO
from typing import Any

import pytest
import torch
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import EvaluationPlugin
from torch import nn

from benchmarks.__main__ import experiments
from benchmarks.data import load
from benchmarks.errors import UserError, pick
from benchmarks.experiment import Experiment
from benchmarks.learners import Learner, LinearDecay, Settings, Setup
from benchmarks.methods import METHODS, CLNPSettings, SingleTaskSettings
from benchmarks.pmnist import PermutedMNIST
from benchmarks.quickstart import Quickstart

TINY = Quickstart(
    tasks=2, epochs=1, method_epochs=False, hidden=(40, 40), batch_size=128, validation=300
)

QUICK = [name for name, method in METHODS.items() if TINY.preset in method.settings]
IN_USE = ("_state", "_active_task", "visible_mask", "unfrozen_mask")


def built(method: str, seed: int = 0, experiment: Experiment = TINY, **changes: Any) -> Learner:
    evaluator = EvaluationPlugin(accuracy_metrics(experience=True), loggers=[], collect_all=False)
    scenario = experiment.scenario(load("digits"), seed)
    setup = Setup(experiment, scenario, seed, torch.device("cpu"), evaluator, **changes)
    return METHODS[method].build(setup, METHODS[method].settings_for(experiment))


def train(learner: Learner, task: int, experiment: Experiment = TINY, seed: int = 0) -> None:
    stream = experiment.scenario(load("digits"), seed).streams["train"]
    learner.strategy.train(stream[task], eval_streams=[], reset_optimizer_state=True)


def logits(learner: Learner, task: int) -> torch.Tensor:
    """What the learner's strategy predicts on a task's test images."""
    kept: list[torch.Tensor] = []

    class Keep(LinearDecay):
        def after_eval_iteration(self, strategy: Any, **_: Any) -> None:
            kept.append(strategy.mb_output.detach().clone())

    keep = Keep(1.0)
    learner.strategy.plugins.append(keep)
    learner.strategy.eval(TINY.scenario(load("digits"), 0).streams["test"][task])
    learner.strategy.plugins.remove(keep)
    return torch.cat(kept)


@pytest.mark.parametrize("preset", experiments().values(), ids=lambda preset: preset.preset)
def test_methods_of_a_preset_have_settings_for_it(preset: type[Experiment]) -> None:
    for method in preset.methods:
        assert METHODS[method].settings_for(preset()).lr > 0
        assert METHODS[method].name == method


@pytest.mark.parametrize("value", ["inf", "nan"])
@pytest.mark.parametrize(
    "setting", ["finetune.lr", "si.strength", "lwf.strength", "hat.lamb", "clnp.l1", "clnp.grid_l1"]
)
def test_numbers_without_end_are_no_settings(setting: str, value: str) -> None:
    method, _, name = setting.partition(".")
    with pytest.raises(UserError, match=f"The setting {name} is .*; it must be "):
        METHODS[method].settings_for(PermutedMNIST(settings=(f"{setting}={value}",)))


def test_a_method_without_settings_says_so() -> None:
    with pytest.raises(UserError, match=r"no settings for pmnist.* These have: clnp, clnp_best, f"):
        METHODS["clnp_m1"].settings_for(PermutedMNIST())


@pytest.mark.parametrize("method", QUICK)
def test_state_restores_what_was_learnt(method: str) -> None:
    learner = built(method)
    train(learner, 0)
    buffer = BytesIO()
    torch.save(learner.state(), buffer)
    buffer.seek(0)
    restored = built(method)
    restored.restore(torch.load(buffer, weights_only=True))
    assert torch.equal(logits(restored, 0), logits(learner, 0))
    assert restored.parameters() == learner.parameters()
    assert restored.capacity() == learner.capacity()
    assert restored.history() == learner.history()


@pytest.mark.parametrize("method", QUICK)
def test_an_evaluation_leaves_the_weights_alone(method: str) -> None:
    learner = built(method)
    train(learner, 0)
    train(learner, 1)
    before = copy.deepcopy(learner.strategy.model.state_dict())
    logits(learner, 0)
    for name, value in learner.strategy.model.state_dict().items():
        # PackNet's model holds, too, which task is in use.
        assert torch.equal(value, before[name]) or name.endswith(IN_USE)


def test_initial_weights_are_paired_across_methods_and_differ_by_seed() -> None:
    # PackNet wraps each layer.
    weights = [
        {n.replace("wrappee.", ""): p for n, p in built(m).strategy.model.named_parameters()}
        for m in QUICK
    ]
    for other in weights[1:]:
        # A method may do without biases, but not without a weight.
        missing = weights[0].keys() - other.keys()
        assert all(name.endswith(".bias") for name in missing)
        assert all(
            torch.equal(weights[0][name], other[name]) for name in weights[0].keys() - missing
        )
    different = built("finetune", seed=1).strategy.model.state_dict()
    assert not torch.equal(different["fc1.weight"], weights[0]["fc1.weight"])


def test_building_draws_nothing_from_the_global_generator() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    built("clnp")
    assert torch.equal(torch.rand(3), expected)


def test_single_task_starts_each_task_from_fresh_weights() -> None:
    after_other = built("single_task")
    train(after_other, 0)
    train(after_other, 1)
    networks = after_other.plugin.networks  # type: ignore[attr-defined]
    # Whatever task 0 learnt, task 1's network is the same.
    elsewhere = built("single_task")
    elsewhere.plugin.networks[0] = networks[0]  # type: ignore[attr-defined]
    train(elsewhere, 1)
    again = elsewhere.plugin.networks[1]  # type: ignore[attr-defined]
    assert all(torch.equal(networks[1][name], again[name]) for name in again)
    assert not torch.equal(networks[0]["fc1.weight"], networks[1]["fc1.weight"])


def test_single_task_evaluates_each_task_on_its_own_network() -> None:
    learner = built("single_task")
    train(learner, 0)
    before = logits(learner, 0)
    train(learner, 1)
    assert torch.equal(logits(learner, 0), before)
    assert torch.equal(
        learner.strategy.model.state_dict()["fc1.weight"],
        learner.plugin.networks[1]["fc1.weight"],  # type: ignore[attr-defined]
    )


def test_epochs_of_a_method_go_first_unless_the_user_says_otherwise() -> None:
    settings = Settings(epochs=7)
    make = lambda e: Setup(e, None, 0, torch.device("cpu"), EvaluationPlugin(loggers=[]))  # type: ignore[arg-type]  # noqa: E731
    assert make(PermutedMNIST()).epochs(settings) == 7
    assert make(PermutedMNIST()).epochs(Settings()) == 60
    assert make(PermutedMNIST(epochs=2, method_epochs=False)).epochs(settings) == 2


class Rates(LinearDecay):
    """Note the learning rate of every step."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.rates: list[float] = []

    def before_training_exp(self, strategy: Any, **_: Any) -> None: ...

    def after_training_exp(self, strategy: Any, **_: Any) -> None: ...

    def before_update(self, strategy: Any, **_: Any) -> None:
        self.rates.append(strategy.optimizer.param_groups[0]["lr"])


def test_learning_rate_is_constant_then_falls_linearly_in_each_task() -> None:
    rates = Rates()
    learner = built("finetune", plugins=[rates])
    train(learner, 0)
    train(learner, 1)
    steps = len(rates.rates) // 2
    assert steps == -(-(1437 - 300) // 128)
    lr = METHODS["finetune"].settings_for(TINY).lr
    expected = [lr * min(1.0, (1 - k / steps) / (1 - 0.7)) for k in range(steps)]
    assert rates.rates == pytest.approx(2 * expected)
    assert learner.strategy.optimizer.param_groups[0]["lr"] == lr


def test_single_task_trains_later_tasks_at_their_own_rate() -> None:
    experiment = dataclasses.replace(TINY, settings=("single_task.later_lr=0.01",))
    stream = experiment.scenario(load("digits"), 0).streams["train"]
    rates = Rates()
    learner = built("single_task", experiment=experiment, plugins=[rates])
    learner.train(stream[0])
    state = copy.deepcopy(learner.state())
    learner.train(stream[1])
    steps = len(rates.rates) // 2
    assert max(rates.rates[:steps]) == METHODS["single_task"].settings_for(TINY).lr == 0.004
    assert max(rates.rates[steps:]) == 0.01

    goes_on = built("single_task", experiment=experiment)
    goes_on.restore(state)
    goes_on.train(stream[1])
    before, after = (each.plugin.networks[1] for each in (learner, goes_on))  # type: ignore[attr-defined]
    assert all(torch.equal(before[name], after[name]) for name in before)


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        (CLNPSettings, {"margin": 1.0}),
        (CLNPSettings, {"margin": -0.1}),
        (CLNPSettings, {"margin": float("nan")}),
        (CLNPSettings, {"l1": (1e-5, -1.0)}),
        (CLNPSettings, {"grid_l1": ((1e-5,), (1e-5, -1.0))}),
        (CLNPSettings, {"grid_lr": (0.1, 0.0)}),
        (CLNPSettings, {"grid_lr": (0.1, 0.2, 0.1)}),
        (CLNPSettings, {"finetune_epochs": -1}),
        (CLNPSettings, {"finetune_lr": 0.0}),
        (CLNPSettings, {"finetune_l1": (-1.0,)}),
        (CLNPSettings, {"finetune_iterations": 0}),
        (SingleTaskSettings, {"later_lr": 0.0}),
        (SingleTaskSettings, {"later_lr": float("inf")}),
        (Settings, {"lr": 0.0}),
        (Settings, {"epochs": 0}),
        (Settings, {"decay_from": 1.5}),
    ],
)
def test_impossible_settings_are_named(settings: type[Settings], value: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(value))):
        settings(**value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("clnp.margin=0.25", {"margin": 0.25}),
        ("clnp.l1=1e-5,1e-4,0", {"l1": (1e-5, 1e-4, 0.0)}),
        ("clnp.l1=1e-3", {"l1": (1e-3,)}),
        ("clnp.epochs=3", {"epochs": 3}),
        ("clnp.head_bias=none", {"head_bias": "none"}),
        ("clnp.grid_lr=0.1,0.2", {"grid_lr": (0.1, 0.2)}),
        ("clnp.grid_l1=1e-3;1e-5,1e-4,0", {"grid_l1": ((1e-3,), (1e-5, 1e-4, 0.0))}),
        ("clnp.grid_l1=1e-3", {"grid_l1": ((1e-3,),)}),
    ],
)
def test_settings_can_be_changed_by_text(change: str, expected: dict[str, Any]) -> None:
    settings = METHODS["clnp"].settings_for(Quickstart(settings=(change,)))
    for name, value in expected.items():
        assert getattr(settings, name) == value
    others = METHODS["finetune"].settings_for(Quickstart(settings=(change,)))
    assert others == METHODS["finetune"].settings_for(Quickstart())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("margin=0.1", "METHOD.SETTING=VALUE"),
        ("clnp.margin", "METHOD.SETTING=VALUE"),
        ("clnp.marign=0.1", "'margin'"),
        ("clpn.margin=0.1", "'clnp'"),
        ("clnp.margin=much", "much"),
        ("clnp.head_bias=both", "both"),
        ("clnp.margin=2", "margin"),
        ("clnp.grid_l1=1e-3;much", "much"),
    ],
)
def test_changes_that_make_no_sense_are_named(change: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        METHODS["clnp"].settings_for(Quickstart(settings=(change,)))


def test_wrong_number_of_alphas_names_the_layers() -> None:
    experiment = Quickstart(
        tasks=2, epochs=1, method_epochs=False, hidden=(40, 40), settings=("clnp.l1=1,2",)
    )
    learner = built("clnp", experiment=experiment)
    with pytest.raises(Exception, match=r"fc1.*fc2.*head"):
        train(learner, 0, experiment)


def test_pick_suggests_the_nearest_name() -> None:
    assert pick("method", "clnp", METHODS) == "clnp"
    with pytest.raises(UserError, match="Did you mean 'finetune'"):
        pick("method", "finetun", METHODS)
    with pytest.raises(UserError, match=f"Known: {', '.join(sorted(METHODS))}"):
        pick("method", "qqq", METHODS)


def test_models_come_from_the_experiment() -> None:
    model = built("finetune").strategy.model
    assert [m.out_features for m in model.modules() if isinstance(m, nn.Linear)] == [40, 40, 10]
