"""The package as strangers meet it: its environment, its sessions, its wheel, its citation."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, metadata
from itertools import chain
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SESSIONS = {
    *("env", "lint", "typecheck", "tests", "slow", "gpu", "peer", "fuzz", "speed"),
    *("quickstart", "pmnist", "split_cifar", "split_cifar_wide"),
    *("split_cifar_reduced", "split_cifar_wide_reduced", "tune", "prepare", "report"),
}


def run(*command: str | Path, cwd: Path = ROOT, timeout: float = 60, **environment: str) -> str:
    """Run a program to its end and return what it printed; what it printed is also the error."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


# --- what is declared ---------------------------------------------------------------------------


def test_citation_names_the_software_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    assert citation["title"] == PROJECT["name"]
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    (paper,) = citation["references"]
    assert paper["title"] == "Continual Learning via Neural Pruning"
    assert [author["family-names"] for author in paper["authors"]] == ["Golkar", "Kagan", "Cho"]
    assert "1903.04476" in paper["identifiers"][0]["value"]


def test_code_and_changelog_speak_of_this_version() -> None:
    code = (ROOT / "clnp" / "__init__.py").read_text()
    assert f'__version__ = "{PROJECT["version"]}"' in code
    assert PROJECT["version"] in (ROOT / "CHANGELOG.md").read_text()


def test_the_first_python_that_is_promised_takes_every_pinned_version() -> None:
    """A pin that doesn't makes pip search for minutes, and give up without naming it."""
    (lowest,) = (spec.version for spec in SpecifierSet(PROJECT["requires-python"]))
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    asked = {}
    for name, version in (line.split("==") for line in lines if not line.startswith("#")):
        with suppress(PackageNotFoundError):  # of another platform
            found = metadata(name)
            if found["Version"].partition("+")[0] == version:
                asked[name] = SpecifierSet(found["Requires-Python"] or "")
    assert len(asked) > 100
    assert not [name for name, pythons in asked.items() if not pythons.contains(f"{lowest}.0")]


def test_constraints_pin_every_dependency_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    extras = PROJECT["optional-dependencies"]
    for requirement in map(Requirement, chain(PROJECT["dependencies"], *extras.values())):
        pinned = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pinned), f"{requirement} but pinned {pinned}"
    assert not any(name.startswith("nvidia") for name in pins), "torch pins its own CUDA packages"


# --- nox ----------------------------------------------------------------------------------------


def test_nox_says_what_each_session_is_for() -> None:
    listing = run(sys.executable, "-m", "nox", "--list", NO_COLOR="1")
    lines = re.findall(r"^([*-]) (\S+)(?: -> (.+))?$", listing, flags=re.MULTILINE)
    assert {name for _, name, _ in lines} >= SESSIONS
    assert [name for _, name, purpose in lines if not purpose] == []
    assert [name for mark, name, _ in lines if mark == "*"] == ["lint", "typecheck", "tests"]


class Session:
    """Stands in for nox's: notes what it is asked to run, and fails at a command with `fails`."""

    def __init__(self, fails: str | None = None) -> None:
        self.commands: list[list[str]] = []
        self.fails = fails

    def log(self, message: str) -> None:
        """Say nothing."""

    def run(self, *command: str, **options: object) -> None:
        self.commands.append(list(command))
        if self.fails in command:
            raise RuntimeError(self.fails)
        if "virtualenv" in command:
            python = Path(command[-1]) / "bin" / "python"
            python.parent.mkdir(parents=True, exist_ok=True)
            python.touch()


@pytest.fixture(scope="module")
def sessions() -> ModuleType:
    """The noxfile as a module."""
    spec = importlib.util.spec_from_file_location("noxfile", ROOT / "noxfile.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def noxfile(sessions: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The noxfile as a module, its root a temporary folder."""
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(sessions, "ROOT", tmp_path)
    monkeypatch.setattr(sessions, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(sessions, "PYTHON", tmp_path / ".venv" / "bin" / "python")
    monkeypatch.setattr(sessions, "STAMP", tmp_path / ".venv" / "stamp")
    return sessions


def test_environment_is_built_when_missing_or_stale_and_only_then(noxfile: ModuleType) -> None:
    first, second, third = Session(), Session(), Session()
    noxfile.build_environment(first)
    assert ["virtualenv" in command for command in first.commands] == [True, False, False]
    assert all("constraints.txt" in " ".join(command) for command in first.commands[1:])

    noxfile.build_environment(second)
    assert second.commands == []

    (noxfile.ROOT / "constraints.txt").write_text("torch==0")
    noxfile.build_environment(third)
    assert len(third.commands) == 3
    assert "--clear" not in third.commands[0], "a stale environment is brought up to date in place"


def test_environment_half_built_is_not_taken_for_whole(noxfile: ModuleType) -> None:
    noxfile.build_environment(Session())
    whole = noxfile.ROOT / "constraints.txt"
    text = whole.read_text()
    whole.write_text("torch==0")
    with pytest.raises(RuntimeError, match="torchvision"):
        noxfile.build_environment(Session(fails="torchvision"))
    whole.write_text(text)
    again = Session()
    noxfile.build_environment(again)
    assert len(again.commands) == 3


# --- the wheel ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel() -> Iterator[Path]:
    """The wheel, built from this checkout."""
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT, timeout=300)
        (built,) = Path(folder).glob("*.whl")
        yield built


@pytest.mark.slow
def test_wheel_holds_clnp_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    information = f"clnp-{PROJECT['version']}.dist-info"
    assert {name.split("/")[0] for name in names} == {"clnp", information}
    assert {"clnp/__init__.py", "clnp/py.typed", f"{information}/licenses/LICENSE"} <= set(names)
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "clnp").rglob("*.py")}
    assert modules <= set(names)


def readme_example() -> str:
    """Return the README's complete example: its first Python block that makes a CLNPPlugin."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    return next(block for block in blocks if "CLNPPlugin(" in block)


@pytest.mark.slow
def test_wheel_runs_the_readme_example_in_a_clean_environment(wheel: Path) -> None:
    # Not pytest's tmp_path, which keeps its last folders: an environment weighs 6 GB.
    with tempfile.TemporaryDirectory() as folder:
        outside = Path(folder)
        python = outside / "venv" / "bin" / "python"
        run(sys.executable, "-m", "virtualenv", outside / "venv")
        # Bytecode is written as modules are imported, which few of these are.
        pip = [python, "-m", "pip", "install", "--quiet", "--no-compile"]
        pip += ["--constraint", ROOT / "constraints.txt"]
        run(*pip, "torch", "torchvision", timeout=1200)
        run(*pip, wheel, timeout=1200)
        assert run(python, "-I", "-c", "import clnp; print(clnp.__file__)", cwd=outside).startswith(
            str(outside)
        )
        (outside / "example.py").write_text(readme_example())
        assert run(python, "-I", "example.py", cwd=outside, timeout=300).strip()
