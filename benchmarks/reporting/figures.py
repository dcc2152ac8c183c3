"""Figures: frames in, pictures out. No number is computed here; its frame lies beside each."""

from __future__ import annotations

import textwrap
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from benchmarks.reporting.load import METHODS, label, rank

COLUMN = 3.3
"""Width of one column of a paper, in inches."""
PAGE = 6.9
"""Width of two columns."""
PALETTE = sns.color_palette("colorblind")
MARKERS = ("o", "s", "^", "v", "D", "P", "X", "p", "*", "h", "<", ">", "d")
RC = {
    "pdf.fonttype": 42,  # embedded TrueType: text stays text, and journals accept it
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
    "grid.linewidth": 0.5,
}
CLOSE_UP = 2.5
"""Points of accuracy in the close-up of the best methods."""
ORDINALS = ("First", "Second", "Third", "Fourth", "Fifth", "Sixth")


@dataclass(frozen=True, eq=False)
class Picture:
    """One figure: its numbers and its files' bytes."""

    name: str
    """Stem of its files."""
    caption: str
    numbers: pd.DataFrame
    pdf: bytes
    png: bytes


def style(method: str) -> tuple[tuple[float, float, float], str]:
    """Return the colour and the marker that a method has everywhere."""
    index = _place(method)
    return PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)]


def line(method: str) -> str:
    """Return the style of a method's line: dashed for those that share a colour with another."""
    return ("-", "--")[_place(method) // len(PALETTE) % 2]


def _place(method: str) -> int:
    # A method that is not in the list yet must not take its colour from who else is plotted.
    known = list(METHODS)
    return known.index(method) if method in METHODS else zlib.crc32(method.encode())


@contextmanager
def _theme() -> Iterator[None]:
    with mpl.rc_context(mpl.rcParamsDefault):
        sns.set_theme(context="paper", style="whitegrid", palette="colorblind", rc=RC)
        yield


def _picture(name: str, caption: str, numbers: pd.DataFrame, figure: Figure, mark: str) -> Picture:
    """Render without anything that depends on the time, the place or the version."""
    if mark:
        size = RC["axes.titlesize"]
        letters = int(figure.get_figwidth() * 72 / (0.58 * size))  # a letter's mean width in ems
        figure.suptitle(textwrap.fill(mark, letters), fontsize=size)
    pdf, png = BytesIO(), BytesIO()
    nothing = dict.fromkeys(("Creator", "Producer", "CreationDate"))
    figure.savefig(pdf, format="pdf", metadata=nothing)
    figure.savefig(png, format="png", dpi=220, metadata={"Software": None})
    return Picture(name, caption, numbers, pdf.getvalue(), png.getvalue())


def _task_axis(axes: Axes, tasks: int) -> None:
    axes.set_xlim(0.5, tasks + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))


def use(
    frame: pd.DataFrame,
    name: str,
    caption: str,
    paper: Sequence[float] | None = None,
    mark: str = "",
) -> Picture:
    """Draw the use of each hidden layer after each task, as in the paper's Fig. 3.

    Parameters
    ----------
    frame
        Rows of one method from `frames.use_frame`.
    name, caption
        Of the figure.
    paper
        Shares (%) after the last task that the paper's text gives, one a layer.
    mark
        Written above the picture, which may be taken out of its report.
    """
    layers = list(dict.fromkeys(frame["layer"]))
    tasks = sorted(set(frame["task"]))
    colours = sns.color_palette("crest", len(tasks))
    width = 0.8 / len(tasks)
    with _theme():
        figure = Figure(figsize=(max(COLUMN, 1.4 * len(layers)), 2.3), layout="constrained")
        axes = figure.subplots()
        for i, task in enumerate(tasks):
            part = frame[frame["task"] == task].set_index("layer").reindex(layers)
            axes.bar(
                [group - 0.4 + (i + 0.5) * width for group in range(len(layers))],
                part["used"],
                0.9 * width,
                yerr=part["used_sd"] if part["used_sd"].notna().all() else None,
                error_kw={"elinewidth": 0.6},
                color=colours[i],
                label=str(task),
            )
        for group, share in enumerate(paper or ()):
            axes.hlines(
                share,
                group - 0.45,
                group + 0.45,
                "black",
                "--",
                lw=1.0,
                zorder=3,
                label="_paper" if group else "paper",
            )
        names = _layer_names(layers)
        axes.set_xticks(range(len(layers)), names)
        axes.grid(False, axis="x")
        axes.set_ylabel("Used layer capacity (%)")
        axes.set_ylim(0, None)
        figure.legend(
            *_tasks_first(*axes.get_legend_handles_labels()),
            title="After task",
            loc="outside right center",
            frameon=False,
            handlelength=1.4,
            handleheight=0.7,
            labelspacing=0.25,
        )
        return _picture(name, caption, frame, figure, mark)


def _tasks_first(handles: list[Any], names: list[str]) -> tuple[list[Any], list[str]]:
    order = sorted(range(len(names)), key=lambda i: names[i] == "paper")
    return [handles[i] for i in order], [names[i] for i in order]


def _layer_names(layers: Sequence[str]) -> list[str]:
    """Return what the paper calls layers: by number if all are dense, by kind and number if not."""
    short = [str(layer).rpartition(".")[2] for layer in layers]
    if any("conv" in layer for layer in short) or len(layers) > len(ORDINALS):
        return short
    return [f"{ORDINALS[i]} layer" for i in range(len(layers))]


def _layer_panels(layers: Sequence[str], tasks: int) -> tuple[Figure, list[Axes]]:
    """Return a figure with a panel a layer, tasks along each."""
    columns = min(len(layers), 4)
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(max(COLUMN, 1.7 * columns), 0.5 + 1.8 * rows), layout="constrained")
    grid: Any = figure.subplots(rows, columns, sharey=True, squeeze=False)
    panels: list[Axes] = list(grid.flat)
    for spare in panels[len(layers) :]:
        spare.set_axis_off()
    for axes, layer in zip(panels, layers, strict=False):
        axes.set_title(str(layer))
        axes.set_xlabel("Task")
        _task_axis(axes, tasks)
    return figure, panels[: len(layers)]


def units(frame: pd.DataFrame, name: str, caption: str, mark: str = "") -> Picture:
    """Draw what each hidden layer is made of for each task: a panel a layer, a bar a task.

    Parameters
    ----------
    frame
        Rows of one method from `frames.units_frame`.
    name, caption
        Of the figure.
    mark
        As of `use`.
    """
    layers = list(dict.fromkeys(frame["layer"]))
    kinds = {
        "reused": ("reused", PALETTE[2]),
        "not_reused": ("older, not reused", PALETTE[7]),
        "new": ("new", PALETTE[1]),
        "free": ("free", "0.92"),
    }
    with _theme():
        figure, panels = _layer_panels(layers, int(frame["task"].max()))
        for axes, layer in zip(panels, layers, strict=True):
            part = frame[frame["layer"] == layer]
            bottom = [0.0] * len(part)
            for kind, (text, colour) in kinds.items():
                bars = axes.bar(part["task"], part[kind], 0.85, bottom, color=colour, label=text)
                bottom = [bar.get_y() + bar.get_height() for bar in bars]
            axes.grid(False, axis="x")
            axes.set_ylim(0, 100)
        panels[0].set_ylabel("Units of the layer (%)")
        figure.legend(
            *panels[0].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=2 if len(layers) < 3 else 4,
            frameon=False,
        )
        return _picture(name, caption, frame, figure, mark)


def sufficiency(frame: pd.DataFrame, name: str, caption: str, mark: str = "") -> Picture:
    """Draw the shares of new units that read old or new units only: a panel a layer.

    Parameters
    ----------
    frame
        Rows of one method from `frames.sufficiency_frame`.
    name, caption
        Of the figure.
    mark
        As of `use`.
    """
    layers = list(dict.fromkeys(frame["layer"]))
    kinds = {"old_only": ("old ones only", "o", 2), "new_only": ("new ones only", "s", 1)}
    with _theme():
        figure, panels = _layer_panels(layers, int(frame["task"].max()))
        for axes, layer in zip(panels, layers, strict=True):
            part = frame[frame["layer"] == layer]
            for kind, (text, marker, colour) in kinds.items():
                axes.errorbar(
                    part["task"],
                    part[kind],
                    yerr=part[f"{kind}_sd"] if part[f"{kind}_sd"].notna().all() else None,
                    elinewidth=0.6,
                    color=PALETTE[colour],
                    marker=marker,
                    label=text,
                )
            axes.set_ylim(-4, 104)
        panels[0].set_ylabel("New units (%)")
        figure.legend(
            *panels[0].get_legend_handles_labels(),
            title="that read",
            loc="outside lower center",
            ncols=2,
            frameon=False,
        )
        return _picture(name, caption, frame, figure, mark)


def ablation(frame: pd.DataFrame, name: str, caption: str, mark: str = "") -> Picture:
    """Draw what each task loses without the older units that don't count as reused.

    Parameters
    ----------
    frame
        Rows of one method from `frames.ablation_frame`.
    name, caption
        Of the figure.
    mark
        As of `use`.
    """
    seeds, mean = frame[frame["seed"] != "mean"], frame[frame["seed"] == "mean"]
    with _theme():
        figure = Figure(figsize=(COLUMN, 2.3), layout="constrained")
        axes = figure.subplots()
        axes.plot(mean["task"], mean["margin"], "k--", lw=1.0, label="m, allowed")
        axes.plot(mean["task"], mean["drop"], color=PALETTE[0], label="drop, mean")
        axes.scatter(
            seeds["task"],
            seeds["drop"],
            s=14,
            color=PALETTE[0],
            alpha=0.6,
            linewidths=0,
            zorder=3,
            label="drop, a seed",
        )
        axes.set_xlabel("Task")
        axes.set_ylabel("Validation accuracy (points)")
        _task_axis(axes, int(frame["task"].max()))
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        return _picture(name, caption, frame, figure, mark)


def matrix(
    frame: pd.DataFrame,
    name: str,
    caption: str,
    title: str,
    tasks: int,
    lowest: float,
    mark: str = "",
) -> Picture:
    """Draw the accuracy matrix R of one method as a heat map.

    Parameters
    ----------
    frame
        From `frames.matrix_frame`.
    name, caption, title
        Of the figure.
    tasks
        Number of tasks.
    lowest
        Accuracy (%) at the dark end of the scale, the same for all methods.
    mark
        As of `use`.
    """
    numbers = range(1, tasks + 1)
    wide = frame.pivot(index="after_task", columns="on_task", values="accuracy")
    wide = wide.reindex(index=numbers, columns=numbers)
    with _theme():
        figure = Figure(figsize=(COLUMN, 2.8), layout="constrained")
        axes = figure.subplots()
        sns.heatmap(
            wide,
            ax=axes,
            vmin=lowest,
            vmax=100,
            cmap="viridis",
            square=True,
            annot=tasks <= 12,
            fmt=".1f",
            annot_kws={"fontsize": 4.6 if tasks > 6 else 6.5},
            linewidths=0.4,
            cbar_kws={"label": "Test accuracy (%)", "shrink": 0.85},
        )
        axes.set_xlabel("on task $j$")
        axes.set_ylabel("after task $i$")
        axes.tick_params(axis="y", rotation=0)
        axes.grid(False)
        axes.set_title(title)
        return _picture(name, caption, frame, figure, mark)


def close_up(frame: pd.DataFrame) -> tuple[float, float] | None:
    """Return the limits within which the best methods can be told apart.

    None if no method lies far below them, or fewer than two end within the limits.
    """
    means = frame[frame["seed"] == "mean"].sort_values("after_task")
    accuracy, best = means.groupby("method")["learnt_tasks"], frame["learnt_tasks"].max()
    near = (accuracy.last() >= best - CLOSE_UP).sum()
    if near < 2 or accuracy.min().min() >= best - 3 * CLOSE_UP:
        return None
    return best - CLOSE_UP, best + 0.1 * CLOSE_UP


def over_tasks(frame: pd.DataFrame, name: str, caption: str, mark: str = "") -> Picture:
    """Draw accuracies after each task: a line a method for its mean, a faint point a seed.

    Parameters
    ----------
    frame
        From `frames.over_tasks_frame`.
    name, caption
        Of the figure.
    mark
        As of `use`.
    """
    panels: list[tuple[str, str, tuple[float, float] | None]] = [
        ("learnt_tasks", "Mean over tasks learnt so far", None),
        ("first_task", "Task 1 alone", None),
    ]
    if close := close_up(frame):
        panels.insert(1, ("learnt_tasks", "The same, close up", close))
    methods = sorted(set(frame["method"]), key=rank)
    tasks = int(frame["after_task"].max())
    with _theme():
        figure = Figure(figsize=(PAGE, 2.6), layout="constrained")
        all_axes: Any = figure.subplots(1, len(panels))
        for axes, (column, title, limits) in zip(all_axes, panels, strict=True):
            for method in methods:
                colour, marker = style(method)
                mine = frame[frame["method"] == method]
                seeds = mine[mine["seed"] != "mean"]
                mean = mine[mine["seed"] == "mean"]
                axes.plot(mean["after_task"], mean[column], line(method), color=colour, zorder=2)
                axes.scatter(
                    seeds["after_task"],
                    seeds[column],
                    s=14,
                    marker=marker,
                    color=colour,
                    alpha=0.6,
                    linewidths=0,
                    zorder=3,
                )
            axes.set_title(title)
            axes.set_xlabel("After task")
            _task_axis(axes, tasks)
            axes.set_ylim(limits)
        all_axes[0].set_ylabel("Test accuracy (%)")
        handles = [
            Line2D([], [], color=style(m)[0], ls=line(m), marker=style(m)[1], label=label(m))
            for m in methods
        ]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False
        )
        return _picture(name, caption, frame, figure, mark)


def final(frame: pd.DataFrame, name: str, caption: str, part: str, mark: str = "") -> Picture:
    """Draw the accuracy on each task after the last one, as in the paper's Fig. 4a and 5a.

    Hollow markers: the task found the network depleted, with k/n beside it if k of n seeds did.

    Parameters
    ----------
    frame
        From `frames.final_frame`.
    name, caption
        Of the figure.
    part
        "validation" or "test".
    mark
        As of `use`.
    """
    methods = sorted(set(frame["method"]), key=rank)
    tasks = int(frame["task"].max())
    with _theme():
        figure = Figure(figsize=(PAGE, 2.8), layout="constrained")
        axes = figure.subplots()
        for i, method in enumerate(methods):
            colour, marker = style(method)
            mine = frame[frame["method"] == method]
            # Side by side, so that no method hides another.
            shift = 0.6 * ((i + 0.5) / len(methods) - 0.5)
            axes.errorbar(
                mine["task"] + shift,
                mine["accuracy"],
                yerr=mine["sd"].fillna(0) if mine["sd"].notna().any() else None,
                color=colour,
                marker=marker,
                linestyle="none",
                elinewidth=0.8,
                label=label(method),
            )
            hollow = mine[mine["depleted"] > 0]
            axes.plot(
                hollow["task"] + shift,
                hollow["accuracy"],
                color=colour,
                marker=marker,
                markerfacecolor="white",
                markeredgecolor=colour,
                markeredgewidth=1.2,
                linestyle="none",
                zorder=3,
            )
            for _, row in hollow[hollow["depleted"] < hollow["n"]].iterrows():
                axes.annotate(
                    f"{row['depleted']}/{row['n']}",
                    (row["task"] + shift, row["accuracy"]),
                    (3, -3),
                    textcoords="offset points",
                    verticalalignment="top",
                    fontsize=6,
                    color="0.3",
                )
        axes.set_xlabel("Task")
        axes.set_ylabel(f"{part.capitalize()} accuracy (%)")
        _task_axis(axes, tasks)
        axes.grid(False, axis="x")
        figure.legend(loc="outside right center", frameon=False)
        return _picture(name, caption, frame, figure, mark)
