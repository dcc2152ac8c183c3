"""Superposition: faithful to its source, each task under its own context."""

from __future__ import annotations

import copy
import dataclasses
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from avalanche.benchmarks import tensors_benchmark
from avalanche.models import MultiHeadClassifier
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from baselines.superposition import (
    OwnNorms,
    Superposed,
    SuperpositionPlugin,
    draw_context,
    superpose,
    superposed_layers,
)
from benchmarks import precision
from benchmarks.data import load
from benchmarks.errors import UserError
from benchmarks.learners import Learner, Setup
from benchmarks.methods import METHODS, SuperpositionSettings
from benchmarks.precision import bf16
from benchmarks.quickstart import Quickstart
from benchmarks.split_cifar import SplitCIFARWide

KINDS = ("binary", "complex", "rotation")
TASKS = 3


def mlp(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(12, 30, bias=bias), nn.ReLU(), nn.Linear(30, 20, bias=bias), nn.ReLU()),
        nn.Linear(20, 3, bias=bias),
    )


def convnet() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(2, 6, 3, padding=1, stride=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 8, 1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)),
    )


NETWORKS = {"mlp": (mlp, (12,)), "convnet": (convnet, (2, 8, 8))}


def data(task: int, count: int = 96) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(task)
    places = torch.randn(3, 12, generator=generator)
    labels = torch.arange(count) % 3
    return 3 * places[labels] + torch.randn(count, 12, generator=generator) + 5, labels


def stream(tasks: int = TASKS) -> Any:
    tensors = [data(task) for task in range(tasks)]
    return tensors_benchmark(train_tensors=tensors, test_tensors=tensors, task_labels=[0] * tasks)


def strategy(
    model: nn.Module, *plugins: Any, optimizer: Any = None, epochs: int = 3, eval_every: int = -1
) -> Any:
    return Naive(
        model=model,
        optimizer=optimizer or torch.optim.RMSprop(model.parameters(), lr=0.003),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=16,
        train_epochs=epochs,
        eval_mb_size=96,
        eval_every=eval_every,
        plugins=list(plugins),
        evaluator=EvaluationPlugin(loggers=[]),
    )


def select(model: nn.Module, task: int) -> None:
    SuperpositionPlugin(model).select(task)


def layer_of(layer: nn.Module, **options: Any) -> Superposed:
    superpose(layer, TASKS, normalise=False, **options)
    assert isinstance(layer, Superposed)
    return layer


# --- the source's equations (fidelity) ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["binary", "rotation"])
def test_context_on_the_input_is_context_on_the_weights(kind: Any) -> None:
    layer = layer_of(nn.Linear(20, 7), kind=kind).double()
    select(layer, 1)
    x, context = torch.randn(5, 20).double(), layer.context().double()
    if kind == "binary":
        expected, other_way = (x * context) @ layer.weight.T, x @ (layer.weight * context).T
    else:
        expected, other_way = x @ context.T @ layer.weight.T, x @ (layer.weight @ context).T
    assert torch.allclose(layer(x), expected)
    assert torch.allclose(layer(x), other_way)
    assert not torch.allclose(layer(x), x @ layer.weight.T)


@pytest.mark.parametrize("kind", ["binary", "rotation", "complex"])
def test_context_on_the_patches_is_context_on_the_kernel(kind: Any) -> None:
    plain = nn.Conv2d(3, 4, (3, 2), padding=1, stride=2, dilation=(1, 2)).double()
    layer = layer_of(copy.deepcopy(plain), kind=kind, bias=kind == "binary")
    select(layer, 2)
    x, context = torch.randn(5, 3, 9, 9).double(), layer.context().double()
    patches = F.unfold(x, (3, 2), padding=1, stride=2, dilation=(1, 2)).transpose(1, 2)
    if kind == "complex":
        weight = torch.complex(layer.weight, layer.imaginary).flatten(1)
        turned = patches * torch.complex(context[0], context[1])
        out = (turned @ weight.T).transpose(1, 2).reshape(5, 4, 5, 5)
        assert torch.allclose(layer(x), out.real)
        return
    turned = patches * context if kind == "binary" else patches @ context.T
    expected = (turned @ layer.weight.flatten(1).T).transpose(1, 2).reshape(5, 4, 5, 5)
    if kind == "binary":
        assert context.shape == (3 * 3 * 2,)
        expected = expected + plain.bias[:, None, None]
    assert torch.allclose(layer(x), expected)


def test_complex_networks_compute_with_complex_numbers() -> None:
    model = superpose(mlp(), TASKS, "complex", bias=True, normalise=False).double()
    select(model, 1)
    x = torch.randn(4, 12).double()
    h = x.to(torch.complex128)
    layers = superposed_layers(model)
    for layer in layers:
        if layer is not layers[0]:
            h = torch.complex(h.real.relu(), h.imag.relu())
        h = (h * torch.complex(*layer.context())) @ torch.complex(layer.weight, layer.imaginary).T
        h = h + layer.bias
    assert torch.allclose(model(x), h.real)
    assert model(x).shape == (4, 3)


def test_complex_weights_are_the_models_own_turned_by_random_phases() -> None:
    plain = nn.Linear(300, 200)
    layer = layer_of(copy.deepcopy(plain), kind="complex")
    weight = torch.complex(layer.weight, layer.imaginary).detach()
    assert torch.allclose(weight.abs(), plain.weight.abs(), atol=1e-6)
    share = weight.real.square().sum() / weight.abs().square().sum()
    assert float(share) == pytest.approx(0.5, abs=0.02)  # half of it is real
    assert abs((weight / weight.abs()).mean()) < 0.02


@pytest.mark.parametrize("kind", ["binary", "complex"])
@pytest.mark.parametrize("make", [lambda: nn.Linear(24, 2), lambda: nn.Conv2d(6, 2, 2)])
def test_retrieval_noise_has_mean_0_and_the_variance_of_what_is_read(kind: Any, make: Any) -> None:
    draws = 1000
    layer = layer_of(make(), kind=kind)
    weights = [torch.randn(2, 24) for _ in range(TASKS)]
    x = torch.randn(24)
    contexts = torch.stack(
        [
            torch.stack([draw_context(kind, 24, generator) for _ in range(TASKS)])
            for generator in [torch.Generator().manual_seed(seed) for seed in range(draws)]
        ]
    )
    if kind == "complex":
        contexts = torch.complex(contexts[:, :, 0], contexts[:, :, 1])
    own = contexts[:, 0]
    # Each W_s is stored so that its own context gives it back: W = sum of W_s * conj(o_s).
    stored = sum(weights[s][None] * contexts[:, s, None].conj() for s in range(TASKS))
    errors = []
    with torch.no_grad():
        for k in range(draws):
            memory = torch.as_tensor(stored)[k]
            layer.weight.copy_(memory.real.reshape(layer.weight.shape))
            if kind == "complex":
                layer.imaginary.copy_(memory.imag.reshape(layer.weight.shape))
                layer.contexts[0] = torch.stack([own[k].real, own[k].imag])  # type: ignore[index]
                signal = torch.cat([x[None], torch.zeros(1, 24)])
                full = torch.cat([*layer_full(layer, signal)]).flatten()
                errors.append(torch.complex(full[:2], full[2:]) - weights[0] @ x)
            else:
                layer.contexts[0] = own[k]  # type: ignore[index]
                shaped = x.reshape(1, *layer.weight.shape[1:])
                errors.append(layer(shaped).flatten() - weights[0] @ x)
    error = torch.stack(errors)
    variance = sum(weights[s].square() @ x.square() for s in range(1, TASKS))
    spread = torch.as_tensor(variance).sqrt() / draws**0.5
    assert (error.mean(0).abs() < 4 * spread).all()
    assert torch.allclose(error.abs().square().mean(0), torch.as_tensor(variance), rtol=0.2)


@pytest.mark.parametrize("make", [lambda: nn.Linear(24, 2), lambda: nn.Conv2d(6, 2, 2)])
def test_retrieval_noise_of_rotations_has_mean_0_and_spreads_over_all_that_is_read(
    make: Any,
) -> None:
    """A wrong rotation leaves the input's length alone, and points it anywhere."""
    draws = 1000
    plain = make()
    weights, x = [torch.randn(2, 24) for _ in range(TASKS)], torch.randn(24)
    errors = []
    with torch.no_grad():
        for seed in range(draws):
            layer = layer_of(copy.deepcopy(plain), kind="rotation", seed=seed)
            memory = torch.zeros(2, 24)
            for task in reversed(range(TASKS)):
                select(layer, task)
                memory += weights[task] @ layer.context().T
            layer.weight.copy_(memory.reshape(layer.weight.shape))
            errors.append(layer(x.reshape(1, *layer.weight.shape[1:])).flatten() - weights[0] @ x)
    error = torch.stack(errors)
    others = torch.stack(weights[1:]).square().sum((0, 2))
    variance = others * x.square().sum() / 24
    assert (error.mean(0).abs() < 4 * variance.sqrt() / draws**0.5).all()
    assert torch.allclose(error.square().mean(0), variance, rtol=0.2)


def layer_full(layer: Superposed, signal: Tensor) -> tuple[Tensor, Tensor]:
    """Both parts of a complex layer's output for one flat signal, given by its parts."""
    hooks = layer._forward_pre_hooks.copy(), layer._forward_hooks.copy()
    layer._forward_pre_hooks.clear()
    layer._forward_hooks.clear()
    out = layer(signal.reshape(2, *layer.weight.shape[1:]))
    layer._forward_pre_hooks.update(hooks[0])
    layer._forward_hooks.update(hooks[1])
    return out.chunk(2)


class Weights(SupervisedPlugin):
    """Keep the weights after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[list[Tensor]] = []

    def after_update(self, strategy: Any, **_: Any) -> None:
        self.kept.append([p.detach().clone() for p in strategy.model.parameters()])


def test_contexts_of_ones_are_plain_training_bit_for_bit() -> None:
    model, plain = mlp(bias=False), mlp(bias=False)
    plain.load_state_dict(model.state_dict())
    superpose(model, TASKS, normalise=False)
    for layer in superposed_layers(model):
        layer.contexts.fill_(1)  # type: ignore[union-attr, operator]
    kept = []
    for network, plugins in ((model, [SuperpositionPlugin(model)]), (plain, [])):
        torch.manual_seed(1)
        weights = Weights()
        learner = strategy(network, *plugins, weights)
        for experience in stream().train_stream:
            learner.train(experience)
        kept.append([value for step in weights.kept for value in step])
    assert len(kept[0]) == len(kept[1]) == 3 * TASKS * 3 * 6
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


def test_contexts_of_ones_are_plain_training_of_convolutions_bit_for_bit() -> None:
    model = convnet()
    plain = copy.deepcopy(model)
    superpose(model, TASKS, bias=True, normalise=False)
    for layer in superposed_layers(model):
        layer.contexts.fill_(1)  # type: ignore[union-attr, operator]
    both = [(net, torch.optim.RMSprop(net.parameters(), lr=0.003)) for net in (model, plain)]
    before = [p.detach().clone() for p in plain.parameters()]
    for step in range(3 * TASKS):
        select(model, step // 3)
        torch.manual_seed(step)
        x, y = torch.randn(16, 2, 8, 8), torch.arange(16) % 3
        for net, optimizer in both:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        pairs = [*zip(model.parameters(), plain.parameters(), strict=True)]
        assert all(torch.equal(a, b) for a, b in pairs)
    assert not any(torch.equal(a, b) for a, b in zip(before, plain.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_context_gives_accuracy_near_chance(kind: str) -> None:
    learner = built(kind=kind)
    learner.train(SCENARIO.streams["train"][0])
    assert accuracy(learner, 0) > 0.9
    images = SCENARIO.streams["test"][0].dataset
    x, y = (torch.stack([torch.as_tensor(sample[i]) for sample in images]) for i in (0, 1))
    model = learner.strategy.model.eval()
    right = []
    for wrong in range(1, EXPERIMENT.tasks):
        learner.plugin.select(wrong)
        right.append(float((model(x).argmax(1) == y).float().mean()))
    assert sum(right) / len(right) < 0.2


@pytest.mark.parametrize("entries", [1, 2, 60])
def test_contexts_keep_lengths(entries: int) -> None:
    generator = torch.Generator().manual_seed(0)
    signs = draw_context("binary", entries, generator)
    assert set(signs.tolist()) <= {-1, 1}
    assert torch.allclose(draw_context("complex", entries, generator).norm(dim=0), torch.ones(1))
    rotation = draw_context("rotation", entries, generator)
    assert torch.allclose(rotation.T @ rotation, torch.eye(entries), atol=1e-5)


def test_contexts_have_their_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    signs = draw_context("binary", 40_000, generator).float()
    assert abs(float(signs.mean())) < 0.02
    parts = draw_context("complex", 40_000, generator)
    assert (parts.mean(1).abs() < 0.015).all()
    assert abs(float(torch.atan2(parts[1], parts[0]).abs().mean()) - torch.pi / 2) < 0.02
    # Haar: traces have mean 0 and variance 1; QR's own signs would make every diagonal negative.
    traces = torch.stack([draw_context("rotation", 8, generator).trace() for _ in range(3000)])
    assert abs(float(traces.mean())) < 0.08
    assert float(traces.var()) == pytest.approx(1, abs=0.1)


# --- contexts and tasks ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_contexts_differ_by_layer_task_and_seed_alone(kind: Any) -> None:
    def contexts(seed: int, tasks: int = TASKS) -> list[list[Tensor]]:
        torch.manual_seed(tasks)
        network = nn.Sequential(nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 9))
        model = superpose(network, tasks, kind, seed=seed)
        drawn = []
        for task in range(tasks):
            select(model, task)
            drawn.append([layer.context().clone() for layer in superposed_layers(model)])
        return drawn

    once, more, other = contexts(1), contexts(1, tasks=TASKS + 2), contexts(2)
    flat = [context for row in once for context in row]
    for i, context in enumerate(flat):
        assert torch.equal(context, [c for row in more for c in row][i])
        assert not torch.equal(context, [c for row in other for c in row][i])
        assert not any(torch.equal(context, before) for before in flat[:i])


def test_superposing_draws_nothing_from_the_global_generator() -> None:
    model = mlp()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    for kind in KINDS:
        superpose(copy.deepcopy(model), TASKS, kind)  # type: ignore[arg-type]
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("kind", KINDS)
def test_superposed_networks_keep_names_and_train(kind: Any, network: str) -> None:
    make, shape = NETWORKS[network]
    plain = make()
    names = dict(plain.named_parameters())
    model = superpose(plain, TASKS, kind)
    weights = {name for name in names if name.endswith("weight")}
    extra = {name.replace("weight", "imaginary") for name in weights if kind == "complex"}
    assert set(dict(model.named_parameters())) == weights | extra
    x, y = torch.randn(30, *shape), torch.arange(30) % 3
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_tasks_own_context_is_trained(kind: Any) -> None:
    model = superpose(mlp(), TASKS, kind, trained=True)
    drawn = [[p.detach().clone() for p in layer.contexts] for layer in superposed_layers(model)]  # type: ignore[union-attr, arg-type]
    # Momentum and decay would move whatever has a gradient, be it 0.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    plugin = SuperpositionPlugin(model)
    learner = strategy(model, plugin, optimizer=optimizer)
    before = drawn
    for task, experience in enumerate(stream().train_stream):
        learner.train(experience)
        for layer, old in zip(superposed_layers(model), before, strict=True):
            moved = [not torch.equal(p, q) for p, q in zip(layer.contexts, old, strict=True)]  # type: ignore[arg-type]
            assert moved == [other == task for other in range(TASKS)]
        before = [
            [p.detach().clone() for p in layer.contexts] for layer in superposed_layers(model)
        ]  # type: ignore[union-attr, arg-type]


class Used(SupervisedPlugin):
    """Note the task of the context in use, in training and evaluation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers = superposed_layers(model)
        self.used: list[tuple[str, set[int]]] = []

    def after_training_iteration(self, _strategy: Any, **_: Any) -> None:
        self.used.append(("train", {layer.task for layer in self.layers}))

    def after_eval_iteration(self, _strategy: Any, **_: Any) -> None:
        self.used.append(("eval", {layer.task for layer in self.layers}))


def test_training_and_evaluation_use_each_experiences_own_context() -> None:
    model = superpose(mlp(), TASKS)
    used = Used(model)
    learner = strategy(model, SuperpositionPlugin(model), used, epochs=2, eval_every=1)
    experiences = stream()
    for task in range(2):
        used.used.clear()
        # Within training, too: what has not been learnt is seen by the newest context.
        learner.train(experiences.train_stream[task], eval_streams=[experiences.test_stream])
        seen = {(phase, *tasks) for phase, tasks in used.used}
        assert seen == {("train", task)} | {("eval", other) for other in range(task + 1)}
        evaluated = [tasks for phase, tasks in used.used if phase == "eval"][-3:]
        assert evaluated == [{0}, {task}, {task}]


def test_normalisation_is_of_the_first_tasks_data_alone() -> None:
    model = superpose(mlp(), TASKS)
    learner = strategy(model, SuperpositionPlugin(model), epochs=1)
    inputs: list[Tensor] = []
    model[0].register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    experiences = stream().train_stream
    for experience in experiences[:2]:
        learner.train(experience)
        x, _ = data(0)
        assert model.get_buffer("input_mean").item() == pytest.approx(float(x.mean()), rel=1e-5)
        deviation = float(x.std(correction=0))
        assert model.get_buffer("input_deviation").item() == pytest.approx(deviation, rel=1e-5)
    first = torch.cat(inputs[: len(data(0)[0]) // 16])
    assert float(first.mean()) == pytest.approx(0, abs=1e-5)
    assert float(first.std(correction=0)) == pytest.approx(1, abs=1e-5)


def test_measuring_inputs_leaves_the_order_of_training_alone() -> None:
    orders = []
    for normalise in (True, False):
        torch.manual_seed(4)
        model = superpose(mlp(), TASKS, normalise=normalise)
        seen: list[Tensor] = []
        plugin = SuperpositionPlugin(model)
        learner = strategy(model, plugin, epochs=1)
        model.register_forward_pre_hook(lambda _m, args, s=seen: s.append(args[0]), prepend=True)
        torch.manual_seed(5)
        learner.train(stream().train_stream[0])
        orders.append(torch.cat(seen))
    assert torch.equal(orders[0], orders[1])


@pytest.mark.parametrize("own", [True, False])
def test_a_norm_of_ones_own_is_left_alone_by_later_tasks(own: bool) -> None:
    """Shared statistics drift with the newest task, and no context brings the old ones back."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(12, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 3))
    model = superpose(network, TASKS, own_norms=own)
    learner, experiences = strategy(model, SuperpositionPlugin(model)), stream().train_stream
    norms = [*model[1].norms] if own else [model[1]] * TASKS
    assert len({id(norm) for norm in norms}) == (TASKS if own else 1)
    learner.train(experiences[0])
    after = copy.deepcopy(norms[0].state_dict())
    learner.train(experiences[1])
    kept = [torch.equal(value, after[name]) for name, value in norms[0].state_dict().items()]
    assert all(kept) if own else not any(kept)
    if own:
        assert norms[1].num_batches_tracked > 0
        assert norms[2].num_batches_tracked == 0
        select(model, 0)
        with torch.no_grad():
            model.eval()
            hidden = model[0](torch.randn(4, 12))
            assert torch.equal(model[1](hidden), norms[0](hidden))


def test_a_norm_in_two_places_stays_one() -> None:
    norm = nn.BatchNorm1d(30)
    network = nn.Sequential(nn.Linear(12, 30), norm, nn.Sequential(norm, norm), nn.Linear(30, 3))
    model = superpose(network, TASKS, own_norms=True)
    assert isinstance(model[1], OwnNorms)
    assert model[1] is model[2][0]
    assert model[1] is model[2][1]


def test_resumed_norms_are_those_of_the_newest_task() -> None:
    def made() -> tuple[nn.Module, SuperpositionPlugin, Any]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(12, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 3))
        model = superpose(network, TASKS, own_norms=True)
        plugin = SuperpositionPlugin(model)
        return model, plugin, strategy(model, plugin)

    model, plugin, learner = made()
    for experience in stream().train_stream[:2]:
        learner.train(experience)
    resumed, fresh, _ = made()
    resumed.load_state_dict(model.state_dict())
    fresh.load_state_dict(plugin.state_dict())
    x = torch.randn(8, 12)
    assert resumed[1].task == 1
    assert torch.equal(resumed.eval()(x), model.eval()(x))
    fresh.select(0)
    assert not torch.equal(resumed(x), model(x))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_is_uninterrupted_bit_for_bit(kind: str, trained: bool) -> None:
    def train(learner: Learner, task: int) -> None:
        torch.manual_seed(task)
        learner.train(SCENARIO.streams["train"][task])

    whole = built(kind=kind, trained=trained, epochs=1)
    for task in range(2):
        train(whole, task)
    buffer = BytesIO()
    torch.save(whole.state(), buffer)
    train(whole, 2)
    buffer.seek(0)
    resumed = built(kind=kind, trained=trained, epochs=1)
    resumed.restore(torch.load(buffer, weights_only=True))
    assert superposed_layers(resumed.strategy.model)[0].task == 1
    train(resumed, 2)
    states = [learner.strategy.model.state_dict() for learner in (whole, resumed)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert accuracy(resumed, 0) == accuracy(whole, 0)


# --- what it is for -------------------------------------------------------------------------------

EXPERIMENT = Quickstart(tasks=3, hidden=(100, 100))
DIGITS = load("digits")
SCENARIO = EXPERIMENT.scenario(DIGITS, 100)


def built(method: str = "superposition", **settings: Any) -> Learner:
    changes = {"epochs": 8, **settings}
    texts = tuple(f"{method}.{name}={value}" for name, value in changes.items())
    experiment = Quickstart(tasks=3, hidden=(100, 100), settings=texts)
    setup = Setup(experiment, SCENARIO, 100, torch.device("cpu"), EvaluationPlugin(loggers=[]))
    return METHODS[method].build(setup, METHODS[method].settings_for(experiment))


def accuracy(learner: Learner, task: int) -> float:
    right: list[Tensor] = []

    class Count(SupervisedPlugin):
        def after_eval_iteration(self, strategy: Any, **_: Any) -> None:
            right.append(strategy.mb_output.argmax(1) == strategy.mb_y)

    count = Count()
    learner.strategy.plugins.append(count)
    learner.strategy.eval(SCENARIO.streams["test"][task])
    learner.strategy.plugins.remove(count)
    return float(torch.cat(right).float().mean())


@pytest.mark.parametrize("kind", KINDS)
def test_digits_are_forgotten_less_than_by_finetuning(kind: str) -> None:
    lasts = []
    for learner in (built(kind=kind), built("finetune")):
        for experience in SCENARIO.streams["train"]:
            learner.train(experience)
        lasts.append(sum(accuracy(learner, task) for task in range(3)) / 3)
    assert lasts[0] > 0.9
    assert lasts[0] > lasts[1] + 0.2


def test_stored_numbers_count_the_contexts() -> None:
    inputs, weights = (64, 100, 100), 64 * 100 + 100 * 100 + 100 * 10
    expected = {
        ("binary", False): (weights, 3 * sum(inputs)),
        ("binary", True): (weights + 3 * sum(inputs), 0),
        ("complex", False): (2 * weights, 3 * 2 * sum(inputs)),
        ("rotation", False): (weights, 3 * sum(n * n for n in inputs)),
    }
    for (kind, trained), (trainable, contexts) in expected.items():
        learner = built(kind=kind, trained=trained)
        assert learner.parameters() == {"trainable": trainable, "stored": trainable + contexts}


def test_stored_numbers_count_norms_of_each_task() -> None:
    experiment = SplitCIFARWide(tasks=3, shrink=32)
    counts = []
    for settings in ((), ("superposition.own_norms=False",)):
        changed = dataclasses.replace(experiment, settings=settings)
        model = experiment.model()
        scenario: Any = SimpleNamespace(streams={"valid": []})
        setup = Setup(changed, scenario, 0, torch.device("cpu"), EvaluationPlugin(loggers=[]))
        method = METHODS["superposition"]
        counts.append(method.build(setup, method.settings_for(changed)).parameters())
    own, shared = counts
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    affine = sum(p.numel() for norm in norms for p in norm.parameters())
    assert own["trainable"] - shared["trainable"] == 2 * affine
    assert own["stored"] - shared["stored"] == 2 * affine


# --- cost, precision, devices ---------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("native", [True, False])
def test_bf16_computes_what_fp32_does_up_to_rounding(
    kind: Any, network: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_fast_bf16", lambda _device: native)
    make, shape = NETWORKS[network]
    model = superpose(make(), TASKS, kind)
    x = torch.randn(20, *shape)
    expected = model(x).detach()
    with bf16(torch.device("cpu")):
        output = model(x)
    assert output.dtype == torch.bfloat16
    assert torch.allclose(output.float(), expected, atol=0.05 * float(expected.abs().max()))
    output.float().sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32


def test_binary_contexts_add_no_product() -> None:
    x = torch.randn(8, 12)
    counts = []
    for model in (mlp(bias=False), superpose(mlp(), TASKS)):
        with FlopCounterMode(display=False) as flops:
            model(x).sum().backward()
        counts.append(flops.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_contexts_keep_to_the_models_device(kind: Any, trained: bool) -> None:
    for make, shape in NETWORKS.values():
        with FakeTensorMode(allow_non_fake_inputs=True):
            with torch.device("cuda"):
                network = make()
            model = superpose(network, TASKS, kind, trained=trained)
            x = torch.randn(5, *shape, device="cuda")
            for task in range(2):
                select(model, task)
                logits = model(x)
                assert logits.device.type == "cuda"
                assert logits.shape == (5, 3)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"model": nn.Sequential(nn.Flatten())}, "no Linear or Conv layer"),
        (
            {"model": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "kind": "complex"},
            r"1 \(batch norm\) would take real and imaginary parts",
        ),
        ({"model": nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2))}, r"1 \(LSTM\)"),
        ({"model": nn.Sequential(nn.ConvTranspose2d(2, 2, 1))}, r"0 \(ConvTranspose2d\)"),
        ({"model": superpose(nn.Sequential(nn.Linear(2, 2)), 1)}, "superposed before"),
        ({"kind": "ternary"}, "choose one of binary, complex, rotation"),
        ({"tasks": 0}, "at least one"),
    ],
)
def test_what_cannot_be_superposed_is_named(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        superpose(**{"model": mlp(), "tasks": TASKS, **arguments})


def test_plugin_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="superpose"):
        SuperpositionPlugin(mlp())
    model = superpose(mlp(), 1)
    experiences = stream().train_stream
    with pytest.raises(ValueError, match="not the one"):
        strategy(mlp(), SuperpositionPlugin(model)).train(experiences[0])
    learner = strategy(model, SuperpositionPlugin(model))
    with pytest.raises(ValueError, match="experience 1 has no context"):
        learner.train(experiences[1])
    model.append(MultiHeadClassifier(3, 3))
    with pytest.raises(ValueError, match="made after superpose"):
        learner.train(experiences[0])
    constant = [(torch.ones(4, 12), torch.arange(4) % 3)]
    same = tensors_benchmark(train_tensors=constant, test_tensors=constant, task_labels=[0])
    model = superpose(mlp(), 1)
    with pytest.raises(ValueError, match=r"all inputs are 1\.0"):
        strategy(model, SuperpositionPlugin(model)).train(same.train_stream[0])


def test_impossible_gain_is_named() -> None:
    with pytest.raises(UserError, match="gain"):
        SuperpositionSettings(gain=0)
