"""Sorting, cutting and drawing anew, entry by entry."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Avalanche's own imports warn of
    from clnp.layers import reset
    from clnp.layout import Layout, Part, UnitGroup
    from clnp.partition import Partition, derived_seed, permute, reinitialise, sever

LAYOUT = Layout(
    (
        UnitGroup("conv", 6, (Part("conv"),), (Part("norm"),), (Part("fc", 4),)),
        UnitGroup("fc", 5, (Part("fc"),), (), (Part("head", 1),)),
    ),
    "head",
    ("conv", "norm", "fc", "head"),
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)
        self.fc, self.head = nn.Linear(6 * 4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv(x))).flatten(1)
        return self.head(torch.tanh(self.fc(h)))  # type: ignore[no-any-return]


@pytest.fixture
def model() -> Net:
    net = Net()
    with torch.no_grad():  # as after training: nothing is 0 or 1
        for tensor in (*net.parameters(), net.norm.running_mean, net.norm.running_var):
            assert tensor is not None
            tensor.copy_(torch.rand_like(tensor) + 0.5)
        net.conv.weight.sub_(1.0)
        net.fc.weight.sub_(1.0)
    net.norm.num_batches_tracked.fill_(7)  # type: ignore[union-attr]
    return net


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: model.get_submodule(name) for name in LAYOUT.order}


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# -- frontiers ---------------------------------------------------------------------------------


def test_frontiers() -> None:
    partition = Partition({"a": 10, "b": 4})
    assert partition.tasks == 0
    partition.append({"a": 3, "b": 1})
    partition.append({"a": 3, "b": 4})
    assert partition.frontiers == {"a": [0, 3, 3], "b": [0, 1, 4]}
    assert partition.tasks == 2
    assert partition.before(0) == {"a": 0, "b": 0}
    assert partition.after(0) == partition.before(1) == {"a": 3, "b": 1}
    assert partition.after(1) == {"a": 3, "b": 4}


@pytest.mark.parametrize(
    "used", [{"a": 2, "b": 1}, {"a": 11, "b": 1}, {"a": 3, "b": -1}, {"a": 5}, {"a": 4, "c": 1}]
)
def test_frontiers_out_of_range(used: dict[str, int]) -> None:
    partition = Partition({"a": 10, "b": 4}, {"a": [0, 3], "b": [0, 0]})
    with pytest.raises(ValueError, match=r"layer"):
        partition.append(used)
    assert partition.frontiers == {"a": [0, 3], "b": [0, 0]}


@pytest.mark.parametrize(
    "frontiers",
    [
        {"a": [0, 3], "b": [0]},
        {"a": [0, 3, 2], "b": [0, 1, 2]},
        {"a": [1, 3], "b": [0, 1]},
        {"a": [0, 11], "b": [0, 1]},
        {"a": [], "b": []},
        {"a": [0, 3]},
    ],
)
def test_damaged_frontiers(frontiers: dict[str, list[int]]) -> None:
    with pytest.raises(ValueError, match="frontiers"):
        Partition({"a": 10, "b": 4}, frontiers)


# -- sort --------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    st.sampled_from(LAYOUT.groups).flatmap(
        lambda g: st.tuples(st.just(g), st.permutations(range(g.width)))
    )
)
def test_permuting_keeps_the_function(case: tuple[UnitGroup, list[int]]) -> None:
    group, order = case
    torch.manual_seed(0)
    model = Net().eval()
    model.norm.running_mean.copy_(torch.randn(6))  # type: ignore[union-attr]
    model.norm.running_var.copy_(torch.rand(6) + 0.5)  # type: ignore[union-attr]
    x = torch.randn(3, 2, 4, 4)
    with torch.no_grad():
        before = model(x)
        kept = values(model)
        permute(layers(model), group, torch.tensor(order))
        torch.testing.assert_close(model(x), before)
    if group.name == "conv":
        for name in ("conv.weight", "conv.bias", "norm.running_mean", "norm.running_var"):
            assert torch.equal(model.state_dict()[name], kept[name][order])
        blocks = model.fc.weight.detach().view(5, 6, 4)
        assert torch.equal(blocks, kept["fc.weight"].view(5, 6, 4)[:, order])
    else:
        assert torch.equal(model.fc.weight, kept["fc.weight"][order])
        assert torch.equal(model.head.weight, kept["head.weight"][:, order])


def test_permuting_does_not_reach_other_layers(model: Net) -> None:
    kept = values(model)
    permute(layers(model), LAYOUT.groups[1], torch.tensor([4, 3, 2, 1, 0]))
    for name in kept:
        same = torch.equal(model.state_dict()[name], kept[name])
        assert same == (name not in ("fc.weight", "fc.bias", "head.weight")), name


# -- sever -------------------------------------------------------------------------------------


def test_severing_zeroes_the_interference_alone(model: Net) -> None:
    kept = values(model)
    sever(layers(model), LAYOUT, {"conv": 2, "fc": 3})
    expected = dict(kept)
    expected["fc.weight"] = kept["fc.weight"].clone()
    expected["fc.weight"][:3, 2 * 4 :] = 0
    expected["head.weight"] = kept["head.weight"].clone()
    expected["head.weight"][:, 3:] = 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert (kept["fc.weight"] != 0).all()


# -- draw anew ---------------------------------------------------------------------------------


@pytest.mark.parametrize("used", [{"conv": 2, "fc": 3}, {"conv": 0, "fc": 0}, {"conv": 6, "fc": 5}])
def test_drawing_anew_touches_the_free_rows_alone(model: Net, used: dict[str, int]) -> None:
    kept = values(model)
    reinitialise(layers(model), LAYOUT, used, 3, ("weight",))
    now = model.state_dict()
    for name in ("conv.weight", "conv.bias", "fc.weight", "fc.bias"):
        rows = used[name.split(".")[0]]
        assert torch.equal(now[name][:rows], kept[name][:rows])
        assert (now[name][rows:] != kept[name][rows:]).all()
        if name.endswith("weight") and rows < len(now[name]):  # their own reset_parameters
            bound = now[name][0].numel() ** -0.5
            assert 0.5 * bound < now[name][rows:].abs().max() <= bound
    for name, fresh in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
        tensor = now[f"norm.{name}"]
        assert torch.equal(tensor[: used["conv"]], kept[f"norm.{name}"][: used["conv"]])
        assert (tensor[used["conv"] :] == fresh).all()
    assert now["norm.num_batches_tracked"] == 0
    columns = used["fc"]
    assert torch.equal(now["head.weight"][:, :columns], kept["head.weight"][:, :columns])
    assert (now["head.weight"][:, columns:] != kept["head.weight"][:, columns:]).all()
    assert torch.equal(now["head.bias"], kept["head.bias"])


def test_what_is_drawn_anew_of_the_head(model: Net) -> None:
    kept = values(model)
    used = {"conv": 2, "fc": 3}
    reinitialise(layers(model), LAYOUT, used, 3, ())
    for name in ("head.weight", "head.bias"):
        assert torch.equal(model.state_dict()[name], kept[name])
    reinitialise(layers(model), LAYOUT, used, 3, ("weight", "bias"))
    assert (model.head.bias != kept["head.bias"]).all()


def test_a_draw_depends_on_its_seed_alone(model: Net) -> None:
    used = {"conv": 2, "fc": 3}
    draws = []
    for seed in (3, 3, 4):
        other = copy.deepcopy(model)
        torch.rand(5)  # whatever happened before
        before = torch.get_rng_state()
        reinitialise(layers(other), LAYOUT, used, seed, ("weight",))
        assert torch.equal(torch.get_rng_state(), before)
        draws.append(values(other))
    for name in draws[0]:
        assert torch.equal(draws[0][name], draws[1][name])
    for name in ("conv.weight", "fc.weight", "head.weight"):
        assert not torch.equal(draws[0][name], draws[2][name])


def test_the_gpus_random_numbers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.manual_seed seeds the GPUs' generators as well; fork_rng here gives none back."""
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("seeds the GPUs too"))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds the GPUs"))
    reset(nn.Linear(3, 2), 0)


@pytest.mark.parametrize("layer", [nn.Linear(3, 2), nn.Conv2d(2, 3, 3), nn.BatchNorm1d(3)])
def test_reset_is_what_the_layer_itself_would_draw(layer: nn.Module) -> None:
    kept = values(layer)
    fresh = reset(layer, 5)
    torch.manual_seed(5)
    expected = copy.deepcopy(layer)
    expected.reset_parameters()  # type: ignore[operator]
    for name, tensor in expected.state_dict().items():
        assert torch.equal(fresh[name], tensor)
        assert torch.equal(layer.state_dict()[name], kept[name])


def test_reset_leaves_hooks_and_gradients_alone() -> None:
    layer = nn.Linear(3, 2)
    calls: list[int] = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    layer(torch.ones(1, 3)).sum().backward()
    reset(layer, 0)
    assert layer.weight.grad is not None
    assert calls == [1]
    assert all(p.requires_grad for p in layer.parameters())


def test_near_seeds_do_not_overlap() -> None:
    seeds = {
        derived_seed(*numbers)
        for a in range(8)
        for b in range(8)
        for numbers in ([a, b], [a, b, 0], [a, b, 1])
    }
    assert len(seeds) == 8 * 8 * 3
    assert derived_seed(1, 2) == derived_seed(1, 2)
    before = torch.get_rng_state()
    assert 0 <= derived_seed(-1, 2) < 2**62
    assert torch.equal(torch.get_rng_state(), before)
