"""The networks of the experiments."""

from collections import OrderedDict

from torch import nn
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
