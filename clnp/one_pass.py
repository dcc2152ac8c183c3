"""L1 in one pass over weights and gradients on a CPU, by a compiled loop.

torch has no operation for it. By its own, sign and sum, it takes two passes and, in a step, three
times as long; torch.compile makes one of them, but to enter what it made costs half as much again
(reports/trials/pmnist_l1_cost.csv). The results are the same bit by bit.
"""

import logging
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from ctypes import CDLL, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

_SOURCE = """
#include <cstdint>

extern "C" void add_signs(const float* w, float* g, int64_t n, float alpha, int threads) {
    const auto add = [=](int64_t i) { g[i] += alpha * ((w[i] > 0) - (w[i] < 0)); };
    const int64_t line = 16, ahead = 64 * line;  // of the cache, 64 bytes
    const int64_t whole = n - n % line;
    #pragma omp parallel for num_threads(threads)
    for (int64_t start = 0; start < whole; start += line) {
        __builtin_prefetch(w + start + ahead);
        __builtin_prefetch(g + start + ahead, 1);
        #pragma omp simd
        for (int64_t i = start; i < start + line; i++)
            add(i);
    }
    for (int64_t i = whole; i < n; i++)
        add(i);
}
"""


OnePass = Callable[[Tensor, Tensor, float], None]
"""Adds alpha·sign(w) to the gradient of w: (w, gradient, alpha)."""


def compiler() -> str | None:
    """The command of a C++ compiler: ``CXX``, ``g++`` or ``clang++``; None: there is none."""
    found = (shutil.which(name) for name in ("g++", "clang++"))
    return os.environ.get("CXX") or next(filter(None, found), None)


def compile_one_pass() -> OnePass:
    """Compile the loop; a tenth of a second.

    Raises
    ------
    OSError
        If there is no compiler, or it fails.
    """
    name = compiler()
    if name is None:
        raise OSError("no C++ compiler (CXX, g++, clang++)")
    try:
        command = shlex.split(name)
    except ValueError as error:
        raise OSError(f"CXX is no command: {name}") from error
    options = ["-x", "c++", "-", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-o"]
    # Each process makes its own: nothing that another one has left half written is ever loaded.
    with TemporaryDirectory(prefix="clnp-", ignore_cleanup_errors=True) as folder:
        library = str(Path(folder, "l1.so"))
        command += [*options, library]
        try:
            subprocess.run(
                command, input=_SOURCE, text=True, capture_output=True, check=True, timeout=60
            )
        except subprocess.CalledProcessError as error:
            raise OSError(f"{name} fails: {error.stderr.strip()[-200:]}") from error
        except subprocess.TimeoutExpired as error:
            raise OSError(f"{name} takes more than a minute") from error
        add_signs = CDLL(library).add_signs
    add_signs.argtypes = c_void_p, c_void_p, c_int64, c_float, c_int
    add_signs.restype = None

    def add(weight: Tensor, gradient: Tensor, alpha: float) -> None:
        where, entries = (weight.data_ptr(), gradient.data_ptr()), weight.numel()
        add_signs(*where, entries, alpha, torch.get_num_threads())
        torch.autograd.graph.increment_version(gradient)

    return add


@cache
def one_pass() -> OnePass | None:
    """What :func:`compile_one_pass` gives, once a process; None where it can't."""
    try:
        return compile_one_pass()
    except OSError as error:
        logging.getLogger(__name__).info("L1 isn't compiled, which costs time only: %s", error)
        return None


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is float32 numbers on a CPU, at its address, row after row."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and not tensor.is_neg()
        and tensor.data_ptr() != 0  # of one without memory
    )
