"""Tracking: the log, the view, and W&B, which must never stop a training."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import cell as cells
from benchmarks.data import load
from benchmarks.methods import METHODS
from benchmarks.quickstart import Quickstart
from benchmarks.tracking import Log, Mirror, Tracker, View, logged_in, sync_command

START = {
    "event": "start",
    "cell": "quickstart clnp seed 0",
    "hash": "ab" * 32,
    "config": {"experiment": {"name": "quickstart"}},
    "tasks": 2,
    "learnt": 0,
    "epoch": None,
    "ignored": None,
}
EPOCH = {
    "event": "epoch",
    "task": 0,
    "epoch": 1,
    "epochs": 3,
    "loss": 0.25,
    "validation": 0.75,
    "candidate": None,
    "seconds": 1.0,
}
TASK = {
    "event": "task",
    "task": 1,
    "accuracy": {"validation": [0.5, 0.75], "test": [0.5, 1.0]},
    "capacity": [{"layer": "fc1", "used": 3, "new": 1, "reused": 2, "free": 7}],
    "sufficiency": [{"layer": "fc1", "new": 1, "old_only": None, "new_only": None}],
    "reused_ablation": None,
    "seconds": 2.0,
}
END = {
    "event": "end",
    "accuracy": {"validation": [[0.5, None], [0.5, 0.75]], "test": [[0.5, None], [0.5, 1.0]]},
    "logit_drift": [0.0, 0.0],
}


def wandb_records(path: Path) -> Iterator[Any]:
    """Read a W&B run file: a LevelDB log of protocol buffers (shared/avalanche.md)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:  # the end of a block has no room for a header
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def wait_for_the_end(path: Path, seconds: float = 60) -> None:
    """Wait until W&B's own process has written all: on a busy machine finish() returns before."""
    end = time.monotonic() + seconds
    while not any(record.HasField("exit") for record in wandb_records(path)):
        assert time.monotonic() < end, f"{path} has no end"
        time.sleep(0.1)


def history(path: Path) -> dict[str, list[Any]]:
    """Return all values of each metric in a W&B run file."""
    found: dict[str, list[Any]] = {}
    for record in wandb_records(path):
        for item in record.history.item:
            key = item.key or "/".join(item.nested_key)
            found.setdefault(key, []).append(json.loads(item.value_json))
    return found


def test_offline_run_file_holds_the_cell(tmp_path: Path) -> None:
    experiment = Quickstart(tasks=2, epochs=2, hidden=(40, 40), batch_size=128)
    images = load("digits")
    cell = cells.Cell(experiment, METHODS["clnp"], 0, images.fingerprint)
    with View(1, Console(file=io.StringIO())) as view:
        tracker = Tracker(cell.name, tmp_path, "offline", view.announce)
        record = cells.run(
            cell, images, torch.device("cpu"), tmp_path, {"commit": None, "dirty": True},
            tracker.announce,
        )  # fmt: skip
        tracker.close()
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    wait_for_the_end(path)
    mirrored = history(path)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    epochs = [event for event in log if event["event"] == "epoch"]
    assert mirrored["epoch/loss"] == [event["loss"] for event in epochs]
    assert mirrored["epoch/validation"] == [event["validation"] for event in epochs]
    assert len(epochs) == 4
    assert mirrored["test/task 0"] == [row[0] for row in record["accuracy"]["test"]]
    assert mirrored["validation/task 1"] == [record["accuracy"]["validation"][1][1]]
    used = [row["used"] for row in record["capacity"] if row["layer"] == "fc1"]
    assert mirrored["capacity/fc1/used"] == used
    for key in ("old_only", "new_only"):
        shares = [row[key] for row in record["sufficiency"] if row["layer"] == "fc2"]
        assert None not in shares
        assert mirrored[f"sufficiency/fc2/{key}"] == shares
        assert f"sufficiency/fc1/{key}" not in mirrored  # fc1 reads the input
    for key in ("accuracy", "drop", "margin", "cut"):
        assert mirrored[f"reused_ablation/{key}"] == [
            entry["reused_ablation"][key] for entry in record["history"]
        ]
    summary: dict[str, Any] = {}
    config: dict[str, Any] = {}
    for entry in wandb_records(path):
        summary |= {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in entry.summary.update
        }
        for update in (entry.run.config.update, entry.config.update):
            config |= {item.key: json.loads(item.value_json) for item in update}
    assert summary["test/accuracy"] == record["accuracy"]["test"]
    assert summary["logit_drift"] == record["logit_drift"]
    assert config["method"]["margin"] == cell.settings.margin  # type: ignore[attr-defined]
    assert config["hash"] == cell.hash


class Broken:
    """A W&B run that fails at a certain call."""

    def __init__(self, fails: str) -> None:
        self.fails = fails
        self.summary: dict[str, Any] = {}

    def log(self, _values: dict[str, Any]) -> None:
        if self.fails == "log":
            raise ConnectionError("the server is gone")

    def finish(self, exit_code: int) -> None:
        if self.fails == "finish":
            raise TimeoutError("the server is gone")


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_failure_of_wandb_is_told_once(
    fails: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def init(**_: Any) -> Broken:
        if fails == "init":
            raise RuntimeError("the server is gone")
        return Broken(fails)

    monkeypatch.setattr("wandb.init", init)
    mirror = Mirror(tmp_path, "offline")
    for event in (START, EPOCH, EPOCH, TASK):
        mirror.announce(event)
    mirror.close()
    assert capsys.readouterr().err.count("the server is gone") == 1


def test_a_server_that_is_not_to_be_reached_costs_one_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.tracking.INIT_TIMEOUT", 1.0)
    monkeypatch.setattr(Mirror, "unreachable", False)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    for name in ("a", "b"):
        folder = tmp_path / "runs" / "quickstart" / "clnp" / name
        folder.mkdir(parents=True)
        mirror = Mirror(folder, "online")
        for event in (START, EPOCH):
            mirror.announce(event)
        mirror.close()
    assert capsys.readouterr().err.count("can't be reached, runs are kept on disk") == 1
    paths = sorted(tmp_path.rglob("offline-run-*/run-*.wandb"))
    assert len(paths) == 2
    for path in paths:
        wait_for_the_end(path)
        assert history(path)["epoch/loss"] == [EPOCH["loss"]]
    folders = [path.parents[2] for path in paths]
    where = f"{tmp_path}/runs/quickstart/clnp/*/wandb/offline-run-*"
    assert sync_command(folders) == f"wandb sync {where}"
    for path in paths:
        path.with_name(f"{path.name}.synced").touch()
    assert sync_command(folders) is None
    # The key stands in nothing that is kept.
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if b"0123456789" * 4 in path.read_bytes()]


def test_a_folder_that_wandb_cannot_write_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wandb").write_text("no folder")
    mirror = Mirror(tmp_path, "offline")
    for event in (START, EPOCH, TASK):
        mirror.announce(event)
    mirror.close()
    assert capsys.readouterr().err.count("W&B is off for this cell") == 1


KILLED = """
import sys
from pathlib import Path
import psutil
from benchmarks.tracking import Mirror
start, epoch = eval(sys.argv[2])
mirror = Mirror(Path(sys.argv[1]), "offline")
mirror.announce(start)
core = [p for p in psutil.Process().children() if "wandb-core" in " ".join(p.cmdline())]
assert core
for process in core:
    process.kill()
for _ in range(50):
    mirror.announce(epoch)
mirror.close()
print("went on")
"""


def test_training_goes_on_when_wandbs_process_is_killed(tmp_path: Path) -> None:
    events = repr((START, EPOCH))
    command = [sys.executable, "-c", KILLED, str(tmp_path), events]
    # With this variable it would share the process of other tests in this one.
    own = {k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=own)
    assert done.returncode == 0, done.stderr
    assert "went on" in done.stdout
    assert done.stderr.count("W&B is off for this cell") <= 1


@pytest.mark.parametrize(
    ("environment", "mode", "expected"),
    [
        ({}, "auto", "offline"),
        ({"WANDB_API_KEY": "x"}, "auto", "online"),
        ({"WANDB_API_KEY": "x", "WANDB_MODE": "offline"}, "auto", "offline"),
        ({"WANDB_API_KEY": "x", "WANDB_MODE": "offline"}, "online", "online"),
        ({"WANDB_API_KEY": "x"}, "disabled", "disabled"),
    ],
)
def test_auto_is_online_only_when_logged_in(
    environment: dict[str, str],
    mode: Any,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(Mirror, "unreachable", False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Mirror(tmp_path, mode).mode == expected


@pytest.mark.parametrize("environment", [{}, {"WANDB_MODE": "online"}])
def test_online_without_a_login_waits_for_nobody(
    environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(Mirror, "unreachable", False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    mode: Any = "auto" if environment else "online"
    assert [Mirror(tmp_path, mode).mode for _ in range(2)] == ["offline"] * 2
    assert capsys.readouterr().err.count("Not logged in to W&B") == 1


def test_a_netrc_entry_is_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(file))
    assert not logged_in()
    file.write_text("machine example.org login user password x\n")
    file.chmod(0o600)
    assert not logged_in()
    file.write_text("machine api.wandb.ai login user password x\n")
    assert logged_in()


def test_a_resumed_cell_goes_on_in_its_wandb_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids: list[str] = []

    def init(**options: Any) -> Broken:
        ids.append(options["id"])
        return Broken("nothing")

    monkeypatch.setattr("wandb.init", init)
    for learnt, epoch in ((0, None), (0, 3), (1, None), (0, None)):
        start = {**START, "learnt": learnt, "epoch": epoch}
        Mirror(tmp_path, "offline").announce(start)
    assert ids[0] == ids[1] == ids[2] != ids[3]


def test_log_is_a_line_an_event_and_appended(tmp_path: Path) -> None:
    for events in ((START, EPOCH), (END,)):
        log = Log(tmp_path / "cell")
        for event in events:
            log.announce(event)
        log.close()
    lines = [json.loads(line) for line in (tmp_path / "cell/log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "epoch", "end"]
    assert all(line["time"] > 1.7e9 for line in lines)
    assert {key: lines[1][key] for key in EPOCH} == EPOCH


def shown(terminal: bool, *events: dict[str, Any]) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=200)
    with View(2, console) as view:
        for event in events:
            view.announce(event.get("cell", START["cell"]), event)
        view.progress.refresh()
    return file.getvalue()


def test_view_prints_lines_where_there_is_no_terminal() -> None:
    text = shown(False, {**START, "learnt": 1, "ignored": "state.pt is not used"}, EPOCH, TASK, END)
    assert text.splitlines() == [
        "quickstart clnp seed 0: state.pt is not used",
        "quickstart clnp seed 0: going on after task 1/2",
        "quickstart clnp seed 0: task 2/2 in 2 s, test 100.00 %, mean of the learnt 75.00 %",
    ]


def test_view_tells_epochs_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.tracking.LINE_EVERY", -1.0)
    text = shown(False, START, EPOCH, {**EPOCH, "validation": None})
    assert "task 1/2 epoch 2/3 loss 0.2500 validation 75.00 %\n" in text
    assert "loss 0.2500\n" in text
    assert "task 1/2 candidate 3 epoch" in shown(False, START, {**EPOCH, "candidate": 3})


def test_view_shows_bars_on_a_terminal() -> None:
    text = shown(True, START, EPOCH)
    assert "task 1/2 epoch 2/3 loss 0.2500 validation 75.00 %" in text
    assert "0/2" in text


def test_view_counts_failed_cells() -> None:
    failed = {"event": "failed", "cell": "quickstart clnp seed 1", "error": "RuntimeError: no"}
    text = shown(False, START, END, failed)
    assert "quickstart clnp seed 1 failed: RuntimeError: no" in text
    assert "1/2" not in text
    assert "2/2" in shown(True, START, END, failed)
