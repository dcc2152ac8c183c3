"""The parts of `nox -s speed` that don't measure time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import speed
from benchmarks.__main__ import main
from benchmarks.cell import environment
from benchmarks.errors import UserError
from benchmarks.models import mlp, resnet18
from benchmarks.speed import Row, memory_ratio, partitioned
from clnp import sparsity


def network() -> nn.Module:
    return mlp(100, (300, 300), 10)


def test_training_needs_little_more_memory_and_less_once_half_is_frozen(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(sparsity, "CPU_PART", 2**12)  # as small beside this network as in full size
    x, y = torch.rand(64, 100), torch.arange(64) % 10
    assert memory_ratio(network, x, y, frozen=False) <= 1.1
    assert memory_ratio(network, x, y, frozen=True) < 1.0


def test_half_of_each_group_of_resnet18_freezes():
    half = partitioned(resnet18(10), torch.rand(2, 3, 32, 32), frozen=True)
    assert len(half.layout.groups) > 10
    for group in half.layout.groups:
        assert half.partition.after(0)[group.name] == group.width // 2


@pytest.mark.parametrize(
    ("ratio", "bound", "kind", "shown"),
    [
        (1.10, 1.10, "at most", "at most 1.10: ok"),
        (1.11, 1.10, "at most", "at most 1.10: ABOVE"),
        (1.00, 1.00, "below", "below 1.00: ABOVE"),
        (5.00, 5.00, "at least", "at least 5.00: ok"),
        (4.99, 5.00, "at least", "at least 5.00: BELOW"),
    ],
)
def test_a_row_says_whether_its_bound_is_kept(ratio: float, bound: float, kind: str, shown: str):
    assert shown in str(Row("a ratio", ratio, bound, kind))


def test_a_row_without_a_bound_has_no_verdict():
    assert str(Row("a ratio", 1.5)).endswith("  1.50")


def test_rows_are_written_as_they_come_with_what_they_were_measured_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupted(_device: torch.device) -> Iterator[Row]:
        yield Row("step, A / B", 1.234567, 1.1)
        yield Row("  a part of it", 0.5)
        raise KeyboardInterrupt

    monkeypatch.setattr(speed, "measured", interrupted)
    path = tmp_path / "new" / "speed.csv"
    with pytest.raises(KeyboardInterrupt):
        speed.main(path)
    about, *lines = path.read_text(encoding="utf-8").splitlines()
    found = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    assert f"hardware {found['hardware']}, device {found['device']}, threads" in about
    assert lines == [
        "what,ratio,bound,kind,kept",
        '"step, A / B",1.235,1.1,at most,False',
        "a part of it,0.5,,,",
    ]
    assert "ABOVE" in capsys.readouterr().out


@pytest.mark.parametrize(("ratio", "code"), [(1.0, 0), (1.2, 1)])
def test_a_missed_bound_fails_the_command(
    ratio: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    rows = [Row("a", ratio, 1.1), Row("b", 9.0), Row("c", 3.0, 2.0, "at least")]
    monkeypatch.setattr(speed, "measured", lambda _device: iter(rows))
    assert main(["speed"]) == code
    assert f"{2 - code} of 2 bounds are kept." in capsys.readouterr().out


def test_rows_are_not_written_over_a_folder(tmp_path: Path):
    with pytest.raises(UserError, match="is a folder"):
        speed.main(tmp_path)
