"""Avalanche's own tests, held against the plugin: its classes as they are, with a learner of ours.

Where a test of Avalanche makes its strategy itself, the name `Naive` of its module stands for a
strategy of ours while it runs; its code is not touched. The test of PackNet makes a PackNet, so its
scenario is ported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.models import SimpleMLP
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive
from torch import Tensor, nn

from clnp import CLNP, CLNPPlugin, LogitDrift

pytestmark = [
    pytest.mark.peer,
    # Avalanche's tests call strategies as its own deprecation forbids.
    pytest.mark.filterwarnings("ignore:Avalanche is transitioning to strategy constructors"),
    # unittest's assertWarns looks into every module, and torch's lazy ones then load.
    pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning"),
]


def avalanche_tests(*names: str) -> list[ModuleType]:
    """Import modules of the package `tests` that avalanche's wheel installs beside `avalanche`.

    Under pytest the name `tests` is this folder's, and Avalanche's test modules import each other
    by it. So theirs is found through the installed distribution, has the name while they are
    imported, and then gives it back.
    """
    wheel = importlib.metadata.distribution("avalanche-lib")
    folder = Path(str(wheel.locate_file("tests")))
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if is_tests(name)}
    try:
        spec = importlib.util.spec_from_file_location(
            "tests", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        sys.modules["tests"] = package = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
        modules = [importlib.import_module(f"tests.{name}") for name in names]
    finally:
        for name in filter(is_tests, list(sys.modules)):
            del sys.modules[name]
        sys.modules.update(ours)
    assert all(folder in Path(str(module.__file__)).parents for module in modules)
    return modules


def is_tests(name: str) -> bool:
    return name.split(".")[0] == "tests"


conversion, plugins, strategies, utilities = avalanche_tests(
    "models.test_helper_method",
    "training.test_plugins",
    "training.test_strategies",
    "unit_tests_utils",
)

# Five tasks in the ten hidden units of Avalanche's model, of which each must leave some.
SETTINGS = {"margin": 0.5, "l1": 1e-3}
TASKS = [0, 1, 2, 3, 4]


def naive_with_plugin(*arguments: Any, plugins: Any = (), **options: Any) -> Any:
    return Naive(*arguments, plugins=[*plugins, CLNPPlugin(**SETTINGS)], **options)


def ready_strategy(*arguments: Any, **options: Any) -> Any:
    return CLNP(*arguments, **SETTINGS, **options)


def learner(strategy: Any) -> CLNPPlugin:
    (found,) = (plugin for plugin in strategy.plugins if isinstance(plugin, CLNPPlugin))
    return found


class Peer:
    """Mixed into a test case of Avalanche: its `Naive` is ours, and only what we name is run."""

    module: ClassVar[ModuleType]
    make: ClassVar[Callable[..., Any]] = staticmethod(naive_with_plugin)

    def __init_subclass__(cls) -> None:
        for name in dir(cls):
            ours = getattr(getattr(cls, name), "__module__", None) == __name__
            if name.startswith("test") and not ours:
                setattr(cls, name, None)

    def setUp(self) -> None:
        super().setUp()  # type: ignore[misc]
        self.made: list[Any] = []
        self.lessons: Any = []
        patch = mock.patch.object(self.module, "Naive", self.strategy)
        patch.start()
        self.addCleanup(patch.stop)  # type: ignore[attr-defined]

    def strategy(self, *arguments: Any, **options: Any) -> Any:
        made = type(self).make(*arguments, **options)
        for experience in self.lessons:
            made.train(experience, eval_streams=[])
        self.made.append(made)
        return made

    def learnt(self) -> list[list[Any]]:
        return [learner(made).tasks for made in self.made]


class Callbacks(Peer, plugins.PluginTests):  # type: ignore[misc, name-defined]
    module = plugins

    def test_callback_reachability(self) -> None:
        super().test_callback_reachability()
        assert self.learnt() == [[0]]


class Template(Peer, strategies.BaseStrategyTest):  # type: ignore[misc, name-defined]
    module = strategies

    def test_forward_hooks(self) -> None:
        super().test_forward_hooks()
        assert self.learnt() == [[]]

    def test_forward_hooks_after_two_tasks(self) -> None:
        self.lessons = utilities.get_fast_benchmark().train_stream[:2]
        super().test_forward_hooks()
        assert self.learnt() == [[0, 1]]

    def test_forward_hooks_in_training_and_evaluation(self) -> None:
        """In each view of the model its hook is called, and with what the strategy gets."""
        model = SimpleMLP(input_size=6, hidden_size=10)
        hooked: list[Tensor] = []
        model.register_forward_hook(lambda module, args, output: hooked.append(output))
        phases: set[tuple[int, bool]] = set()

        class Watch(SupervisedPlugin):  # type: ignore[misc]
            def after_forward(self, strategy: Any, **_: Any) -> None:
                assert strategy.mb_output is hooked[-1]
                phases.add((len(learner(strategy).tasks), strategy.is_training))

            after_eval_forward = after_forward

        made = self.strategy(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1e-3),
            criterion=nn.CrossEntropyLoss(),
            train_mb_size=32,
            plugins=[Watch()],
            evaluator=EvaluationPlugin(loggers=[]),
        )
        benchmark = utilities.get_fast_benchmark()
        for task in range(2):
            made.train(benchmark.train_stream[task], eval_streams=[])
            made.eval(benchmark.test_stream[: task + 1])
        assert phases == {(0, True), (1, False), (1, True), (2, False)}

    def test_periodic_eval(self) -> None:
        super().test_periodic_eval()
        assert self.learnt() == [[0]] * 4

    def test_plugins_compatibility_checks(self) -> None:
        super().test_plugins_compatibility_checks()
        assert self.learnt() == [[0]]


class Streams(Peer, strategies.StrategyTest):  # type: ignore[misc, name-defined]
    module = strategies

    def test_naive(self) -> None:
        super().test_naive()
        assert self.learnt() == [TASKS, TASKS]

    def test_single_task(self) -> None:
        self.run_scenario(multi_task=False)

    def test_multi_task(self) -> None:
        self.run_scenario(multi_task=True)

    def run_scenario(self, multi_task: bool) -> None:
        model, _, criterion, benchmark = self.init_scenario(multi_task=multi_task)
        drift = LogitDrift()
        made = self.strategy(
            model=model,
            optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
            criterion=criterion,
            train_mb_size=64,
            device=self.device,
            eval_mb_size=50,
            train_epochs=2,
            evaluator=EvaluationPlugin(drift),
        )
        strategies.run_strategy(benchmark, made)
        assert self.learnt() == [TASKS]
        assert learner(made).network.single_head is not multi_task
        assert drift.drift() == dict.fromkeys(TASKS, 0.0)


class Keep(SupervisedPlugin):  # type: ignore[misc]
    """Hold each learnt task to its first logits, after every training."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x
        self.logits: dict[Any, Tensor] = {}

    def after_training(self, strategy: Any, **_: Any) -> None:
        ours = learner(strategy)
        for task in ours.tasks:
            logits = ours.subnetwork(task)(self.x)
            assert torch.equal(logits, self.logits.setdefault(task, logits)), f"task {task}"


class Conversion(Peer, conversion.ConversionMethodTests):  # type: ignore[misc, name-defined]
    module = conversion

    def test_integration(self) -> None:
        keep = Keep(torch.rand(10, 6, device=self.device))
        self._test_integration(SimpleMLP(input_size=6), "classifier", plugins=[keep])
        assert self.learnt() == [TASKS]
        assert list(keep.logits) == TASKS


class CallbacksOfReadyStrategy(Callbacks):
    make = staticmethod(ready_strategy)


class TemplateOfReadyStrategy(Template):
    make = staticmethod(ready_strategy)


class StreamsOfReadyStrategy(Streams):
    make = staticmethod(ready_strategy)


class ConversionOfReadyStrategy(Conversion):
    make = staticmethod(ready_strategy)


# --- the scenario of TestPackNet -----------------------------------------------------------------


def construct_model() -> Any:
    return SimpleMLP(num_classes=10, input_size=6, hidden_size=20, drop_rate=0)


def packnet_scenario(
    make: Callable[..., Any],
    optimizer: Callable[..., torch.optim.Optimizer],
    lr: float,
    logits: Callable[[Any, int, Tensor], Tensor],
) -> tuple[Any, Any, Tensor, list[Tensor], list[float]]:
    """Train on five tasks; after each, the older ones' accuracies and logits are what they were."""
    torch.manual_seed(0)
    device = utilities.get_device()
    benchmark = utilities.get_fast_benchmark(True, seed=0)
    model = construct_model().to(device)
    strategy = make(
        model=model,
        optimizer=optimizer(model.parameters(), lr=lr),
        criterion=nn.CrossEntropyLoss(),
        train_epochs=3,  # PackNet's two, and the one after its pruning
        train_mb_size=10,
        eval_mb_size=10,
        device=device,
        evaluator=EvaluationPlugin(accuracy_metrics(experience=True)),
    )
    x = torch.rand(10, 6).to(device)
    outputs: list[Tensor] = []
    learnt: list[float] = []
    for task, experience in enumerate(benchmark.train_stream):
        strategy.train(experience)
        now = accuracies(strategy, benchmark)
        learnt.append(now[task])
        outputs.append(logits(strategy, task, x))
        for old, output in enumerate(outputs):
            assert torch.equal(logits(strategy, old, x), output), f"task {old} after task {task}"
        assert now[: task + 1] == learnt
    return strategy, benchmark, x, outputs, learnt


def accuracies(strategy: Any, benchmark: Any) -> list[float]:
    values = strategy.eval(benchmark.test_stream)
    name = "Top1_Acc_Exp/eval_phase/test_stream/Task00{0}/Exp00{0}"
    return [values[name.format(task)] for task in TASKS]


def logits_of_subnetwork(strategy: Any, task: int, x: Tensor) -> Tensor:
    return learner(strategy).subnetwork(task)(x)


OPTIMIZERS = [(torch.optim.Adam, 0.2), (torch.optim.SGD, 0.1)]


@pytest.mark.parametrize("make", [naive_with_plugin, ready_strategy])
@pytest.mark.parametrize(("optimizer", "lr"), OPTIMIZERS)
def test_packnet_scenario(
    make: Callable[..., Any], optimizer: Callable[..., torch.optim.Optimizer], lr: float
) -> None:
    strategy, benchmark, x, outputs, learnt = packnet_scenario(
        make, optimizer, lr, logits_of_subnetwork
    )
    assert learner(strategy).tasks == TASKS
    assert min(learnt) > 0

    saved = io.BytesIO()
    torch.save([strategy.model.state_dict(), learner(strategy).state_dict()], saved)
    with torch.no_grad():  # nothing shall be read from the old model from here on
        for parameter in strategy.model.parameters():
            parameter.fill_(torch.nan)
    saved.seek(0)
    model_state, learner_state = torch.load(saved)
    model = construct_model().to(strategy.device)
    missing_keys, unexpected_keys = model.load_state_dict(model_state)
    assert not missing_keys
    assert not unexpected_keys
    strategy.model = model
    learner(strategy).load_state_dict(learner_state, model)
    assert accuracies(strategy, benchmark) == learnt
    for task, output in enumerate(outputs):
        assert torch.equal(learner(strategy).subnetwork(task)(x), output)


@pytest.mark.parametrize(("optimizer", "lr"), OPTIMIZERS)
def test_packnet_scenario_finds_forgetting(
    optimizer: Callable[..., torch.optim.Optimizer], lr: float
) -> None:
    with pytest.raises(AssertionError, match="task 0 after task 1"):
        packnet_scenario(Naive, optimizer, lr, lambda strategy, _, x: strategy.model(x).detach())
