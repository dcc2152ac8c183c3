"""The command line: what it runs, what it refuses, and what survives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.cell
from benchmarks import runner
from benchmarks.__main__ import Run, experiment_of, main
from benchmarks.errors import UserError
from benchmarks.learners import LinearDecay
from benchmarks.methods import METHODS
from benchmarks.tracking import Tracker

Call = Callable[..., int]
TINY = ("quickstart", "--tasks", "2", "--epochs", "1", "--wandb", "disabled", "--device", "cpu")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Call `python -m benchmarks run` on a tiny experiment, with all folders under `tmp_path`."""
    # The report has tests of its own.
    monkeypatch.setattr("benchmarks.reporting.page.build", lambda *_: "the table")

    def call(*options: str) -> int:
        folders = [f"--{name}-dir={tmp_path / name}" for name in ("records", "runs", "out", "data")]
        return main(["run", *TINY, *folders, *options])

    return call


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def record_of(tmp_path: Path, method: str, seed: int) -> Path:
    (path,) = tmp_path.glob(f"records/*/{method}/seed{seed}-*.json")
    return path


def test_a_grid_is_run_once(run: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = ("--methods", "finetune", "single_task", "--seeds", "0", "2")
    assert run(*grid) == 0
    first = files(tmp_path / "records")
    assert len(first) == 4
    assert all(json.loads(data)["environment"]["threads"] == 1 for data in first.values())
    assert all(name.startswith("quickstart-custom-") for name in first)
    assert "the table" in capsys.readouterr().out
    assert not list(tmp_path.rglob("state.pt"))

    assert run(*grid) == 0
    assert files(tmp_path / "records") == first
    assert "4 of them recorded already" in capsys.readouterr().out

    assert run(*grid, "--force") == 0
    again = files(tmp_path / "records")
    assert again.keys() == first.keys()
    assert again != first  # the times


def test_experiments_run_one_after_the_other_share_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the sessions of `nox -s pmnist split_cifar` do: each has the same folders."""
    folders = [f"--{name}-dir={tmp_path / name}" for name in ("records", "runs", "out", "data")]
    options = ("--wandb", "disabled", "--device", "cpu", "--tasks", "2", "--methods", "finetune")
    for epochs in ("1", "2"):
        assert main(["run", "quickstart", *options, "--epochs", epochs, *folders]) == 0
        assert f"Tables and figures: {tmp_path / 'out' / 'index.html'}" in capsys.readouterr().out
    page = (tmp_path / "out" / "index.html").read_text()
    experiments = [folder.name for folder in (tmp_path / "records").iterdir()]
    assert len(experiments) == 2
    for name in experiments:
        assert f'id="{name}"' in page
        assert (tmp_path / "out" / name / "main.csv").exists()


def test_n_seeds_counts_from_zero(run: Call, tmp_path: Path) -> None:
    assert run("--methods", "finetune", "--n-seeds", "2") == 0
    assert [p.name.split("-")[0] for p in sorted(tmp_path.glob("records/*/*/*"))] == [
        "seed0",
        "seed1",
    ]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--methods", "finetun"], "Did you mean 'finetune'"),
        (["--methods", "clnp", "clnp"], "method clnp is given twice"),
        (["--seeds", "0", "1", "0"], "seed 0 is given twice"),
        (["--seeds", "-1"], "-1"),
        (["--seeds", "9" * 300], "99999… is too large"),
        (["--seeds", "0", "--n-seeds", "2"], "not both"),
        (["--n-seeds", "0"], "No seed"),
        (["--tasks", "0"], "tasks"),
        (["--epochs", "-3"], "epochs"),
        (["--methods", "clnp", "--set", "clnp.margin=1"], "margin"),
        (["--methods", "clnp", "--set", "clnp.marign=0.1"], "Did you mean 'margin'"),
        (["--methods", "finetune", "--set", "clnp.margin=0.1"], "not run"),
        (["--device", "cuda:77"], "--device cuda:77"),
        (["--device", "abacus"], "--device abacus"),
        (["--device", "meta"], "--device meta holds no numbers"),
        (["--methods", "joint", "--set", "joint.parts=True"], "joint is not told the task"),
        (
            ["--methods", "single_task", "--set", "single_task.reset_optimizer=False"],
            "reset_optimizer is False; it must be True",
        ),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    options: list[str],
    says: str,
    run: Call,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(*options) == 2
    output = capsys.readouterr()
    assert says in output.err
    assert "Traceback" not in output.err
    assert files(tmp_path) == {}


def test_unknown_experiment_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "pmnis"]) == 2
    assert "Did you mean 'pmnist'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["run", "pmnist", "--seedz", "1"], ["rum"], []])
def test_typos_in_options_get_a_suggestion(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    if "--seedz" in arguments:
        assert "--seeds" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["records", "runs", "out"])
def test_folders_that_cannot_be_written_are_told_before_training(
    folder: str,
    run: Call,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(benchmarks.cell, "run", lambda *_: pytest.fail("trained"))
    (tmp_path / folder).write_text("a file where the folder should be")
    assert run("--methods", "finetune", "--seeds", "0") == 2
    assert "Cannot write" in capsys.readouterr().err


def test_missing_data_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [f"--{name}-dir={tmp_path / name}" for name in ("records", "runs", "out")]
    empty = tmp_path / "data"
    code = main(["run", "pmnist", "--methods", "finetune", *folders, f"--data-dir={empty}"])
    assert code == 2
    assert str(empty) in capsys.readouterr().err


def test_a_failing_cell_does_not_stop_the_others(
    run: Call,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grid = ("--methods", "finetune", "single_task", "--seeds", "0")
    real = benchmarks.cell.run

    def fails(cell: Any, *rest: Any) -> dict[str, Any]:
        if cell.method.name == "finetune":
            raise RuntimeError("a made-up fault")
        return real(cell, *rest)

    monkeypatch.setattr(benchmarks.cell, "run", fails)
    assert run(*grid) == 1
    assert "a made-up fault" in capsys.readouterr().out
    assert [p.parent.name for p in tmp_path.glob("records/*/*/*.json")] == ["single_task"]
    (trace,) = tmp_path.glob("runs/*/finetune/*/traceback.txt")
    text = trace.read_text()
    assert "RuntimeError: a made-up fault" in text
    assert '"lr"' in text

    # Where nothing is recorded at all, that isn't told in place of the fault.
    assert run("--methods", "finetune", "--seeds", "1", "--tasks", "1") == 1
    assert "a made-up fault" in capsys.readouterr().out

    # A rerun tries only what is missing, and tidies up.
    tried: list[str] = []
    monkeypatch.setattr(
        benchmarks.cell, "run", lambda cell, *r: tried.append(cell.method.name) or real(cell, *r)
    )
    assert run(*grid) == 0
    assert tried == ["finetune"]
    assert not trace.exists()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"]
)
@pytest.mark.parametrize("when", ["after a task", "in a step"])
def test_a_stopped_run_says_how_to_go_on_and_goes_on(
    number: int,
    code: int,
    when: str,
    run: Call,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grid = ("--methods", "finetune", "--seeds", "0")
    announce = Tracker.announce
    # A shell starts what it puts into the background deaf to Ctrl-C, and this test with it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def stop(self: Tracker, event: dict[str, Any]) -> None:
        announce(self, event)
        if event["event"] == "task" and event["task"] == 0 and when == "after a task":
            os.kill(os.getpid(), number)

    update = LinearDecay.before_update

    def stop_in_step(self: LinearDecay, strategy: Any, **more: Any) -> None:
        update(self, strategy, **more)
        if self._step == 3 and when == "in a step":
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "announce", stop)
        patch.setattr(LinearDecay, "before_update", stop_in_step)
        assert run(*grid) == code
    out = capsys.readouterr().out
    assert "goes on from there" in out
    assert not list(tmp_path.glob("records/*/*/*.json"))
    (state,) = tmp_path.rglob("*.pt")
    assert state.name == {"after a task": "state.pt", "in a step": "training.pt"}[when]
    saved = {"after a task": "its finished tasks", "in a step": "the task in training"}[when]
    assert f"Of this one {state.parent} holds {saved}." in out

    assert run(*grid) == 0
    where = {"after a task": "after task 1/2", "in a step": "in task 1/2, epoch 1"}[when]
    assert f"going on {where}" in capsys.readouterr().out
    resumed = json.loads(record_of(tmp_path, "finetune", 0).read_text())
    assert run(*grid, "--force") == 0
    straight = json.loads(record_of(tmp_path, "finetune", 0).read_text())
    for key in ("accuracy", "logit_drift", "parameters"):
        assert resumed[key] == straight[key]


def test_force_goes_on_from_nothing_older_than_the_record(
    run: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state that stayed behind, while the record came from another machine, isn't finished."""
    grid = ("--methods", "finetune", "--seeds", "0")
    announce = Tracker.announce

    def stop(self: Tracker, event: dict[str, Any]) -> None:
        announce(self, event)
        if event["event"] == "task":
            raise KeyboardInterrupt

    def stopped(*options: str) -> int:
        with monkeypatch.context() as patch:
            patch.setattr(Tracker, "announce", stop)
            return run(*grid, *options)

    def tasks_learnt_before() -> list[int]:
        (log,) = tmp_path.rglob("log.jsonl")
        events = map(json.loads, log.read_text().splitlines())
        return [event["learnt"] for event in events if event["event"] == "start"]

    assert stopped() == 130
    (state,) = tmp_path.rglob("state.pt")
    old = state.read_bytes()
    assert run(*grid) == 0
    (record,) = tmp_path.glob("records/*/*/*.json")
    state.write_bytes(old)
    os.utime(state, (1, 1))
    assert run(*grid, "--force") == 0
    assert not state.exists()
    # But what --force itself has saved is gone on with.
    assert stopped("--force") == 130
    os.utime(record, (1, 1))
    assert run(*grid, "--force") == 0
    assert tasks_learnt_before() == [0, 1, 0, 0, 1]


def test_what_a_process_left_that_died_after_recording_goes(
    run: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = ("--methods", "finetune", "--seeds", "0")
    with monkeypatch.context() as patch:
        patch.setattr("benchmarks.runner.forget", lambda *_: None)
        assert run(*grid) == 0
    (state,) = tmp_path.rglob("*.pt")
    (record,) = tmp_path.glob("records/*/*/*.json")
    os.utime(state, (record.stat().st_mtime + 1,) * 2)  # of a run with --force, which may go on
    assert run(*grid) == 0
    assert state.exists()
    os.utime(state, (record.stat().st_mtime - 1,) * 2)
    assert run(*grid) == 0
    assert not state.exists()


def test_a_damaged_record_is_named_and_never_used(
    run: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ("--methods", "finetune", "--seeds", "0", "1")
    assert run(*grid) == 0
    path, other = record_of(tmp_path, "finetune", 0), record_of(tmp_path, "finetune", 1)
    kept = other.read_bytes()
    path.write_bytes(path.read_bytes()[:100])
    assert run(*grid) == 2
    assert str(path) in capsys.readouterr().err
    assert other.read_bytes() == kept
    assert run("--methods", "finetune", "--seeds", "0", "--force") == 0
    assert run(*grid) == 0


def test_a_default_that_changed_under_a_record_is_an_error(
    run: Call,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grid = ("--methods", "finetune", "--seeds", "0")
    assert run(*grid) == 0
    before = files(tmp_path / "records")
    config = benchmarks.cell.Cell.config.func  # type: ignore[attr-defined]

    def changed(self: Any) -> dict[str, Any]:
        return {**config(self), "revision": 2}

    monkeypatch.setattr(benchmarks.cell.Cell, "config", property(changed))
    assert run(*grid) == 2
    error = capsys.readouterr().err
    assert "finetune seed 0" in error
    assert "revision: recorded 1, now 2" in error
    assert files(tmp_path / "records") == before


def test_deterministic_is_asked_of_torch(
    run: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    grid = ("--methods", "finetune", "--seeds", "0")
    try:
        assert run(*grid, "--deterministic") == 0
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
    # It is no setting of the cell.
    before = record_of(tmp_path, "finetune", 0).read_bytes()
    assert run(*grid) == 0
    assert record_of(tmp_path, "finetune", 0).read_bytes() == before
    assert len(files(tmp_path / "records")) == 1


def test_no_secret_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key of W&B stands in no record, log, W&B file, trace of an error, or report."""
    secret = "0123456789" * 4
    monkeypatch.setenv("WANDB_API_KEY", secret)
    folders = [f"--{name}-dir={tmp_path / name}" for name in ("records", "runs", "out", "data")]
    options = ["--set", "finetune.lr=1e38", "--methods", "finetune", "single_task", "--seeds", "0"]
    assert main(["run", *TINY, "--wandb", "offline", *folders, *options]) == 1
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    suffixes = {path.suffix for path in kept}
    assert {".json", ".jsonl", ".txt", ".wandb", ".html"} <= suffixes
    assert not [path for path in kept if secret.encode() in path.read_bytes()]


# --- other commands -------------------------------------------------------------------------------


def test_help_is_quick_and_explains_every_option() -> None:
    code = (
        "import sys; from benchmarks.__main__ import main\n"
        "try: main(['run', '--help'])\n"
        "finally: sys.exit('torch' in sys.modules or 'avalanche' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=runner.ROOT,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert result.returncode == 0, result.stderr
    for name in Run.__dataclass_fields__:
        option = {"experiment": "with _reduced, or", "settings": "--set"}.get(name)
        assert (option or f"--{name.replace('_', '-')}") in result.stdout
    assert "clnp.margin=0.001" in result.stdout


def test_prepare_and_report_are_dispatched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["prepare", "digits", f"--data-dir={tmp_path}"]) == 0
    assert "digits" in capsys.readouterr().out
    assert main(["prepare", "digitz", f"--data-dir={tmp_path}"]) == 2
    monkeypatch.setattr("benchmarks.reporting.page.build", lambda r, o, e: f"{r.name} {o.name} {e}")
    places = [f"--records-dir={tmp_path / 'r'}", f"--out-dir={tmp_path / 'o'}"]
    assert main(["report", *places]) == 0
    assert main(["report", "pmnist", *places]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["r o None", "r o ['pmnist']"]


# --- git ------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True)

    git("init", "--quiet")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "cell.py").write_text("a = 1\n")
    (tmp_path / "constraints.txt").write_text("torch==1\n")
    (tmp_path / "README.md").write_text("hello\n")
    git("add", ".")
    git("commit", "--quiet", "-m", "start")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "dirty"),
    [
        (None, False),
        ("benchmarks/cell.py", True),
        ("benchmarks/new.py", True),
        ("constraints.txt", True),
        ("README.md", False),
        ("reports/records/pmnist/clnp/seed0-12345678.json", False),
        ("runs/log.jsonl", False),
        ("tests/test_cell.py", False),
        ("benchmarks/reporting/page.py", False),
    ],
)
def test_only_code_and_constraints_make_a_tree_dirty(
    path: str | None, dirty: bool, checkout: Path
) -> None:
    if path:
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        (checkout / path).write_text("changed\n")
    state = runner.git_state(checkout)
    assert state["dirty"] is dirty
    assert len(state["commit"]) == 40


def test_outside_of_git_nobody_knows_what_ran(tmp_path: Path) -> None:
    state = runner.git_state(tmp_path)
    assert state == {"commit": None, "dirty": True}
    assert runner.doubt(state).startswith("No commit is known")
    assert runner.doubt(state | {"commit": "ab"}) == "The code has uncommitted changes"


def test_methods_of_the_presets_exist() -> None:
    from benchmarks.__main__ import experiments

    for preset in experiments().values():
        assert set(preset.methods) <= set(METHODS)


# --- options that make another experiment ---------------------------------------------------------


def test_options_reach_the_fields_of_the_experiment() -> None:
    split = experiment_of(Run("split_cifar", validation=0.2, augment=True))
    assert (vars(split)["validation"], vars(split)["augment"]) == (0.2, True)
    assert vars(experiment_of(Run("split_cifar", pool=3)))["pool"] == 3
    assert experiment_of(Run("split_cifar", pool=2)).name == "split_cifar"
    permuted = experiment_of(Run("pmnist", validation=0.0))
    assert vars(permuted)["validation"] == 0
    assert isinstance(vars(permuted)["validation"], int)
    assert len({split.name, permuted.name, "split_cifar", "pmnist"}) == 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"experiment": "pmnist", "validation": 0.5}, "number of images"),
        ({"experiment": "pmnist", "validation": -1.0}, "at least 0"),
        ({"experiment": "split_cifar", "validation": 1.0}, "below 1"),
        ({"experiment": "pmnist", "augment": True}, "--augment is for split CIFAR"),
        ({"experiment": "split_cifar_wide", "pool": 3}, "it is for the narrow network"),
        (
            {"experiment": "pmnist", "epochs": 1, "settings": ("finetune.epochs=7",)},
            "Give --epochs or --set finetune.epochs=7, not both",
        ),
    ],
)
def test_options_that_do_not_fit_are_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        experiment_of(Run(**options))
