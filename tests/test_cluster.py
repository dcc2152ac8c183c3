"""Cells at once on Ray: the same records, whatever dies meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks import cluster, tune
from benchmarks.__main__ import main
from benchmarks.cell import Cell
from benchmarks.cluster import Needs, Parallel, resources
from benchmarks.errors import UserError
from benchmarks.methods import METHODS as REGISTRY
from benchmarks.quickstart import Quickstart
from benchmarks.runner import Failure, Places, Work, plan, run_grid

ray = pytest.importorskip("ray", reason="the extra [cluster] isn't installed")

TINY = Quickstart(
    tasks=3, epochs=2, method_epochs=False, hidden=(40, 40), batch_size=128, validation=300
)
METHODS = ["clnp", "ewc", "si", "superposition"]


def run(
    folder: Path, grid: Sequence[Cell], parallel: Parallel | None, save_every: float = 0.01
) -> int:
    places = Places(folder / "records", folder / "runs")
    device = torch.device("cpu")
    return run_grid(grid, places, device, "disabled", save_every=save_every, parallel=parallel)


def records_of(folder: Path) -> dict[str, Any]:
    """Return all records by name, without times and their checksum."""
    found = {}
    for path in (folder / "records").rglob("*.json"):
        record = json.loads(path.read_text())
        rows = [
            {k: v for k, v in row.items() if not k.endswith("_seconds")} for row in record["search"]
        ]
        kept = {k: v for k, v in record.items() if k not in ("seconds", "checksum")}
        found[f"{path.parent.name}/{path.name}"] = kept | {"search": rows}
    return found


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A cluster of two nodes on this machine, each with a core."""
    from ray.cluster_utils import Cluster

    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_worker_niceness", "0")
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    head = {"num_cpus": 1, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=head)
    made.add_node(num_cpus=1)
    ray.init(address=made.address, log_to_driver=False, configure_logging=False)
    yield made
    ray.shutdown()
    made.shutdown()
    patch.undo()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The records of cells that ran one after another in this process."""
    folder = tmp_path_factory.mktemp("alone")
    assert run(folder, plan(TINY, METHODS, [0, 1]), None) == 0
    return records_of(folder)


def test_cells_at_once_leave_the_same_records(
    nodes: Any, alone: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, plan(TINY, METHODS, [0, 1]), Parallel(workers=2, device="cpu")) == 0
    assert records_of(tmp_path) == alone
    out = capsys.readouterr().out
    for method in METHODS:
        assert f"{method} seed 1: task 3/3" in out
    left = [path.name for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert not [name for name in left if name.endswith((".pt", "tmp", "owner.json"))]
    # Nothing is run twice.
    assert run(tmp_path, plan(TINY, METHODS, [0, 1]), Parallel(workers=2, device="cpu")) == 0
    assert "8 of them recorded already" in capsys.readouterr().out


def workers() -> list[int]:
    """Return the processes of this test's Ray in which cells run at the moment."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "".join(process.cmdline()).startswith("ray::_run"):
                found.append(process.pid)
    return found


def when_training(folder: Path, act: Any) -> threading.Thread:
    """Do something as soon as a cell has saved itself within a task."""

    def wait() -> None:
        end = time.monotonic() + 120
        while not list(folder.rglob("training.pt")) and time.monotonic() < end:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "preempted"])
def test_a_killed_worker_costs_nothing(
    how: signal.Signals, nodes: Any, alone: dict[str, Any], tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill() -> None:
        for process in workers():
            os.kill(process, how)
            killed.append(process)

    thread = when_training(tmp_path, kill)
    assert run(tmp_path, plan(TINY, METHODS, [0, 1]), Parallel(workers=2, device="cpu")) == 0
    thread.join()
    assert killed
    assert records_of(tmp_path) == alone


def test_candidates_of_a_search_are_tasks_too(nodes: Any, tmp_path: Path) -> None:
    settings = ("clnp.grid_l1=1e-4;1e-4,2e-3,1e-4", "clnp.grid_tasks=each")
    grid = plan(Quickstart(**{**vars(TINY), "settings": settings, "tasks": 2}), ["clnp"], [0])
    assert run(tmp_path / "alone", grid, None) == 0
    assert run(tmp_path / "ray", grid, Parallel(device="cpu")) == 0
    assert records_of(tmp_path / "ray") == records_of(tmp_path / "alone")


def test_candidates_of_a_grid_at_once_are_told_apart(
    nodes: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They have experiment, method and seed in common, and so their names."""
    asked = tune.Request(replace(TINY, tasks=2), REGISTRY["ewc"], (100,))
    means, out = [], ""
    for name, parallel in (("alone", None), ("ray", Parallel(workers=2, device="cpu"))):
        folder = tmp_path / name
        places = (folder / "tuning", folder / "runs", None, torch.device("cpu"))
        code, result = tune.run(asked, *places, save_every=0.01, parallel=parallel)
        assert code == 0
        means.append([candidate["mean"] for candidate in result["candidates"]])
        out = capsys.readouterr().out
    assert means[0] == means[1]
    assert None not in means[0]
    first_words = {line.partition(":")[0] for line in out.splitlines() if "task 2/2" in line}
    assert len(first_words) == 4
    assert "validation" in out
    assert "test" not in out  # no process has loaded test data


def test_a_failing_cell_is_named_and_the_others_go_on(
    nodes: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Quickstart(**{**vars(TINY), "settings": ("finetune.lr=1e38",)})
    assert (
        run(tmp_path, plan(broken, ["finetune", "si"], [0]), Parallel(workers=2, device="cpu")) == 1
    )
    out = capsys.readouterr().out
    assert "1 of 2 cells failed" in out
    assert "FloatingPointError: The loss is" in out
    assert [name.split("/")[0] for name in records_of(tmp_path)] == ["si"]
    assert list(tmp_path.rglob("traceback.txt"))


def test_ctrl_c_saves_all_that_run(
    nodes: Any, alone: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = when_training(tmp_path, lambda: os.kill(os.getpid(), signal.SIGINT))
    grid = plan(TINY, METHODS, [0, 1])
    assert run(tmp_path, grid, Parallel(workers=2, device="cpu")) == 130
    thread.join()
    out = capsys.readouterr().out
    assert "goes on from there" in out
    assert "holds" in out
    assert run(tmp_path, grid, Parallel(workers=2, device="cpu")) == 0
    assert records_of(tmp_path) == alone


def test_other_code_on_a_machine_is_refused(tmp_path: Path) -> None:
    (cell,) = plan(TINY, ["clnp"], [0])
    needs = Needs({"num_gpus": 0.0}, threads=1, cells=1)
    work = Work(tmp_path, {"commit": "0" * 40, "dirty": False})
    failure = cluster._run(cell, [], Parallel(), needs, work)
    assert isinstance(failure, Failure)
    assert "all machines need the same checkout" in failure.text


@pytest.mark.skipif(
    sys.platform == "win32", reason="Windows ends a process without a SIGTERM that it could save at"
)
def test_sigterm_to_a_command_with_workers_saves_and_says_so(tmp_path: Path) -> None:
    """As Slurm does; Ray is started by the command itself, and takes the signal for itself."""
    folders = [f"--{name}-dir={tmp_path / name}" for name in ("records", "runs", "out")]
    cells = ["--methods", "clnp", "si", "--seeds", "0", "--epochs", "400", "--save-every", "0.001"]
    command = [sys.executable, "-m", "benchmarks", "run", "quickstart", *cells, *folders]
    with subprocess.Popen(
        [*command, "--workers", "2", "--wandb", "disabled"], stdout=subprocess.PIPE, text=True
    ) as process:
        when_training(tmp_path, process.terminate).join()
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 143, out
    assert "goes on from there" in out
    assert "holds" in out


def test_a_removed_node_costs_nothing(nodes: Any, tmp_path: Path) -> None:
    longer = Quickstart(**{**vars(TINY), "epochs": 40})  # lasts until the node is gone
    grid = plan(longer, ["clnp", "si"], [0, 1])
    assert run(tmp_path / "alone", grid, None) == 0
    (gone,) = nodes.worker_nodes

    def remove() -> None:
        nodes.remove_node(gone, allow_graceful=False)

    thread = when_training(tmp_path / "ray", remove)
    assert run(tmp_path / "ray", grid, Parallel(workers=2, device="cpu")) == 0
    thread.join()
    end = time.monotonic() + 60
    while sum(node["Alive"] for node in ray.nodes()) > 1:  # the others notice after a while
        assert time.monotonic() < end
        time.sleep(0.2)
    assert records_of(tmp_path / "ray") == records_of(tmp_path / "alone")


# --- what is asked of Ray -------------------------------------------------------------------------


class Has:
    """A cluster of machines with so many cores and GPUs each."""

    def __init__(self, cores: float, gpus: float = 0, machines: int = 1) -> None:
        each = {"CPU": cores} | ({"GPU": gpus} if gpus else {})
        gone = {"Alive": False, "Resources": {"CPU": 99.0}}
        self.all = [{"Alive": True, "Resources": each} for _ in range(machines)] + [gone]

    def nodes(self) -> list[dict[str, Any]]:
        return self.all


@pytest.mark.parametrize(
    ("has", "asked", "cells", "at_once", "cpus", "threads", "gpus"),
    [
        (Has(16), Parallel(workers=4), 20, 4, 4.0, 4, 0.0),
        (Has(16), Parallel(workers=4), 2, 2, 8.0, 8, 0.0),
        (Has(2), Parallel(workers=4), 20, 4, 0.5, 1, 0.0),
        (Has(16), Parallel(), 50, 16, 1.0, 1, 0.0),
        (Has(16, 2), Parallel(), 50, 2, 8.0, 8, 1.0),
        (Has(16, 2), Parallel(gpus_per_cell=0.25), 50, 8, 2.0, 2, 0.25),
        (Has(16, 2), Parallel(workers=3, gpus_per_cell=0.25), 50, 3, 5.0, 5, 0.25),
        (Has(16, 2), Parallel(device="cpu"), 50, 16, 1.0, 1, 0.0),
        (Has(4, machines=3), Parallel(workers=2), 50, 2, 4.0, 4, 0.0),
        (Has(8, 1, machines=3), Parallel(), 50, 3, 8.0, 8, 1.0),
    ],
)
def test_cores_and_gpus_are_shared_among_the_cells_at_once(
    has: Any,
    asked: Parallel,
    cells: int,
    at_once: int,
    cpus: float,
    threads: int,
    gpus: float,
) -> None:
    needs = resources(has, asked, cells)
    assert (needs.cells, needs.threads) == (at_once, threads)
    assert needs.options == {"num_cpus": cpus, "num_gpus": gpus}


def test_cores_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3}, raising=False)
    assert cluster._cores() == 1
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert cluster._cores() == 1


def test_a_process_runs_one_cell_where_its_gpu_could_change() -> None:
    assert resources(Has(16, 2), Parallel(), 5).calls == 1
    assert resources(Has(8, 1, machines=3), Parallel(), 5).calls == 0
    assert resources(Has(16, 2), Parallel(device="cpu"), 5).calls == 0


def test_too_large_a_share_is_refused() -> None:
    with pytest.raises(
        UserError, match="A cell takes 2 GPU, and no machine of Ray's has more than 1"
    ):
        resources(Has(4, 1), Parallel(gpus_per_cell=2.0), 3)
    with pytest.raises(UserError, match="more than 0"):
        resources(Has(4), Parallel(gpus_per_cell=0.5), 3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--workers", "0"], "--workers 0: at least 1"),
        (["--workers", "2", "--gpus-per-cell", "1.5"], "--gpus-per-cell 1.5"),
        (["--workers", "2", "--gpus-per-cell", "-1"], "--gpus-per-cell -1"),
        (["--gpus-per-cell", "0.5"], "needs --workers or --ray-address"),
        (["--workers", "2", "--device", "cuda:1"], "Ray chooses which GPU a cell gets"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    options: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [f"--{name}-dir={tmp_path / name}" for name in ("records", "runs", "out")]
    assert main(["run", "quickstart", *folders, *options]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "records").exists()


def test_without_ray_the_way_to_get_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"clnp\[cluster\]"), cluster.connected(Parallel(workers=2)):
        pass
