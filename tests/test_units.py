"""Each network is either grouped rightly and proved, or refused with the layer named."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Avalanche's own imports warn of
    from clnp import UnsupportedNetwork
    from clnp.layout import Layout, Part, Span
    from clnp.proof import prove
    from clnp.units import find_layout

IMAGES = (4, 3, 8, 8)
VECTORS = (4, 12)


class Net(nn.Module):
    """Layers by name, and a function of them and the input."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def call(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)  # type: ignore[no-any-return]


def conv(inputs: int, outputs: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def scripted(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has deprecated it; old models are of it
        return torch.jit.script(layer)  # type: ignore[no-any-return]


def supported() -> dict[str, tuple[nn.Module, tuple[int, ...], list[Any]]]:
    """Network, shape of its input, and the groups: writers, norms, readers with repeats."""
    lin = nn.Linear
    return {
        "mlp": (
            nn.Sequential(lin(12, 9), nn.ReLU(), nn.Dropout(), lin(9, 8), nn.Tanh(), lin(8, 5)),
            VECTORS,
            [("0", "", "3x1"), ("3", "", "5x1")],
        ),
        "cnn": (
            nn.Sequential(
                *(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d()),
                *(conv(6, 8, bias=False), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()),
                *(lin(8 * 4, 10), nn.BatchNorm1d(10), nn.ReLU(), lin(10, 5)),
            ),
            IMAGES,
            [("0", "1", "5x1"), ("5", "", "9x4"), ("9", "10", "12x1")],
        ),
        "convolution and pool as head": (
            nn.Sequential(
                *(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 8, stride=2), nn.ReLU()),
                *(conv(8, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            ),
            IMAGES,
            [("0", "1", "3x1"), ("3", "", "5x1")],
        ),
        "residual sum": (
            Net(
                lambda m, x: m.head(F.relu(m.a(x) + m.c(F.relu(m.b(x)))).mean((2, 3))),
                a=conv(3, 6),
                b=conv(3, 7),
                c=conv(7, 6),
                head=lin(6, 5),
            ),
            IMAGES,
            [("a c", "", "headx1"), ("b", "", "cx1")],
        ),
        "residual block that reads and writes one group": (
            Net(
                lambda m, x: m.rest(m.stem(x)),
                stem=lin(12, 6),
                rest=Net(
                    lambda m, h: m.head(F.relu(h + m.b(F.relu(m.a(h))))),
                    a=lin(6, 7),
                    b=lin(7, 6),
                    head=lin(6, 5),
                ),
            ),
            VECTORS,
            [("stem rest.b", "", "rest.ax1 rest.headx1"), ("rest.a", "", "rest.bx1")],
        ),
        "two readers, joined": (
            Net(
                lambda m, x: m.head(m.joined(m.a(x))),
                a=lin(12, 6),
                joined=Net(lambda m, h: F.relu(m.b(h) + m.c(h)), b=lin(6, 7), c=lin(6, 7)),
                head=lin(7, 5),
            ),
            VECTORS,
            [("a", "", "joined.bx1 joined.cx1"), ("joined.b joined.c", "", "headx1")],
        ),
        "conv 1d": (
            nn.Sequential(
                nn.Conv1d(2, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Flatten(), lin(6 * 4, 5)
            ),
            (4, 2, 6),
            [("0", "1", "4x4")],
        ),
        "batch norm without affine": (
            nn.Sequential(lin(12, 6), nn.BatchNorm1d(6, affine=False), nn.ReLU(), lin(6, 5)),
            VECTORS,
            [("0", "1", "3x1")],
        ),
        "layers without gradients": (
            nn.Sequential(lin(12, 9), nn.ReLU(), lin(9, 8), nn.ReLU(), lin(8, 5)).requires_grad_(
                requires_grad=False
            ),
            VECTORS,
            [("0", "", "2x1"), ("2", "", "4x1")],
        ),
        "units in the last dimension": (
            Net(lambda m, x: m.head(F.relu(m.a(x)).mean(1)), a=lin(12, 6), head=lin(6, 5)),
            (4, 3, 12),
            [("a", "", "headx1")],
        ),
        "constant buffers on the input": (
            nn.Sequential(Centre(moves=False), lin(12, 6), nn.ReLU(), lin(6, 5)),
            VECTORS,
            [("1", "", "3x1")],
        ),
        "concatenation of two layers": (
            Net(
                lambda m, x: m.head(torch.cat([m.a(x), m.b(x)], 1)),
                a=lin(12, 6),
                b=lin(12, 4),
                head=lin(10, 5),
            ),
            VECTORS,
            [("a", "", "headx1"), ("b", "", "headx1+6")],
        ),
        "concatenation with the input behind it": (
            Net(
                lambda m, x: m.head(m.b(torch.cat([F.relu(m.a(x)), x], 1)).flatten(1)),
                a=conv(3, 5),
                b=conv(8, 6),
                head=lin(6 * 64, 5),
            ),
            IMAGES,
            [("a", "", "bx1"), ("b", "", "headx64")],
        ),
        "densely connected": (
            Net(
                lambda m, x: m.head(m.last(m.both(m.a(x), m)).mean((2, 3))),
                a=conv(3, 5),
                norm=nn.BatchNorm2d(5),
                b=conv(5, 4),
                last=nn.BatchNorm2d(9),
                head=lin(9, 5),
                both=Both(),
            ),
            IMAGES,
            [("a", "norm last", "bx1 headx1"), ("b", "last+5", "headx1+5")],
        ),
        "grouped and depthwise convolutions": (
            nn.Sequential(
                *(conv(3, 6), conv(6, 9, groups=3), nn.ReLU(), conv(9, 9, groups=9)),
                *(nn.AvgPool2d(4), nn.Flatten(), lin(9 * 4, 5)),
            ),
            IMAGES,
            [("0x2", "1x3 3x3", "6x12")],
        ),
        "a depthwise convolution that widens": (
            nn.Sequential(
                *(conv(3, 6), conv(6, 12, groups=6), nn.ReLU(), nn.Flatten(), lin(12 * 64, 5)),
            ),
            IMAGES,
            [("0", "1x2", "4x128")],
        ),
        "a grouped convolution behind a gate": (
            nn.Sequential(
                *(nn.Conv1d(2, 8, 1), nn.GroupNorm(4, 8), Gate(8), nn.Conv1d(8, 4, 3, groups=4)),
                *(nn.ReLU(), nn.Flatten(), lin(4 * 4, 5)),
            ),
            (4, 2, 6),
            [("0x2 2.bx2", "1x2 3", "2.ax2 6x4"), ("2.a", "", "2.bx1")],
        ),
        "group norm": (
            nn.Sequential(
                *(conv(3, 6), nn.GroupNorm(2, 6), nn.ReLU()),
                *(conv(6, 8), nn.GroupNorm(4, 8, affine=False), nn.Flatten(), lin(8 * 64, 5)),
            ),
            IMAGES,
            [("0x3", "1x3", "3x3"), ("3x2", "4x2", "6x128")],
        ),
        "instance norms and slopes": (
            nn.Sequential(
                *(conv(3, 6), nn.InstanceNorm2d(6), nn.PReLU(6), conv(6, 4)),
                *(nn.InstanceNorm2d(4, affine=True), nn.PReLU(), nn.Flatten(), lin(4 * 64, 5)),
            ),
            IMAGES,
            [("0", "1 2", "3x1"), ("3", "4", "7x64")],
        ),
        "layer norm over positions": (
            nn.Sequential(
                conv(3, 6), nn.LayerNorm([8, 8]), nn.GELU(), nn.Flatten(), lin(6 * 64, 5)
            ),
            IMAGES,
            [("0", "", "4x64")],
        ),
        "one unit a layer": (
            nn.Sequential(lin(12, 1), nn.Tanh(), lin(1, 1), nn.Tanh(), lin(1, 5)),
            VECTORS,
            [("0", "", "2x1"), ("2", "", "4x1")],
        ),
    }


class Gate(nn.Module):
    """Scales each channel by what two layers make of all of them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(channels, channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.b(F.silu(self.a(x.mean(2, keepdim=True))))
        return x * torch.sigmoid(gate)


class Both(nn.Module):
    def forward(self, a: Tensor, m: Any) -> Tensor:
        return torch.cat([a, m.b(F.relu(m.norm(a)))], 1)


class Centre(nn.Module):
    """Subtracts a mean, which it may go on to estimate in training."""

    def __init__(self, moves: bool) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(12))
        self.moves = moves

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.moves:
            self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        return x - self.mean


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def bare_parameter() -> nn.Module:
    net = Net(lambda m, x: m.b(m.scale * m.a(x)), a=nn.Linear(12, 6), b=nn.Linear(6, 5))
    net.scale = nn.Parameter(torch.ones(()))
    return net


def shared_weight() -> nn.Module:
    net = nn.Sequential(nn.Linear(12, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    net[2].weight = net[1].weight
    return net


def replaced_forward() -> nn.Module:
    net = nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 5))
    first = net[0]
    net[0].forward = lambda x: 2 * F.linear(x, first.weight)  # type: ignore[method-assign]
    return net


def refused() -> dict[str, tuple[nn.Module, tuple[int, ...], str]]:
    """Network, shape of its input, and what the refusal must say."""
    lin = nn.Linear
    return {
        "raw input added": (
            Net(
                lambda m, x: m.head(m.b(x + m.a(x)).flatten(1)),
                a=conv(3, 3),
                b=conv(3, 4),
                head=lin(4 * 64, 5),
            ),
            IMAGES,
            "layer 'a'",
        ),
        "concatenation with the input": (
            Net(
                lambda m, x: m.head(m.b(torch.cat([x, m.a(x)], 1)).flatten(1)),
                a=conv(3, 5),
                b=conv(8, 6),
                head=lin(6 * 64, 5),
            ),
            IMAGES,
            "layer 'a' can't be reordered",
        ),
        "concatenation of a layer with itself": (
            Net(
                lambda m, x: m.head(m.a(x).repeat(1, 2)),
                a=lin(12, 6),
                head=lin(12, 5),
            ),
            VECTORS,
            "layer 'a' can't be reordered",
        ),
        "layer norm": (
            nn.Sequential(lin(12, 6), nn.LayerNorm(6), lin(6, 5)),
            VECTORS,
            "layer '1'.*LayerNorm",
        ),
        "layer norm without affine": (
            nn.Sequential(lin(12, 6), nn.LayerNorm(6, elementwise_affine=False), lin(6, 5)),
            VECTORS,
            "layer '1'.*normalises over all units",
        ),
        "layer norm over an image": (
            nn.Sequential(conv(3, 6), nn.LayerNorm([6, 8, 8]), nn.Flatten(), lin(6 * 64, 5)),
            IMAGES,
            "layer '1'.*normalises over all units",
        ),
        "group norm of one group": (
            nn.Sequential(conv(3, 6), nn.GroupNorm(1, 6), nn.Flatten(), lin(6 * 64, 5)),
            IMAGES,
            "layer '1'.*mixes all units of '0'.*more groups",
        ),
        "group norms without a common unit": (
            nn.Sequential(
                *(conv(3, 6), nn.GroupNorm(2, 6), nn.ReLU(), nn.GroupNorm(3, 6)),
                *(nn.Flatten(), lin(6 * 64, 5)),
            ),
            IMAGES,
            "layer '1'.*mixes all units of '0'",
        ),
        "group norm across a concatenation": (
            Net(
                lambda m, x: m.head(m.norm(torch.cat([m.a(x), m.b(x)], 1)).flatten(1)),
                a=conv(3, 3),
                b=conv(3, 5),
                norm=nn.GroupNorm(4, 8),
                head=lin(8 * 64, 5),
            ),
            IMAGES,
            "layer 'norm'.*units of several layers",
        ),
        "grouped convolution of the input": (
            nn.Sequential(conv(3, 6, groups=3), nn.ReLU(), nn.Flatten(), lin(6 * 64, 5)),
            IMAGES,
            "layer '0' is a grouped convolution on the network's input",
        ),
        "grouped convolution of a concatenation": (
            Net(
                lambda m, x: m.head(m.c(torch.cat([m.a(x), m.b(x)], 1)).flatten(1)),
                a=conv(3, 4),
                b=conv(3, 4),
                c=conv(8, 16, groups=4),
                head=lin(16 * 64, 5),
            ),
            IMAGES,
            "layer 'c' is a grouped convolution behind a concatenation",
        ),
        "channels shuffled": (
            Net(
                lambda m, x: m.head(F.channel_shuffle(m.b(m.a(x)), 2).flatten(1)),
                a=conv(3, 6),
                b=conv(6, 6, groups=2),
                head=lin(6 * 64, 5),
            ),
            IMAGES,
            "layer 'a' can't be reordered",
        ),
        "softmax between layers": (
            nn.Sequential(
                lin(12, 9), nn.ReLU(), lin(9, 8), nn.Softmax(1), lin(8, 7), nn.ReLU(), lin(7, 5)
            ),
            VECTORS,
            "behind layer '2': some units alone compute something else",
        ),
        "mean over units subtracted": (
            Net(
                lambda m, x: m.head((lambda h: h - h.mean(1, keepdim=True))(m.a(x))),
                a=lin(12, 6),
                head=lin(6, 5),
            ),
            VECTORS,
            "layer 'a'",
        ),
        "view with fixed sizes": (
            Net(
                lambda m, x: m.head(F.relu(m.a(x)).view(-1, 6 * 64)),
                a=conv(3, 6),
                head=lin(6 * 64, 5),
            ),
            IMAGES,
            "behind layer 'a': the forward fails on fewer units",
        ),
        "order of units turned round": (
            Net(lambda m, x: m.head(m.a(x).flip(1)), a=lin(12, 6), head=lin(6, 5)),
            VECTORS,
            "layer 'a'",
        ),
        "max over pairs of units": (
            Net(
                lambda m, x: m.head(m.a(x).unflatten(1, (-1, 2)).amax(2)),
                a=lin(12, 8),
                head=lin(4, 5),
            ),
            VECTORS,
            "layer '(a|head)'",
        ),
        "weight norm": (
            nn.Sequential(weight_norm(lin(12, 8)), nn.ReLU(), lin(8, 5)),
            VECTORS,
            "(?s)layer '0'.*parametrization",
        ),
        "a layer called twice": (
            Net(lambda m, x: m.c(m.b(m.b(m.a(x)))), a=lin(12, 6), b=lin(6, 6), c=lin(6, 5)),
            VECTORS,
            "layer 'b' is called more than once",
        ),
        "shared parameters": (shared_weight(), VECTORS, "layers '2' and '1' share a parameter"),
        "a bare parameter": (bare_parameter(), VECTORS, "parameter of its own, 'scale'"),
        "a list of parameters": (
            Net(
                lambda m, x: m.b(m.scales[0] * m.a(x)),
                a=lin(12, 6),
                b=lin(6, 5),
                scales=nn.ParameterList([nn.Parameter(torch.ones(()))]),
            ),
            VECTORS,
            "'scales.0' is used outside",
        ),
        "a layer's weight used past the layer": (
            Net(
                lambda m, x: m.c(F.linear(m.a(x), m.b.weight)),
                a=lin(12, 6),
                b=lin(6, 6),
                c=lin(6, 5),
            ),
            VECTORS,
            "'b.weight' is used outside",
        ),
        "no hidden layer": (nn.Sequential(lin(12, 5)), VECTORS, "no hidden layer: '0'"),
        "a tuple": (
            Net(lambda m, x: (m.b(m.a(x)), x), a=lin(12, 6), b=lin(6, 5)),
            VECTORS,
            "returns tuple",
        ),
        "logits of three dimensions": (
            nn.Sequential(lin(12, 6), lin(6, 5)),
            (4, 3, 12),
            r"shape \(4, 3, 5\)",
        ),
        "batch norm without running statistics": (
            nn.Sequential(lin(12, 6), nn.BatchNorm1d(6, track_running_stats=False), lin(6, 5)),
            VECTORS,
            "layer '1'.*no running statistics",
        ),
        "batch norm on the input": (
            nn.Sequential(nn.BatchNorm1d(12), lin(12, 6), lin(6, 5)),
            VECTORS,
            "layer '0'.*norm on the input",
        ),
        "batch norm without affine on the input": (
            nn.Sequential(nn.BatchNorm1d(12, affine=False), lin(12, 6), lin(6, 5)),
            VECTORS,
            "layer '0'.*norm on the input",
        ),
        "batch norm behind the head": (
            nn.Sequential(lin(12, 6), lin(6, 5), nn.BatchNorm1d(5)),
            VECTORS,
            "last layer '1'.*a norm",
        ),
        "batch norm behind a flatten": (
            nn.Sequential(conv(3, 6), nn.Flatten(), nn.BatchNorm1d(6 * 64), lin(6 * 64, 5)),
            IMAGES,
            "layer '2' is a norm behind a flatten",
        ),
        "a running mean of the user's": (
            nn.Sequential(Centre(moves=True), lin(12, 6), lin(6, 5)),
            VECTORS,
            "layer '0' writes into its buffer 'mean'",
        ),
        "a subclass with its own forward": (
            nn.Sequential(Doubled(12, 6), lin(6, 5)),
            VECTORS,
            "layer '0'.*overrides the forward of Linear",
        ),
        "a replaced forward": (replaced_forward(), VECTORS, "layer '0' has had its forward"),
        "two layers give the output": (
            Net(
                lambda m, x: (lambda h: m.b(h) + m.d(m.c(h)))(m.a(x)),
                a=lin(12, 6),
                b=lin(6, 5),
                c=lin(6, 7),
                d=lin(7, 5),
            ),
            VECTORS,
            "exactly one layer",
        ),
        "transposed convolution": (
            nn.Sequential(conv(3, 6), nn.ConvTranspose2d(6, 4, 1), nn.Flatten(), lin(256, 5)),
            IMAGES,
            "layer '1'.*ConvTranspose2d",
        ),
        "circular padding of a sequence": (
            nn.Sequential(
                *(nn.Conv1d(2, 4, 3), nn.ReLU()),
                *(nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"), nn.Flatten(), lin(32, 5)),
            ),
            (4, 2, 10),
            "finds no end of what hangs on a layer's units.*circular padding",
        ),
        "local response norm": (
            nn.Sequential(conv(3, 16), nn.LocalResponseNorm(5), nn.Flatten(), lin(16 * 64, 5)),
            IMAGES,
            "finds no end of what hangs on a layer's units.*LocalResponseNorm",
        ),
        "a scripted layer": (
            nn.Sequential(scripted(nn.Sequential(lin(12, 6))), lin(6, 5)),
            VECTORS,
            "layer '0' is scripted",
        ),
        "a layer that the tracer loses": (
            Net(lambda m, x: m.b(m.a(x).detach()), a=lin(12, 6), b=lin(6, 5)),
            VECTORS,
            "torch-pruning can't trace the model.*not in the dependency graph",
        ),
    }


SUPPORTED, REFUSED = supported(), refused()


def layout_of(model: nn.Module, shape: tuple[int, ...], single_head: bool = True) -> Layout:
    example = torch.randn(shape)
    layout = find_layout(model, call, example)
    prove(model, layout, call, example, single_head)
    return layout


def shown(part: Part, usual: int) -> str:
    """A part in short: its layer, channels a unit, and the first of them."""
    block = "" if part.block == usual else f"x{part.block}"
    return f"{part.layer}{block}" + (f"+{part.first}" if part.first else "")


@pytest.mark.parametrize("single_head", [True, False])
@pytest.mark.parametrize("name", SUPPORTED)
def test_supported(name: str, single_head: bool) -> None:
    model, shape, expected = SUPPORTED[name]
    values = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    layout = layout_of(model, shape, single_head)
    found = [
        (
            " ".join(shown(part, 1) for part in group.writers),
            " ".join(shown(part, 1) for part in group.norms),
            " ".join(shown(part, 0) for part in group.readers),
        )
        for group in layout.groups
    ]
    assert found == expected
    for group in layout.groups:
        for part in group.writers:
            weight = model.get_submodule(part.layer).weight
            assert group.width * part.block == weight.shape[0]  # type: ignore[union-attr, index]
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, values[key])
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("single_head", [True, False])
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, single_head: bool) -> None:
    model, shape, message = REFUSED[name]
    with pytest.raises(UnsupportedNetwork, match=message):
        layout_of(model, shape, single_head)


@pytest.mark.parametrize("name", ["raw input added", "concatenation with the input"])
def test_an_empty_example_hides_nothing(name: str) -> None:
    model, shape, message = REFUSED[name]
    example = torch.zeros(shape)
    with pytest.raises(UnsupportedNetwork, match=message):
        prove(model, find_layout(model, call, example), call, example, single_head=True)


def test_one_sample_is_enough_of_an_example() -> None:
    for name in ("cnn", "constant buffers on the input"):
        model, shape, _ = SUPPORTED[name]
        layout_of(model, (1, *shape[1:]))


def test_finding_moves_no_random_numbers() -> None:
    model, shape, _ = SUPPORTED["cnn"]
    example = torch.randn(shape)
    before = torch.get_rng_state()
    prove(model, find_layout(model, call, example), call, example, single_head=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_layout() -> None:
    model, shape, _ = SUPPORTED["cnn"]
    layout = layout_of(model, shape)
    assert layout.order == ("0", "1", "5", "9", "10", "12")
    assert layout.weights == ("0", "5", "9", "12")
    assert layout.head == "12"
    assert layout.last.name == "9"
    assert layout.writes == {"0": "0", "1": "0", "5": "5", "9": "9", "10": "9"}
    assert layout.columns == {
        "0": (),
        "1": (Span("0", 6, 1),),
        "5": (Span("0", 6, 1),),
        "9": (Span("5", 8, 4),),
        "10": (Span("9", 10, 1),),
        "12": (Span("9", 10, 1),),
    }


def test_a_shared_parameter_of_a_layer_not_called() -> None:
    net = Net(
        lambda m, x: m.head(m.a(x)), a=nn.Linear(12, 6), head=nn.Linear(6, 5), other=nn.Linear(6, 5)
    )
    layout_of(net, VECTORS)
    net.other.bias = net.head.bias
    with pytest.raises(UnsupportedNetwork, match="'head' and 'other' share"):
        layout_of(net, VECTORS)
