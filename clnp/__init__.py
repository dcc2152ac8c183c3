"""Continual Learning via Neural Pruning (arXiv 1903.04476) for Avalanche.

Learn task after task in one network of fixed size with exactly zero forgetting:

>>> from clnp import CLNPPlugin
>>> strategy = Naive(model=model, optimizer=optimizer, plugins=[CLNPPlugin(margin=0.001)])
"""

from clnp.errors import CapacityExhausted, CLNPError, Incompatible, UnsupportedNetwork
from clnp.finetune import FineTune
from clnp.metrics import LogitDrift
from clnp.plugin import CLNPPlugin
from clnp.search import search
from clnp.strategy import CLNP

__all__ = [
    "CLNP",
    "CLNPError",
    "CLNPPlugin",
    "CapacityExhausted",
    "FineTune",
    "Incompatible",
    "LogitDrift",
    "UnsupportedNetwork",
    "search",
]

__version__ = "0.1.0"
