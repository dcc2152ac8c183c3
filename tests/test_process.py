"""The process settings that make a CPU faster."""

from __future__ import annotations

import platform
import resource
from collections.abc import Iterator

import pytest
import torch

from benchmarks.process import tune

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or platform.machine() != "x86_64",
    reason="another C library, or another CPU",
)


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    tune(False)


def test_freed_blocks_are_not_mapped_anew() -> None:
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            torch.ones(2**21)  # 8 MiB, freed at once
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert tune()
    faults()  # the first block grows the heap
    assert faults() < 20 * 2**21 * 4 / resource.getpagesize() / 10


def test_denormals_are_zero_and_can_be_had_back() -> None:
    tiny = torch.tensor([1e-39])
    assert tune()
    assert (tiny * 0.5).item() == 0.0
    tune(False)
    assert (tiny * 0.5).item() != 0.0
