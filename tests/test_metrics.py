"""LogitDrift by itself: any Avalanche strategy, any evaluator, nothing of the method."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from avalanche.benchmarks import tensors_benchmark
from avalanche.benchmarks.scenarios.online import (
    split_continuous_linear_decay_stream,
    split_online_stream,
)
from avalanche.models import SimpleMLP, as_multitask
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.supervised import JointTraining, Naive
from torch import Tensor, nn

from clnp import LogitDrift

TASKS = 3
ROWS = 8
"""Of a batch in evaluation."""


def benchmark() -> Any:
    """Three tasks of made data; `valid` holds other samples than `test`."""
    generator = torch.Generator().manual_seed(0)
    data = [
        (torch.randn(40, 8, generator=generator), torch.randint(0, 4, (40,), generator=generator))
        for _ in range(TASKS)
    ]
    return tensors_benchmark(
        train_tensors=data,
        test_tensors=[(x[:20], y[:20]) for x, y in data],
        other_streams_tensors={"valid": [(x[20:], y[20:]) for x, y in data]},
        task_labels=list(range(TASKS)),
    )


def naive(
    plugins: Sequence[Any] = (), model: nn.Module | None = None, lr: float = 0.1, **more: Any
) -> Any:
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    return Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=lr),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=8,
        eval_mb_size=ROWS,
        plugins=list(plugins),
        **more,
    )


def with_metric(drift: LogitDrift, **more: Any) -> Any:
    return naive(evaluator=EvaluationPlugin(drift, loggers=[]), **more)


def learn(strategy: Any, streams: Sequence[str] = ("test",)) -> list[dict[str, Any]]:
    """Train task after task and evaluate the streams after each; return the last values."""
    bench, values = benchmark(), []
    for experience in bench.train_stream:
        strategy.train(experience, eval_streams=[])
        for stream in streams:
            values.append(dict(strategy.eval(bench.streams[stream])))
    return values


class Probes(SupervisedPlugin):  # type: ignore[misc]
    """The logits of the first batch of each experience of a stream, at every evaluation."""

    def __init__(self, stream: str) -> None:
        super().__init__()
        self.stream, self.fresh = stream, False
        self.logits: dict[int, list[Tensor]] = {}

    def before_eval_exp(self, strategy: Any, **_: Any) -> None:
        self.fresh = strategy.experience.origin_stream.name == self.stream

    def after_eval_iteration(self, strategy: Any, **_: Any) -> None:
        if self.fresh:
            seen = self.logits.setdefault(strategy.experience.current_experience, [])
            seen.append(strategy.mb_output.clone())
        self.fresh = False

    def drift(self) -> dict[int, float]:
        return {
            task: max(float((x - seen[task]).abs().max()) for x in seen[task:])
            for task, seen in self.logits.items()
        }


@pytest.mark.parametrize("watched", ["test", "valid"])
@pytest.mark.parametrize("heads", ["one", "a task"])
def test_drift_is_that_of_the_stream_it_watches(watched: str, heads: str) -> None:
    probes, drift = Probes(watched), LogitDrift(watched)
    model = None
    if heads == "a task":
        torch.manual_seed(0)
        model = as_multitask(SimpleMLP(num_classes=4, input_size=8, hidden_size=16), "classifier")
    values = learn(with_metric(drift, plugins=[probes], model=model), ("valid", "test"))
    expected = probes.drift()
    assert drift.drift() == expected
    assert 0 < expected[0] > expected[2] == 0
    assert values[-1]["LogitDrift"] == drift.result() == max(expected.values())


def test_among_the_plugins_beside_the_default_evaluator() -> None:
    drift, metric, bench = LogitDrift(), LogitDrift(), benchmark()
    with contextlib.redirect_stdout(io.StringIO()):  # the default evaluator prints
        strategy = naive([drift])
        for experience in bench.train_stream:
            # Plugins are handed what the strategy is called with; metrics aren't.
            strategy.train(experience, eval_streams=[], num_workers=0)
            strategy.eval(bench.test_stream, num_workers=0)
    learn(with_metric(metric))
    assert drift.drift() == metric.drift()
    assert drift.result() > 0


@pytest.mark.parametrize("boundaries", [True, False])
def test_parts_of_an_online_stream_train_the_experience_they_are_of(boundaries: bool) -> None:
    drift, bench = LogitDrift(), benchmark()
    strategy = with_metric(drift)
    learnt = []
    parts = split_online_stream(bench.train_stream, 20, access_task_boundaries=boundaries)
    for i, part in enumerate(parts):
        strategy.train(part, eval_streams=[])
        strategy.eval(bench.test_stream)
        if i % 2:
            x = torch.stack([bench.test_stream[i // 2].dataset[j][0] for j in range(ROWS)])
            learnt.append((x, strategy.model(x).detach()))
    assert i == 2 * TASKS - 1
    assert set(drift.drift()) == set(range(TASKS))
    now = [float((strategy.model(x).detach() - kept).abs().max()) for x, kept in learnt]
    assert drift.drift()[0] >= now[0] > 0
    assert drift.drift()[2] == now[2] == 0


def test_parts_that_cannot_be_watched_are_refused() -> None:
    bench = benchmark()
    (part, *_) = split_online_stream(bench.train_stream, 20, access_task_boundaries=True)
    strategy = with_metric(LogitDrift("train_online"))
    strategy.train(part, eval_streams=[])
    with pytest.raises(ValueError, match="watches whole experiences"):
        strategy.eval([part])
    mixed = split_continuous_linear_decay_stream(bench.train_stream, 20, 3, 1.0, False)
    with pytest.raises(ValueError, match="are of several"):
        strategy.train(next(iter(mixed)), eval_streams=[])


def test_all_that_is_learnt_at_once_is_watched() -> None:
    drift, bench = LogitDrift(), benchmark()
    model = nn.Linear(8, 4)
    strategy = JointTraining(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=8,
        eval_mb_size=ROWS,
        evaluator=EvaluationPlugin(drift, loggers=[]),
    )
    strategy.train(bench.train_stream, eval_streams=[])
    strategy.eval(bench.test_stream)
    assert drift.drift() == dict.fromkeys(range(TASKS), 0.0)


def test_a_probe_of_other_samples_is_told_and_counts_as_unknown() -> None:
    drift, bench = LogitDrift(), benchmark()
    strategy = with_metric(drift)
    strategy.train(bench.train_stream[0], eval_streams=[])
    strategy.eval(bench.test_stream)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="evaluate in a fixed order"):
        strategy.eval(bench.test_stream, shuffle=True)
    assert math.isnan(drift.drift()[0])


class Outputs(nn.Module):
    """A linear layer whose output is something else than logits (N, C)."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.layer, self.change = nn.Linear(8, 4), change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.layer(x))


def test_outputs_that_are_no_tensor_are_named() -> None:
    model = Outputs(lambda y: (y, y))
    strategy = with_metric(LogitDrift(), model=model)
    strategy._criterion = lambda out, y: nn.functional.cross_entropy(out[0], y)
    bench = benchmark()
    strategy.train(bench.train_stream[0], eval_streams=[])
    with pytest.raises(TypeError, match="returns a tuple"):
        strategy.eval(bench.test_stream)


def test_one_number_a_sample_is_watched_too() -> None:
    drift, bench = LogitDrift(), benchmark()
    strategy = with_metric(drift, model=Outputs(lambda y: y.sum(1)))
    strategy._criterion = lambda out, y: ((out - y) ** 2).mean()
    for size, experience in zip((ROWS, 3, 20), bench.train_stream, strict=True):
        strategy.eval_mb_size = size
        strategy.train(experience, eval_streams=[])
        strategy.eval(bench.test_stream)
    assert drift.drift()[0] > 0 == drift.drift()[2]


def test_weights_that_stay_drift_by_zero_and_the_smallest_change_is_seen() -> None:
    drift = LogitDrift()
    learn(with_metric(drift, lr=0.0))
    assert drift.drift() == dict.fromkeys(range(TASKS), 0.0)

    drift = LogitDrift()
    strategy = with_metric(drift, lr=0.0)
    bench = benchmark()
    strategy.train(bench.train_stream[0], eval_streams=[])
    strategy.eval(bench.test_stream)
    bias = strategy.model[2].bias
    with torch.no_grad():
        bias.copy_(torch.nextafter(bias, torch.tensor(9.0)))
    strategy.eval(bench.test_stream)
    assert 0 < drift.result() < 1e-6


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_any_more_have_drifted_without_bound(value: float) -> None:
    drift = LogitDrift()
    strategy, bench = with_metric(drift, lr=0.0), benchmark()
    strategy.train(bench.train_stream[0], eval_streams=[])
    strategy.eval(bench.test_stream)
    with torch.no_grad():
        strategy.model[2].bias[0] = value
    strategy.eval(bench.test_stream)
    assert drift.drift()[0] == math.inf


def test_equal_infinities_hide_no_change() -> None:
    drift = LogitDrift()
    strategy, bench = with_metric(drift, lr=0.0), benchmark()
    with torch.no_grad():
        strategy.model[2].bias[0] = -math.inf
    strategy.train(bench.train_stream[0], eval_streams=[])
    strategy.eval(bench.test_stream)
    strategy.eval(bench.test_stream)
    assert drift.drift()[0] == 0
    with torch.no_grad():
        strategy.model[2].bias[1] += 0.5
    strategy.eval(bench.test_stream)
    assert drift.drift()[0] == pytest.approx(0.5)


def test_what_is_trained_again_is_learnt_anew() -> None:
    drift = LogitDrift()
    strategy, bench = with_metric(drift), benchmark()
    for _ in range(2):
        strategy.train(bench.train_stream[0], eval_streams=[])
        strategy.eval(bench.test_stream)
        assert drift.drift() == {0: 0.0}
    strategy.train(bench.train_stream[1], eval_streams=[])
    strategy.eval(bench.test_stream)
    assert drift.drift()[0] > 0


def test_evaluation_within_training_alone_is_enough() -> None:
    """Avalanche evaluates before it trains again, so nothing is missed."""
    drift, bench = LogitDrift(), benchmark()
    strategy = with_metric(drift, eval_every=1)
    learnt = []
    for experience in bench.train_stream:
        strategy.train(experience, eval_streams=[bench.valid_stream, bench.test_stream])
        x = torch.stack([bench.test_stream[0].dataset[i][0] for i in range(ROWS)])
        learnt.append(strategy.model(x).detach())
    assert torch.equal(drift.state_dict()["reference"][0], learnt[0])
    assert drift.drift()[0] == max(float((now - learnt[0]).abs().max()) for now in learnt)


def test_what_was_evaluated_too_late_is_unknown() -> None:
    drift = LogitDrift()
    strategy, bench = with_metric(drift), benchmark()
    for experience in bench.train_stream:
        strategy.train(experience, eval_streams=[])
    values = strategy.eval(bench.test_stream)
    strategy.eval(bench.test_stream)
    assert drift.drift() == pytest.approx({0: math.nan, 1: math.nan, 2: 0.0}, nan_ok=True)
    assert math.isnan(values["LogitDrift"])


def test_without_a_look_at_the_stream_there_is_no_value() -> None:
    drift = LogitDrift()
    values = learn(with_metric(drift), ["valid"])
    assert "LogitDrift" not in values[0]
    assert math.isnan(drift.result())


def test_other_batches_are_compared_as_far_as_they_reach() -> None:
    drift, same = LogitDrift(), LogitDrift()
    strategy, bench = with_metric(drift, lr=0.0), benchmark()
    for size, experience in zip((ROWS, 3, 20), bench.train_stream, strict=True):
        strategy.eval_mb_size = size
        strategy.train(experience, eval_streams=[])
        strategy.eval(bench.test_stream)
    learn(with_metric(same, lr=0.0))
    assert drift.drift() == pytest.approx(same.drift(), abs=1e-5)


def test_state_goes_on_where_it_was() -> None:
    whole, first, second = LogitDrift(), LogitDrift(), LogitDrift()
    learn(with_metric(whole))
    bench, strategy = benchmark(), with_metric(first)
    strategy.train(bench.train_stream[0], eval_streams=[])
    strategy.eval(bench.test_stream)
    second.load_state_dict(first.state_dict())
    strategy.evaluator.metrics[:] = [second]
    for experience in bench.train_stream[1:]:
        strategy.train(experience, eval_streams=[])
        strategy.eval(bench.test_stream)
    assert second.drift() == whole.drift()


def test_a_new_base_hides_nothing() -> None:
    """Before and after it forgetting counts from the same logits."""
    found = []
    for rebases in (False, True):
        drift, bench = LogitDrift(), benchmark()
        strategy = with_metric(drift)
        for experience in bench.train_stream:
            strategy.train(experience, eval_streams=[])
            strategy.eval(bench.test_stream)
            if rebases:
                drift.rebase()
            strategy.eval(bench.test_stream)
        found.append(drift.drift())
    assert found[0] == found[1]
    assert found[0][0] > 0


def test_a_stream_in_place_of_its_name_is_refused() -> None:
    """Or nothing would be watched, and the drift be nan without a word."""
    with pytest.raises(TypeError, match="give the name of the stream"):
        LogitDrift(benchmark().test_stream)
