"""Verdicts and figures of split CIFAR, on made-up cells."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from benchmarks.reporting import claims, figures, frames, load, page, tables

RECORDS = Path(__file__).parent / "fixtures" / "records"
TARGETS = load.targets(Path(__file__).parent.parent / "reports" / "targets")
NARROW, WIDE = TARGETS["split_cifar"], TARGETS["split_cifar_wide"]
LAYERS = ("conv1", "conv2", "conv3", "conv4", "fc")


def cell(
    method: str,
    accuracy: list[float],
    use: dict[str, list[float]] | None = None,
    seed: int = 0,
    **fields: Any,
) -> load.Cell:
    """Accuracy (%) on each task whenever it was learnt; shares in use by layer and task."""
    base = load.cells(RECORDS, "pmnist", paper=True)[0][0]
    final = np.array(accuracy, dtype=np.float64)
    matrix = np.where(np.tri(len(final), dtype=bool), final, np.nan)
    rows = [
        {
            **{"task": task, "layer": layer, "used": round(1000 * share), "reused": 0},
            "new": round(1000 * (share - (shares[task - 1] if task else 0))),
            **{"free": round(1000 * (1 - share)), "used_fraction": share},
        }
        for layer, shares in (use or {}).items()
        for task, share in enumerate(shares)
    ]
    return replace(
        *(base,), method=method, seed=seed, test=matrix, validation=matrix,
        capacity=pd.DataFrame(rows), drift=0.0, **fields,
    )  # fmt: skip


def verdict(identity: str, target: dict[str, Any], cells: list[load.Cell]) -> claims.Verdict:
    (claim,) = [claim for claim in target["claims"] if claim["id"] == identity]
    return claims.verdict(claim, target, cells)


def seeds(method: str, accuracy: list[float], use: Any = None, count: int = 3) -> list[load.Cell]:
    """Cells whose values differ a little by seed."""
    return [
        cell(
            method,
            [a + 0.1 * s for a in accuracy],
            {
                layer: [share - 0.001 * s for share in shares]
                for layer, shares in (use or {}).items()
            },
            s,
        )
        for s in range(count)
    ]


SI = [73.0, 74, 75, 76, 74, 77]
FULL = {"conv1": [0.95] * 6, "conv2": [0.92, *[1.0] * 5], "fc": [0.4, 0.7, 0.9, 1.0, 1.0, 1.0]}
ROOM = {"conv1": [0.8] * 6, "conv2": [0.7] * 6, "fc": [0.2, 0.4, 0.5, 0.7, 0.9, 1.0]}


def test_above_si_on_every_task() -> None:
    better = [value + 2 for value in SI]
    cells = seeds("clnp_m2", better) + seeds("si", SI)
    result = verdict("F4-order", NARROW, cells)
    assert result.word == "reproduced"
    assert result.evidence.count("on task") == 6
    once_below = [*better[:3], SI[3] - 1, *better[4:]]
    assert (
        verdict("F4-order", NARROW, seeds("clnp_m2", once_below) + seeds("si", SI)).word == "partly"
    )
    below = [value - 2 for value in SI]
    assert (
        verdict("F4-order", NARROW, seeds("clnp_m2", below) + seeds("si", SI)).word
        == "not reproduced"
    )
    assert verdict("F4-order", NARROW, [c for c in cells if c.seed == 0]).word == (
        "consistent (n = 1)"
    )
    assert verdict("F4-order", NARROW, seeds("clnp_m2", better)).word == "not yet measured"


def test_capacity_that_runs_out() -> None:
    high, low = [78.0] * 6, [78.0, 78, 78, 78, 60, 61]
    cells = seeds("clnp_m1", low, FULL) + seeds("clnp_m2", high, ROOM)
    assert verdict("F4-m1", NARROW, cells).word == "reproduced"
    unhurt = seeds("clnp_m1", high, FULL) + seeds("clnp_m2", high, ROOM)
    assert verdict("F4-m1", NARROW, unhurt).word == "partly"
    roomy = seeds("clnp_m1", high, ROOM) + seeds("clnp_m2", high, ROOM)
    assert verdict("F4-m1", NARROW, roomy).word == "not reproduced"


def test_capacity_that_lasts() -> None:
    high = [value + 2 for value in SI]
    assert verdict("F4-m2", NARROW, seeds("clnp_m2", high, ROOM) + seeds("si", SI)).word == (
        "reproduced"
    )
    assert verdict("F4-m2", NARROW, seeds("clnp_m2", high, FULL) + seeds("si", SI)).word == "partly"
    low = [value - 2 for value in SI]
    assert verdict("F4-m2", NARROW, seeds("clnp_m2", low, FULL) + seeds("si", SI)).word == (
        "not reproduced"
    )


def test_layers_full_at_once() -> None:
    assert verdict("F4-full", NARROW, seeds("clnp_m1", SI, FULL)).word == "reproduced"
    assert verdict("F4-full", NARROW, seeds("clnp_m1", SI, ROOM)).word == "not reproduced"
    half = FULL | {"conv2": [0.5] * 6}
    assert verdict("F4-full", NARROW, seeds("clnp_m1", SI, half)).word == "partly"
    assert verdict("F4-full", NARROW, seeds("clnp_m1", SI)).word == "not yet measured"


def test_fine_tuning() -> None:
    tuned, plain, alone = [80.0, *[79.0] * 5], [77.0] * 6, [80.2, *[70.0] * 5]
    cells = seeds("clnp_m2", plain) + seeds("single_task", alone)
    assert verdict("F4-ft", NARROW, cells + seeds("clnp_m4_ft", tuned)).word == "reproduced"
    lossy = [70.0, *tuned[1:]]
    assert verdict("F4-ft", NARROW, cells + seeds("clnp_m4_ft", lossy)).word == "partly"
    assert verdict("F4-ft", NARROW, cells + seeds("clnp_m4_ft", [60.0] * 6)).word == (
        "not reproduced"
    )


NAN = float("nan")
TEN = [75.0] * 10
GROWN = {
    "conv1": [0.3, 0.4, *[0.4] * 8],
    "conv2": [0.2, 0.3, 0.4, *[0.4] * 7],
    "conv3": [0.2, 0.3, 0.4, 0.45, 0.5, *[0.5] * 5],
    "conv4": list(np.linspace(0.1, 0.8, 10)),
    "conv5": [*(0.12 * np.arange(1, 8)), 0.9, 0.95, 1.0],
}


def test_ten_tasks_and_no_more() -> None:
    full = [cell("clnp_m2", [*TEN, NAN], GROWN, seed) for seed in range(2)]
    assert verdict("F5-ten", WIDE, full).word == "reproduced"
    assert verdict("F5-ten", WIDE, [cell("clnp_m2", [*TEN, 70.0], GROWN)]).word == (
        "not consistent (n = 1)"
    )
    assert verdict("F5-ten", WIDE, [cell("clnp_m2", TEN, GROWN)]).word == "not yet measured"


def test_even_growth_then_little_room() -> None:
    ours = [*[75.0] * 7, 60.0, 60.0, 60.0, NAN]
    alone = [cell("single_task", [75.0 - 0.1 * s] * 11, seed=s) for s in range(2)]
    mine = [cell("clnp_m2", [v + 0.1 * s for v in ours], GROWN, s) for s in range(2)]
    assert verdict("F5-linear", WIDE, mine + alone).word == "reproduced"
    assert verdict("F5-linear", WIDE, [mine[0], alone[0]]).word == "consistent (n = 1)"
    # Below training alone, but no more than the tasks before: that is no lack of room.
    low = [cell("clnp_m2", [*[59.0 + 0.1 * s] * 7, *ours[7:]], GROWN, s) for s in range(2)]
    assert verdict("F5-linear", WIDE, low + alone).word == "partly"
    uneven = GROWN | {"conv5": [0.5, *np.linspace(0.55, 0.9, 8), 1.0]}
    one = [cell("clnp_m2", [*TEN, NAN], uneven), alone[0]]
    assert verdict("F5-linear", WIDE, one).word == "partly consistent (n = 1)"


@pytest.mark.parametrize(
    ("learnt", "tasks", "word"), [(6, 11, "not reproduced"), (7, 7, "not yet measured")]
)
def test_a_network_that_is_full_too_early_refutes(learnt: int, tasks: int, word: str) -> None:
    grown = {layer: shares[:learnt] for layer, shares in GROWN.items()}
    short = [*[75.0] * learnt, *[NAN] * (tasks - learnt)]
    cells = [cell("clnp_m2", short, grown, s) for s in range(2)]
    cells += [cell("single_task", [75.0] * tasks, seed=s) for s in range(2)]
    assert verdict("F5-linear", WIDE, cells).word == word


def test_tasks_that_found_no_room_reproduce_no_accuracy() -> None:
    target = TARGETS["pmnist"]
    alone = [cell("single_task", [98.45 + 0.01 * s] * 10, seed=s) for s in range(3)]
    whole = [cell("clnp", [98.42 + 0.01 * s] * 10, seed=s) for s in range(3)]
    assert verdict("T1", target, whole + alone).word == "reproduced"
    part = [cell("clnp", [*[98.42 + 0.01 * s] * 7, *[NAN] * 3], seed=s) for s in range(3)]
    result = verdict("T1", target, part + alone)
    assert result.word == "not reproduced"
    assert "7 of 10 tasks" in result.evidence
    others = [cell(m, [97.0] * 10) for m in ("superposition", "si", "ewc")]
    assert verdict("T1-order", target, part + others).word == "not reproduced"


def test_means_over_some_tasks_say_so_and_are_compared_on_these() -> None:
    mine = [cell("clnp_m2", [*[70.0 + s] * 10, NAN], GROWN, s) for s in range(2)]
    alone = [cell("single_task", [*[71.0 + s] * 10, 20.0], seed=s) for s in range(2)]
    row = frames.main_frame(mine + alone, {}, ()).set_index("method").loc["clnp_m2"]
    assert tables.ours(row) == "70.50 ± 0.71, over 10 of 11 tasks"
    frame = frames.comparison_frame(mine + alone, 0.95, WIDE["reference"])
    assert frame.method.tolist() == ["single_task"]
    assert frame.difference.tolist() == [1.0]
    table = tables.comparison_table(mine + alone, WIDE)
    assert table is not None
    assert "CLNP, m = 2 %" in table.caption


def test_small_drop_and_nothing_afterwards() -> None:
    def with_drop(drop: float, **fields: Any) -> list[load.Cell]:
        cuts = pd.DataFrame([(0, 80.0, 80.0 - drop)], columns=["task", "best", "pruned"])
        return [cell("clnp_m2", [*TEN, NAN], GROWN, cuts=cuts)]

    assert verdict("F5-drop", WIDE, with_drop(1.9)).word == "consistent (n = 1)"
    assert verdict("F5-drop", WIDE, with_drop(2.5)).word == "partly consistent (n = 1)"
    nothing = pd.DataFrame(columns=["task", "best", "pruned"])
    assert verdict("F5-drop", WIDE, [cell("clnp_m2", TEN, GROWN, cuts=nothing)]).word == (
        "not yet measured"
    )


def test_where_layers_stop_growing() -> None:
    assert verdict("F5-early", WIDE, [cell("clnp_m2", [*TEN, NAN], GROWN)]).word == (
        "consistent (n = 1)"
    )
    later = GROWN | {"conv1": [0.3, 0.4, 0.5, *[0.5] * 7]}
    assert verdict("F5-early", WIDE, [cell("clnp_m2", [*TEN, NAN], later)]).word == (
        "partly consistent (n = 1)"
    )


@pytest.mark.parametrize("target", [NARROW, WIDE], ids=["narrow", "wide"])
def test_without_records_nothing_is_measured(target: dict[str, Any]) -> None:
    for claim in target["claims"]:
        assert claims.verdict(claim, target, []).word == "not yet measured"


def test_figure_of_final_accuracies_has_the_numbers_and_no_unlearnt_task() -> None:
    cells = [cell("clnp_m2", [*TEN, NAN], seed=s) for s in range(2)]
    cells += [cell("single_task", [70.0 + s] * 11, seed=s) for s in range(2)]
    frame = frames.final_frame(cells, "test")
    mine = frame[frame.method == "clnp_m2"]
    assert mine.task.tolist() == list(range(1, 11))
    alone = frame[frame.method == "single_task"]
    assert alone.task.tolist() == list(range(1, 12))
    assert set(alone.accuracy) == {70.5}
    assert alone.sd.to_numpy() == pytest.approx(2**-0.5)
    assert not frame["depleted"].any()
    # A task that one seed lacks is the mean of the others.
    cells[0] = cell("clnp_m2", [*TEN[:9], NAN, NAN])
    tenth = frames.final_frame(cells, "test").query("method == 'clnp_m2' and task == 10")
    assert (tenth.accuracy.tolist(), tenth.n.tolist()) == ([75.0], [1])
    picture = figures.final(frame, "fig5a", "caption", "test")
    assert picture.pdf.startswith(b"%PDF")


def test_a_task_that_one_seed_lacks_is_the_mean_of_the_others_everywhere() -> None:
    cells = [cell("clnp_m2", [*TEN[:9], NAN, NAN]), cell("clnp_m2", [*TEN, NAN], seed=1)]
    text = tables.per_task_table(cells).text.iloc[0]
    final = frames.final_frame(cells, "test").set_index("task")["accuracy"]
    assert (text["Task 10"], text["Task 11"]) == (f"{final[10]:.2f} (n = 1)", "—")
    assert text["Task 9"] == f"{final[9]:.2f}"
    means = [np.nanmean(one.test[-1]) for one in cells]
    assert text["Mean"] == f"{np.mean(means):.2f}, over 9 of 11 tasks"  # as in the main table
    matrix = frames.matrix_frame(cells).query("after_task == 11").set_index("on_task")
    assert matrix["n"].tolist() == [2] * 9 + [1]
    assert matrix["accuracy"].tolist() == final.tolist()
    lines = frames.over_tasks_frame(cells).query("seed == 'mean'")
    assert lines["after_task"].tolist() == list(range(1, 12))
    assert lines["learnt_tasks"].iloc[-1] == pytest.approx(np.mean(means))


def test_a_task_that_finds_no_free_unit_is_marked() -> None:
    full = [cell("clnp_m1", SI, FULL, s) for s in range(2)]
    last = {**FULL, "fc": [0.4, 0.7, 0.9, 0.95, 1.0, 1.0]}
    frame = frames.final_frame(full, "validation")
    assert frame["depleted"].tolist() == [0] * 4 + [2] * 2  # full after the fourth task
    whole = figures.final(frame, "fig4a", "", "validation").png
    frame = frames.final_frame([full[0], cell("clnp_m1", SI, last, 1)], "validation")
    assert frame["depleted"].tolist() == [0] * 4 + [1, 2]
    drawn = [
        figures.final(frame.assign(depleted=[*[0] * 4, fifth, 2]), "fig4a", "", "validation").png
        for fifth in (0, 1, 2)
    ]
    assert len({*drawn}) == 3  # filled, hollow with 1/2 beside it, hollow
    assert drawn[2] == whole
    # Of a single head: the eleventh task could not be learnt, and has no row.
    rows = frames.final_frame([cell("clnp_m2", [*TEN, NAN], GROWN)], "test")
    assert rows["depleted"].tolist() == [0] * 10
    assert figures.final(frame.assign(depleted=0), "fig4a", "", "validation").png != whole


@pytest.mark.parametrize("experiment", ["split_cifar_reduced", "split_cifar_wide_reduced"])
def test_a_reduced_run_is_marked_in_its_pictures_and_tables(
    experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [cell("clnp_m1", SI, FULL), cell("clnp_m2", SI, ROOM)]
    monkeypatch.setattr(load, "cells", lambda *_, **__: (made, []))

    def drawn(target: dict[str, Any]) -> dict[str, bytes]:
        made = page.section(tmp_path, experiment, target, tmp_path)
        page._write(tmp_path, made)
        shown = (*made.pictures, *made.headline, *made.details)
        assert all(
            (target.get("mark", "none") in part.caption) is ("mark" in target) for part in shown
        )
        return {
            path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".csv"
        }

    target = TARGETS[experiment]
    marked, plain = drawn(target), drawn({k: v for k, v in target.items() if k != "mark"})
    assert {"fig4a.png", "fig4b.png"} <= set(marked) or {"fig5a.png", "fig5b.png"} <= set(marked)
    assert [name for name in marked if marked[name] == plain[name]] == []


@pytest.mark.parametrize(
    ("living", "more", "said"),
    [
        (80.0, {}, None),
        (79.0, {}, None),
        (78.98, {}, "none but dead units"),
        (78.98, {"below_margin": "dead"}, "none but dead units"),
        (78.98, {"below_margin": "harmless"}, "only what costs no accuracy"),
    ],
)
def test_a_cut_below_the_margin_is_remarked(
    living: float, more: dict[str, Any], said: str | None
) -> None:
    columns = ["task", "best", "trained", "living", "pruned"]
    cuts = pd.DataFrame([(0, 80.0, 79.0, living, 79.0)], columns=columns)
    settings = json.dumps({"method": {"margin": 0.01, **more}})
    made = cell("clnp_m1", SI, FULL, cuts=cuts, settings=settings)
    told = [note for note in load._remarks([made]) if "could be cut" in note]
    assert len(told) == (said is not None)
    assert all("after task 1 " in note and f"so that {said} could be cut" in note for note in told)


def test_older_records_tell_what_was_living_by_their_cut() -> None:
    entry: dict[str, Any] = {"trained_validation": 0.79, "pruned_validation": 0.78}
    assert load._living(entry) == 0.78
    entry["fine_tuning"] = [{"cut_validation": 0.77}, {"cut_validation": 0.76}]
    assert load._living(entry) == 0.77
    assert load._living(entry | {"living_validation": 0.785}) == 0.785


@pytest.mark.parametrize("experiment", ["split_cifar", "split_cifar_wide"])
def test_a_section_has_the_papers_figures(
    experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = TARGETS[experiment]
    made = (
        seeds("clnp_m1", SI, FULL, 2) + seeds("clnp_m2", SI, ROOM, 2) + seeds("si", SI, count=2)
        if experiment == "split_cifar"
        else [cell("clnp_m2", [*TEN, NAN], GROWN, s) for s in range(2)]
    )
    monkeypatch.setattr(load, "cells", lambda *_, **__: (made, []))
    section = page.section(tmp_path, experiment, target, tmp_path)
    names = {picture.name for picture in section.pictures}
    assert {target["final"]["file"], target["use"]["file"]} <= names
    assert "claims" in {table.name for table in section.headline}
    compared = [table for table in section.details if "CLNP, m = 2 %" in table.caption]
    assert [table.name for table in compared] == ["comparisons"] * (experiment == "split_cifar")


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        (["fc1", "fc2"], ["First layer", "Second layer"]),
        (["body.conv1", "body.conv2", "body.fc"], ["conv1", "conv2", "fc"]),
        (["conv1", "conv5"], ["conv1", "conv5"]),
    ],
)
def test_layers_are_called_as_in_the_paper(layers: list[str], names: list[str]) -> None:
    assert figures._layer_names(layers) == names
