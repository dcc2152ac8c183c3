"""Cells: records that are right, resumes that lose and change nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cell as cells
from benchmarks import records
from benchmarks.cell import Cell
from benchmarks.data import Images, load
from benchmarks.errors import UserError
from benchmarks.learners import Settings
from benchmarks.methods import METHODS, CLNPSettings, Method
from benchmarks.pmnist import PermutedMNIST
from benchmarks.process import deterministic
from benchmarks.quickstart import Quickstart
from benchmarks.reporting.load import decode
from benchmarks.resume import Terminated, load_state, save_state
from benchmarks.shared import SharedTrials
from benchmarks.states import STATE, TRAINING

TINY = Quickstart(
    tasks=3, epochs=2, method_epochs=False, hidden=(40, 40), batch_size=128, validation=300
)
QUICK = [name for name, method in METHODS.items() if TINY.preset in method.settings]
EPOCH = 9
"""Steps of an epoch."""
JOINT_EPOCH = 27
GIT = {"commit": None, "dirty": True}


@pytest.fixture(scope="module")
def images() -> Images:
    return load("digits")


def cell_of(method: str, seed: int = 0, images: Images | None = None, **changes: Any) -> Cell:
    fingerprint = images.fingerprint if images else "0" * 64
    return Cell(dataclasses.replace(TINY, **changes), METHODS[method], seed, fingerprint)


def run(
    cell: Cell,
    images: Images,
    folder: Path,
    announce: Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    announce = announce or (lambda event: None)
    return cells.run(cell, images, torch.device("cpu"), folder, GIT, announce, **options)


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "seconds"}


@pytest.fixture(scope="module")
def finished(images: Images, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The record of each method's uninterrupted cell."""
    return {
        method: run(cell_of(method, images=images), images, tmp_path_factory.mktemp(method))
        for method in QUICK
    }


@pytest.mark.parametrize("method", QUICK)
def test_record_is_valid_and_full(method: str, finished: dict[str, Any]) -> None:
    record = finished[method]
    assert records.problem(record) is None
    for matrix in record["accuracy"].values():
        assert len(matrix) == 3
        for i, row in enumerate(matrix):
            # joint has learnt nothing before the last task.
            learnt = -1 if method == "joint" and i < 2 else i
            assert [value is None for value in row] == [j > learnt for j in range(3)]
    assert len(record["logit_drift"]) == len(record["seconds"]["tasks"]) == 3
    # superposition has no biases, HAT an embedding: a number a hidden unit.
    beside = {"superposition": 0, "hat": 90 + 80}.get(method, 90)
    assert record["parameters"]["trainable"] == 64 * 40 + 40 * 40 + 40 * 10 + beside
    assert record["config"]["experiment"]["hidden"] == [40, 40]
    assert record["environment"]["device"] == "cpu"


@pytest.mark.parametrize("method", ["clnp", "single_task"])
def test_no_forgetting(method: str, finished: dict[str, Any]) -> None:
    record = finished[method]
    assert record["logit_drift"] == [0.0, 0.0, 0.0]
    for j in range(3):
        assert len({record["accuracy"]["test"][i][j] for i in range(j, 3)}) == 1


def test_finetune_forgets(finished: dict[str, Any]) -> None:
    record = finished["finetune"]
    assert record["logit_drift"][0] > 0
    assert record["accuracy"]["test"][2][0] < record["accuracy"]["test"][0][0]


def test_what_is_stored(finished: dict[str, Any]) -> None:
    for method, networks in (("clnp", 1), ("finetune", 1), ("single_task", 3)):
        parameters = finished[method]["parameters"]
        assert parameters["stored"] == networks * parameters["trainable"]


def test_capacity_rows(finished: dict[str, Any]) -> None:
    rows = finished["clnp"]["capacity"]
    assert [(row["task"], row["layer"]) for row in rows] == [
        (task, layer) for task in range(3) for layer in ("fc1", "fc2")
    ]
    assert finished["finetune"]["capacity"] == []


def test_first_task_is_the_same_for_finetune_and_single_task(finished: dict[str, Any]) -> None:
    # Same weights, same order of the data: seeds are paired across methods.
    first = [finished[m]["accuracy"]["test"][0][0] for m in ("finetune", "single_task")]
    assert first[0] == first[1]


@pytest.mark.parametrize("method", QUICK)
@pytest.mark.parametrize("stop", [("epoch", 1), ("task", 1)])
def test_resumed_equals_uninterrupted(
    method: str, stop: tuple[str, int], images: Images, finished: dict[str, Any], tmp_path: Path
) -> None:
    cell = cell_of(method, images=images)
    if method == "joint" and stop[0] == "epoch":
        stop = ("epoch", 2)  # its only training

    def interrupt(event: dict[str, Any]) -> None:
        if (event["event"], event.get("task")) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(cell, images, tmp_path, interrupt)
    torch.manual_seed(99)  # whatever the next process does before
    events: list[dict[str, Any]] = []
    record = run(cell, images, tmp_path, events.append)
    assert events[0]["learnt"] == (stop[1] if stop[0] == "epoch" else 2)
    assert without_times(record) == without_times(finished[method])


@pytest.mark.parametrize("method", QUICK)
@pytest.mark.parametrize(
    ("stop", "between"),
    [
        *((4, False), (EPOCH, False), (2 * EPOCH, False), (4 * EPOCH - 2, False)),
        *((EPOCH, True), (2 * EPOCH, True)),
    ],
    ids=["within", "epoch's end", "task's end", "second task", "between", "after the last epoch"],
)
def test_a_task_goes_on_after_any_step(
    method: str,
    stop: int,
    between: bool,
    images: Images,
    finished: dict[str, Any],
    tmp_path: Path,
    steps: Any,
) -> None:
    cell = cell_of(method, images=images)
    if method == "joint":  # its epochs are thrice as long, and are all in the last task
        stop = {4 * EPOCH - 2: 2 * JOINT_EPOCH}.get(stop, stop * (3 if between else 1))
    with steps.stopping(stop, between), pytest.raises(Terminated):
        run(cell, images, tmp_path)
    assert (tmp_path / TRAINING).exists()
    torch.manual_seed(99)
    events: list[dict[str, Any]] = []
    record = run(cell, images, tmp_path, events.append)
    assert without_times(record) == without_times(finished[method])
    assert events[0]["ignored"] is None
    assert events[0]["epoch"] is not None
    # No step is taken twice, or left out.
    assert steps.count == (6 * EPOCH if method != "joint" else 2 * JOINT_EPOCH)
    assert [path.name for path in tmp_path.iterdir()] == [STATE]


@pytest.mark.gpu
@pytest.mark.parametrize("method", QUICK)
def test_a_task_goes_on_bit_for_bit_on_a_gpu(
    method: str, tmp_path: Path, steps: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    gpu = torch.device("cuda")
    images = load("digits", device=gpu)
    cell = cell_of(method, images=images)
    quiet: Any = lambda event: None  # noqa: E731
    try:
        deterministic()
        whole = cells.run(cell, images, gpu, tmp_path / "whole", GIT, quiet)
        for stop in (4, 2 * EPOCH + 1):
            steps.count = 0
            folder = tmp_path / str(stop)
            with steps.stopping(stop), pytest.raises(Terminated):
                cells.run(cell, images, gpu, folder, GIT, quiet)
            torch.cuda.manual_seed(99)
            record = cells.run(cell, images, gpu, folder, GIT, quiet)
            assert without_times(record) == without_times(whole)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other"])
def test_damaged_state_is_named_and_ignored(
    damage: str, images: Images, finished: dict[str, Any], tmp_path: Path
) -> None:
    cell = cell_of("finetune", images=images)
    run(cell if damage != "other" else cell_of("finetune", 1, images), images, tmp_path)
    path = tmp_path / STATE
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "empty":
        path.write_bytes(b"")
    events: list[dict[str, Any]] = []
    record = run(cell, images, tmp_path, events.append)
    assert str(path) in events[0]["ignored"]
    assert events[0]["learnt"] == 0
    assert without_times(record) == without_times(finished["finetune"])


@pytest.mark.parametrize("method", QUICK)
def test_state_is_plain_and_small(method: str, images: Images, tmp_path: Path) -> None:
    cell = cell_of(method, images=images, tasks=2)
    record = run(cell, images, tmp_path)
    path = tmp_path / STATE
    assert load_state(path, cell.hash)["course"]["accuracy"] == record["accuracy"]
    # The weights, the probes of the drift, some numbers; an optimizer's state if carried over.
    probes = 2 * 360 * 10
    carried = 0 if cell.settings.reset_optimizer else 2 * record["parameters"]["trainable"]
    stored = record["parameters"]["stored"] + probes + carried
    assert path.stat().st_size < 4 * stored * 1.05 + 20_000
    assert [p.name for p in tmp_path.iterdir()] == [STATE]


def test_events_tell_the_whole_cell(images: Images, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    record = run(cell_of("clnp", images=images, tasks=2), images, tmp_path, events.append)
    assert [event["event"] for event in events] == [
        "start",
        "epoch",
        "epoch",
        "task",
        "epoch",
        "epoch",
        "task",
        "end",
    ]
    epochs = [event for event in events if event["event"] == "epoch"]
    assert [(e["task"], e["epoch"]) for e in epochs] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(0 < e["loss"] < 3 and 0 <= e["validation"] <= 1 for e in epochs)
    assert events[3]["accuracy"]["test"] == record["accuracy"]["test"][0]
    assert [row["layer"] for row in events[6]["capacity"]] == ["fc1", "fc2"]


def test_loss_that_is_not_finite_ends_the_cell(images: Images, tmp_path: Path) -> None:
    diverging = dataclasses.replace(METHODS["finetune"], settings={"quickstart": Settings(lr=1e38)})
    cell = Cell(TINY, diverging, 0, images.fingerprint)
    with pytest.raises(FloatingPointError, match="task 0, epoch 0"):
        run(cell, images, tmp_path)


# --- grid search ----------------------------------------------------------------------------------

GRID = (
    "clnp.grid_l1=1e-4;1e-4,2e-3,1e-4",
    "clnp.grid_lr=0.004,0.01",
)


def without_search_times(record: dict[str, Any]) -> dict[str, Any]:
    """Leave the times out, also those of the candidates."""
    rows = [
        {key: value for key, value in row.items() if not key.endswith("_seconds")}
        for row in record["search"]
    ]
    return without_times(record) | {"search": rows}


def test_records_without_a_search_say_so(finished: dict[str, Any]) -> None:
    assert all(finished[method]["search"] == [] for method in QUICK)


def test_a_grid_of_one_is_plain_training_with_fine_tuning_too(
    images: Images, tmp_path: Path
) -> None:
    """Fine-tuning after the search goes on with the order of the data that training left."""
    plain = ("clnp.finetune_epochs=2", "clnp.finetune_lr=0.004", "clnp.lr=0.004")
    one = cell_of("clnp", images=images, settings=(*plain, "clnp.grid_lr=0.004"))
    without = cell_of("clnp", images=images, settings=plain)
    searched = run(one, images, tmp_path / "grid")
    straight = run(without, images, tmp_path / "plain")
    assert len(searched["search"]) == 1
    assert searched["history"] == straight["history"]
    assert searched["accuracy"] == straight["accuracy"]


def test_a_state_of_another_format_is_not_used(images: Images, tmp_path: Path) -> None:
    cell = cell_of("clnp", images=images)
    save_state(tmp_path / STATE, {"hash": cell.hash, "learner": {}})
    events: list[dict[str, Any]] = []
    run(cell, images, tmp_path, events.append)
    assert "another version of the code" in events[0]["ignored"]


def interrupted(cell: Cell, images: Images, folder: Path, task: int, **options: Any) -> None:
    """Run a cell until a task has been learnt."""

    def interrupt(event: dict[str, Any]) -> None:
        if event["event"] == "task" and event["task"] == task:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(cell, images, folder, interrupt, **options)


def altered(path: Path, hash_: str, **changes: Any) -> None:
    save_state(path, load_state(path, hash_) | changes)


def test_a_state_trained_with_other_defaults_is_not_used(
    images: Images, finished: dict[str, Any], tmp_path: Path
) -> None:
    """A default that has changed since leaves the hash as it was."""
    cell = cell_of("si", images=images)
    interrupted(cell, images, tmp_path, 0)
    config = cell.config | {"method": cell.config["method"] | {"xi": 0.2}}
    altered(tmp_path / STATE, cell.hash, config=config)
    events: list[dict[str, Any]] = []
    record = run(cell, images, tmp_path, events.append)
    assert "other settings (method.xi: recorded 0.2, now 0.1)" in events[0]["ignored"]
    assert without_times(record) == without_times(finished["si"])


@pytest.mark.parametrize("name", [STATE, TRAINING])
def test_a_state_of_another_kind_of_device_is_left_alone(
    name: str, images: Images, tmp_path: Path, steps: Any
) -> None:
    cell = cell_of("finetune", images=images)
    with (
        steps.stopping(EPOCH + 4 if name == TRAINING else 3 * EPOCH),
        pytest.raises(Terminated),
    ):
        run(cell, images, tmp_path)
    altered(tmp_path / name, cell.hash, device="cuda")
    before = (tmp_path / name).read_bytes()
    with pytest.raises(UserError, match=r"saved on cuda, and this is cpu.*--device cuda"):
        run(cell, images, tmp_path)
    assert (tmp_path / name).read_bytes() == before


def test_the_record_names_all_code_that_trained(images: Images, tmp_path: Path) -> None:
    cell = cell_of("finetune", images=images)

    def run_by(commit: str, dirty: bool, announce: Any) -> dict[str, Any]:
        git = {"commit": commit, "dirty": dirty}
        return cells.run(cell, images, torch.device("cpu"), tmp_path, git, announce)

    def interrupt(event: dict[str, Any]) -> None:
        if event["event"] == "task":
            raise KeyboardInterrupt

    for commit, dirty in (("a", False), ("b", True)):
        with pytest.raises(KeyboardInterrupt):
            run_by(commit, dirty, interrupt)
    events: list[dict[str, Any]] = []
    record = run_by("c", False, events.append)
    assert record["git"] == {"commit": "c", "dirty": True, "earlier": ["a", "b"]}
    assert "begun by changed code" in events[0]["ignored"]


@pytest.mark.parametrize("within", [False, True])
def test_the_record_names_all_machines_that_trained(
    within: bool,
    images: Images,
    finished: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: Any,
) -> None:
    cell, here = cell_of("clnp", images=images), cells.environment

    def run_on(hardware: str, stop: int) -> list[dict[str, Any]]:
        def changed(device: torch.device) -> dict[str, Any]:
            return here(device) | {"hardware": hardware, "python": f"of {hardware}"}

        events: list[dict[str, Any]] = []
        monkeypatch.setattr(cells, "environment", changed)
        with steps.stopping(stop), pytest.raises(Terminated):
            run(cell, images, tmp_path, events.append)
        return [event for event in events if event["event"] == "warning"]

    first = 4 if within else 2 * EPOCH + 1
    assert run_on("one", first) == []
    (told,) = run_on("another", first + EPOCH)
    assert "trained with hardware one; here it goes on with hardware another" in told["text"]
    assert len(run_on("another", first + 2 * EPOCH)) == 1
    monkeypatch.setattr(cells, "environment", here)
    record = run(cell, images, tmp_path)
    now = here(torch.device("cpu"))
    facts = {key: now[key] for key in cells.ROUNDING}
    assert record["environment"] == now | {
        "earlier": [facts | {"hardware": "one"}, facts | {"hardware": "another"}]
    }
    assert without_times(record | {"environment": now}) == without_times(finished["clnp"])
    assert decode(record).hardware.endswith(
        " after another, cpu, {0} threads after one, cpu, {0} threads".format(now["threads"])
    )


@pytest.mark.parametrize("method", [m for m in QUICK if m != "joint"])  # it learns once
@pytest.mark.parametrize("elsewhere", [True, False])
def test_the_rounding_of_another_machine_is_no_drift(
    elsewhere: bool, method: str, images: Images, finished: dict[str, Any], tmp_path: Path
) -> None:
    cell, rounding = cell_of(method, images=images), 1e-4
    interrupted(cell, images, tmp_path, 1)
    state = load_state(tmp_path / STATE, cell.hash)
    before = state["drift"]["drift"]
    for logits in state["drift"]["reference"].values():
        logits += rounding
    if elsewhere:
        state["course"]["environment"]["hardware"] = "another"
    save_state(tmp_path / STATE, state)
    record = run(cell, images, tmp_path)
    for task, drift in enumerate(finished[method]["logit_drift"]):
        # What has changed already is compared with what it was there.
        compared_there = task in before and not (elsewhere and before[task] == 0)
        off = abs(record["logit_drift"][task] - drift)
        assert off == pytest.approx(rounding, rel=0.1) if compared_there else off == 0
    apart = dict.fromkeys(["logit_drift", "environment"])
    assert without_times(record) | apart == without_times(finished[method]) | apart


def test_a_task_that_could_not_be_saved_is_saved_later(
    images: Images,
    finished: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: Any,
) -> None:
    """The disk is full when the first task ends, and has room again in the second."""
    cell, failed = cell_of("single_task", images=images), []

    def full(path: Path, state: dict[str, Any]) -> None:
        if path.name == STATE and not failed:
            failed.append(path)
            raise UserError("No space left on device")
        save_state(path, state)

    monkeypatch.setattr("benchmarks.states.save_state", full)
    with steps.stopping(3 * EPOCH), pytest.raises(Terminated):
        run(cell, images, tmp_path)
    assert failed
    events: list[dict[str, Any]] = []
    record = run(cell, images, tmp_path, events.append)
    assert (events[0]["learnt"], events[0]["epoch"], events[0]["ignored"]) == (1, 0, None)
    assert without_times(record) == without_times(finished["single_task"])


def test_a_task_goes_on_whoever_shares_it(
    images: Images, finished: dict[str, Any], tmp_path: Path, steps: Any
) -> None:
    """A training that was begun for several cells is gone on with for one, and the reverse."""
    cell = cell_of("clnp", images=images)
    assert cell.trained_hash is not None
    shared = SharedTrials(tmp_path / "shared.pt", cell.trained_hash, GIT, {})
    for first, then in ((shared, None), (None, shared)):
        folder = tmp_path / str(first is None)
        steps.count = 0
        with steps.stopping(4), pytest.raises(Terminated):
            run(cell, images, folder, shared=first)
        record = run(cell, images, folder, shared=then)
        assert steps.count == 6 * EPOCH
        assert without_times(record) == without_times(finished["clnp"])


@pytest.mark.parametrize("elsewhere", ["another commit", "another machine", None])
def test_what_was_begun_elsewhere_is_not_shared(
    elsewhere: str | None,
    images: Images,
    tmp_path: Path,
    steps: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The cell's own record names where; those of others that would use its training could not."""
    cell = cell_of("clnp", images=images)
    assert cell.trained_hash is not None
    shared = SharedTrials(tmp_path / "shared.pt", cell.trained_hash, GIT, {})
    with monkeypatch.context() as patch:
        if elsewhere == "another commit":
            patch.setitem(GIT, "commit", "1" * 40)
        if elsewhere == "another machine":
            there = cells.environment(torch.device("cpu")) | {"hardware": "another"}
            patch.setattr(cells, "environment", lambda device: there)
        with steps.stopping(4), pytest.raises(Terminated):
            run(cell, images, tmp_path / "cell", shared=shared)
    record = run(cell, images, tmp_path / "cell", shared=shared)
    assert ("earlier" in record["git"]) is (elsewhere == "another commit")
    assert ("earlier" in record["environment"]) is (elsewhere == "another machine")
    assert bool(shared.files()) is (elsewhere is None)


@pytest.mark.parametrize("tasks", ["first", "each"])
def test_a_search_reaches_the_record_and_survives_a_resume(
    tasks: str, images: Images, tmp_path: Path
) -> None:
    settings = (*GRID, f"clnp.grid_tasks={tasks}")
    cell = cell_of("clnp", images=images, settings=settings)
    events: list[dict[str, Any]] = []
    whole = run(cell, images, tmp_path / "whole", events.append)
    assert records.problem(whole) is None
    searched = [0] if tasks == "first" else [0, 1, 2]
    assert [row["task"] for row in whole["search"]] == [t for t in searched for _ in range(4)]
    assert [row["chosen"] for row in whole["search"]].count(True) == len(searched)
    assert [(row["l1"], row["lr"]) for row in whole["search"][:4]] == [
        (l1, lr) for l1 in (1e-4, [1e-4, 2e-3, 1e-4]) for lr in (0.004, 0.01)
    ]
    trained = [(e["task"], e["candidate"]) for e in events if e["event"] == "epoch"]
    assert trained == [
        (task, candidate)
        for task in range(3)
        for candidate in (range(4) if task in searched else [None])
        for _ in range(2)
    ]

    def interrupt(event: dict[str, Any]) -> None:
        # In the middle of a search, or between a searched task and the next.
        if event["event"] == "epoch" and event["task"] == 1 and event["epoch"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(cell, images, tmp_path / "resumed", interrupt)
    torch.manual_seed(99)
    again = run(cell, images, tmp_path / "resumed")
    assert without_search_times(again) == without_search_times(whole)


def test_later_tasks_use_what_the_first_chose(images: Images, tmp_path: Path) -> None:
    """The same cell without a search, but with the values chosen, learns the same."""
    searched = run(cell_of("clnp", images=images, settings=GRID), images, tmp_path / "searched")
    (row,) = (row for row in searched["search"] if row["chosen"])
    l1 = row["l1"] if isinstance(row["l1"], list) else [row["l1"]]
    settings = (f"clnp.l1={','.join(map(str, l1))}", f"clnp.lr={row['lr']}")
    assert row["best_validation"] == max(r["best_validation"] for r in searched["search"])
    plain = run(cell_of("clnp", images=images, settings=settings), images, tmp_path / "plain")
    for key in ("accuracy", "capacity", "history", "logit_drift"):
        assert searched[key] == plain[key], key


# --- names ----------------------------------------------------------------------------------------


def made_method(**settings: Any) -> Method[Settings]:
    return Method(
        name="made",
        build=METHODS["finetune"].build,
        settings={"pmnist": Settings(**settings)},
        task_id_at_test=False,
    )


def test_hash_is_what_it_always_was() -> None:
    # If this fails, every record ever made has lost its name: change the rule of the hash no more.
    assert Cell(PermutedMNIST(), made_method(), 0, "f").hash[:16] == "efa14490627c628e"
    assert Cell(PermutedMNIST(), made_method(lr=0.5), 0, "f").hash[:16] == "ea9462910457bca4"


def test_hash_names_what_changes_the_result() -> None:
    base = Cell(PermutedMNIST(), made_method(), 0, "f")
    others = [
        Cell(PermutedMNIST(tasks=3), made_method(), 0, "f"),
        Cell(PermutedMNIST(precision="fp32"), made_method(), 0, "f"),
        Cell(PermutedMNIST(), made_method(lr=0.1), 0, "f"),
        Cell(PermutedMNIST(), dataclasses.replace(made_method(), revision=2), 0, "f"),
        Cell(PermutedMNIST(), dataclasses.replace(made_method(), name="other"), 0, "f"),
        Cell(PermutedMNIST(), made_method(), 1, "f"),
        Cell(PermutedMNIST(), made_method(), 0, "e"),
    ]
    assert len({cell.hash for cell in [base, *others]}) == 8


def test_a_new_field_with_a_default_keeps_old_names() -> None:
    @dataclasses.dataclass(frozen=True)
    class Later(Settings):
        momentum: float = 0.9

    method = dataclasses.replace(made_method(), settings={"pmnist": Later()})
    assert Cell(PermutedMNIST(), method, 0, "f").hash == (
        Cell(PermutedMNIST(), made_method(), 0, "f").hash
    )


def test_any_override_renames_the_experiment() -> None:
    names = {PermutedMNIST().name, PermutedMNIST(tasks=10).name}
    assert names == {"pmnist"}
    custom = [
        PermutedMNIST(tasks=3),
        PermutedMNIST(epochs=60, method_epochs=False),
        PermutedMNIST(precision="fp32"),
        PermutedMNIST(settings=("clnp.margin=0.1",)),
    ]
    assert len({e.name for e in custom}) == 4
    assert all(e.name.startswith("pmnist-custom-") for e in custom)


def test_config_holds_every_field() -> None:
    config = cell_of("clnp").config
    assert set(config) == {"experiment", "method", "revision", "data"}
    assert set(config["method"]) == {f.name for f in dataclasses.fields(CLNPSettings)}
    assert {f.name for f in dataclasses.fields(TINY)} < set(config["experiment"])


def test_a_full_single_head_leaves_later_tasks_unlearnt(images: Images, tmp_path: Path) -> None:
    """As the paper's eleventh task on its wide network: no accuracy, and the cell is a result."""
    # The one unit of the last hidden layer is the first task's.
    cell = cell_of("clnp", images=images, hidden=(40, 1))
    record = run(cell, images, tmp_path)
    assert records.problem(record) is None
    assert len(record["history"]) == 1
    for matrix in record["accuracy"].values():
        assert [[value is None for value in row] for row in matrix] == [[False, True, True]] * 3
    assert [drift is None for drift in record["logit_drift"]] == [False, True, True]
    assert {row["task"] for row in record["capacity"]} == {0}
