"""The command line: ``python -m benchmarks run|report|prepare``, a dispatcher."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from benchmarks.errors import UserError
from benchmarks.experiment import Experiment


@dataclass(frozen=True)
class Run:
    """Train and evaluate the cells of an experiment that have no record yet, then report."""

    experiment: tyro.conf.Positional[str]
    """Name of the experiment: pmnist or quickstart."""
    methods: tuple[str, ...] = ()
    """Names of the methods, such as clnp finetune single_task; none: the experiment's own."""
    seeds: tuple[int, ...] = ()
    """The seeds, such as 0 3; none: the experiment's own."""
    n_seeds: int | None = None
    """Number of seeds: 5 means 0 1 2 3 4."""
    tasks: int | None = None
    """Number of tasks. Another number than the experiment's makes it a custom experiment."""
    epochs: int | None = None
    """Epochs a task, for all methods. Makes it a custom experiment."""
    precision: Literal["fp32", "bf16"] | None = None
    """Precision of forward passes. Another than the experiment's makes it a custom experiment."""
    device: str = "auto"
    """Where to train: cpu, cuda, cuda:1, ...; auto: the GPU if there is one."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Mirror of the logs at Weights & Biases; auto: online when logged in, else offline."""
    force: bool = False
    """Run recorded cells again."""
    data_dir: Path | None = None
    """Folder of the data sets; default: the variable CLNP_DATA, else ./data."""
    records_dir: Path = Path("reports/records")
    """Folder of the records."""
    runs_dir: Path = Path("runs")
    """Folder of logs, W&B files and the state of unfinished cells."""
    out_dir: Path = Path("reports/out")
    """Folder of the generated tables and figures."""


def experiments() -> dict[str, type[Experiment]]:
    """Return the presets by name."""
    from benchmarks.pmnist import PermutedMNIST
    from benchmarks.quickstart import Quickstart

    return {preset.preset: preset for preset in (PermutedMNIST, Quickstart)}


def run(options: Run) -> int:
    """Run a grid of cells and rebuild the report."""
    from benchmarks.methods import pick
    from benchmarks.runner import Places, pick_device, plan, run_grid

    presets = experiments()
    preset = presets[pick("experiment", options.experiment, presets)]
    overrides: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("tasks", "epochs", "precision")
        if getattr(options, name) is not None
    }
    if options.epochs is not None:
        overrides["method_epochs"] = False
    if options.seeds and options.n_seeds is not None:
        raise UserError("Give --seeds or --n-seeds, not both.")
    seeds: Sequence[int] = options.seeds or preset.seeds
    if options.n_seeds is not None:
        seeds = range(options.n_seeds)
    experiment = preset(**overrides)
    grid = plan(experiment, options.methods or preset.methods, seeds)
    return run_grid(
        grid,
        Places(options.records_dir, options.runs_dir, options.data_dir),
        pick_device(options.device),
        options.wandb,
        options.force,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    try:
        options = tyro.extras.subcommand_cli_from_dict(
            {"run": Run}, args=arguments, prog="python -m benchmarks"
        )
        return run(options)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
