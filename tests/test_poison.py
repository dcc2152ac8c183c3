"""No choice of any method depends on a test label: other labels change the test accuracy alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cell as cells
from benchmarks.cell import Cell
from benchmarks.data import Images, load
from benchmarks.experiment import Experiment, canonical
from benchmarks.learners import Learner, Settings, Setup
from benchmarks.methods import METHODS, Method
from benchmarks.quickstart import Quickstart
from benchmarks.resume import load_state
from benchmarks.split_cifar import SplitCIFAR, SplitCIFARWide
from benchmarks.states import STATE

TINY = Quickstart(
    tasks=3, epochs=1, method_epochs=False, hidden=(40, 40), batch_size=128, validation=300
)
NARROW = SplitCIFAR(
    tasks=2, epochs=2, method_epochs=False, batch_size=64, settings=("ewc.samples=20",)
)
WIDE = SplitCIFARWide(
    tasks=2,
    epochs=2,
    method_epochs=False,
    batch_size=64,
    shrink=64,
    settings=("joint.per_task=4,4",),
)


def poisoned(images: Images) -> Images:
    """Give every test image the first class of its ten as its label.

    Even a network that takes all for one class has another accuracy then.
    """
    assert images.test_y is not None
    return dataclasses.replace(images, test_y=images.test_y // 10 * 10)


def coloured() -> Images:
    """Images of CIFAR's shape, in twenty classes."""
    generator = torch.Generator().manual_seed(0)
    templates = torch.randint(0, 200, (20, 3, 32, 32), generator=generator)

    def part(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.arange(count) % 20
        noise = torch.randint(0, 56, (count, 3, 32, 32), generator=generator)
        x = (templates[y] + noise).to(torch.uint8)
        return x.contiguous(memory_format=torch.channels_last), y

    return Images("made", *part(240), *part(100), fingerprint="0" * 64, classes=20)


def timeless(value: Any) -> Any:
    """Leave out times, which no two runs share, however deep they lie."""
    if isinstance(value, dict):
        return {key: timeless(v) for key, v in value.items() if not str(key).endswith("seconds")}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def trained(
    method: Method[Any], images: Images, folder: Path, experiment: Experiment = TINY
) -> tuple[list[Any], str, dict[str, Any]]:
    """Return the test accuracy, all else in the record, and the state after the last task."""
    cell = Cell(experiment, method, 0, images.fingerprint)
    git = {"commit": None, "dirty": True}
    record = cells.run(cell, images, torch.device("cpu"), folder, git, lambda event: None)
    test = record["accuracy"].pop("test")
    state = load_state(folder / STATE, cell.hash)
    return test, canonical(timeless(json.loads(json.dumps(record)))), timeless(state["learner"])


def same(one: Any, other: Any) -> bool:
    """Compare states bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def differences(
    method: Method[Any],
    tmp_path: Path,
    experiment: Experiment = TINY,
    images: Images | None = None,
) -> set[str]:
    """Return what other test labels change."""
    images = images or load("digits")
    accuracy, rest, state = trained(method, images, tmp_path / "real", experiment)
    other_accuracy, other_rest, other_state = trained(
        method, poisoned(images), tmp_path / "fake", experiment
    )
    changed = {
        "test accuracy": accuracy == other_accuracy,
        "record": rest == other_rest,
        "state": same(state, other_state),
    }
    return {name for name, equal in changed.items() if not equal}


@pytest.mark.parametrize(
    "method", [name for name, method in METHODS.items() if "quickstart" in method.settings]
)
def test_labels_of_test_images_change_the_test_accuracy_alone(method: str, tmp_path: Path) -> None:
    assert differences(METHODS[method], tmp_path) == {"test accuracy"}


@pytest.mark.parametrize(
    "changes",
    [
        {"keep_epoch": "latest-within-margin", "epochs": 3},
        {"grid_l1": ((1e-4,), (1e-3,)), "grid_lr": (0.002, 0.004), "grid_tasks": "each"},
        {"finetune_epochs": 1, "margin": 0.05},
    ],
    ids=["kept epoch", "grid", "fine-tuning"],
)
def test_nor_what_clnp_chooses_in_a_task(changes: dict[str, Any], tmp_path: Path) -> None:
    clnp = METHODS["clnp"]
    settings = dataclasses.replace(clnp.settings["quickstart"], **changes)
    method = dataclasses.replace(clnp, settings={"quickstart": settings})
    assert differences(method, tmp_path) == {"test accuracy"}


@pytest.mark.parametrize("method", ["finetune", "joint", "single_task", "superposition"])
def test_nor_which_epoch_is_kept(method: str, tmp_path: Path) -> None:
    found = METHODS[method]
    settings = dataclasses.replace(found.settings["quickstart"], early_stopping=True, epochs=3)
    made = dataclasses.replace(found, settings={"quickstart": settings})
    assert differences(made, tmp_path) == {"test accuracy"}


@pytest.mark.parametrize(
    ("experiment", "method"),
    [(e, name) for e in (NARROW, WIDE) for name, m in METHODS.items() if e.preset in m.settings],
    ids=lambda value: value if isinstance(value, str) else value.preset,
)
def test_nor_anything_on_coloured_images(
    experiment: Experiment, method: str, tmp_path: Path
) -> None:
    """With heads a task, the parts of a joint head, norms a task, grids and early stopping."""
    found = differences(METHODS[method], tmp_path, experiment, coloured())
    assert found == {"test accuracy"}


class Cheat(Learner):
    """Trains each task once more if the test labels like the first attempt little."""

    stream: Any

    def train(self, experience: Any) -> None:
        super().train(experience)
        row = cells.measure(self.strategy, self.stream, 1)
        if row[0] is not None and row[0] < 0.2:
            super().train(experience)


def test_a_method_that_looks_at_test_labels_is_caught(tmp_path: Path) -> None:
    def build(setup: Setup, settings: Settings) -> Learner:
        learner = Cheat(setup.strategy(settings), settings)
        learner.stream = setup.scenario.streams["test"]
        return learner

    cheat = Method("cheat", build, {"quickstart": Settings(lr=0.004)}, task_id_at_test=False)
    assert differences(cheat, tmp_path) == {"test accuracy", "record", "state"}
