"""Continual-learning scenarios over data that stays on the device.

One uint8 copy of the images serves all tasks and streams. An experience's `dataset` is a real
AvalancheDataset, so replay, class timelines and other plugins work as ever; but as long as a
strategy trains on one task's data (or a subset of it), `ResidentData` hands out batches gathered
by index on the device, at a small fraction of a stock loader's cost.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import IntEnum
from itertools import islice
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from avalanche.benchmarks import CLScenario, benchmark_from_datasets, with_classes_timeline
from avalanche.benchmarks.scenarios import with_task_labels
from avalanche.benchmarks.utils import AvalancheDataset, ConstantSequence, DataAttribute
from avalanche.benchmarks.utils.classification_dataset import (
    TaskAwareSupervisedClassificationDataset,
)
from avalanche.benchmarks.utils.flat_data import FlatData
from avalanche.benchmarks.utils.transform_groups import TransformGroups
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from benchmarks.data import Images
from benchmarks.errors import UserError
from benchmarks.precision import bf16
from benchmarks.resume import Resumable

Precision = Literal["fp32", "bf16"]


class _Purpose(IntEnum):
    """What a generator is for, so that one seed gives independent streams of numbers."""

    SPLIT = 0
    PERMUTATION = 1
    ORDER = 2
    MEMORY = 3


def _generator(seed: int, purpose: _Purpose, index: int = 0) -> torch.Generator:
    sequence = np.random.SeedSequence(seed, spawn_key=(purpose, index))
    state = int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator().manual_seed(state)


class ResidentDataset(Dataset[tuple[Tensor, int]]):
    """One task's view on images that all tasks share.

    Parameters
    ----------
    images
        (N, ...) uint8, on the device that trains; never copied.
    targets
        (N,) int64 class labels, on the same device.
    task
        The task label of every sample.
    permutation
        (D,) int64, on the same device: where each of the D pixels of the flattened input comes
        from. None: images keep their shape and order.
    scale
        The pixel value that becomes 1.0.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        task: int,
        permutation: Tensor | None = None,
        scale: float = 255.0,
    ) -> None:
        self.images = images
        self.targets = targets
        self.task = task
        self.permutation = permutation
        self.scale = scale

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One sample for a stock loader, on the CPU, where pinning and worker processes need it."""
        x, y, _ = self.batch(torch.tensor([index], device=self.images.device))
        return x[0].cpu(), int(y)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gather samples on the device, without synchronising with it.

        Parameters
        ----------
        indices
            (B,) int64 on the images' device.

        Returns
        -------
        tuple of Tensor
            x (B, D) or (B, ...) float32 in [0, 1], y (B,) int64, task labels (B,) int64.
        """
        if self.images.ndim == 4:  # rows of channels-last memory, as convolutions like it best
            x = self.images.permute(0, 2, 3, 1).index_select(0, indices).permute(0, 3, 1, 2)
        else:
            x = self.images.index_select(0, indices)
        x = x.float().div_(self.scale)
        if self.permutation is not None:
            # Columns of float32: on a CPU twice as fast as columns of uint8.
            x = x.flatten(1).index_select(1, self.permutation)
        y = self.targets.index_select(0, indices)
        return x, y, torch.full_like(y, self.task)


Augmentation = Callable[[Tensor, torch.Generator], Tensor]
"""Makes a batch of training images another one, with numbers from a CPU generator."""


def crop_and_flip(x: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Shift each image of a batch at random, and mirror half of them.

    Parameters
    ----------
    x
        (B, C, H, W), on any device, which is not waited for.
    generator
        On the CPU.
    padding
        Pixels by which an image is shifted at most, in each direction; zeros come in.

    Returns
    -------
    Tensor
        (B, C, H, W), in channels-last memory.
    """
    count, _, height, width = x.shape
    drawn = torch.stack(
        [
            torch.randint(2 * padding + 1, (count,), generator=generator),
            torch.randint(2 * padding + 1, (count,), generator=generator),
            torch.randint(2, (count,), generator=generator),
        ]
    ).to(x.device, non_blocking=True)
    down, right, mirrored = drawn[:, :, None]
    places = torch.arange(width, device=x.device)
    rows = down + torch.arange(height, device=x.device)
    columns = right + torch.where(mirrored == 1, width - 1 - places, places)
    padded = F.pad(x, (padding,) * 4).permute(0, 2, 3, 1)
    image = torch.arange(count, device=x.device)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Loader(ABC):
    """Batches, of which an epoch can leave out those that an interrupted one has done.

    Attributes
    ----------
    skip
        Batches that the next iteration leaves out at its beginning; their random numbers are drawn.
    """

    skip = 0

    @abstractmethod
    def __len__(self) -> int:
        """Batches of an epoch."""

    @abstractmethod
    def batches(self) -> Iterator[list[Tensor]]:
        """Serve all batches of an epoch."""

    @abstractmethod
    def generators(self) -> list[torch.Generator]:
        """Return the generators that an epoch draws from."""

    def __iter__(self) -> Iterator[list[Tensor]]:
        skip, self.skip = self.skip, 0
        return islice(self.batches(), skip, None)


class ResidentLoader(Loader):
    """Batches of a resident data set, gathered by index.

    Parameters
    ----------
    dataset
        The task's data.
    indices
        (M,) int64, the samples to serve; None for all.
    batch_size
        Samples in a batch; the last one may be smaller.
    generator
        A CPU generator that draws a new order each time the loader is iterated; None keeps the
        order of `indices`.
    drop_last
        Leave out a smaller last batch.
    augment
        What becomes of each batch; with a generator alone.
    """

    def __init__(
        self,
        dataset: ResidentDataset,
        indices: Tensor | None,
        batch_size: int,
        generator: torch.Generator | None = None,
        drop_last: bool = False,
        augment: Augmentation | None = None,
    ) -> None:
        device = dataset.images.device
        self.dataset = dataset
        self.indices = (
            torch.arange(len(dataset), device=device) if indices is None else indices.to(device)
        )
        self.batch_size = batch_size
        self.generator = generator
        self.drop_last = drop_last
        self.augment = augment
        self.labels: Tensor | None = None
        """The task labels of the batch served last."""

    def __len__(self) -> int:
        full, rest = divmod(len(self.indices), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def generators(self) -> list[torch.Generator]:
        """Return its own, if the order is drawn."""
        return [] if self.generator is None else [self.generator]

    def batches(self) -> Iterator[list[Tensor]]:
        """Serve all samples once."""
        order = self.indices
        if self.generator is not None:
            shuffle = torch.randperm(len(order), generator=self.generator)
            order = order[shuffle.to(order.device, non_blocking=True)]
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            # A list, as from Avalanche's collate: strategies write into it.
            batch = list(self.dataset.batch(order[start : start + self.batch_size]))
            self.labels = batch[2]
            if self.augment is not None and self.generator is not None:
                batch[0] = self.augment(batch[0], self.generator)
            yield batch


def plan_epoch(
    sizes: Sequence[int],
    batch_size: int,
    generator: torch.Generator | None,
    per_task: Sequence[int] | None = None,
) -> tuple[list[Tensor], list[list[int]]]:
    """Draw the batches of an epoch over several tasks' data.

    Parameters
    ----------
    sizes
        (T,) samples of each task.
    batch_size
        Samples of a batch drawn from all tasks alike; the last one may be smaller.
    generator
        On the CPU; None keeps the order of the tasks and samples.
    per_task
        (T,) samples of each task in every batch, in place of `batch_size`; the epoch ends where the
        first task hasn't enough left (appendix A of the paper).

    Returns
    -------
    list of Tensor
        For each task the (M_t,) int64 samples that it gives, in the order of the batches.
    list of list of int
        For each batch the (T,) numbers of samples that it takes of each task.

    Raises
    ------
    UserError
        A task has fewer samples than each batch is to take of it.
    """
    if per_task is not None:
        batches = min(size // taken for size, taken in zip(sizes, per_task, strict=True) if taken)
        if batches == 0:
            raise UserError(
                f"per_task = {', '.join(map(str, per_task))}: the tasks have "
                f"{', '.join(map(str, sizes))} training samples, too few for a batch"
            )
        orders = [_order(size, generator) for size in sizes]
        return (
            [order[: batches * taken] for order, taken in zip(orders, per_task, strict=True)],
            [list(per_task)] * batches,
        )
    ends = torch.tensor(sizes).cumsum(0)
    order = _order(int(ends[-1]), generator)
    task = torch.bucketize(order, ends, right=True)
    batch = torch.arange(len(order)) // batch_size
    counts = torch.bincount(batch * len(sizes) + task, minlength=len(sizes) * (int(batch[-1]) + 1))
    starts = ends - torch.tensor(sizes)
    return (
        [order[task == t] - starts[t] for t in range(len(sizes))],
        counts.view(-1, len(sizes)).tolist(),
    )


def _order(size: int, generator: torch.Generator | None) -> Tensor:
    return torch.arange(size) if generator is None else torch.randperm(size, generator=generator)


class JointLoader(Loader):
    """Batches of several resident data sets at once, gathered by index.

    Samples of a batch stand in the order of their tasks. All index tensors go to the device once
    an epoch.

    Parameters
    ----------
    parts
        Each task's data and the (M,) int64 samples of it to serve; None for all.
    batch_size, generator, per_task
        See `plan_epoch`.
    augment
        As of `ResidentLoader`.
    """

    def __init__(
        self,
        parts: Sequence[tuple[ResidentDataset, Tensor | None]],
        batch_size: int,
        generator: torch.Generator | None = None,
        per_task: Sequence[int] | None = None,
        augment: Augmentation | None = None,
    ) -> None:
        self.datasets = [dataset for dataset, _ in parts]
        self.indices = [
            torch.arange(len(dataset)) if chosen is None else chosen.cpu()
            for dataset, chosen in parts
        ]
        self.batch_size = batch_size
        self.generator = generator
        self.per_task = per_task
        self.augment = augment

    def _plan(self, generator: torch.Generator | None) -> tuple[list[Tensor], list[list[int]]]:
        sizes = [len(chosen) for chosen in self.indices]
        return plan_epoch(sizes, self.batch_size, generator, self.per_task)

    def __len__(self) -> int:
        if self.per_task is not None:
            return len(self._plan(None)[1])
        return -(-sum(len(chosen) for chosen in self.indices) // self.batch_size)

    def generators(self) -> list[torch.Generator]:
        """Return its own, if the order is drawn."""
        return [] if self.generator is None else [self.generator]

    def batches(self) -> Iterator[list[Tensor]]:
        """Serve the batches of `plan_epoch`."""
        orders, counts = self._plan(self.generator)
        samples = [
            chosen[order].to(dataset.images.device, non_blocking=True)
            for dataset, chosen, order in zip(self.datasets, self.indices, orders, strict=True)
        ]
        done = [0] * len(samples)
        for taken in counts:
            parts = []
            for task, number in enumerate(taken):
                if number:
                    chosen = samples[task][done[task] : done[task] + number]
                    parts.append(self.datasets[task].batch(chosen))
                    done[task] += number
            batch = [torch.cat(values) for values in zip(*parts, strict=True)]
            if self.augment is not None and self.generator is not None:
                batch[0] = self.augment(batch[0], self.generator)
            yield batch


class ReplayLoader(Loader):
    """Batches of new data, each joined by a batch of a memory; an epoch is one of the new data.

    Parameters
    ----------
    data, memory
        Loaders of (x, y, task labels). The memory begins anew, in a new order, as often as needed.
    """

    def __init__(self, data: ResidentLoader, memory: JointLoader) -> None:
        self.data = data
        self.memory = memory

    def __len__(self) -> int:
        return len(self.data)

    def generators(self) -> list[torch.Generator]:
        """Return those of the new data and of the memory."""
        return [*self.data.generators(), *self.memory.generators()]

    def batches(self) -> Iterator[list[Tensor]]:
        """Serve all new data once."""
        memory: Iterator[list[Tensor]] = iter(())
        for new in self.data:
            old = next(memory, None)
            if old is None:
                memory = iter(self.memory)
                old = next(memory)
            yield [torch.cat(values) for values in zip(new, old, strict=True)]


def resident_parts(
    dataset: AvalancheDataset[Any],
) -> list[tuple[ResidentDataset, Tensor | None]] | None:
    """Find the resident data sets that `dataset` joins, each with the samples that it sees.

    Returns
    -------
    list or None
        As from `resident_view`, one for each task in the order of the join; None if `dataset` is
        anything else than tasks' data one after another.
    """
    node: Any = dataset._flat_data
    if not _plain(dataset) or not isinstance(node, FlatData) or _transforms(node):
        return None
    indices = None if node._indices is None else torch.tensor(list(node._indices))
    parts: list[tuple[ResidentDataset, Tensor | None]] = []
    start = 0
    for child in node._datasets:
        end = start + len(child)
        own = None
        if indices is not None:
            own = indices[(indices >= start) & (indices < end)] - start
        start = end
        part = _descend(child, own)
        if part is None:
            return None
        parts.append(part)
    labels = {part.task for part, _ in parts}
    return parts if dataset.targets_task_labels.uniques == labels else None


def resident_view(
    dataset: AvalancheDataset[Any],
) -> tuple[ResidentDataset, Tensor | None] | None:
    """Find the resident data set and the indices through which `dataset` sees it.

    Returns
    -------
    tuple or None
        The one ResidentDataset under `dataset` and a (M,) int64 CPU tensor of indices (None for
        all samples in order); None if `dataset` is anything else: several data sets joined,
        transformed samples, other task labels, further values in a sample, an own collate
        function.
    """
    if not _plain(dataset):
        return None
    view = _descend(dataset._flat_data, None)
    if view is None or dataset.targets_task_labels.uniques != {view[0].task}:
        return None
    return view


def _descend(node: Any, indices: Tensor | None) -> tuple[ResidentDataset, Tensor | None] | None:
    """Follow a node of Avalanche's trees, seen through indices, down to one resident data set."""
    while isinstance(node, FlatData):
        if len(node._datasets) != 1 or _transforms(node):
            return None
        if node._indices is not None:
            own = torch.tensor(list(node._indices), dtype=torch.int64)
            indices = own if indices is None else own[indices]
        node = node._datasets[0]
    return (node, indices) if isinstance(node, ResidentDataset) else None


def _plain(dataset: AvalancheDataset[Any]) -> bool:
    """Return whether samples are (x, y, task label), collated as usual."""
    if len(dataset) == 0 or dataset.collate_fn is not default_collate:
        return False
    in_sample = [a.name for a in dataset._data_attributes.values() if a.use_in_getitem]
    return in_sample == ["targets_task_labels"]


def _transforms(node: FlatData[Any]) -> bool:
    return any(
        groups[name] is not None
        for kind in ("_transform_groups", "_frozen_transform_groups")
        if (groups := getattr(node, kind, None)) is not None
        # By name: some groups hold nothing but a default for all names.
        for name in {"train", "eval", groups.current_group, *groups.transform_groups}
    )


class ResidentData(Resumable):
    """Strategy mixin that serves resident data by index: `class Fast(ResidentData, Naive)`.

    What a strategy trains or evaluates on is `adapted_dataset`. If that is one ResidentDataset or a
    subset of it, batches are gathered on the device; if a strategy or a plugin changed it
    (transforms, data from elsewhere), Avalanche's stock loader serves it. The data of several
    tasks, one after another, are served by index too, in batches drawn from all alike (Avalanche's
    own are balanced by task).

    Parameters
    ----------
    data_seed
        Seed of the order of the training data. The order of an experience depends on this and the
        experience's index alone, whatever ran before.
    precision
        "fp32", or "bf16": the forward pass runs under autocast to bfloat16 (see
        `benchmarks.precision`) and gives float32 logits; parameters, gradients and the loss stay
        float32.
    per_task
        Samples of each task in a batch, where the data of several tasks are trained at once; None:
        batches of `train_mb_size` drawn from all alike.
    augment
        What becomes of batches in training; resident data alone can be augmented.
    **kwargs
        All else goes to the strategy.

    Raises
    ------
    UserError
        Unknown precision.
    """

    def __init__(
        self,
        *,
        data_seed: int = 0,
        precision: Precision = "fp32",
        per_task: Sequence[int] | None = None,
        augment: Augmentation | None = None,
        **kwargs: Any,
    ) -> None:
        if precision not in get_args(Precision):
            raise UserError(f"precision {precision!r} is unknown: choose one of fp32, bf16")
        self.data_seed = data_seed
        self.precision = precision
        self.per_task = per_task
        self.augment = augment
        super().__init__(**kwargs)

    def make_train_dataloader(
        self, shuffle: bool = True, drop_last: bool = False, **kwargs: Any
    ) -> None:
        """Serve `adapted_dataset` by index where possible, else by the stock loader."""
        view = resident_view(self.adapted_dataset)
        parts = None if view or drop_last else resident_parts(self.adapted_dataset)
        if view is None and parts is None:
            if self.augment is not None:
                raise UserError(
                    "The training data are no longer resident (a plugin or strategy changed them), "
                    "and only resident data can be augmented: leave out --augment."
                )
            super().make_train_dataloader(shuffle=shuffle, drop_last=drop_last, **kwargs)
            return
        generator = self._order_generator() if shuffle else None
        size = self.train_mb_size
        loader: ResidentLoader | JointLoader
        if view is not None:
            loader = ResidentLoader(*view, size, generator, drop_last, self.augment)
        else:
            assert parts is not None
            loader = JointLoader(parts, size, generator, self.per_task, self.augment)
        self.dataloader: Any = loader

    def make_eval_dataloader(self, **kwargs: Any) -> None:
        """Serve `adapted_dataset` in its own order, by index where possible."""
        view = resident_view(self.adapted_dataset)
        if view is None:
            super().make_eval_dataloader(**kwargs)
            return
        self.dataloader = ResidentLoader(*view, self.eval_mb_size)

    def forward(self) -> Any:
        """Compute the model's output for the current batch, float32 at either precision."""
        labels, loader = self.mbatch[-1], self.dataloader
        if (
            getattr(self.model, "takes_one_label", False)
            and isinstance(loader, ResidentLoader)
            and labels is loader.labels
        ):
            # All labels are one: to ask the tensor on a GPU would make the host wait each step.
            self.mbatch[-1] = loader.dataset.task
        try:
            with self.arithmetic():
                output = super().forward()
            return output if self.precision == "fp32" else output.float()
        finally:
            self.mbatch[-1] = labels

    def arithmetic(self) -> AbstractContextManager[None]:
        """Return the context in which networks compute, by `precision`."""
        return nullcontext() if self.precision == "fp32" else bf16(self.device)

    def join_memory(self, memory: AvalancheDataset[Any], batch_size: int) -> bool:
        """Let a batch of a memory join each batch of the running experience, by index.

        Parameters
        ----------
        memory
            Resident samples of one or several tasks.
        batch_size
            Samples of the memory in a batch.

        Returns
        -------
        bool
            Whether that is possible; nothing is changed if it isn't.
        """
        parts = resident_parts(memory)
        if parts is None or not isinstance(self.dataloader, ResidentLoader):
            return False
        generator = self._order_generator(_Purpose.MEMORY)
        self.dataloader = ReplayLoader(
            self.dataloader, JointLoader(parts, batch_size, generator, augment=self.augment)
        )
        return True

    def _order_generator(self, purpose: _Purpose = _Purpose.ORDER) -> torch.Generator:
        # logging(): the index of an experience in train mode is masked.
        index = self.experience.logging().current_experience
        return _generator(self.data_seed, purpose, index)

    def _obtain_common_dataloader_parameters(self, **kwargs: Any) -> dict[str, Any]:
        # The stock loader draws from the global generator unless it is given one.
        parameters = super()._obtain_common_dataloader_parameters(**kwargs)
        return {"generator": self._order_generator(), **parameters}


def permuted(images: Images, tasks: int, seed: int, validation: int) -> CLScenario:
    """Make permuted images: each task sees the same images with its own random order of the pixels.

    All tasks are permuted, the first one too (protocol: ten random permutations). The split into
    training and validation images is drawn once and is the same for each task.

    Parameters
    ----------
    images
        The data set, on the device that trains.
    tasks
        Number T of tasks; task labels and experience indices are 0, ..., T-1.
    seed
        Of the split and the permutations. The permutation of a task depends on it and the task's
        index alone.
    validation
        Number of training images held out; 0 for none (then there is no valid stream).

    Returns
    -------
    CLScenario
        Streams train, valid and test (no test stream if the images were loaded without test data).
        Inputs are (D,) float32 in [0, 1].

    Raises
    ------
    UserError
        Fewer than one task, or a validation part that leaves no training images.
    """
    available = len(images.train_x)
    if tasks < 1:
        raise UserError(f"{tasks} tasks: a scenario needs at least one")
    if not 0 <= validation < available:
        raise UserError(
            f"validation = {validation}, but {images.name} has {available} training images: "
            f"choose from 0 to {available - 1}"
        )
    shuffled = torch.randperm(available, generator=_generator(seed, _Purpose.SPLIT))
    parts = {"train": (images.train_x, images.train_y, shuffled[validation:])}
    if validation:
        parts["valid"] = (images.train_x, images.train_y, shuffled[:validation])
    if images.test_x is not None and images.test_y is not None:
        parts["test"] = (images.test_x, images.test_y, torch.arange(len(images.test_x)))

    device = images.train_x.device
    pixels = images.train_x[0].numel()
    orders = [
        torch.randperm(pixels, generator=_generator(seed, _Purpose.PERMUTATION, task)).to(device)
        for task in range(tasks)
    ]
    streams = {
        name: [
            _task(ResidentDataset(x, y, task, order, images.scale), labels, chosen)
            for task, order in enumerate(orders)
        ]
        for name, (x, y, samples) in parts.items()
        for labels, chosen in [(y.tolist(), sorted(samples.tolist()))]
    }
    return with_classes_timeline(with_task_labels(benchmark_from_datasets(**streams)))


def split(
    images: Images,
    tasks: int,
    seed: int,
    validation: float,
    classes_per_task: int = 10,
    limit: int | None = None,
) -> CLScenario:
    """Make a stream that learns some classes after others, each task's labels counted from 0.

    Parameters
    ----------
    images
        The data set, on the device that trains; task t has the classes from t x classes_per_task
        on.
    tasks
        Number T of tasks; task labels and experience indices are 0, ..., T-1.
    seed
        Of the split into training and validation images.
    validation
        Share of each class's training images that is held out, in [0, 1); 0 for none (then there
        is no valid stream).
    classes_per_task
        Number of classes C of a task; labels are 0, ..., C-1.
    limit
        Training and validation images of a task, of each class alike; None: all.

    Returns
    -------
    CLScenario
        Streams train, valid and test (no test stream if the images were loaded without test data).
        Inputs are (C, H, W) float32 in [0, 1].

    Raises
    ------
    UserError
        More tasks than the classes make, or a validation part that leaves a task no training images
        or has none of its own.
    """
    most = images.classes // classes_per_task
    if not 1 <= tasks <= most:
        raise UserError(
            f"{tasks} tasks of {classes_per_task} classes: {images.name} has {images.classes} "
            f"classes, enough for 1 to {most} tasks"
        )
    if not 0 <= validation < 1:
        raise UserError(f"validation = {validation}: choose a share of at least 0 and below 1")
    kept: dict[str, list[Tensor]] = {"train": [], "valid": []}
    train_y = images.train_y.cpu()
    for task in range(tasks):
        generator = _generator(seed, _Purpose.SPLIT, task)
        held, rest = [], []
        for label in range(task * classes_per_task, (task + 1) * classes_per_task):
            members = (train_y == label).nonzero().flatten()
            members = members[torch.randperm(len(members), generator=generator)]
            members = members[: None if limit is None else limit // classes_per_task]
            count = round(validation * len(members))
            held.append(members[:count])
            rest.append(members[count:])
        kept["train"].append(torch.cat(rest).sort().values)
        kept["valid"].append(torch.cat(held).sort().values)
    for name, part in kept.items():
        empty = [str(task) for task, chosen in enumerate(part) if len(chosen) == 0]
        if empty and (validation > 0 or name == "train"):
            kind = {"train": "training", "valid": "validation"}[name]
            raise UserError(
                f"validation = {validation} leaves no {kind} images of task {', '.join(empty)} "
                f"(counted from 0): it is the share of each class's images that is held out, or 0"
            )
    sources = {"train": (images.train_x, images.train_y), "valid": (images.train_x, images.train_y)}
    if validation == 0:
        del kept["valid"]
    if images.test_x is not None and images.test_y is not None:
        sources["test"] = (images.test_x, images.test_y)
        of_task = images.test_y.cpu() // classes_per_task
        kept["test"] = [(of_task == task).nonzero().flatten() for task in range(tasks)]
    streams = {}
    for name, chosen in kept.items():
        x, y = sources[name]
        y = y % classes_per_task
        labels = y.tolist()
        streams[name] = [
            _task(ResidentDataset(x, y, task, scale=images.scale), labels, indices.tolist())
            for task, indices in enumerate(chosen)
        ]
    return with_classes_timeline(with_task_labels(benchmark_from_datasets(**streams)))


def _task(
    data: ResidentDataset, labels: Sequence[int], indices: list[int]
) -> AvalancheDataset[Any]:
    attributes = [
        DataAttribute(labels, "targets"),
        DataAttribute(
            ConstantSequence(data.task, len(data)), "targets_task_labels", use_in_getitem=True
        ),
    ]
    # Without transform groups of its own, a data set loses transforms added to it later as soon as
    # Avalanche takes a subset, which its task-balanced loader does.
    return TaskAwareSupervisedClassificationDataset(
        [data], indices=indices, data_attributes=attributes, transform_groups=TransformGroups({})
    )
