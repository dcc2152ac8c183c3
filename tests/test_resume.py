"""An experiment that stops after any task and goes on in a new process: bit for bit the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

TASKS, FEATURES, CLASSES = 3, 10, 3
STOPS = (1, 2, 3)
"""After how many tasks the experiment stops; after all of them nothing more is learnt."""

SETTINGS: dict[str, dict[str, Any]] = {
    "shared bias": {},
    "per-task bias": {"head_bias": "per-task", "keep_epoch": "latest-within-margin"},
    "no bias": {"head_bias": "none"},
    "widened": {"expand": {"0": (20, 3), "3": (24, 2)}},
    "several heads": {},
    "several heads, widened": {"expand": {"features.0": (20, 4)}},
}


def experiment(setting: str, folder: Path, first: int) -> None:
    """Learn tasks [first:), from the state that is there if first isn't 0, and save."""
    from avalanche.benchmarks import tensors_benchmark
    from avalanche.models import MultiHeadClassifier, MultiTaskModule
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised import Naive

    from clnp import CLNPPlugin

    class Heads(MultiTaskModule):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.ReLU())
            self.classifier = MultiHeadClassifier(16, 2)

        def forward(self, x: Tensor, task_labels: Any) -> Tensor:
            return self.classifier(self.features(x), task_labels)  # type: ignore[no-any-return]

    class MLP(nn.Sequential):
        def __init__(self) -> None:
            hidden = [nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 24)]
            super().__init__(*hidden, nn.ReLU(), nn.Dropout(0.1), nn.Linear(24, CLASSES))

    def data(task: int, count: int) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(100 * count + task)
        places = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(task))
        labels = torch.arange(count) % CLASSES
        return places[labels] * 1.5 + torch.randn(count, FEATURES, generator=draw), labels

    torch.manual_seed(0 if first == 0 else 99)  # what the model had at first doesn't matter then
    model = Heads() if "heads" in setting else MLP()
    plugin = CLNPPlugin(margin=0.05, l1=1e-3, **SETTINGS[setting])
    strategy = Naive(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=20,
        train_epochs=3,
        plugins=[plugin],
        evaluator=EvaluationPlugin(loggers=[]),
    )
    if first:
        saved = torch.load(folder / f"state{first}.pt", weights_only=True)
        plugin.load_state_dict(saved["plugin"], model)
        model.load_state_dict(saved["model"])
    tasks = range(TASKS)
    tensors = [data(task, 60) for task in tasks]
    stream = tensors_benchmark(tensors, tensors, task_labels=list(tasks)).train_stream
    for task in range(first, TASKS):
        torch.manual_seed(task)
        for experience in stream:  # a set, with which Avalanche's own masking of heads fails
            classes = experience.classes_in_this_experience
            experience.classes_in_this_experience = sorted(classes)
        strategy.train(stream[task], eval_streams=[])
        if first == 0:
            state = {"plugin": plugin.state_dict(), "model": model.state_dict()}
            torch.save(state, folder / f"state{task + 1}.pt")
    x = data(0, 40)[0]
    result = {
        "logits": [plugin.subnetwork(task)(x) for task in tasks],
        "history": plugin.history,
        "capacity": plugin.capacity().to_dict("list"),
        "model": dict(model.state_dict()),
    }
    torch.save(result, folder / f"from{first}.pt")


@pytest.mark.parametrize(
    "setting",
    [
        # Each starts a process that imports Avalanche: these two hold what the others do as well.
        s if s in ("no bias", "several heads, widened") else pytest.param(s, marks=pytest.mark.slow)
        for s in SETTINGS
    ],
)
def test_what_follows_is_the_same_in_a_new_process(setting: str, tmp_path: Path) -> None:
    experiment(setting, tmp_path, 0)
    whole = torch.load(tmp_path / "from0.pt", weights_only=True)
    assert len(whole["logits"]) == TASKS
    assert all(logits.std() > 0 for logits in whole["logits"])
    assert any("widened" in entry for entry in whole["history"]) == ("widened" in setting)
    command = [sys.executable, __file__, setting, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for first in STOPS:
        resumed = torch.load(tmp_path / f"from{first}.pt", weights_only=True)
        assert resumed["history"] == whole["history"]
        assert resumed["capacity"] == whole["capacity"]
        for logits, expected in zip(resumed["logits"], whole["logits"], strict=True):
            assert torch.equal(logits, expected)
        assert resumed["model"].keys() == whole["model"].keys()
        for name, tensor in whole["model"].items():
            assert torch.equal(resumed["model"][name], tensor), name


if __name__ == "__main__":
    for stop in STOPS:
        experiment(sys.argv[1], Path(sys.argv[2]), stop)
