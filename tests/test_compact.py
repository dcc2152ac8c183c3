"""A task's network on its own: the same logits from the task's units alone."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from avalanche.models import MTSimpleMLP, MultiHeadClassifier, MultiTaskModule, as_multitask
from torch import Tensor, nn

from clnp import UnsupportedNetwork
from clnp.compact import compact, report
from clnp.network import PartitionedNetwork


def helpers(name: str) -> ModuleType:
    """Another file of tests: they are no package, so that it is loaded by its path."""
    spec = importlib.util.spec_from_file_location(
        f"compact_{name}", Path(__file__).with_name(f"{name}.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


nets = helpers("test_network")
plugins = helpers("test_plugin")

HEADS = [(True, "shared"), (True, "per-task"), (True, "none"), (False, "shared")]
ARCHITECTURES = [*((name, True) for name in nets.NETS), ("cnn", False)]


def network_of(module: PartitionedNetwork, task: int, x: Tensor) -> nn.Module:
    return compact(module, task, nets.call_of(task), x)


def assert_same(found: Any, expected: Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=0, atol=1e-5)


def onnx_logits(module: nn.Module, x: Tensor) -> Tensor:
    """Logits of the exported module, by ONNX's reference evaluator."""
    from onnx.reference import ReferenceEvaluator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the exporter's own imports warn of
        program = torch.onnx.export(
            module, (x,), dynamo=True, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
        )
    assert program is not None
    evaluator = ReferenceEvaluator(program.model_proto)
    twice = torch.cat([x, x])
    (logits,) = evaluator.run(None, {evaluator.input_names[0]: twice.numpy()})
    return torch.as_tensor(np.asarray(logits))


@pytest.mark.parametrize(("single_head", "head_bias"), HEADS)
@pytest.mark.parametrize("name", nets.NETS)
def test_logits_are_the_subnetworks(name: str, single_head: bool, head_bias: str) -> None:
    network, x = nets.learnt(name, single_head, 3, head_bias), nets.inputs(name)
    sizes = []
    for task in range(3):
        module = network_of(network, task, x)
        for batch in (x, x[:1], torch.cat([x, x, x[:5]])):
            assert_same(module(batch), nets.logits(network, task, batch))
        sizes.append(sum(p.numel() for p in module.parameters()))
        assert not any(m.training for m in module.modules())
    assert max(sizes) < sum(p.numel() for p in network.model.parameters())


@pytest.mark.parametrize("single_head", [True, False])
def test_only_the_tasks_units(single_head: bool) -> None:
    network, x = nets.learnt("mlp", single_head, 3), nets.inputs("mlp")
    for task in range(3):
        before = list(network.partition.before(task).values())
        first, second = network.partition.after(task).values()
        own = second - before[1] if single_head else second
        state = network_of(network, task, x).state_dict()
        assert sorted(tuple(t.shape) for t in state.values()) == sorted(
            [(first, 12), (first,), (own, first), (own,), (3, own), (3,)]
        )


@pytest.mark.parametrize("single_head", [True, False])
def test_it_stands_alone(single_head: bool) -> None:
    """It shares no memory with the network, keeps none of its, and survives what happens to it."""
    for name in nets.NETS if single_head else ("grouped",):
        network, x = nets.learnt(name, single_head), nets.inputs(name)
        kept = nets.snapshot(network.model)
        module = network_of(network, 0, x)
        assert nets.equal_states(nets.snapshot(network.model), kept)
        theirs = {t.untyped_storage().data_ptr() for t in network.model.state_dict().values()}
        for tensor in module.state_dict().values():
            assert tensor.untyped_storage().data_ptr() not in theirs
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            assert not tensor.requires_grad
        expected = module(x)
        with torch.no_grad():
            for tensor in network.model.state_dict().values():
                tensor.zero_()
        assert torch.equal(module(x), expected)


@pytest.mark.parametrize("single_head", [True, False])
def test_while_a_task_trains(single_head: bool) -> None:
    for name in nets.NETS if single_head else ("dense",):
        network, x = nets.learnt(name, single_head), nets.inputs(name)
        expected = network_of(network, 1, x)
        nets.begin(network, x)
        with network.view(network.training_view):
            module = network_of(network, 1, x)
        assert nets.equal_states(module.state_dict(), expected.state_dict())
        assert torch.equal(module(x), expected(x))
        network.end_task()


@pytest.mark.parametrize(("name", "single_head"), ARCHITECTURES)
def test_saved_and_exported(name: str, single_head: bool) -> None:
    network, x = nets.learnt(name, single_head), nets.inputs(name)
    module, other = network_of(network, 1, x), network_of(network, 1, x)
    expected = module(x)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x), expected)
    program = torch.export.export(
        module, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    ).module()
    assert_same(program(x), expected)
    assert_same(program(x[:3]), expected[:3])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "single_head"), ARCHITECTURES)
def test_exported_to_onnx(name: str, single_head: bool) -> None:
    network, x = nets.learnt(name, single_head), nets.inputs(name)
    module = network_of(network, 1, x)
    assert_same(onnx_logits(module, x), torch.cat([module(x), module(x)]))


# -- by the plugin -----------------------------------------------------------------------------


class ByValue(MultiTaskModule):  # type: ignore[misc]
    """A forward that a graph can't hold."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Linear(plugins.FEATURES, 9)
        self.classifier = MultiHeadClassifier(9, plugins.CLASSES)

    def forward(self, x: Tensor, task_labels: Any) -> Tensor:
        h = F.relu(self.features(x))
        if float(h.detach().sum()) < 0:
            raise AssertionError("a ReLU's output is positive")
        return self.classifier(h, task_labels)  # type: ignore[no-any-return]


def trained(model: nn.Module, tasks: int = 2) -> Any:
    plugin = plugins.CLNPPlugin(margin=0.1, l1=1e-3)
    trainer = plugins.strategy(model, plugin)
    for experience in plugins.benchmark(tasks=tasks).train_stream:
        trainer.train(experience, eval_streams=[])
    return plugin


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(plugins.FEATURES, 9), nn.ReLU(), nn.Linear(9, 3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "single head": plugins.mlp,
    "MTSimpleMLP": lambda: MTSimpleMLP(input_size=plugins.FEATURES, hidden_size=20),
    "as_multitask": lambda: as_multitask(two_layers(), "2"),
}


@pytest.mark.parametrize("model", MODELS)
def test_a_plugins_tasks(model: str) -> None:
    plugin = trained(MODELS[model]())
    x = plugins.blobs(0, 9, (plugins.FEATURES,))[0]
    for task in plugin.tasks:
        module = plugin.compact(task)
        expected = plugin.subnetwork(task)(x)
        assert_same(module(x), expected)
        classes = {base for m in module.modules() for base in type(m).__mro__}
        assert not any(base.__module__.startswith(("avalanche", "clnp")) for base in classes)
        heads = {name for name in module.state_dict() if ".classifiers." in name}
        assert all(f".classifiers.{task}." in name for name in heads)
        assert_same(onnx_logits(module, x), torch.cat([expected, expected]))
    with pytest.raises(KeyError, match="hasn't been learnt"):
        plugin.compact(7)


def test_what_cannot_be_traced_is_refused() -> None:
    plugin = trained(ByValue())
    with pytest.raises(UnsupportedNetwork, match="ByValue can't be traced"):
        plugin.compact(0)


def test_what_computes_something_else_is_refused() -> None:
    network, x = nets.learnt("mlp", single_head=True), nets.inputs("mlp")
    calls: list[Tensor] = []

    def drifting(model: nn.Module, x: Tensor) -> Tensor:
        calls.append(x)
        return model(x) + len(calls)  # type: ignore[no-any-return]

    with pytest.raises(UnsupportedNetwork, match="compact network of task 0 is off by"):
        compact(network, 0, drifting, x)


@pytest.mark.slow
def test_without_avalanche_or_clnp(tmp_path: Path) -> None:
    """Another process reads the exported network with torch alone."""
    plugin = trained(MODELS["MTSimpleMLP"]())
    x = plugins.blobs(0, 9, (plugins.FEATURES,))[0]
    module = plugin.compact(0)
    program = torch.export.export(module, (x,))
    torch.export.save(program, tmp_path / "network.pt2")
    torch.save({"x": x, "logits": module(x), "state": module.state_dict()}, tmp_path / "data.pt")
    code = (
        "import sys, torch\n"
        "module = torch.export.load(sys.argv[1]).module()\n"
        "data = torch.load(sys.argv[2], weights_only=True)\n"
        "torch.testing.assert_close(module(data['x']), data['logits'], rtol=0, atol=1e-5)\n"
        "assert module.state_dict().keys() == data['state'].keys()\n"
        "assert not {'avalanche', 'clnp'} & set(sys.modules)\n"
    )
    paths = [str(tmp_path / name) for name in ("network.pt2", "data.pt")]
    subprocess.run([sys.executable, "-c", code, *paths], check=True, timeout=120)


def test_report() -> None:
    network, x = nets.learnt("mlp", single_head=False), nets.inputs("mlp")
    network.model.train()
    module = network_of(network, 0, x)
    table = report(module, network.model, x, rounds=3)
    small = sum(p.numel() for p in module.parameters())
    full = sum(p.numel() for p in network.model.parameters())
    assert table.loc["compact", "parameters"] == small
    assert table.loc["full", "parameters"] == full
    assert table.loc["ratio", "parameters"] == pytest.approx(small / full)
    assert (table.seconds > 0).all()
    assert network.model.training
