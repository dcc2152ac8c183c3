"""What the documents say comes from the committed records."""

from __future__ import annotations

import re
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

from benchmarks import cell as cells
from benchmarks import methods
from benchmarks.cell import Cell
from benchmarks.data import load
from benchmarks.quickstart import Quickstart
from benchmarks.reporting.page import update_readme

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", ["README.md", "clnp/README.md"])
def test_tables_are_those_of_the_records(name: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy.md"
    shutil.copy(ROOT / name, copy)
    update_readme(copy, ROOT / "reports" / "records")
    assert copy.read_text() == (ROOT / name).read_text(), "run nox -s report"


@pytest.mark.parametrize("name", ["README.md", "clnp/README.md", *("baselines/" + p.name for p in
                                  (ROOT / "baselines").glob("*.md"))])  # fmt: skip
def test_links_lead_somewhere(name: str) -> None:
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_the_method_to_copy_runs_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's file and entry of a method, as they stand."""
    text = (ROOT / "README.md").read_text()
    plugin, entry = (
        block
        for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
        if "class PullPlugin" in block or "class PullSettings" in block
    )
    pull = types.ModuleType("baselines.pull")
    exec(plugin, vars(pull))
    monkeypatch.setitem(sys.modules, pull.__name__, pull)
    # Where its dataclass looks for the types of its fields.
    names = vars(methods) | {"__name__": "benchmarks.methods"}
    exec(entry.replace("\nMethod(", "\nmade = Method("), names)
    made = names["made"]
    monkeypatch.setitem(methods.METHODS, made.name, made)
    experiment = Quickstart(tasks=3, epochs=2, method_epochs=False, hidden=(40, 40), validation=300)
    images = load("digits")
    cell = Cell(experiment, made, 0, images.fingerprint)
    options = cell, images, torch.device("cpu")

    def stop(event: dict[str, object]) -> None:
        if event["event"] == "task" and event["task"] == 1:
            raise KeyboardInterrupt

    git = {"commit": None, "dirty": True}
    whole = cells.run(*options, tmp_path / "whole", git, lambda event: None)
    with pytest.raises(KeyboardInterrupt):
        cells.run(*options, tmp_path / "stopped", git, stop)
    resumed = cells.run(*options, tmp_path / "stopped", git, lambda event: None)
    assert resumed["accuracy"] == whole["accuracy"]
    plain = Cell(experiment, methods.METHODS["finetune"], 0, images.fingerprint)
    finetuned = cells.run(plain, *options[1:], tmp_path / "plain", git, lambda event: None)
    assert whole["accuracy"] != finetuned["accuracy"]
