"""Memory of the CPU's allocator: what is freed is kept for the next step."""

from __future__ import annotations

import ctypes
import sys

# The numbers by which glibc's mallopt(3) knows its parameters.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Let glibc keep large blocks that are freed, instead of giving them back to the kernel.

    A training step frees and takes again the same gradients and casts, tens of megabytes; by
    default each one is mapped anew, page by page. Measured on the permuted-MNIST network (2 cores,
    bf16): 20.1 ms a step before, 12.3 ms after. Results are the same.

    Returns
    -------
    bool
        Whether it is in force; False where the C library isn't glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # 32 MiB is the most that mallopt takes: blocks up to that size come from the heap.
    wanted = {M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 2**28}
    done = [bool(mallopt(parameter, value)) for parameter, value in wanted.items()]
    return all(done)
