"""LwF, replay and PackNet: Avalanche's plugins where they are right, mended where they aren't."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from avalanche.benchmarks import tensors_benchmark
from avalanche.models.packnet import PackNetModel as StockPackNetModel
from avalanche.models.packnet import PackNetPlugin as StockPackNetPlugin
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.plugins import LwFPlugin as StockLwFPlugin
from avalanche.training.supervised import Naive
from torch import Tensor, nn

from baselines.er import ERPlugin
from baselines.lwf import LwFPlugin
from baselines.packnet import PackNetModel, PackNetPlugin
from benchmarks.data import load
from benchmarks.quickstart import Quickstart
from benchmarks.scenarios import ReplayLoader, ResidentData

TASKS = 4
EXPERIMENT = Quickstart(tasks=3, validation=300)


class ResidentNaive(ResidentData, Naive):
    """Finetuning on resident data."""


def stream(tasks: int = TASKS) -> Any:
    generator = torch.Generator().manual_seed(0)
    data = []
    for _ in range(tasks):
        x = torch.randn(80, 6, generator=generator)
        data.append((x, (x @ torch.randn(6, 3, generator=generator)).argmax(1)))
    labels = list(range(tasks))
    return tensors_benchmark(train_tensors=data, test_tensors=data, task_labels=labels).train_stream


def network(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Dropout(dropout), nn.Linear(20, 3))


def strategy(model: nn.Module, *plugins: Any, kind: type = Naive, **options: Any) -> Any:
    arguments = {"train_mb_size": 16, "train_epochs": 4, "eval_mb_size": 80} | options
    return kind(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        criterion=nn.CrossEntropyLoss(),
        plugins=list(plugins),
        evaluator=EvaluationPlugin(loggers=[]),
        **arguments,
    )


class Watch(SupervisedPlugin):
    """Keep what each training step was given and what it cost."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict[str, Tensor]] = []
        self.loaders: set[type] = set()

    def before_training_epoch(self, strategy: Any, **_: Any) -> None:
        self.loaders.add(type(strategy.dataloader))

    def after_backward(self, strategy: Any, **_: Any) -> None:
        names = ("mb_x", "mb_y", "mb_task_id", "mb_output", "loss")
        self.steps.append({name: getattr(strategy, name).detach().clone() for name in names})


def logits(learner: Any, experience: Any) -> Tensor:
    class Keep(SupervisedPlugin):
        def after_eval_forward(self, strategy: Any, **_: Any) -> None:
            kept.append(strategy.mb_output.detach().clone())

    kept: list[Tensor] = []
    keep = Keep()
    learner.plugins.append(keep)
    learner.eval(experience)
    learner.plugins.remove(keep)
    return torch.cat(kept)


# --- LwF ------------------------------------------------------------------------------------------


def test_lwf_adds_the_distance_to_the_old_answers() -> None:
    """Eq. 2 and 3: softened answers of the old network on the new task's inputs."""
    watch, model, train = Watch(), network(), stream()
    learner = strategy(model, LwFPlugin(strength=3.0, temperature=2.0), watch)
    learner.train(train[0])
    old = copy.deepcopy(model)
    watch.steps.clear()
    learner.train(train[1])
    assert all(parameter.requires_grad for parameter in model.parameters())
    away = []
    for step in watch.steps:
        before = (old(step["mb_x"]).detach() / 2).softmax(1)
        now = (step["mb_output"] / 2).log_softmax(1)
        distance = (before * (before.log() - now)).sum(1).mean()
        task = nn.functional.cross_entropy(step["mb_output"], step["mb_y"])
        torch.testing.assert_close(step["loss"].squeeze(), task + 3.0 * distance)
        away.append(float(distance))
    assert abs(away[0]) < 1e-6 < max(away)


@pytest.mark.parametrize("classes", [{0, 1, 2}, {1, 2}, {0, 2}, {2}])
def test_lwf_distils_the_classes_that_were_seen(classes: set[int]) -> None:
    logits = torch.randn(2, 5, 3)
    ours, stock = LwFPlugin().lwf, StockLwFPlugin().lwf
    for lwf in (ours, stock):
        lwf.temperature = 3.0
    assert torch.equal(
        ours._distillation_loss(*logits, classes), stock._distillation_loss(*logits, classes)
    )


@pytest.mark.parametrize(("plugin", "same"), [(LwFPlugin, True), (StockLwFPlugin, False)])
def test_lwf_teacher_answers_in_the_networks_precision(
    plugin: Callable[..., Any], same: bool
) -> None:
    """So that before the first step there is nothing to make up for."""
    train, watch = EXPERIMENT.scenario(load("digits"), 0).streams["train"], Watch()
    watched = strategy(EXPERIMENT.model(), plugin(1e6), watch, kind=ResidentNaive, precision="bf16")
    watched.train(train[0])
    watch.steps.clear()
    watched.train(train[1])
    first = watch.steps[0]
    task = nn.functional.cross_entropy(first["mb_output"], first["mb_y"])
    assert (abs(float(first["loss"] - task)) < 0.1) is same


def test_lwf_without_strength_is_finetuning_bit_for_bit() -> None:
    models = network(), network()
    for model, plugins in zip(models, ([LwFPlugin(strength=0.0)], []), strict=True):
        learner = strategy(model, *plugins)
        for experience in stream():
            torch.manual_seed(int(experience.current_experience))
            learner.train(experience)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("plugin", "at_rest"), [(LwFPlugin, True), (StockLwFPlugin, False)])
def test_lwf_teacher_is_at_rest(plugin: Callable[[], Any], at_rest: bool) -> None:
    made = plugin()
    learner = strategy(network(dropout=0.5), made)
    learner.train(stream()[0])
    teacher, x = made.lwf.prev_model, torch.randn(50, 6)
    assert torch.equal(teacher(x), teacher(x)) is at_rest
    # Its parameters are of no interest to any optimizer.
    assert any(parameter.requires_grad for parameter in teacher.parameters()) is not at_rest


# --- replay ---------------------------------------------------------------------------------------


def served(plugin: Callable[[Any], Any], kind: type) -> tuple[Watch, Any]:
    """Learn three tasks; return what was seen of the third one, and the plugin."""
    train = EXPERIMENT.scenario(load("digits"), 0).streams["train"]
    watch, made = Watch(), plugin(train)
    torch.manual_seed(0)
    learner = strategy(
        EXPERIMENT.model(), made, watch, kind=kind, train_mb_size=100, train_epochs=2
    )
    for experience in train[:3]:
        watch.steps.clear()
        watch.loaders.clear()
        learner.train(experience)
    return watch, made


@pytest.mark.parametrize(("kind", "fast"), [(ResidentNaive, True), (Naive, False)])
def test_replay_joins_each_batch_with_one_of_the_memory(kind: type, fast: bool) -> None:
    watch, plugin = served(lambda train: ERPlugin(train, memory=30), kind)
    assert (watch.loaders == {ReplayLoader}) is fast
    steps = watch.steps
    new, old = zip(
        *((step["mb_task_id"] == 2, step["mb_task_id"] < 2) for step in steps), strict=True
    )
    available = len(plugin.experiences[2].dataset)
    assert sum(int(mask.sum()) for mask in new) == 2 * available
    assert len(steps) == 2 * -(-available // 100)
    # The memory is smaller than a batch: all of it joins each.
    assert all(int(mask.sum()) == 30 for mask in old)
    seen = {tuple(row) for step in steps for row in step["mb_x"][step["mb_task_id"] < 2].tolist()}
    assert len(seen) == 30
    for task in (0, 1):
        data = plugin.experiences[task].dataset
        known = {tuple(data[i][0].tolist()) for i in range(len(data))}
        assert len(seen & known) == 15


def test_memory_serves_all_its_samples_alike() -> None:
    """A batch is smaller than the memory: rounds over all of it, each in an order of its own."""
    steps = served(lambda train: ERPlugin(train, memory=250), ResidentNaive)[0].steps
    rows = [tuple(r) for step in steps for r in step["mb_x"][step["mb_task_id"] < 2].tolist()]
    counts = [rows.count(row) for row in set(rows)]
    assert len(counts) == 250
    # An epoch of the new task is 12 batches: 4 rounds of 100, 100 and 50 samples.
    assert set(counts) == {8}
    assert rows[:250] != rows[250:500]


def test_memory_depends_on_seed_and_task_alone() -> None:
    train = EXPERIMENT.scenario(load("digits"), 0).streams["train"]

    def memory(seed: int, noise: int) -> Tensor:
        torch.manual_seed(noise)
        plugin = ERPlugin(train, 31, seed)
        for index in (0, 2):
            plugin._remember(index)
        torch.manual_seed(noise)
        expected = torch.rand(1)
        torch.manual_seed(noise)
        again = ERPlugin(train, 31, seed)
        again.load_state_dict(plugin.state_dict())
        assert torch.equal(torch.rand(1), expected)
        made, remade = (torch.stack([p.buffer[i][0] for i in range(31)]) for p in (plugin, again))
        assert torch.equal(made, remade)
        return made

    assert torch.equal(memory(1, 1), memory(1, 2))
    assert not torch.equal(memory(1, 1), memory(2, 1))


def test_a_memory_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="memory = 0"):
        ERPlugin([], memory=0)


# --- PackNet --------------------------------------------------------------------------------------


def packed(tasks: int = TASKS, **options: Any) -> tuple[Any, PackNetPlugin]:
    model = PackNetModel(network())
    plugin = PackNetPlugin(model, tasks, **options)
    return strategy(model, plugin), plugin


def test_packnet_forgets_nothing_bitwise_and_learns() -> None:
    train = stream()
    learner, _ = packed()
    before: list[Tensor] = []
    for task, experience in enumerate(train):
        torch.manual_seed(task)
        fresh = copy.deepcopy(learner.model.state_dict())
        learner.train(experience)
        assert any(not torch.equal(fresh[k], v) for k, v in learner.model.state_dict().items())
        before.append(logits(learner, experience))
        for old in range(task):
            assert torch.equal(logits(learner, train[old]), before[old])
    assert len({tuple(logit.flatten().tolist()) for logit in before}) == TASKS


def test_packnet_gives_each_task_the_same_number_of_weights() -> None:
    learner, _ = packed()
    for experience in stream():
        learner.train(experience)
    layers = [m for m in learner.model.modules() if hasattr(m, "task_index")]
    assert [int(layer.task_index.numel()) for layer in layers] == [120, 60]
    for layer in layers:
        counts = torch.bincount(layer.task_index.flatten().int(), minlength=TASKS)
        assert counts.tolist() == [layer.task_index.numel() // TASKS] * TASKS


@pytest.mark.parametrize(("prune", "left"), [(0.0, 0), (0.5, 60), (1.0, 120)])
def test_packnet_gives_up_the_share_asked_for(prune: float, left: int) -> None:
    learner, _ = packed(prune=prune)
    learner.train(stream()[0])
    assert int((learner.model.wrappee[0].task_index == 1).sum()) == left


@pytest.mark.parametrize(("retrain", "epochs", "cut"), [(0.25, 4, 3), (0.25, 1, 1), (0.0, 2, 2)])
def test_packnet_cuts_before_the_last_share_of_the_epochs(
    retrain: float, epochs: int, cut: int
) -> None:
    class States(SupervisedPlugin):
        def after_training_epoch(self, strategy: Any, **_: Any) -> None:
            trained.append(strategy.model.wrappee[0].state.name)

    trained: list[str] = []
    learner, _ = packed(retrain=retrain)
    learner.plugins.append(States())
    learner.train_epochs = epochs
    learner.train(stream()[0])
    assert trained == ["TRAINING"] * cut + ["POST_PRUNE"] * (epochs - cut)
    assert learner.model.task_count == 1
    assert int((learner.model.wrappee[0].task_index == 0).sum()) == 30


def test_packnet_goes_on_bit_for_bit_where_stock_forgets_the_biases() -> None:
    train = stream()

    def learn(learner: Any, tasks: slice) -> Any:
        for experience in train[tasks]:
            torch.manual_seed(int(experience.current_experience))
            learner.train(experience)
        return learner

    whole = learn(packed()[0], slice(None)).model.state_dict()
    half, plugin = packed()
    learn(half, slice(2))
    saved = copy.deepcopy(half.model.state_dict()), plugin.state_dict()

    resumed, plugin = packed()
    resumed.model.load_state_dict(saved[0])
    plugin.load_state_dict(saved[1])
    learn(resumed, slice(2, None))
    assert all(torch.equal(v, whole[k]) for k, v in resumed.model.state_dict().items())

    model = StockPackNetModel(network())
    stock = strategy(model, StockPackNetPlugin(1, [0.75, 2 / 3, 0.5, 0.0]))
    stock.model.load_state_dict(saved[0])
    learn(stock, slice(2, None))
    biases = [k for k in whole if k.endswith(".bias")]
    assert any(not torch.equal(stock.model.state_dict()[k], whole[k]) for k in biases)


def test_packnet_takes_one_label_and_refuses_several() -> None:
    """And it looks its task up again when a state has been loaded."""
    learner, _ = packed()
    for experience in stream()[:2]:
        learner.train(experience)
    model, stock = PackNetModel(network()), StockPackNetModel(network())
    x, labels = torch.randn(3, 6), torch.zeros(3, dtype=torch.int64)
    before = model.eval()(x, 0)  # it has been used when the state comes
    for loaded in (model, stock):
        loaded.load_state_dict(learner.model.state_dict())
    stock.eval()
    for task in (0, 1, 0, 2):
        expected = stock(x, labels + task)
        assert torch.equal(model(x, task), expected)
        assert torch.equal(model(x, labels + task), expected)
        assert not torch.equal(expected, before)
    assert not torch.equal(model(x, 0), model(x, 1))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        model(x, torch.tensor([0, 1, 1]))


def test_packnet_says_that_no_weight_is_left() -> None:
    learner, _ = packed(tasks=1)
    learner.train(stream()[0])
    with pytest.raises(ValueError, match="tasks=2"):
        learner.train(stream()[1])


@pytest.mark.parametrize(
    ("options", "says"), [({"retrain": 1.0}, "retrain"), ({"prune": 1.5}, "prune")]
)
def test_packnet_refuses_impossible_shares(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        packed(**options)


def test_packnet_refuses_what_would_move_old_weights() -> None:
    model = PackNetModel(network())
    learner = strategy(model, PackNetPlugin(model, TASKS))
    learner.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=0.01)
    with pytest.raises(ValueError, match="weight_decay=0"):
        learner.train(stream()[0])


def test_packnet_refuses_a_label_that_is_another_tasks() -> None:
    learner, _ = packed()
    with pytest.raises(ValueError, match=r"has to have the label 0, not 1"):
        learner.train(stream()[1])
    learner.train(stream()[0])
    with pytest.raises(ValueError, match=r"has to have the label 1, not 0"):
        learner.train(stream()[0])


def test_replay_refuses_an_experience_that_it_was_not_given() -> None:
    learner = strategy(network(), ERPlugin(stream()[1:3], memory=10))
    learner.train(stream()[1])
    assert learner.plugins[0].buffer.targets_task_labels[0] == 1
    with pytest.raises(ValueError, match=r"experience 0 is not among .* \(1, 2\)"):
        learner.train(stream()[0])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"strength": -1.0}, "strength"),
        ({"strength": float("nan")}, "strength"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_lwf_refuses_impossible_numbers(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LwFPlugin(**options)
