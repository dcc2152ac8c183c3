"""Graceful forgetting over a grid (paper, Sec. 2.2): the sparsest model within the margin.

Each candidate (alpha, learning rate) trains in a copy of the strategy, from the same state. Then
each is put into the strategy's own network, and its layers are cut as far as validation accuracy
stays within the margin of the best of the whole grid; nothing is trained for that. The sparsest is
learnt, as if it alone had been trained.
"""

import copy
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import product
from typing import Any

import pandas as pd
import torch
from avalanche.training.plugins import LRSchedulerPlugin
from avalanche.training.templates.base_sgd import PeriodicEval
from torch import Tensor, nn
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from clnp.arguments import as_numbers, check_alphas
from clnp.errors import CLNPError, Incompatible
from clnp.layers import adapter_of
from clnp.layout import Layout, Runs
from clnp.plugin import CLNPPlugin, Outcome, Scan
from clnp.pruning import EPSILON, new_share, sparsest
from clnp.random_state import random_state, set_random_state
from clnp.sparsity import Alphas, plain


@dataclass(frozen=True)
class Candidate:
    """One point of the grid.

    Attributes
    ----------
    index
        Its place in the grid.
    l1
        alpha, in any form that the plugin's ``l1`` takes; None: the plugin's own.
    lr
        Learning rate; None: the optimizer's own.
    """

    index: int
    l1: Alphas | None
    lr: float | None


@dataclass(frozen=True)
class Trial:
    """A candidate's training, and the state in which it left the strategy.

    Attributes
    ----------
    outcome
        What it gave; None if it diverged.
    seconds
        How long it took.
    random, clock, rates
        State of the generators, the strategy's counters, and the learning rates at its end.
    order
        State of the generator of the data's order, if the loader has one of its own.
    error
        How it diverged.
    """

    outcome: Outcome | None
    seconds: float
    random: dict[str, Any]
    clock: dict[str, int]
    rates: list[float]
    order: Tensor | None = None
    error: str = ""


COLUMNS = (
    "task",
    "candidate",
    "l1",
    "lr",
    "epoch",
    "best_validation",
    "trained_validation",
    "pruned_validation",
    "within_margin",
    "new",
    "new_share",
    "new_weights",
    "chosen",
    "train_seconds",
    "scan_seconds",
)
"""Of the table of candidates; see :func:`search`."""


def search(
    strategy: Any,
    experience: Any,
    *,
    l1: Sequence[Alphas] | None = None,
    lr: Sequence[float] | None = None,
    executor: Executor | None = None,
    go_on: bool = True,
    **options: Any,
) -> pd.DataFrame:
    """Learn an experience with the best of a grid, in place of ``strategy.train(experience)``.

    The grid is all pairs of alpha and learning rate. m is the plugin's margin, and counts from the
    best validation accuracy of all epochs of all candidates. Of those that hold it, the one is
    learnt that takes the smallest sum over layers of new units / width; of equal ones that with
    fewer new weights, then the first. If none holds it after its cut (with ``keep_epoch="last"`` an
    epoch in between can be better than all last ones), the most accurate is learnt. A candidate
    whose training raises ``FloatingPointError`` or ends in NaN or infinity is out.

    Parameters
    ----------
    strategy
        An Avalanche strategy with a :class:`clnp.CLNPPlugin`.
    experience
        The experience to learn.
    l1
        The alphas to try, each in any form that the plugin's ``l1`` takes:
        ``[1e-6, (1e-7, 1e-5, 1e-6)]`` are two. None: the plugin's own.
    lr
        The learning rates to try; groups of parameters keep their ratios to the first group. None:
        the optimizer's own.
    executor
        Where candidates are trained; None: here, one after another. Processes need a strategy and
        an experience that can be pickled; Avalanche's own streams hold functions that
        ``ProcessPoolExecutor`` can't pickle and cloudpickle can, as in joblib's
        ``joblib.externals.loky.get_reusable_executor``. Threads share torch's global generator, so
        that with more than one of them the draws of free weights, dropout and the order of the
        data depend on timing, and so do the results.
    go_on
        Whether the plugin and the optimizer go on with the alpha and the learning rate chosen, so
        that ``strategy.train`` does for the next tasks; False: with those that they had.
    **options
        What ``strategy.train`` takes.

    Returns
    -------
    pandas.DataFrame
        A row a candidate: task, candidate (0, 1, ...), l1, lr; epoch kept, validation accuracy of
        its best epoch, of the one kept, and after the cut; within_margin; new units by layer, their
        new_share (the sum that is compared) and new_weights; chosen; train_seconds, scan_seconds.
        The plugin keeps the rows of all searches in ``candidates``, and saves them with its state.

    Raises
    ------
    TypeError
        If an alpha or a learning rate is no number.
    ValueError
        If the grid is empty, a value is out of its range, or there are several experiences.
    Incompatible
        If the strategy has no CLNP plugin or can't be copied, or if a schedule sets rates that
        don't start from the optimizer's and learning rates are to be tried.
    CLNPError
        If all candidates diverged.

    Notes
    -----
    All candidates start from the same weights (the user's own for the first task; else the same
    draws), a fresh optimizer state, the same random numbers and the same order of the data. A grid
    of one gives bit for bit what ``strategy.train`` gives.

    Loggers see no candidate's epochs, and the strategy's other plugins see the training of the
    experience once, with no epochs in it: what they gather in epochs stays in the copies. A
    learning rate reaches schedules through the optimizer and through Avalanche's
    ``LRSchedulerPlugin``: it is that from which they start (``initial_lr``), warm-ups too.

    Examples
    --------
    >>> stream = iter(benchmark.train_stream)
    >>> table = search(strategy, next(stream), l1=[1e-6, 1e-5], lr=[1e-3, 2e-3])
    >>> for experience in stream:
    ...     strategy.train(experience)
    """
    plugin = plugin_of(strategy)
    experience = _one(experience)
    grid = _grid(l1, lr)
    if lr is not None:
        _check_schedules(strategy)
    plugin.before_training(strategy)  # an interrupted task can't be copied
    own_l1, own_rates = plugin.l1, _rates(strategy)
    # The first task starts from the user's own weights; later ones are drawn anew in any case.
    own = {} if plugin.tasks else copy.deepcopy(strategy.model.state_dict())
    template = strategy if executor is None else _copied(strategy, experience)
    start = random_state(strategy.device)
    run = partial(_train, template, experience, options, start, [c.l1 for c in grid])
    trials = list((map if executor is None else executor.map)(run, grid))
    rows: list[dict[str, Any]] = []
    plugin.decide = partial(_choose, plugin, grid, trials, rows)
    try:
        with _without_epochs(strategy):
            strategy.train(experience, **options)
    except BaseException:
        plugin.l1 = own_l1
        _restore_rates(own_rates)
        if own and not plugin.tasks:
            plugin.before_training(strategy)  # the parameters in full
            now = strategy.model.state_dict()
            with torch.no_grad():
                for name in own.keys() & now.keys():  # new heads stay as they are
                    if now[name].shape == own[name].shape:
                        now[name].copy_(own[name])
        raise
    finally:
        plugin.decide = None
    if not go_on:
        plugin.l1 = own_l1
    if lr is not None and not (go_on and _schedules(strategy)):
        # Plugins that lower the rate by themselves have put back the one that they found.
        _restore_rates(own_rates)
        if go_on:
            set_rate(strategy, next(row["lr"] for row in rows if row["chosen"]))
    rows = [row | {"task": plugin.tasks[-1]} for row in rows]
    plugin.candidates += rows
    return pd.DataFrame(rows, columns=list(COLUMNS))


def plugin_of(strategy: Any) -> CLNPPlugin:
    """The strategy's one CLNP plugin.

    Raises
    ------
    Incompatible
        If it has none, or several.
    """
    found = [plugin for plugin in strategy.plugins if isinstance(plugin, CLNPPlugin)]
    if len(found) != 1:
        raise Incompatible(
            f"a search needs a strategy with one CLNPPlugin among its plugins; this one has "
            f"{len(found)}"
        )
    return found[0]


def set_rate(strategy: Any, lr: float) -> None:
    """Set the learning rate of a strategy's optimizer, and of the schedules that start from it.

    Parameters
    ----------
    strategy
        An Avalanche strategy.
    lr
        Of the first group of parameters; the others keep their ratios to it.
    """
    groups = strategy.optimizer.param_groups
    own = [_own_rate(group) for group in groups]
    if own[0] == 0:
        raise Incompatible(
            "the optimizer's first group of parameters has a learning rate of 0, and the others "
            "keep their ratios to it; put another group first"
        )
    asked = [lr if rate == own[0] else rate * (lr / own[0]) for rate in own]
    for group, before, after in zip(groups, own, asked, strict=True):
        now = float(group["lr"])  # a schedule may have changed it, as in a warm-up
        _set(group, "lr", after if now == before else now * (lr / own[0]))
        if "initial_lr" in group:
            _set(group, "initial_lr", after)
    for schedule in _schedules(strategy):
        if hasattr(schedule, "base_lrs"):
            schedule.base_lrs = list(asked)


def _own_rate(group: Mapping[str, Any]) -> float:
    """The learning rate of a group of parameters, whatever a schedule makes of it now."""
    return float(group.get("initial_lr", group["lr"]))


def _one(experience: Any) -> Any:
    """The experience, alone or in a list."""
    if not isinstance(experience, Iterable):
        return experience
    several = list(experience)
    if len(several) != 1:
        raise ValueError(
            f"search learns one experience, and this holds {len(several)}; call it for each: "
            "for experience in stream: search(strategy, experience, ...)"
        )
    return several[0]


def _check_schedules(strategy: Any) -> None:
    for schedule in _schedules(strategy):
        if isinstance(schedule, OneCycleLR | CyclicLR):
            raise Incompatible(
                f"{type(schedule).__name__} sets rates of its own, whatever the optimizer's, so "
                "that no grid of learning rates reaches them; give l1 alone, or another schedule"
            )


def _rates(strategy: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Where learning rates stand, and what they are."""
    places = [*strategy.optimizer.param_groups, *(vars(s) for s in _schedules(strategy))]
    keys = ("lr", "initial_lr", "base_lrs")
    return [
        (place, {key: copy.deepcopy(place[key]) for key in keys if key in place})
        for place in places
    ]


def _restore_rates(kept: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    for place, values in kept:
        for key, value in values.items():
            _set(place, key, value)


def _set(group: dict[str, Any], key: str, value: Any) -> None:
    if isinstance(group[key], Tensor):  # a capturable optimizer reads it on its device
        group[key].fill_(value)
    else:
        group[key] = value


def _schedules(strategy: Any) -> list[Any]:
    """The schedulers in Avalanche's own plugins, and those that they are made of."""
    found = [p.scheduler for p in strategy.plugins if isinstance(p, LRSchedulerPlugin)]
    for whole in found:  # parts may have parts: the list grows
        found += getattr(whole, "_schedulers", ())
    return found


def _grid(l1: Sequence[Alphas] | None, lr: Sequence[float] | None) -> list[Candidate]:
    for name, values in (("l1", l1), ("lr", lr)):
        if values is not None and (not isinstance(values, Sequence) or not values):
            raise ValueError(f"{name} is {values!r}, but a grid needs a list of values to try")
    for alpha in l1 or ():
        check_alphas(alpha)
    for rate in as_numbers("lr", lr or ()):
        if not 0 < rate < float("inf"):
            raise ValueError(f"lr holds {rate}, but a learning rate is above 0")
    alphas: Sequence[Alphas | None] = [None] if l1 is None else l1
    rates: Sequence[float | None] = [None] if lr is None else lr
    return [Candidate(i, *point) for i, point in enumerate(product(alphas, rates))]


def _copied(strategy: Any, experience: Any) -> Any:
    """A copy of the strategy that trains on the same data, and logs nothing."""
    shared = [experience, plugin_of(strategy).valid_stream]
    # What an interrupted training leaves behind, among it tensors that can't be copied.
    passing = ("experience", "adapted_dataset", "dataloader", "mbatch", "mb_output", "loss")
    shared += [getattr(strategy, name) for name in passing]
    memo: dict[int, Any] = {id(each): each for each in shared}
    memo[id(strategy.evaluator.loggers)] = []
    try:
        copied = copy.deepcopy(strategy, memo)
    except (TypeError, RuntimeError) as error:  # what deepcopy and tensors raise
        raise Incompatible(
            f"candidates train in copies of the strategy, and it can't be copied ({error}); give "
            "the class of the plugin, model or metric that can't a __deepcopy__"
        ) from error
    for schedule in _schedules(copied):
        # Its check of the order of calls asks for a wrapper of `step`, which a copy doesn't have.
        if hasattr(schedule, "_step_count"):
            schedule._step_count = max(2, schedule._step_count)
    return copied


def _train(
    template: Any,
    experience: Any,
    options: Mapping[str, Any],
    start: dict[str, Any],
    checked: Sequence[Alphas | None],
    candidate: Candidate,
) -> Trial:
    """Train a candidate in a copy of the template; the template and the generators stay."""
    strategy = _copied(template, experience)
    plugin, device = plugin_of(strategy), strategy.device
    plugin.candidate = candidate.index
    plugin.checked_too = [l1 for l1 in checked if l1 is not None]
    if candidate.l1 is not None:
        plugin.l1 = candidate.l1
    if candidate.lr is not None:
        set_rate(strategy, candidate.lr)
    found: list[Outcome] = []
    state: dict[str, Any] = {}

    def hand_out(strategy: Any) -> None:
        found.append(plugin.end_training(strategy, copies=True))
        state.update(
            random=random_state(device),
            clock=dict(vars(strategy.clock)),
            rates=[float(group["lr"]) for group in strategy.optimizer.param_groups],
            order=_order(strategy.dataloader),
        )

    plugin.decide = hand_out
    kept = random_state(device)
    began = time.perf_counter()
    error = ""
    try:
        set_random_state(start, device)
        strategy.train(experience, **options)
    except FloatingPointError as raised:
        error = str(raised)
    finally:
        seconds = time.perf_counter() - began
        set_random_state(kept, device)
    if error:
        return Trial(None, seconds, start, {}, [], error=error)
    if not all(bool(torch.isfinite(a).all()) for a in found[0].activity.values()):
        return Trial(None, seconds, start, {}, [], error="units give NaN or infinity")
    return Trial(found[0], seconds, **state)


def _order(loader: Any) -> Tensor | None:
    """State of the generator from which a loader draws the order of the data, if it has one."""
    generator = getattr(loader, "generator", None)
    return generator.get_state() if isinstance(generator, torch.Generator) else None


@dataclass(frozen=True)
class Scanned:
    """A candidate's scan, and what the choice asks of it.

    Attributes
    ----------
    scan
        Its cut; None if it diverged.
    random
        State of the generators after it.
    seconds
        How long it took.
    size
        What is compared: the share of the network that the new units take, and their weights.
    """

    scan: Scan | None
    random: dict[str, Any]
    seconds: float
    size: tuple[Fraction, int]


def _choose(
    plugin: CLNPPlugin,
    grid: Sequence[Candidate],
    trials: Sequence[Trial],
    rows: list[dict[str, Any]],
    strategy: Any,
) -> Scan:
    """Scan all candidates, leave the chosen one in the network, and enter the table's rows.

    Parameters
    ----------
    plugin, strategy
        Whose network is to learn the task.
    grid, trials
        The candidates, and their trainings.
    rows
        Gets a row a candidate; the task's name isn't in it yet.
    """
    own_rate = _own_rate(strategy.optimizer.param_groups[0])
    plugin.end_without_outcome()
    outcomes = [trial.outcome for trial in trials if trial.outcome is not None]
    if not outcomes:
        raise CLNPError(
            f"all {len(trials)} candidates diverged ({trials[0].error}), so the task isn't learnt; "
            "try lower learning rates, or clip gradients"
        ) from FloatingPointError(trials[0].error)
    best = max(max(outcome.validation) for outcome in outcomes)
    scanned = [_scan(plugin, strategy, trial, best) for trial in trials]
    bound = best - plugin.task_margin
    accuracies = [None if each.scan is None else each.scan.cut.accuracy for each in scanned]
    chosen = sparsest(accuracies, [each.size for each in scanned], bound)
    trial, scan = trials[chosen], scanned[chosen].scan
    assert trial.outcome is not None
    assert scan is not None
    if scan is not next(each.scan for each in reversed(scanned) if each.scan):
        plugin.place(trial.outcome)
        plugin.sort(trial.outcome.activity)
    for candidate, its, each in zip(grid, trials, scanned, strict=True):
        values = {
            "candidate": candidate.index,
            "l1": plain(plugin.l1 if candidate.l1 is None else candidate.l1),
            "lr": own_rate if candidate.lr is None else float(candidate.lr),
            "chosen": candidate.index == chosen,
        }
        rows.append(_row(its, each, plugin.network.frontier, bound) | values)
    l1 = grid[chosen].l1
    plugin.l1 = plugin.l1 if l1 is None else l1
    # What follows (fine-tuning, other plugins, evaluation) finds what the training left.
    if (rate := grid[chosen].lr) is not None:
        set_rate(strategy, rate)  # where schedules start
    for group, value in zip(strategy.optimizer.param_groups, trial.rates, strict=True):
        _set(group, "lr", value)
    if trial.order is not None:
        strategy.dataloader.generator.set_state(trial.order)
    vars(strategy.clock).update(trial.clock)
    set_random_state(scanned[chosen].random, strategy.device)
    return scan


def _row(trial: Trial, scanned: Scanned, before: dict[str, int], bound: float) -> dict[str, Any]:
    """What training and scan say of a candidate, as values of the table."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {"within_margin": False}
    row |= {"train_seconds": trial.seconds, "scan_seconds": scanned.seconds}
    if trial.outcome is None or scanned.scan is None:
        return row
    outcome, cut = trial.outcome, scanned.scan.cut
    return row | {
        "epoch": outcome.epoch,
        "best_validation": max(outcome.validation),
        "trained_validation": outcome.validation[outcome.epoch - 1],
        "pruned_validation": cut.accuracy,
        "within_margin": cut.accuracy >= bound - EPSILON,
        "new": {layer: cut.used[layer] - before[layer] for layer in cut.used},
        "new_share": float(scanned.size[0]),
        "new_weights": scanned.size[1],
    }


def _scan(plugin: CLNPPlugin, strategy: Any, trial: Trial, best: float) -> Scanned:
    """Put a candidate into the network, and cut it as far as the margin allows."""
    began = time.perf_counter()
    scan, size = None, (Fraction(0), 0)
    if trial.outcome is not None:
        network = plugin.network
        before, layout = network.frontier, network.layout
        plugin.place(trial.outcome)
        set_random_state(trial.random, strategy.device)
        scan = plugin.scan(strategy, trial.outcome, best)
        used = scan.cut.used
        start = before if network.single_head else dict.fromkeys(before, 0)
        size = (
            new_share(used, before, layout.widths),
            new_weights(network.modules, layout, before, used, start),
        )
    seconds = time.perf_counter() - began
    return Scanned(scan, random_state(strategy.device), seconds, size)


def new_weights(
    modules: Mapping[str, nn.Module],
    layout: Layout,
    before: Mapping[str, int],
    used: Mapping[str, int],
    head_start: Mapping[str, int],
) -> int:
    """How many entries of weight matrices the new units of a task read with, its head included.

    Parameters
    ----------
    modules
        The network's layers by name.
    layout
        How its units are grouped.
    before, used
        Active units of each group before and after the task.
    head_start
        The first unit of each group that the head reads.
    """
    total = 0
    none = dict.fromkeys(layout.widths, 0)
    for name in layout.weights:
        weight = modules[name].get_parameter("weight")
        rows, columns = weight.shape[0], weight.shape[1]
        if name != layout.head:
            rows = _count(layout.runs(layout.rows[name], before, used))
        if adapter_of(name, modules[name]).has_columns and layout.columns[name]:
            first = head_start if name == layout.head else none
            columns = _count(layout.runs(layout.columns[name], first, used))
        total += rows * columns * weight[0, 0].numel()
    return total


def _count(runs: Runs) -> int:
    return sum(run.stop - run.start for run in runs)


@contextmanager
def _without_epochs(strategy: Any) -> Iterator[None]:
    """Training an experience runs all hooks around its epochs, and evaluates at its end alone."""
    epochs = strategy.train_epochs
    evaluations = [p for p in strategy.plugins if isinstance(p, PeriodicEval) and p.eval_every > 0]
    periods = [plugin.eval_every for plugin in evaluations]
    strategy.train_epochs = 0
    for plugin in evaluations:
        plugin.eval_every = 0
    try:
        yield
    finally:
        strategy.train_epochs = epochs
        for plugin, period in zip(evaluations, periods, strict=True):
            plugin.eval_every = period
