"""What the documents say comes from the committed records."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

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
