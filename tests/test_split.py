"""Split images: the task stream, the paper's two networks, and every method on them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive
from torch import Tensor, nn

from benchmarks import cell as cells
from benchmarks import records
from benchmarks.cell import Cell
from benchmarks.data import Images, join, load
from benchmarks.errors import UserError
from benchmarks.experiment import Experiment
from benchmarks.learners import Setup
from benchmarks.methods import METHODS, CLNPSettings, JointSettings
from benchmarks.models import MultiHead, PartedHead, narrow, wide
from benchmarks.quickstart import Quickstart
from benchmarks.reporting.load import decode
from benchmarks.resume import Terminated
from benchmarks.runner import Work, run_cells, trials
from benchmarks.scenarios import ResidentData, crop_and_flip, split
from benchmarks.split_cifar import SplitCIFAR, SplitCIFARWide
from benchmarks.states import STATE
from clnp import CLNPPlugin
from clnp.plugin import Outcome
from clnp.random_state import random_state
from clnp.search import Candidate, Trial

GIT = {"commit": None, "dirty": True}
NARROW = SplitCIFAR(tasks=2, epochs=1, method_epochs=False, batch_size=64, precision="fp32")
WIDE = SplitCIFARWide(
    tasks=2, epochs=1, method_epochs=False, batch_size=64, precision="fp32", shrink=32
)


class Fast(ResidentData, Naive):
    """Finetuning on resident data."""


def made(classes: int, count: int, seed: int, name: str = "made", square: int = 1) -> Images:
    """Images of 32x32 pixels, each a class's template of squares of one colour under noise."""
    generator = torch.Generator().manual_seed(seed)
    templates = torch.randint(0, 200, (classes, 3, 32 // square, 32 // square), generator=generator)
    templates = templates.repeat_interleave(square, 2).repeat_interleave(square, 3)

    def part(count: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(count) % classes
        noise = torch.randint(0, 56, (count, 3, 32, 32), generator=generator)
        x = (templates[y] + noise).to(torch.uint8)
        return x.contiguous(memory_format=torch.channels_last), y

    return Images(name, *part(count), *part(count // 2), f"{seed:064x}", classes)


@pytest.fixture(scope="module")
def images() -> Images:
    """Ten classes and then twenty, as CIFAR-10 and CIFAR-100 are joined."""
    return join([made(10, 200, 0, "ten"), made(20, 300, 1, "twenty")])


# --- data -----------------------------------------------------------------------------------------


def test_joined_sets_count_their_labels_on(images: Images) -> None:
    ten, twenty = made(10, 200, 0), made(20, 300, 1)
    assert (images.name, images.classes) == ("ten+twenty", 30)
    assert torch.equal(images.train_x, torch.cat([ten.train_x, twenty.train_x]))
    assert torch.equal(images.train_y, torch.cat([ten.train_y, twenty.train_y + 10]))
    assert images.test_x is not None
    assert images.test_y is not None
    assert len(images.test_x) == 100 + 150
    assert images.test_y.unique().tolist() == list(range(30))
    assert images.fingerprint not in (ten.fingerprint, twenty.fingerprint)
    other = join([ten, dataclasses.replace(twenty, fingerprint="0" * 64)])
    assert other.fingerprint != images.fingerprint


def test_sets_without_test_data_join_without() -> None:
    alone = [dataclasses.replace(made(10, 20, s), test_x=None, test_y=None) for s in (0, 1)]
    assert join(alone).test_x is None
    assert join(alone).test_y is None


def samples(experience: Any) -> dict[tuple[int, ...], tuple[int, int]]:
    """Each image of an experience, with its label and its task label."""
    dataset = experience.dataset
    found = {}
    for i in range(len(dataset)):
        x, y, task = dataset[i]
        found[tuple((255 * x).round().int().flatten()[:40].tolist())] = (int(y), int(task))
    return found


def test_each_task_has_its_classes_counted_from_0(images: Images) -> None:
    scenario = split(images, 3, seed=4, validation=0.1)
    sizes = {n: [len(e.dataset) for e in s] for n, s in scenario.streams.items()}
    assert sizes == {"train": [180, 130, 130], "valid": [20, 20, 20], "test": [100, 80, 70]}
    known = {
        tuple(x.int().flatten()[:40].tolist()): int(y)
        for x, y in zip(images.train_x, images.train_y, strict=True)
    }
    seen: set[tuple[int, ...]] = set()
    for name in ("train", "valid"):
        for task, experience in enumerate(scenario.streams[name]):
            assert experience.task_labels == [task]
            assert sorted(experience.classes_in_this_experience) == list(range(10))
            mine = samples(experience)
            assert len(mine) == len(experience.dataset)
            assert all(10 * task + y == known[x] and t == task for x, (y, t) in mine.items())
            assert not seen & mine.keys()
            seen |= mine.keys()
    assert seen == known.keys()


def test_validation_data_are_a_share_of_each_class_and_of_the_seed(images: Images) -> None:
    def held(seed: int) -> list[set[tuple[int, ...]]]:
        valid = split(images, 3, seed, validation=0.2).streams["valid"]
        for task, experience in enumerate(valid):
            counts = torch.bincount(torch.tensor(list(experience.dataset.targets)), minlength=10)
            assert counts.tolist() == [4 if task == 0 else 3] * 10
        return [set(samples(experience)) for experience in valid]

    assert held(0) == held(0)
    assert all(a != b for a, b in zip(held(0), held(1), strict=True))


def test_the_first_tasks_of_a_shorter_stream_are_the_same(images: Images) -> None:
    short, whole = (split(images, tasks, 0, 0.1).streams["train"] for tasks in (2, 3))
    for a, b in zip(short, whole, strict=False):
        assert samples(a) == samples(b)


def test_a_limit_takes_as_many_of_each_class(images: Images) -> None:
    few, all_ = (split(images, 3, 0, 0.2, limit=limit).streams for limit in (100, None))
    for name, count in (("train", 8), ("valid", 2)):
        for task in range(3):
            targets = torch.tensor(list(few[name][task].dataset.targets))
            assert torch.bincount(targets, minlength=10).tolist() == [count] * 10
    # Nothing held out of all images is trained on with a few of them, nor the other way round.
    for task in range(3):
        assert not samples(few["train"][task]).keys() & samples(few["valid"][task]).keys()
        assert [len(s["test"][task].dataset) for s in (few, all_)] == [[100, 80, 70][task]] * 2


def test_without_validation_or_test_data_there_is_no_such_stream(images: Images) -> None:
    bare = dataclasses.replace(images, test_x=None, test_y=None)
    assert set(split(bare, 2, 0, 0.0).streams) == {"train"}


@pytest.mark.parametrize(
    ("tasks", "validation", "says"),
    [
        (4, 0.1, "1 to 3 tasks"),
        (0, 0.1, "1 to 3 tasks"),
        (2, 1.0, "share"),
        (2, -0.1, "share"),
        (3, 0.999, "no training images of task 0, 1, 2 "),
        (3, 0.0001, "no validation images of task 0, 1, 2 "),
        (3, 0.03, "no validation images of task 1, 2 "),
    ],
)
def test_impossible_splits_are_named(
    images: Images, tasks: int, validation: float, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        split(images, tasks, 0, validation)


def test_batches_are_in_channels_last_memory(images: Images) -> None:
    learner = strategy(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)))
    seen: list[Tensor] = []

    class Keep(SupervisedPlugin):
        def before_forward(self, strategy: Any, **_: Any) -> None:
            seen.append(strategy.mb_x)

    learner.plugins.append(Keep())
    learner.train(split(images, 1, 0, 0.1).streams["train"][0], eval_streams=[])
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    assert all(x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 1 for x in seen)


def test_images_are_shifted_and_mirrored() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.arange(1, 1 + 200 * 2 * 5 * 6).view(200, 2, 5, 6).float()
    y = crop_and_flip(x, generator, padding=1)
    assert y.shape == x.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    seen = set()
    for before, after in zip(x, y, strict=True):
        padded = nn.functional.pad(before, (1, 1, 1, 1))
        fits = [
            (down, right, mirrored)
            for down in range(3)
            for right in range(3)
            for mirrored in (False, True)
            for part in [padded[:, down : down + 5, right : right + 6]]
            if torch.equal(part.flip(2) if mirrored else part, after)
        ]
        assert len(fits) == 1
        seen.add(fits[0])
    assert len(seen) == 18
    again = crop_and_flip(x, torch.Generator().manual_seed(0), padding=1)
    assert torch.equal(again, y)


class Seen(SupervisedPlugin):
    """Keep the batches of training and of evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.train: list[tuple[Tensor, Tensor]] = []
        self.eval: list[Tensor] = []

    def before_forward(self, strategy: Any, **_: Any) -> None:
        self.train.append((strategy.mb_x.clone(), strategy.mb_y.clone()))

    def before_eval_forward(self, strategy: Any, **_: Any) -> None:
        self.eval.append(strategy.mb_x.clone())


@pytest.mark.parametrize("method", ["finetune", "joint"])
def test_training_alone_is_augmented(images: Images, method: str) -> None:
    """Evaluation sees the images as they are, and the first order is the same."""
    seen: dict[bool, Seen] = {}
    for augment in (False, True):
        experiment = dataclasses.replace(
            WIDE, augment=augment, settings=("joint.per_task=8,6",) if method == "joint" else ()
        )
        scenario = experiment.scenario(images, 0)
        keep = seen[augment] = Seen()
        evaluator = EvaluationPlugin(loggers=[])
        setup = Setup(experiment, scenario, 0, torch.device("cpu"), evaluator, [keep])
        learner = METHODS[method].build(setup, METHODS[method].settings_for(experiment))
        for experience in scenario.streams["train"]:
            learner.train(experience)
        learner.strategy.eval(scenario.streams["train"][:1])
    plain, augmented = seen[False], seen[True]
    assert len(plain.train) == len(augmented.train) > 2
    (x, y), (changed, same) = plain.train[0], augmented.train[0]
    assert torch.equal(y, same)
    # Some stay as they are: unshifted, not mirrored, one in 162.
    moved = (x != changed).flatten(1).any(1)
    assert moved.float().mean() > 0.8
    assert all(torch.equal(a, b) for a, b in zip(plain.eval, augmented.eval, strict=True))


def test_an_augmented_run_is_another_experiment(images: Images, tmp_path: Path) -> None:
    augmented = dataclasses.replace(NARROW, augment=True)
    assert augmented.name != NARROW.name
    record = run(Cell(augmented, METHODS["finetune"], 0, images.fingerprint), images, tmp_path)
    assert record["config"]["experiment"]["augment"] is True


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"validation": -0.1}, "validation"),
        ({"validation": 1.0}, "validation"),
        ({"pool": 4}, "pool"),
        ({"classes": 0}, "classes"),
        ({"images": 99}, "images"),
    ],
)
def test_impossible_presets_are_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        SplitCIFAR(**change)


# --- networks -------------------------------------------------------------------------------------


def described(network: nn.Module) -> list[str]:
    """Return what each layer is, with all that its table in the paper tells of it."""

    def one(layer: nn.Module) -> str:
        match layer:
            case nn.Conv2d():
                shape = f"{layer.in_channels}-{layer.out_channels} {layer.kernel_size}"
                return f"conv {shape} stride {layer.stride} pad {layer.padding}"
            case nn.MaxPool2d():
                return f"max {layer.kernel_size} stride {layer.stride} pad {layer.padding}"
            case nn.BatchNorm2d():
                return f"norm {layer.num_features}"
            case nn.AdaptiveAvgPool2d():
                return f"mean to {layer.output_size}"
            case nn.Linear():
                return f"dense {layer.in_features}-{layer.out_features}"
            case nn.Dropout():
                return f"dropout {layer.p}"
        return type(layer).__name__

    return [one(layer) for layer in network.children()]


@pytest.mark.parametrize("pool", ["2 stride 2 pad 0", "3 stride 2 pad 1"])
def test_narrow_network_is_that_of_table_2(pool: str) -> None:
    body, features = narrow(int(pool[0]))
    assert body(torch.rand(2, 3, 32, 32)).shape == (2, features) == (2, 512)
    same = "(3, 3) stride (1, 1) pad (1, 1)"
    assert described(body) == [
        *(f"conv 3-32 {same}", "ReLU", f"conv 32-32 {same}", "ReLU"),
        *(f"max {pool}", "dropout 0.25"),
        *(f"conv 32-64 {same}", "ReLU", f"conv 64-64 {same}", "ReLU"),
        *(f"max {pool}", "dropout 0.25"),
        *("Flatten", "dense 4096-512", "ReLU", "dropout 0.5"),
    ]
    # The paper: 95 % of the numbers are in the dense layer.
    numbers = sum(p.numel() for p in body.parameters())
    assert body.fc.weight.numel() / numbers > 0.95  # type: ignore[union-attr, operator]


def test_wide_network_is_that_of_table_3() -> None:
    with torch.device("meta"):
        network = wide()
        assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    channels, strides, paddings = (3, 128, 256, 512, 1024, 2048), (1, 2, 1, 2, 1), (1, 0, 0, 1, 0)
    assert described(network) == [
        *(
            layer
            for i, (stride, pad) in enumerate(zip(strides, paddings, strict=True))
            for layer in (
                f"conv {channels[i]}-{channels[i + 1]} (3, 3) "
                f"stride {(stride, stride)} pad {(pad, pad)}",
                f"norm {channels[i + 1]}",
                "ReLU",
            )
        ),
        *("conv 2048-10 (3, 3) stride (1, 1) pad (0, 0)", "mean to 1", "Flatten"),
    ]
    assert described(wide(shrink=8))[12:15] == [
        "conv 128-256 (3, 3) stride (1, 1) pad (0, 0)",
        "norm 256",
        "ReLU",
    ]


def test_the_wide_presets_settings_are_those_of_the_paper() -> None:
    """Sec. 3.2 and appendix A; the grid and the number of CLNP's epochs are ours."""
    wide = SplitCIFARWide()
    joint, clnp = (METHODS[name].settings_for(wide) for name in ("joint", "clnp_m2"))
    assert isinstance(joint, JointSettings)
    assert (joint.epochs, joint.milestones, joint.per_task) == (120, (50, 90), (50, 10))
    assert (joint.lr, joint.decay_from) == (0.001, 1.0)
    assert (joint.joint_tasks, joint.gamma, joint.parts, joint.early_stopping) == (
        10,
        0.05,
        True,
        True,
    )
    assert isinstance(clnp, CLNPSettings)
    assert (clnp.margin, clnp.keep_epoch, clnp.grid_tasks) == (0.02, "latest-within-margin", "each")
    assert len(clnp.grid_l1) == len(clnp.grid_lr) == 2
    for name in ("single_task", "superposition"):
        assert METHODS[name].settings_for(wide).early_stopping
    assert not wide.augment
    assert (wide.tasks, wide.epochs, wide.shrink, wide.images) == (11, 60, 1, None)


def test_the_narrow_presets_settings_are_those_of_the_paper() -> None:
    """Sec. 3.2; that the learning rate falls at a task's end is ours."""
    narrow = SplitCIFAR()
    assert (narrow.tasks, narrow.epochs, narrow.images, narrow.augment) == (6, 60, None, False)
    for name, margin, finetune in (("m1", 0.01, 0), ("m2", 0.02, 0), ("m4_ft", 0.04, 20)):
        clnp = METHODS[f"clnp_{name}"].settings_for(narrow)
        assert isinstance(clnp, CLNPSettings)
        assert (clnp.margin, clnp.lr, clnp.l1) == (margin, 0.001, (5e-5,))
        assert (clnp.finetune_epochs, clnp.finetune_iterations) == (finetune, 1)
        assert clnp.keep_epoch == "last"
        if finetune:
            assert (clnp.finetune_lr, clnp.finetune_l1) == (1e-4, (5e-5,))


def small_heads() -> MultiHead:
    torch.manual_seed(0)
    return MultiHead(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), 6, tasks=3, classes=2)


def test_each_sample_gets_the_logits_of_its_own_head() -> None:
    model, x = small_heads(), torch.randn(5, 4)
    each = [model(x, task) for task in range(3)]
    for task in range(3):
        assert torch.equal(model(x, torch.full((5,), task)), each[task])
        assert torch.equal(each[task], model.heads[task](model.body(x)))
    labels = torch.tensor([2, 0, 0, 1, 2])
    mixed = torch.stack([each[int(task)][i] for i, task in enumerate(labels)])
    torch.testing.assert_close(model(x, labels), mixed)


def test_a_step_trains_its_tasks_head_alone() -> None:
    model = small_heads()
    model(torch.randn(5, 4), 1).sum().backward()
    assert [head.weight.grad is not None for head in model.heads] == [False, True, False]


def test_parts_of_the_last_hidden_layer_are_equal_and_disjoint() -> None:
    torch.manual_seed(0)
    model = PartedHead(wide(shrink=32), tasks=10).eval()
    assert model.parts.sum(0).tolist() == [1] * 64
    assert set(model.parts.sum(1).tolist()) == {6, 7}
    x = torch.rand(4, 3, 32, 32)
    labels = torch.tensor([0, 3, 3, 9])
    with torch.no_grad():
        each = torch.stack([model(x, int(t))[i] for i, t in enumerate(labels)])
        torch.testing.assert_close(model(x, labels), each)
        model.end[0].weight[:, model.parts[3].bool()] = 0
        bias = model.end[0].bias
        torch.testing.assert_close(model(x, 3), bias.expand(4, 10))
        assert not torch.allclose(model(x, 0), bias.expand(4, 10))


def test_parts_need_a_unit_each() -> None:
    with pytest.raises(ValueError, match="100 tasks"):
        PartedHead(wide(shrink=32), tasks=100)


def strategy(
    model: nn.Module, *plugins: Any, kind: type = Fast, lr: float = 0.003, **options: Any
) -> Any:
    arguments = {"train_mb_size": 32, "train_epochs": 1, "eval_mb_size": 100} | options
    return kind(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=lr),
        criterion=nn.CrossEntropyLoss(),
        plugins=list(plugins),
        evaluator=EvaluationPlugin(loggers=[]),
        **arguments,
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resident_batches_never_ask_for_their_task(
    images: Images, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the host would wait for the answer in each step."""
    body, features = narrow()
    model = MultiHead(body, features, 3, 10)
    scenario = split(images, 3, 0, 0.1)

    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("asked the labels")

    with monkeypatch.context() as patched:
        patched.setattr(Tensor, "unique", asked)
        kinds = set()

        class Kinds(SupervisedPlugin):
            def after_forward(self, strategy: Any, **_: Any) -> None:
                kinds.add(strategy.mb_output.dtype)
                assert isinstance(strategy.mb_task_id, Tensor)

        learner = strategy(model, Kinds(), precision=precision)
        for experience in scenario.streams["train"]:
            learner.train(experience, eval_streams=[])
        assert kinds == {torch.float32}
        learner.eval(scenario.streams["valid"])
        with pytest.raises(AssertionError, match="asked"):
            model(images.train_x[:2] / 255, torch.tensor([0, 0]))


# --- zero forgetting ------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["narrow", "wide"])
def test_nothing_is_forgotten_bit_for_bit(network: str) -> None:
    """Dropout, max pooling and heads; batch norm and a single head."""
    # Large squares outlast pooling: both networks learn them soon, however a CPU rounds.
    images = join([made(10, 200, 0, square=8), made(20, 300, 1, square=8)])
    torch.manual_seed(0)
    if network == "narrow":
        model, tasks, margin = MultiHead(*narrow(), 2, 10), 2, 0.02
        options = {"train_mb_size": 20, "train_epochs": 6, "lr": 0.001}
    else:
        model, tasks, margin = wide(shrink=16), 3, 0.05
        options = {"train_epochs": 8, "lr": 0.003}
    scenario = split(images, tasks, 0, 0.1)
    plugin = CLNPPlugin(margin=margin, l1=1e-5, valid_stream=scenario.streams["valid"])
    learner = strategy(model, plugin, **options)
    assert images.test_x is not None
    x = images.test_x[:100].float() / 255
    kept: list[Tensor] = []
    for task, experience in enumerate(scenario.streams["train"]):
        learner.train(experience, eval_streams=[])
        kept.append(plugin.subnetwork(task)(x))
        for old in range(task + 1):
            assert torch.equal(plugin.subnetwork(old)(x), kept[old])
    # There was something to forget, and something was learnt.
    use = plugin.capacity()
    assert (use[use.task == 0].used > 1).all()
    assert use.new.groupby(use.task).sum().min() > 0
    assert all(entry["pruned_validation"] > 0.8 for entry in plugin.history)


@pytest.mark.slow
def test_the_wide_network_at_full_width_takes_steps_of_two_tasks(
    images: Images, tmp_path: Path
) -> None:
    """Two steps a task; its claims wait for a GPU."""
    experiment = SplitCIFARWide(
        tasks=2,
        epochs=1,
        method_epochs=False,
        images=100,
        batch_size=45,
        precision="fp32",
        settings=("clnp_m2.grid_l1=5e-5", "clnp_m2.grid_lr=0.001"),
    )
    cell = Cell(experiment, METHODS["clnp_m2"], 0, images.fingerprint)
    record = run(cell, images, tmp_path)
    assert records.problem(record) is None
    assert len(record["history"]) == 2
    assert record["logit_drift"] == [0.0, 0.0]
    widths = {row["layer"]: row["used"] + row["free"] for row in record["capacity"]}
    assert list(widths.values()) == [128, 256, 512, 1024, 2048]


# --- methods --------------------------------------------------------------------------------------


def experiments_of_methods() -> list[Any]:
    return [
        pytest.param(experiment, method, id=f"{experiment.preset}-{method}")
        for experiment in (NARROW, WIDE)
        for method in experiment.methods
    ]


def run(cell: Cell, images: Images, folder: Path, stop: int | None = None) -> dict[str, Any]:
    def announce(event: dict[str, Any]) -> None:
        if event["event"] == "task" and event["task"] == stop:
            raise KeyboardInterrupt

    return cells.run(cell, images, torch.device("cpu"), folder, GIT, announce)


@pytest.mark.parametrize(("experiment", "method"), experiments_of_methods())
def test_a_cell_of_each_method_goes_on_bit_for_bit(
    experiment: Experiment, method: str, images: Images, tmp_path: Path, steps: Any
) -> None:
    changes = {
        "ewc": ("ewc.samples=32",),
        "joint": ("joint.per_task=8,6",),
        "clnp_m4_ft": ("clnp_m4_ft.finetune_epochs=1",),
    }
    # The order and the changes of augmented images come from one generator: both have to go on.
    experiment = dataclasses.replace(
        experiment, settings=changes.get(method, ()), augment=experiment.preset == WIDE.preset
    )
    cell = Cell(experiment, METHODS[method], 0, images.fingerprint)
    whole = run(cell, images, tmp_path / "whole")
    assert records.problem(whole) is None
    # By a head a task, units of its own, parts, networks or contexts: all are told.
    assert whole["task_id_at_test"] is True
    with pytest.raises(KeyboardInterrupt):
        run(cell, images, tmp_path / "stopped", stop=0)
    resumed = run(cell, images, tmp_path / "stopped")
    # Within a task as well: dropout, running statistics, heads, the candidates of a search.
    for stop in (2, steps.count // 3 - 1):
        steps.count = 0
        folder = tmp_path / f"step {stop}"
        with steps.stopping(stop), pytest.raises(Terminated):
            run(cell, images, folder)
        assert timeless(run(cell, images, folder)) == timeless(whole)
        assert [path.name for path in folder.iterdir()] == [STATE]
    assert timeless(whole) == timeless(resumed)


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    """Leave out what a clock has measured."""
    search = [
        {k: v for k, v in row.items() if not k.endswith("_seconds")} for row in record["search"]
    ]
    return {k: v for k, v in record.items() if k != "seconds"} | {"search": search}


def test_without_validation_data_all_images_train(images: Images, tmp_path: Path) -> None:
    """As SI's authors train; the record says that nothing was held out."""
    experiment = dataclasses.replace(NARROW, validation=0.0)
    assert experiment.name != NARROW.name
    train = experiment.scenario(images, 0).streams["train"]
    assert [len(e.dataset) for e in train] == [200, 150]
    record = run(Cell(experiment, METHODS["si"], 0, images.fingerprint), images, tmp_path)
    assert records.problem(record) is None
    assert record["accuracy"]["validation"] == [[None, None]] * 2
    assert decode(record).test.shape == (2, 2)
    clnp = Cell(experiment, METHODS["clnp_m2"], 0, images.fingerprint)
    with pytest.raises(UserError, match="validation"):
        run(clnp, images, tmp_path / "clnp")


VARIANTS = ("clnp_m1", "clnp_m2", "clnp_m4_ft")


def test_variants_share_the_first_tasks_training(tmp_path: Path) -> None:
    """Records are those of cells that train alone, and the training happens once."""
    digits = load("digits")
    grid = [
        Cell(
            Quickstart(
                tasks=2,
                epochs=15,
                method_epochs=False,
                hidden=(60, 60),
                settings=("clnp.keep_epoch=last", *settings),
            ),
            METHODS["clnp"],
            *(0, digits.fingerprint),
        )
        for settings in (
            ("clnp.margin=0.005",),
            ("clnp.margin=0.05",),
            ("clnp.margin=0.05", "clnp.finetune_epochs=2"),
        )
    ]
    kept: dict[str, dict[str, Any]] = {}
    code = run_cells(
        *(grid, digits, torch.device("cpu"), Work(tmp_path, GIT)),
        lambda cell, record: kept.update({cell.hash: record}),
    )
    assert code == 0
    epochs = [
        sum(
            event["event"] == "epoch" and event["task"] == 0
            for line in (cell.run_dir(tmp_path) / "log.jsonl").read_text().splitlines()
            for event in [json.loads(line)]
        )
        for cell in grid
    ]
    assert epochs == [15, 0, 0]
    assert not list((tmp_path / "shared").iterdir())
    first, second, tuned = (kept[cell.hash] for cell in grid)
    assert second["seconds"]["tasks"][0] > 0.5 * first["seconds"]["tasks"][0]
    assert first["capacity"] != second["capacity"]
    assert second["accuracy"] != tuned["accuracy"]
    for cell in grid:
        alone = run(cell, digits, tmp_path / f"alone {cell.hash}")
        shared = kept[cell.hash]
        assert {k: v for k, v in shared.items() if k != "seconds"} == {
            k: v for k, v in alone.items() if k != "seconds"
        }


def test_a_damaged_training_is_not_used(images: Images, tmp_path: Path) -> None:
    cells_ = [Cell(NARROW, METHODS[name], 0, images.fingerprint) for name in VARIANTS[:2]]
    shared = trials(cells_[0], cells_, tmp_path, GIT, torch.device("cpu"))
    assert shared is not None
    options = images, torch.device("cpu")
    whole = cells.run(cells_[0], *options, tmp_path / "a", GIT, lambda _: None, shared=shared)
    (path,) = shared.files()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    events: list[str] = []
    again = cells.run(
        *(cells_[0], *options, tmp_path / "b", GIT),
        lambda event: events.append(event["event"]),
        shared=shared,
    )
    assert events.count("epoch") == 2
    assert again["accuracy"] == whole["accuracy"]
    shared.forget()
    assert shared.files() == []


@pytest.mark.parametrize(
    ("commit", "dirty", "trained"),
    [("0" * 40, True, True), ("0" * 40, False, False), ("1" * 40, False, True)],
)
def test_a_training_of_other_code_is_not_used(
    commit: str, dirty: bool, trained: bool, images: Images, tmp_path: Path
) -> None:
    """Of another commit, or of uncommitted code where this one is clean."""
    first, second = (Cell(NARROW, METHODS[name], 0, images.fingerprint) for name in VARIANTS[:2])
    cpu, clean = torch.device("cpu"), {"commit": "0" * 40, "dirty": False}
    made = {"commit": commit, "dirty": dirty}
    cells.run(
        *(first, images, cpu, tmp_path / "a", made, lambda _: None),
        shared=trials(first, [second], tmp_path, made, cpu),
    )
    events: list[dict[str, Any]] = []
    record = cells.run(
        *(second, images, cpu, tmp_path / "b", clean, events.append),
        shared=trials(second, [], tmp_path, clean, cpu),
    )
    assert record["git"] == clean
    assert any(e["event"] == "epoch" and e["task"] == 0 for e in events) is trained
    seconds = record["seconds"]
    assert seconds["total"] >= seconds["train"]
    assert seconds["total"] >= sum(seconds["tasks"])


@pytest.mark.parametrize(
    "elsewhere",
    [
        {"device": "cuda"},
        {"hardware": "another"},
        {"threads": 99},
        {"bf16": "other kernels"},
        {"torch": "2.99"},
        {"deterministic": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_training_elsewhere_is_not_used(
    elsewhere: dict[str, Any], images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sums are rounded otherwise, and the record couldn't name where it was made."""
    cell, cpu = Cell(NARROW, METHODS["clnp_m1"], 0, images.fingerprint), torch.device("cpu")
    here = trials(cell, [cell], tmp_path, GIT, cpu)
    facts = cells.environment(cpu)
    monkeypatch.setattr(cells, "environment", lambda device: facts | elsewhere)
    there = trials(cell, [cell], tmp_path, GIT, cpu)
    assert here is not None
    assert there is not None
    trial = Trial(Outcome([0.5], 1, {}), 1.0, random_state(cpu), {}, [0.1])
    trained = list(here.map(lambda candidate: trial, [Candidate(0, None, None)]))
    assert trained == [trial]

    def refuse(candidate: Candidate) -> Trial:
        raise AssertionError("trained")

    (found,) = here.map(refuse, [Candidate(0, None, None)])
    assert found.seconds == 1.0
    with pytest.raises(AssertionError, match="trained"):
        list(there.map(refuse, [Candidate(0, None, None)]))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("experiment", [NARROW, WIDE], ids=["narrow", "wide"])
def test_nothing_is_forgotten_on_a_gpu(
    experiment: Any, precision: str, images: Images, tmp_path: Path
) -> None:
    resident = dataclasses.replace(
        images,
        **{
            name: getattr(images, name).cuda()
            for name in ("train_x", "train_y", "test_x", "test_y")
        },
    )
    cell = Cell(
        dataclasses.replace(experiment, precision=precision),
        METHODS["clnp_m2"],
        *(0, images.fingerprint),
    )
    record = cells.run(cell, resident, torch.device("cuda"), tmp_path, GIT, lambda _: None)
    assert record["logit_drift"] == [0.0, 0.0]


def test_each_network_of_single_task_counts_one_head(images: Images, tmp_path: Path) -> None:
    record = run(Cell(NARROW, METHODS["single_task"], 0, images.fingerprint), images, tmp_path)
    body, features = narrow()
    alone = sum(p.numel() for p in body.parameters()) + (features + 1) * 10
    assert record["parameters"] == {"trainable": alone, "stored": 2 * alone}


def test_only_trainings_that_are_the_same_are_shared(images: Images) -> None:
    def hash_(experiment: Experiment, method: str, seed: int = 0) -> str | None:
        return Cell(experiment, METHODS[method], seed, images.fingerprint).trained_hash

    def changed(*settings: str, **fields: Any) -> Experiment:
        return dataclasses.replace(NARROW, settings=settings, **fields)

    same = {hash_(NARROW, name) for name in VARIANTS}
    same |= {hash_(changed("clnp_m2.margin=0.5", "clnp_m2.thresholds=shared"), "clnp_m2")}
    assert len(same) == 1
    others = [
        hash_(NARROW, "clnp_m1", seed=1),
        hash_(changed("clnp_m2.l1=1e-3"), "clnp_m2"),
        hash_(changed("clnp_m2.lr=0.1"), "clnp_m2"),
        hash_(changed(epochs=2), "clnp_m2"),
        # What this keeps depends on the margin.
        hash_(changed("clnp_m2.keep_epoch=latest-within-margin"), "clnp_m2"),
        hash_(changed("clnp_m1.keep_epoch=latest-within-margin"), "clnp_m1"),
    ]
    assert len({*same, *others}) == 1 + len(others)
    assert hash_(NARROW, "si") is None


@pytest.mark.parametrize(
    ("told", "method", "preset"),
    [
        (False, "finetune", Quickstart),
        (True, "finetune", SplitCIFAR),
        (False, "finetune", SplitCIFARWide),
        (False, "joint", Quickstart),
        (True, "joint", SplitCIFARWide),
        (True, "clnp", Quickstart),
    ],
)
def test_who_is_told_the_task(told: bool, method: str, preset: type[Experiment]) -> None:
    assert METHODS[method].told_task(preset()) is told


def test_joint_training_is_that_of_appendix_a(images: Images, tmp_path: Path) -> None:
    """50 images of the first task and 10 of each other one; the rate falls after epochs."""
    experiment = dataclasses.replace(
        WIDE,
        epochs=4,
        settings=(
            "joint.per_task=20,10",
            "joint.milestones=1,3",
            "joint.lr=0.01",
            "joint.decay_from=0.5",  # doesn't count where there are milestones
        ),
    )
    scenario = experiment.scenario(images, 0)
    seen: list[tuple[list[int], float]] = []

    class Keep(SupervisedPlugin):
        def before_update(self, strategy: Any, **_: Any) -> None:
            counts = torch.bincount(strategy.mb_task_id).tolist()
            seen.append((counts, strategy.optimizer.param_groups[0]["lr"]))

    evaluator = EvaluationPlugin(loggers=[])
    setup = Setup(experiment, scenario, 0, torch.device("cpu"), evaluator, [Keep()])
    learner = METHODS["joint"].build(setup, METHODS["joint"].settings_for(experiment))
    for experience in scenario.streams["train"]:
        learner.train(experience)
    # 180 and 130 training images: nine batches an epoch.
    assert [counts for counts, _ in seen] == [[20, 10]] * 9 * 4
    rates = [rate for _, rate in seen[::9]]
    assert rates == pytest.approx([0.01, 0.0005, 0.0005, 0.000025])
