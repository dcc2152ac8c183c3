"""Saving a training in the middle of a task, and going on from there bit for bit.

What is saved is what steps change: the model's parameters and buffers, the optimizer's state, what
plugins gather within a task, the generators, and how many batches of the epoch are done. All else
(data, frozen parts, schedules) is made again by the hooks that begin the task. A plugin that
gathers something has ``training_state()``, which gives it as tensors, numbers, texts, lists and
dicts, and ``load_training_state(state)``.
"""

from __future__ import annotations

import hashlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from avalanche.training.plugins import LRSchedulerPlugin
from avalanche.training.templates import SupervisedTemplate

from benchmarks.records import write_atomically
from clnp.random_state import random_state, set_random_state

State = dict[str, Any]

FORMAT = 5
"""Of all saved states; raised when their contents change."""
SAVE_EVERY = 300.0
"""Seconds of training after which its state is saved."""
SAVE_AT_END = 60.0
"""Seconds since the last saving after which the end of a task's epochs is saved: what follows them
(cutting, fine-tuning, evaluating) has no steps of its own to go on from."""
LEAST_RATIO = 50.0
"""Training lasts at least so many times as long as the saving that it waits for: 2 % at most."""


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM); handled like Ctrl-C."""


class Stop:
    """Ctrl-C and SIGTERM: within the epochs of a task the running step ends and is saved first.

    After them (cutting, evaluating) the process stops at once, since what is saved stands. A second
    signal always stops at once.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        """The signal that has come, if any."""
        self._deferring = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the two signals; the handlers from before come back."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._heard) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _heard(self, number: int, _frame: FrameType | None) -> None:
        second, self.asked = self.asked is not None, number
        if second or not self._deferring:
            raise self.error()
        print("Stopping after this step, which is saved; once more: at once.", file=sys.stderr)

    def error(self) -> KeyboardInterrupt:
        """Return what is raised for the signal."""
        return Terminated() if self.asked == signal.SIGTERM else KeyboardInterrupt()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note a signal that comes; whoever is inside asks `asked` after each step."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self.asked is not None:  # since the last step
            raise self.error()


def _nowhere(_state: State) -> None:
    """Save nothing."""


class Saver:
    """Decides when the state of a training is saved, and hands it back to the training it is of.

    Parameters
    ----------
    write
        Saves a state, with ``task``, ``candidate`` (of a search, else 0) and ``training``.
    saved
        The state to go on from, if there is one.
    stop
        Tells whether a signal asks for the end.
    every
        Seconds of training between two savings.
    """

    def __init__(
        self,
        write: Callable[[State], None],
        saved: State | None = None,
        stop: Stop | None = None,
        every: float = SAVE_EVERY,
    ) -> None:
        self.write = write
        self.saved = saved
        self.stop = stop or Stop()
        self.every = every
        self._last = time.monotonic()
        self._cost = 0.0  # seconds that the last saving took
        self._order: list[torch.Tensor] = []

    def __deepcopy__(self, _memo: dict[int, Any]) -> Saver:
        """Serve the candidates of a search, which train in copies of the strategy, too."""
        return self

    def __reduce__(self) -> tuple[type[Saver], tuple[Callable[[State], None]]]:
        """Save nothing of a candidate that trains in another process."""
        return Saver, (_nowhere,)

    def take(self, strategy: Any) -> State | None:
        """Return the state to go on from if it is that of the training that begins."""
        if self.saved is None or {k: self.saved[k] for k in ("task", "candidate")} != _of(strategy):
            return None
        state, self.saved = self.saved["training"], None
        return dict(state)

    def begin_epoch(self, strategy: Any) -> None:
        """Note from where the epoch's order of the data is drawn."""
        self._order = _order(strategy)

    def after_step(self, strategy: Any) -> None:
        """Save if it is time to, or if a signal has come, which then has its way.

        Raises
        ------
        KeyboardInterrupt
            As `Stop.error` says.
        """
        self._look(strategy, self.every, self._order, strategy.clock.train_epoch_iterations)

    def after_epoch(self, strategy: Any) -> None:
        """Do the same between epochs, and after the last one sooner."""
        last = strategy.clock.train_exp_epochs == strategy.train_epochs
        every = min(SAVE_AT_END, self.every) if last else self.every
        self._look(strategy, every, _order(strategy), None)

    def _look(
        self, strategy: Any, every: float, order: list[torch.Tensor], skip: int | None
    ) -> None:
        asked = self.stop.asked is not None
        if asked or time.monotonic() - self._last >= max(every, LEAST_RATIO * self._cost):
            self.save(strategy, order, skip)
        if asked:
            raise self.stop.error()

    def save(self, strategy: Any, order: list[torch.Tensor], skip: int | None) -> None:
        """Save the state, if the strategy serves data whose order can be drawn again."""
        if not hasattr(strategy.dataloader, "skip"):
            return
        began = time.monotonic()
        self.write(_of(strategy) | {"training": snapshot(strategy, order, skip)})
        self._last = time.monotonic()
        self._cost = self._last - began


class Resumable(SupervisedTemplate):
    """Strategy mixin: a training that can be saved after any step, and go on from there.

    Set `saver` on the strategy; without one it trains as ever.
    """

    saver: Saver | None = None
    _going_on: State | None = None

    def __init__(self, **kwargs: Any) -> None:
        # Without it Avalanche's templates would skip what stands between them and this class.
        super().__init__(**kwargs)

    def _train_exp(self, experience: Any, eval_streams: Any = None, **kwargs: Any) -> None:
        saver, whole = self.saver, self.train_epochs
        if saver is None or not whole:
            super()._train_exp(experience, eval_streams, **kwargs)
            return
        saved = saver.take(self)
        with saver.stop.deferred():
            if saved is None:
                super()._train_exp(experience, eval_streams, **kwargs)
                return
            if saved["skip"] is None:  # between epochs; else the epoch's hooks come first
                restore(self, saved)
            else:
                self._going_on = saved
            for _ in range(saved["clock"]["train_exp_epochs"], whole):
                self._before_training_epoch(**kwargs)
                self.training_epoch(**kwargs)
                self._after_training_epoch(**kwargs)

    def training_epoch(self, **kwargs: Any) -> None:
        """Train an epoch, or what is left of it."""
        if self._going_on is not None:
            restore(self, self._going_on)
            self._going_on = None
        if self.saver is not None:
            self.saver.begin_epoch(self)
        super().training_epoch(**kwargs)

    def _after_training_iteration(self, **kwargs: Any) -> None:
        super()._after_training_iteration(**kwargs)
        if self.saver is not None:
            self.saver.after_step(self)

    def _after_training_epoch(self, **kwargs: Any) -> None:
        super()._after_training_epoch(**kwargs)
        if self.saver is not None:
            self.saver.after_epoch(self)


def snapshot(strategy: Any, order: list[torch.Tensor], skip: int | None) -> State:
    """Return all that the steps of a training have changed, with references to live tensors.

    Parameters
    ----------
    strategy
        After a step or an epoch.
    order
        States of the loader's generators when the epoch began; between epochs, those of now.
    skip
        How many steps of the epoch are done; None between epochs.
    """
    return {
        "clock": {k: v for k, v in vars(strategy.clock).items() if isinstance(v, int)},
        "random": random_state(strategy.device),
        "order": order,
        "skip": skip,
        "model": strategy.model.state_dict(),
        "optimizer": strategy.optimizer.state_dict(),
        "schedules": [_plain(plugin.scheduler) for plugin in _schedules(strategy)],
        "plugins": [plugin.training_state() for plugin in _gathering(strategy)],
    }


def restore(strategy: Any, state: State) -> None:
    """Go on from a `snapshot`.

    Parameters
    ----------
    strategy
        At the beginning of the epoch in which the snapshot was taken, all hooks of which have run;
        or, if it was taken between epochs, before them.
    state
        From `snapshot`.
    """
    strategy.model.load_state_dict(state["model"])
    strategy.optimizer.load_state_dict(state["optimizer"])
    for plugin, own in zip(_gathering(strategy), state["plugins"], strict=True):
        plugin.load_training_state(own)
    for plugin, own in zip(_schedules(strategy), state["schedules"], strict=True):
        vars(plugin.scheduler).update(own)
    for generator, own in zip(_generators(strategy.dataloader), state["order"], strict=True):
        generator.set_state(own)
    strategy.dataloader.skip = state["skip"] or 0
    vars(strategy.clock).update(state["clock"])
    set_random_state(state["random"], strategy.device)


def _of(strategy: Any) -> State:
    """Name the training: its task, and the candidate if a search trains it."""
    found = (getattr(plugin, "candidate", None) for plugin in strategy.plugins)
    return {
        # logging(): an experience in training hides its index.
        "task": strategy.experience.logging().current_experience,
        # A training that is no search's is the same as that of a grid of one.
        "candidate": next((number for number in found if number is not None), 0),
    }


def _generators(loader: Any) -> list[torch.Generator]:
    found: list[torch.Generator] = loader.generators() if hasattr(loader, "generators") else []
    return found


def _order(strategy: Any) -> list[torch.Tensor]:
    return [generator.get_state() for generator in _generators(strategy.dataloader)]


def _gathering(strategy: Any) -> list[Any]:
    return [plugin for plugin in strategy.plugins if hasattr(plugin, "training_state")]


def _schedules(strategy: Any) -> list[Any]:
    return [plugin for plugin in strategy.plugins if isinstance(plugin, LRSchedulerPlugin)]


def _plain(scheduler: Any) -> State:
    """Return where a schedule stands, without what it was made with."""
    names = ("last_epoch", "_step_count", "_last_lr")
    return {name: value for name, value in vars(scheduler).items() if name in names}


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a resume state, after the SHA-256 of its bytes: all of it or nothing."""
    buffer = BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    write_atomically(path, hashlib.sha256(data).digest() + data)


def load_state(path: Path, hash_: str) -> dict[str, Any]:
    """Return a resume state; nothing in it is unpickled but tensors, numbers, lists and dicts.

    Raises
    ------
    ValueError
        If it is damaged or of another cell.
    """
    content = path.read_bytes()
    # torch.load notices a cut file, but not a flipped bit.
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        raise ValueError("it is damaged")
    try:
        state = torch.load(BytesIO(content[32:]), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the reader of an archive stumbles on
        raise ValueError("it holds something else than plain data") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError("it was written by another version of the code")
    if state.get("hash") != hash_:
        raise ValueError("it belongs to another cell")
    return state
