"""The proof refuses layouts that are wrong, and not for a reason of its own."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Avalanche's own imports warn of
    from clnp import UnsupportedNetwork
    from clnp import proof as proof_module
    from clnp.layout import Layout, Part, UnitGroup
    from clnp.proof import prove
    from clnp.units import find_layout


class Net(nn.Module):
    """Two readers of one group, a norm, a flatten and a hidden linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
        self.b, self.c = nn.Conv2d(6, 8, 1), nn.Conv2d(6, 8, 1)
        self.d, self.head = nn.Linear(8 * 4, 9), nn.Linear(9, 5)
        self.act: Callable[[Tensor], Tensor] = F.relu

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.a(x)))
        h = F.relu(self.b(h) + self.c(h))
        return self.head(self.act(self.d(h.flatten(1))))  # type: ignore[no-any-return]


EXAMPLE = (4, 1, 4, 4)


def call(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)  # type: ignore[no-any-return]


def changed(layout: Layout, name: str, **values: Any) -> Layout:
    """The layout with a group altered."""
    groups = tuple(dataclasses.replace(g, **values) if g.name == name else g for g in layout.groups)
    return dataclasses.replace(layout, groups=groups)


@pytest.fixture
def model() -> Net:
    return Net()


@pytest.fixture
def right(model: Net) -> Layout:
    return Layout(
        (
            UnitGroup("a", 6, (Part("a"),), (Part("norm"),), (Part("b", 1), Part("c", 1))),
            UnitGroup("b", 8, (Part("b"), Part("c")), (), (Part("d", 4),)),
            UnitGroup("d", 9, (Part("d"),), (), (Part("head", 1),)),
        ),
        "head",
        ("a", "norm", "b", "c", "d", "head"),
        ("a", "b", "c", "d", "head"),
    )


def test_the_right_layout_is_found_and_proved(model: Net, right: Layout) -> None:
    assert find_layout(model, call, torch.randn(EXAMPLE)) == right
    for single_head in (True, False):
        prove(model, right, call, torch.randn(EXAMPLE), single_head)


@pytest.mark.parametrize(
    ("group", "values", "message"),
    [
        ("a", {"readers": (Part("b", 1),)}, "layer 'a' can't be reordered"),
        ("a", {"readers": (Part("c", 1),)}, "layer 'a' can't be reordered"),
        ("a", {"norms": ()}, "layer 'a' can't be reordered"),
        ("b", {"writers": (Part("b"),)}, "layer 'b' can't be reordered"),
        ("b", {"readers": ()}, "layer 'b' can't be reordered"),
        ("b", {"readers": (Part("d", 1),)}, "layer 'd' has 32 columns.*take 8"),
        ("b", {"readers": (Part("d", 8),)}, "layer 'd' has 32 columns.*take 64"),
        ("b", {"norms": (Part("norm"),)}, "layer 'norm' has 6 channels"),
        ("a", {"width": 5}, "layer 'a' has 6 channels"),
    ],
)
@pytest.mark.parametrize("single_head", [True, False])
def test_wrong_layouts_are_refused(
    model: Net,
    right: Layout,
    group: str,
    values: dict[str, Any],
    message: str,
    single_head: bool,
) -> None:
    wrong = changed(right, group, **values)
    with pytest.raises(UnsupportedNetwork, match=message):
        prove(model, wrong, call, torch.randn(EXAMPLE), single_head)


def test_blocks_of_a_flatten_in_the_wrong_order(model: Net, right: Layout) -> None:
    """Units that interleave behind the flatten have as many columns, and aren't blocks."""

    def interleaved(net: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(net, Net)
        h = F.relu(net.norm(net.a(x)))
        h = F.relu(net.b(h) + net.c(h))
        return net.head(F.relu(net.d(h.movedim(1, -1).flatten(1))))  # type: ignore[no-any-return]

    with pytest.raises(UnsupportedNetwork, match="layer 'b' can't be reordered"):
        prove(model, right, interleaved, torch.randn(EXAMPLE), single_head=True)


@pytest.mark.parametrize("single_head", [True, False])
def test_weights_that_are_read_past_their_layer(
    model: Net, right: Layout, single_head: bool
) -> None:
    """Every unit's weights reach the output, whichever units a task has: noise in them shows it."""

    def loose(net: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(net, Net)
        return net(x) + net.d.bias.mean()  # type: ignore[no-any-return]

    with pytest.raises(UnsupportedNetwork, match="free weights reach the output"):
        prove(model, right, loose, torch.randn(EXAMPLE), single_head)


@pytest.mark.parametrize("single_head", [True, False])
@pytest.mark.parametrize(
    "act",
    [lambda h: h.softmax(1), lambda h: h - h.mean(1, keepdim=True), lambda h: F.normalize(h)],
)
def test_units_that_see_one_another(
    model: Net, right: Layout, act: Callable[[Tensor], Tensor], single_head: bool
) -> None:
    """Reordering them is harmless; leaving some out isn't."""
    model.act = act
    with pytest.raises(UnsupportedNetwork, match="behind layer 'd'"):
        prove(model, right, call, torch.randn(EXAMPLE), single_head)


def test_the_second_task_of_a_single_head_is_proved_too(
    model: Net, right: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof is worth something only if its tasks' logits depend on the input."""
    spreads = []
    differs = proof_module._differs

    def watched(a: Tensor, b: Tensor) -> bool:
        spreads.append(float(b.std(0).max()))
        return differs(a, b)

    monkeypatch.setattr(proof_module, "_differs", watched)
    prove(model, right, call, torch.randn(EXAMPLE), single_head=True)
    assert len(spreads) == proof_module.DRAWS * (3 + 2)
    assert min(spreads) > 1e-3


def test_logits_that_are_no_numbers_prove_nothing(model: Net, right: Layout) -> None:
    model.act = lambda h: h / 0.0
    with pytest.raises(UnsupportedNetwork):
        prove(model, right, call, torch.randn(EXAMPLE), single_head=True)


class Picky(nn.Module):
    """Takes what isn't negative, or whole numbers, alone."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.whole, self.a, self.head = whole, nn.Linear(9, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.one_hot(x, 9).float().mean(1) if self.whole else torch.log(x)
        return self.head(F.relu(self.a(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("whole", [False, True])
def test_a_network_that_takes_no_noise_is_proved_on_its_own_entries(whole: bool) -> None:
    model, example = Picky(whole), torch.rand(4, 9) + 0.1
    if whole:
        example = torch.randint(9, (4, 7))
    layout = find_layout(model, call, example)
    prove(model, layout, call, example, single_head=True)
    wrong = changed(layout, "a", readers=())
    with pytest.raises(UnsupportedNetwork):
        prove(model, wrong, call, example, single_head=True)
    # Entries that are all the same would hide what is wrong.
    with pytest.raises(UnsupportedNetwork, match="all entries of the example are the same"):
        prove(model, layout, call, torch.ones_like(example), single_head=True)


def test_an_empty_example_of_whole_numbers_hides_nothing() -> None:
    """A network that takes any whole number is proved on noise, not on the zeros that it got."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(9, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x.float())
            return self.head(h + x[:, : h.shape[1]])  # type: ignore[no-any-return]

    model, example = Whole(), torch.zeros(4, 9, dtype=torch.int64)
    layout = find_layout(model, call, example)
    with pytest.raises(UnsupportedNetwork, match="'a' can't be reordered"):
        prove(model, layout, call, example, single_head=True)


def test_the_model_and_the_random_numbers_stay(model: Net, right: Layout) -> None:
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = torch.get_rng_state()
    prove(model, right, call, torch.zeros(EXAMPLE), single_head=True)
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, values[name])
    assert model.training


def test_the_gpus_random_numbers_stay(
    model: Net, right: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.manual_seed seeds the GPUs' generators as well; fork_rng here gives none back."""
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("seeds the GPUs too"))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds the GPUs"))
    prove(model, right, call, torch.zeros(EXAMPLE), single_head=True)


def test_the_proof_computes_in_full_precision_and_leaves_the_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU a convolution and a narrower one may differ in TF32 by more than rounding."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    x, seen = torch.randn(4, 1, 4, 4), []

    def forward(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        seen.append(torch.backends.cudnn.allow_tf32)
        return module(batch)

    layout = find_layout(model, lambda m, batch: m(batch), x)
    prove(model, layout, forward, x, single_head=True)
    assert seen
    assert not any(seen)
    assert torch.backends.cudnn.allow_tf32
