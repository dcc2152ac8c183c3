"""No choice of any method depends on the test set: with wrong test labels all else is the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cell as cells
from benchmarks.cell import Cell
from benchmarks.data import Images, load
from benchmarks.methods import METHODS
from benchmarks.quickstart import Quickstart

TINY = Quickstart(tasks=2, epochs=2, method_epochs=False, hidden=(40, 40), batch_size=128)


def record(method: str, images: Images, folder: Path) -> dict[str, Any]:
    cell = Cell(TINY, METHODS[method], 100, images.fingerprint)
    git = {"commit": None, "dirty": True}
    made = cells.run(cell, images, torch.device("cpu"), folder, git, lambda _: None)
    made.pop("seconds")
    return made


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if "seconds" not in k}
    if isinstance(value, list):
        return [without_times(item) for item in value]
    return value


@pytest.mark.parametrize("method", sorted(METHODS))
def test_poisoned_test_labels_change_the_test_accuracies_alone(method: str, tmp_path: Path) -> None:
    images = load("digits")
    assert images.test_y is not None
    poisoned = dataclasses.replace(images, test_y=(images.test_y + 1) % 10)
    clean = record(method, images, tmp_path / "clean")
    wrong = record(method, poisoned, tmp_path / "poisoned")
    assert clean["accuracy"].pop("test") != wrong["accuracy"].pop("test")
    assert without_times(clean) == without_times(wrong)
