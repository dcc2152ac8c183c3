"""The allocator keeps what is freed."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from benchmarks.memory import keep_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library isn't glibc")
def test_freed_blocks_are_not_mapped_anew() -> None:
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            torch.ones(2**21)  # 8 MiB, freed at once
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert keep_freed_memory()
    faults()  # the first block grows the heap
    assert faults() < 20 * 2**21 * 4 / resource.getpagesize() / 10
