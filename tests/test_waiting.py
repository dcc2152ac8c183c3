"""No training step asks its device for a number: on a GPU the host would wait for the answer.

Seen on a CPU, by the calls that read values: copies between devices are not.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.models.packnet import PackNetModel as StockPackNetModel
from avalanche.training import LearningWithoutForgetting
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.data import Images, load
from benchmarks.experiment import Experiment
from benchmarks.learners import Setup
from benchmarks.methods import METHODS
from benchmarks.quickstart import Quickstart
from benchmarks.split_cifar import SplitCIFAR, SplitCIFARWideReduced

aten = torch.ops.aten
READING = {
    aten._local_scalar_dense.default,
    aten._unique2.default,
    aten.bincount.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
}
"""Operators whose result, or its shape, the host has to know."""
INDEXING = {aten.index.Tensor, aten._index_put_impl_.default, aten.index_put_.default}
"""Operators that read a boolean index."""
CALLS = {torch.as_tensor, torch.tensor, Tensor.cpu, Tensor.numpy, Tensor.tolist}
"""Calls that copy to or from the host."""
STEPS = 9
"""Steps of an epoch, more than the questions that a method may ask once an epoch."""
EPOCHS = 2


class Questions(SupervisedPlugin):
    """Counts, within epochs, where in our code and Avalanche's the device is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.listening = False
        self.asked: defaultdict[str, set[int]] = defaultdict(set)
        """The steps in which each place has asked."""
        self.steps = 0

    def before_training_epoch(self, *_: Any, **__: Any) -> None:
        self.listening = True

    def after_training_iteration(self, *_: Any, **__: Any) -> None:
        self.steps += 1

    def after_training_epoch(self, *_: Any, **__: Any) -> None:
        self.listening = False

    def note(self, what: str) -> None:
        if self.listening:
            stack = traceback.extract_stack(limit=30)
            own = [f for f in stack if Path(f.filename).parent.name != "tests"]
            where = next(f for f in reversed(own) if "torch" not in Path(f.filename).parts)
            self.asked[f"{what} in {where.filename}:{where.lineno} {where.name}"].add(self.steps)

    @contextmanager
    def heard(self) -> Iterator[None]:
        with _Operators(self), _Calls(self):
            yield

    def of_steps(self) -> dict[str, int]:
        """Those that come in as many steps as an epoch has, or more."""
        counts = {site: len(steps) for site, steps in self.asked.items()}
        return {site: count for site, count in counts.items() if count >= STEPS}


class _Operators(TorchDispatchMode):
    def __init__(self, questions: Questions) -> None:
        super().__init__()
        self.questions = questions

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in READING or (
            func in INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])
        ):
            self.questions.note(str(func))
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    def __init__(self, questions: Questions) -> None:
        super().__init__()
        self.questions = questions

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in CALLS:
            self.questions.note(func.__name__)
        if func is Tensor.__getitem__ and any(isinstance(i, list) for i in _parts(args[1])):
            self.questions.note("an index made of a list")
        return func(*args, **(kwargs or {}))


def _parts(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def pictures() -> Images:
    """Thirty classes of noise, of CIFAR's shape."""
    generator = torch.Generator().manual_seed(0)

    def part(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return x.contiguous(memory_format=torch.channels_last), torch.arange(count) % 20

    return Images("made", *part(200), *part(40), f"{0:064x}", 20)


def questions(experiment: Experiment, method: str, images: Images) -> Questions:
    """Train two tasks, and listen."""
    heard = Questions()
    evaluator = EvaluationPlugin(loggers=[])
    cpu = torch.device("cpu")
    setup = Setup(experiment, experiment.scenario(images, 0), 0, cpu, evaluator, [heard])
    settings = METHODS[method].settings_for(experiment)
    learner = METHODS[method].build(setup, settings)
    with heard.heard():
        for experience in setup.scenario.streams["train"]:
            learner.train(experience)
    assert heard.steps >= (1 if method == "joint" else 2) * EPOCHS * STEPS
    return heard


BUDGET: dict[str, Any] = {"tasks": 2, "epochs": EPOCHS, "method_epochs": False}
QUICK = Quickstart(**BUDGET, validation=1797 - 360 - STEPS * 64, batch_size=64)
PACKNET = dataclasses.replace(QUICK, settings=("packnet.retrain=0.5",))  # steps after the cut, too
SPLIT: dict[str, Any] = BUDGET | {"validation": 0.1, "batch_size": 10}
NARROW = SplitCIFAR(**SPLIT)
WIDE = SplitCIFARWideReduced(**SPLIT, images=None, shrink=32)
JOINT = dataclasses.replace(WIDE, settings=("joint.per_task=10,10",))


@pytest.mark.parametrize(
    "method", [name for name, m in METHODS.items() if QUICK.preset in m.settings]
)
def test_no_step_of_a_permuted_stream_asks_the_device(method: str) -> None:
    experiment = PACKNET if method == "packnet" else QUICK
    assert questions(experiment, method, load("digits")).of_steps() == {}


@pytest.mark.parametrize(
    ("experiment", "method"),
    [
        *((NARROW, method) for method in ("clnp_m4_ft", "si", "ewc", "hat")),
        *((WIDE, method) for method in ("clnp_m2", "superposition")),
        (JOINT, "joint"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.preset,
)
def test_no_step_of_a_split_stream_asks_the_device(experiment: Experiment, method: str) -> None:
    assert questions(experiment, method, pictures()).of_steps() == {}


@pytest.mark.parametrize(
    ("method", "name", "stock", "where"),
    [
        # It looks up in each forward pass which task is in use.
        ("packnet", "benchmarks.methods.PackNetModel", StockPackNetModel, "packnet.py"),
        # It picks the old classes by a list.
        ("lwf", "baselines.lwf._Distillation", LearningWithoutForgetting, "regularization.py"),
    ],
)
def test_questions_are_heard(
    method: str, name: str, stock: Any, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Avalanche's own ask."""
    monkeypatch.setattr(name, stock)
    found = questions(QUICK, method, load("digits")).of_steps()
    assert any(where in site for site in found)
