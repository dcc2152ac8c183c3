"""Every task of the project, from the tests to the paper's experiments: `nox -l` lists them.

All sessions share one virtual environment, `.venv`, because torch and CUDA weigh 6 GB. It holds
the exact versions of `constraints.txt` and is built by whichever session first finds it missing or
stale. Options after `--` go to each session of the call that takes any:

    nox -s pmnist quickstart -- --n-seeds 5
"""

from __future__ import annotations

import hashlib
import platform
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.2"
nox.options.sessions = ["lint", "typecheck", "tests"]
nox.options.default_venv_backend = "none"

ROOT = Path(__file__).parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
STAMP = VENV / "clnp-environment"


@nox.session
def env(session: nox.Session) -> None:
    """Build the shared environment .venv anew (the others build it when it is missing or stale)."""
    build_environment(session, anew=True)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting with ruff."""
    run_module(session, "ruff", "check", ".")
    run_module(session, "ruff", "format", "--check", ".")


@nox.session
def typecheck(session: nox.Session) -> None:
    """Check types with mypy --strict."""
    run_module(session, "mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the quick tests: no network, data set or GPU (options go to pytest)."""
    run_module(session, "pytest", *at_once(session))


@nox.session
def slow(session: nox.Session) -> None:
    """Run the slow tests, among them the wheel's in a clean environment (options go to pytest)."""
    run_module(session, "pytest", "-m", "slow and not gpu", *at_once(session))


@nox.session
def gpu(session: nox.Session) -> None:
    """Run the tests that need a GPU (options go to pytest)."""
    run_module(session, "pytest", "-m", "gpu", *session.posargs)


@nox.session
def peer(session: nox.Session) -> None:
    """Run Avalanche's own tests against the plugin (options go to pytest)."""
    run_module(session, "pytest", "-m", "peer", *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Test 2,000 random networks, and cells killed at 100 moments (options go to pytest)."""
    options = ("--hypothesis-profile=fuzz", "--hypothesis-show-statistics")
    files = ("tests/test_properties.py", "tests/test_kill.py")
    run_module(session, "pytest", *files, *options, *session.posargs)


@nox.session
def speed(session: nox.Session) -> None:
    """Print what epochs, steps, scoring and memory cost against plain training, with bounds."""
    run_module(session, "benchmarks", "speed", *session.posargs)


@nox.session
def quickstart(session: nox.Session) -> None:
    """See CLNP learn permuted digits without forgetting: table and figures in 90 s, no download."""
    run_module(session, "benchmarks", "run", "quickstart", *session.posargs)


@nox.session
def pmnist(session: nox.Session) -> None:
    """Run the paper's permuted MNIST: 10 tasks, 5 seeds, every method (options choose fewer)."""
    run_module(session, "benchmarks", "run", "pmnist", *session.posargs)


@nox.session
def split_cifar(session: nox.Session) -> None:
    """Run the paper's split CIFAR, narrow network: 6 tasks, 5 seeds (options choose fewer)."""
    run_module(session, "benchmarks", "run", "split_cifar", *session.posargs)


@nox.session
def split_cifar_wide(session: nox.Session) -> None:
    """Run the paper's split CIFAR on the wide network with one head: for a GPU."""
    run_module(session, "benchmarks", "run", "split_cifar_wide", *session.posargs)


@nox.session
def split_cifar_reduced(session: nox.Session) -> None:
    """Run the narrow network with fewer images and epochs: for machines without a GPU."""
    run_module(session, "benchmarks", "run", "split_cifar_reduced", *session.posargs)


@nox.session
def split_cifar_wide_reduced(session: nox.Session) -> None:
    """Run an eighth of the wide network, likewise: for machines without a GPU."""
    run_module(session, "benchmarks", "run", "split_cifar_wide_reduced", *session.posargs)


@nox.session
def tune(session: nox.Session) -> None:
    """Try a method's grid on validation data: nox -s tune -- --method clnp."""
    run_module(session, "benchmarks", "tune", *session.posargs)


@nox.session
def prepare(session: nox.Session) -> None:
    """Download and cache the data sets, and check their fingerprints."""
    run_module(session, "benchmarks", "prepare", *session.posargs)


@nox.session
def report(session: nox.Session) -> None:
    """Rebuild tables, figures and pages of reports/out, and the README's tables, from records."""
    tables = ("--readme", "README.md", "clnp/README.md")
    run_module(session, "benchmarks", "report", *session.posargs, *tables)


def at_once(session: nox.Session) -> list[str]:
    """Run all tests on all cores, a file on one; with options of the user, as they say."""
    return session.posargs or ["--numprocesses", "auto", "--dist", "loadfile"]


def run_module(session: nox.Session, module: str, *arguments: str) -> None:
    """Run `python -m module` in the shared environment, which is built first if need be.

    The timeouts give an interrupted cell time to save its state (nox's own are 0.3 s and 0.2 s).
    """
    build_environment(session)
    session.run(
        str(PYTHON),
        "-m",
        module,
        *arguments,
        external=True,
        interrupt_timeout=120,
        terminate_timeout=60,
    )


def build_environment(session: nox.Session, anew: bool = False) -> None:
    """Bring `.venv` to what pyproject.toml and constraints.txt ask for, unless it is already."""
    if sys.version_info < (3, 11):  # noqa: UP036, nox itself may run on an older one
        session.error(f"constraints.txt needs Python 3.11 or later, and nox runs on {sys.version}")
    if not anew and PYTHON.exists() and STAMP.exists() and STAMP.read_text() == wanted_stamp():
        return
    if Path(sys.prefix) == VENV:
        session.error("nox runs from .venv, which is to be rebuilt: run a nox installed elsewhere")
    session.log("building .venv: about 6 GB, several minutes the first time")
    STAMP.unlink(missing_ok=True)
    clear = ["--clear"] if anew else []
    session.run(sys.executable, "-m", "virtualenv", "--quiet", *clear, str(VENV), external=True)
    pip = [str(PYTHON), "-m", "pip", "install", "-c", str(ROOT / "constraints.txt")]
    if not sys.stdout.isatty():
        pip.append("--quiet")
    # torch first and alone: the later call finds it installed and never looks for another build.
    session.run(*pip, "torch", "torchvision", external=True)
    session.run(*pip, "-e", f"{ROOT}[benchmarks,cluster,dev]", external=True)
    STAMP.write_text(wanted_stamp())


def wanted_stamp() -> str:
    """Return what names an environment: Python's version and the hash of what is asked for."""
    asked = b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
    return f"Python {platform.python_version()}, {hashlib.sha256(asked).hexdigest()}\n"
