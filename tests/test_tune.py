"""Tuning: the grid's winner, by validation data alone, with nothing trained twice."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin

import benchmarks.data
from benchmarks import cell as cells
from benchmarks import records, tune
from benchmarks.__main__ import main
from benchmarks.cell import Cell
from benchmarks.errors import UserError
from benchmarks.experiment import Experiment, canonical
from benchmarks.learners import Learner, Settings, Setup
from benchmarks.methods import METHODS, Method
from benchmarks.pmnist import PermutedMNIST
from benchmarks.quickstart import Quickstart
from benchmarks.reporting import tables
from benchmarks.resume import load_state
from benchmarks.split_cifar import SplitCIFAR
from benchmarks.states import STATE
from benchmarks.tracking import Tracker

CPU = torch.device("cpu")
COMMITTED = sorted((Path(__file__).parent.parent / "reports" / "tuning").glob("*/*.json"))
LOAD = benchmarks.data.load


@dataclass(frozen=True)
class Tiny(Quickstart):
    """The quickstart at its smallest."""

    epochs: int = 1
    method_epochs: bool = False
    hidden: tuple[int, ...] = (40, 40)
    batch_size: int = 128


@dataclass(frozen=True)
class PullSettings(Settings):
    pull: float = 0.0
    """How strongly the weights are pulled back to those after the task before."""


class Pull(SupervisedPlugin):  # type: ignore[misc]
    """A penalty that has no effect before the second task."""

    def __init__(self, pull: float) -> None:
        super().__init__()
        self.pull = pull
        self.anchor: list[torch.Tensor] = []

    def before_backward(self, strategy: Any, **_: Any) -> None:
        for weight, anchor in zip(strategy.model.parameters(), self.anchor, strict=False):
            strategy.loss = strategy.loss + self.pull * (weight - anchor).square().sum()

    def after_training_exp(self, strategy: Any, **_: Any) -> None:
        self.anchor = [weight.detach().clone() for weight in strategy.model.parameters()]

    def state_dict(self) -> dict[str, Any]:
        return {"anchor": self.anchor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.anchor = list(state["anchor"])


def build(setup: Setup, settings: PullSettings) -> Learner:
    plugin = Pull(settings.pull)
    return Learner(setup.strategy(settings, [plugin]), settings, plugin)


GRID = (
    PullSettings(lr=1e-5, epochs=1),
    PullSettings(lr=0.004, epochs=1),
    PullSettings(lr=0.004, epochs=1, pull=0.1),
)
MADE: Method[PullSettings] = Method(
    name="made",
    build=build,
    settings={"quickstart": GRID[0]},
    task_id_at_test=False,
    grid={"quickstart": GRID},
    later=frozenset({"pull"}),
)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing in this file load test data, and know the made-up method."""

    def load(*arguments: Any, test: bool = True, **more: Any) -> Any:
        assert not test, "test data were asked for"
        return LOAD(*arguments, test=test, **more)

    monkeypatch.setattr(benchmarks.data, "load", load)
    monkeypatch.setitem(METHODS, "made", MADE)


def tuned(
    folder: Path, *seeds: int, method: str = "made", tasks: int = 2
) -> tuple[int, dict[str, Any]]:
    asked = tune.request(method, Tiny, seeds or (100,), tasks)
    return tune.run(asked, folder / "tuning", folder / "runs", None, CPU)


def path_of(folder: Path) -> Path:
    return folder / "tuning" / "quickstart" / "made.json"


def timeless(value: Any) -> Any:
    """Leave out times and their checksum."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in ("seconds", "checksum")}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def starts(folder: Path) -> list[int]:
    """How many tasks each run in the logs began with."""
    events = [
        json.loads(line)
        for log in sorted(folder.rglob("log.jsonl"))
        for line in log.read_text().splitlines()
    ]
    return [event["learnt"] for event in events if event["event"] == "start"]


def with_grid(monkeypatch: pytest.MonkeyPatch, *grid: PullSettings, **more: Any) -> None:
    changed = dataclasses.replace(MADE, grid={"quickstart": grid}, **more)
    monkeypatch.setitem(METHODS, "made", changed)


# --- results --------------------------------------------------------------------------------------


def test_test_data_are_really_poisoned() -> None:
    with pytest.raises(AssertionError, match="asked for"):
        Tiny().load(None, "cpu")


def test_the_best_on_validation_data_wins(tmp_path: Path) -> None:
    code, result = tuned(tmp_path, 100, 101)
    assert code == 0
    assert records.read_tuning(path_of(tmp_path)) == {
        **result,
        "checksum": records.read_tuning(path_of(tmp_path))["checksum"],
    }
    assert (result["experiment"], result["method"], result["revision"]) == ("quickstart", "made", 1)
    assert (result["seeds"], result["tasks"]) == ([100, 101], 2)
    assert result["config"]["experiment"]["tasks"] == 2
    means = []
    for settings, candidate in zip(GRID, result["candidates"], strict=True):
        assert candidate["settings"] == dataclasses.asdict(settings)
        assert [run["seed"] for run in candidate["runs"]] == [100, 101]
        for run in candidate["runs"]:
            assert len(run["validation"]) == 2
            assert run["mean"] == pytest.approx(sum(run["validation"]) / 2)
            assert {"commit", "dirty"} <= run["git"].keys()
            assert run["environment"]["device"] == "cpu"
        one, other = (run["mean"] for run in candidate["runs"])
        assert candidate["mean"] == pytest.approx((one + other) / 2)
        assert candidate["sd"] == pytest.approx(abs(one - other) / 2**0.5)
        means.append(candidate["mean"])
    assert result["winner"] == means.index(max(means)) != 0
    assert not list((tmp_path / "runs").rglob("*.pt"))


def test_of_equals_the_first_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # With one task the pull has no effect: bit for bit the same.
    with_grid(monkeypatch, GRID[0], GRID[2], GRID[1])
    _, result = tuned(tmp_path, tasks=1)
    means = [candidate["mean"] for candidate in result["candidates"]]
    assert means[1] == means[2] > means[0]
    assert result["winner"] == 1


def test_what_is_known_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned(tmp_path)
    before = path_of(tmp_path).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(cells, "run", lambda *_: pytest.fail("trained"))
        assert tuned(tmp_path)[0] == 0
    assert path_of(tmp_path).read_bytes() == before
    assert len(starts(tmp_path)) == 3

    _, result = tuned(tmp_path, 101)
    assert result["seeds"] == [100, 101]
    assert len(starts(tmp_path)) == 6
    assert timeless(result) == timeless(tuned(tmp_path / "at once", 100, 101)[1])


def test_interrupted_tuning_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    announce, seen = Tracker.announce, []

    def stop(self: Tracker, event: dict[str, Any]) -> None:
        announce(self, event)
        seen.append(event["event"])
        if seen.count("end") == 1 and event["event"] == "task":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "announce", stop)
        code, result = tuned(tmp_path)
    assert code == 130
    assert result["winner"] is None
    on_disk = records.read_tuning(path_of(tmp_path))
    assert sum(len(candidate["runs"]) for candidate in on_disk["candidates"]) == 1
    assert tune.mismatches(result, GRID[0]) == [
        "the grid has no winner yet: run the same command again, or widen it"
    ]
    code, result = tuned(tmp_path)
    assert code == 0
    assert timeless(result) == timeless(tuned(tmp_path / "straight")[1])


def test_what_a_process_left_that_died_after_a_candidate_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("benchmarks.runner.forget", lambda *_: None)
        tuned(tmp_path)
    assert len(list(tmp_path.rglob("state.pt"))) == len(GRID)
    tuned(tmp_path)
    assert not list(tmp_path.rglob("state.pt"))


def test_a_candidate_that_diverges_counts_and_never_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_grid(monkeypatch, PullSettings(lr=1e38), GRID[1])
    code, result = tuned(tmp_path)
    assert code == 1
    assert [candidate["runs"][0]["validation"] is None for candidate in result["candidates"]] == [
        True,
        False,
    ]
    assert (result["candidates"][0]["mean"], result["winner"]) == (None, 1)
    assert list(tmp_path.rglob("traceback.txt"))  # what was said to be seen there
    assert not list(tmp_path.rglob("*.pt"))
    text = tables.tuning_table([result]).text
    assert text.loc[0, ["Validation, %", "n"]].tolist() == ["—", "—"]
    assert tuned(tmp_path) == (0, result)

    with_grid(monkeypatch, PullSettings(lr=1e38))
    assert tuned(tmp_path / "alone")[1]["winner"] is None


def test_a_task_that_found_no_room_has_no_mean() -> None:
    cell: Any = SimpleNamespace(seed=100, hash="ab")
    matrix = [[0.5, None], [0.5, None]]
    record: dict[str, Any] = {"accuracy": {"validation": matrix}, "seconds": {"train": 1.0}}
    record |= {"environment": {}, "git": {}}
    assert tune._run(cell, record)["mean"] is None
    record["accuracy"]["validation"][-1] = [0.5, 0.75]
    assert tune._run(cell, record)["mean"] == 0.625


def test_a_failed_candidate_leaves_the_others_and_no_winner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(setup: Setup, settings: PullSettings) -> Learner:
        if settings.lr == GRID[0].lr:
            raise RuntimeError("broken")
        return build(setup, settings)

    with_grid(monkeypatch, *GRID[:2], build=fail)
    code, result = tuned(tmp_path)
    assert code == 1
    assert [len(candidate["runs"]) for candidate in result["candidates"]] == [0, 1]
    assert result["winner"] is None


def test_what_an_earlier_grid_tried_stays_and_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned(tmp_path)
    with_grid(monkeypatch, GRID[0], dataclasses.replace(GRID[0], lr=2e-5))
    _, result = tuned(tmp_path)
    assert [c["in_grid"] for c in result["candidates"]] == [True, True, False, False]
    assert [c["settings"]["lr"] for c in result["candidates"]] == [1e-5, 2e-5, 0.004, 0.004]
    assert result["winner"] in (0, 1)
    assert len(starts(tmp_path)) == 4
    with_grid(monkeypatch, *GRID)
    _, result = tuned(tmp_path)
    assert [c["in_grid"] for c in result["candidates"]] == [True, True, True, False]
    assert len(starts(tmp_path)) == 4


def test_another_revision_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned(tmp_path, 101)
    with_grid(monkeypatch, *GRID, revision=2)
    _, result = tuned(tmp_path)
    assert (result["revision"], result["seeds"]) == (2, [100])
    assert "is of revision 1 of made, which is at 2: it is tuned anew" in capsys.readouterr().out
    assert len(result["candidates"]) == 3
    assert len(starts(tmp_path)) == 6


def test_a_result_of_another_stream_is_never_mixed_in(tmp_path: Path) -> None:
    tuned(tmp_path)
    before = path_of(tmp_path).read_bytes()
    with pytest.raises(UserError, match=r"tasks: recorded 2, now 1.*--tuning-dir"):
        tuned(tmp_path, tasks=1)
    assert path_of(tmp_path).read_bytes() == before


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    tuned(tmp_path, tasks=1)
    path = path_of(tmp_path)
    whole = path.read_text()
    for text in (whole[:-30], whole.replace('"winner": 1', '"winner": 0'), "[]", "{}"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"made\.json is damaged"):
            tuned(tmp_path, tasks=1)


# --- sharing --------------------------------------------------------------------------------------


def pairs() -> Iterator[Any]:
    """Two candidates of each grid that share their first task."""
    for method in (*METHODS.values(), MADE):
        for preset, grid in method.grid.items():
            groups = defaultdict(list)
            for settings in grid:
                changed = dataclasses.replace(method, settings={"quickstart": settings})
                cell = Cell(Tiny(tasks=2), changed, 100, "")
                groups[cell.first_hash].append(changed)
            for group in groups.values():
                if len(group) > 1:
                    yield pytest.param(*group[:2], id=f"{method.name} {preset}")
                    break


@pytest.mark.parametrize(("one", "other"), list(pairs()))
def test_a_shared_first_task_changes_nothing(
    one: Method[Any], other: Method[Any], tmp_path: Path
) -> None:
    images = LOAD("digits", test=False)
    git = {"commit": None, "dirty": True}
    first = tmp_path / "first.pt"

    def learnt(method: Method[Any], name: str, share: Path | None) -> tuple[Any, Any, int]:
        cell = Cell(Tiny(tasks=2), method, 100, images.fingerprint)
        events: list[dict[str, Any]] = []
        folder = tmp_path / name
        record = cells.run(cell, images, CPU, folder, git, events.append, share)
        record.pop("seconds")
        state = load_state(folder / STATE, cell.hash)
        return record, state["learner"], events[0]["learnt"]

    learnt(one, "one", first)
    record, state, before = learnt(other, "shared", first)
    assert before == 1
    assert "test" not in record["accuracy"]
    alone, state_alone, before = learnt(other, "alone", None)
    assert before == 0
    assert record == alone
    torch.testing.assert_close(state, state_alone, rtol=0, atol=0)


def test_the_first_task_is_trained_once(tmp_path: Path) -> None:
    tuned(tmp_path)
    assert sorted(starts(tmp_path)) == [0, 0, 1]


def test_cells_share_their_first_task_if_nothing_else_differs() -> None:
    def first(seed: int = 100, tasks: int = 2, **settings: Any) -> str:
        method = dataclasses.replace(MADE, settings={"quickstart": PullSettings(**settings)})
        return Cell(Tiny(tasks=tasks), method, seed, "f").first_hash

    assert first(pull=1.0) == first(pull=2.0) == first()
    assert len({first(), first(lr=0.1), first(seed=101), first(tasks=3), first(epochs=2)}) == 5


# --- what a method has ----------------------------------------------------------------------------


def disagreement(path: Path) -> list[str]:
    """Return where a method's settings are not those of the winner in a file."""
    result = records.read_tuning(path)
    assert path.parts[-2:] == (result["experiment"], f"{result['method']}.json")
    method = METHODS[records.tuned_method(result)]
    return tune.mismatches(result, method.settings[result["experiment"]])


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: "/".join(path.parts[-2:]))
def test_settings_are_the_winners(path: Path) -> None:
    result = records.read_tuning(path)
    preset, method = path.parent.name, METHODS[path.stem]
    if all(candidate["runs"] for candidate in result["candidates"]):
        assert disagreement(path) == []
        assert result["revision"] == method.revision
        assert result["tasks"] == method.tuning_tasks.get(preset, tune.TASKS)
        mine = [c["settings"] for c in result["candidates"] if c["in_grid"]]
        for settings, today in zip(mine, method.grid[preset], strict=True):
            wanted = json.loads(canonical(dataclasses.asdict(today)))
            assert not records.disagreements(settings, wanted)
    else:  # a grid that goes on later
        assert result["winner"] is None
    assert min(result["seeds"]) >= tune.FIRST_SEED
    assert not result["dirty"]


def test_clnp_keeps_the_printed_settings_whatever_wins() -> None:
    printed, best = METHODS["clnp"].settings["pmnist"], METHODS["clnp_best"].settings["pmnist"]
    assert (printed.lr, printed.l1) == (0.002, (1e-7, 1e-5, 1e-6))  # Sec. 3.1
    grid = METHODS["clnp"].grid["pmnist"]
    assert printed in grid
    assert best in grid
    result = {"experiment": "pmnist", "method": "clnp", "winner": grid.index(best)}
    settings = [json.loads(canonical(dataclasses.asdict(each))) for each in grid]
    result["candidates"] = [{"settings": each} for each in settings]
    assert tune.verdict(result) == "The settings of clnp_best for pmnist are the winner's."
    result["winner"] = grid.index(printed)
    assert "clnp_best for pmnist are not the winner's" in tune.verdict(result)


def test_settings_that_are_not_the_winners_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, result = tuned(tmp_path, tasks=1)
    assert result["winner"] == 1
    assert disagreement(path_of(tmp_path)) == ["lr = 0.004, not 1e-05"]
    assert "not the winner's: lr = 0.004, not 1e-05" in tune.verdict(result)
    monkeypatch.setitem(
        METHODS, "made", dataclasses.replace(MADE, settings={"quickstart": GRID[1]})
    )
    assert disagreement(path_of(tmp_path)) == []
    assert "are the winner's" in tune.verdict(result)


def test_a_setting_younger_than_the_result_is_held_to_its_default(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Later(PullSettings):
        new: float = 0.5

    _, result = tuned(tmp_path, tasks=1)
    assert tune.mismatches(result, Later(lr=0.004, epochs=1)) == []
    assert tune.mismatches(result, Later(lr=0.004, epochs=1, new=1.0)) == ["new = 0.5, not 1.0"]


def test_the_registry_says_how_many_tasks_a_candidate_learns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert tune.request("made", Tiny).experiment.tasks == tune.TASKS == 3
    with_grid(monkeypatch, *GRID, tuning_tasks={"quickstart": 5, "pmnist": 7})
    assert tune.request("made", Tiny).experiment.tasks == 5
    assert tune.request("made", Tiny, tasks=2).experiment.tasks == 2


@pytest.mark.parametrize("method", METHODS)
def test_a_grid_is_small_and_without_repetition(method: str) -> None:
    for preset, grid in METHODS[method].grid.items():
        assert 1 <= len(grid) <= 4
        assert len(set(grid)) == len(grid)
        assert {type(settings) for settings in grid} == {type(METHODS[method].settings[preset])}


def steps_a_task(settings: Settings, experiment: Experiment, images: int) -> int:
    """Of training on so many images."""
    batches = -(-images // (settings.batch_size or experiment.batch_size))
    return (settings.epochs or experiment.epochs) * batches


@pytest.mark.parametrize(
    ("experiment", "images", "clnp", "most"),
    [(PermutedMNIST(), 50_000, "clnp", 11_760), (SplitCIFAR(), 45_000, "clnp_m2", 10_560)],
)
@pytest.mark.parametrize("method", METHODS)
def test_no_method_trains_longer_than_clnp(
    method: str, experiment: Experiment, images: int, clnp: str, most: int
) -> None:
    preset, found = experiment.preset, METHODS[method]
    assert steps_a_task(METHODS[clnp].settings[preset], experiment, images) == most
    own = [found.settings[preset]] if preset in found.settings else []
    for settings in (*own, *found.grid.get(preset, ())):
        assert steps_a_task(settings, experiment, images) <= most


@pytest.mark.parametrize("preset", ["pmnist", "quickstart"])
def test_finetune_has_the_settings_of_single_task(preset: str) -> None:
    finetune, single = (METHODS[name].settings[preset] for name in ("finetune", "single_task"))
    assert dataclasses.asdict(finetune) | {"later_lr": None} == dataclasses.asdict(single)


def test_the_papers_own_values_are_among_clnps() -> None:
    assert any(
        (settings.lr, settings.l1) == (0.002, (1e-7, 1e-5, 1e-6))
        for settings in METHODS["clnp"].grid[PermutedMNIST.preset]
    )


# --- command line ---------------------------------------------------------------------------------


def call(tmp_path: Path, *options: str) -> int:
    folders = [f"--{name}-dir={tmp_path / name}" for name in ("tuning", "runs", "data")]
    return main(["tune", "--experiment", "quickstart", "--device", "cpu", *folders, *options])


def test_command_prints_the_candidates_and_what_to_enter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(tmp_path, "--method", "made", "--tasks", "1") == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("made  ")]
    assert len(rows) == 3
    assert [row.split()[-1] for row in rows] == ["no", "yes", "no"]
    assert "lr 0.004, pull 0.1" in rows[2]
    assert "3 of 3 runs to do" in out
    assert "Enter them in benchmarks/methods.py" in out
    assert path_of(tmp_path).exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--method", "mad"], "Did you mean 'made'"),
        (["--method", "finetune"], "finetune has no grid for quickstart. Methods with one: "),
        (["--method", "made", "--seeds", "100", "4"], "The seed 4 is one of the tables'"),
        (["--method", "made", "--seeds", "100", "100"], "twice"),
        (["--method", "made", "--tasks", "0"], "tasks"),
        (["--method", "made", "--device", "abacus"], "--device abacus"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    options: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(tmp_path, *options) == 2
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("*"))


def test_unknown_experiment_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--method", "made", "--experiment", "pmnis"]) == 2
    assert "Did you mean 'pmnist'" in capsys.readouterr().err
