"""From records to files: tables, figures, and one page that holds all of it and opens offline."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2
import pandas as pd

from benchmarks.errors import UserError
from benchmarks.records import Tuning, tuned_method
from benchmarks.reporting import claims, figures, formats, frames, load, tables
from benchmarks.reporting.figures import Picture
from benchmarks.reporting.load import Cell, Targets, label
from benchmarks.reporting.tables import Table
from benchmarks.reporting.text import NONE

REPORTS = Path(__file__).parents[2] / "reports"
MARKERS = re.compile(
    r"(<!-- table:(?P<experiment>[\w-]+)(?:/(?P<table>\w+))? -->\n).*?<!-- /table -->", re.DOTALL
)


@dataclass(frozen=True, eq=False)
class Section:
    """Everything that a report says about one experiment."""

    experiment: str
    title: str
    custom: bool
    headline: tuple[Table, ...]
    """The main table, if there is one, and the verdicts."""
    details: tuple[Table, ...]
    pictures: tuple[Picture, ...]
    notes: tuple[str, ...]


def section(
    records_dir: Path, experiment: str, target: Targets | None, tuning_dir: Path
) -> Section:
    """Make the tables and figures of one experiment.

    Parameters
    ----------
    records_dir
        Folder of the records.
    experiment
        Its name; a custom one never meets the paper's table.
    target
        Its targets file; None if there is none.
    tuning_dir
        Folder of the results of the methods' grids.
    """
    cells, notes = load.cells(records_dir, experiment, paper=target is not None)
    tunings, remarks = load.tunings(tuning_dir, experiment)
    notes += remarks
    custom = load.is_custom(experiment)
    headline, details = _tables(records_dir, experiment, target, cells, tunings)
    pictures = _pictures(cells, target) if cells else []
    if not cells:
        notes.append(f"No usable record of {experiment} yet.")
    elif custom and (note := _custom_note(records_dir, experiment, cells[0])):
        notes.insert(0, note)
    return Section(
        experiment=experiment,
        title=target["title"] if target else experiment,
        custom=custom,
        headline=tuple(headline),
        details=tuple(details),
        pictures=tuple(pictures),
        notes=tuple(notes),
    )


def _tables(
    records_dir: Path,
    experiment: str,
    target: Targets | None,
    cells: Sequence[Cell],
    tunings: Sequence[Tuning],
) -> tuple[list[Table], list[Table]]:
    """Return the tables of one experiment: the headline's, and the details'."""
    beside = target if target and "table" in target else None
    headline: list[Table] = []
    details: list[Table | None] = []
    if cells or beside:
        table = tables.main_table(cells, beside, tunings)
        chosen = (target or {}).get("chosen")  # what settings were held to, beside the grids
        headline.append(replace(table, notes=(*table.notes, chosen)) if chosen else table)
    if target and "claims" in target:
        headline.append(claims.claims_table(target, cells))
    if cells:
        details = [
            tables.comparison_table(cells, target),
            tables.per_task_table(
                cells, target, load.without_holdout(records_dir, experiment, cells)
            ),
            tables.capacity_table(cells),
            tables.cuts_table(cells),
            tables.search_table(cells),
            tables.seeds_table(cells),
        ]
    if tunings:
        tuned = {name for tuning in tunings for name in (tuning["method"], tuned_method(tuning))}
        untuned = [method for method in frames.by_method(cells) if method not in tuned]
        details.append(tables.tuning_table(tunings, untuned))
    found = (headline, [table for table in details if table is not None])
    headline, shown = (
        [replace(table, caption=_marked(table.caption, target)) for table in some] for some in found
    )
    return headline, shown


def _custom_note(records_dir: Path, experiment: str, cell: load.Cell) -> str:
    """Return in what a custom experiment differs from its preset, if that has records."""
    preset = experiment.rpartition("-custom-")[0]
    cells, _ = load.cells(records_dir, preset, paper=False)
    if not cells:
        return ""
    told = ", ".join(f"{name} = {value}" for name, value in load.changes(cell, cells[0]).items())
    return f"As {preset}, but {told}."


def _pictures(cells: Sequence[Cell], target: Targets | None) -> list[Picture]:
    groups = frames.by_method(cells)
    note, mark = tables.seeds_note(cells), (target or {}).get("mark", "")
    pictures = [
        figures.over_tasks(
            frames.over_tasks_frame(cells),
            "over_tasks",
            f"Test accuracy after each task; lines: means over seeds, points: seeds. {note}",
            mark,
        )
    ]
    if of_tasks := (target or {}).get("final"):
        pictures.append(
            figures.final(
                frames.final_frame(cells, of_tasks["part"]),
                of_tasks["file"],
                f"{of_tasks['caption']}; means over seeds and their deviations. Hollow: no "
                f"unit was free in the last hidden layer when the task came (k/n: at k of n "
                f"seeds). {note}",
                of_tasks["part"],
                mark,
            )
        )
    use = frames.use_frame(cells)
    paper = (target or {}).get("use", {})
    for method in dict.fromkeys(use["method"]):
        mine = use[use["method"] == method].reset_index(drop=True)
        of_paper = paper.get("method") == method
        shares = paper.get("paper") if of_paper else None
        caption = paper["caption"] if of_paper else "Share of each hidden layer's units in use"
        pictures.append(
            figures.use(
                mine,
                paper["file"] if of_paper else f"use_{method}",
                f"{label(method)}: {caption}. {tables.seeds_note(groups[method])}"
                + (" Dashed: what the paper's text says of the end." if shares else ""),
                shares,
                mark,
            )
        )
    diagnoses: tuple[tuple[str, Callable[..., Picture], str, pd.DataFrame, str], ...] = (
        (
            "units",
            figures.units,
            "capacity",
            frames.units_frame(cells),
            "what each hidden layer's units are for each task, mean over seeds. Reused: older "
            "units that the task reads",
        ),
        (
            "sufficiency",
            figures.sufficiency,
            "sufficiency",
            frames.sufficiency_frame(cells),
            "share of each task's new units that read units of older tasks only, or of the task "
            "only, mean over seeds; layers that read the input are left out",
        ),
        (
            "ablation",
            figures.ablation,
            "ablation",
            frames.ablation_frame(cells),
            "validation accuracy that each task loses if it can't read the older units that don't "
            "count as reused; m is what its own cut may cost",
        ),
    )
    for name, draw, part, whole, caption in diagnoses:
        for method in dict.fromkeys(whole["method"]):
            mine = whole[whole["method"] == method].reset_index(drop=True)
            # Older records don't tell all of it.
            note = tables.seeds_note([cell for cell in groups[method] if len(getattr(cell, part))])
            full = f"{label(method)}: {caption}. {note}"
            pictures.append(draw(mine, f"{name}_{method}", full, mark))
    matrices = {method: frames.matrix_frame(mine) for method, mine in groups.items()}
    lowest = min(frame["accuracy"].min() for frame in matrices.values())
    for method, frame in matrices.items():
        pictures.append(
            figures.matrix(
                frame,
                f"matrix_{method}",
                f"{label(method)}: test accuracy on task j after task i, mean over seeds. "
                f"{tables.seeds_note(groups[method])}",
                label(method),
                len(cells[0].test),
                10 * (lowest // 10),
                mark,
            )
        )
    return [replace(picture, caption=_marked(picture.caption, target)) for picture in pictures]


def _marked(caption: str, target: Targets | None) -> str:
    """Return a caption behind the experiment's mark, since files are taken out of their report."""
    mark = (target or {}).get("mark")
    return f"{caption} ({mark})" if mark else caption


def build(
    records_dir: Path,
    out_dir: Path,
    experiments: list[str] | None = None,
    targets_dir: Path = REPORTS / "targets",
    tuning_dir: Path = REPORTS / "tuning",
) -> str:
    """Write every table and figure, and ``index.html`` with all of it.

    Parameters
    ----------
    records_dir
        Folder with ``<experiment>/<method>/seed<n>-<hash8>.json``.
    out_dir
        Gets a folder an experiment (each table as .md, .tex, .csv; each figure as .pdf, .png,
        .csv) and ``index.html``. The same records give the same bytes.
    experiments
        Those whose main tables are returned; None: all with records. The files always cover
        every experiment with records or targets, so that the page never loses one.
    targets_dir
        Folder with the paper's numbers, one TOML file an experiment.
    tuning_dir
        Folder with what was tried, ``<experiment>/<method>.json``.

    Returns
    -------
    str
        Main tables and warnings as text, for a terminal.

    Raises
    ------
    UserError
        If a named experiment has neither records nor targets, or a file cannot be written.
    """
    targets = load.targets(targets_dir)
    recorded = load.experiments(records_dir)
    known = [*targets, *(name for name in recorded if name not in targets)]
    for name in experiments or ():
        if name not in known:
            raise UserError(
                f"No records of {name!r} in {records_dir}. There are: "
                f"{', '.join(recorded) or 'none at all'}. Run it first: "
                "python -m benchmarks run --help."
            )
    # What the paper has and nobody measured still has its claims on the page.
    sections = [section(records_dir, name, targets.get(name), tuning_dir) for name in known]
    try:
        for part in sections:
            _write(out_dir / part.experiment, part)
        (out_dir / "index.html").write_text(_html(sections), encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(f"Cannot write the report to {out_dir}: {error}.") from error
    shown = recorded if experiments is None else experiments
    if not recorded:
        return (
            f"No records in {records_dir} yet, so there is nothing to report. "
            "Start with: nox -s quickstart.\n"
        )
    return "\n".join(_terminal(part) for part in sections if part.experiment in shown)


def _write(folder: Path, part: Section) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for table in (*part.headline, *part.details):
        for suffix, text in (
            ("md", formats.whole_markdown(table)),
            ("tex", formats.latex(table)),
            ("csv", formats.csv(table.numbers)),
        ):
            path = folder / f"{table.name}.{suffix}"
            path.write_text(text, encoding="utf-8", newline="\n")
    for picture in part.pictures:
        (folder / f"{picture.name}.pdf").write_bytes(picture.pdf)
        (folder / f"{picture.name}.png").write_bytes(picture.png)
        (folder / f"{picture.name}.csv").write_text(
            formats.csv(picture.numbers), encoding="utf-8", newline="\n"
        )


def _html(sections: Sequence[Section]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(formats.TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment.get_template("index.html.jinja").render(sections=sections)


def _terminal(part: Section) -> str:
    names = dict.fromkeys((part.title, part.experiment))
    heading = ": ".join(names) + (" (custom settings)" if part.custom else "")
    lines = [heading, "=" * len(heading), ""]
    if part.headline and not part.headline[0].widths:
        lines += [aligned(part.headline[0]), *part.headline[0].notes[-1:]]
    return "\n".join([*lines, *part.notes, ""])


def aligned(table: Table) -> str:
    """Return a table of strings with padded columns, the first to the left, all others right."""
    rows = [list(table.text.columns), *table.text.to_numpy().tolist()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], ""])


def readme_table(
    records_dir: Path, experiment: str = "pmnist", targets_dir: Path = REPORTS / "targets"
) -> str:
    """Return the headline table as Markdown: the paper's rows and those of measured methods."""
    target = load.targets(targets_dir).get(experiment)
    beside = target if target and "table" in target else None
    cells, _ = load.cells(records_dir, experiment, paper=target is not None)
    if not cells and beside is None:
        raise UserError(f"No usable record of {experiment!r} in {records_dir}.")
    table = tables.main_table(cells, beside)
    text = table.text.copy()
    both = text["Trainable"] + " / " + text["Stored"]
    text["Trainable / stored"] = both.replace(f"{NONE} / {NONE}", NONE)
    shown = text[
        [
            column
            for column in ("Method", "Paper, %", "Ours, %", "n", "BWT", "Logit drift", "Task id")
            if column in text
        ]
        + ["Trainable / stored"]
    ]
    paper = beside["table"]["paper"] if beside else {}
    keep = (table.numbers["n"] > 0) | table.numbers["method"].isin(list(paper))
    return formats.markdown(shown[keep]) + "\n" + _of_what(cells) + "\n"


def _of_what(cells: Sequence[Cell]) -> str:
    """What a table of numbers in a document rests on."""
    return " ".join(filter(None, (tables.split_note(cells), tables.seeds_note(cells))))


def named_table(records_dir: Path, experiment: str, name: str, targets_dir: Path) -> str:
    """Return one of the report's other tables of an experiment as Markdown.

    Tables of numbers come with their seeds, tables of sentences, which name them, with their notes.

    Raises
    ------
    UserError
        If the report has no table of that name.
    """
    target = load.targets(targets_dir).get(experiment)
    cells, _ = load.cells(records_dir, experiment, paper=target is not None)
    tunings, _ = load.tunings(REPORTS / "tuning", experiment)
    headline, details = _tables(records_dir, experiment, target, cells, tunings)
    found = {table.name: table for table in (*headline, *details)}
    if name not in found:
        have = ", ".join(found) or "none"
        raise UserError(f"{experiment} has no table {name!r}; there are: {have}.")
    table = found[name]
    prose = bool(table.widths)
    note = "\n\n".join(table.notes) if prose else _of_what(cells)
    return formats.markdown(table.text, prose) + "\n" + note + "\n"


def update_readme(path: Path, records_dir: Path, targets_dir: Path = REPORTS / "targets") -> None:
    """Replace what stands between ``<!-- table:EXPERIMENT -->`` and ``<!-- /table -->``.

    ``<!-- table:EXPERIMENT/NAME -->`` asks for another table than the main one.

    Raises
    ------
    UserError
        If the file has no such markers, a table isn't there, or the file cannot be read or written.
    """

    def filled(found: re.Match[str]) -> str:
        experiment, name = found["experiment"], found["table"]
        text = (
            named_table(records_dir, experiment, name, targets_dir)
            if name
            else readme_table(records_dir, experiment, targets_dir)
        )
        return found[1] + text + "<!-- /table -->"

    try:
        old = path.read_text(encoding="utf-8")
        if not MARKERS.search(old):
            raise UserError(
                f"{path} has no table to fill: put the lines <!-- table:pmnist --> and "
                "<!-- /table --> where it belongs."
            )
        new = MARKERS.sub(filled, old)
        if new != old:
            path.write_text(new, encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(f"Cannot update {path}: {error}.") from error
