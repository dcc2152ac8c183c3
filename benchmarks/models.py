"""The networks of the experiments."""

from collections import OrderedDict

import torch
from avalanche.models import MultiTaskModule
from torch import Tensor, nn
from torchvision import models


def mlp(inputs: int, hidden: tuple[int, ...], outputs: int) -> nn.Sequential:
    """Make a multi-layer perceptron: linear layers fc1, fc2, ... and head, with ReLU between.

    Parameters
    ----------
    inputs
        Size D of an input (N, D).
    hidden
        Units of each hidden layer, in forward order; the paper's permuted MNIST: (2000, 2000).
    outputs
        Number of logits.

    Returns
    -------
    nn.Sequential
        Maps (N, inputs) to (N, outputs); modules fc1, relu1, ..., head, drawn from torch's global
        generator.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    width = inputs
    for i, units in enumerate(hidden, start=1):
        layers[f"fc{i}"] = nn.Linear(width, units)
        layers[f"relu{i}"] = nn.ReLU()
        width = units
    layers["head"] = nn.Linear(width, outputs)
    return nn.Sequential(layers)


class MultiHead(MultiTaskModule):
    """A body that all tasks share, and a linear head for each.

    All heads are there from the beginning. A batch of one task, its label given as a number, costs
    no question to the device; Avalanche's own module can't do without, nor with autocast.

    Parameters
    ----------
    body
        Maps a batch to features (N, features).
    features
        Their number.
    tasks
        Number of heads; task labels are 0, ..., tasks-1.
    classes
        Logits of a head.
    """

    takes_one_label = True
    """A batch's label may be given as one number; see `benchmarks.scenarios.ResidentData`."""

    def __init__(self, body: nn.Module, features: int, tasks: int, classes: int) -> None:
        super().__init__()
        self.body = body
        self.heads = nn.ModuleList(nn.Linear(features, classes) for _ in range(tasks))

    def chain(self) -> nn.Sequential:
        """Return the body's layers, then the first task's head as the layer ``head``."""
        assert isinstance(self.body, nn.Sequential)
        layers = OrderedDict(self.body.named_children())
        return nn.Sequential(OrderedDict([*layers.items(), ("head", self.heads[0])]))

    def forward_single_task(self, x: Tensor, task_label: int) -> Tensor:
        """Return the logits (N, classes) of one task's head."""
        logits: Tensor = self.heads[task_label](self.body(x))
        return logits

    def forward(self, x: Tensor, task_labels: Tensor | int | None) -> Tensor | dict[int, Tensor]:
        """Return each sample's logits by its own head; of all learnt tasks if there are no labels.

        Parameters
        ----------
        x
            (N, ...), the batch.
        task_labels
            (N,) labels, or the label of all samples, or None.
        """
        if task_labels is None:
            all_tasks: dict[int, Tensor] = self.forward_all_tasks(x)
            return all_tasks
        if isinstance(task_labels, int):
            return self.forward_single_task(x, task_labels)
        labels = task_labels.unique().tolist()
        if len(labels) == 1:
            return self.forward_single_task(x, labels[0])
        features = self.body(x)
        each = [self.heads[label](features) for label in labels]
        logits = torch.zeros_like(each[0])
        for label, of_task in zip(labels, each, strict=True):
            logits = torch.where((task_labels == label)[:, None], of_task, logits)
        return logits


class PartedHead(MultiTaskModule):
    """A network with one head, of which each task reads an equal part of the last hidden layer.

    What stands in for heads where a network with a single head learns all tasks at once (appendix
    A of the paper).

    Parameters
    ----------
    network
        With a layer named ``head``, whose input is the last hidden layer.
    tasks
        Number of parts; task labels are 0, ..., tasks-1.
    """

    def __init__(self, network: nn.Sequential, tasks: int) -> None:
        super().__init__()
        place = [name for name, _ in network.named_children()].index("head")
        self.body, self.end = network[:place], network[place:]
        head = network[place]
        assert isinstance(head, nn.Linear | nn.Conv2d)
        width = head.weight.shape[1]
        if tasks > width:
            raise ValueError(f"{tasks} tasks can't share a last hidden layer of {width} units")
        part = torch.arange(width) * tasks // width
        self.parts: Tensor
        """(tasks, width), 1 where a task reads."""
        self.register_buffer("parts", (part == torch.arange(tasks)[:, None]).float())

    def forward(self, x: Tensor, task_labels: Tensor | int) -> Tensor:
        """Return each sample's logits by the part of its own task.

        Parameters
        ----------
        x
            (N, ...), the batch.
        task_labels
            (N,) labels, or the label of all samples.
        """
        hidden: Tensor = self.body(x)
        parts = self.parts[task_labels]
        parts = parts.view(*parts.shape, *[1] * (hidden.dim() - 2))
        logits: Tensor = self.end(hidden * parts.to(hidden.dtype))
        return logits


def narrow(pool: int = 2) -> tuple[nn.Sequential, int]:
    """Make the body of the paper's narrow network (Table 2), that of SI's split CIFAR.

    Parameters
    ----------
    pool
        Kernel of the max pooling, whose stride is 2: 2 as in SI's code, or 3 as in the table.

    Returns
    -------
    nn.Sequential
        Maps (N, 3, 32, 32) to (N, 512): conv1 to conv4, of 32, 32, 64 and 64 channels, and fc.
    int
        512.
    """
    padding = pool // 2 if pool == 3 else 0
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    for i, units in enumerate((32, 32, 64, 64), start=1):
        layers[f"conv{i}"] = nn.Conv2d(channels, units, 3, padding=1)
        layers[f"relu{i}"] = nn.ReLU()
        if i % 2 == 0:
            layers[f"pool{i // 2}"] = nn.MaxPool2d(pool, 2, padding)
            layers[f"dropout{i // 2}"] = nn.Dropout(0.25)
        channels = units
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(64 * 8 * 8, 512)
    layers["relu5"] = nn.ReLU()
    layers["dropout3"] = nn.Dropout(0.5)
    return nn.Sequential(layers), 512


def wide(outputs: int = 10, shrink: int = 1) -> nn.Sequential:
    """Make the paper's wide network (Table 3): convolutions, batch norm, average pooling.

    Parameters
    ----------
    outputs
        Number of logits: the channels of the last convolution.
    shrink
        Number by which the channels of the others (128, 256, 512, 1024, 2048) are divided.

    Returns
    -------
    nn.Sequential
        Maps (N, 3, 32, 32) to (N, outputs); modules conv1, norm1, relu1, ..., head, pool, flatten.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    shape = zip((128, 256, 512, 1024, 2048), (1, 2, 1, 2, 1), (1, 0, 0, 1, 0), strict=True)
    for i, (units, stride, padding) in enumerate(shape, start=1):
        layers[f"conv{i}"] = nn.Conv2d(channels, units // shrink, 3, stride, padding)
        layers[f"norm{i}"] = nn.BatchNorm2d(units // shrink)
        layers[f"relu{i}"] = nn.ReLU()
        channels = units // shrink
    layers["head"] = nn.Conv2d(channels, outputs, 3)
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    return nn.Sequential(layers)


def resnet18(outputs: int) -> nn.Module:
    """Make torchvision's ResNet-18 for images of 32x32 pixels.

    As is usual for CIFAR, the stem keeps the resolution: a 3x3 convolution of stride 1 in place of
    the 7x7 one of stride 2, and no max pooling.

    Parameters
    ----------
    outputs
        Number of logits.

    Returns
    -------
    nn.Module
        Maps (N, 3, 32, 32) to (N, outputs); drawn from torch's global generator.
    """
    model: nn.Module = models.resnet18(num_classes=outputs)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    # As torchvision draws its convolutions.
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model
