"""Permuted MNIST (arXiv 1903.04476, Sec. 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from benchmarks.experiment import PermutedImages, Precision


@dataclass(frozen=True)
class PermutedMNIST(PermutedImages):
    """The paper's Table 1 and Fig. 3: a 784-2000-2000-10 network learns ten pixel permutations.

    Expected (Table 1, mean test accuracy over the tasks, in %): single-task 98.48, CLNP 98.42.
    Cost: half an hour a CLNP seed on 2 CPU cores with bfloat16 instructions, some 5 minutes on an
    H100; clnp_best, which has the winner's settings of CLNP's grid, as much again.

        nox -s pmnist -- --methods clnp --seeds 0
    """

    preset: ClassVar[str] = "pmnist"
    seeds: ClassVar[tuple[int, ...]] = (0, 1, 2, 3, 4)
    methods: ClassVar[tuple[str, ...]] = (
        *("clnp", "clnp_best", "single_task", "finetune", "joint"),
        *("ewc", "ewc_online", "si", "superposition"),
        *("hat", "packnet", "lwf", "er"),
    )

    precision: Precision = "bf16"
