"""CLNPPlugin in Avalanche: zero forgetting bit by bit, whatever trains beside it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.benchmarks import (
    benchmark_from_datasets,
    tensors_benchmark,
    with_classes_timeline,
)
from avalanche.benchmarks.scenarios import with_task_labels
from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute
from avalanche.benchmarks.utils.classification_dataset import (
    TaskAwareSupervisedClassificationDataset,
)
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.models import (
    IncrementalClassifier,
    MTSimpleMLP,
    MultiHeadClassifier,
    MultiTaskModule,
    as_multitask,
)
from avalanche.training.plugins import (
    EarlyStoppingPlugin,
    EvaluationPlugin,
    EWCPlugin,
    LRSchedulerPlugin,
    LwFPlugin,
    ReplayPlugin,
    SupervisedPlugin,
)
from avalanche.training.supervised import Cumulative, Naive
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from clnp import (
    CLNP,
    CapacityExhausted,
    CLNPError,
    CLNPPlugin,
    FineTune,
    Incompatible,
    LogitDrift,
    UnsupportedNetwork,
)
from clnp.layout import pieces


class Replayed(ReplayPlugin):  # type: ignore[misc]
    """A user's own, of a kind that trains on old tasks."""


class Locked(nn.Module):
    """A model that can't be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock, self.head = threading.Lock(), nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)  # type: ignore[no-any-return]


def compiled() -> nn.Module:
    """A model of which a part is compiled in place."""
    model = mlp()
    model[1].compile()
    return model


CLASSES = 3
FEATURES = 12
IMAGE = (2, 6, 6)


def blobs(task: int, count: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Gaussian blobs, one a class, at places that depend on the task."""
    places = torch.randn(CLASSES, *shape, generator=torch.Generator().manual_seed(task))
    generator = torch.Generator().manual_seed(1000 * count + task)
    labels = torch.arange(count) % CLASSES
    return places[labels] * 1.5 + torch.randn(count, *shape, generator=generator), labels


def labelled(x: Tensor, y: Tensor, labels: list[int]) -> AvalancheDataset[Any]:
    """Samples, each of the task of its label."""
    return TaskAwareSupervisedClassificationDataset(
        [TensorDataset(x, y)],
        data_attributes=[
            DataAttribute(y.tolist(), "targets"),
            DataAttribute(labels, "targets_task_labels", use_in_getitem=True),
        ],
    )


def experience(task: int, label: int, count: int, shape: tuple[int, ...]) -> AvalancheDataset[Any]:
    return labelled(*blobs(task, count, shape), [label] * count)


def benchmark(
    tasks: int = 3,
    shape: tuple[int, ...] = (FEATURES,),
    count: int = 60,
    labels: Callable[[int], int] = lambda task: task,
) -> Any:
    streams = {
        name: [experience(task, labels(task), n, shape) for task in range(tasks)]
        for name, n in (("train", count), ("valid", 30), ("test", 33))
    }
    made = with_classes_timeline(with_task_labels(benchmark_from_datasets(**streams)))
    for stream in made.streams.values():
        for exp in stream:  # a set, with which Avalanche's own masking of heads fails
            exp.classes_in_this_experience = sorted(exp.classes_in_this_experience)
    return made


def mlp(width: int = 24) -> nn.Module:
    return nn.Sequential(
        nn.Linear(FEATURES, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, CLASSES),
    )


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(IMAGE[0], 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 10, 3, padding=1, bias=False),
        nn.BatchNorm2d(10),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(90, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, CLASSES),
    )


def conv_head() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(IMAGE[0], 12, 3, stride=2),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 1),
        nn.ReLU(),
        nn.Conv2d(16, CLASSES, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


class DenseNorms(nn.Module):
    """Concatenation, and norms over what was concatenated and over groups of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(IMAGE[0], 12, 3, padding=1), nn.GroupNorm(6, 12)
        self.b, self.both = nn.Conv2d(12, 8, 3, padding=1), nn.BatchNorm2d(20)
        self.c = nn.Conv2d(20, 18, 1, bias=False)
        self.depthwise, self.head = nn.Conv2d(18, 18, 3, groups=18), nn.Linear(18, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        a = nn.functional.relu(self.norm(self.a(x)))
        c = self.c(nn.functional.relu(self.both(torch.cat([a, self.b(a)], 1))))
        return self.head(nn.functional.relu(self.depthwise(c)).mean((2, 3)))  # type: ignore[no-any-return]


class MultiHead(MultiTaskModule):
    """A convolutional network with a head a task, as users write it."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(IMAGE[0], 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.1),
            nn.Flatten(),
            nn.Linear(72, 14),
            nn.ReLU(),
        )
        self.classifier = MultiHeadClassifier(14, CLASSES)

    def forward(self, x: Tensor, task_labels: Any) -> Tensor:
        return self.classifier(self.features(x), task_labels)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-3),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.003, momentum=0.5),
    "adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.05, fused=True),
}


def strategy(
    model: nn.Module,
    *plugins: Any,
    optimizer: Callable[[Any], torch.optim.Optimizer] = OPTIMIZERS["adam"],
    epochs: int = 3,
    base: type = Naive,
    metrics: Any = (),
    **options: Any,
) -> Any:
    return base(
        model=model,
        optimizer=optimizer(model.parameters()),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=20,
        train_epochs=epochs,
        eval_mb_size=16,
        plugins=list(plugins),
        evaluator=EvaluationPlugin(*metrics, loggers=[]),
        **options,
    )


def frozen_entries(plugin: CLNPPlugin) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in plugin.network._frozen().items()}


def assert_no_interference(plugin: CLNPPlugin) -> None:
    """W_int = 0: no row of a learnt task reads a unit that came later."""
    network, layout = plugin.network, plugin.network.layout
    readers = {part.layer for group in layout.groups for part in group.readers}
    nothing = dict.fromkeys(layout.widths, 0)
    for task in range(len(plugin.tasks)):
        used = network.partition.after(task)
        for name in readers - {layout.head}:
            weight = network.modules[name].weight
            later = layout.runs(layout.columns[name], used, layout.widths, inputs=False)
            for rows in pieces(weight, layout.runs(layout.rows[name], nothing, used)):
                assert not any(columns.any() for columns in pieces(rows, later, 1))


def learn_and_watch(
    trainer: Any, plugin: CLNPPlugin, stream: Any, x: Tensor, names: list[int] | None = None
) -> None:
    """Train on a stream; after each task all older logits and frozen entries are as they were."""
    names = list(range(len(stream))) if names is None else names
    kept: dict[int, Tensor] = {}
    entries: dict[str, Tensor] = {}
    for task, exp in zip(names, stream, strict=True):
        free_before = copy.deepcopy(trainer.model.state_dict())
        trainer.train(exp, eval_streams=[])
        for old, logits in kept.items():
            assert torch.equal(plugin.subnetwork(old)(x), logits), f"task {old} after task {task}"
        now = frozen_entries(plugin)
        for name, before in entries.items():
            part = now[name][tuple(slice(n) for n in before.shape)]
            assert torch.equal(part, before), name
        assert_no_interference(plugin)
        kept[task] = plugin.subnetwork(task)(x)
        entries = now
        moved = [
            name
            for name, tensor in trainer.model.state_dict().items()
            if name in free_before and not torch.equal(tensor, free_before[name])
        ]
        assert moved, "nothing was trained"
    used = plugin.capacity().groupby("layer").used.max()
    assert (used > 0).all()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_optimizer_reaches_what_is_frozen(optimizer: str) -> None:
    plugin = CLNPPlugin(margin=0.1, l1=1e-3)
    trainer = strategy(mlp(), plugin, optimizer=OPTIMIZERS[optimizer])
    learn_and_watch(trainer, plugin, benchmark().train_stream, blobs(0, 17, (FEATURES,))[0])


@pytest.mark.parametrize(
    ("network", "margin"), [(convnet, 0.1), (conv_head, 0.1), (DenseNorms, 0.6)]
)
@pytest.mark.parametrize("head_bias", ["shared", "per-task", "none"])
def test_single_head_convolutions_forget_nothing(
    network: Callable[[], nn.Module], margin: float, head_bias: str
) -> None:
    plugin = CLNPPlugin(margin=margin, l1=1e-3, head_bias=head_bias)
    trainer = strategy(network(), plugin)
    learn_and_watch(trainer, plugin, benchmark(shape=IMAGE).train_stream, blobs(0, 9, IMAGE)[0])


@pytest.mark.parametrize("masked", [True, False])
def test_heads_of_their_own_forget_nothing(masked: bool) -> None:
    model = MultiHead()
    model.classifier.masking = masked
    plugin = CLNPPlugin(margin=0.1, l1=1e-3)
    trainer = strategy(model, plugin, optimizer=OPTIMIZERS["sgd"])
    learn_and_watch(trainer, plugin, benchmark(shape=IMAGE).train_stream, blobs(0, 9, IMAGE)[0])


def test_avalanches_own_multi_task_models() -> None:
    for model in (
        MTSimpleMLP(input_size=FEATURES, hidden_size=20),
        as_multitask(nn.Sequential(nn.Linear(FEATURES, 9), nn.ReLU(), nn.Linear(9, 3)), "2"),
    ):
        plugin = CLNPPlugin(margin=0.1, l1=1e-3)
        trainer = strategy(model, plugin)
        stream = benchmark(tasks=2).train_stream
        learn_and_watch(trainer, plugin, stream, blobs(0, 9, (FEATURES,))[0])


def test_parameter_groups_schedules_and_clipping() -> None:
    model = mlp()

    class Clip(SupervisedPlugin):  # type: ignore[misc]
        def before_update(self, strategy: Any, **_: Any) -> None:
            torch.nn.utils.clip_grad_norm_(strategy.model.parameters(), 0.1)

    optimizer = torch.optim.SGD(
        [
            {"params": model[0].parameters(), "lr": 0.1, "weight_decay": 0.1},
            {"params": [*model[2].parameters(), *model[4].parameters()]},
        ],
        lr=0.05,
        momentum=0.9,
    )
    schedule = LRSchedulerPlugin(torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))
    plugin = CLNPPlugin(margin=0.1, l1=1e-3)
    trainer = strategy(model, plugin, schedule, Clip(), optimizer=lambda _: optimizer)
    learn_and_watch(trainer, plugin, benchmark().train_stream, blobs(0, 9, (FEATURES,))[0])
    groups = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    assert groups == [
        {id(p) for p in model[0].parameters()},
        {id(p) for layer in (2, 4) for p in model[layer].parameters()},
    ]
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_the_model_is_left_as_the_user_knows_it() -> None:
    model = mlp()
    parameters = dict(model.named_parameters())
    plugin = CLNPPlugin(margin=0.1)
    strategy(model, plugin).train(benchmark(tasks=1).train_stream[0], eval_streams=[])
    assert {name: id(p) for name, p in model.named_parameters()} == {
        name: id(p) for name, p in parameters.items()
    }
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert all(module.training for module in model.modules())


def test_a_subnetwork_evaluates_whatever_is_called_on_it() -> None:
    model = convnet()
    plugin = CLNPPlugin(margin=0.1, l1=1e-3)
    trainer = strategy(model, plugin)
    for exp in benchmark(tasks=2, shape=IMAGE).train_stream:
        trainer.train(exp, eval_streams=[])
    x = blobs(0, 40, IMAGE)[0]
    network = plugin.subnetwork(0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = network.eval()(x)
    model.train()
    assert not network.train().training
    assert torch.equal(network(x), logits)
    assert model.training
    assert not network(x).requires_grad
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_accuracy_on_old_tasks_is_constant() -> None:
    """R[i, j], measured anew after each task, doesn't depend on i; finetuning's does."""
    rows: dict[bool, list[list[float]]] = {True: [], False: []}
    bench = benchmark(tasks=3, count=120)
    drift = {True: LogitDrift(), False: LogitDrift()}
    for ours in rows:
        plugins = [CLNPPlugin(margin=0.05, l1=1e-3)] if ours else []
        metrics = (accuracy_metrics(experience=True), drift[ours])
        trainer = strategy(mlp(40), *plugins, metrics=metrics, epochs=8)
        for exp in bench.train_stream:
            trainer.train(exp, eval_streams=[])
            values = trainer.eval(bench.test_stream)
            rows[ours].append(
                [
                    values[f"Top1_Acc_Exp/eval_phase/test_stream/Task00{t}/Exp00{t}"]
                    for t in range(3)
                ]
            )
    for task in range(3):
        assert len({row[task] for row in rows[True][task:]}) == 1
        assert rows[True][-1][task] > 0.8
    assert rows[False][-1][0] < rows[False][0][0]
    assert drift[True].drift() == {0: 0.0, 1: 0.0, 2: 0.0}
    assert drift[False].drift()[0] > 0.1


def test_evaluation_during_training_and_of_unlearnt_tasks() -> None:
    """The task in training runs uncut, old ones on their own slice, coming ones on the newest."""
    for model, shape in ((mlp(), (FEATURES,)), (MultiHead(), IMAGE)):
        bench = benchmark(tasks=3, shape=shape)
        seen: list[tuple[int, Tensor]] = []

        class Watch(SupervisedPlugin):  # type: ignore[misc]
            def after_eval_iteration(
                self, strategy: Any, seen: list[tuple[int, Tensor]] = seen, **_: Any
            ) -> None:
                if strategy.clock.train_exp_counter == 1 and strategy.experience:
                    seen.append((strategy.experience.current_experience, strategy.mb_output))

        plugin = CLNPPlugin(margin=0.1, l1=1e-3)
        trainer = strategy(model, plugin, Watch(), eval_every=1, epochs=2)
        trainer.train(bench.train_stream[0], eval_streams=[])
        # Sixteen rows: the evaluation's own first batch, since the promise is for the same batch.
        logits = plugin.subnetwork(0)(blobs(0, 33, shape)[0][:16])
        trainer.train(bench.train_stream[1], eval_streams=[bench.test_stream])
        old = [output for index, output in seen if index == 0 and len(output) == 16]
        assert len(old) >= 4
        assert all(torch.equal(output[:, :CLASSES], logits) for output in old[::2])
        trained = [output for index, output in seen if index == 1 and len(output) == 16]
        assert not torch.equal(trained[0], trained[2])
        trainer.eval(bench.test_stream)


def test_a_batch_of_mixed_labels_is_split() -> None:
    for model, shape in ((mlp(), (FEATURES,)), (MultiHead(), IMAGE)):
        bench = benchmark(tasks=2, shape=shape)
        if isinstance(model, MultiHead):  # Avalanche masks heads of single labels alone
            model.classifier.masking = False
        plugin = CLNPPlugin(margin=0.1, l1=1e-3)
        outputs: list[Tensor] = []

        class Watch(SupervisedPlugin):  # type: ignore[misc]
            def after_eval_iteration(
                self, strategy: Any, outputs: list[Tensor] = outputs, **_: Any
            ) -> None:
                outputs.append(strategy.mb_output)

        trainer = strategy(model, plugin, Watch())
        for exp in bench.train_stream:
            trainer.train(exp, eval_streams=[])
        x, y = blobs(0, 12, shape)
        labels = [0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 0, 0]
        mixed = labelled(x, y, labels)
        stream = with_classes_timeline(
            with_task_labels(benchmark_from_datasets(mixed=[mixed]))
        ).streams["mixed"]
        outputs.clear()
        trainer.eval(stream)
        for task in (0, 1):
            rows = torch.tensor([i for i, label in enumerate(labels) if label == task])
            expected = plugin.subnetwork(task)(x[rows])
            assert torch.equal(outputs[0][rows][:, :CLASSES], expected)


def test_a_batch_of_mixed_labels_sees_the_task_in_training() -> None:
    bench, outputs = benchmark(tasks=2), {}
    x, y = blobs(1, 12, (FEATURES,))
    mixed = labelled(x, y, [0, 1] * 6)
    alone = labelled(x[1::2], y[1::2], [1] * 6)
    streams = with_classes_timeline(
        with_task_labels(benchmark_from_datasets(mixed=[mixed], alone=[alone]))
    ).streams

    class Watch(SupervisedPlugin):  # type: ignore[misc]
        def after_eval_iteration(self, strategy: Any, **_: Any) -> None:
            outputs[len(set(strategy.experience.task_labels))] = strategy.mb_output

    plugin = CLNPPlugin(margin=0.1, l1=1e-3)
    trainer = strategy(mlp(), plugin, Watch(), eval_every=1)
    trainer.train(bench.train_stream[0], eval_streams=[])
    both = [streams["mixed"], streams["alone"]]
    kinds: list[tuple[Tensor, Tensor]] = []

    class Compare(SupervisedPlugin):  # type: ignore[misc]
        def after_training_epoch(self, strategy: Any, **_: Any) -> None:
            kinds.append((outputs[2], outputs[1]))

    trainer.plugins.append(Compare())
    trainer.train(bench.train_stream[1], eval_streams=both)
    assert len(kinds) == 3
    for together, by_itself in kinds:
        assert torch.allclose(together[1::2, :CLASSES], by_itself, atol=1e-5)


def test_tasks_are_named_by_distinct_labels_else_by_index() -> None:
    named = benchmark(tasks=2, labels=lambda task: 7 - task)
    plugin = CLNPPlugin(margin=0.1)
    trainer = strategy(mlp(), plugin)
    learn_and_watch(trainer, plugin, named.train_stream, blobs(0, 9, (FEATURES,))[0], [7, 6])
    assert plugin.tasks == [7, 6]
    with pytest.raises(ValueError, match="task 7 has been learnt already"):
        trainer.train(named.train_stream[0], eval_streams=[])
    with pytest.raises(KeyError, match=r"learnt so far: \[7, 6\]"):
        plugin.subnetwork(0)

    alike = benchmark(tasks=2, labels=lambda _: 0)
    plugin = CLNPPlugin(margin=0.1)
    trainer = strategy(mlp(60), plugin)
    learn_and_watch(trainer, plugin, alike.train_stream, blobs(0, 9, (FEATURES,))[0])
    assert plugin.tasks == [0, 1]
    x = blobs(0, 9, (FEATURES,))[0]
    learnt = plugin.subnetwork(0)(x)
    other = benchmark(tasks=2, labels=lambda _: 0)  # its experience 0 is another task's
    for stream in (alike.train_stream, other.train_stream):
        with pytest.raises(ValueError, match=r"experience 0 has been learnt.*by their inde"):
            trainer.train(stream[0], eval_streams=[])
    assert plugin.tasks == [0, 1]
    assert torch.equal(plugin.subnetwork(0)(x), learnt)


def test_held_out_data_is_seeded_and_never_trained_on() -> None:
    def train(seed: int, swap: bool) -> tuple[dict[str, Any], Tensor]:
        torch.manual_seed(0)
        bench = benchmark(tasks=1, count=100)
        plugin = CLNPPlugin(margin=0.1, seed=seed)
        seen: list[Tensor] = []

        class Watch(SupervisedPlugin):  # type: ignore[misc]
            def after_training_iteration(self, strategy: Any, **_: Any) -> None:
                seen.append(strategy.mb_x)

        trainer = strategy(mlp(), plugin, Watch(), epochs=1)
        trainer.train(bench.train_stream[0], eval_streams=[])
        return plugin.history[0], torch.cat(seen)

    history, trained = train(0, False)
    again, retrained = train(0, False)
    other, others = train(1, False)
    assert len(trained) == 90
    assert history == again
    assert torch.equal(trained, retrained)
    assert not torch.equal(trained.sum(0), others.sum(0))
    assert other["task"] == 0


def test_interruption_leaves_learnt_tasks_whole() -> None:
    bench = benchmark(tasks=2)

    class Stop(SupervisedPlugin):  # type: ignore[misc]
        armed = False

        def after_training_epoch(self, strategy: Any, **_: Any) -> None:
            if self.armed:
                raise KeyboardInterrupt

    stop, plugin, model = Stop(), CLNPPlugin(margin=0.1, l1=1e-3), convnet()
    bench = benchmark(tasks=2, shape=IMAGE)
    trainer = strategy(model, plugin, stop)
    trainer.train(bench.train_stream[0], eval_streams=[])
    x = blobs(0, 9, IMAGE)[0]
    logits = plugin.subnetwork(0)(x)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    stop.armed = True
    with pytest.raises(KeyboardInterrupt):
        trainer.train(bench.train_stream[1], eval_streams=[])
    assert torch.equal(plugin.subnetwork(0)(x), logits)
    stop.armed = False
    with pytest.warns(UserWarning, match="task 1 was interrupted"):
        trainer.train(bench.train_stream[1], eval_streams=[])
    assert plugin.tasks == [0, 1]
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    assert torch.equal(plugin.subnetwork(0)(x), logits)


def test_a_saved_state_is_the_way_back_from_an_interruption() -> None:
    bench = benchmark(tasks=2)

    class Stop(SupervisedPlugin):  # type: ignore[misc]
        def after_training_epoch(self, strategy: Any, **_: Any) -> None:
            if plugin.tasks:
                raise KeyboardInterrupt

    plugin, model = CLNPPlugin(margin=0.1, l1=1e-3), mlp()
    trainer = strategy(model, plugin, Stop())
    trainer.train(bench.train_stream[0], eval_streams=[])
    state, weights = copy.deepcopy(plugin.state_dict()), copy.deepcopy(model.state_dict())
    x = blobs(0, 9, (FEATURES,))[0]
    logits = plugin.subnetwork(0)(x)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(bench.train_stream[1], eval_streams=[])
    with pytest.warns(UserWarning, match="task 1 was interrupted"):
        plugin.load_state_dict(state, model)
    model.load_state_dict(weights)
    assert torch.equal(plugin.subnetwork(0)(x), logits)
    assert plugin.state_dict()["names"] == [0]


def test_a_group_that_another_plugin_adds_stays() -> None:
    extra = nn.Parameter(torch.zeros(3))

    class Add(SupervisedPlugin):  # type: ignore[misc]
        def before_training_exp(self, strategy: Any, **_: Any) -> None:
            strategy.optimizer.add_param_group({"params": [extra]})

    plugin, model = CLNPPlugin(margin=0.1, l1=1e-3), mlp()
    trainer = strategy(model, plugin, Add())
    trainer.train(benchmark(tasks=1).train_stream[0], eval_streams=[])
    assert plugin.tasks == [0]
    groups = [group["params"] for group in trainer.optimizer.param_groups]
    assert [len(group) for group in groups] == [len(list(model.parameters())), 1]
    assert groups[1][0] is extra


def test_a_write_to_frozen_weights_is_found_out() -> None:
    model, bench = mlp(), benchmark(tasks=2)
    original = model[0].weight

    class Vandal(SupervisedPlugin):  # type: ignore[misc]
        def after_training_epoch(self, strategy: Any, **_: Any) -> None:
            if strategy.clock.train_exp_counter == 1:
                original.data[0, 0] += 1e-3

    plugin = CLNPPlugin(margin=0.1)
    trainer = strategy(model, plugin, Vandal())
    trainer.train(bench.train_stream[0], eval_streams=[])
    with pytest.raises(Incompatible, match="wrote into frozen weights"):
        trainer.train(bench.train_stream[1], eval_streams=[])


def learnt_one(model: nn.Module, shape: tuple[int, ...] = (FEATURES,)) -> tuple[Any, Any, Any]:
    """A strategy whose plugin has learnt one task of two, the plugin, and the training stream."""
    torch.manual_seed(0)
    plugin, stream = CLNPPlugin(margin=0.1, l1=1e-3), benchmark(tasks=2, shape=shape).train_stream
    trainer = strategy(model, plugin, epochs=2)
    trainer.train(stream[0], eval_streams=[])
    return trainer, plugin, stream


def rewrite(model: nn.Module) -> None:
    """Train without the plugin."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(9, FEATURES)).square().sum().backward()
    optimizer.step()


def swap(model: nn.Module) -> None:
    """Change two units that are read alike, whose sum stays the same."""
    with torch.no_grad():
        weight = model.get_submodule("0").weight
        weight[:2] = weight[[1, 0]]


@pytest.mark.parametrize("damage", [rewrite, swap, lambda model: model.half()])
def test_a_write_between_tasks_is_found_out_wherever_it_would_be_read(
    damage: Callable[[nn.Module], Any],
) -> None:
    trainer, plugin, stream = learnt_one(mlp())
    saved, weights = plugin.state_dict(), copy.deepcopy(trainer.model.state_dict())
    damage(trainer.model)
    for use in (
        lambda: plugin.subnetwork(0),
        lambda: plugin.compact(0),
        lambda: plugin.state_dict(),
        lambda: plugin.expand({"0": 16}),
        lambda: trainer.eval(stream[:1]),
        lambda: trainer.train(stream[1], eval_streams=[]),
    ):
        with pytest.raises(Incompatible, match=r"wrote into frozen weights: 0\.weight.*task 0 was"):
            use()
    trainer.model.float()
    plugin.load_state_dict(saved, trainer.model)
    trainer.model.load_state_dict(weights)
    trainer.train(stream[1], eval_streams=[])
    assert plugin.tasks == [0, 1]


def test_running_statistics_moved_between_tasks_are_found_out() -> None:
    trainer, plugin, _ = learnt_one(convnet(), IMAGE)
    trainer.model.train()
    trainer.model(torch.randn(9, *IMAGE) + 5.0)
    with pytest.raises(Incompatible, match=r"running_mean.* changed after task 0"):
        plugin.subnetwork(0)


def test_weights_put_in_at_the_end_of_a_task_are_found_out() -> None:
    class Average(SupervisedPlugin):  # type: ignore[misc]
        def after_training_exp(self, strategy: Any, **_: Any) -> None:
            with torch.no_grad():
                for parameter in strategy.model.parameters():
                    parameter.mul_(0.9)

    trainer = strategy(mlp(), CLNPPlugin(margin=0.1), Average(), epochs=1)
    with pytest.raises(Incompatible, match="wrote into frozen weights"):
        trainer.train(benchmark(tasks=2).train_stream, eval_streams=[])


class Temperature(nn.Module):
    """Divides by a constant that belongs to no unit."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("t", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x / self.t  # type: ignore[no-any-return]


def test_a_constant_that_a_plugin_changes_is_found_out() -> None:
    class Anneal(SupervisedPlugin):  # type: ignore[misc]
        def before_training_epoch(self, strategy: Any, **_: Any) -> None:
            strategy.model[1].t.mul_(0.9)

    model = nn.Sequential(
        nn.Linear(FEATURES, 20), Temperature(), nn.ReLU(), nn.Linear(20, 20), nn.ReLU()
    )
    model.append(nn.Linear(20, CLASSES))
    trainer = strategy(model, CLNPPlugin(margin=0.1), Anneal(), epochs=1)
    stream = benchmark(tasks=2).train_stream
    trainer.train(stream[0], eval_streams=[])
    with pytest.raises(Incompatible, match=r"wrote into frozen weights: 1\.t "):
        trainer.train(stream[1], eval_streams=[])


def test_constants_drawn_by_the_model_come_with_its_own_state() -> None:
    def fresh(seed: int) -> tuple[Any, CLNPPlugin]:
        torch.manual_seed(seed)
        model = mlp()
        model.insert(1, Temperature())
        model[1].t.uniform_(1, 2)
        plugin = CLNPPlugin(margin=0.1)
        return strategy(model, plugin, epochs=1), plugin

    stream, x = benchmark(tasks=2).train_stream, blobs(0, 9, (FEATURES,))[0]
    trainer, plugin = fresh(0)
    trainer.train(stream[0], eval_streams=[])
    other, loaded = fresh(1)
    loaded.load_state_dict(plugin.state_dict(), other.model)
    other.model.load_state_dict(trainer.model.state_dict())
    other.train(stream[1], eval_streams=[])
    assert torch.equal(loaded.subnetwork(0)(x), plugin.subnetwork(0)(x))
    other.model[1].t.mul_(2)
    with pytest.raises(Incompatible, match=r"1\.t changed"):
        loaded.subnetwork(0)


@pytest.mark.parametrize(
    "renew",
    [
        lambda model: [setattr(p, "data", p.data.clamp(-9, 9)) for p in model.parameters()],
        lambda model: nn.utils.vector_to_parameters(
            nn.utils.parameters_to_vector(model.parameters()).clone(), model.parameters()
        ),
    ],
)
def test_training_is_kept_where_parameters_get_a_storage_of_their_own(
    renew: Callable[[nn.Module], Any],
) -> None:
    class Renew(SupervisedPlugin):  # type: ignore[misc]
        def after_training_iteration(self, strategy: Any, **_: Any) -> None:
            renew(strategy.model)

    def run(*plugins: Any) -> tuple[list[Any], dict[str, Tensor]]:
        torch.manual_seed(0)
        plugin, model = CLNPPlugin(margin=0.1, l1=1e-3), mlp()
        strategy(model, plugin, *plugins).train(benchmark(tasks=2).train_stream, eval_streams=[])
        return plugin.history, dict(model.state_dict())

    history, weights = run(Renew())
    expected, plain = run()
    assert history == expected
    assert all(torch.equal(weights[name], plain[name]) for name in plain)


def test_a_body_that_does_not_train_is_kept_for_every_task() -> None:
    torch.manual_seed(0)
    model, x = convnet(), blobs(0, 9, IMAGE)[0]
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    first.requires_grad_(False)
    pretrained = first.weight.clone()
    trainer, plugin, stream = learnt_one(model, IMAGE)
    learnt = plugin.subnetwork(0)(x)
    trainer.train(stream[1], eval_streams=[])
    assert torch.equal(plugin.subnetwork(0)(x), learnt)
    rows = [row for row in first.weight if any(torch.equal(row, p) for p in pretrained)]
    assert len(rows) == len(pretrained)
    table = plugin.capacity()
    assert (table[table.layer == table.layer.iloc[0]].used == len(pretrained)).all()
    assert (table[table.layer != table.layer.iloc[0]].free > 0).any()


def test_training_goes_on_after_an_interrupted_evaluation() -> None:
    class Stop(SupervisedPlugin):  # type: ignore[misc]
        armed = True

        def before_eval_forward(self, strategy: Any, **_: Any) -> None:
            if self.armed:
                raise KeyboardInterrupt

    trainer, plugin, stream = learnt_one(mlp())
    x = blobs(0, 9, (FEATURES,))[0]
    learnt, stop = plugin.subnetwork(0)(x), Stop()
    trainer.plugins.append(stop)
    trainer.train_epochs = 20
    for again in (lambda: None, lambda: trainer.eval(stream[:1])):
        stop.armed = True
        with pytest.raises(KeyboardInterrupt):
            trainer.eval(stream)
        stop.armed = False
        again()
        assert torch.is_grad_enabled()
    trainer.train(stream[1], eval_streams=[])
    assert torch.is_grad_enabled()
    assert plugin.tasks == [0, 1]
    assert plugin.history[1]["trained_validation"] > 0.5
    assert torch.equal(plugin.subnetwork(0)(x), learnt)


def test_a_label_that_a_learnt_head_lacks_is_refused_before_the_head_grows() -> None:
    body = nn.Sequential(nn.Linear(FEATURES, 20), nn.ReLU())

    class Net(MultiTaskModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.body = body
            self.head = MultiHeadClassifier(20, masking=False)

        def forward(self, x: Tensor, task_labels: Tensor) -> Tensor:
            return self.head(self.body(x), task_labels)  # type: ignore[no-any-return]

    plugin, stream = CLNPPlugin(margin=0.1), benchmark(tasks=2).train_stream
    trainer = strategy(Net(), plugin, epochs=1)
    trainer.train(stream[0], eval_streams=[])
    x = blobs(0, 9, (FEATURES,))[0]
    learnt = plugin.subnetwork(0)(x)
    y = torch.arange(9) % 5
    more = TaskAwareSupervisedClassificationDataset(
        [TensorDataset(x, y)],
        data_attributes=[
            DataAttribute(y.tolist(), "targets"),
            DataAttribute([0] * 9, "targets_task_labels", use_in_getitem=True),
        ],
    )
    made = with_classes_timeline(with_task_labels(benchmark_from_datasets(train=[more])))
    with pytest.raises(Incompatible, match="label 4, but the head of task 0 has 3 outputs"):
        trainer.eval(made.train_stream)
    assert torch.equal(plugin.subnetwork(0)(x), learnt)


@pytest.mark.parametrize("evaluated", [True, False])
def test_a_single_head_that_grows_is_refused_before_it_changes_a_learnt_task(
    evaluated: bool,
) -> None:
    torch.manual_seed(0)
    plugin, body = CLNPPlugin(margin=0.1), [nn.Linear(FEATURES, 20), nn.ReLU()]
    trainer = strategy(nn.Sequential(*body, IncrementalClassifier(20, 2)), plugin, epochs=1)
    x, y = blobs(0, 60, (FEATURES,))
    train = [(x, y), (x, y + 3)]
    bench = tensors_benchmark(train_tensors=train, test_tensors=train, task_labels=[0, 1])
    if evaluated:
        trainer.eval(bench.test_stream[:1])  # nothing to lose yet
    trainer.train(bench.train_stream[0], eval_streams=[])
    logits = plugin.subnetwork(0)(x)
    trainer.eval(bench.test_stream[:1])
    for use in (
        lambda: trainer.eval(bench.test_stream),
        lambda: trainer.train(bench.train_stream[1], eval_streams=[]),
    ):
        with pytest.raises(Incompatible, match="'2' is an IncrementalClassifier"):
            use()
        assert torch.equal(plugin.subnetwork(0)(x), logits)


def test_a_diverged_first_task_says_that_the_model_is_to_be_built_anew() -> None:
    trainer = strategy(mlp(), CLNPPlugin(margin=0.1), epochs=1)
    stream = benchmark(tasks=1).train_stream
    for group in trainer.optimizer.param_groups:
        group["lr"] = 1e30
    with pytest.raises(CLNPError, match=r"diverged.*built anew"):
        trainer.train(stream[0], eval_streams=[])
    with pytest.raises(CLNPError, match=r"before the first task.*Build the model anew"):
        trainer.train(stream[0], eval_streams=[])


def test_inputs_as_arrays_are_taken() -> None:
    x, y = blobs(0, 40, (FEATURES,))
    data = TaskAwareSupervisedClassificationDataset(
        [list(zip(x.numpy(), y.tolist(), strict=True))],
        data_attributes=[
            DataAttribute(y.tolist(), "targets"),
            DataAttribute([0] * 40, "targets_task_labels", use_in_getitem=True),
        ],
    )
    stream = with_classes_timeline(
        with_task_labels(benchmark_from_datasets(train=[data]))
    ).train_stream
    plugin = CLNPPlugin(margin=0.1)
    strategy(mlp(), plugin, epochs=1).train(stream[0], eval_streams=[])
    assert plugin.tasks == [0]


def test_state_restores_in_a_fresh_model_and_goes_on_bit_by_bit() -> None:
    bench = benchmark(tasks=3, shape=IMAGE)

    def fresh() -> tuple[Any, CLNPPlugin]:
        torch.manual_seed(1)
        plugin = CLNPPlugin(margin=0.1, l1=1e-3, head_bias="per-task")
        return strategy(convnet(), plugin), plugin

    def train(trainer: Any, task: int) -> None:
        torch.manual_seed(10 + task)
        trainer.train(bench.train_stream[task], eval_streams=[], reset_optimizer_state=True)

    whole, plugin = fresh()
    train(whole, 0)
    state = copy.deepcopy(plugin.state_dict())
    train(whole, 1)
    train(whole, 2)
    resumed, restored = fresh()
    restored.load_state_dict(state, resumed.model)
    train(resumed, 1)
    train(resumed, 2)
    x = blobs(0, 9, IMAGE)[0]
    for task in range(3):
        assert torch.equal(plugin.subnetwork(task)(x), restored.subnetwork(task)(x))
    assert plugin.history == restored.history
    assert plugin.capacity().equals(restored.capacity())
    assert plugin.sufficiency().equals(restored.sufficiency())
    with pytest.raises(ValueError, match="the state is of a network with layers"):
        CLNPPlugin().load_state_dict(state, conv_head())


def test_heads_that_were_only_evaluated_come_back_too(tmp_path: Path) -> None:
    """Avalanche makes heads of tasks to come when it evaluates them."""
    bench = benchmark(tasks=3, shape=IMAGE)
    plugin, model = CLNPPlugin(margin=np.float64(0.1), l1=1e-3), MultiHead()
    trainer = strategy(model, plugin)
    trainer.train(bench.train_stream[0], eval_streams=[])
    trainer.eval(bench.test_stream)
    assert len(model.classifier.classifiers) == 3
    torch.save({"plugin": plugin.state_dict(), "model": model.state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")  # plain numbers: NumPy's would be refused
    other, restored = MultiHead(), CLNPPlugin(margin=0.1, l1=1e-3)
    restored.load_state_dict(state["plugin"], other)
    other.load_state_dict(state["model"])
    assert other.classifier.known_train_tasks_labels == {0}
    x = blobs(0, 9, IMAGE)[0]
    assert torch.equal(plugin.subnetwork(0)(x), restored.subnetwork(0)(x))
    # A state from before it was told makes those of learnt tasks.
    third = MultiHead()
    del state["plugin"]["avalanche_heads"]
    CLNPPlugin().load_state_dict(state["plugin"], third)
    assert list(third.classifier.classifiers) == ["0"]


class Skip(MultiTaskModule):
    """Layer and heads read the network's input beside units."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(FEATURES, 24), nn.Linear(24 + FEATURES, 20)
        self.heads = nn.ModuleList([nn.Linear(20 + FEATURES, CLASSES) for _ in range(3)])

    def forward_single_task(self, x: Tensor, task_label: int) -> Tensor:
        h = torch.cat([nn.functional.relu(self.a(x)), x], 1)
        h = torch.cat([nn.functional.relu(self.b(h)), x], 1)
        return self.heads[task_label](h)  # type: ignore[no-any-return]


@pytest.mark.parametrize("widens", [False, True])
def test_heads_of_their_own_may_read_the_input(widens: bool) -> None:
    expand = {"a": (24, 16), "b": (20, 16)} if widens else None
    plugin = CLNPPlugin(margin=0.2, l1=1e-2, expand=expand)
    trainer, x, kept = strategy(Skip(), plugin), blobs(0, 9, (FEATURES,))[0], []
    for task, exp in enumerate(benchmark(tasks=3).train_stream):
        trainer.train(exp, eval_streams=[])
        for old, logits in enumerate(kept):
            assert torch.equal(plugin.subnetwork(old)(x), logits)
        kept.append(plugin.subnetwork(task)(x))
        assert_no_interference(plugin)
    widths = {g.name: g.width for g in plugin.network.layout.groups}
    assert (widths["a"] > 24) is widens


def test_ablation_is_that_of_the_network_without_what_is_not_reused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if nothing were reused: what the second task loses is told, and nothing is left cut."""
    bench = benchmark(tasks=2)
    plugin = CLNPPlugin(margin=0.05, l1=1e-3, valid_stream=bench.test_stream)
    trainer = strategy(mlp(), plugin, epochs=8)
    trainer.train(bench.train_stream[0], eval_streams=[])
    first = plugin.history[0]
    assert first["reused_ablation"] == {
        "accuracy": first["pruned_validation"],
        "drop": 0.0,
        "margin": 0.05,
        "cut": 0,
    }
    before = plugin.network.frontier
    monkeypatch.setattr(
        "clnp.plugin.reused",
        lambda *_: {name: torch.zeros(n, dtype=torch.bool) for name, n in before.items()},
    )
    trainer.train(bench.train_stream[1], eval_streams=[])
    told = plugin.history[1]["reused_ablation"]
    assert told["cut"] == sum(before.values())

    data = bench.test_stream[1].dataset.eval()
    x, labels = torch.stack([s[0] for s in data]), torch.tensor([int(s[1]) for s in data])

    subnetwork = plugin.subnetwork(1)  # reads what is in the network, whatever is done to it

    def accuracy() -> float:
        return int((subnetwork(x).argmax(1) == labels).sum()) / len(labels)

    assert accuracy() == plugin.history[1]["pruned_validation"]
    network = plugin.network
    with torch.no_grad():
        for group in network.layout.groups:
            for part in group.readers:
                if part.layer != network.layout.head:
                    rows = before[network.layout.writes[part.layer]]
                    network.modules[part.layer].weight[rows:, : before[group.name]] = 0.0
    assert accuracy() == told["accuracy"]
    assert told["drop"] == plugin.history[1]["pruned_validation"] - told["accuracy"]
    assert told["drop"] > 0


def test_a_state_from_before_sufficiency_was_measured_goes_on() -> None:
    bench = benchmark(tasks=1)
    plugin = CLNPPlugin(margin=0.05, l1=1e-3)
    trainer = strategy(mlp(), plugin)
    assert plugin.sufficiency().empty
    trainer.train(bench.train_stream[0], eval_streams=[])
    assert plugin.sufficiency()["new_only"].max() == 1.0
    state = plugin.state_dict()
    del state["sufficiency"]
    restored = CLNPPlugin(margin=0.05, l1=1e-3)
    restored.load_state_dict(state, mlp())
    assert restored.sufficiency()["new_only"].isna().all()


def test_another_model_is_refused_in_evaluation_too() -> None:
    """It would run whole, with no sub-network, and give wrong accuracies without a word."""
    bench = benchmark(tasks=1)
    plugin = CLNPPlugin(margin=0.1, l1=1e-3)
    trainer = strategy(mlp(), plugin, metrics=(accuracy_metrics(stream=True),))
    trainer.eval(bench.test_stream)
    trainer.train(bench.train_stream[0], eval_streams=[])
    learnt = trainer.eval(bench.test_stream)
    trainer.model = copy.deepcopy(trainer.model)
    with pytest.raises(Incompatible, match="isn't the one that this plugin has learnt tasks in"):
        trainer.eval(bench.test_stream)
    plugin.load_state_dict(plugin.state_dict(), trainer.model)
    assert trainer.eval(bench.test_stream) == learnt


def test_early_stopping_beside_it() -> None:
    bench = benchmark(tasks=2)
    plugin = CLNPPlugin(margin=0.1, l1=1e-3)
    stop = EarlyStoppingPlugin(patience=2, val_stream_name="valid_stream")
    trainer = strategy(
        mlp(), plugin, stop, epochs=12, eval_every=1, metrics=(accuracy_metrics(stream=True),)
    )
    x = blobs(0, 9, (FEATURES,))[0]
    with pytest.warns(UserWarning, match="not computed yet"):
        trainer.train(bench.train_stream[0], eval_streams=[bench.streams["valid"]])
    logits = plugin.subnetwork(0)(x)
    with pytest.warns(UserWarning, match="not computed yet"):
        trainer.train(bench.train_stream[1], eval_streams=[bench.streams["valid"]])
    assert len(plugin.validation_accuracy) < 12
    assert torch.equal(plugin.subnetwork(0)(x), logits)


@pytest.mark.parametrize(("margin", "kept"), [(0.0, 3), (0.009, 3), (0.01, 5)])
@pytest.mark.parametrize("network", [mlp, convnet])
def test_the_latest_epoch_within_the_margin_is_kept(
    network: Callable[[], nn.Module], margin: float, kept: int
) -> None:
    """Its weights and running statistics are those that are cut: same logits, same accuracy."""
    shape = IMAGE if network is convnet else (FEATURES,)
    bench = benchmark(tasks=2, shape=shape)
    scripted = iter([0.5, 0.9, 0.9, 0.4, 0.89] * 2)
    states: list[dict[str, Tensor]] = []
    seen: list[dict[str, Tensor]] = []

    class Scripted(CLNPPlugin):
        def _accuracy(self, strategy: Any) -> float:
            in_epochs = self.network.in_training and len(self.validation_accuracy) < 5
            return next(scripted) if in_epochs else super()._accuracy(strategy)

        def _release(self) -> None:
            if self.network.in_training:
                seen.append(copy.deepcopy(self.network.model.state_dict()))
            super()._release()

    class Record(SupervisedPlugin):  # type: ignore[misc]
        def after_training_epoch(self, strategy: Any, **_: Any) -> None:
            states.append(copy.deepcopy(strategy.model.state_dict()))

    plugin = Scripted(margin=margin, l1=1e-3, keep_epoch="latest-within-margin")
    trainer = strategy(network(), plugin, Record(), epochs=5)
    for task in range(2):
        states.clear()
        seen.clear()
        trainer.train(bench.train_stream[task], eval_streams=[])
        assert plugin.history[task]["epoch"] == kept
        assert plugin.history[task]["epochs"] == 5
        assert plugin.history[task]["trained_validation"] == {3: 0.9, 5: 0.89}[kept]
        for name, tensor in seen[0].items():
            if "num_batches" not in name:
                assert torch.equal(tensor, states[kept - 1][name]), name
        assert not torch.equal(states[2]["0.weight"], states[4]["0.weight"])


@pytest.mark.parametrize("below", ["harmless", "dead"])
def test_a_network_below_the_margin(below: str) -> None:
    """Its best epoch is out of reach: what goes costs no accuracy, or none but dead units go."""

    class Better(CLNPPlugin):
        def _accuracy(self, strategy: Any) -> float:
            accuracy = super()._accuracy(strategy)
            return accuracy + (self.network.in_training and len(self.validation_accuracy) == 0)

    plugin = Better(margin=0.1, l1=0.0, below_margin=below)
    strategy(mlp(), plugin, epochs=3).train(benchmark(tasks=1).train_stream[0], eval_streams=[])
    (entry,) = plugin.history
    assert entry["trained_validation"] < entry["best_validation"] - 0.1
    assert entry["pruned_validation"] >= entry["trained_validation"]
    few = entry["evaluations"] == 1
    assert few is (below == "dead")
    assert (set(entry["thresholds"].values()) == {0.0}) is few


def test_the_ready_strategy() -> None:
    model, bench = mlp(), benchmark(tasks=2)
    trainer = CLNP(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        margin=(0.1, 0.0),
        valid_stream=bench.streams["valid"],
        train_mb_size=20,
        train_epochs=2,
        evaluator=EvaluationPlugin(loggers=[]),
    )
    trainer.train(bench.train_stream, eval_streams=[])
    table = trainer.clnp.capacity()
    assert list(table.columns) == [
        "task", "layer", "used", "new", "reused", "free", "used_fraction",
    ]  # fmt: skip
    assert list(table.layer) == ["0", "2", "0", "2"]
    assert (table.used + table.free == 24).all()
    assert trainer.clnp.partition.frontiers["0"][0] == 0


def test_l1_is_a_subgradient_on_free_weights_alone() -> None:
    model, bench = mlp(), benchmark(tasks=2)
    plugin = CLNPPlugin(margin=0.1, l1={"0": 0.5, "head": 0.25})
    grads: list[dict[str, Tensor]] = []

    class Watch(SupervisedPlugin):  # type: ignore[misc]
        def before_update(self, strategy: Any, **_: Any) -> None:
            if strategy.clock.train_exp_iterations == 0:
                weights = {n: p for n, p in strategy.model.named_parameters() if "weight" in n}
                grads.append({n: p.grad.clone() for n, p in weights.items()})
                grads.append({n: p.detach().sign() for n, p in weights.items()})

    trainer = strategy(model, Watch(), plugin, Watch())
    for exp in bench.train_stream:
        grads.clear()
        trainer.train(exp, eval_streams=[])
        plain, signs, penalised, _ = grads
        for name, alpha in {"0.weight": 0.5, "2.weight": 0.0, "4.weight": 0.25}.items():
            torch.testing.assert_close(penalised[name] - plain[name], alpha * signs[name])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: {"plugins": [ReplayPlugin(10)]}, Incompatible, "ReplayPlugin"),
        (lambda: {"plugins": [LwFPlugin()]}, Incompatible, "LwFPlugin"),
        (lambda: {"plugins": [EWCPlugin(1.0)]}, Incompatible, "EWCPlugin"),
        (lambda: {"base": Cumulative}, Incompatible, "trains on"),
        (
            lambda: {"optimizer": lambda p: torch.optim.LBFGS(p)},
            Incompatible,
            "LBFGS",
        ),
        (lambda: {"model": torch.compile(mlp())}, Incompatible, "the model comes from torch.comp"),
        (lambda: {"model": compiled()}, Incompatible, "'1' comes from torch.compile"),
        (lambda: {"model": nn.Sequential(nn.Linear(FEATURES, 3))}, UnsupportedNetwork, "no hidden"),
        (
            lambda: {
                "model": nn.Sequential(
                    nn.Linear(FEATURES, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)
                )
            },
            UnsupportedNetwork,
            r"layer '1' .*LayerNorm.*normalises over all units",
        ),
        (
            lambda: {"model": nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, 2))},
            UnsupportedNetwork,
            "label 2, but the head '2' has 2 outputs",
        ),
        (lambda: {"l1": (1e-3, 1e-3)}, ValueError, "2 values for 3 layers.*0, 2, 4"),
        (lambda: {"l1": {"7": 1e-3}}, ValueError, "'7', but the layers are: 0, 2, 4"),
        (lambda: {"heads": "multi"}, ValueError, "MultiTaskModule"),
        (lambda: {"margin": [0.1]}, ValueError, "margin has 1 values"),
        (lambda: {"valid_stream": []}, ValueError, "valid_stream has 0 experiences"),
        (lambda: {"valid_stream": [1]}, TypeError, "holds no experience for experience 0"),
        (lambda: {"plugins": [Replayed(mem_size=9)]}, Incompatible, "Replayed trains on"),
        (lambda: {"plugins": [CLNPPlugin()]}, Incompatible, "more than one CLNPPlugin"),
        (
            lambda: {
                "model": nn.Sequential(
                    nn.Linear(FEATURES, 8), nn.ReLU(), IncrementalClassifier(8, CLASSES)
                )
            },
            Incompatible,
            "'2' is an IncrementalClassifier",
        ),
        (
            lambda: {"model": nn.Sequential(nn.Linear(FEATURES + 1, 8), nn.Linear(8, CLASSES))},
            UnsupportedNetwork,
            rf"fails on an example input of shape \(16, {FEATURES}\)",
        ),
        (lambda: {"model": Locked()}, UnsupportedNetwork, "can't be copied .*lock"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    make: Callable[[], dict[str, Any]], error: type[Exception], message: str
) -> None:
    options = make()
    ours = {k: options.pop(k) for k in ("l1", "heads", "margin", "valid_stream") if k in options}
    model = options.pop("model", None) or mlp()
    trainer = strategy(model, CLNPPlugin(**ours), *options.pop("plugins", []), **options)
    with pytest.raises(error, match=message):
        trainer.train(benchmark(tasks=2).train_stream, eval_streams=[])


@pytest.mark.filterwarnings("ignore:You are using plugins that are not compatible")
def test_distributed_training_is_refused(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        trainer = strategy(nn.parallel.DistributedDataParallel(mlp()), CLNPPlugin())
        with pytest.raises(Incompatible, match="DistributedDataParallel"):
            trainer.train(benchmark(tasks=1).train_stream, eval_streams=[])
    finally:
        torch.distributed.destroy_process_group()


def test_an_empty_experience_is_refused() -> None:
    empty = experience(0, 0, 3, (FEATURES,)).subset([])
    stream = with_task_labels(benchmark_from_datasets(train=[empty])).train_stream
    with pytest.raises(ValueError, match="experience 0 has no training data"):
        strategy(mlp(), CLNPPlugin()).train(stream[0], eval_streams=[])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": 1.0}, "margin is 1.0"),
        ({"margin": (0.1, -0.1)}, "margin is -0.1"),
        ({"l1": -1e-3}, "l1 is -0.001"),
        ({"l1": {"0": float("nan")}}, "l1 is nan"),
        ({"thresholds": "both"}, "thresholds is 'both'; choose from 'per-layer', 'shared'"),
        ({"heads": "two"}, "heads is 'two'"),
        ({"below_margin": "all"}, "below_margin is 'all'"),
        ({"head_bias": "some"}, "head_bias is 'some'"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CLNPPlugin(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": "much"}, "margin is 'much'; give a number"),
        ({"margin": None}, "margin is None"),
        ({"margin": {"0": 0.1}}, "margin is {'0': 0.1}"),
        ({"l1": None}, "l1 is None; give a number"),
        ({"l1": ["a"]}, "l1 is .'a'."),
        ({"l1": torch.zeros(3)}, "l1 is tensor"),
        ({"seed": 0.5}, "seed is 0.5; give an integer"),
        ({"seed": None}, "seed is None"),
        ({"finetune": 3}, "finetune is 3; give clnp.FineTune"),
        ({"finetune": FineTune}, "give clnp.FineTune"),
        ({"expand": ["0"]}, "expand is .'0'.; give a dict"),
        ({"valid_stream": 5}, "valid_stream is a int"),
        ({"example_input": [1.0]}, "example_input is a list; give a batch"),
        ({"example_input": torch.zeros(0, 3)}, r"a Tensor of shape \(0, 3\)"),
    ],
)
def test_arguments_of_another_kind(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        CLNPPlugin(**options)


@pytest.mark.parametrize("rule", [4, "ab", (1,), (4, 1.5), (0, 1)])
def test_a_rule_for_widening_is_a_pair_of_integers(rule: Any) -> None:
    with pytest.raises(ValueError, match=r"give \(below, by\), both integers"):
        CLNPPlugin(expand={"0": rule})


@pytest.mark.parametrize("values", [{"epochs": 1.5}, {"epochs": 1, "iterations": "2"}])
def test_numbers_of_fine_tuning_are_integers(values: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"of FineTune is .*; give an integer"):
        FineTune(**values)
    with pytest.raises(ValueError, match="lr of FineTune is inf"):
        FineTune(1, lr=float("inf"))


@pytest.mark.parametrize("state", [None, {}, {"0.weight": torch.zeros(1)}])
def test_what_is_no_state_is_refused(state: Any) -> None:
    with pytest.raises(ValueError, match="is no state of a CLNPPlugin"):
        CLNPPlugin().load_state_dict(state, mlp())
    trainer, plugin, _ = learnt_one(mlp())
    with pytest.raises(TypeError, match="give a dict of numbers by layer"):
        plugin.expand(state if state is None else [1])
    assert trainer.model is plugin.network.model


def test_a_task_has_a_unit_of_its_own_in_a_last_layer_that_others_read_too() -> None:
    """Where a sum ties the last hidden layer to an earlier one, its older units are computed."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(FEATURES, 20)
            self.second = nn.Linear(20, 20)
            self.head = nn.Linear(20, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.first(x))
            return self.head(h + torch.relu(self.second(h)))

    plugin = CLNPPlugin(margin=0.9, l1=1e-3)
    trainer = strategy(Residual(), plugin)
    learn_and_watch(trainer, plugin, benchmark().train_stream, blobs(0, 9, (FEATURES,))[0])
    assert plugin.capacity().new.between(1, 2).all()


def test_a_full_single_head_says_what_to_do() -> None:
    plugin = CLNPPlugin(margin=0.0, l1=0.0)
    trainer = strategy(mlp(2), plugin)
    with pytest.raises(CapacityExhausted, match=r"last hidden layer '2'.*one head a task"):
        trainer.train(benchmark(tasks=3).train_stream, eval_streams=[])


def test_a_full_multi_head_core_trains_the_new_head_alone() -> None:
    model = MTSimpleMLP(input_size=FEATURES, hidden_size=1)
    plugin, heads = CLNPPlugin(margin=0.0, l1=0.0), []

    class Watch(SupervisedPlugin):  # type: ignore[misc]
        def before_training_epoch(self, strategy: Any, **_: Any) -> None:
            task = strategy.clock.train_exp_counter
            heads.append((task, model.classifier.classifiers[str(task)].classifier.weight.clone()))

    trainer = strategy(model, plugin, Watch())
    stream = benchmark(tasks=3).train_stream
    learn_and_watch(trainer, plugin, stream[:1], blobs(0, 9, (FEATURES,))[0])
    core = {name: tensor.clone() for name, tensor in model.features.state_dict().items()}
    logits = plugin.subnetwork(0)(blobs(0, 9, (FEATURES,))[0])
    trainer.train(stream[1:], eval_streams=[])
    assert list(plugin.capacity().free) == [0, 0, 0]
    assert torch.equal(plugin.subnetwork(0)(blobs(0, 9, (FEATURES,))[0]), logits)
    for name, tensor in model.features.state_dict().items():
        assert torch.equal(tensor, core[name])
    for task in (1, 2):
        first, *_, last = [weight for t, weight in heads if t == task]
        assert not torch.equal(first, last)


# -- widening -------------------------------------------------------------------------------------


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def finished(model: nn.Module, tasks: int = 2, **options: Any) -> tuple[Any, CLNPPlugin, Any]:
    shape = IMAGE if isinstance(model, MultiHead) or "Conv" in str(model) else (FEATURES,)
    plugin, stream = CLNPPlugin(margin=0.1, l1=1e-3, **options), benchmark(4, shape).train_stream
    trainer = strategy(model, plugin)
    for task in range(tasks):
        trainer.train(stream[task], eval_streams=[])
    return trainer, plugin, stream


@pytest.mark.parametrize("optimizer", ["adam", "adam fused", "sgd", "rmsprop"])
def test_the_optimizer_goes_on(optimizer: str) -> None:
    """Its parameters and its state are as they were, and what has another shape is no trap."""
    model, extra = mlp(), nn.Parameter(torch.zeros(3))
    made = OPTIMIZERS[optimizer]([*model.parameters(), extra])
    plugin, stream = CLNPPlugin(margin=0.1, l1=1e-3), benchmark().train_stream
    trainer = strategy(model, plugin, optimizer=lambda _: made)
    trainer.train(stream[0], eval_streams=[])
    x = blobs(0, 9, (FEATURES,))[0]
    before, lr = plugin.subnetwork(0)(x), made.param_groups[0]["lr"]
    made.param_groups[0]["lr"] = 0.0  # a step of the user's own, between tasks
    for parameter in (*model.parameters(), extra):
        parameter.grad = torch.ones_like(parameter)
    made.step()
    made.param_groups[0]["lr"] = lr
    state, groups = copy.deepcopy(made.state_dict()), list(made.param_groups[0]["params"])
    assert len(state["state"]) == len(groups)
    plugin.expand({"0": 8, "2": 4})
    assert list(map(id, made.param_groups[0]["params"])) == list(map(id, groups))
    for key, values in made.state_dict()["state"].items():
        for name, value in values.items():
            old = state["state"][key][name]
            assert torch.equal(value, old) if isinstance(value, Tensor) else value == old
    assert torch.equal(plugin.subnetwork(0)(x), before)
    trainer.train(stream[1], eval_streams=[])
    assert torch.equal(plugin.subnetwork(0)(x), before)
    assert_no_interference(plugin)


@pytest.mark.parametrize("units", [1, 3, 7, 16])
def test_widening_holds_for_every_size_of_batch_or_is_refused(units: int) -> None:
    """A kernel for one sample may depend on how far apart the rows of the weights lie."""
    _, plugin, _ = finished(mlp(25), tasks=1)
    batches = [blobs(0, size, (FEATURES,))[0] for size in (1, 2, 9, 300)]
    before = [plugin.subnetwork(0)(x) for x in batches]
    widths = dict(plugin.partition.widths)
    try:
        plugin.expand(dict.fromkeys(widths, units))
        expected = {name: width + units for name, width in widths.items()}
    except UnsupportedNetwork:  # it depends on the machine
        expected = widths
    assert plugin.partition.widths == expected
    for x, logits in zip(batches, before, strict=True):
        assert torch.equal(plugin.subnetwork(0)(x), logits)


def test_an_interrupted_measurement_finds_the_task_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of a task is entered all at once; ablation, which takes long, comes after."""
    trainer, plugin, stream = finished(mlp(24), tasks=1)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(plugin, "_ablation", interrupt)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(stream[1], eval_streams=[])
    assert plugin.tasks == [0, 1]
    assert len(plugin.history) == 2
    assert "reused_ablation" not in plugin.history[1]
    trainer.train(stream[2], eval_streams=[])
    assert plugin.tasks == [0, 1, 2]
    for table in (plugin.capacity(), plugin.sufficiency()):
        assert table.task.tolist() == [0, 0, 1, 1, 2, 2]


def test_nothing_learnt_is_nothing_to_save() -> None:
    plugin = CLNPPlugin()
    trainer = strategy(mlp(), plugin, epochs=1)
    with torch.no_grad():
        trainer.model[0].weight.fill_(float("nan"))
    with pytest.raises(CLNPError, match="diverged"):
        trainer.train(benchmark().train_stream[0], eval_streams=[])
    with pytest.raises(RuntimeError, match="nothing to save"):
        plugin.state_dict()


def test_a_table_tells_the_width_of_its_time() -> None:
    trainer, plugin, stream = finished(mlp(24))
    before = plugin.capacity()
    plugin.expand({"0": 8})
    assert plugin.capacity().equals(before)
    trainer.train(stream[2], eval_streams=[])
    after = plugin.capacity()
    assert after[:4].equals(before)
    row = after[(after.task == 2) & (after.layer == "0")].iloc[0]
    assert row.used + row.free == 32
    assert row.used_fraction == row.used / 32
    assert [entry.get("widened") for entry in plugin.history] == [None, None, {"0": 8}]


@pytest.mark.parametrize(
    ("network", "layer"),
    [
        (lambda: MTSimpleMLP(input_size=FEATURES, hidden_size=20), "features.0"),
        (lambda: as_multitask(nn.Sequential(*mlp(9)[:2], nn.Linear(9, 3)), "2"), "model.0"),
        (MultiHead, "features.5"),
    ],
)  # fmt: skip
def test_heads_that_come_later_are_as_wide(network: Any, layer: str) -> None:
    trainer, plugin, stream = finished(network())
    x = blobs(0, 9, IMAGE if network is MultiHead else (FEATURES,))[0]
    before = [plugin.subnetwork(task)(x) for task in range(2)]
    plugin.expand({layer: 6})
    trainer.train(stream[2], eval_streams=[])
    trainer.train(stream[3], eval_streams=[])
    assert plugin.tasks == [0, 1, 2, 3]
    for task, expected in enumerate(before):
        assert torch.equal(plugin.subnetwork(task)(x), expected)


def test_between_tasks_alone() -> None:
    with pytest.raises(RuntimeError, match="no network yet"):
        CLNPPlugin().expand({"0": 1})

    class Meddle(SupervisedPlugin):  # type: ignore[misc]
        def after_training_epoch(self, strategy: Any, **_: Any) -> None:
            plugin.expand({"0": 1})

    plugin = CLNPPlugin()
    with pytest.raises(RuntimeError, match="a task is in training"):
        strategy(mlp(), plugin, Meddle()).train(benchmark().train_stream[0], eval_streams=[])


def test_a_model_with_its_width_written_into_it_is_refused() -> None:
    class Stiff(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(IMAGE[0], 8, 3), nn.Linear(8 * 16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.conv(x))[:, :8].flatten(1))  # type: ignore[no-any-return]

    model = Stiff()
    _, plugin, _ = finished(model)
    kept, layout = copy.deepcopy(model.state_dict()), plugin.network.layout
    with pytest.raises(UnsupportedNetwork, match="doesn't run with wider layers"):
        plugin.expand({"conv": 2})
    assert plugin.network.layout == layout
    assert same(model.state_dict(), kept)


# -- depletion -------------------------------------------------------------------------------------


def test_the_remedy_for_a_full_single_head_works() -> None:
    plugin, stream = CLNPPlugin(margin=0.0, l1=0.0), benchmark().train_stream
    model, steps = mlp(2), []

    class Count(SupervisedPlugin):  # type: ignore[misc]
        def before_training_iteration(self, strategy: Any, **_: Any) -> None:
            steps.append(strategy.clock.train_exp_counter)

    trainer = strategy(model, plugin, Count())
    trainer.train(stream[0], eval_streams=[])
    if plugin.network.frontier["2"] < 2:
        trainer.train(stream[1], eval_streams=[])
    kept, done = copy.deepcopy(model.state_dict()), len(steps)
    with pytest.raises(CapacityExhausted, match=r"'2' \(2 units.*plugin\.expand\(\{'2': n\}\)"):
        trainer.train(stream[2], eval_streams=[])
    assert len(steps) == done
    assert same(model.state_dict(), kept)
    x = blobs(0, 9, (FEATURES,))[0]
    before = plugin.subnetwork(0)(x)
    plugin.expand({"2": 4})
    trainer.train(stream[2], eval_streams=[])
    assert torch.equal(plugin.subnetwork(0)(x), before)


def test_a_full_core_of_several_heads_trains_the_new_head_to_some_use() -> None:
    model = MTSimpleMLP(input_size=FEATURES, hidden_size=8)
    plugin = CLNPPlugin(margin=0.0, l1=0.0)
    trainer = strategy(model, plugin, epochs=30)
    stream = benchmark(tasks=2).train_stream
    trainer.train(stream[0], eval_streams=[])
    used = plugin.network.frontier
    plugin.partition.frontiers["features.0"][-1] = 8  # whatever the cut, the core is full now
    plugin._checksum = plugin.network.checksum()
    assert used
    core = copy.deepcopy(model.state_dict())
    trainer.train(stream[1], eval_streams=[])
    for key, tensor in core.items():
        if not key.startswith("classifier.classifiers.1."):
            assert torch.equal(model.state_dict()[key], tensor), key
    x, y = blobs(1, 99, (FEATURES,))
    right = (plugin.subnetwork(1)(x).argmax(1) == y).double().mean()
    assert right > 0.6
    assert list(plugin.capacity().new)[1] == 0


# -- the policy ------------------------------------------------------------------------------------


def test_the_policy_widens_before_a_task_that_finds_too_few_units() -> None:
    trainer, plugin, stream = finished(mlp(6), tasks=0, expand={"2": (6, 5)})
    trainer.train(stream[0], eval_streams=[])
    assert plugin.partition.widths == {"0": 6, "2": 6}
    assert plugin.network.frontier["2"] > 0
    trainer.train(stream[1], eval_streams=[])
    assert plugin.partition.widths == {"0": 6, "2": 11}
    assert [entry.get("widened") for entry in plugin.history] == [None, {"2": 5}]
    plugin._policy = {"2": (1, 5)}
    free = 11 - plugin.network.frontier["2"]
    trainer.train(stream[2], eval_streams=[])
    assert plugin.partition.widths["2"] == (11 if free else 16)


def test_a_policy_that_cannot_be_followed_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match=r"expand has \(0, 3\) for layer '0'"):
        CLNPPlugin(expand={"0": (0, 3)})
    plugin = CLNPPlugin(expand={"first": (1, 3)})
    model = mlp()
    kept = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"expand names the layer 'first'.*0, 2"):
        strategy(model, plugin).train(benchmark().train_stream[0], eval_streams=[])
    assert same(model.state_dict(), kept)


@pytest.mark.parametrize(
    ("activities", "needed", "margin", "kept", "theta"),
    [
        # no margin: what costs nothing goes, and the dead
        ([0.0, 2.0, 4.0, 1.0, -1.0], 6.5, 0.0, 3, 0.0),
        ([0.0, 2.0, 4.0, 1.0, -1.0], 5.5, 0.0, 2, 1.0),
        # units of equal activity stay or go together; one as active as theta goes
        ([2.0, 4.0, 2.0, 2.0, 1.0], 7.5, 0.0, 4, 1.0),
        ([2.0, 4.0, 2.0, 2.0, 1.0], 3.5, 0.0, 1, 2.0),
        ([2.0, 2.0, 2.0], 0.5, 0.0, 3, 0.0),
        # accuracy never falls: one unit is left
        ([2.0, 4.0, 1.0], -1.0, 0.9, 1, 2.0),
        # all units dead, and a layer of one
        ([-1.0, 0.0, -2.0], -0.5, 0.0, 1, 0.0),
        ([3.0], 2.5, 0.0, 1, 0.0),
    ],
)
def test_exact_counts_at_ties_and_edges(
    monkeypatch: pytest.MonkeyPatch,
    activities: list[float],
    needed: float,
    margin: float,
    kept: int,
    theta: float,
) -> None:
    """Units of known activity; every sample is right as long as those kept give enough."""
    monkeypatch.setitem(
        globals(),
        "blobs",
        lambda _, count, shape: (torch.randn(count, *shape), torch.zeros(count, dtype=torch.long)),
    )
    width = len(activities)
    model = nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, CLASSES))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor(activities))
        model[2].weight.zero_()
        model[2].weight[0] = 1.0
        model[2].bias.copy_(torch.tensor([0.0, needed, -99.0]))
    plugin = CLNPPlugin(margin=margin, l1=0.0)
    trainer = strategy(model, plugin, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), epochs=1)
    trainer.train(benchmark(tasks=1).train_stream, eval_streams=[])
    assert plugin.history[-1]["new"] == {"0": kept}
    assert plugin.history[-1]["thresholds"] == {"0": theta}
    strongest = sorted((max(0.0, a) for a in activities), reverse=True)[:kept]
    assert torch.relu(model[0].bias[:kept]).tolist() == strongest
