"""What an experiment is: the network, the task stream and the budget, as one frozen dataclass."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from benchmarks.errors import UserError

if TYPE_CHECKING:
    import torch
    from avalanche.benchmarks import CLScenario

    from benchmarks.data import Images
    from benchmarks.scenarios import Augmentation

Precision = Literal["fp32", "bf16"]


def canonical(value: Any) -> str:
    """Return the one JSON text of `value` (keys sorted, no spaces), fit to be hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """Return the SHA-256 of the canonical JSON of `value`, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def derive(seed: int, *purpose: object) -> int:
    """Return the seed of a separate generator: the same (seed, purpose) always gives the same one.

    Parameters
    ----------
    seed
        The cell's seed.
    purpose
        What the generator is for, such as ``"weights"`` or ``("noise", 3)``.

    Returns
    -------
    int
        In [0, 2**31), since NumPy's legacy generator takes no more than 32 bits.
    """
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def changed(instance: Any) -> dict[str, Any]:
    """Return the fields of a dataclass instance that differ from the defaults of its class."""
    return {
        field.name: getattr(instance, field.name)
        for field in dataclasses.fields(instance)
        if getattr(instance, field.name) != field.default
    }


@dataclass(frozen=True)
class Experiment(ABC):
    """A network, a stream of tasks, and a budget.

    A subclass is a *preset*: its defaults are the experiment. An instance with any other value
    is another experiment and is named so (`name`); seeds, devices and paths are no fields,
    because they do not make it another one.
    """

    preset: ClassVar[str]
    """Name of the preset."""
    seeds: ClassVar[tuple[int, ...]]
    """Seeds that are run unless the user names others."""
    methods: ClassVar[tuple[str, ...]]
    """Methods that are run unless the user names others."""
    multi_head: ClassVar[bool] = False
    """Whether each task has a head of its own."""
    threads: ClassVar[int | None] = None
    """CPU threads; None: as many as torch chooses."""

    dataset: str = ""
    """Name of the data set (see `benchmarks.data.load`)."""
    tasks: int = 10
    """Number of tasks."""
    epochs: int = 60
    """Epochs a task, for methods that do not set their own."""
    method_epochs: bool = True
    """Whether a method's own number of epochs goes before `epochs`."""
    batch_size: int = 256
    """Images in a training batch."""
    eval_batch_size: int = 1000
    """Images in an evaluation batch."""
    precision: Precision = "fp32"
    """fp32, or bf16: forward passes under autocast to bfloat16."""
    settings: tuple[str, ...] = ()
    """Changed settings of methods, each as METHOD.SETTING=VALUE."""

    def __post_init__(self) -> None:
        self._check_counts("tasks", "epochs", "batch_size", "eval_batch_size")

    def _check_counts(self, *fields: str) -> None:
        for field in fields:
            if getattr(self, field) < 1:
                raise UserError(
                    f"{self.preset}: {field} is {getattr(self, field)}; it must be at least 1."
                )

    @property
    def name(self) -> str:
        """The preset's name; with a suffix of its own as soon as any field is changed.

        A reduced or altered run can thus never fill a table of the preset.
        """
        overrides = changed(self)
        return f"{self.preset}-custom-{digest(overrides)[:4]}" if overrides else self.preset

    def config(self) -> dict[str, Any]:
        """Return the name and every field, as JSON values."""
        fields = json.loads(canonical(dataclasses.asdict(self)))
        return {"name": self.name, "preset": self.preset, **fields}

    def load(self, data_dir: Path | None, device: str | torch.device, test: bool = True) -> Images:
        """Load the images onto `device`; without `test`, the test files are not even read.

        Raises
        ------
        UserError
            If they are missing or damaged, or are no data for this experiment's stream.
        """
        from benchmarks.data import load

        images = load(self.dataset, data_dir, device=device, test=test)
        self.scenario(images, seed=0)  # what the data refuse fails the call, not each cell
        return images

    @abstractmethod
    def scenario(self, images: Images, seed: int) -> CLScenario:
        """Return the task stream that belongs to `seed`."""

    @abstractmethod
    def model(self) -> torch.nn.Module:
        """Return a new network, drawn from torch's global generator."""

    def augmentation(self) -> Augmentation | None:
        """Return what becomes of training images; None: they stay as they are."""
        return None


@dataclass(frozen=True)
class PermutedImages(Experiment):
    """A stream of permuted images learnt by a fully connected network with one head."""

    dataset: str = "mnist"
    validation: int = 10_000
    """Training images held out for validation, the same in each task; 0: none."""
    inputs: int = 784
    """Pixels of an image."""
    hidden: tuple[int, ...] = (2000, 2000)
    """Units of each hidden layer."""
    classes: int = 10
    """Outputs of the head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation < 0:
            raise UserError(f"{self.preset}: validation is {self.validation}; it is at least 0.")

    def scenario(self, images: Images, seed: int) -> CLScenario:
        """Return the task stream that belongs to `seed`."""
        from benchmarks.scenarios import permuted

        return permuted(images, tasks=self.tasks, seed=seed, validation=self.validation)

    def model(self) -> torch.nn.Module:
        """Return a new network, drawn from torch's global generator."""
        from benchmarks.models import mlp

        return mlp(self.inputs, self.hidden, self.classes)
