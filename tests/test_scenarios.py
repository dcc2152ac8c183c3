import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.data import Images
from benchmarks.errors import UserError
from benchmarks.models import mlp, resnet18

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Avalanche's own imports warn of
    from avalanche.benchmarks import CLScenario
    from avalanche.benchmarks.utils import AvalancheDataset
    from avalanche.benchmarks.utils.data_loader import TaskBalancedDataLoader
    from avalanche.benchmarks.utils.transform_groups import DefaultTransformGroups
    from avalanche.core import SupervisedPlugin
    from avalanche.logging import BaseLogger
    from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin
    from avalanche.training.supervised import Cumulative, Naive

    from benchmarks.scenarios import (
        JointLoader,
        ResidentData,
        ResidentDataset,
        ResidentLoader,
        permuted,
        resident_view,
    )

TRAIN, TEST, PIXELS, CLASSES = 60, 20, 12, 5


class Fast(ResidentData, Naive):
    pass


class FastCumulative(ResidentData, Cumulative):
    pass


class Recorder(SupervisedPlugin):
    """Keeps every training and evaluation batch and the loaders that gave them."""

    def __init__(self) -> None:
        super().__init__()
        self.train: list[list[Tensor]] = []
        self.eval: list[list[Tensor]] = []
        self.loaders: list[Any] = []

    def before_training_epoch(self, strategy: Any, **_kwargs: Any) -> None:
        self.loaders.append(strategy.dataloader)

    def before_forward(self, strategy: Any, **_kwargs: Any) -> None:
        self.train.append([strategy.mb_x, strategy.mb_y, strategy.mb_task_id])

    def before_eval_forward(self, strategy: Any, **_kwargs: Any) -> None:
        self.eval.append([strategy.mb_x, strategy.mb_y, strategy.mb_task_id])


@pytest.fixture(scope="module")
def images() -> Images:
    """Images of 3x4 pixels, all different: the first two pixels count them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (TRAIN + TEST, 3, 4), generator=generator, dtype=torch.uint8)
    x[:, 0, 0] = torch.arange(TRAIN + TEST, dtype=torch.uint8)
    y = torch.arange(TRAIN + TEST) % CLASSES
    return Images("made", x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:], "f" * 64, CLASSES)


@pytest.fixture(scope="module")
def scenario(images: Images) -> CLScenario:
    return permuted(images, tasks=3, seed=7, validation=15)


def strategy(
    kind: type[Any] = Fast,
    plugins: list[Any] | None = None,
    model: nn.Module | None = None,
    **kw: Any,
) -> Any:
    model = mlp(PIXELS, (6,), CLASSES) if model is None else model
    settings: dict[str, Any] = {"train_mb_size": 16, "eval_mb_size": 8, "train_epochs": 1}
    return kind(
        model=model,
        criterion=nn.CrossEntropyLoss(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        evaluator=EvaluationPlugin(loggers=[BaseLogger()]),
        plugins=plugins,
        **{**settings, **kw},
    )


def joined(batches: list[list[Tensor]]) -> list[Tensor]:
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def equal(one: list[list[Tensor]], other: list[list[Tensor]]) -> bool:
    return len(one) == len(other) and all(
        a.dtype == b.dtype and torch.equal(a, b)
        for left, right in zip(one, other, strict=True)
        for a, b in zip(left, right, strict=True)
    )


# --- the scenario ---------------------------------------------------------------------------------


def test_streams_experiences_and_labels(scenario: CLScenario):
    assert set(scenario.streams) == {"train", "valid", "test"}
    for stream, size in (
        (scenario.train_stream, TRAIN - 15),
        (scenario.valid_stream, 15),
        (scenario.test_stream, TEST),
    ):
        assert [e.current_experience for e in stream] == [0, 1, 2]
        for task, experience in enumerate(stream):
            assert isinstance(experience.dataset, AvalancheDataset)
            assert len(experience.dataset) == size
            assert experience.task_labels == [task]
            assert experience.task_label == task
            assert experience.classes_in_this_experience == set(experience.dataset.targets)
            assert experience.origin_stream is stream
            x, y, t = experience.dataset[3]
            assert (x.shape, x.dtype, t) == ((PIXELS,), torch.float32, task)
            assert y == experience.dataset.targets[3]


def test_without_test_images_or_validation_their_streams_are_absent(images: Images):
    alone = Images("made", images.train_x, images.train_y, None, None, "", CLASSES)
    assert set(permuted(alone, 2, seed=0, validation=0).streams) == {"train"}


def test_validation_is_disjoint_and_the_same_images_in_each_task(
    scenario: CLScenario, images: Images
):
    def indices(experience: Any) -> list[int]:
        view = resident_view(experience.dataset)
        assert view is not None
        assert view[1] is not None
        return list(view[1].tolist())

    train = [indices(e) for e in scenario.train_stream]
    valid = [indices(e) for e in scenario.valid_stream]
    assert train[0] == train[1] == train[2]
    assert valid[0] == valid[1] == valid[2]
    assert sorted(train[0] + valid[0]) == list(range(TRAIN))
    other = permuted(images, 1, seed=8, validation=15)
    assert indices(other.valid_stream[0]) != valid[0]


def test_a_permutation_depends_on_seed_and_task_alone(images: Images):
    def permutations(tasks: int, seed: int, validation: int = 15) -> list[list[int]]:
        scenario = permuted(images, tasks, seed, validation)
        views = [[resident_view(e.dataset) for e in stream] for stream in scenario.streams.values()]
        lists = [[v[0].permutation.tolist() for v in stream] for stream in views]
        assert all(stream == lists[0] for stream in lists)
        return lists[0]

    three = permutations(3, seed=7)
    assert len({tuple(p) for p in three}) == 3
    assert list(range(PIXELS)) not in three  # the first task is permuted too
    assert all(sorted(p) == list(range(PIXELS)) for p in three)
    torch.manual_seed(1)
    assert permutations(2, seed=7, validation=0) == three[:2]
    assert permutations(3, seed=8)[0] != three[0]


def test_a_sample_is_the_permuted_scaled_image(images: Images, scenario: CLScenario):
    experience = scenario.test_stream[1]
    resident, _ = resident_view(experience.dataset)
    x, y, _ = experience.dataset[5]
    assert images.test_x is not None
    expected = images.test_x[5].flatten().float() / 255
    assert torch.equal(x, expected[resident.permutation])
    assert y == images.test_y[5]


def test_all_tasks_and_streams_share_one_copy_of_the_images(images: Images, scenario: CLScenario):
    def addresses(*streams: Any) -> set[int]:
        return {resident_view(e.dataset)[0].images.data_ptr() for s in streams for e in s}

    assert addresses(scenario.train_stream, scenario.valid_stream) == {images.train_x.data_ptr()}
    assert addresses(scenario.test_stream) == {images.test_x.data_ptr()}


@pytest.mark.parametrize(("tasks", "validation"), [(0, 5), (2, TRAIN), (2, -1)])
def test_impossible_scenarios_are_refused(images: Images, tasks: int, validation: int):
    with pytest.raises(UserError, match=r"made has 60|0 tasks"):
        permuted(images, tasks, 0, validation)


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 2)])
def test_a_batch_equals_its_samples(images: Images, shape: tuple[int, ...]):
    flat = ResidentDataset(
        images.train_x.reshape(-1, *shape),
        images.train_y,
        task=4,
        permutation=torch.randperm(PIXELS) if shape == (3, 4) else None,
        scale=16.0,
    )
    indices = torch.tensor([5, 2, 2, 59])
    x, y, t = flat.batch(indices)
    assert torch.equal(x, torch.stack([flat[i][0] for i in indices.tolist()]))
    assert y.tolist() == [flat[i][1] for i in indices.tolist()]
    assert t.tolist() == [4] * 4
    assert x.shape == ((4, PIXELS) if shape == (3, 4) else (4, *shape))


def test_stock_and_resident_loader_give_the_same_batches(scenario: CLScenario):
    """In the same order, in training (unshuffled) and in evaluation."""
    seen = []
    for kind in (Naive, Fast):
        recorder = Recorder()
        torch.manual_seed(0)
        learner = strategy(kind, [recorder])
        learner.train(scenario.train_stream[1], shuffle=False)
        learner.eval(scenario.test_stream[1])
        assert isinstance(recorder.loaders[0], ResidentLoader) == (kind is Fast)
        seen.append(recorder)
    assert equal(seen[0].train, seen[1].train)
    assert equal(seen[0].eval, seen[1].eval)
    assert [len(batch[1]) for batch in seen[1].train] == [16, 16, 13]


def test_each_epoch_serves_every_sample_once_in_a_new_order(scenario: CLScenario):
    recorder = Recorder()
    strategy(plugins=[recorder], train_epochs=2).train(scenario.train_stream[0])
    one, two = joined(recorder.train[:3]), joined(recorder.train[3:])
    assert not torch.equal(one[0], two[0])
    expected = sorted(scenario.train_stream[0].dataset[i][0].tolist() for i in range(TRAIN - 15))
    assert sorted(one[0].tolist()) == sorted(two[0].tolist()) == expected


def test_drop_last(scenario: CLScenario):
    recorder = Recorder()
    strategy(plugins=[recorder]).train(scenario.train_stream[0], drop_last=True)
    assert [len(batch[1]) for batch in recorder.train] == [16, 16]
    assert len(recorder.loaders[0]) == 2


def test_the_order_depends_on_data_seed_and_experience_alone(scenario: CLScenario):
    def batches(data_seed: int, before: list[int], experience: int) -> list[list[Tensor]]:
        recorder = Recorder()
        learner = strategy(plugins=[recorder], data_seed=data_seed)
        for earlier in before:
            learner.train(scenario.train_stream[earlier])
        recorder.train.clear()
        torch.rand(len(before) + 1)  # the global generator must not matter
        learner.train(scenario.train_stream[experience])
        return recorder.train

    assert equal(batches(0, [], 2), batches(0, [0, 1], 2))
    assert not equal(batches(0, [], 2), batches(1, [], 2))
    labels = [joined(batches(0, [], task))[1].tolist() for task in (1, 2)]
    assert labels[0] != labels[1]


def test_evaluation_is_never_shuffled(scenario: CLScenario):
    recorder = Recorder()
    learner = strategy(plugins=[recorder])
    learner.eval(scenario.test_stream[:1])
    x = joined(recorder.eval)[0]
    dataset = scenario.test_stream[0].dataset
    assert torch.equal(x, torch.stack([dataset[i][0] for i in range(TEST)]))


# --- what is served by index, and what is not -----------------------------------------------------


def test_subsets_are_served_by_index(scenario: CLScenario):
    dataset = scenario.train_stream[1].dataset
    part = dataset.subset([4, 1, 30]).subset([2, 0]).eval()
    resident, indices = resident_view(part)
    x, y, t = resident.batch(indices)
    assert torch.equal(x, torch.stack([dataset[30][0], dataset[4][0]]))
    assert y.tolist() == list(part.targets)
    assert t.tolist() == [1, 1]


def test_a_plugin_may_evaluate_on_a_subset_amid_training(scenario: CLScenario):
    """As CLNPPlugin does: set adapted_dataset, make the evaluation loader, read it."""
    dataset = scenario.train_stream[0].dataset
    part = dataset.subset(range(10))
    read: list[list[Tensor]] = []

    class Probe(SupervisedPlugin):
        def after_training_exp(self, strategy: Any, **_kwargs: Any) -> None:
            kept = strategy.adapted_dataset, strategy.dataloader
            strategy.adapted_dataset = part
            strategy.make_eval_dataloader()
            assert isinstance(strategy.dataloader, ResidentLoader)
            read.extend(strategy.dataloader)
            strategy.adapted_dataset, strategy.dataloader = kept

    strategy(plugins=[Probe()]).train(scenario.train_stream[0])
    assert torch.equal(joined(read)[0], torch.stack([dataset[i][0] for i in range(10)]))


def other_labels(dataset: AvalancheDataset[Any]) -> AvalancheDataset[Any]:
    return dataset.update_data_attribute("targets_task_labels", [9] * len(dataset))


def further_value(dataset: AvalancheDataset[Any]) -> AvalancheDataset[Any]:
    from avalanche.benchmarks.utils import DataAttribute

    weights = DataAttribute(list(range(len(dataset))), "weights", use_in_getitem=True)
    return dataset.update_data_attribute("weights", weights)


def transformed(dataset: AvalancheDataset[Any]) -> AvalancheDataset[Any]:
    return dataset.replace_current_transform_group(lambda x: -x)


def transformed_by_default(dataset: AvalancheDataset[Any]) -> AvalancheDataset[Any]:
    return AvalancheDataset([dataset], transform_groups=DefaultTransformGroups(lambda x: -x))


def frozen(dataset: AvalancheDataset[Any]) -> AvalancheDataset[Any]:
    return transformed(dataset).freeze_transforms()


def own_collate(dataset: AvalancheDataset[Any]) -> AvalancheDataset[Any]:
    return AvalancheDataset([dataset], collate_fn=lambda samples: samples)


@pytest.mark.parametrize(
    "change",
    [other_labels, further_value, transformed, transformed_by_default, frozen, own_collate],
)
def test_changed_data_are_not_served_by_index(
    scenario: CLScenario, change: Callable[[Any], AvalancheDataset[Any]]
):
    changed = change(scenario.train_stream[0].dataset)
    assert len(changed) == TRAIN - 15
    assert resident_view(changed) is None
    assert resident_view(changed.subset([3, 1])) is None
    assert resident_view(scenario.train_stream[0].dataset) is not None


def test_joined_and_empty_data_are_not_served_by_index(scenario: CLScenario):
    one, two = (e.dataset for e in scenario.train_stream[:2])
    assert resident_view(one.concat(two)) is None
    assert resident_view(one.concat(two).subset([0, 50])) is None
    assert resident_view(one.subset([])) is None


def test_a_transform_reaches_the_training_batches(scenario: CLScenario):
    class Negate(SupervisedPlugin):
        def after_train_dataset_adaptation(self, strategy: Any, **_kwargs: Any) -> None:
            strategy.adapted_dataset = transformed(strategy.adapted_dataset)

    recorder = Recorder()
    strategy(plugins=[Negate(), recorder]).train(scenario.train_stream[0])
    assert isinstance(recorder.loaders[0], TaskBalancedDataLoader)
    assert joined(recorder.train)[0].max() <= 0


def test_cumulative_training_sees_all_tasks_so_far(scenario: CLScenario):
    recorder = Recorder()
    learner = strategy(FastCumulative, [recorder], train_mb_size=1000)
    learner.train(scenario.train_stream[0])
    recorder.train.clear()
    learner.train(scenario.train_stream[1])
    x, y, t = joined(recorder.train)
    assert torch.bincount(t).tolist() == [TRAIN - 15] * 2
    for task in (0, 1):
        dataset = scenario.train_stream[task].dataset
        expected = sorted((*dataset[i][0].tolist(), dataset[i][1]) for i in range(len(dataset)))
        rows = [
            (*row, label)
            for row, label in zip(x[t == task].tolist(), y[t == task].tolist(), strict=True)
        ]
        assert sorted(rows) == expected
    assert [type(loader) for loader in recorder.loaders] == [ResidentLoader, JointLoader]


def test_the_stock_loader_takes_its_order_from_the_data_seed_too(scenario: CLScenario):
    def batches(data_seed: int) -> list[list[Tensor]]:
        recorder = Recorder()
        learner = strategy(FastCumulative, [recorder], data_seed=data_seed)
        torch.manual_seed(torch.seed() % 2**32)
        learner.train(scenario.train_stream[:2])
        return recorder.train

    assert equal(batches(0), batches(0))
    assert not equal(batches(0), batches(1))


def test_replay_mixes_in_the_buffer(scenario: CLScenario):
    recorder = Recorder()
    learner = strategy(plugins=[ReplayPlugin(mem_size=10), recorder])
    learner.train(scenario.train_stream[0])
    recorder.train.clear()
    learner.train(scenario.train_stream[1])
    x, _, t = joined(recorder.train)
    assert (t == 1).sum() == TRAIN - 15
    old = {tuple(row) for row in x[t == 0].tolist()}
    dataset = scenario.train_stream[0].dataset
    assert len(old) == 10
    assert old <= {tuple(dataset[i][0].tolist()) for i in range(len(dataset))}


# --- precision and devices ------------------------------------------------------------------------


class Watch(nn.Module):
    """A linear layer that notes the type it computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(PIXELS, CLASSES)
        self.types: set[torch.dtype] = set()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(x)
        self.types.add(y.dtype)
        return y


@pytest.mark.parametrize(
    ("precision", "inside"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_precision(scenario: CLScenario, precision: str, inside: torch.dtype):
    outputs = set()

    class Types(SupervisedPlugin):
        def after_forward(self, strategy: Any, **_kwargs: Any) -> None:
            outputs.add(strategy.mb_output.dtype)

        def after_eval_forward(self, strategy: Any, **_kwargs: Any) -> None:
            outputs.add(strategy.mb_output.dtype)

    model = Watch()
    learner = strategy(plugins=[Types()], model=model, precision=precision)
    before = model.head.weight.detach().clone()
    learner.train(scenario.train_stream[0])
    learner.eval(scenario.test_stream[:1])
    assert model.types == {inside}
    assert outputs == {torch.float32}
    assert model.head.weight.dtype == torch.float32
    assert not torch.equal(model.head.weight, before)


def test_unknown_precision_is_refused():
    with pytest.raises(UserError, match=r"fp16.*fp32, bf16"):
        strategy(precision="fp16")


def test_batches_are_gathered_on_the_images_device():
    """Without a GPU: fake CUDA tensors refuse to mix with tensors on the CPU."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        resident = ResidentDataset(
            torch.zeros(40, 3, 4, dtype=torch.uint8, device="cuda"),
            torch.zeros(40, dtype=torch.int64, device="cuda"),
            task=1,
            permutation=torch.arange(PIXELS, device="cuda"),
        )
        for generator in (None, torch.Generator()):
            loader = ResidentLoader(resident, torch.arange(30), 16, generator)
            for batch in [next(iter(loader)), list(resident.batch(torch.arange(3, device="cuda")))]:
                assert [part.device.type for part in batch] == ["cuda"] * 3
        with torch.device("cuda"):
            model = mlp(PIXELS, (6,), CLASSES)
        assert model(next(iter(loader))[0]).shape == (16, CLASSES)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_synchronisation_with_the_gpu_between_batches(images: Images):
    resident = ResidentDataset(
        images.train_x.cuda(), images.train_y.cuda(), 0, torch.arange(PIXELS).cuda()
    )
    loader = ResidentLoader(resident, None, 16, torch.Generator())
    try:
        torch.cuda.set_sync_debug_mode("error")
        assert sum(len(y) for _, y, _ in loader) == TRAIN
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_mlp_names_its_layers():
    model = mlp(PIXELS, (6, 7), CLASSES)
    linear = {n: m.weight.shape for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert linear == {"fc1": (6, PIXELS), "fc2": (7, 6), "head": (CLASSES, 7)}
    assert model(torch.zeros(2, PIXELS)).shape == (2, CLASSES)
    assert isinstance(model[1], nn.ReLU)


def test_resnet18_keeps_the_resolution_of_small_images():
    model = resnet18(7)
    sizes: dict[str, tuple[int, ...]] = {}
    for name in ("conv1", "maxpool", "layer1", "layer4"):
        model.get_submodule(name).register_forward_hook(
            lambda _layer, _x, y, name=name: sizes.update({name: tuple(y.shape)})
        )
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert sizes == {
        "conv1": (2, 64, 32, 32),
        "maxpool": (2, 64, 32, 32),
        "layer1": (2, 64, 32, 32),
        "layer4": (2, 512, 4, 4),
    }
