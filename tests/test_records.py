"""Records: written whole or not at all, and never read when something is wrong with them."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import records
from benchmarks.errors import UserError

HASH = "ab" * 32
RECORD: dict[str, Any] = {
    "experiment": "pmnist",
    "method": "made",
    "seed": 3,
    "hash": HASH,
    "config": {"experiment": {}, "method": {"lr": 0.1}, "revision": 1, "data": {}},
    "accuracy": {
        "validation": [[0.5, None], [0.25, 1.0]],
        "test": [[0.5, None], [0.25, 1]],
    },
    "capacity": [],
    "logit_drift": [0.5, 0.0],
    "parameters": {"trainable": 10, "stored": 20},
    "task_id_at_test": False,
    "seconds": {"train": 1.5, "total": 2.0, "tasks": [1.0, 1.0]},
    "environment": {},
    "git": {"commit": None, "dirty": True},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = records.path_of(tmp_path, "pmnist", "made", 3, HASH)
    records.write(path, RECORD)
    return path


def test_round_trip(path: Path, tmp_path: Path) -> None:
    assert path == tmp_path / "pmnist" / "made" / "seed3-abababab.json"
    read = records.read(path)
    assert {key: read[key] for key in RECORD} == RECORD
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


@given(st.integers(min_value=0), st.integers(0, 7))
def test_flipped_bits_never_pass_for_another_result(
    tmp_path_factory: pytest.TempPathFactory, place: int, bit: int
) -> None:
    path = records.path_of(tmp_path_factory.mktemp("records"), "pmnist", "made", 3, HASH)
    records.write(path, RECORD)
    before = records.read(path)
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << bit
    path.write_bytes(data)
    with contextlib.suppress(UserError):
        after = records.read(path)
        # A flipped space between tokens, or the checksum's own name: no number has changed.
        assert {key: after[key] for key in RECORD} == {key: before[key] for key in RECORD}


@given(st.integers(min_value=0))
def test_cut_records_are_named(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    path = records.path_of(tmp_path_factory.mktemp("records"), "pmnist", "made", 3, HASH)
    records.write(path, RECORD)
    data = path.read_bytes()
    path.write_bytes(data[: length % (len(data) - 1)])
    with pytest.raises(UserError, match="damaged"):
        records.read(path)


def test_a_record_under_another_name_is_refused(path: Path) -> None:
    moved = path.with_name("seed4-abababab.json")
    path.rename(moved)
    with pytest.raises(UserError, match="seed3-abababab"):
        records.read(moved)


def broken(**changes: Any) -> dict[str, Any]:
    record = copy.deepcopy(RECORD)
    for key, value in changes.items():
        record[key] = value
    return record


def matrices(test: Any) -> dict[str, Any]:
    return broken(accuracy={"validation": [[0.5, None], [0.25, 1.0]], "test": test})


@pytest.mark.parametrize(
    ("record", "names"),
    [
        ([], "object"),
        ({key: value for key, value in RECORD.items() if key != "git"}, "git"),
        (broken(seed="3"), "seed"),
        (broken(accuracy={"test": [[1.0]]}), "accuracy"),
        (broken(config={}), "config"),
        (matrices([]), "test"),
        (matrices([[0.5], [0.5, 0.5]]), "row 0"),
        (matrices([[0.5, 0.5], [0.5, 0.5]]), "task 1 after task 0"),
        (matrices([[0.5, None], [98.4, 0.5]]), "98.4"),
        (matrices([[0.5, None], [True, 0.5]]), "True"),
        (matrices([[0.5, None], ["0.5", 0.5]]), "0.5"),
    ],
)
def test_problem_names_the_field(record: Any, names: str) -> None:
    problem = records.problem(record)
    assert problem is not None
    assert names in problem


def test_no_half_file_when_the_disk_fails(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def full(_file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("benchmarks.records.os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        records.write(path, broken(seconds={"train": 9.0}))
    assert path.read_bytes() == before
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


def test_a_broken_record_is_never_written(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(ValueError, match="98"):
        records.write(path, matrices([[0.5, None], [98.4, 0.5]]))
    with pytest.raises(ValueError, match="JSON"):
        records.write(path, matrices([[0.5, None], [float("nan"), 0.5]]))
    assert path.read_bytes() == before


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        records.check_writable(tmp_path / "file" / "records")
    records.check_writable(tmp_path / "records")
    assert list((tmp_path / "records").iterdir()) == []


def test_disagreements_name_the_fields() -> None:
    recorded = {"method": {"lr": 0.1, "gone": 1}, "revision": 1}
    today = {"method": {"lr": 0.2, "new": 2}, "revision": 1}
    assert records.disagreements(recorded, today) == ["method.lr: recorded 0.1, now 0.2"]
    assert records.disagreements(json.loads(json.dumps(today)), today) == []
