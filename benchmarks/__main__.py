"""The command line, ``python -m benchmarks run|tune|report|prepare|status|...``: a dispatcher.

What is heavy is imported only by the command that needs it, so that --help answers at once.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from benchmarks.errors import UserError
from benchmarks.experiment import Experiment

if TYPE_CHECKING:
    import torch

    from benchmarks.cluster import Parallel


@dataclass(frozen=True)
class Work:
    """Where and how cells are trained."""

    device: str = "auto"
    """Where to train: cpu, cuda, cuda:1, ...; auto: the GPU if there is one."""
    workers: int | None = None
    """Cells at once, on Ray; by default one after another in this process."""
    ray_address: str | None = None
    """A running Ray cluster to run on, such as auto or 10.0.0.1:6379."""
    gpus_per_cell: float | None = None
    """Share of a GPU that a cell takes on Ray, such as 0.25. (default: 1)"""
    save_every: Annotated[float, tyro.conf.arg(metavar="MINUTES")] = 5.0
    """Minutes of training after which the state within a task is saved; after each task it is."""
    data_dir: Path | None = None
    """Folder of the data sets. (default: the variable CLNP_DATA, else ./data)"""
    runs_dir: Path = Path("runs")
    """Folder of logs, W&B files and the state of unfinished cells."""

    @property
    def on_ray(self) -> bool:
        """Whether cells run on Ray.

        Raises
        ------
        UserError
            For a share of a GPU without it.
        """
        if self.workers is None and self.ray_address is None:
            if self.gpus_per_cell is not None:
                raise UserError("--gpus-per-cell needs --workers or --ray-address.")
            return False
        return True

    @property
    def own_device(self) -> torch.device:
        """Where this process has its data: on Ray, cells have their own."""
        from benchmarks.runner import pick_device

        return pick_device("cpu" if self.on_ray else self.device)

    @property
    def seconds(self) -> float:
        """Of training, after which a state is saved.

        Raises
        ------
        UserError
            If they are none.
        """
        if not self.save_every > 0:
            raise UserError(f"--save-every {self.save_every:g}: give minutes above 0.")
        return 60 * self.save_every

    def parallel(self) -> Parallel | None:
        """Return how cells run at once, if they do."""
        if not self.on_ray:
            return None
        from benchmarks.cluster import Parallel

        data = None if self.data_dir is None else self.data_dir.resolve()
        return Parallel(self.workers, self.ray_address, self.gpus_per_cell, self.device, data)


Working = Annotated[Work, tyro.conf.arg(name="")]
"""Its options stand beside the command's own, without a prefix."""


@dataclass(frozen=True)
class Run:
    """Train and evaluate the cells of an experiment that have no record yet, then report.

    --tasks, --epochs, --precision, --validation, --augment, --pool and --set turn the experiment
    into another one, with a name of its own (pmnist-custom-1a2b), whose records never fill the
    tables of the first.
    """

    experiment: tyro.conf.Positional[str]
    """Name of the experiment: pmnist, split_cifar, split_cifar_wide, either with _reduced, or
    quickstart."""
    methods: tuple[str, ...] = ()
    """Names of the methods, such as clnp finetune single_task. (default: the experiment's own)"""
    seeds: tuple[int, ...] = ()
    """The seeds, such as 0 3. (default: the experiment's own)"""
    n_seeds: int | None = None
    """Number of seeds: 5 means 0 1 2 3 4."""
    tasks: int | None = None
    """Number of tasks."""
    epochs: int | None = None
    """Epochs a task, for all methods."""
    precision: Literal["fp32", "bf16"] | None = None
    """Precision of forward passes; bf16 is autocast to bfloat16."""
    validation: float | None = None
    """Held-out training data: images of permuted MNIST, the share of each class of split CIFAR."""
    augment: bool = False
    """Shift and mirror training images at random (split CIFAR)."""
    pool: Literal[2, 3] | None = None
    """Kernel of the narrow network's max pooling: 2 as in SI's code, or 3 as in the paper's Table
    2."""
    settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set")] = ()
    """Settings of methods to change, such as clnp.margin=0.001 clnp.l1=1e-7,1e-5,1e-6."""
    deterministic: bool = False
    """Let a GPU give the same bits each time, at some cost; a CPU does in any case."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Mirror of the logs at Weights & Biases; auto: online when logged in, else offline."""
    force: bool = False
    """Run recorded cells again."""
    records_dir: Path = Path("reports/records")
    """Folder of the records."""
    out_dir: Path = Path("reports/out")
    """Folder of the generated tables and figures."""
    work: Working = field(default_factory=Working)


@dataclass(frozen=True)
class Tune:
    """Try a method's grid on validation data, with seeds of its own; test data are not loaded.

    What the result already holds is not trained again, and an interrupted candidate goes on.
    """

    method: str
    """Name of the method, such as clnp; its grid stands in benchmarks/methods.py."""
    experiment: str = "pmnist"
    """Name of the experiment: pmnist, split_cifar, split_cifar_wide, either with _reduced, or
    quickstart."""
    seeds: tuple[int, ...] = (100,)
    """The seeds, from 100 on; those of an earlier result are kept."""
    tasks: int | None = None
    """How many tasks of the stream each candidate learns; by default as many as the method's entry
    in the registry says, or 3."""
    tuning_dir: Path = Path("reports/tuning")
    """Folder of the results, one JSON file an experiment and method."""
    work: Working = field(default_factory=Working)


@dataclass(frozen=True)
class Report:
    """Rebuild tables and figures from the records."""

    experiments: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names of the experiments. (default: all that have records)"""
    records_dir: Path = Path("reports/records")
    """Folder of the records."""
    out_dir: Path = Path("reports/out")
    """Folder of the generated tables and figures."""
    readme: tuple[Path, ...] = ()
    """Markdown files whose tables are rewritten where they stand between markers."""


@dataclass(frozen=True)
class Prepare:
    """Fetch, check and cache data sets."""

    datasets: tyro.conf.Positional[tuple[str, ...]] = ("mnist", "cifar10", "cifar100")
    """Names of the data sets: mnist, cifar10, cifar100, digits."""
    data_dir: Path | None = None
    """Folder of the data sets. (default: the variable CLNP_DATA, else ./data)"""
    download: bool = True
    """Download what is in none of the known places."""


@dataclass(frozen=True)
class Status:
    """Tell of each cell of an experiment: recorded, running, failed, stopped or missing."""

    experiment: tyro.conf.Positional[str]
    """Name of the experiment, as of `run`."""
    methods: tuple[str, ...] = ()
    """Names of the methods. (default: the experiment's own)"""
    seeds: tuple[int, ...] = ()
    """The seeds. (default: the experiment's own)"""
    records_dir: Path = Path("reports/records")
    """Folder of the records."""
    runs_dir: Path = Path("runs")
    """Folder of logs and the state of unfinished cells."""


@dataclass(frozen=True)
class Doctor:
    """Check environment, devices, data, folders and records; tell what is wrong and what to do."""

    data_dir: Path | None = None
    """Folder of the data sets. (default: the variable CLNP_DATA, else ./data)"""
    records_dir: Path = Path("reports/records")
    """Folder of the records."""
    tuning_dir: Path = Path("reports/tuning")
    """Folder of the results of grids."""
    runs_dir: Path = Path("runs")
    """Folder of logs and the state of unfinished cells."""


@dataclass(frozen=True)
class Speed:
    """Measure what the harness and the method cost next to a bare training loop."""

    save: Path | None = None
    """CSV file that the ratios are written to as well."""


Command = (
    Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Tune, tyro.conf.subcommand("tune")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Prepare, tyro.conf.subcommand("prepare")]
    | Annotated[Status, tyro.conf.subcommand("status")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
    | Annotated[Speed, tyro.conf.subcommand("speed")]
)


def experiments() -> dict[str, type[Experiment]]:
    """Return the presets by name."""
    from benchmarks.pmnist import PermutedMNIST
    from benchmarks.quickstart import Quickstart
    from benchmarks.split_cifar import (
        SplitCIFAR,
        SplitCIFARReduced,
        SplitCIFARWide,
        SplitCIFARWideReduced,
    )

    narrow, wide = (SplitCIFAR, SplitCIFARReduced), (SplitCIFARWide, SplitCIFARWideReduced)
    presets = (PermutedMNIST, Quickstart, *narrow, *wide)
    return {preset.preset: preset for preset in presets}


def experiment_of(options: Run) -> Experiment:
    """Return the experiment that the options ask for.

    Raises
    ------
    UserError
        For an unknown name or an impossible value.
    """
    from benchmarks.errors import pick

    presets = experiments()
    preset = presets[pick("experiment", options.experiment, presets)]
    overrides: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("tasks", "epochs", "precision")
        if getattr(options, name) is not None
    }
    if options.validation is not None:
        whole = isinstance(next(f.default for f in fields(preset) if f.name == "validation"), int)
        if whole and not options.validation.is_integer():
            raise UserError(
                f"--validation {options.validation}: {preset.preset} takes a number of images."
            )
        overrides["validation"] = int(options.validation) if whole else options.validation
    if options.augment:
        if not any(field.name == "augment" for field in fields(preset)):
            raise UserError(f"{preset.preset} can't be augmented: --augment is for split CIFAR.")
        overrides["augment"] = True
    if options.pool is not None:
        if not any(field.name == "pool" for field in fields(preset)):
            raise UserError(f"{preset.preset} has no --pool: it is for the narrow network.")
        overrides["pool"] = options.pool
    if options.epochs is not None:
        overrides["method_epochs"] = False
        own = [text for text in options.settings if text.partition("=")[0].endswith(".epochs")]
        if own:
            raise UserError(f"Give --epochs or --set {own[0]}, not both.")
    return preset(**overrides, settings=options.settings)


def run(options: Run) -> int:
    """Run a grid of cells, rebuild the report and print its main table."""
    from benchmarks.records import check_writable
    from benchmarks.reporting import load, page
    from benchmarks.runner import Places, plan, run_grid

    experiment, work = experiment_of(options), options.work
    if options.seeds and options.n_seeds is not None:
        raise UserError("Give --seeds or --n-seeds, not both.")
    seeds: Sequence[int] = options.seeds or experiment.seeds
    if options.n_seeds is not None:
        seeds = range(options.n_seeds)
    grid = plan(experiment, options.methods or experiment.methods, seeds)
    check_writable(options.out_dir)
    code = run_grid(
        grid,
        Places(options.records_dir, work.runs_dir, work.data_dir),
        work.own_device,
        options.wandb,
        options.force,
        work.seconds,
        work.parallel(),
        options.deterministic,
    )
    if code in (0, 1):
        recorded = experiment.name in load.experiments(options.records_dir)
        shown = [experiment.name] if recorded else []  # every cell may have failed
        print(page.build(options.records_dir, options.out_dir, shown))
        print(f"Tables and figures: {options.out_dir / 'index.html'}")
    return code


def tune(options: Tune) -> int:
    """Run a method's grid and print its candidates."""
    from benchmarks import tune as tuning
    from benchmarks.errors import pick
    from benchmarks.reporting import page, tables

    presets = experiments()
    preset = presets[pick("experiment", options.experiment, presets)]
    asked = tuning.request(options.method, preset, options.seeds, options.tasks)
    work = options.work
    code, result = tuning.run(
        asked,
        options.tuning_dir,
        work.runs_dir,
        work.data_dir,
        work.own_device,
        work.seconds,
        work.parallel(),
    )
    print(page.aligned(tables.tuning_table([result])))
    print(tuning.verdict(result))
    return code


def report(options: Report) -> int:
    """Rebuild the report and print its main table."""
    from benchmarks.reporting import page

    print(page.build(options.records_dir, options.out_dir, list(options.experiments) or None))
    for path in options.readme:
        page.update_readme(path, options.records_dir)
    return 0


def prepare(options: Prepare) -> int:
    """Fetch, check and cache data sets."""
    from benchmarks import data

    data.prepare(options.datasets, options.data_dir, options.download)
    return 0


def status(options: Status) -> int:
    """Print where each cell of a grid stands."""
    import dataclasses

    from benchmarks import data
    from benchmarks import status as states
    from benchmarks.runner import Places, plan

    experiment = experiment_of(Run(options.experiment))
    grid = plan(
        experiment,
        options.methods or experiment.methods,
        options.seeds or experiment.seeds,
    )
    content = data.content(experiment.dataset)
    grid = [dataclasses.replace(cell, fingerprint=content) for cell in grid]
    print(states.table(grid, Places(options.records_dir, options.runs_dir))[0])
    return 0


def doctor(options: Doctor) -> int:
    """Print what the checks have found."""
    from benchmarks import data
    from benchmarks import doctor as checks
    from benchmarks.runner import ROOT

    presets = experiments()
    names = sorted({n for p in presets.values() for n in p.dataset.split("+")})
    findings = [
        *checks.environment(ROOT / "constraints.txt"),
        *checks.devices(),
        *checks.code(),
        *checks.disk([options.records_dir, options.runs_dir]),
        *checks.data_sets(names, options.data_dir),
        *checks.kept(options.records_dir, presets, data.content),
        *checks.tuned(options.tuning_dir),
    ]
    for finding in findings:
        print(f"{finding.word:8} {finding.text}")
    return int(any(finding.word == "wrong" for finding in findings))


def speed(options: Speed) -> int:
    """Print the ratios; 1 if a bound is missed."""
    from benchmarks import speed

    return int(bool(speed.main(options.save)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments
        Without the program's name; None: those of the process.

    Returns
    -------
    int
        Exit code: 0; 1 if a cell failed; 2 for a mistake of the user; 130 or 143 if stopped.
    """
    # Avalanche imports a solver that we do not use and that complains about missing extras.
    warnings.filterwarnings("ignore", message="no QP solver found")
    options = tyro.cli(
        Command,
        args=arguments,
        prog="python -m benchmarks",
        description="Continual-learning experiments around CLNP.",
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        match options:
            case Run():
                return run(options)
            case Tune():
                return tune(options)
            case Report():
                return report(options)
            case Prepare():
                return prepare(options)
            case Status():
                return status(options)
            case Doctor():
                return doctor(options)
            case Speed():
                return speed(options)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
