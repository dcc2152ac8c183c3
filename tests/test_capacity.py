"""Reused units by hand, and the table's columns and sums."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Avalanche's own imports warn of
    from clnp.capacity import (
        Sufficiency,
        ablated,
        capacity_table,
        reused,
        sufficiency,
        sufficiency_table,
    )
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


def reused_units(*args: Any) -> dict[str, int]:
    return {group: int(units.sum()) for group, units in reused(*args).items()}


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


ONES = {"a": torch.ones(5, dtype=torch.float64), "b": torch.ones(4, dtype=torch.float64)}


def test_sufficiency_by_hand() -> None:
    """Units 0 to 2 of a, and 0 of b, are older; unit 3 of a, and 1 to 3 of b, are new.

    The new rows of b read, weighted by E[a] = 1, 2, 0, 4: of old ones 1 + 4 = 5 and of the new one
    0.05 (a share of 0.0099); 0 and 4; 1 and 4.
    """
    modules = layers(
        b=[
            [9.0, 9.0, 9.0, 0.0, 0.0],
            [-1.0, 2.0, 7.0, 0.0125, 9.0],  # column 2 is silent, column 4 free
            [0.0, 0.0, 7.0, -1.0, 9.0],
            [1.0, 0.0, 0.0, 1.0, 9.0],
        ],
        head=torch.ones(2, 4).tolist(),
    )
    before, after = {"a": 3, "b": 1}, {"a": 4, "b": 4}
    activity = ONES | {"a": torch.tensor([1.0, 2.0, 0.0, 4.0, 7.0], dtype=torch.float64)}

    def shares(*share: float) -> dict[str, Sufficiency | None]:
        return sufficiency(modules, LAYOUT, before, after, activity, *share)

    assert shares() == {"a": None, "b": Sufficiency(1 / 3, 1 / 3)}
    assert shares(0.0099) == {"a": None, "b": Sufficiency(0.0, 1 / 3)}
    assert shares(0.2) == {"a": None, "b": Sufficiency(1 / 3, 2 / 3)}  # exactly the share counts


def test_sufficiency_without_new_or_old_or_any_input() -> None:
    modules = layers(b=torch.ones(4, 5).tolist(), head=torch.ones(2, 4).tolist())
    used = {"a": 3, "b": 2}
    assert sufficiency(modules, LAYOUT, used, used, ONES) == {"a": None, "b": None}
    first = sufficiency(modules, LAYOUT, NOTHING, used, ONES)
    assert first == {"a": None, "b": Sufficiency(0.0, 1.0)}
    silent = {"a": torch.zeros(5), "b": torch.ones(4)}
    neither = sufficiency(modules, LAYOUT, NOTHING, used, silent)
    assert neither == {"a": None, "b": Sufficiency(0.0, 0.0)}


@pytest.mark.parametrize(("through", "old_only"), [("b", 0.0), ("c", 0.0), (None, 1.0)])
def test_what_a_unit_reads_through_several_writers_adds_up(
    through: str | None, old_only: float
) -> None:
    """Units of b are computed by a convolution and, behind a flatten, by a linear layer."""
    layout = Layout(
        (
            UnitGroup("a", 3, (Part("a"),), (), (Part("b"), Part("c", 4))),
            UnitGroup("b", 2, (Part("b"), Part("c")), (), (Part("head"),)),
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
        modules["c"].weight[1, 4:8] = 1.0  # unit 1 of a, older: 4 columns
        if through == "b":
            modules["b"].weight[1, 2] = 0.0125  # unit 2, new: 4 positions
        if through == "c":
            modules["c"].weight[1, 11] = 0.05
    ones = {"a": torch.ones(3), "b": torch.ones(2)}
    found = sufficiency(modules, layout, {"a": 2, "b": 1}, {"a": 3, "b": 2}, ones)
    assert found["b"] == Sufficiency(old_only, 0.0)


def test_sufficiency_beside_the_networks_input_is_unknown() -> None:
    layout = Layout(LAYOUT.groups, "head", LAYOUT.order, inputs=(Part("b", 2, 5),))
    modules = layers(b=torch.ones(4, 5).tolist(), head=torch.ones(2, 4).tolist())
    used = {"a": 3, "b": 2}
    assert sufficiency(modules, layout, NOTHING, used, ONES) == {"a": None, "b": None}


def test_ablation_cuts_what_new_rows_and_the_head_read_and_restores_it_bitwise() -> None:
    modules = layers(b=torch.full((4, 5), 0.1).tolist(), head=torch.full((2, 4), 0.3).tolist())
    with torch.no_grad():
        modules["b"].weight[2, 0] = -0.0  # bits that zero + difference would not bring back
        modules["b"].weight[2, 1] = 1e-45
    saved = {name: module.weight.detach().clone() for name, module in modules.items()}
    before, after = {"a": 3, "b": 2}, {"a": 4, "b": 3}
    kept = {"a": torch.tensor([False, False, True]), "b": torch.tensor([True, False])}

    def check(start: int, head: Tensor) -> None:
        with ablated(modules, LAYOUT, before, after, {"a": 0, "b": start}, kept):
            expected = saved["b"].clone()
            expected[2, :2] = 0.0  # the new row; older and free ones are as they were
            assert torch.equal(modules["b"].weight, expected)
            assert torch.equal(modules["head"].weight, head)
            raise ZeroDivisionError

    cut = saved["head"].clone()
    cut[:, 1] = 0.0
    # A single head's older columns are those of older tasks: not this one's to cut.
    for start, head in ((0, cut), (2, saved["head"])):
        with pytest.raises(ZeroDivisionError):
            check(start, head)
        for name, module in modules.items():
            bits = module.weight.detach().view(torch.int32)
            assert torch.equal(bits, saved[name].view(torch.int32))


def test_ablation_behind_a_flatten_cuts_all_of_a_units_columns() -> None:
    layout = Layout(
        (
            UnitGroup("a", 3, (Part("a"),), (), (Part("b", 2, 1),)),
            UnitGroup("b", 2, (Part("b"),), (), (Part("head"),)),
        ),
        "head",
        ("a", "b", "head"),
        inputs=(Part("b", 1),),
    )
    modules = {"a": nn.Linear(1, 3), "b": nn.Linear(7, 2), "head": nn.Linear(2, 2)}
    with torch.no_grad():
        modules["b"].weight.fill_(1.0)
    kept = {"a": torch.tensor([True, False]), "b": torch.tensor([True])}
    with ablated(modules, layout, {"a": 2, "b": 1}, {"a": 3, "b": 2}, NOTHING, kept):
        assert modules["b"].weight.tolist() == [[1.0] * 7, [1, 1, 1, 0, 0, 1, 1]]


def test_sufficiency_table() -> None:
    partition = Partition({"a": 10, "b": 4}, {"a": [0, 3, 5], "b": [0, 4, 4]})
    found = [{"a": None, "b": Sufficiency(0.0, 1.0)}, {"a": Sufficiency(0.5, 0.0), "b": None}]
    table = sufficiency_table(partition, [7, "second"], found)
    assert list(table.columns) == ["task", "layer", "new", "old_only", "new_only"]
    assert table.astype(object).where(table.notna(), None).to_numpy().tolist() == [
        [7, "a", 3, None, None],
        [7, "b", 4, 0.0, 1.0],
        ["second", "a", 2, 0.5, 0.0],
        ["second", "b", 0, None, None],
    ]
    assert sufficiency_table(Partition({"a": 3}), [], []).empty


@pytest.mark.parametrize(("share", "units", "accuracy"), [(0.01, 1, 1.0), (1.0, 0, 0.5)])
def test_a_wrong_share_shows_in_the_ablation(share: float, units: int, accuracy: float) -> None:
    """The class is whether x_0 > 1/2; the new unit of b reads it by older unit 0, and noise of 1.

    Unit 1's share is 0.1 %: 1 % is right to leave it out. Were all but the largest left out, unit
    0 would go (nothing exceeds 100 % of the largest), and one class remains.
    """
    modules: dict[str, nn.Module] = {
        "a": nn.Linear(2, 3),
        "b": nn.Linear(3, 2),
        "head": nn.Linear(2, 2),
    }
    weights = {
        "a": [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]],
        "b": [[5.0, 5.0, 0.0], [1.0, 0.001, 0.0]],
        "head": [[0.0, 0.0], [0.0, 1.0]],
    }
    with torch.no_grad():
        for name, rows in weights.items():
            modules[name].weight.copy_(torch.tensor(rows))
            modules[name].bias.zero_()
        modules["head"].bias.copy_(torch.tensor([0.5, 0.0]))
    layout = Layout(
        (
            UnitGroup("a", 3, (Part("a"),), (), (Part("b"),)),
            UnitGroup("b", 2, (Part("b"),), (), (Part("head"),)),
        ),
        "head",
        ("a", "b", "head"),
    )
    network = nn.Sequential(modules["a"], nn.ReLU(), modules["b"], nn.ReLU(), modules["head"])
    x = torch.tensor([[0.0, 1.0], [0.2, 0.0], [0.8, 1.0], [1.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 1])
    activity = {"a": torch.tensor([0.5, 0.5, 0.0]), "b": torch.tensor([5.0, 0.5])}
    before, after, start = {"a": 2, "b": 1}, {"a": 2, "b": 2}, {"a": 0, "b": 1}
    kept = reused(modules, layout, before, after, start, activity, share)
    assert int(kept["a"].sum()) == units
    with ablated(modules, layout, before, after, start, kept):
        assert float((network(x).argmax(1) == labels).double().mean()) == accuracy
    assert float((network(x).argmax(1) == labels).double().mean()) == 1.0
