"""Tables as Markdown, LaTeX and CSV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jinja2
import pandas as pd

from benchmarks.reporting.tables import Table

TEMPLATES = Path(__file__).parent / "templates"


def csv(frame: pd.DataFrame) -> str:
    """Return a frame as CSV, rounded to eight significant digits (last bits differ by machine)."""
    return frame.to_csv(index=False, float_format="%.8g", lineterminator="\n")


def markdown(text: pd.DataFrame, prose: bool = False) -> str:
    """Return a frame of strings as a Markdown table; numbers to the right, prose to the left."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |\n"

    rule = ["---", *["---" if prose else "---:"] * (len(text.columns) - 1)]
    return line(list(text.columns)) + line(rule) + "".join(map(line, text.to_numpy().tolist()))


TEX = {
    "\\": r"\textbackslash{}",
    **{character: "\\" + character for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "±": r"$\pm$",
    "−": "$-$",
    "—": "---",
    "–": "--",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
}


def escape_tex(text: str) -> str:
    """Return text with LaTeX's special characters escaped."""
    return "".join(TEX.get(character, character) for character in text)


def latex(table: Table) -> str:
    """Return a table as a LaTeX float (packages booktabs and graphicx)."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        block_start_string=r"\BLOCK{",
        block_end_string="}",
        variable_start_string=r"\VAR{",
        variable_end_string="}",
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["tex"] = escape_tex
    return environment.get_template("table.tex.jinja").render(
        table=table, headings=list(table.text.columns), rows=table.text.to_numpy().tolist()
    )


def whole_markdown(table: Table) -> str:
    """Return a table with its caption and notes as Markdown."""
    notes = "".join(f"\n{note}\n" for note in table.notes)
    return f"**{table.caption}**\n\n{markdown(table.text, bool(table.widths))}{notes}"
