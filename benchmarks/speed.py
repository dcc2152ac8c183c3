"""What our training costs against a bare loop, as ratios measured side by side in one run.

Absolute times drift on shared machines, so that the two sides of each ratio take turns (epoch by
epoch, step by step) and the median of the pairwise ratios is printed.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from torch import Tensor, nn

from benchmarks.cell import Monitor
from benchmarks.data import Images
from benchmarks.experiment import Experiment
from benchmarks.methods import METHODS, CLNPSettings, Setup
from benchmarks.models import mlp
from benchmarks.pmnist import PermutedMNIST
from benchmarks.process import tune
from benchmarks.scenarios import ResidentLoader, resident_view
from benchmarks.tracking import Tracker, View
from clnp import LogitDrift
from clnp.network import PartitionedNetwork
from clnp.sparsity import L1
from clnp.units import find_layout

WARM_UP = 1
"""Epochs or rounds that are measured but don't count."""


def made_images(count: int = 60_000) -> Images:
    """Images of MNIST's shape, most of whose labels can be learnt; no data set is needed.

    A tenth of the labels is random: where the loss vanishes, gradients become denormal numbers,
    with which a CPU is many times slower.

    Parameters
    ----------
    count
        Number of training images.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 10
    patterns = torch.randint(0, 200, (10, 28, 28), generator=generator, dtype=torch.uint8)
    noise = torch.randint(0, 56, (count, 28, 28), generator=generator, dtype=torch.uint8)
    images = patterns[labels] + noise
    random = torch.rand(count, generator=generator) < 0.1
    labels = torch.where(random, torch.randint(0, 10, (count,), generator=generator), labels)
    return Images(
        name="made",
        train_x=images,
        train_y=labels,
        test_x=images[:1000],
        test_y=labels[:1000],
        fingerprint="",
        classes=10,
    )


def bare_epoch(model: nn.Module, loader: ResidentLoader, precision: str) -> Callable[[], float]:
    """Build a plain training loop over the same resident tensor; calling it runs one epoch.

    Returns
    -------
    callable
        Gives the seconds that the epoch took.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002, fused=True)
    device = next(model.parameters()).device.type

    def epoch() -> float:
        began = time.perf_counter()
        for x, y, _ in loader:
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                logits = model(x)
            F.cross_entropy(logits.float(), y).backward()
            optimizer.step()
        return time.perf_counter() - began

    return epoch


class TakeTurns(SupervisedPlugin):
    """Between two epochs of a strategy run bare ones, and keep the seconds of all.

    The bare loop runs twice: with the settings of our cells (see `benchmarks.process`), which is
    like for like and what the bounds are for; and without, to show what the settings bring.
    (Without them torch's other threads go on flushing denormals, which favours the bare loop.)
    """

    def __init__(self, bare: Callable[[], float]) -> None:
        super().__init__()
        self.bare = bare
        self.rounds: list[tuple[float, float, float]] = []
        self._began = 0.0

    def before_training_epoch(self, _strategy: Any, **_: Any) -> None:
        """Close the strategy's epoch, with all that plugins did after it; run bare ones."""
        ended = time.perf_counter()
        tune(False)
        plain = self.bare()
        tune()
        tuned = self.bare()
        if self._began:
            self.rounds.append((ended - self._began, plain, tuned))
        self._began = time.perf_counter()

    def ratios(self) -> tuple[float, float]:
        """Return the medians of strategy / bare and of strategy / bare with our settings."""
        counted = self.rounds[WARM_UP:]
        return (
            statistics.median([ours / plain for ours, plain, _ in counted]),
            statistics.median([ours / tuned for ours, _, tuned in counted]),
        )


def epoch_ratios(
    experiment: Experiment, images: Images, device: torch.device
) -> tuple[float, float]:
    """Measure an epoch through strategy, plugin, metrics and logging against a bare loop's.

    The strategy's epoch includes CLNP's L1, its pass over the validation data, the progress view
    and the log; the bare loop has none of these.

    Returns
    -------
    tuple of float
        See `TakeTurns.ratios`.
    """
    scenario = experiment.scenario(images, seed=0)
    view = resident_view(scenario.streams["train"][0].dataset)
    assert view is not None
    torch.manual_seed(0)
    model = experiment.model().to(device)
    loader = ResidentLoader(*view, experiment.batch_size, torch.Generator())
    turns = TakeTurns(bare_epoch(model, loader, experiment.precision))
    with tempfile.TemporaryDirectory() as folder, View(1) as shown:
        tracker = Tracker(Path(folder), "disabled", shown)
        evaluator = EvaluationPlugin(accuracy_metrics(experience=True), LogitDrift(), loggers=[])
        # Monitor announces an epoch only after the plugins have done their part of it.
        monitor = Monitor(tracker.announce)
        setup = Setup(experiment, scenario, 0, device, evaluator, [monitor, turns])
        settings = replace(METHODS["clnp"].settings["pmnist"], epochs=None)
        learner = METHODS["clnp"].build(setup, settings)
        monitor.learner = learner
        learner.strategy.train(scenario.streams["train"][0], eval_streams=[])
        tracker.close(False)
    return turns.ratios()


def step_of(
    network: PartitionedNetwork, alphas: dict[str, float], x: Tensor, y: Tensor
) -> Callable[[], float]:
    """Begin a task and build its training step in bf16 with fused Adam and L1."""
    leaves = [leaf for leaf in network.begin_task(network.layout).values() if leaf is not None]
    optimizer = torch.optim.Adam(leaves, lr=0.002, fused=True)
    penalty = L1(network.leaves(), alphas)

    def step() -> float:
        began = time.perf_counter()
        optimizer.zero_grad()
        with (
            network.view(network.training_view),
            torch.autocast(x.device.type, torch.bfloat16),
        ):
            logits = network.model(x)
        F.cross_entropy(logits.float(), y).backward()
        penalty.add_to_gradients()
        optimizer.step()
        if x.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return step


def frozen_ratio(device: torch.device, hidden: tuple[int, int] = (2000, 2000)) -> float:
    """Measure a training step with half of each layer frozen against that on the empty network."""
    settings: CLNPSettings = METHODS["clnp"].settings["pmnist"]
    x, y = torch.rand(256, 784, device=device), torch.arange(256, device=device) % 10
    steps = []
    for frozen in (True, False):
        torch.manual_seed(0)
        model = mlp(784, hidden, 10).to(device)
        layout = find_layout(model, lambda m, batch: m(batch), x[:8])
        network = PartitionedNetwork(model, layout, single_head=True)
        if frozen:
            network.learn({group.name: group.width // 2 for group in layout.groups})
        alphas = dict(zip(layout.weights, settings.l1, strict=True))
        steps.append(step_of(network, alphas, x, y))
    half, empty = steps
    pairs = [(half(), empty()) for _ in range(45)]
    return statistics.median([ours / other for ours, other in pairs[5:]])


def main() -> None:
    """Print each ratio beside its bound."""
    warnings.filterwarnings("ignore", message="No loggers specified")  # as in a cell
    tune()  # first of all, as in a cell: threads that torch starts later inherit it
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = made_images()
    images = replace(images, train_x=images.train_x.to(device), train_y=images.train_y.to(device))
    threads = torch.get_num_threads()
    print(f"{device.type}, {threads} threads; median of ratios measured in turns; bf16, batch 256")
    wide = PermutedMNIST(tasks=1, epochs=6, method_epochs=False)
    narrow = PermutedMNIST(tasks=1, epochs=12, method_epochs=False, hidden=(8, 8))
    wide_plain, wide_tuned = epoch_ratios(wide, images, device)
    narrow_plain, narrow_tuned = epoch_ratios(narrow, images, device)
    rows = (
        ("epoch, 784-2000-2000-10, CLNP's cell / bare loop", wide_tuned, 1.10),
        ("  the bare loop without the cell's process settings", wide_plain, None),
        ("epoch, 784-8-8-10, CLNP's cell / bare loop", narrow_tuned, 2.5),
        ("  the bare loop without the cell's process settings", narrow_plain, None),
        ("step, half of each layer frozen / empty network", frozen_ratio(device), 0.7),
    )
    for name, ratio, bound in rows:
        limit = ""
        if bound is not None:
            limit = f"   (at most {bound:.2f}: {'ok' if ratio <= bound else 'ABOVE'})"
        print(f"{name:52s} {ratio:5.2f}{limit}")
