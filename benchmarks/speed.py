"""What our training costs against a bare loop, as ratios measured side by side in one run.

Absolute times drift on shared machines, so that the two sides of each ratio take turns (epoch by
epoch, step by step) and the median of the pairwise ratios is printed. Memory needs no turns.
"""

from __future__ import annotations

import io
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
import torch.nn.functional as F
from avalanche.benchmarks import CLScenario
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from PIL import Image
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from torch.utils.data import DataLoader
from torchvision.transforms import ToTensor

from benchmarks.cell import Monitor, environment
from benchmarks.data import Images
from benchmarks.errors import UserError
from benchmarks.experiment import Experiment
from benchmarks.learners import Settings, Setup, numbers
from benchmarks.memory import peak_bytes
from benchmarks.methods import METHODS
from benchmarks.models import mlp, narrow, resnet18
from benchmarks.pmnist import PermutedMNIST
from benchmarks.precision import bf16, bf16_kernels
from benchmarks.process import tune
from benchmarks.quickstart import Quickstart
from benchmarks.records import check_writable
from benchmarks.resume import SAVE_EVERY, Saver, save_state
from benchmarks.runner import Places, git_state, plan, run_grid
from benchmarks.scenarios import ResidentLoader, resident_view
from benchmarks.split_cifar import SplitCIFAR, SplitCIFARWideReduced
from benchmarks.tracking import Tracker, View
from clnp import LogitDrift
from clnp.compact import compact, report
from clnp.network import PartitionedNetwork
from clnp.sparsity import L1
from clnp.units import find_layout

ALPHA = 1e-5
"""L1 of each layer; its size doesn't change the work."""
WARM_UP = 1
"""Epochs or rounds that are measured but don't count."""


COUNT = 12_000
"""Training images, a fifth of MNIST's: short epochs, so that many rounds fit into the time."""
VALIDATION = 2_000
"""Of them held out: the same share as in the paper's 10,000 of 60,000."""


def made_images(count: int = COUNT) -> Images:
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
    device = next(model.parameters()).device

    def epoch() -> float:
        began = time.perf_counter()
        for x, y, _ in loader:
            optimizer.zero_grad()
            with bf16(device) if precision == "bf16" else nullcontext():
                logits = model(x)
            F.cross_entropy(logits.float(), y).backward()
            optimizer.step()
        _wait(device)
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
        tracker = Tracker("epoch", Path(folder), "disabled", shown.announce)
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


class StepTurns(SupervisedPlugin):
    """Between two steps of a strategy take a bare one, and keep the seconds of both.

    A strategy's step is all from one batch to the next: the loader, every hook, the update.
    """

    def __init__(self, bare: Callable[[], float]) -> None:
        super().__init__()
        self.bare = bare
        self.rounds: list[tuple[float, float]] = []
        self._began = 0.0

    def before_training_exp(self, _strategy: Any, **_: Any) -> None:
        """Leave out the steps of an earlier task."""
        self.rounds = []

    def before_training_epoch(self, strategy: Any, **_: Any) -> None:
        """Leave out what comes before an epoch's first batch."""
        _wait(strategy.device)
        self._began = time.perf_counter()

    def after_training_iteration(self, strategy: Any, **_: Any) -> None:
        """Close the strategy's step, after the other plugins; take a bare one."""
        _wait(strategy.device)
        ours = time.perf_counter() - self._began
        self.rounds.append((ours, self.bare()))
        self._began = time.perf_counter()

    def ratio(self) -> float:
        """Return the median of strategy / bare over the last task."""
        return statistics.median([ours / bare for ours, bare in self.rounds[WARM_UP:]])


def made_photographs(count: int) -> Images:
    """Images of CIFAR-10's shape, in channels-last memory as `benchmarks.data` gives them.

    Parameters
    ----------
    count
        Number of training images.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (count, 32, 32, 3)
    x = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).permute(0, 3, 1, 2)
    y = torch.arange(count) % 10
    return Images("made", x, y, x[:100], y[:100], fingerprint="", classes=10)


def plain_throughput(images: Images, batch_size: int, device: torch.device) -> Callable[[], float]:
    """Build the loop that one writes first, on the narrow network; calling it runs one epoch.

    Each image through PIL and torchvision's ToTensor, float32, an Adam that isn't fused.

    Returns
    -------
    callable
        Gives the seconds that the epoch took.
    """
    pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images.train_x.cpu()]
    labels, transform = images.train_y.tolist(), ToTensor()
    samples: Any = [*zip(pictures, labels, strict=True)]

    def collate(batch: list[tuple[Image.Image, int]]) -> tuple[Tensor, Tensor]:
        return torch.stack([transform(x) for x, _ in batch]), torch.tensor([y for _, y in batch])

    loader = DataLoader(samples, batch_size, shuffle=True, collate_fn=collate)
    body, features = narrow()
    model = nn.Sequential(body, nn.Linear(features, 10)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001, foreach=False, fused=False)

    def epoch() -> float:
        began = time.perf_counter()
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x.to(device)), y.to(device)).backward()
            optimizer.step()
        _wait(device)
        return time.perf_counter() - began

    return epoch


def throughput(images: Images, device: torch.device) -> float:
    """Return how many times more images a second the narrow network's cell trains than plainly."""
    experiment = SplitCIFAR(tasks=1, epochs=4, method_epochs=False)
    scenario = experiment.scenario(images, seed=0)
    plain = plain_throughput(images, experiment.batch_size, device)
    turns = TakeTurns(plain)
    evaluator = EvaluationPlugin(loggers=[])
    setup = Setup(experiment, scenario, 0, device, evaluator, [Monitor(lambda event: None), turns])
    learner = METHODS["finetune"].build(setup, _finetune(experiment))
    learner.train(scenario.streams["train"][0])
    trained = len(scenario.streams["train"][0].dataset)
    # As many seconds an image: the plain loop has the validation images too.
    return trained / len(images.train_x) / turns.ratios()[0]


def _finetune(experiment: Experiment) -> Settings:
    """Return finetune's settings without the choice of an epoch: what is measured is training."""
    settings: Settings = METHODS["finetune"].settings_for(experiment)
    return replace(settings, early_stopping=False)


def profile(images: Images, device: torch.device, rows: int = 10) -> list[tuple[str, float]]:
    """Tell where the time of the narrow network's training goes.

    Returns
    -------
    list of (str, float)
        The operations that take most time by themselves, and the share of all that each takes.
    """
    experiment = SplitCIFAR(tasks=1, epochs=1, method_epochs=False)
    scenario = experiment.scenario(images, seed=0)
    setup = Setup(experiment, scenario, 0, device, EvaluationPlugin(loggers=[]))
    learner = METHODS["finetune"].build(setup, _finetune(experiment))
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiled:
        learner.train(scenario.streams["train"][0])
    attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    times = {event.key: float(getattr(event, attribute)) for event in profiled.key_averages()}
    total = sum(times.values())
    most = sorted(times.items(), key=lambda item: -item[1])[:rows]
    return [(name, seconds / total) for name, seconds in most]


def wide_step_ratio(images: Images, device: torch.device) -> float:
    """Measure CLNP's training step on an eighth of the wide network against a bare one."""
    experiment = SplitCIFARWideReduced(
        tasks=1, epochs=1, method_epochs=False, batch_size=64, images=None
    )
    scenario = experiment.scenario(images, seed=0)
    x, y, _ = next(iter(_loader(scenario, experiment)))
    torch.manual_seed(0)
    turns = StepTurns(plain_step(experiment.model().to(device), x, y))
    setup = Setup(experiment, scenario, 0, device, EvaluationPlugin(loggers=[]), [turns])
    learner = METHODS["clnp_m2"].build(setup, METHODS["clnp_m2"].settings_for(experiment))
    learner.train(scenario.streams["train"][0])
    return turns.ratio()


def step_ratios(names: Sequence[str], images: Images, device: torch.device) -> dict[str, float]:
    """Measure a training step of methods against finetune's.

    Both are measured against the same bare step, each taking turns with it. The step is one of the
    second task, when penalties have something to hold; CLNP's of the first, when nothing is frozen
    yet and its steps cost most.

    Returns
    -------
    dict of str to float
        By the method's name.
    """
    against_bare = {}
    for name in ("finetune", *names):
        experiment = PermutedMNIST(
            tasks=2,
            epochs=3,  # medians of one epoch, 39 steps, vary by 0.05
            method_epochs=False,
            validation=VALIDATION,
            settings=("ewc.samples=256",),
        )
        scenario = experiment.scenario(images, seed=0)
        x, y, _ = next(iter(_loader(scenario, experiment)))
        torch.manual_seed(0)
        turns = StepTurns(plain_step(experiment.model().to(device), x, y))
        evaluator = EvaluationPlugin(loggers=[])
        setup = Setup(experiment, scenario, 0, device, evaluator, [turns])
        settings = replace(METHODS[name].settings_for(experiment), batch_size=None)
        learner = METHODS[name].build(setup, settings)
        for task in range(1 if name == "clnp" else 2):
            learner.train(scenario.streams["train"][task])
        against_bare[name] = turns.ratio()
    return {name: against_bare[name] / against_bare["finetune"] for name in names}


def _loader(scenario: CLScenario, experiment: Experiment) -> ResidentLoader:
    view = resident_view(scenario.streams["train"][0].dataset)
    assert view is not None
    return ResidentLoader(*view, experiment.batch_size)


def plain_step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], float]:
    """Build a plain training step in bf16 with fused Adam; calling it gives its seconds."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002, fused=True)
    return _step(lambda: model(x), y, optimizer, lambda: None)


def step_of(
    network: PartitionedNetwork, alphas: dict[str, float], x: Tensor, y: Tensor
) -> Callable[[], float]:
    """Begin a task and build its training step in bf16 with fused Adam and L1."""
    leaves = [leaf for leaf in network.begin_task(network.layout).values() if leaf is not None]
    optimizer = torch.optim.Adam(leaves, lr=0.002, fused=True)
    penalty = L1(network.leaves(), alphas)

    def forward() -> Tensor:
        with network.view(network.training_view):
            logits: Tensor = network.model(x)
        return logits

    return _step(forward, y, optimizer, penalty.add_to_gradients)


def _step(
    forward: Callable[[], Tensor],
    y: Tensor,
    optimizer: torch.optim.Optimizer,
    before_update: Callable[[], None],
) -> Callable[[], float]:
    def step() -> float:
        began = time.perf_counter()
        optimizer.zero_grad()
        with bf16(y.device):
            logits = forward()
        F.cross_entropy(logits.float(), y).backward()
        before_update()
        optimizer.step()
        _wait(y.device)
        return time.perf_counter() - began

    return step


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def median_ratio(one: Callable[[], float], other: Callable[[], float], rounds: int) -> float:
    """Let two measurements take turns and return the median of their ratios.

    The first rounds, a tenth of them, don't count.
    """
    pairs = [(one(), other()) for _ in range(rounds)]
    return statistics.median([first / second for first, second in pairs[-(-rounds // 10) :]])


def partitioned(model: nn.Module, x: Tensor, frozen: bool) -> PartitionedNetwork:
    """Divide a network in which nothing is learnt yet, or half of each group of units."""
    layout = find_layout(model, lambda m, batch: m(batch), x)
    network = PartitionedNetwork(model, layout, single_head=True)
    if frozen:
        network.learn({group.name: group.width // 2 for group in layout.groups})
    return network


def frozen_ratio(make: Callable[[], nn.Module], x: Tensor, y: Tensor, rounds: int) -> float:
    """Measure a training step with half of each group frozen against that on the empty network.

    Parameters
    ----------
    make
        Builds the network.
    x, y
        The batch.
    rounds
        Pairs of steps to measure.
    """
    half, empty = (
        step_of(network, dict.fromkeys(network.layout.weights, ALPHA), x, y)
        for network in (partitioned(make().to(x.device), x[:8], frozen) for frozen in (True, False))
    )
    return median_ratio(half, empty, rounds)


def scoring_ratio(
    make: Callable[[], nn.Module], used: dict[str, int], x: Tensor, rounds: int = 60
) -> float:
    """Measure how many times faster a task's sub-network scores a batch than the whole network.

    Parameters
    ----------
    make
        Builds the network.
    used
        The units that the task uses, by group.
    x
        The batch.
    rounds
        Pairs of forward passes to measure.
    """
    model = make().to(x.device).eval()
    network = partitioned(model, x[:8], frozen=False)
    network.learn(used)
    task = network.subnetwork(0, lambda m, batch: m(batch))

    def timed(module: nn.Module) -> Callable[[], float]:
        def score() -> float:
            began = time.perf_counter()
            with torch.no_grad(), bf16(x.device):
                module(x)
            _wait(x.device)
            return time.perf_counter() - began

        return score

    return median_ratio(timed(model), timed(task), rounds)


def compact_ratios(
    make: Callable[[], nn.Module], used: dict[str, int], x: Tensor
) -> tuple[float, float]:
    """Compare a task's network on its own (`CLNPPlugin.compact`) with the whole one.

    Parameters
    ----------
    make
        Builds the network.
    used
        The units that the task uses, by group.
    x
        The batch.

    Returns
    -------
    tuple of float
        Parameters, and how many times faster it scores the batch in float32.
    """
    model = make().to(x.device)
    network = partitioned(model, x[:8], frozen=False)
    network.learn(used)
    alone = compact(network, 0, lambda m, batch: m(batch), x[:8])
    table = report(alone, model, x)
    return float(table.parameters["ratio"]), 1 / float(table.seconds["ratio"])


def memory_ratio(make: Callable[[], nn.Module], x: Tensor, y: Tensor, frozen: bool) -> float:
    """Compare the peak of memory in training a task with that in plain training of the network.

    Parameters
    ----------
    make
        Builds the network.
    x, y
        The batch.
    frozen
        Whether half of each group of units is frozen.
    """

    def plain() -> None:
        step = plain_step(make().to(x.device), x, y)
        for _ in range(2):  # the first one makes the optimizer's state
            step()

    def ours() -> None:
        network = partitioned(make().to(x.device), x[:8], frozen)
        step = step_of(network, dict.fromkeys(network.layout.weights, ALPHA), x, y)
        for _ in range(2):
            step()

    return peak_bytes(ours, x.device) / peak_bytes(plain, x.device)


def saving_ratios(
    method: str, experiment: Experiment, images: Images, device: torch.device
) -> tuple[float, float]:
    """Compare a saved training with what it must hold, and its saving with five minutes of it.

    Parameters
    ----------
    method
        Name of the method.
    experiment
        With one task.
    images
        Its data.
    device
        Where to train.

    Returns
    -------
    tuple of float
        Bytes of the file per byte of parameters, of the optimizer's state and of the method's own
        tensors; seconds of saving per second of training, once in `SAVE_EVERY`.
    """
    sizes: list[float] = []
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "training.pt"

        def write(state: dict[str, Any]) -> None:
            began = time.perf_counter()
            save_state(file, state)
            seconds.append(time.perf_counter() - began)
            training = state["training"]
            held = [numbers(training[part]) for part in ("model", "optimizer", "plugins")]
            sizes.append(file.stat().st_size / (4 * sum(held)))

        saver = Saver(write, every=0.0)
        scenario = experiment.scenario(images, seed=0)
        evaluator = EvaluationPlugin(accuracy_metrics(experience=True), loggers=[])
        setup = Setup(experiment, scenario, 0, device, evaluator, saver=saver)
        settings = replace(METHODS[method].settings["pmnist"], epochs=None)
        learner = METHODS[method].build(setup, settings)
        learner.strategy.train(scenario.streams["train"][0], eval_streams=[])
    return max(sizes), statistics.median(seconds) / SAVE_EVERY


def workers_ratio(cells: int = 8) -> float | None:
    """Compare the time that two workers take for some tiny cells with that of one.

    Each worker has imported what it needs before, and has one core.

    Returns
    -------
    float or None
        None without Ray.
    """
    try:
        import ray
    except ImportError:
        return None
    from benchmarks.cluster import Parallel, connected

    took = {}
    cpu = torch.device("cpu")
    experiment = Quickstart(tasks=2)
    with tempfile.TemporaryDirectory() as folder, connected(Parallel()):
        for workers, seeds in ((2, 2), (1, cells), (2, cells)):  # the first warms up
            place = Path(folder) / f"{workers}-{seeds}"
            places = Places(place / "records", place / "runs")
            grid = plan(experiment, ["finetune"], range(seeds))
            began = time.perf_counter()
            with redirect_stdout(io.StringIO()):
                code = run_grid(
                    grid, places, cpu, "disabled", parallel=Parallel(workers, device="cpu")
                )
            if code:
                raise RuntimeError(f"{workers} workers ended with {code}")
            took[workers] = time.perf_counter() - began
    assert not ray.is_initialized()
    return took[2] / took[1]


@dataclass(frozen=True)
class Row:
    """A measured ratio and its bound, if it has one."""

    name: str
    ratio: float
    bound: float | None = None
    kind: Literal["at most", "below", "at least"] = "at most"

    @property
    def kept(self) -> bool | None:
        """Whether the bound is kept; None without one."""
        if self.bound is None:
            return None
        return {
            "at most": self.ratio <= self.bound,
            "below": self.ratio < self.bound,
            "at least": self.ratio >= self.bound,
        }[self.kind]

    def __str__(self) -> str:
        """Write the ratio beside its bound, and whether it is kept."""
        limit = ""
        if self.bound is not None:
            verdict = "ok" if self.kept else "BELOW" if self.kind == "at least" else "ABOVE"
            limit = f"   ({self.kind} {self.bound:.2f}: {verdict})"
        return f"{self.name:56s} {self.ratio:6.2f}{limit}"


def main(save: Path | None = None) -> list[Row]:
    """Print each ratio beside its bound, and write it to a CSV file if one is named.

    Returns
    -------
    list of Row
        Those whose bound is missed.
    """
    warnings.filterwarnings("ignore", message="No loggers specified")  # as in a cell
    tune()  # first of all, as in a cell: threads that torch starts later inherit it
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(
        f"{device.type}, {torch.get_num_threads()} threads; medians of ratios measured in turns; "
        f"bf16 ({bf16_kernels(device)}), batch 256 (ResNet-18: 64; scoring: 1000)"
    )
    if save is not None:
        if save.is_dir():
            raise UserError(f"{save} is a folder: --save takes the name of a file.")
        check_writable(save.parent)
    about, rows = _measured_on(device), []
    for row in measured(device):
        print(row, flush=True)
        rows.append(row)
        if save is not None:  # after each: the whole takes minutes
            write(rows, save, about)
    missed = [row for row in rows if row.kept is False]
    bounds = sum(row.bound is not None for row in rows)
    print(f"{bounds - len(missed)} of {bounds} bounds are kept.")
    return missed


def _measured_on(device: torch.device) -> str:
    found, git = environment(device), git_state()
    names = ("hardware", "device", "threads", "bf16", "torch")
    about = ", ".join(f"{name} {found[name]}" for name in names)
    return f"{about}; commit {git['commit']}{' and uncommitted changes' if git['dirty'] else ''}"


def write(rows: Sequence[Row], path: Path, about: str) -> None:
    """Write ratios and bounds as CSV, under a comment that says what they were measured on."""
    frame = pd.DataFrame(
        [(row.name.strip(), row.ratio, row.bound, row.kind, row.kept) for row in rows],
        columns=["what", "ratio", "bound", "kind", "kept"],
    )
    frame.loc[frame["bound"].isna(), "kind"] = None
    text = frame.to_csv(index=False, float_format="%.4g", lineterminator="\n")
    path.write_text(f"# nox -s speed, {date.today()}: {about}\n{text}", encoding="utf-8")


def measured(device: torch.device) -> Iterator[Row]:
    """Measure the ratios one after the other."""
    images = made_images()
    images = replace(images, train_x=images.train_x.to(device), train_y=images.train_y.to(device))
    wide = PermutedMNIST(tasks=1, epochs=10, method_epochs=False, validation=VALIDATION)
    wide_plain, wide_tuned = epoch_ratios(wide, images, device)
    yield Row("epoch, 784-2000-2000-10, CLNP's cell / bare loop", wide_tuned, 1.10)
    yield Row("  the bare loop without the cell's process settings", wide_plain)
    slim = replace(wide, epochs=20, hidden=(8, 8))
    narrow_plain, narrow_tuned = epoch_ratios(slim, images, device)
    yield Row("epoch, 784-8-8-10, CLNP's cell / bare loop", narrow_tuned, 2.5)
    yield Row("  the bare loop without the cell's process settings", narrow_plain)

    bounds = {"clnp": 1.1, "ewc": 1.4, "si": 1.5, "superposition": 1.3}
    for name, ratio in step_ratios(tuple(bounds), images, device).items():
        yield Row(f"step, 784-2000-2000-10, {name} / finetune", ratio, bounds[name])

    short = replace(wide, epochs=1)
    for name in ("finetune", "clnp", "si"):
        size, ratio = saving_ratios(name, short, images, device)
        yield Row(f"saved training, {name}: bytes / bytes that it must hold", size, 1.05)
        yield Row("  seconds of saving / seconds between two savings", ratio, 0.02)
    if (shared := workers_ratio()) is not None:
        yield Row("eight cells, two workers / one", shared, 0.65)

    pictures = made_photographs(2048)
    pictures = replace(
        pictures, train_x=pictures.train_x.to(device), train_y=pictures.train_y.to(device)
    )
    ratio = throughput(pictures, device)
    yield Row("images a second, narrow network, cell / plain fp32 loop", ratio, 2.3, "at least")
    for operation, share in profile(pictures, device):
        yield Row(f"  share of its time: {operation}", share)
    ratio = wide_step_ratio(pictures, device)
    yield Row("step, an eighth of the wide network, CLNP / bare", ratio, 1.1)

    def network() -> nn.Module:
        return mlp(784, (2000, 2000), 10)

    x, y = torch.rand(256, 784, device=device), torch.arange(256, device=device) % 10
    ratio = frozen_ratio(network, x, y, rounds=45)
    yield Row("step, half of each layer frozen / empty network", ratio, 0.7)
    batch, labels = torch.rand(64, 3, 32, 32, device=device), y[:64]
    ratio = frozen_ratio(lambda: resnet18(10), batch, labels, rounds=11)
    yield Row("step, ResNet-18, half of each group frozen / empty", ratio, 0.75)
    used = {"fc1": 300, "fc2": 120}  # 15 % and 6 %
    ratio = scoring_ratio(network, used, torch.rand(1000, 784, device=device))
    yield Row("scoring, whole network / task of 15 % and 6 %", ratio, 5.0, "at least")
    size, ratio = compact_ratios(network, used, torch.rand(1000, 784, device=device))
    yield Row("parameters, that task's compact network / whole network", size)
    yield Row("scoring, whole network / that task's compact network", ratio)
    ratio = memory_ratio(network, x, y, frozen=False)
    yield Row("peak memory in training, empty network / plain training", ratio, 1.1)
    ratio = memory_ratio(network, x, y, frozen=True)
    yield Row("peak memory in training, half frozen / plain training", ratio, 1.0, "below")
