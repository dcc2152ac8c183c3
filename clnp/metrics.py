"""LogitDrift: how far the logits of old tasks have moved since they were learnt."""

import math
from typing import Any

from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricValue
from torch import Tensor


class LogitDrift(PluginMetric[float]):
    """Largest change of the logits on a fixed probe batch of each old task, for any strategy.

    The probe of an experience is the first batch on which it is evaluated; its logits are kept
    the first time it is evaluated after it was learnt, and compared ever after. 0 means that they
    are bitwise the same; inf that some are no longer numbers; nan that nobody can tell, since
    training went on before the experience was evaluated. An experience that is trained again is
    learnt anew. Costs no forward pass of its own.

    A metric of an `EvaluationPlugin`; for a strategy with its default evaluator, one of its plugins
    (then :meth:`drift` tells the values, which are not logged).

    Parameters
    ----------
    stream
        Name of the evaluation stream whose experiences are watched; others are left alone.

    Raises
    ------
    TypeError
        If it is no name.
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

    def before_training_exp(self, strategy: Any) -> None:
        """Give up those whose logits nobody has seen: training is about to move them."""
        again = _index(strategy)  # is learnt anew
        self._learnt.discard(again)
        self._reference.pop(again, None)
        self._drift.pop(again, None)
        for index in self._learnt - self._reference.keys():
            self._drift[index] = math.nan

    def after_training_exp(self, strategy: Any) -> None:
        """Remember that the experience has been learnt."""
        self._learnt.add(_index(strategy))

    def before_eval_exp(self, strategy: Any) -> None:
        """Look at the first batch of each experience."""
        self._probed = False

    def after_eval_iteration(self, strategy: Any) -> None:
        """Keep the probe's logits, or compare them with those kept."""
        index = _index(strategy)
        name = getattr(getattr(strategy.experience, "origin_stream", None), "name", self._stream)
        if self._probed or index not in self._learnt or name != self._stream:
            return
        if math.isnan(self._drift.get(index, 0.0)):
            return
        self._probed = True
        logits = strategy.mb_output.detach()
        kept = self._reference.get(index)
        if kept is None:
            self._reference[index] = logits.cpu().clone()
            self._drift[index] = 0.0
            return
        now = logits.cpu()
        if kept.shape != now.shape:  # a head or a batch that grew: what was there is compared
            rows, columns = min(len(kept), len(now)), min(kept.shape[1], now.shape[1])
            kept, now = kept[:rows, :columns], now[:rows, :columns]
        self._drift[index] = max(self._drift[index], _change(kept, now))

    def after_eval(self, strategy: Any) -> list[MetricValue]:
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
            "drift": dict(self._drift),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._learnt = set(state["learnt"])
        self._reference = {index: kept.cpu() for index, kept in state["reference"].items()}
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


def _index(strategy: Any) -> int:
    # logging(): an experience in train mode masks its index.
    experience = strategy.experience
    shown = experience.logging() if hasattr(experience, "logging") else experience
    return int(getattr(shown, "current_experience", 0))
