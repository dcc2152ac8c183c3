"""Tuning: on validation data and seeds of its own, and what it chooses is what the presets say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cell as cells
from benchmarks import tune as tuning
from benchmarks.__main__ import main
from benchmarks.data import load
from benchmarks.errors import UserError
from benchmarks.methods import METHODS, Method, SISettings
from benchmarks.quickstart import Quickstart

ROOT = Path(__file__).resolve().parent.parent
TINY = Quickstart(epochs=1, method_epochs=False, hidden=(40, 40), batch_size=128)
CPU = torch.device("cpu")
GRID = tuple(SISettings(lr=0.004, strength=c, reset_optimizer=False) for c in (0.1, 50.0))
SI: Method[Any] = dataclasses.replace(METHODS["si"], grid={"quickstart": GRID})


def account(tmp_path: Path, **options: Any) -> dict[str, Any]:
    images = load("digits", test=False)
    return tuning.tune(SI, TINY, images, CPU, tmp_path, **options)


def results(found: dict[str, Any]) -> list[Any]:
    return [[run["validation"] for run in c["runs"]] for c in found["candidates"]]


def test_sharing_the_first_task_changes_nothing(tmp_path: Path) -> None:
    shared = account(tmp_path / "shared", seeds=[100, 101], tasks=2)
    apart = account(tmp_path / "apart", seeds=[100, 101], tasks=2, share=False)
    assert results(shared) == results(apart)
    assert results(shared)[0] != results(shared)[1]  # the strength does something
    assert len(list((tmp_path / "shared").rglob("first_task/**/seed*"))) == 2
    assert not list((tmp_path / "apart").rglob("first_task"))


def test_what_has_been_trained_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = account(tmp_path, tasks=2)
    monkeypatch.setattr(cells, "run", lambda *_: pytest.fail("trained again"))
    assert account(tmp_path, tasks=2) == first


def test_settings_with_an_early_effect_are_not_shared() -> None:
    """Each name in `later` is a setting of its method."""
    for method in METHODS.values():
        for settings in method.settings.values():
            assert method.later <= {field.name for field in dataclasses.fields(settings)}


def test_the_winner_is_the_first_of_the_highest_means() -> None:
    assert tuning.winner([[0.9, 0.5], [0.8, 0.7], [0.7, 0.8]]) == 1


@pytest.mark.parametrize("seeds", [[0], [100, 100], [], [101, 99]])
def test_seeds_of_the_tables_are_refused(tmp_path: Path, seeds: list[int]) -> None:
    with pytest.raises(UserError, match="tuning needs different ones from 100 on"):
        account(tmp_path, seeds=seeds)


def test_a_method_without_a_grid_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--method", "finetune", "--experiment", "quickstart"]) == 2
    assert "finetune has no grid for quickstart. Methods that have one: ewc" in (
        capsys.readouterr().err
    )


def test_grids_have_at_most_4_candidates_and_the_preset_is_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at most 4 different"):
        tuning.candidates(dataclasses.replace(SI, grid={"quickstart": GRID * 2}), TINY)
    for method in METHODS.values():
        for preset, grid in method.grid.items():
            assert method.settings[preset] in grid
            assert len(grid) <= tuning.MOST


def test_the_command_reads_no_test_data_and_writes_the_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def watched(self: Quickstart, data_dir: Any, device: Any, test: bool = True) -> Any:
        asked.append(test)
        return load("digits", device=device, test=test)

    monkeypatch.setattr(Quickstart, "load", watched)
    small = dataclasses.replace(SI, grid={"quickstart": GRID}, settings={"quickstart": GRID[0]})
    fast = tuple(dataclasses.replace(settings, epochs=1) for settings in GRID)
    monkeypatch.setitem(METHODS, "si", dataclasses.replace(small, grid={"quickstart": fast}))
    folders = ["--runs-dir", str(tmp_path / "runs"), "--out-dir", str(tmp_path / "tuning")]
    options = ["tune", "--method", "si", "--experiment", "quickstart", "--tasks", "2"]
    assert main([*options, *folders]) == 0
    assert asked == [False]
    written = json.loads((tmp_path / "tuning" / "quickstart" / "si.json").read_text())
    assert written["seeds"] == [100]
    assert [len(c["runs"][0]["validation"]) for c in written["candidates"]] == [2, 2]
    shown = capsys.readouterr().out
    assert "strength=0.1" in shown
    assert "<- winner" in shown
    assert "aren't" in shown  # the preset's epochs are not the winner's


def test_committed_accounts_agree_with_the_presets() -> None:
    accounts = sorted((ROOT / "reports" / "tuning").rglob("*.json"))
    assert accounts, "nothing to compare"
    for path in accounts:
        found = json.loads(path.read_text())
        assert tuning.agrees(found, METHODS[found["method"]]), path
        assert not any(run["git"]["dirty"] for c in found["candidates"] for run in c["runs"])
        other = dict(found, winner=(found["winner"] + 1) % len(found["candidates"]))
        assert not tuning.agrees(other, METHODS[found["method"]])
