"""Reports are tested on committed made-up records (tests/fixtures/make_records.py).

Golden files: after an intended change run with UPDATE_GOLDEN=1 and read the difference.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from benchmarks.errors import UserError
from benchmarks.records import path_of, read, read_tuning, write, write_tuning
from benchmarks.reporting import claims, formats, frames, load, page, stats, tables, text
from benchmarks.reporting.figures import close_up, line, style

TESTS = Path(__file__).parent
RECORDS = TESTS / "fixtures" / "records"
TUNING = TESTS / "fixtures" / "tuning"
GOLDEN = TESTS / "golden" / "reporting"
TARGETS = TESTS.parent / "reports" / "targets"


def record_of(experiment: str, method: str, seed: int) -> dict[str, Any]:
    (path,) = (RECORDS / experiment / method).glob(f"seed{seed}-*.json")
    return {key: value for key, value in read(path).items() if key != "checksum"}


def put(folder: Path, record: dict[str, Any], tag: str = "") -> Path:
    name = f"{record['experiment']}{record['method']}{record['seed']}{tag}"
    record = record | {"hash": hashlib.sha256(name.encode()).hexdigest()}
    path = path_of(folder, record["experiment"], record["method"], record["seed"], record["hash"])
    write(path, record)
    return path


def cells_of(experiment: str) -> list[load.Cell]:
    return load.cells(RECORDS, experiment, paper=experiment == "pmnist")[0]


@pytest.fixture(scope="module")
def target() -> dict[str, Any]:
    return tomllib.loads((TARGETS / "pmnist.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    (out / "text").write_text(page.build(RECORDS, out / "out", tuning_dir=TUNING), encoding="utf-8")
    return out


# ---------------------------------------------------------------- statistics


def test_summary_is_sample_deviation_and_t_interval() -> None:
    values = [98.1, 98.4, 98.2, 98.7]
    summary = stats.summarise(values)
    assert summary.sd == pytest.approx(pd.Series(values).std(ddof=1))
    expected = scipy_stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (summary.low, summary.high) == pytest.approx((expected.low, expected.high))


def test_one_seed_has_no_deviation_and_no_interval() -> None:
    summary = stats.summarise([98.0])
    assert summary.mean == 98.0
    assert np.isnan([summary.sd, summary.low, summary.high]).all()


def test_backward_transfer_leaves_out_the_last_task() -> None:
    matrix = np.array([[90, np.nan, np.nan], [85, 80, np.nan], [70, 78, 99]])
    assert stats.backward_transfer(matrix) == pytest.approx(((70 - 90) + (78 - 80)) / 2)
    assert np.isnan(stats.backward_transfer(matrix[:1, :1]))


def test_backward_transfer_of_joint_training_is_unknown() -> None:
    assert np.isnan(stats.backward_transfer(np.array([[np.nan, np.nan], [90, 91]])))


def test_paired_tests_are_scipys_and_five_seeds_cannot_go_below_a_sixteenth() -> None:
    first, second = [98.3, 98.4, 98.5, 98.2, 98.1], [97.0, 97.1, 97.3, 96.0, 97.9]
    result = stats.paired(first, second)
    assert result.p_t == pytest.approx(scipy_stats.ttest_rel(first, second).pvalue)
    assert result.p_permutation == pytest.approx(0.0625)
    assert result.low < result.difference < result.high
    assert np.isnan(stats.paired([1.0], [2.0]).p_t)


def test_many_seeds_take_a_sample_of_the_permutations() -> None:
    few, many = np.linspace(0.1, 1.4, 14), np.linspace(-1.5, 1.7, 30)
    exact = stats.paired(few, np.zeros(14)).p_permutation
    assert exact == pytest.approx(2.0**-13)
    result = stats.paired(many, np.zeros(30))  # of 2 ** 30 flips, which nobody would wait for
    assert result == stats.paired(many, np.zeros(30))
    assert result.p_permutation == pytest.approx(result.p_t, abs=0.03)


def test_holm_leaves_out_what_has_no_test() -> None:
    assert stats.holm([0.01, float("nan"), 0.04]) == pytest.approx(
        [0.02, float("nan"), 0.04], nan_ok=True
    )


@pytest.mark.parametrize(
    ("values", "small"),
    [
        ([98.40, 98.42, 98.45], True),
        ([98.0, 98.8, 98.4], False),  # the mean fits, the spread does not
        ([98.0, 98.01, 98.02], False),
        ([98.42, 98.42], True),
        ([97.0, 97.0], False),
    ],
)
def test_equivalence(values: list[float], small: bool) -> None:
    assert (stats.equivalence(values, 98.42, 0.2) < 0.05) is small


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("wrong", ["NaN", "Infinity"])
def test_what_is_no_number_is_refused(wrong: str, tmp_path: Path) -> None:
    path = put(tmp_path, record_of("pmnist", "clnp", 0))
    path.write_text(
        path.read_text().replace('"logit_drift": [\n  0.0', f'"logit_drift": [\n  {wrong}')
    )
    with pytest.raises(UserError, match=f"it holds {wrong}, which is no number"):
        read(path)


def test_a_drift_that_was_not_measured_on_an_old_task_is_no_zero(tmp_path: Path) -> None:
    record = record_of("pmnist", "clnp", 0)
    tasks = len(record["logit_drift"])
    for drift, known in (([0.0] * (tasks - 1) + [None], True), ([0.0, None] + [0.0] * 8, False)):
        (cell,) = [load.decode(record | {"logit_drift": drift})]
        assert (cell.drift == 0) is known
        assert np.isnan(cell.drift) is not known


def test_damaged_record_is_named_and_left_out(tmp_path: Path) -> None:
    good, bad = record_of("pmnist", "clnp", 0), record_of("pmnist", "clnp", 1)
    put(tmp_path, good)
    path = put(tmp_path, bad)
    path.write_text(path.read_text()[:-300])
    cells, notes = load.cells(tmp_path, "pmnist", paper=True)
    assert [cell.seed for cell in cells] == [0]
    assert any(path.name in note for note in notes)
    assert str(tmp_path) not in "".join(notes)  # a report never tells where somebody's files lie


def test_record_that_breaks_the_schema_is_named_and_left_out(tmp_path: Path) -> None:
    record = record_of("pmnist", "clnp", 0)
    path = tmp_path / "pmnist" / "clnp" / f"seed0-{record['hash'][:8]}.json"
    path.parent.mkdir(parents=True)
    record["accuracy"]["test"][0][0] = 1.5
    path.write_text(json.dumps(record))
    cells, notes = load.cells(tmp_path, "pmnist", paper=True)
    assert not cells
    assert path.name in notes[0]


def test_record_without_what_tables_need_is_named_and_left_out(tmp_path: Path) -> None:
    record = record_of("pmnist", "clnp", 0)
    del record["parameters"]["stored"]
    path = put(tmp_path, record)
    cells, notes = load.cells(tmp_path, "pmnist", paper=True)
    assert not cells
    assert path.name in notes[0]
    assert "stored" in notes[0]


def test_record_in_a_foreign_folder_is_left_out(tmp_path: Path) -> None:
    path = put(tmp_path, record_of("quickstart", "clnp", 0))
    moved = tmp_path / "pmnist" / "clnp" / path.name
    moved.parent.mkdir(parents=True)
    path.rename(moved)
    cells, notes = load.cells(tmp_path, "pmnist", paper=True)
    assert not cells
    assert "wrong folder" in notes[0]


def test_uncommitted_code_never_fills_a_paper_table(tmp_path: Path) -> None:
    record = record_of("pmnist", "clnp", 0)
    record["git"]["dirty"] = True
    path = put(tmp_path, record)
    cells, notes = load.cells(tmp_path, "pmnist", paper=True)
    assert not cells
    assert path.name in notes[0]
    cells, notes = load.cells(tmp_path, "pmnist", paper=False)
    assert len(cells) == 1
    assert "uncommitted" in notes[0]


def test_uncommitted_code_fills_no_figure_of_the_paper(tmp_path: Path) -> None:
    """Split CIFAR has no table in the paper, but figures and claims."""
    record = record_of("pmnist", "clnp", 0) | {"experiment": "split_cifar"}
    record["git"]["dirty"] = True
    path = put(tmp_path, record)
    target = load.targets(TARGETS)["split_cifar"]
    section = page.section(tmp_path, "split_cifar", target, tmp_path)
    assert not section.pictures
    assert any(path.name in note and "uncommitted" in note for note in section.notes)


def test_what_a_custom_experiment_changes_is_told_and_what_holding_out_costs(
    tmp_path: Path,
) -> None:
    whole = record_of("pmnist", "clnp", 0)
    whole["config"]["experiment"] |= {"validation": 10_000, "epochs": 60, "settings": []}
    put(tmp_path, whole)
    name = "pmnist-custom-1234"
    changed = {**whole["config"]["experiment"], "name": name, "validation": 0}
    less = copy.deepcopy(whole) | {"experiment": name}
    less["config"]["experiment"] = changed
    less["accuracy"]["test"][-1] = [0.5] * 10
    put(tmp_path, less)
    section = page.section(tmp_path, name, None, tmp_path)
    assert "As pmnist, but validation = 0." in section.notes

    target = load.targets(TARGETS)["pmnist"]
    details = page.section(tmp_path, "pmnist", target, tmp_path).details
    (table,) = [table for table in details if table.name == "per_task"]
    assert list(table.text["Method"]) == ["CLNP", "CLNP, nothing held out"]
    assert table.text["Mean"].iloc[1] == table.text["Task 1"].iloc[1] == "50.00"
    # Nothing is left to stop early by, so that the last epoch counts.
    less["config"]["experiment"] = changed | {"settings": ["clnp.early_stopping=False"]}
    put(tmp_path, less)
    details = page.section(tmp_path, "pmnist", target, tmp_path).details
    (table,) = [table for table in details if table.name == "per_task"]
    assert table.text["Method"].iloc[1] == "CLNP, nothing held out (last epoch)"
    # With another change as well it would tell something else.
    less["config"]["experiment"] = changed | {"settings": ["si.early_stopping=False"]}
    put(tmp_path, less)
    cells, _ = load.cells(tmp_path, "pmnist", paper=True)
    assert load.without_holdout(tmp_path, "pmnist", cells) == []
    less["config"]["experiment"] = changed | {"epochs": 1}
    put(tmp_path, less)
    assert load.without_holdout(tmp_path, "pmnist", cells) == []
    # So would one from before the method's settings changed, or its code did.
    less["config"]["experiment"] = changed
    method, revision = less["config"]["method"], less["config"]["revision"]
    for part in (
        {"method": method | {"lr": 1.0}},
        {"revision": revision + 1},
        {"method": method | {"early_stopping": True}},
    ):
        put(tmp_path, less | {"config": less["config"] | part})
        kept = load.without_holdout(tmp_path, "pmnist", cells)
        assert bool(kept) is ("early_stopping" in part.get("method", {}))


def test_numbers_of_others_stand_below_ours() -> None:
    target = load.targets(TARGETS)["split_cifar"]
    table = tables.per_task_table(cells_of("pmnist"), target)
    row = table.text.set_index("Method").loc["SI, its authors (c = 0.01)"]
    assert (row["n"], row["Task 1"], row["Mean"]) == ("—", "74.60", "73.53")
    assert target["per_task"]["note"] in table.notes


def test_same_cell_twice_is_used_neither_way(tmp_path: Path) -> None:
    record = record_of("pmnist", "clnp", 0)
    names = [put(tmp_path, record, tag).stem for tag in ("a", "b")]
    cells, notes = load.cells(tmp_path, "pmnist", paper=True)
    assert not cells
    assert all(name in notes[0] for name in names)


def test_seeds_with_different_settings_are_remarked(tmp_path: Path) -> None:
    first, second = record_of("pmnist", "clnp", 0), record_of("pmnist", "clnp", 1)
    second["config"]["revision"] = 2
    put(tmp_path, first)
    put(tmp_path, second)
    _, notes = load.cells(tmp_path, "pmnist", paper=True)
    assert any("different settings: revision" in note for note in notes)


def test_a_setting_younger_than_a_record_had_its_default_there(tmp_path: Path) -> None:
    first, second = record_of("pmnist", "clnp", 0), record_of("pmnist", "clnp", 1)
    first["config"]["method"].pop("thresholds", None)
    second["config"]["method"]["thresholds"] = "per-layer"
    put(tmp_path, first)
    put(tmp_path, second)
    assert load.cells(tmp_path, "pmnist", paper=True)[1] == []
    second["config"]["method"]["thresholds"] = "shared"
    put(tmp_path, second)
    _, notes = load.cells(tmp_path, "pmnist", paper=True)
    assert notes == ["The seeds of CLNP ran with different settings: method.thresholds."]


def test_streams_of_different_lengths_are_never_averaged(tmp_path: Path) -> None:
    put(tmp_path, record_of("pmnist", "clnp", 0))
    put(tmp_path, record_of("quickstart", "clnp", 1) | {"experiment": "pmnist"})
    cells, notes = load.cells(tmp_path, "pmnist", paper=True)
    assert not cells
    assert "number of tasks" in notes[0]


def test_broken_targets_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("title = ")
    with pytest.raises(UserError, match=r"x\.toml"):
        load.targets(tmp_path)


# ---------------------------------------------------------------- tables


def test_main_table_has_the_papers_rows_in_order_and_dashes(target: dict[str, Any]) -> None:
    text = tables.main_table(cells_of("pmnist"), target).text.set_index("Method")
    assert list(text.index[:6]) == [
        "Single task",
        "EWC",
        "SI",
        "Superposition",
        "CLNP",
        "Fine-tuning",
    ]
    assert text.index[-1] == "my_method"
    assert text.loc["CLNP", "Paper, %"] == "98.42 ± 0.04"
    assert text.loc["EWC", "Paper, %"] == "97.00"
    assert text.loc["EWC", "Ours, %"].endswith("(n = 1)")
    assert text.loc["EWC", "95 % interval"] == "—"
    assert set(text.loc["SI"]) == {"97.20", "—"}
    assert text.loc["CLNP", "Logit drift"] == "0"


def test_main_table_numbers_against_the_records(target: dict[str, Any]) -> None:
    numbers = tables.main_table(cells_of("pmnist"), target).numbers.set_index("method")
    last = [100 * np.mean(record_of("pmnist", "clnp", s)["accuracy"]["test"][-1]) for s in range(3)]
    row = numbers.loc["clnp"]
    assert row["mean"] == pytest.approx(np.mean(last))
    assert row["sd"] == pytest.approx(np.std(last, ddof=1))
    assert row["difference"] == pytest.approx(np.mean(last) - 98.42)
    assert row["n"] == 3
    assert [float(value) for value in row["values"].split()] == pytest.approx(last, abs=1e-4)
    assert row["train_minutes"] == pytest.approx(16)


def test_times_on_different_hardware_are_not_averaged(target: dict[str, Any]) -> None:
    first, *others = cells_of("pmnist")
    moved = dataclasses.replace(first, hardware="another, cuda, 1 threads")
    table = tables.main_table([moved, *others], target)
    times = dict(zip(table.text["Method"], table.text["Training"], strict=True))
    assert times.pop(load.label(moved.method)) == "—"
    recorded = {load.label(cell.method) for cell in others}
    assert all(times[name] != "—" for name in recorded & set(times))
    assert "another, cuda, 1 threads" in " ".join(table.notes)


@pytest.mark.parametrize(
    ("held_out", "note"),
    [
        ([0.1], "Test set; 10 % of the training images held out for validation."),
        ([10_000], "Test set; 10,000 training images held out for validation."),
        ([0.0], "Test set; nothing held out for validation."),
        ([None], ""),
        ([0.1, 0.0], ""),
    ],
)
def test_tables_name_the_split(held_out: list[float | None], note: str) -> None:
    cells = [
        dataclasses.replace(cell, settings=json.dumps({"experiment": {"validation": held}}))
        for cell, held in zip(cells_of("pmnist"), held_out, strict=False)
    ]
    assert len(cells) == len(held_out)
    assert tables.split_note(cells) == note
    assert (note in tables.per_task_table(cells).notes) is bool(note)


@pytest.mark.parametrize(
    ("ends", "panel"),
    [
        ({"a": [99.0, 98.0], "b": [99.0, 97.5], "c": [99.0, 40.0]}, True),
        ({"a": [99.0, 98.0], "b": [99.0, 97.5], "c": [99.0, 95.0]}, False),  # told apart anyway
        ({"a": [np.nan, 98.0], "b": [60.0, 72.0], "c": [60.0, 40.0]}, False),  # one alone is best
    ],
)
def test_a_close_up_is_drawn_where_it_shows_several_methods(
    ends: dict[str, list[float]], panel: bool
) -> None:
    rows = [
        {"method": method, "seed": "mean", "after_task": task, "learnt_tasks": value}
        for method, values in ends.items()
        for task, value in enumerate(values, start=1)
    ]
    assert (close_up(pd.DataFrame(rows)) is not None) is panel


def test_methods_of_one_colour_differ_in_marker_and_line() -> None:
    looks = {method: (*style(method), line(method)) for method in load.METHODS}
    for one, other in itertools.combinations(looks.values(), 2):
        assert one[0] != other[0] or (one[1] != other[1] and one[2] != other[2])


def test_capacity_counts_every_layer_and_task() -> None:
    table = tables.capacity_table(cells_of("pmnist"))
    assert table is not None
    frame = table.numbers
    assert set(frame["method"]) == {"clnp"}
    assert len(frame) == 2 * 10
    used = [
        row["used_fraction"]
        for seed in range(3)
        for row in record_of("pmnist", "clnp", seed)["capacity"]
        if row["layer"] == "fc2" and row["task"] == 9
    ]
    last = frame[(frame["layer"] == "fc2") & (frame["task"] == 10)]["used"].item()
    assert last == pytest.approx(100 * np.mean(used))


def test_no_capacity_no_table() -> None:
    cells = [cell for cell in cells_of("pmnist") if cell.method == "finetune"]
    assert tables.capacity_table(cells) is None
    assert tables.cuts_table(cells) is None


def test_cuts_tell_the_epoch_kept_and_what_each_cost() -> None:
    cells = [cell for cell in cells_of("pmnist") if cell.method == "clnp"]
    low = cells[1].cuts.copy()
    low.loc[9, "living"] -= 0.03  # 0.06 points below the best epoch; m is 0.05
    cells[1] = replace(cells[1], cuts=low)
    table = tables.cuts_table(cells)
    assert table is not None
    assert len(table.numbers) == 3 * 10
    for seed in range(3):
        history = record_of("pmnist", "clnp", seed)["history"]
        mine = table.numbers[table.numbers["seed"] == seed].set_index("task")
        for entry in history:
            row = mine.loc[entry["task"] + 1]
            assert (row["epoch"], row["epochs"]) == (entry["epoch"], entry["epochs"])
            assert row["trained"] == pytest.approx(100 * entry["trained_validation"])
            assert row["pruned"] == pytest.approx(100 * entry["pruned_validation"])
            assert row["below"] == (seed == 1 and entry["task"] == 9)
    assert table.text["Below m"].tolist() == ["0 of 3"] * 9 + ["1 of 3"]
    assert table.text["Epoch kept"].str.fullmatch(r"\d\.\d of 6").all()


def test_cuts_of_records_from_before_the_epoch_was_told() -> None:
    cell = next(c for c in cells_of("pmnist") if c.method == "clnp")
    old = replace(cell, cuts=cell.cuts.assign(epoch=np.nan, epochs=np.nan))
    table = tables.cuts_table([old])
    assert table is not None
    assert set(table.text["Epoch kept"]) == {text.NONE}


def test_matrix_and_lines_of_joint_training_have_one_row() -> None:
    cell = cells_of("quickstart")[0]
    matrix = np.full_like(cell.test, np.nan)
    matrix[-1] = 97.0
    joint = replace(cell, method="joint", test=matrix)
    assert set(frames.matrix_frame([joint])["after_task"]) == {5}
    assert list(frames.over_tasks_frame([joint])["after_task"]) == [5, 5]  # the seed and the mean


def test_latex_escapes_and_markdown_keeps_columns() -> None:
    assert formats.escape_tex("50 % of a_b & c ± {x}") == r"50 \% of a\_b \& c $\pm$ \{x\}"
    frame = pd.DataFrame({"Method": ["a|b"], "n": ["1"]})
    assert formats.markdown(frame).splitlines()[-1] == r"| a\|b | 1 |"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (text.number(-0.001), "0.00"),
        (text.number(-1.5, sign=True), "−1.50"),
        (text.number(float("nan")), "—"),
        (text.magnitude(0.0), "0"),
        (text.magnitude(1e-9), "1e-09"),
        (text.count(5_592_010), "5.59 M"),
        (text.count(999), "999"),
        (text.duration(0.5), "30 s"),
        (text.duration(90), "90 min"),
        (text.duration(240), "4.0 h"),
        (text.seed_list([3, 0, 1, 2, 7]), "0–3, 7"),
    ],
)
def test_text_of_numbers(written: str, expected: str) -> None:
    assert written == expected


def test_what_a_layers_units_are_adds_up() -> None:
    frame = frames.units_frame(cells_of("pmnist"))
    assert len(frame) == 2 * 10
    assert np.allclose(frame[["reused", "not_reused", "new", "free"]].sum(axis=1), 100)
    rows = [
        row
        for seed in range(3)
        for row in record_of("pmnist", "clnp", seed)["capacity"]
        if row["layer"] == "fc2" and row["task"] == 4
    ]
    (at,) = frame[(frame["layer"] == "fc2") & (frame["task"] == 5)].to_dict("records")
    assert at["not_reused"] == pytest.approx(
        np.mean([(row["used"] - row["new"] - row["reused"]) / 20 for row in rows])
    )
    assert at["new"] == pytest.approx(np.mean([row["new"] / 20 for row in rows]))


def test_sufficiency_against_the_records() -> None:
    frame = frames.sufficiency_frame(cells_of("pmnist"))
    assert set(frame["layer"]) == {"fc2"}  # fc1 reads the input
    shares = [
        100 * row["old_only"]
        for seed in range(3)
        for row in record_of("pmnist", "clnp", seed)["sufficiency"]
        if (row["task"], row["layer"]) == (4, "fc2")
    ]
    at = frame[frame["task"] == 5].iloc[0]
    assert at["old_only"] == pytest.approx(np.mean(shares))
    assert at["old_only_sd"] == pytest.approx(np.std(shares, ddof=1))
    assert at["n"] == 3


def test_ablation_against_the_records() -> None:
    frame = frames.ablation_frame(cells_of("pmnist"))
    drops = [
        100 * record_of("pmnist", "clnp", seed)["history"][4]["reused_ablation"]["drop"]
        for seed in range(3)
    ]
    at = frame[frame["task"] == 5].set_index("seed")
    assert list(at.loc[[0, 1, 2], "drop"]) == pytest.approx(drops)
    assert at.loc["mean", "drop"] == pytest.approx(np.mean(drops))
    assert at.loc["mean", "margin"] == pytest.approx(0.05)


def test_an_ablation_beyond_the_margin_is_remarked(tmp_path: Path) -> None:
    record = record_of("pmnist", "clnp", 0)
    put(tmp_path, record)
    assert load.cells(tmp_path, "pmnist", paper=True)[1] == []
    record["history"][3]["reused_ablation"]["drop"] = 0.0012
    put(tmp_path / "over", record)
    (note,) = load.cells(tmp_path / "over", "pmnist", paper=True)[1]
    assert "clnp seed0" in note
    assert "task 4: 0.12 points (m = 0.05)" in note


def test_records_from_before_the_diagnoses_still_give_a_report(built: Path) -> None:
    """The custom experiment's record has neither sufficiency nor ablation, but capacity."""
    old, new = built / "out" / "pmnist-custom-ab12", built / "out" / "pmnist"
    assert "history" not in record_of("pmnist-custom-ab12", "clnp", 0)
    for name in ("sufficiency_clnp", "ablation_clnp"):
        assert (new / f"{name}.png").exists()
        assert not (old / f"{name}.png").exists()
    assert (old / "units_clnp.png").exists()
    assert (old / "use_clnp.png").exists()


def test_a_figure_counts_the_seeds_that_it_shows(target: dict[str, Any], tmp_path: Path) -> None:
    for seed in range(3):
        record = record_of("pmnist", "clnp", seed)
        if seed == 0:
            for entry in record["history"]:
                del entry["reused_ablation"]
        put(tmp_path, record)
    pictures = page.section(tmp_path, "pmnist", target, TUNING).pictures
    captions = {picture.name: picture.caption for picture in pictures}
    assert captions["ablation_clnp"].endswith("n = 2 (seeds 1–2).")
    assert captions["sufficiency_clnp"].endswith("n = 3 (seeds 0–2).")


# ---------------------------------------------------------------- claims


def verdict(identity: str, target: dict[str, Any], cells: list[load.Cell]) -> claims.Verdict:
    (claim,) = [claim for claim in target["claims"] if claim["id"] == identity]
    return claims.verdict(claim, target, cells)


def with_accuracy(method: str, values: list[float]) -> list[load.Cell]:
    cell = next(cell for cell in cells_of("pmnist") if cell.method == "clnp")
    return [
        replace(cell, method=method, seed=seed, test=np.tril(np.full((10, 10), value)))
        for seed, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("ours", "single", "word"),
    [
        ([98.41, 98.42, 98.44], [98.44, 98.46, 98.47], "reproduced"),
        ([98.41, 98.42, 98.44], [98.80, 98.81, 98.83], "partly"),
        ([97.0, 97.1, 97.2], [98.5, 98.4, 98.5], "not reproduced"),
        ([98.0, 98.4, 98.8], [98.6, 98.2, 98.4], "not shown"),  # the mean fits, but not by TOST
        ([98.42], [98.45], "consistent (n = 1)"),
        ([98.42], [98.80], "partly consistent (n = 1)"),
        ([97.0], [98.45], "not consistent (n = 1)"),
    ],
)
def test_t1(target: dict[str, Any], ours: list[float], single: list[float], word: str) -> None:
    cells = with_accuracy("clnp", ours) + with_accuracy("single_task", single)
    result = verdict("T1", target, cells)
    assert result.word == word
    assert f"n = {len(ours)}" in result.evidence


def test_the_evidence_says_what_each_part_comes_to(target: dict[str, Any]) -> None:
    cells = with_accuracy("clnp", [98.0, 98.4, 98.8]) + with_accuracy("single_task", [99.0] * 3)
    close, alike = verdict("T1", target, cells).evidence.split("). ")[:2]
    assert close.startswith("CLNP, mean test accuracy")
    assert alike.startswith("Holds, not shown. CLNP − Single task")
    assert verdict("T1", target, cells).evidence.endswith("). Fails.")
    cells = with_accuracy("clnp", [98.42] * 2) + with_accuracy("single_task", [98.45] * 2)
    assert verdict("T1", target, cells).evidence.count("Shown.") == 2
    one = [cell for cell in cells if cell.seed == 0]
    assert verdict("T1", target, one).evidence.count("Holds.") == 2


def test_order_needs_every_method(target: dict[str, Any]) -> None:
    cells = with_accuracy("clnp", [98.4, 98.5]) + with_accuracy("ewc", [97.0, 97.1])
    result = verdict("T1-order", target, cells)
    assert result.word == "not yet measured"
    assert "SI" in result.evidence
    cells += with_accuracy("si", [97.2, 97.31]) + with_accuracy("superposition", [97.6, 97.72])
    assert verdict("T1-order", target, cells).word == "reproduced"
    cells = [cell for cell in cells if cell.method != "ewc"] + with_accuracy("ewc", [98.0, 98.1])
    assert verdict("T1-order", target, cells).word == "partly"
    assert verdict("T1-order", target, [c for c in cells if c.seed == 0]).word == (
        "partly consistent (n = 1)"
    )


def with_use(first: list[float], second: list[float], seeds: int) -> list[load.Cell]:
    cell = next(cell for cell in cells_of("pmnist") if cell.method == "clnp")
    found = []
    for seed in range(seeds):
        capacity = cell.capacity.copy()
        for layer, shares in (("fc1", first), ("fc2", second)):
            noise = 1e-3 * (seed + 1)
            capacity.loc[capacity["layer"] == layer, "used_fraction"] = np.add(shares, noise)
        found.append(replace(cell, seed=seed, capacity=capacity))
    return found


def test_shares_like_the_papers_are_reproduced(target: dict[str, Any]) -> None:
    first, second = list(np.linspace(0.14, 0.18, 10)), list(np.linspace(0.04, 0.40, 10))
    for seeds, word in ((3, "reproduced"), (1, "consistent (n = 1)")):
        cells = with_use(first, second, seeds)
        assert verdict("F3-first", target, cells).word == word
        assert verdict("F3-second", target, cells).word == word


def test_other_shares_are_not_reproduced(target: dict[str, Any]) -> None:
    first, second = list(np.linspace(0.1, 1.0, 10)), list(0.4 * np.linspace(0.1, 1, 10) ** 3)
    cells = with_use(first, second, 3)
    assert verdict("F3-first", target, cells).word == "not reproduced"
    assert verdict("F3-second", target, cells).word == "partly"  # 40 %, but far from linearly


def test_fewer_tasks_measure_nothing_of_figure_3(target: dict[str, Any]) -> None:
    cell = next(cell for cell in cells_of("quickstart") if cell.method == "clnp")
    assert verdict("F3-first", target, [cell]).word == "not yet measured"
    assert verdict("P-25", target, [cell]).word == "not yet measured"


def test_tasks_that_found_no_room_leave_nothing_of_figure_3(target: dict[str, Any]) -> None:
    cell = next(cell for cell in cells_of("pmnist") if cell.method == "clnp")
    full = replace(cell, capacity=cell.capacity[cell.capacity["task"] < 8])
    for claim in ("F3-first", "F3-second"):
        result = verdict(claim, target, [full, replace(full, seed=7)])
        assert result.word == "not reproduced"
        assert "has learnt 8 of 10 tasks" in result.evidence


def test_zero_means_exactly_zero(target: dict[str, Any]) -> None:
    cells = [cell for cell in cells_of("pmnist") if cell.method == "clnp"]
    assert verdict("ZERO", target, cells).word == "reproduced"
    assert verdict("ZERO", target, cells[:1]).word == "consistent (n = 1)"
    drifted = [*cells[:2], replace(cells[2], drift=1e-9)]
    assert verdict("ZERO", target, drifted).word == "not reproduced"
    moved = cells[0].test.copy()
    moved[-1, 0] -= 0.01
    assert verdict("ZERO", target, [replace(cells[0], test=moved)]).word == (
        "not consistent (n = 1)"
    )


def test_every_claim_of_the_protocol_is_listed_once() -> None:
    listed = [
        claim["id"]
        for content in load.targets(TARGETS).values()
        for claim in content.get("claims", ())
    ]
    described = (
        *("T1", "T1-order", "F3-first", "F3-second", "P-25", "ZERO"),
        *("F4-order", "F4-m1", "F4-m2", "F4-full", "F4-ft"),
        *("F5-ten", "F5-linear", "F5-drop", "F5-early", "EXPAND"),
    )
    assert sorted(listed) == sorted(described)


# ---------------------------------------------------------------- tuning


def test_main_table_tells_what_was_tried(target: dict[str, Any]) -> None:
    tunings, notes = load.tunings(TUNING, "pmnist")
    assert notes == []
    cells = cells_of("pmnist")
    cells += [replace(cell, method="clnp_best") for cell in cells if cell.method == "clnp"]
    text = tables.main_table(cells, target, tunings).text.set_index("Method")
    tried = {"CLNP": "3", "CLNP, tuned": "3", "EWC": "3"}
    assert text["Tried"].to_dict() == dict.fromkeys(text.index, "—") | tried


def test_tuning_table_against_the_results() -> None:
    tunings, _ = load.tunings(TUNING, "pmnist")
    table = tables.tuning_table(tunings, ["finetune"])
    assert list(table.text["Method"]) == [*["EWC"] * 4, *["CLNP"] * 3, "Fine-tuning"]
    # Only the settings in which the candidates differ.
    assert list(table.text["Configuration"]) == [
        "strength 10",
        "strength 100",
        "strength 100",
        "strength 1000",
        "lr 0.002, l1 1e-07/1e-05/1e-06",
        "lr 0.001, l1 1e-07/1e-05/1e-06",
        "lr 0.002, l1 1e-06/1e-05/1e-06",
        "—",
    ]
    assert set(table.text.iloc[-1]) == {"Fine-tuning", "—"}
    assert list(table.text["Tasks"]) == ["3", "3", "2", "2", "3", "3", "3", "—"]
    assert list(table.text["Winner"].iloc[[2, 3, 6]]) == ["no (earlier grid)"] * 3
    clnp = read_tuning(TUNING / "pmnist" / "clnp.json")
    rows = table.numbers[table.numbers["method"] == "clnp"]
    for (_, row), candidate in zip(rows.iterrows(), clnp["candidates"], strict=True):
        means = [100 * np.mean(run["validation"]) for run in candidate["runs"]]
        assert row["mean"] == pytest.approx(np.mean(means))
        assert row["sd"] == pytest.approx(np.std(means, ddof=1))
        assert (row["n"], row["seeds"]) == (2, "100 101")
    assert list(rows["minutes"]) == [5, 10, 15]
    assert list(rows["winner"]).index(True) == clnp["winner"]
    assert (
        "Budget: EWC: 2 configurations, first 3 tasks, seed 100; EWC: 2 configurations, first 2 "
        "tasks, seed 100; CLNP: 3 configurations, first 3 tasks, seeds 100–101."
    ) in table.notes[-1]


def test_tuning_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "pmnist"
    result = read_tuning(TUNING / "pmnist" / "ewc.json")
    del result["checksum"]
    write_tuning(folder / "ewc.json", result | {"dirty": True})
    write_tuning(folder / "si.json", result | {"method": "si", "winner": None})
    write_tuning(folder / "hat.json", result)
    write_tuning(folder / "lwf.json", result | {"method": "lwf"})
    path = folder / "lwf.json"
    path.write_text(path.read_text().replace('"seed": 100', '"seed": 102'))
    tunings, notes = load.tunings(tmp_path, "pmnist")
    assert [tuning["method"] for tuning in tunings] == ["ewc"]
    assert len(notes) == 4
    for part in ("ewc.json comes from uncommitted", "hat.json holds ewc", "lwf.json is damaged"):
        assert any(part in note for note in notes)
    assert any("si.json is not finished" in note for note in notes)
    (folder / "earlier").mkdir()
    (folder / "earlier" / "ewc.json").write_text("{")
    tunings, notes = load.tunings(tmp_path, "pmnist")
    assert [tuning["earlier"] for tuning in tunings] == [[]]
    assert any("earlier/ewc.json is damaged" in note for note in notes)
    assert str(tmp_path) not in "".join(notes)


def test_only_tuned_experiments_have_such_a_section(built: Path) -> None:
    assert (built / "out" / "pmnist" / "tuning.md").exists()
    assert not (built / "out" / "quickstart" / "tuning.md").exists()
    html = (built / "out" / "index.html").read_text(encoding="utf-8")
    assert html.count("Tuning: every configuration tried") == 1


# ---------------------------------------------------------------- files


def test_same_bytes_in_another_process_and_folder(built: Path, tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from benchmarks.reporting.page import build; "
    code += "build(Path(sys.argv[1]), Path(sys.argv[2]), tuning_dir=Path(sys.argv[3]))"
    subprocess.run(
        [sys.executable, "-c", code, str(RECORDS), str(tmp_path / "elsewhere"), str(TUNING)],
        check=True,
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONHASHSEED": "7", "SOURCE_DATE_EPOCH": "1", "TZ": "Asia/Tokyo"},
    )
    files = sorted(p.relative_to(built / "out") for p in (built / "out").rglob("*") if p.is_file())
    assert len(files) > 60
    other = tmp_path / "elsewhere"
    assert files == sorted(p.relative_to(other) for p in other.rglob("*") if p.is_file())
    assert [f for f in files if (built / "out" / f).read_bytes() != (other / f).read_bytes()] == []


def test_a_search_is_shown_where_a_record_has_one(built: Path, tmp_path: Path) -> None:
    row = {
        "task": 0,
        "candidate": 0,
        "l1": [1e-7, 1e-5, 1e-6],
        "lr": 0.002,
        "epoch": 57,
        "best_validation": 0.98412,
        "trained_validation": 0.9839,
        "pruned_validation": 0.98371,
        "within_margin": True,
        "new": {"fc1": 120, "fc2": 45},
        "new_share": 0.0825,
        "new_weights": 99_930,
        "chosen": True,
        "train_seconds": 100.0,
        "scan_seconds": 1.0,
    }
    nothing = dict.fromkeys(key for key in row if "validation" in key or key.startswith("new"))
    diverged = row | nothing | {"epoch": None, "candidate": 1, "l1": 1e-4, "chosen": False}
    record = record_of("pmnist-custom-ab12", "clnp", 0)
    put(tmp_path / "records", record | {"search": [row, diverged]})
    page.build(tmp_path / "records", tmp_path / "out")
    html = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    markdown = (tmp_path / "out" / "pmnist-custom-ab12" / "search.md").read_text(encoding="utf-8")
    assert "Grid search: every candidate" in html
    assert (
        "| CLNP | 0 | 1 | 1e-07, 1e-05, 1e-06 | 0.002 | 98.41 | 98.39 | 98.37 | yes | "
        "fc1 120, fc2 45 | 0.0825 | yes | 100 s | 1.0 s |"
    ) in markdown
    assert "| 0.0001 | 0.002 | — | — | — | yes | — | — | no |" in markdown
    assert "All scans together took 1.0 % of the time that the candidates trained." in html
    numbers = pd.read_csv(tmp_path / "out" / "pmnist-custom-ab12" / "search.csv")
    assert numbers.loc[0, ["new", "new_weights"]].tolist() == ["fc1 120, fc2 45", 99_930]
    assert "Grid search" not in (built / "out" / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name", ["table1", "claims", "comparisons", "capacity", "cuts", "seeds", "tuning"]
)
@pytest.mark.parametrize("suffix", ["md", "tex", "csv"])
def test_golden(built: Path, name: str, suffix: str) -> None:
    now = (built / "out" / "pmnist" / f"{name}.{suffix}").read_bytes()
    golden = GOLDEN / f"{name}.{suffix}"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_bytes(now)
    assert now.decode() == golden.read_text(encoding="utf-8")


def test_page_is_self_contained_and_links_to_files_that_exist(built: Path) -> None:
    html = (built / "out" / "index.html").read_text(encoding="utf-8")
    for outside in ("http://", "https://", 'src="/', "file:"):
        assert outside not in html
    links = [part.split('"')[0] for part in html.split('href="')[1:]]
    assert sum(not link.startswith("#") for link in links) > 60
    for link in links:
        assert link.startswith("#") or (built / "out" / link).is_file()
    assert str(TESTS) not in html


def test_custom_experiment_is_marked_and_never_meets_the_paper(built: Path) -> None:
    html = (built / "out" / "index.html").read_text(encoding="utf-8")
    section = html.split('<section id="pmnist-custom-ab12">')[1]
    assert "custom settings" in section
    assert "Paper" not in section
    table = pd.read_csv(built / "out" / "pmnist" / "table1.csv").set_index("method")
    assert table.loc["clnp", "n"] == 3
    assert "custom" in (built / "text").read_text(encoding="utf-8")


def test_figures_come_as_pdf_with_embedded_fonts_png_and_csv(built: Path) -> None:
    folder = built / "out" / "pmnist"
    diagnoses = ("units_clnp", "sufficiency_clnp", "ablation_clnp")
    for name in ("fig3", "over_tasks", "matrix_clnp", "matrix_finetune", *diagnoses):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        pdf = (folder / f"{name}.pdf").read_bytes()
        assert b"/FontFile2" in pdf
        assert b"/Type3" not in pdf
        assert b"CreationDate" not in pdf
        assert len(pd.read_csv(folder / f"{name}.csv"))
    # Paper's Fig. 3 has ten bars in two groups.
    assert len(pd.read_csv(folder / "fig3.csv")) == 20


def test_a_method_has_its_own_look() -> None:
    looks = [style(method) for method in load.METHODS]
    assert len(set(looks)) == len(looks)


def test_no_records_at_all_is_said_clearly(tmp_path: Path) -> None:
    text = page.build(tmp_path / "none", tmp_path / "out")
    assert "No records" in text
    assert "quickstart" in text
    html = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "98.42 ± 0.04" in html
    assert "not yet measured" in html


def test_readme_table_before_any_run_shows_the_paper(tmp_path: Path) -> None:
    text = page.readme_table(tmp_path)
    assert "| CLNP | 98.42 ± 0.04 | — | — | — | — | — | — |" in text
    assert text.endswith("\nNo records yet.\n")


def test_experiment_without_records_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="quickstrat"):
        page.build(RECORDS, tmp_path, ["quickstrat"])


def test_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("in the way")
    put(tmp_path / "records", record_of("pmnist-custom-ab12", "clnp", 0))
    with pytest.raises(UserError, match="Cannot write"):
        page.build(tmp_path / "records", tmp_path / "out")


def test_readme_table_is_replaced_and_stays(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# A\n\n<!-- table:pmnist -->\nold\n<!-- /table -->\n\nend\n")
    page.update_readme(readme, RECORDS)
    once = readme.read_text(encoding="utf-8")
    assert "old" not in once
    assert page.readme_table(RECORDS) in once
    assert once.startswith("# A\n")
    assert once.endswith("<!-- /table -->\n\nend\n")
    assert "| CLNP | 98.42 ± 0.04 |" in once
    assert "HAT" not in once  # neither in the paper's table nor measured
    page.update_readme(readme, RECORDS)
    assert readme.read_text(encoding="utf-8") == once


def test_readme_takes_any_table_of_the_report_by_name(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("<!-- table:pmnist/capacity -->\nold\n<!-- /table -->\nend\n")
    page.update_readme(readme, RECORDS)
    once = readme.read_text(encoding="utf-8")
    assert "| used, % |" in once
    assert "\nold\n" not in once
    assert once.endswith("<!-- /table -->\nend\n")
    page.update_readme(readme, RECORDS)
    assert readme.read_text(encoding="utf-8") == once
    readme.write_text("<!-- table:pmnist/capacities -->\nold\n<!-- /table -->\n")
    with pytest.raises(UserError, match=r"no table 'capacities'; there are: table1, .*capacity"):
        page.update_readme(readme, RECORDS)
    assert "old" in readme.read_text(encoding="utf-8")


def test_readme_without_markers_is_an_error(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# A\n")
    with pytest.raises(UserError, match="table:pmnist"):
        page.update_readme(readme, RECORDS)
