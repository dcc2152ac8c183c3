"""Joint training: batches over several tasks' resident data, and a record of one last row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.benchmarks.utils.utils import concat_datasets
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import cell as cells
from benchmarks import records
from benchmarks.cell import Cell
from benchmarks.data import load
from benchmarks.methods import METHODS
from benchmarks.quickstart import Quickstart
from benchmarks.reporting.load import decode
from benchmarks.reporting.stats import backward_transfer, mean_accuracy
from benchmarks.scenarios import JointLoader, plan_epoch, resident_parts, resident_view

TINY = Quickstart(tasks=3, epochs=4, method_epochs=False, hidden=(60, 60), batch_size=128)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(1, 40), st.integers(0, 9))
def test_an_epoch_serves_each_sample_once(sizes: list[int], batch: int, seed: int) -> None:
    orders, counts = plan_epoch(sizes, batch, torch.Generator().manual_seed(seed))
    assert [sorted(order.tolist()) for order in orders] == [list(range(size)) for size in sizes]
    assert [sum(taken) for taken in counts[:-1]] == [batch] * (len(counts) - 1)
    assert [sum(column) for column in zip(*counts, strict=True)] == sizes


def test_composition_of_appendix_a() -> None:
    """50 samples of the first task and 10 of each other, until the small sets run out."""
    generator = torch.Generator().manual_seed(0)
    orders, counts = plan_epoch([500, 45, 60], 1, generator, per_task=[50, 10, 10])
    assert counts == [[50, 10, 10]] * 4
    assert [len(order) for order in orders] == [200, 40, 40]
    assert all(len(set(order.tolist())) == len(order) for order in orders)


def joined(tasks: int = 3) -> tuple[Any, list[Any]]:
    scenario = TINY.scenario(load("digits"), 100)
    datasets = [e.dataset for e in scenario.streams["train"][:tasks]]
    return concat_datasets(datasets), datasets


def test_joined_data_are_those_of_the_stock_data_set() -> None:
    dataset, alone = joined()
    assert resident_view(dataset) is None
    parts = resident_parts(dataset)
    assert parts is not None
    assert [part.task for part, _ in parts] == [0, 1, 2]
    loader = JointLoader(parts, 500)
    batches = list(loader)
    assert len(batches) == len(loader) == -(-len(dataset) // 500)
    x, y, task = (torch.cat(values) for values in zip(*batches, strict=True))
    for index in (0, 1, len(alone[0]), len(dataset) - 1):
        sample, label, of = dataset[index]
        assert torch.equal(x[index], sample)
        assert (int(y[index]), int(task[index])) == (label, of)


def test_a_subset_of_joined_data_is_served_by_index() -> None:
    dataset, alone = joined()
    chosen = [3, 5, len(alone[0]) + 7, len(dataset) - 1]
    parts = resident_parts(dataset.subset(chosen))
    assert parts is not None
    x = next(iter(JointLoader(parts, 10)))[0]
    assert torch.equal(x, torch.stack([dataset[index][0] for index in chosen]))


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Any:
    images = load("digits")
    cell = Cell(TINY, METHODS["joint"], 100, images.fingerprint)
    git = {"commit": None, "dirty": True}
    folder = tmp_path_factory.mktemp("joint")
    return cells.run(cell, images, torch.device("cpu"), folder, git, lambda _: None)


def test_record_has_one_row(record: Any, tmp_path: Path) -> None:
    matrix = record["accuracy"]["test"]
    assert matrix[:2] == [[None] * 3] * 2
    assert all(value > 0.6 for value in matrix[2])
    assert record["logit_drift"] == [None] * 3
    records.write(tmp_path / "seed100.json", record)
    cell = decode(record)
    assert mean_accuracy(cell.test) > 60
    assert backward_transfer(cell.test) != backward_transfer(cell.test)  # not a number


def test_interrupted_and_resumed_it_is_the_same(record: Any, tmp_path: Path) -> None:
    images = load("digits")
    cell = Cell(TINY, METHODS["joint"], 100, images.fingerprint)

    class Stop(Exception):
        pass

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "task" and event["task"] == 1:
            raise Stop

    git = {"commit": None, "dirty": True}
    with pytest.raises(Stop):
        cells.run(cell, images, torch.device("cpu"), tmp_path, git, stop)
    again = cells.run(cell, images, torch.device("cpu"), tmp_path, git, lambda _: None)
    assert again["accuracy"] == record["accuracy"]
