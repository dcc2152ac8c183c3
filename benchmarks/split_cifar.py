"""Split CIFAR-10/100 (arXiv 1903.04476, Sec. 3.2): the narrow network and the wide one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from benchmarks.errors import UserError
from benchmarks.experiment import Experiment, Precision

if TYPE_CHECKING:
    import torch
    from avalanche.benchmarks import CLScenario

    from benchmarks.data import Images
    from benchmarks.scenarios import Augmentation


@dataclass(frozen=True)
class SplitImages(Experiment):
    """CIFAR-10 first, then CIFAR-100 in groups of ten classes."""

    dataset: str = "cifar10+cifar100"
    validation: float = 0.1
    """Share of each class's training images held out for validation; 0: none."""
    classes: int = 10
    """Classes of a task."""
    images: int | None = None
    """Training and validation images of a task, of each class alike; None: all."""
    augment: bool = False
    """Whether training images are shifted and mirrored at random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_counts("classes")
        if not 0 <= self.validation < 1:
            raise UserError(
                f"{self.preset}: validation is {self.validation}; it is a share, at least 0 and "
                "below 1."
            )
        if self.images is not None and self.images < 10 * self.classes:
            raise UserError(
                f"{self.preset}: images is {self.images}; it must be at least 10 a class."
            )

    def scenario(self, images: Images, seed: int) -> CLScenario:
        """Return the task stream that belongs to `seed`."""
        from benchmarks.scenarios import split

        return split(images, self.tasks, seed, self.validation, self.classes, limit=self.images)

    def augmentation(self) -> Augmentation | None:
        """Return what becomes of training images."""
        from benchmarks.scenarios import crop_and_flip

        return crop_and_flip if self.augment else None


@dataclass(frozen=True)
class SplitCIFAR(SplitImages):
    """The paper's Fig. 4: SI's small network with a head a task learns six tasks.

    Expected: CLNP at m = 2 % above SI in the mean over tasks; at m = 1 % capacity runs out early.
    Cost: about an hour a method and seed on 2 CPU cores.

        nox -s split_cifar -- --methods clnp_m2 si --seeds 0
    """

    preset: ClassVar[str] = "split_cifar"
    seeds: ClassVar[tuple[int, ...]] = (0, 1, 2, 3, 4)
    methods: ClassVar[tuple[str, ...]] = (
        *("clnp_m1", "clnp_m2", "clnp_m4_ft"),
        *("si", "ewc", "single_task", "finetune", "hat"),
    )
    multi_head: ClassVar[bool] = True

    tasks: int = 6
    precision: Precision = "bf16"
    pool: int = 2
    """Kernel of the max pooling: 2 as in SI's code, or 3 as in the paper's Table 2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool not in (2, 3):
            raise UserError(f"{self.preset}: pool is {self.pool}; it must be 2 or 3.")

    def model(self) -> torch.nn.Module:
        """Return a new network, drawn from torch's global generator."""
        from benchmarks.models import MultiHead, narrow

        return MultiHead(*narrow(self.pool), self.tasks, self.classes)


@dataclass(frozen=True)
class SplitCIFARReduced(SplitCIFAR):
    """The narrow network with a tenth of CIFAR-10 and a sixth of the epochs: without a GPU.

    Expected: the figures' shapes, at lower accuracies. Cost: at most 15 minutes a method and seed
    on two CPU cores without AVX512.

        nox -s split_cifar_reduced -- --methods clnp_m1 clnp_m2 si --seeds 0
    """

    preset: ClassVar[str] = "split_cifar_reduced"

    epochs: int = 10
    images: int | None = 5000


@dataclass(frozen=True)
class SplitCIFARWide(SplitImages):
    """The paper's Fig. 5: a wide convolutional network with a single head learns until it is full.

    Expected: ten tasks are learnt; then the last hidden layer has no free channel. The paper's Fig.
    5a has no numbers in the text. Cost: for a GPU, on which it has not been measured yet.

        nox -s split_cifar_wide -- --methods clnp_m2 --seeds 0
    """

    preset: ClassVar[str] = "split_cifar_wide"
    seeds: ClassVar[tuple[int, ...]] = (0, 1, 2, 3, 4)
    methods: ClassVar[tuple[str, ...]] = ("clnp_m2", "joint", "single_task", "superposition")

    tasks: int = 11
    precision: Precision = "bf16"
    shrink: int = 1
    """Number by which the channels of the network are divided."""

    def model(self) -> torch.nn.Module:
        """Return a new network, drawn from torch's global generator."""
        from benchmarks.models import wide

        return wide(self.classes, self.shrink)


@dataclass(frozen=True)
class SplitCIFARWideReduced(SplitCIFARWide):
    """The wide network with an eighth of its channels, fewer images and epochs: without a GPU.

    Expected: the figures' shapes, at lower accuracies. Cost: at most 20 minutes a method and seed
    on two CPU cores without AVX512.

        nox -s split_cifar_wide_reduced -- --methods clnp_m2 --seeds 0
    """

    preset: ClassVar[str] = "split_cifar_wide_reduced"

    epochs: int = 12
    batch_size: int = 64
    images: int | None = 5000
    shrink: int = 8
