"""Checks of the machine, the environment, the data and the records, each with a remedy."""

from __future__ import annotations

import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch

from benchmarks import data, records, runner, tune
from benchmarks.cell import Cell
from benchmarks.errors import UserError
from benchmarks.experiment import Experiment
from benchmarks.methods import METHODS
from benchmarks.precision import bf16_kernels
from benchmarks.tracking import logged_in
from clnp.one_pass import compile_one_pass

SPACE = 5 * 2**30
"""Free bytes below which a long run is at risk: resume states and W&B's files."""


@dataclass(frozen=True)
class Finding:
    """What one check has found."""

    word: Literal["ok", "warning", "wrong"]
    text: str
    """What was looked at, and what to do about it."""


def environment(constraints: Path) -> Iterator[Finding]:
    """Compare the installed versions with the constraints, which results were made under."""
    if sys.version_info < (3, 11):  # noqa: UP036, whoever runs it may have an older one
        yield Finding("wrong", f"Python {platform.python_version()}: 3.11 or later is needed")
    if not constraints.exists():
        yield Finding("warning", f"{constraints} is missing: versions can't be compared")
        return
    other = []
    for line in constraints.read_text().splitlines():
        pinned = re.fullmatch(r"([\w.-]+)==([^\s;]+)\s*(?:;.*)?", line.strip())
        if pinned is None:
            continue
        try:
            version = metadata.version(pinned[1])
        except metadata.PackageNotFoundError:  # of another platform, or of an extra
            continue
        # torch's own builds append what they were built for: 2.14.1+cpu
        if version.partition("+")[0] != pinned[2].partition("+")[0]:
            other.append(f"{pinned[1]} {version} (constraints: {pinned[2]})")
    if other:
        yield Finding("warning", f"other versions than pinned: {', '.join(other)}; nox -s env")
    else:
        yield Finding("ok", f"Python {platform.python_version()}, versions as pinned")


def devices() -> Iterator[Finding]:
    """Tell what can be trained on."""
    cpu = f"CPU with {torch.get_num_threads()} threads, bf16 {bf16_kernels(torch.device('cpu'))}"
    if not torch.cuda.is_available():
        yield Finding("ok", f"{cpu}; no GPU that torch can use")
        try:
            compile_one_pass()
        except OSError as error:
            yield Finding(
                "warning",
                f"L1 isn't compiled ({error}): results are the same, but a step of CLNP on a large "
                "network takes up to an eighth more time; install a C++ compiler",
            )
        return
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Finding("ok", f"{', '.join(names)}; {cpu}")


def data_sets(names: Iterable[str], folder: Path | None) -> Iterator[Finding]:
    """Check that the data are there and are the original ones."""
    for name in names:
        try:
            data.check(name, folder)
        except data.MissingData as error:  # only its own experiments need it
            yield Finding("warning", str(error))
        except UserError as error:
            yield Finding("wrong", str(error))
        else:
            yield Finding("ok", f"data: {name}")


def disk(folders: Iterable[Path]) -> Iterator[Finding]:
    """Check that folders can be written, and that there is room."""
    for folder in folders:
        try:
            records.check_writable(folder)
            free = shutil.disk_usage(folder).free
        except (UserError, OSError) as error:
            yield Finding("wrong", str(error))
            continue
        word: Literal["ok", "warning"] = "ok" if free >= SPACE else "warning"
        yield Finding(word, f"{folder}: {free / 2**30:.1f} GiB free")


def kept(
    folder: Path, presets: dict[str, type[Experiment]], fingerprint: Callable[[str], str]
) -> Iterator[Finding]:
    """Check that each record can be read, and means today what it meant when it was made."""
    good = 0
    for path in sorted(folder.glob("*/*/*.json")):
        try:
            record = records.read(path)
        except UserError as error:
            yield Finding("wrong", str(error))
            continue
        preset = presets.get(record["experiment"])
        method = METHODS.get(record["method"])
        if preset is None or method is None:
            good += 1  # a changed experiment, or a method of somebody's own
            continue
        experiment = preset()
        cell = Cell(experiment, method, record["seed"], fingerprint(experiment.dataset))
        if experiment.preset not in method.settings:
            wrong = [f"{method.name} has no settings there"]
        elif cell.hash == record["hash"]:
            wrong = records.disagreements(record["config"], cell.config)
        else:
            wrong = ["today's settings, data or revision give it another hash"]
        if wrong:
            yield Finding(
                "wrong",
                f"{path} is of another config than {cell.name} today ({'; '.join(wrong)}): give "
                "the setting back its value, or delete the record and run the cell again",
            )
        elif record["git"]["dirty"]:
            yield Finding("warning", f"{path} comes from uncommitted code: it fills no table")
        else:
            good += 1
    yield Finding("ok", f"{folder}: {good} records")


def tuned(folder: Path) -> Iterator[Finding]:
    """Check that settings are those of the winners."""
    for path in sorted(folder.glob("*/*.json")):
        try:
            result = records.read_tuning(path)
        except UserError as error:
            yield Finding("wrong", str(error))
            continue
        name = records.tuned_method(result)
        method = METHODS.get(name)
        if method is None or result["experiment"] not in method.settings:
            continue
        wrong = tune.mismatches(result, method.settings[result["experiment"]])
        if wrong:
            told = f"settings of {name} are not the winner's ({'; '.join(wrong)})"
            yield Finding("warning", f"{path}: {told}")
        else:
            yield Finding("ok", f"{path}: settings of {name} are the winner's")


def code() -> Iterator[Finding]:
    """Tell whether records made now could fill a table, and where logs would go."""
    git = runner.git_state()
    if git["commit"] is None:
        yield Finding("warning", "no git checkout: records will fill no table of the paper")
    elif git["dirty"]:
        yield Finding("warning", "uncommitted changes: records will fill no table of the paper")
    else:
        yield Finding("ok", f"commit {git['commit'][:12]}, no uncommitted changes")
    yield Finding(
        "ok", f"W&B: {'logged in' if logged_in() else 'not logged in, runs stay offline'}"
    )
