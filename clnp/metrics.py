"""LogitDrift: how far the logits of old tasks have moved since they were learnt."""

import math
import warnings
from typing import Any

import torch
from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricValue
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor


class LogitDrift(SupervisedPlugin, PluginMetric[float]):
    """Largest change of the logits on a fixed probe batch of each old task, for any strategy.

    The probe of an experience is the first batch on which it is evaluated; its logits are kept
    the first time it is evaluated after it was learnt, and compared ever after. 0 means that they
    are bitwise the same; inf that some are no longer numbers; nan that nobody can tell, since
    training went on before the experience was evaluated, or since its first batch came with other
    labels than before (then it warns: evaluate in a fixed order). An experience that is trained
    again is learnt anew; parts of one, as in online streams, train it. Costs no forward pass of its
    own.

    A metric of an `EvaluationPlugin`; for a strategy with its default evaluator, one of its plugins
    (then :meth:`drift` tells the values, which are not logged).

    Parameters
    ----------
    stream
        Name of the evaluation stream whose experiences are watched; others are left alone.

    Raises
    ------
    TypeError
        If it is no name; in evaluation, if the model returns no tensor.
    ValueError
        If a part of an online stream is evaluated, or doesn't tell of which experience it is one.
    """

    def __init__(self, stream: str = "test") -> None:
        super().__init__()
        if not isinstance(stream, str):
            raise TypeError(
                f"stream is a {type(stream).__name__}; give the name of the stream to watch, such "
                "as 'test'"
            )
        self._stream = stream
        self._learnt: set[int] = set()
        self._reference: dict[int, Tensor] = {}
        self._labels: dict[int, Tensor] = {}
        """Of the probes: the sign that they are the same samples."""
        self._drift: dict[int, float] = {}
        self._probed = False

    def drift(self) -> dict[int, float]:
        """Largest absolute change of a logit since the experience was learnt, by its index."""
        return dict(sorted(self._drift.items()))

    def result(self) -> float:
        """The largest drift of all experiences; nan if none was evaluated, or one too late."""
        # Not max alone: whether it returns a nan depends on the order.
        unknown = not self._drift or any(map(math.isnan, self._drift.values()))
        return math.nan if unknown else max(self._drift.values())

    def reset(self) -> None:
        """Nothing: drift is measured over the whole life of a strategy."""

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """Give up those whose logits nobody has seen: training is about to move them."""
        for again in _trained(strategy):  # learnt anew
            self._learnt.discard(again)
            self._reference.pop(again, None)
            self._drift.pop(again, None)
        for index in self._learnt - self._reference.keys():
            self._drift[index] = math.nan

    def after_training_exp(self, strategy: Any, **_: Any) -> None:
        """Remember that the experience has been learnt."""
        self._learnt |= _trained(strategy)

    def before_eval_exp(self, strategy: Any, **_: Any) -> None:
        """Look at the first batch of each experience."""
        self._probed = False

    def after_eval_iteration(self, strategy: Any, **_: Any) -> None:
        """Keep the probe's logits, or compare them with those kept."""
        if hasattr(strategy.experience, "origin_experience"):
            raise ValueError("LogitDrift watches whole experiences: evaluate these, not parts")
        index = _index(strategy.experience)
        name = getattr(getattr(strategy.experience, "origin_stream", None), "name", self._stream)
        if self._probed or index not in self._learnt or name != self._stream:
            return
        if math.isnan(self._drift.get(index, 0.0)):
            return
        self._probed = True
        if not isinstance(strategy.mb_output, Tensor):
            raise TypeError(
                f"the model returns a {type(strategy.mb_output).__name__}; LogitDrift compares "
                "logits, a tensor: return them alone"
            )
        now, labels = strategy.mb_output.detach().cpu(), strategy.mb_y.cpu()
        kept = self._reference.get(index)
        if kept is None:
            self._reference[index], self._labels[index] = now.clone(), labels.clone()
            self._drift[index] = 0.0
            return
        before = self._labels.get(index, labels)
        if not torch.equal(*_common(before, labels)):
            self._drift[index] = math.nan
            warnings.warn(
                f"The first batch of experience {index} has other labels than when its logits were "
                "kept, so that how far they have moved can't be told: evaluate in a fixed order "
                "(shuffle=False).",
                stacklevel=2,
            )
            return
        kept, now = _common(kept, now)  # what was there before a head or a batch grew
        self._drift[index] = max(self._drift[index], _change(kept, now))

    def after_eval(self, strategy: Any, **_: Any) -> list[MetricValue]:
        """Report the largest drift after each evaluation, as soon as there is one."""
        if not self._drift:
            return []
        step = strategy.clock.train_iterations
        return [MetricValue(self, str(self), self.result(), step)]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: plain numbers and tensors."""
        return {
            "learnt": sorted(self._learnt),
            "reference": dict(self._reference),
            "labels": dict(self._labels),
            "drift": dict(self._drift),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._learnt = set(state["learnt"])
        self._reference = {index: kept.cpu() for index, kept in state["reference"].items()}
        self._labels = {index: labels.cpu() for index, labels in state.get("labels", {}).items()}
        self._drift = dict(state["drift"])

    def rebase(self) -> None:
        """Go on where sums are rounded otherwise, as on another machine: last bits differ there.

        Experiences whose logits have not changed so far are compared with those of the next
        evaluation, which is to come before any training; it is the network that gave the old ones.
        Others keep theirs, since their drift counts from there; it may include the rounding.
        """
        changed = {index for index, drift in self._drift.items() if drift != 0.0}
        self._reference = {i: kept for i, kept in self._reference.items() if i in changed}

    def __str__(self) -> str:
        return "LogitDrift"


def _change(kept: Tensor, now: Tensor) -> float:
    """Return the largest change; what is not a number any more, or was none, changed by inf."""
    moved = now != kept  # not by subtraction alone: equal infinities are no change
    changes = (now - kept).abs()[moved].nan_to_num(nan=math.inf, posinf=math.inf)
    return float(changes.max()) if changes.numel() else 0.0


def _common(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return what two tensors of as many dimensions both have."""
    shared = tuple(slice(min(sizes)) for sizes in zip(one.shape, other.shape, strict=True))
    return one[shared], other[shared]


def _trained(strategy: Any) -> set[int]:
    """Return the indices of what the strategy trains on: one experience, or many at once."""
    at_once = getattr(strategy, "_experiences", None) or [strategy.experience]  # JointTraining's
    return {_index(experience) for experience in at_once}


def _index(experience: Any) -> int:
    # logging(): an experience in train mode masks its index, and of what it is a part.
    shown = experience.logging() if hasattr(experience, "logging") else experience
    if hasattr(shown, "origin_experience"):
        if shown.origin_experience is None:
            raise ValueError(
                "LogitDrift can't tell when an experience is learnt: this online stream's parts "
                "are of several"
            )
        return _index(shown.origin_experience)
    return int(getattr(shown, "current_experience", 0))
