"""Permuted digits: the paper's protocol in a minute, with the images inside scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from benchmarks.experiment import PermutedImages


@dataclass(frozen=True)
class Quickstart(PermutedImages):
    """A 64-300-300-10 network learns five pixel permutations of the 8x8 digits, on any machine.

    Expected: CLNP's accuracy on a task never changes once it is learnt; finetune forgets.
    Cost: about a minute on 2 CPU cores, for three methods and two seeds.

        nox -s quickstart
    """

    preset: ClassVar[str] = "quickstart"
    seeds: ClassVar[tuple[int, ...]] = (0, 1)
    methods: ClassVar[tuple[str, ...]] = ("clnp", "finetune", "single_task")
    # So small a network gains nothing from a second thread, and loses much where cores are busy.
    threads: ClassVar[int | None] = 1

    dataset: str = "digits"
    tasks: int = 5
    epochs: int = 60
    batch_size: int = 64
    validation: int = 300
    inputs: int = 64
    hidden: tuple[int, ...] = (300, 300)
