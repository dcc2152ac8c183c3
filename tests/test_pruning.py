"""Exact counts at ties and edges, the shares of the margin, and activity by direct computation."""

import math
import warnings
from collections.abc import Callable
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Avalanche's own imports warn of
    from clnp import CLNPError
    from clnp.layout import Layout, Part, UnitGroup
    from clnp.pruning import Activity, Cut, graceful_forgetting, ladder, sorting

Counts = dict[str, int]


def falling(*values: float) -> Tensor:
    return torch.tensor(sorted(values, reverse=True), dtype=torch.float64)


class Accuracies:
    """Validation accuracy as a made function of the counts; remembers what was asked."""

    def __init__(self, function: Callable[[Counts], float]) -> None:
        self.function = function
        self.asked: list[Counts] = []

    def __call__(self, counts: Counts) -> float:
        self.asked.append(dict(counts))
        return self.function(counts)


def cut(
    activity: dict[str, Tensor],
    function: Callable[[Counts], float],
    best: float,
    margin: float,
    used: Counts | None = None,
    floors: Counts | None = None,
    thresholds: str = "per-layer",
    **below: str,
) -> tuple[Cut, Accuracies]:
    accuracies = Accuracies(function)
    found = graceful_forgetting(
        activity,
        used or dict.fromkeys(activity, 0),
        floors or dict.fromkeys(activity, 1),
        accuracies,
        best,
        margin,
        thresholds,
        **below,
    )
    # Whatever is returned has been seen, once, and its thresholds give its counts.
    assert found.used in accuracies.asked
    assert found.accuracy == function(found.used)
    assert found.living == function(accuracies.asked[0])  # no living unit cut yet
    assert found.evaluations == len(accuracies.asked)
    assert len({tuple(counts.values()) for counts in accuracies.asked}) == found.evaluations
    return found, accuracies


# -- sorting -------------------------------------------------------------------------------------


def test_used_units_stay_and_free_ones_fall() -> None:
    order = sorting(torch.tensor([0.0, 9.0, 1.0, 3.0, 3.0, 0.0, 5.0]), used=2)
    assert order.tolist() == [0, 1, 6, 3, 4, 2, 5]
    assert order.dtype == torch.int64
    assert sorting(torch.tensor([1.0, 2.0]), used=2).tolist() == [0, 1]
    assert sorting(torch.tensor([1.0, 2.0]), used=0).tolist() == [1, 0]


# -- rungs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activity", "used", "floor", "counts", "thresholds"),
    [
        # each unit apart: theta is the activity of the first unit cut, which is not > theta
        ([3.0, 2.0, 1.0], 0, 0, (0, 1, 2, 3), (3.0, 2.0, 1.0, 0.0)),
        # dead units are never kept
        ([3.0, 2.0, 0.0, 0.0], 0, 0, (0, 1, 2), (3.0, 2.0, 0.0)),
        # units of equal activity stay together
        ([3.0, 2.0, 2.0, 2.0, 1.0], 0, 0, (0, 1, 4, 5), (3.0, 2.0, 1.0, 0.0)),
        ([2.0, 2.0], 0, 0, (0, 2), (2.0, 0.0)),
        # the floor cuts the ladder from below, and ties rise above it
        ([3.0, 2.0, 1.0], 0, 1, (1, 2, 3), (2.0, 1.0, 0.0)),
        ([2.0, 2.0, 1.0], 0, 1, (2, 3), (1.0, 0.0)),
        ([2.0, 2.0, 2.0], 0, 1, (3,), (0.0,)),
        # all dead: one unit remains where a layer needs one, none where older ones do
        ([0.0, 0.0], 0, 1, (1,), (0.0,)),
        ([0.0, 0.0], 0, 0, (0,), (0.0,)),
        ([9.0, 0.0, 0.0], 1, 1, (1,), (0.0,)),
        ([9.0, 0.0, 0.0], 1, 2, (2,), (0.0,)),
        # older units count, whatever their activity
        ([0.0, 0.0, 2.0, 1.0], 2, 1, (2, 3, 4), (2.0, 1.0, 0.0)),
        ([0.0, 0.0, 2.0, 1.0], 2, 3, (3, 4), (1.0, 0.0)),
        # one unit, and a full layer
        ([1.0], 0, 1, (1,), (0.0,)),
        ([1.0, 2.0], 2, 1, (2,), (0.0,)),
    ],
)
def test_rungs(
    activity: list[float],
    used: int,
    floor: int,
    counts: tuple[int, ...],
    thresholds: tuple[float, ...],
) -> None:
    rungs = ladder(torch.tensor(activity, dtype=torch.float64), used, floor)
    assert rungs.counts == counts
    assert rungs.thresholds == thresholds


@settings(max_examples=40)
@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0]), min_size=1, max_size=12),
    st.integers(0, 4),
)
def test_each_rung_is_its_threshold(values: list[float], used: int) -> None:
    used = min(used, len(values))
    free = sorted(values[used:], reverse=True)
    rungs = ladder(torch.tensor([*values[:used], *free], dtype=torch.float64), used, 0)
    for count, theta in zip(rungs.counts, rungs.thresholds, strict=True):
        assert count == used + sum(a > theta for a in free)
    # and no threshold gives a count that isn't a rung
    for theta in {0.0, *free}:
        assert used + sum(a > theta for a in free) in rungs.counts
    assert list(rungs.counts) == sorted(set(rungs.counts))


# -- the cut -------------------------------------------------------------------------------------


def test_no_margin_still_cuts_what_costs_nothing() -> None:
    found, _ = cut({"a": falling(5, 4, 3, 2, 1)}, lambda c: 0.9 if c["a"] >= 3 else 0.8, 0.9, 0.0)
    assert found.used == {"a": 3}
    assert found.thresholds == {"a": 2.0}
    assert found.accuracy == 0.9


def test_no_margin_cuts_nothing_but_the_dead_if_every_unit_counts() -> None:
    found, _ = cut({"a": falling(5, 4, 3, 0, 0)}, lambda c: c["a"] / 3, 1.0, 0.0)
    assert found.used == {"a": 3}
    assert found.thresholds == {"a": 0.0}


def test_the_bound_itself_is_within_the_margin() -> None:
    """0.9703 - 0.0005 is above 0.9698 in floating point: a drop of just the margin is allowed."""
    accuracy = {5: 0.9703, 4: 0.9699, 3: 0.9698, 2: 0.9697, 1: 0.1}
    found, _ = cut({"a": falling(5, 4, 3, 2, 1)}, lambda c: accuracy[c["a"]], 0.9703, 0.0005)
    assert found.used == {"a": 3}


@pytest.mark.parametrize("thresholds", ["per-layer", "shared"])
def test_a_model_below_the_bound_loses_dead_units_alone_if_told(thresholds: str) -> None:
    activity = {"a": falling(3, 2, 0, 0), "b": falling(1, 1, 0)}
    found, accuracies = cut(activity, lambda c: 0.5, 0.9, 0.1, thresholds=thresholds, below="dead")
    assert found.used == {"a": 2, "b": 2}
    assert found.thresholds == {"a": 0.0, "b": 0.0}
    assert len(accuracies.asked) == 1


@pytest.mark.parametrize("thresholds", ["per-layer", "shared"])
def test_a_model_below_the_bound_loses_what_costs_nothing_more(thresholds: str) -> None:
    activity = {"a": falling(3, 3, 2, 0, 0), "b": falling(3, 1, 0)}
    for least in (3, 2):  # units of a that count
        found, _ = cut(
            activity,
            lambda c, least=least: 0.5 if c["a"] >= least else 0.49,  # type: ignore[misc]
            0.9,
            0.1,
            thresholds=thresholds,
        )
        assert (found.used, found.accuracy) == ({"a": least, "b": 1}, 0.5)


def test_an_image_that_flips_as_dead_units_go_keeps_no_others() -> None:
    """The epoch kept is just within the margin; what is left of it rounds to one image less."""
    activity = {"a": falling(5, 4, 3, 2, 1, 0)}
    found, _ = cut(activity, lambda c: 0.9815 if c["a"] >= 2 else 0.9, 0.9821, 0.0005)
    assert (found.used, found.accuracy) == ({"a": 2}, 0.9815)


@pytest.mark.parametrize("thresholds", ["per-layer", "shared"])
def test_all_units_dead(thresholds: str) -> None:
    activity = {"a": torch.zeros(4), "b": torch.zeros(3)}
    found, _ = cut(activity, lambda c: 0.1, 0.1, 0.5, thresholds=thresholds)
    assert found.used == {"a": 1, "b": 1}
    found, _ = cut(
        activity,
        lambda c: 0.1,
        0.1,
        0.5,
        used={"a": 2, "b": 3},
        floors={"a": 1, "b": 1},
        thresholds=thresholds,
    )
    assert found.used == {"a": 2, "b": 3}


@pytest.mark.parametrize("thresholds", ["per-layer", "shared"])
def test_one_unit_is_left_where_accuracy_never_falls(thresholds: str) -> None:
    activity = {"a": falling(*range(1, 9)), "b": falling(*range(1, 5))}
    found, _ = cut(activity, lambda c: 0.9, 0.9, 0.0, thresholds=thresholds)
    assert found.used == {"a": 1, "b": 1}


def test_equal_activities_are_never_separated() -> None:
    activity = {"a": falling(4, 3, 3, 3, 2, 2, 1)}
    asked = set()
    for least in range(1, 8):
        accuracy = [0.9 if n >= least else 0.0 for n in range(8)]
        found, accuracies = cut(activity, lambda c, a=accuracy: a[c["a"]], 0.9, 0.1)  # type: ignore[misc]
        asked |= {counts["a"] for counts in accuracies.asked}
        assert found.used["a"] == min(n for n in (1, 4, 6, 7) if n >= least)
    assert asked == {1, 4, 6, 7}


def test_shares_of_the_margin_layer_by_layer() -> None:
    """Each unit costs 0.01: the last layer may take m/3, the next 2m/3 in all, the first m."""
    activity = {name: falling(*range(1, 101)) for name in "abc"}
    found, accuracies = cut(
        activity, lambda c: 1 - 0.01 * sum(100 - n for n in c.values()), 1.0, 0.30
    )
    assert found.used == {"a": 90, "b": 90, "c": 90}
    firsts = {}
    for counts in accuracies.asked:
        for name in counts:
            if counts[name] < 100:
                firsts.setdefault(name, dict(counts))
    assert list(firsts) == ["c", "b", "a"]
    assert firsts["b"]["c"] == 90
    assert firsts["a"]["b"] == 90


def test_a_second_pass_spends_what_is_left() -> None:
    """The first layer can't be cut at all, so that the last takes its share as well."""

    def accuracy(c: Counts) -> float:
        return 0.0 if c["a"] < 100 else 1 - 0.01 * (100 - c["b"])

    activity = {name: falling(*range(1, 101)) for name in "ab"}
    found, _ = cut(activity, accuracy, 1.0, 0.30)
    assert found.used == {"a": 100, "b": 70}


def test_a_layer_waits_for_its_share() -> None:
    """Living units alone are 0.2 below the best: too much for the last layer's first cut."""
    activity = {name: falling(*range(1, 11)) for name in "ab"}

    def accuracy(c: Counts) -> float:
        return 0.8 - 0.01 * (20 - c["a"] - c["b"])

    found, accuracies = cut(activity, accuracy, 1.0, 0.3)
    assert accuracies.asked[1]["b"] == 10  # a was cut first
    assert found.used == {"a": 1, "b": 9}


@settings(max_examples=40)
@given(
    st.randoms(use_true_random=False),
    st.sampled_from(["per-layer", "shared"]),
    st.sampled_from(["harmless", "dead"]),
)
def test_accuracy_that_is_not_monotone(random: Random, thresholds: str, below: str) -> None:
    table: dict[tuple[int, ...], float] = {}

    def accuracy(c: Counts) -> float:
        return table.setdefault(tuple(c.values()), random.randint(0, 20) / 20)

    activity = {
        name: falling(*(random.randint(0, 6) for _ in range(random.randint(1, 12))))
        for name in "abc"
    }
    best, margin = random.randint(5, 20) / 20, random.choice([0.0, 0.1, 0.3])
    found, accuracies = cut(activity, accuracy, best, margin, thresholds=thresholds, below=below)
    uncut = accuracies.function(accuracies.asked[0])
    if uncut >= best - margin - 1e-9:
        assert found.accuracy >= best - margin - 1e-9
    elif below == "harmless":
        assert found.accuracy >= uncut - 1e-9
    else:
        assert found.used == accuracies.asked[0]


def test_evaluations_grow_with_the_logarithm() -> None:
    width = 2000
    activity = {name: falling(*range(1, width + 1)) for name in "ab"}

    def accuracy(c: Counts) -> float:
        return 1 - 0.5 * (2 - (c["a"] + c["b"]) / width)

    found, _ = cut(activity, accuracy, 1.0, 0.2)
    assert found.evaluations <= 1 + 4 * math.ceil(math.log2(width))
    found, _ = cut(activity, accuracy, 1.0, 0.2, thresholds="shared")
    assert found.evaluations <= 2 + math.ceil(math.log2(2 * width + 1))


def test_one_theta_for_all_layers() -> None:
    activity = {"a": falling(8, 6, 4, 2), "b": falling(7, 5, 3, 1)}
    found, accuracies = cut(
        activity,
        lambda c: 1.0 if c["a"] >= 2 and c["b"] >= 2 else 0.0,
        1.0,
        0.1,
        thresholds="shared",
    )
    assert found.used == {"a": 2, "b": 2}
    for counts in accuracies.asked:
        assert any(
            counts == {n: max(1, int((a > theta).sum())) for n, a in activity.items()}
            for theta in range(9)
        )


def test_units_as_active_as_the_one_theta_are_cut_in_every_layer() -> None:
    activity = {"a": falling(4, 2, 2, 1), "b": falling(3, 2, 0)}
    accuracy = {(4, 2): 1.0, (3, 2): 1.0, (1, 1): 0.9, (1, 0): 0.5, (0, 0): 0.1}
    for margin, used, theta in ((0.0, (3, 2), 1.0), (0.1, (1, 1), 2.0), (0.9, (0, 0), 4.0)):
        found, _ = cut(
            activity,
            lambda c: accuracy[c["a"], c["b"]],
            1.0,
            margin,
            floors={"a": 0, "b": 0},
            thresholds="shared",
        )
        assert tuple(found.used.values()) == used
        assert all(t <= theta for t in found.thresholds.values())
        for name, units in found.used.items():
            assert units == (activity[name] > theta).sum()


def test_one_theta_keeps_the_floors() -> None:
    """A layer whose units are all weak keeps one, while the others are cut at a high theta."""
    activity = {"a": falling(800, 600, 400), "b": falling(0.3, 0.2)}
    found, _ = cut(activity, lambda c: 1.0, 1.0, 0.0, thresholds="shared")
    assert found.used == {"a": 1, "b": 1}


def test_older_units_are_never_cut() -> None:
    activity = {"a": torch.tensor([0.0, 0.0, 3.0, 2.0, 1.0])}
    found, _ = cut(activity, lambda c: 1.0, 1.0, 0.0, used={"a": 2}, floors={"a": 1})
    assert found.used == {"a": 2}  # a task may need no new unit
    found, _ = cut(activity, lambda c: 1.0, 1.0, 0.0, used={"a": 2}, floors={"a": 3})
    assert found.used == {"a": 3}


@pytest.mark.parametrize("name", ["thresholds", "below"])
def test_a_misspelt_choice_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 'ded'"):
        graceful_forgetting(
            {"a": falling(1)}, {"a": 0}, {"a": 1}, lambda c: 1.0, 1.0, 0.1, **{name: "ded"}
        )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_task_is_refused(value: float) -> None:
    activity = {"a": falling(1, 2), "b": torch.tensor([value, 1.0])}
    with pytest.raises(CLNPError, match=r"layer 'b'.*diverged"):
        graceful_forgetting(activity, {"a": 0, "b": 0}, {"a": 1, "b": 1}, lambda c: 1.0, 1.0, 0.1)


# -- activity ------------------------------------------------------------------------------------


class Watched(nn.Module):
    """Channels read by two layers, by one of them behind a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 4, 2)
        self.c, self.head = nn.Linear(6 * 9, 4), nn.Linear(4, 3)
        self.read: dict[str, list[Tensor]] = {"b": [], "c": [], "head": []}

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)  # below 0 too: what counts is |a|
        self.read["b"].append(h.detach())
        flat = torch.tanh(h).flatten(1)
        self.read["c"].append(flat.detach())
        h = torch.relu(self.b(h).mean((2, 3)) + self.c(flat))
        self.read["head"].append(h.detach())
        return self.head(h)  # type: ignore[no-any-return]


LAYOUT = Layout(
    (
        UnitGroup("a", 6, (Part("a"),), (), (Part("b", 1), Part("c", 9))),
        UnitGroup("b", 4, (Part("b"), Part("c")), (), (Part("head", 1),)),
    ),
    "head",
    ("a", "b", "c", "head"),
)


def test_activity_is_the_largest_mean_of_what_readers_read() -> None:
    model, activity = Watched().eval(), Activity(LAYOUT)
    with activity.measure(model, {"a": 0, "b": 0}), torch.no_grad():
        for size in (5, 3, 1):  # unequal batches weigh by their size
            model(torch.randn(size, 2, 5, 5))
    conv = torch.cat(model.read["b"]).double().abs().mean((0, 2, 3))
    flat = torch.cat(model.read["c"]).double().unflatten(1, (6, 9)).abs().mean((0, 2))
    head = torch.cat(model.read["head"]).double().abs().mean(0)
    found = activity.means()
    torch.testing.assert_close(found["a"], torch.maximum(conv, flat), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found["b"], head, rtol=1e-5, atol=1e-7)
    assert found["a"].dtype == torch.float64
    model(torch.randn(4, 2, 5, 5))  # outside, nothing is measured
    assert torch.equal(activity.means()["a"], found["a"])


def test_a_reader_that_sees_more_sets_the_activity() -> None:
    model, activity = Watched().eval(), Activity(LAYOUT)
    with torch.no_grad():
        model.a.weight.mul_(100)  # tanh saturates: the convolution reads more
    with activity.measure(model, {"a": 0, "b": 0}), torch.no_grad():
        model(torch.randn(8, 2, 5, 5))
    assert (activity.means()["a"] > 1.5).all()


def test_activity_of_units_in_the_last_dimension() -> None:
    layout = Layout((UnitGroup("0", 4, (Part("0"),), (), (Part("1", 1),)),), "1", ("0", "1"))
    model, activity = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), Activity(layout)
    x = torch.randn(5, 7, 3)
    with activity.measure(model, {"0": 0}), torch.no_grad():
        model(x)
        expected = model[0](x).abs().double().mean((0, 1))
    torch.testing.assert_close(activity.means()["0"], expected, rtol=1e-5, atol=1e-7)


def test_activity_of_a_part_of_the_units() -> None:
    """A single head's view computes the last layer from a frontier on."""
    layout = Layout((UnitGroup("0", 6, (Part("0"),), (), (Part("1", 1),)),), "1", ("0", "1"))
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    activity = Activity(layout)
    with activity.measure(model, {"0": 2}), torch.no_grad():
        model(torch.randn(5, 3))
    means = activity.means()["0"]
    assert (means[:2] == 0).all()
    assert (means[2:] > 0).all()


def test_the_hooks_are_removed_after_an_error() -> None:
    model, activity = Watched(), Activity(LAYOUT)
    with pytest.raises(RuntimeError), activity.measure(model, {"a": 0, "b": 0}):
        model(torch.randn(1, 5, 5, 5))
    assert not any(module._forward_pre_hooks for module in model.modules())
