"""Settings of the process that make training on a CPU faster, and change no result that matters."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

# The numbers by which glibc's mallopt(3) knows its parameters.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3

KEEP = {M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 2**28}
"""Blocks of up to 32 MiB (the most that mallopt takes) come from the heap and stay there."""
DEFAULT = {M_MMAP_THRESHOLD: 2**17, M_TRIM_THRESHOLD: 2**17, M_TOP_PAD: 2**17}
"""What glibc starts with."""


def tune(on: bool = True) -> bool:
    """Keep freed memory for the next step, and take denormal numbers for 0.

    - A step frees and takes again the same gradients and casts, tens of megabytes, which the
      allocator would otherwise map anew, page by page.
    - Adam's averages of gradients that have vanished (dead units) shrink to denormal numbers, with
      which a CPU is many times slower, and stay there.

    `nox -s speed` measures both: its bare loop runs with and without them. To be called before the
    first parallel operation, since torch's threads take the second setting from their parent.

    Parameters
    ----------
    on
        False: what a process starts with.

    Returns
    -------
    bool
        Whether both are as asked; False where the C library isn't glibc or the CPU can't.
    """
    denormals = torch.set_flush_denormal(on)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    done = [bool(mallopt(key, value)) for key, value in (KEEP if on else DEFAULT).items()]
    return denormals and all(done)


def deterministic() -> None:
    """Let operations on a GPU give the same bits each time; one that can't is an error.

    To be called before the first of them: cuBLAS reads its setting once.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
