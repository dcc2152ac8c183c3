"""One process a cell: locks that the operating system takes back when their owner dies."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from benchmarks.errors import UserError

LOCK, OWNER = "lock", "owner.json"
A_LOOK = 0.2
"""Seconds that a lock is waited for: whoever only looks (`held`) has it for less."""


def _lock(folder: Path, timeout: float) -> FileLock:
    # filelock's other kind of lock outlives its owner where that died on another machine.
    return FileLock(folder / LOCK, timeout=timeout, fallback_to_soft=False)


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Hold a folder's lock, or find that another process holds it.

    Parameters
    ----------
    folder
        Made if need be. While the lock is held, ``owner.json`` in it tells who holds it.

    Yields
    ------
    bool
        Whether the lock is ours.

    Raises
    ------
    UserError
        If the folder cannot be written.
    """
    # A second handle of this process counts as another's.
    lock = _lock(folder, A_LOOK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        yield False
        return
    except OSError as error:
        if error.errno == errno.ENOSYS:
            raise UserError(
                f"The file system of {folder} has no locks, so that two processes could run the "
                "same cell: choose another one with --runs-dir."
            ) from error
        raise UserError(f"Cannot write {folder}: {error.strerror or error}.") from error
    owner = {"host": socket.gethostname(), "process": os.getpid(), "since": round(time.time())}
    try:
        with suppress(OSError):  # it informs, no more
            (folder / OWNER).write_text(json.dumps(owner))
        yield True
    finally:
        with suppress(OSError):
            (folder / OWNER).unlink(missing_ok=True)
        lock.release()


def held(folder: Path) -> bool:
    """Return whether some process holds a folder's lock."""
    if not (folder / LOCK).exists():
        return False
    lock = _lock(folder, 0)
    try:
        lock.acquire()
    except (Timeout, OSError):
        return True
    lock.release()
    return False


def owner(folder: Path) -> dict[str, Any]:
    """Return host, process and since (seconds since 1970) of a folder's owner; {} if unknown."""
    try:
        told = json.loads((folder / OWNER).read_text())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def named(folder: Path) -> str:
    """Return who holds a folder, for people."""
    told = owner(folder)
    if not told:
        return "another process"
    return f"process {told.get('process')} on {told.get('host')}"
