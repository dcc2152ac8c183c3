"""The networks of the experiments."""

from collections import OrderedDict

from torch import nn


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
