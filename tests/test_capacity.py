"""Reused units by hand, and the table's columns and sums."""

import warnings

import pytest
import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Avalanche's own imports warn of
    from clnp.capacity import capacity_table, reused_units
    from clnp.layout import Layout, Part, UnitGroup
    from clnp.partition import Partition

LAYOUT = Layout(
    (
        UnitGroup("a", 5, (Part("a"),), (), (Part("b", 1),)),
        UnitGroup("b", 4, (Part("b"),), (), (Part("head", 1),)),
    ),
    "head",
    ("a", "b", "head"),
)


NOTHING = {"a": 0, "b": 0}


def layers(b: list[list[float]], head: list[list[float]]) -> dict[str, nn.Module]:
    found = {"a": nn.Linear(2, 5), "b": nn.Linear(5, 4), "head": nn.Linear(4, 2)}
    with torch.no_grad():
        found["b"].weight.copy_(torch.tensor(b))
        found["head"].weight.copy_(torch.tensor(head))
    return dict(found)


def test_reused_by_hand() -> None:
    """Units 0 to 2 of a, and 0 and 1 of b, are older; unit 3 of a and 2 of b are new.

    The new row of b reads |w|·E[a] = 1·1, 3·0.01 = 0.03, 100·0 = 0 of the older units, and 2·2 = 4
    of the new one: 1 % of the largest is 0.04, which only unit 0 exceeds.
    """
    modules = layers(
        b=[
            [9.0, 9.0, 9.0, 0.0, 0.0],
            [9.0, 9.0, 9.0, 0.0, 0.0],
            [-1.0, 3.0, 100.0, 2.0, 50.0],  # column 4 is free: severed, and doesn't count
            [9.0, 9.0, 9.0, 9.0, 9.0],
        ],
        head=[[1.0, 0.001, 2.0, 5.0], [0.0, 0.0, -1.0, 5.0]],
    )
    before, after = {"a": 3, "b": 2}, {"a": 4, "b": 3}
    activity = {
        "a": torch.tensor([1.0, 0.01, 0.0, 2.0, 7.0], dtype=torch.float64),
        "b": torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.float64),
    }

    def count(start: int, share: float) -> dict[str, int]:
        return reused_units(modules, LAYOUT, before, after, {"a": 0, "b": start}, activity, share)

    # A single head reads nothing below its own slice; one of many reads all: 1, 0.001, 3.
    assert count(2, 0.01) == {"a": 1, "b": 0}
    assert count(0, 0.01) == {"a": 1, "b": 1}
    # Exactly the share isn't more than it: 0.03 of 4, 1 of 4.
    assert count(0, 0.0075)["a"] == 1
    assert count(0, 0.0074)["a"] == 2
    assert count(0, 0.25)["a"] == 0
    assert count(0, 0.0) == {"a": 2, "b": 2}
    assert reused_units(modules, LAYOUT, before, after, NOTHING, activity) == count(0, 0.01)


def test_a_task_without_new_rows_reuses_nothing_of_what_they_would_read() -> None:
    modules = layers(b=torch.ones(4, 5).tolist(), head=torch.ones(2, 4).tolist())
    ones = {"a": torch.ones(5), "b": torch.ones(4)}
    used = {"a": 3, "b": 2}
    assert reused_units(modules, LAYOUT, used, used, NOTHING, ones) == {"a": 0, "b": 2}


def test_the_first_task_reuses_nothing() -> None:
    modules = layers(b=torch.ones(4, 5).tolist(), head=torch.ones(2, 4).tolist())
    ones = {"a": torch.ones(5), "b": torch.ones(4)}
    before, after = {"a": 0, "b": 0}, {"a": 3, "b": 2}
    assert reused_units(modules, LAYOUT, before, after, NOTHING, ones) == {"a": 0, "b": 0}


@pytest.mark.parametrize("weight", ["b", "c"])
def test_what_several_readers_read_adds_up(weight: str) -> None:
    """Two readers, one behind a flatten: a unit's columns and readers are summed."""
    layout = Layout(
        (
            UnitGroup("a", 3, (Part("a"),), (), (Part("b", 1), Part("c", 4))),
            UnitGroup("b", 2, (Part("b"), Part("c")), (), (Part("head", 1),)),
        ),
        "head",
        ("a", "b", "c", "head"),
    )
    modules: dict[str, nn.Module] = {
        "a": nn.Conv2d(1, 3, 1),
        "b": nn.Conv2d(3, 2, 2),
        "c": nn.Linear(12, 2),
        "head": nn.Linear(2, 2),
    }
    with torch.no_grad():
        for module in modules.values():
            module.weight.zero_()
        modules["c"].weight[1, 8:] = 1.0  # unit 2, new: 4 columns
        if weight == "b":
            modules["b"].weight[1, 1] = 0.01  # unit 1: 4 positions
            modules["b"].weight[0, 0] = 1.0  # an older row: doesn't count
        else:
            modules["c"].weight[1, 4:8] = 0.01
    ones = {"a": torch.ones(3), "b": torch.ones(2)}
    before, after = {"a": 2, "b": 1}, {"a": 3, "b": 2}

    def count(share: float) -> int:
        return reused_units(modules, layout, before, after, NOTHING, ones, share)["a"]

    assert count(0.009) == 1
    assert count(0.011) == 0


def test_table() -> None:
    partition = Partition({"a": 10, "b": 4}, {"a": [0, 3, 5], "b": [0, 4, 4]})
    table = capacity_table(partition, [7, "second"], [{"a": 0, "b": 0}, {"a": 2, "b": 4}])
    assert list(table.columns) == [
        *("task", "layer", "used", "new", "reused", "free", "used_fraction")
    ]
    assert table.to_numpy().tolist() == [
        [7, "a", 3, 3, 0, 7, 0.3],
        [7, "b", 4, 4, 0, 0, 1.0],
        ["second", "a", 5, 2, 2, 5, 0.5],
        ["second", "b", 4, 0, 4, 0, 1.0],
    ]
    widths = table["layer"].map(partition.widths)
    assert (table["used"] + table["free"] == widths).all()
    assert (table.groupby("layer")["new"].cumsum() == table["used"]).all()


def test_table_before_the_first_task() -> None:
    table = capacity_table(Partition({"a": 3}), [], [])
    assert len(table) == 0
    assert "used_fraction" in table.columns
