"""Records: the one small JSON file that a finished cell leaves, and the only source of reports."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.errors import UserError
from benchmarks.experiment import digest

Record = dict[str, Any]
Tuning = dict[str, Any]
"""The result of a method's grid; see `benchmarks.tune`."""

A_DAY = 86_400.0
"""Seconds."""

REQUIRED: dict[str, type | tuple[type, ...]] = {
    "experiment": str,
    "method": str,
    "seed": int,
    "hash": str,
    "config": dict,
    "accuracy": dict,
    "capacity": list,
    "logit_drift": list,
    "parameters": dict,
    "task_id_at_test": bool,
    "seconds": dict,
    "environment": dict,
    "git": dict,
}


def path_of(folder: Path, experiment: str, method: str, seed: int, hash_: str) -> Path:
    """Return where the record of a cell belongs."""
    return folder / experiment / method / f"seed{seed}-{hash_[:8]}.json"


def _broken_matrix(matrix: Any) -> str | None:
    """Return what is wrong with an accuracy matrix (R[i][j] in [0, 1], null for j > i), or None."""
    if not isinstance(matrix, list) or not matrix:
        return "is no list of rows"
    for i, row in enumerate(matrix):
        if not isinstance(row, list) or len(row) != len(matrix):
            return f"has a row {i} that is not {len(matrix)} long"
        for j, value in enumerate(row):
            if value is None:
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if j > i or not number or not 0 <= value <= 1:
                return f"has {value!r} at task {j} after task {i}"
    return None


def problem(record: Any) -> str | None:
    """Return what is wrong with a record, or None if nothing is.

    Parameters
    ----------
    record
        What a record's file holds, decoded.

    Returns
    -------
    str or None
        One clause that names the field.
    """
    if not isinstance(record, dict):
        return "it is no JSON object"
    for key, kind in REQUIRED.items():
        if key not in record:
            return f"{key!r} is missing"
        if not isinstance(record[key], kind):
            return f"{key!r} is {record[key]!r}"
    if set(record["accuracy"]) != {"validation", "test"}:
        return f"'accuracy' holds {sorted(record['accuracy'])}, not test and validation"
    for stream, matrix in record["accuracy"].items():
        if wrong := _broken_matrix(matrix):
            return f"the {stream} accuracy {wrong}"
    for part in ("experiment", "method", "data"):
        if not isinstance(record["config"].get(part), dict):
            return f"'config' has no {part!r}"
    if "checksum" in record and record["checksum"] != _checksum(record):
        return "its checksum does not fit its contents"
    return None


def _checksum(record: Record) -> str:
    return digest({key: value for key, value in record.items() if key != "checksum"})


def _refuse(constant: str) -> None:
    """Refuse NaN and infinities, which aren't JSON, though Python reads them."""
    raise ValueError(f"it holds {constant}, which is no number")


def read(path: Path) -> Record:
    """Return the record in a file.

    Raises
    ------
    UserError
        If the file cannot be read or is no valid record; the message names the file and the fault.
    """
    try:
        record = json.loads(path.read_bytes(), parse_constant=_refuse)
    except (OSError, ValueError, RecursionError) as error:
        wrong: str | None = str(error)
    else:
        wrong = problem(record)
        if wrong is None and path.name != f"seed{record['seed']}-{record['hash'][:8]}.json":
            wrong = f"it holds the cell seed{record['seed']}-{record['hash'][:8]}"
    if wrong is not None:
        raise UserError(
            f"{path} is damaged: {wrong}. Restore it from git, or delete it and run the cell again."
        )
    return dict(record)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, flush it to the disk, and rename it.

    Raises
    ------
    UserError
        If the folder or the file cannot be written; no half file is left.
    """
    temporary = path.with_name(f".{path.name}.{_writer(os.getpid())}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror or error}.") from error
    finally:
        # Gone after the rename; still there if anything stopped us before it.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _writer(process: int) -> str:
    """Name a process among those of all machines that see the folder."""
    return f"{socket.gethostname()}.{process}"


def remove_leftovers(path: Path) -> None:
    """Remove what writers of a file have left that were killed, on this machine or a day ago."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        process = left.name.split(".")[-2]
        ours = process.isdigit() and left.name == f".{path.name}.{_writer(int(process))}.tmp"
        with contextlib.suppress(OSError):
            if ours:
                dead = int(process) == os.getpid() or not psutil.pid_exists(int(process))
            else:
                dead = time.time() - left.stat().st_mtime > A_DAY
            if dead:
                left.unlink(missing_ok=True)


def write(path: Path, record: Record) -> None:
    """Write a record, with a checksum of its contents.

    Raises
    ------
    ValueError
        If the record is not valid: a fault of the harness, not of the user.
    UserError
        If it cannot be written.
    """
    # Through JSON and back first, so that the checksum is that of what will be read.
    record = json.loads(json.dumps(record, allow_nan=False))
    record["checksum"] = _checksum(record)
    if wrong := problem(record):
        raise ValueError(f"refusing to write a broken record to {path}: {wrong}")
    write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())
    remove_leftovers(path)


TUNING: dict[str, type | tuple[type, ...]] = {
    "experiment": str,
    "method": str,
    "revision": int,
    "config": dict,
    "seeds": list,
    "tasks": int,
    "candidates": list,
    "winner": (int, type(None)),
    "dirty": bool,
    "checksum": str,
}


PRINTED = {("pmnist", "clnp"): "clnp_best"}
"""Methods that keep the settings that their paper prints in an experiment, and those that have the
winners of their grids."""


def tuned_method(result: Tuning) -> str:
    """Return the method whose settings are to be those of a grid's winner."""
    method: str = result["method"]
    return PRINTED.get((result["experiment"], method), method)


def read_tuning(path: Path) -> Tuning:
    """Return the result of a grid.

    Raises
    ------
    UserError
        If the file cannot be read or is damaged; the message names the file and the fault.
    """
    wrong = None
    try:
        result = json.loads(path.read_bytes(), parse_constant=_refuse)
        for key, kind in TUNING.items():
            if not isinstance(result[key], kind):
                wrong = f"{key!r} is {result[key]!r}"
        if wrong is None and result["checksum"] != _checksum(result):
            wrong = "its checksum does not fit its contents"
    except (OSError, ValueError, RecursionError) as error:
        wrong = str(error)
    except (KeyError, TypeError) as error:
        wrong = f"{error} is missing"
    if wrong is not None:
        raise UserError(f"{path} is damaged: {wrong}. Restore it from git, or delete it and tune.")
    return dict(result)


def write_tuning(path: Path, result: Tuning) -> None:
    """Write the result of a grid, with a checksum of its contents.

    Raises
    ------
    UserError
        If it cannot be written.
    """
    whole = {**result, "checksum": _checksum(result)}
    write_atomically(path, (json.dumps(whole, indent=1, allow_nan=False) + "\n").encode())
    remove_leftovers(path)


def disagreements(recorded: Any, today: Any, prefix: str = "") -> list[str]:
    """Return the fields that two configs both have, with different values.

    Parameters
    ----------
    recorded, today
        The config in a record, and the one that the same cell would get today.

    Returns
    -------
    list of str
        One entry a field, such as ``"method.lr: recorded 0.001, now 0.002"``.
    """
    found = []
    for key in sorted(recorded.keys() & today.keys()):
        before, now = recorded[key], today[key]
        if isinstance(before, dict) and isinstance(now, dict):
            found += disagreements(before, now, f"{prefix}{key}.")
        elif before != now:
            found.append(f"{prefix}{key}: recorded {before!r}, now {now!r}")
    return found


def check_writable(folder: Path) -> None:
    """Make sure that records can be written into a folder, before any training starts.

    Raises
    ------
    UserError
        If the folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # without a name, so that no kill leaves it behind
            pass
    except OSError as error:
        raise UserError(f"Cannot write {folder}: {error.strerror or error}.") from error
