"""`python -m benchmarks status` and `doctor`: what they find, and what they say to do."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cell as cells
from benchmarks import data, doctor, records, status
from benchmarks.__main__ import experiments, main
from benchmarks.cell import Cell
from benchmarks.data import load
from benchmarks.errors import UserError
from benchmarks.learners import Settings
from benchmarks.locks import claimed
from benchmarks.methods import METHODS
from benchmarks.quickstart import Quickstart
from benchmarks.runner import Places, Work, run_cells
from benchmarks.tracking import Tracker, View

TINY = Quickstart(tasks=3, epochs=2, method_epochs=False, hidden=(20, 20), validation=300)
GIT = {"commit": "0" * 40, "dirty": False}
CPU = torch.device("cpu")


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path / "records", tmp_path / "runs")


@pytest.fixture
def cell() -> Cell:
    return Cell(TINY, METHODS["finetune"], 0, data.content("digits"))


def run(cell: Cell, places: Places) -> int:
    return run_cells(
        *([cell], load("digits"), CPU, Work(places.runs, GIT)),
        lambda cell, record: records.write(cell.record_path(places.records), record),
    )


def stop_after(cell: Cell, places: Places, kind: str, task: int) -> None:
    """Run a cell with its log, and end it as SIGKILL would: nothing is closed in order."""
    folder = cell.run_dir(places.runs)
    with View(1) as view:
        tracker = Tracker(cell.name, folder, "disabled", view.announce)

        def announce(event: dict[str, Any]) -> None:
            tracker.announce(event)
            if event["event"] == kind and event["task"] == task:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            cells.run(cell, load("digits"), CPU, folder, GIT, announce)
        tracker.close()


def state(cell: Cell, places: Places) -> status.State:
    return status.state(cell, places, time.time())


def test_content_is_the_fingerprint_of_what_is_loaded() -> None:
    assert data.content("digits") == load("digits").fingerprint
    assert data.content("cifar10+cifar100") == data._joint(
        [data.content("cifar10"), data.content("cifar100")]
    )
    with pytest.raises(UserError, match="unknown data set"):
        data.content("digitz")


def test_a_cell_from_missing_to_recorded(cell: Cell, places: Places) -> None:
    assert state(cell, places).word == "missing"
    stop_after(cell, places, "task", 1)
    stopped = state(cell, places)
    assert (stopped.word, stopped.detail) == ("stopped", "after task 2; run it to go on")
    with claimed(cell.run_dir(places.runs)):
        running = state(cell, places)
    assert running.word == "running"
    assert "task 2/3 epoch 2/2, expected end" in running.detail
    assert run(cell, places) == 0
    recorded = state(cell, places)
    assert recorded.word == "recorded"
    final = records.read(cell.record_path(places.records))["accuracy"]["test"][-1]
    assert recorded.detail == f"{100 * sum(final) / 3:.2f} %"


def test_a_cell_stopped_within_a_task_is_stopped(cell: Cell, places: Places, steps: Any) -> None:
    stop_after(cell, places, "task", 0)
    steps.count, folder = 0, cell.run_dir(places.runs)
    with View(1) as view, steps.stopping(4):
        tracker = Tracker(cell.name, folder, "disabled", view.announce)
        with pytest.raises(KeyboardInterrupt):
            cells.run(cell, load("digits"), CPU, folder, GIT, tracker.announce)
        tracker.close()
    assert state(cell, places).detail == "in task 2; run it to go on"


def test_a_failed_cell_tells_why(places: Places) -> None:
    method = dataclasses.replace(METHODS["finetune"], settings={"quickstart": Settings(lr=1e38)})
    cell = Cell(TINY, method, 0, data.content("digits"))
    assert run(cell, places) == 1
    failed = state(cell, places)
    assert failed.word == "failed"
    assert "FloatingPointError" in failed.detail
    assert "traceback.txt" in failed.detail


def test_a_record_of_another_meaning_is_stale(cell: Cell, places: Places) -> None:
    assert run(cell, places) == 0
    path = cell.record_path(places.records)
    path.write_text(path.read_text()[:-100])
    stale = state(cell, places)
    assert stale.word == "stale"
    assert "damaged" in stale.detail


def test_expected_end_is_by_the_pace_since_the_start() -> None:
    start = {"time": 1000.0, "event": "start", "tasks": 4, "learnt": 1}
    epoch = {"time": 1100.0, "event": "epoch", "task": 1, "epoch": 4, "epochs": 10}
    # Half a task in 100 s, so 2.5 tasks more take 500 s.
    end = time.strftime("%d %b %H:%M", time.localtime(1600))
    assert status._progress([start, epoch], 0) == f", task 2/4 epoch 5/10, expected end {end}"
    # It went on after the second epoch: three in 100 s, so 25 more take 833 s.
    again = start | {"epoch": 2}
    end = time.strftime("%d %b %H:%M", time.localtime(1100 + 2500 / 3))
    assert status._progress([again, epoch], 0).endswith(end)
    # Joint training begins with the last task: half of it in 100 s.
    last = epoch | {"task": 3}
    end = time.strftime("%d %b %H:%M", time.localtime(1200))
    assert status._progress([start | {"learnt": 0}, last], 0).endswith(end)
    # Another candidate of a search is at its beginning.
    assert status._progress([again, epoch, epoch | {"epoch": 0}], 0) == ", task 2/4 epoch 1/10"
    assert status._progress([start], 0) == ", no epoch yet"
    assert status._progress([], 0) == ", no epoch yet"


def test_a_log_counts_from_its_last_start_and_forgives_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    events = [{"event": "start"}, {"event": "epoch"}, {"event": "start"}, {"event": "task"}]
    path.write_text("\n".join(map(json.dumps, events)) + '\n{"event": "ep')
    assert [event["event"] for event in status._events(path)] == ["start", "task"]
    assert status._events(tmp_path / "none") == []


def test_status_as_a_user_types_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = [f"--records-dir={tmp_path / 'records'}", f"--runs-dir={tmp_path / 'runs'}"]
    assert main(["status", "quickstart", "--methods", "clnp", "si", "--seeds", "0", *places]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "quickstart: 2 missing",
        "clnp  seed 0  missing",
        "si    seed 0  missing",
    ]
    assert main(["status", "quickstrat", *places]) == 2
    assert "Did you mean 'quickstart'" in capsys.readouterr().err


# --- doctor ---------------------------------------------------------------------------------------


def words(findings: Any) -> list[str]:
    return [finding.word for finding in findings]


def test_versions_are_compared_with_the_constraints(tmp_path: Path) -> None:
    path = tmp_path / "constraints.txt"
    installed = torch.__version__.partition("+")[0]
    path.write_text(f"# pinned\ntorch=={installed}\nno-such-package==1.0\n")
    assert words(doctor.environment(path)) == ["ok"]
    path.write_text("torch==0.0.1\n")
    (finding,) = doctor.environment(path)
    assert finding.word == "warning"
    assert "torch" in finding.text
    assert "0.0.1" in finding.text
    assert words(doctor.environment(tmp_path / "none")) == ["warning"]


def test_missing_data_warn_and_damaged_data_are_wrong(tmp_path: Path) -> None:
    assert words(doctor.data_sets(["digits", "mnist"], tmp_path)) == ["ok", "warning"]
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(b"no images")
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"no labels")
    (finding,) = doctor.data_sets(["mnist"], tmp_path)
    assert finding.word == "wrong"
    assert "nox -s prepare" in finding.text


def test_folders_must_be_writable_and_roomy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    assert words(doctor.disk([tmp_path, tmp_path / "file" / "folder"])) == ["ok", "wrong"]
    monkeypatch.setattr(doctor, "SPACE", 2**62)
    assert words(doctor.disk([tmp_path])) == ["warning"]


def test_records_are_held_to_todays_meaning(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = Cell(Quickstart(), METHODS["finetune"], 0, data.content("digits"))
    made = dataclasses.replace(TINY)
    record = cells.run(
        Cell(made, METHODS["finetune"], 0, data.content("digits")),
        *(load("digits"), CPU, places.runs, GIT, lambda event: None),
    )
    record |= {"experiment": "quickstart", "hash": cell.hash, "config": cell.config}
    path = cell.record_path(places.records)

    def findings() -> list[doctor.Finding]:
        return list(doctor.kept(places.records, experiments(), data.content))

    records.write(path, record)
    assert words(findings()) == ["ok"]
    assert "1 records" in findings()[0].text
    records.write(path, record | {"git": {"commit": None, "dirty": True}})
    assert words(findings()) == ["warning", "ok"]
    # A default that has changed since.
    config = json.loads(json.dumps(cell.config))
    config["method"]["decay_from"] = 0.123
    records.write(path, record | {"config": config})
    first, _ = findings()
    assert first.word == "wrong"
    assert "decay_from: recorded 0.123" in first.text
    # A preset that has changed since.
    records.write(path, record)
    changed = dataclasses.replace(METHODS["finetune"], settings={"quickstart": Settings(lr=0.1)})
    monkeypatch.setitem(METHODS, "finetune", changed)
    assert "another hash" in findings()[0].text
    without = dataclasses.replace(METHODS["finetune"], settings={"pmnist": Settings()})
    monkeypatch.setitem(METHODS, "finetune", without)
    assert "has no settings there" in findings()[0].text
    path.write_text("{")
    assert "damaged" in findings()[0].text


def test_a_cpu_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CXX", sys.executable)  # refuses what a compiler takes
    first, second = doctor.devices()
    assert (first.word, second.word) == ("ok", "warning")
    assert f"{sys.executable} fails" in second.text
    monkeypatch.setattr(doctor, "compile_one_pass", lambda: None)
    assert words(doctor.devices()) == ["ok"]


def test_doctor_as_a_user_types_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret-of-nobody")
    options = [
        *(f"--data-dir={tmp_path}", f"--records-dir={tmp_path / 'records'}"),
        *(f"--tuning-dir={tmp_path / 'tuning'}", f"--runs-dir={tmp_path / 'runs'}"),
    ]
    assert main(["doctor", *options]) == 0
    told = capsys.readouterr().out
    assert "mnist is not in" in told
    assert "secret-of-nobody" not in told
    path = tmp_path / "records" / "pmnist" / "clnp" / "seed0-00000000.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    assert main(["doctor", *options]) == 1
    assert "wrong    " in capsys.readouterr().out
