"""Bad input of every kind: a clear error, no traceback, and nothing finished is lost."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import data, records
from benchmarks.__main__ import main
from benchmarks.errors import UserError
from benchmarks.resume import FORMAT, Saver
from benchmarks.states import STATE, TRAINING

TINY = ("quickstart", "--tasks", "2", "--epochs", "2", "--wandb", "disabled", "--device", "cpu")
FINETUNE = ("--methods", "finetune", "--seeds")
STEP = 50
"""In the second task."""


class Bomb:
    """What, unpickled, leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def call(folder: Path, *options: str) -> int:
    folders = [f"--{name}-dir={folder / name}" for name in ("records", "runs", "out", "data")]
    return main(["run", *TINY, *folders, *options])


def timeless(path: Path) -> dict[str, Any]:
    record = json.loads(path.read_text())
    return {key: record[key] for key in record if key not in ("seconds", "checksum", "git")}


def record_of(folder: Path, seed: int) -> Path:
    (path,) = (folder / "records").rglob(f"seed{seed}-*.json")
    return path


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seed 0 is recorded; seed 1 was stopped in its second task; its record is beside, as whole."""
    patch = pytest.MonkeyPatch()
    patch.setattr("benchmarks.reporting.page.build", lambda *_: "the table")
    folder = tmp_path_factory.mktemp("template")
    assert call(folder, *FINETUNE, "0") == 0
    assert call(folder / "whole", *FINETUNE, "1") == 0
    real, count = Saver.after_step, 0

    def after_step(self: Saver, strategy: Any) -> None:
        nonlocal count
        count += 1
        if count == STEP:
            self.stop.asked = signal.SIGTERM
        real(self, strategy)

    patch.setattr(Saver, "after_step", after_step)
    assert call(folder, *FINETUNE, "1") == 143
    patch.undo()
    return folder


@pytest.fixture
def world(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the template."""
    monkeypatch.setattr("benchmarks.reporting.page.build", lambda *_: "the table")
    return Path(shutil.copytree(template, tmp_path / "world"))


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--save-every", "0"], "--save-every 0"),
        (["--save-every", "-1"], "--save-every -1"),
        (["--validation", "0.5"], "takes a number of images"),
        (["--augment"], "can't be augmented"),
        (["--set", "finetune.lr=-1"], "lr"),
        (["--set", "finetune.lr=fast"], "no value for the setting lr"),
        (["--set", "finetune.lr"], "not of the form"),
        (["--set", "lr=0.1"], "not of the form"),
        (["--set", "finetune.optimizer=adams"], "optimizer"),
        (["--set", "finetune.decay_from=2"], "decay_from"),
        (["--set", "../../x.lr=1"], "There is no method"),
    ],
)
def test_options(
    options: list[str], says: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = record_of(world, 0).read_bytes()
    assert call(world, *FINETUNE, "0", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert says in error
    assert record_of(world, 0).read_bytes() == before


def test_an_option_that_the_data_refuse(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(world, *FINETUNE, "0", "--validation", "1437") == 2
    assert "1437 training images: choose from 0 to 1436" in capsys.readouterr().err


def test_a_method_cannot_name_a_path(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(world, "--methods", "../../../evil", "--seeds", "0") == 2
    assert "evil" in capsys.readouterr().err
    assert not list(world.parent.rglob("evil*"))


# --- records --------------------------------------------------------------------------------------


def changed(key: str, value: Any) -> Callable[[bytes], bytes]:
    """Change a field, and leave the checksum as it was."""

    def change(content: bytes) -> bytes:
        return json.dumps(json.loads(content) | {key: value}).encode()

    return change


def without(key: str) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        record = json.loads(content)
        del record[key]
        return json.dumps(record).encode()

    return change


def cut(share: float) -> Callable[[bytes], bytes]:
    return lambda content: content[: int(share * len(content))]


def flipped(share: float) -> Callable[[bytes], bytes]:
    def flip(content: bytes) -> bytes:
        place = int(share * len(content))
        return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]

    return flip


places = random.Random(7)
CUTS = {f"cut at {share:.3f}": cut(share) for share in (places.random() for _ in range(6))}
FLIPS = {f"flipped at {share:.3f}": flipped(share) for share in (places.random() for _ in range(6))}
RECORDS: dict[str, Callable[[bytes], bytes]] = {
    **CUTS,
    **FLIPS,
    "empty": lambda _: b"",
    "no JSON": lambda _: b"accuracy = 100 %",
    "a list": lambda _: b"[]",
    "no text": lambda _: bytes(range(256)),
    "deeply nested": lambda _: b"[" * 100_000,
    "no accuracy": without("accuracy"),
    "no config": without("config"),
    "better than possible": changed("accuracy", {"test": [[1.5]], "validation": [[1.0]]}),
    "no number": changed("accuracy", {"test": [[float("nan")]], "validation": [[1.0]]}),
    "from the future": changed("accuracy", {"test": [[1, 1], [1, 1]], "validation": [[1]]}),
    "no matrix": changed("accuracy", {"test": "good", "validation": "good"}),
    "another seed": changed("seed", 3),
    "a path for a method": changed("method", "../../evil"),
    "another config": changed("config", {"experiment": {}, "method": {}, "data": {}}),
}


@pytest.mark.parametrize("damage", RECORDS)
def test_a_record(damage: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = record_of(world, 0)
    damaged = RECORDS[damage](path.read_bytes())
    path.write_bytes(damaged)
    assert call(world, *FINETUNE, "0", "1") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"Error: {path} ")
    assert "Restore it from git, or delete it" in error
    assert path.read_bytes() == damaged


# --- saved states ---------------------------------------------------------------------------------


def sealed(content: bytes) -> bytes:
    """Put the right checksum in front."""
    return hashlib.sha256(content).digest() + content


def archive(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def bomb(content: bytes) -> bytes:
    return sealed(archive({"format": FORMAT, "learner": Bomb(Path(os.environ["BOMB"]))}))


STATES: dict[str, Callable[[bytes], bytes]] = {
    **CUTS,
    **FLIPS,
    "empty": lambda _: b"",
    "garbage": lambda _: b"garbage",
    "a sealed pickle": lambda _: sealed(pickle.dumps({"format": FORMAT})),
    "a bomb": bomb,
    "a sealed list": lambda _: sealed(archive([1, 2])),
    "another format": lambda _: sealed(archive({"format": FORMAT - 1})),
    "another cell's": lambda _: sealed(archive({"format": FORMAT, "hash": "0" * 64})),
}


@pytest.mark.parametrize("name", [STATE, TRAINING])
@pytest.mark.parametrize("damage", STATES)
def test_a_saved_state(
    damage: str,
    name: str,
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BOMB", str(world / "exploded"))
    recorded = record_of(world, 0).read_bytes()
    (path,) = (world / "runs").rglob(name)
    path.write_bytes(STATES[damage](path.read_bytes()))
    assert call(world, *FINETUNE, "0", "1") == 0
    assert f"{path} is not used" in capsys.readouterr().out
    assert not (world / "exploded").exists()
    # It is trained again from what is left, to the same end.
    assert timeless(record_of(world, 1)) == timeless(record_of(world / "whole", 1))
    assert record_of(world, 0).read_bytes() == recorded


def test_the_bomb_is_one(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


# --- data -----------------------------------------------------------------------------------------


def write_npz(path: Path, **changes: Any) -> None:
    shapes = {"train": 20, "test": 10}
    arrays: dict[str, Any] = {}
    for part, count in shapes.items():
        arrays[f"{part}_images"] = np.zeros((count, 32, 32, 3), np.uint8)
        arrays[f"{part}_labels"] = np.zeros(count, np.uint8)
    arrays |= changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})


def npz_with(name: str, content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        write_npz(path)
        with zipfile.ZipFile(path, "a") as file:
            file.writestr(name, content)

    return write


ARCHIVES: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: path.write_bytes(b"") and None,
    "garbage": lambda path: path.write_bytes(b"garbage" * 100) and None,
    "other images": write_npz,
    "no labels": lambda path: write_npz(path, train_labels=None),
    "objects": lambda path: write_npz(
        path, train_images=np.array([Bomb(path.with_name("exploded"))], dtype=object)
    ),
    "floats": lambda path: write_npz(path, train_images=np.zeros((20, 32, 32, 3), np.float64)),
    "another shape": lambda path: write_npz(path, train_images=np.zeros((20, 7), np.uint8)),
    "fewer labels": lambda path: write_npz(path, train_labels=np.zeros(3, np.uint8)),
    "a path out of the folder": npz_with("../../evil.npy", b"evil"),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_an_archive(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a" / "data"
    folder.mkdir(parents=True)
    ARCHIVES[kind](folder / "cifar10.npz")
    monkeypatch.setattr("socket.create_connection", lambda *_, **__: pytest.fail("downloads"))
    with pytest.raises(UserError, match=r"cifar10.*nox -s prepare") as error:
        data.load("cifar10", folder)
    assert str(folder) in str(error.value)
    assert not list(tmp_path.rglob("evil*"))
    assert not (folder / "exploded").exists()


# --- full disks -----------------------------------------------------------------------------------


def in_a_child(act: Callable[[], int]) -> int:
    """Run in a process that can't write files of more than 30 kB, as if the disk were full."""
    if process := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    code = 99
    try:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        code = act()
    finally:
        os._exit(code)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows can't fork")
def test_a_full_disk_costs_no_result(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fresh = tmp_path / "fresh"
    assert in_a_child(lambda: call(fresh, *FINETUNE, "1")) == 0
    # States don't fit, the record does.
    assert timeless(record_of(fresh, 1)) == timeless(record_of(world / "whole", 1))
    left = [path.name for path in fresh.rglob("*") if path.is_file()]
    assert not [name for name in left if name.endswith((".pt", "tmp"))], left
    assert "The training goes on, not saved" in capfd.readouterr().out


def test_a_record_waits_for_room(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, tries = records.write, 0

    def write(path: Path, record: dict[str, Any]) -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise UserError(f"Cannot write {path}: No space left on device.")
        real(path, record)

    monkeypatch.setattr(records, "write", write)
    monkeypatch.setattr("benchmarks.runner.PAUSE", 0.0)
    assert call(world, *FINETUNE, "1") == 0
    assert capsys.readouterr().out.count("No space left on device. Trying again") == 2
    assert timeless(record_of(world, 1)) == timeless(record_of(world / "whole", 1))
    # Nobody makes room: what is saved stays, and the same command goes on from there.
    tries = -100
    assert call(world, *FINETUNE, "2") == 2
    assert "Error: Cannot write" in capsys.readouterr().err
    assert len(list((world / "runs").rglob(STATE))) == 1
    tries = 100
    assert call(world, *FINETUNE, "2") == 0


# --- results of grids -----------------------------------------------------------------------------

ACCOUNTS: dict[str, Callable[[bytes], bytes]] = {
    "cut": cut(0.6),
    "flipped": flipped(0.4),
    "empty": lambda _: b"",
    "a list": lambda _: b"[]",
    "a number for the candidates": changed("candidates", 3),
}


@pytest.mark.parametrize("damage", ACCOUNTS)
def test_the_result_of_a_grid(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(__file__).parent.parent / "reports" / "tuning" / "quickstart" / "si.json"
    path = tmp_path / "tuning" / "quickstart" / "si.json"
    path.parent.mkdir(parents=True)
    damaged = ACCOUNTS[damage](source.read_bytes())
    path.write_bytes(damaged)
    folders = [f"--{name}-dir={tmp_path / name}" for name in ("tuning", "runs", "data")]
    assert main(["tune", "--method", "si", "--experiment", "quickstart", *folders]) == 2
    assert capsys.readouterr().err.startswith(f"Error: {path} is damaged")
    assert path.read_bytes() == damaged
