"""L1 on the weights in training: what makes a task need few units (paper, Sec. 2.2)."""

import logging
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from ctypes import CDLL, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from clnp.layout import Layout

CPU_PART, GPU_PART = 2**19, 2**20
"""Entries handled at once: on a CPU their signs stay in the cache (smaller parts cost more in calls
than they save: reports/trials/pmnist_l1_cost.csv); on a GPU they take 4 MB."""

ONE_PASS_FROM = 2**16
"""Entries on a CPU from which on a loop is compiled for them: with fewer a step costs little."""

Alphas = float | Sequence[float] | Mapping[str, float]
"""alpha: one for all layers, one for each in forward order (the head last), or by name."""


def alphas_by_layer(layout: Layout, l1: Alphas) -> dict[str, float]:
    """Alpha of each layer with a weight matrix.

    Raises
    ------
    ValueError
        If a layer is unknown, or the list has another length than there are layers.
    """
    layers = layout.weights
    shown = ", ".join(layers)
    if isinstance(l1, Mapping):
        head = {layout.head: l1["head"]} if "head" in l1 else {}
        unknown = [name for name in l1 if name not in (*layers, "head")]
        if unknown:
            raise ValueError(f"l1 names the layer {unknown[0]!r}, but the layers are: {shown}")
        return (
            dict.fromkeys(layers, 0.0)
            | {name: alpha for name, alpha in l1.items() if name != "head"}
            | head
        )
    if not isinstance(l1, Sequence):
        return dict.fromkeys(layers, float(l1))
    if len(l1) != len(layers):
        raise ValueError(
            f"l1 has {len(l1)} values for {len(layers)} layers; in forward order they are: {shown}"
        )
    return dict(zip(layers, l1, strict=True))


def plain(l1: Alphas) -> float | list[float] | dict[str, float]:
    """Alphas as they can be saved: Python's own numbers, not NumPy's."""
    if isinstance(l1, Mapping):
        return {name: float(alpha) for name, alpha in l1.items()}
    return [float(alpha) for alpha in l1] if isinstance(l1, Sequence) else float(l1)


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


def compile_one_pass() -> OnePass:
    """Compile L1 in one pass over weights and gradients (float32, on a CPU); a tenth of a second.

    torch has no operation for it. By its own, sign and sum, it takes two passes and, in a step,
    three times as long; torch.compile makes one of them, but to enter what it made costs half as
    much again (reports/trials/pmnist_l1_cost.csv). The results are the same bit by bit.

    Raises
    ------
    OSError
        If there is no C++ compiler (``CXX``, ``g++``, ``clang++``), or it fails.
    """
    found = (shutil.which(name) for name in ("g++", "clang++"))
    compiler = os.environ.get("CXX") or next(filter(None, found), None)
    if compiler is None:
        raise OSError("no C++ compiler (CXX, g++, clang++)")
    try:
        command = shlex.split(compiler)
    except ValueError as error:
        raise OSError(f"CXX is no command: {compiler}") from error
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
            raise OSError(f"{compiler} fails: {error.stderr.strip()[-200:]}") from error
        except subprocess.TimeoutExpired as error:
            raise OSError(f"{compiler} takes more than a minute") from error
        add_signs = CDLL(library).add_signs
    add_signs.argtypes = c_void_p, c_void_p, c_int64, c_float, c_int
    add_signs.restype = None

    def add(weight: Tensor, gradient: Tensor, alpha: float) -> None:
        where, entries = (weight.data_ptr(), gradient.data_ptr()), weight.numel()
        add_signs(*where, entries, alpha, torch.get_num_threads())
        torch.autograd.graph.increment_version(gradient)

    return add


@cache
def _one_pass() -> OnePass | None:
    try:
        return compile_one_pass()
    except OSError as error:
        logging.getLogger(__name__).info("L1 isn't compiled, which costs time only: %s", error)
        return None


def _is_plain(tensor: Tensor) -> bool:
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


class L1:
    """The subgradient of sum_l alpha_l·|W_l|, added to the gradients before the optimizer's step.

    On a CPU with a C++ compiler a large network gets it in one pass over weights and gradients, for
    which a loop is compiled; elsewhere by torch's own operations.

    Parameters
    ----------
    leaves
        The weights in training (free rows, the current head) by layer.
    alphas
        alpha by layer.
    """

    def __init__(self, leaves: Mapping[str, nn.Parameter], alphas: Mapping[str, float]) -> None:
        parts: list[tuple[nn.Parameter, float, Tensor]] = []
        for layer, leaf in leaves.items():
            if alphas[layer] > 0 and leaf.requires_grad:
                entries = CPU_PART if leaf.device.type == "cpu" else GPU_PART
                rows = min(len(leaf), max(1, entries // max(1, leaf[0].numel())))
                parts.append((leaf, alphas[layer], torch.empty_like(leaf[:rows], device="meta")))
        # The layers share one buffer for signs: allocating it each step costs as much again as the
        # signs themselves, and one for each layer is memory that plain training doesn't need.
        sizes: dict[tuple[torch.device, torch.dtype], int] = {}
        for leaf, _, part in parts:
            kind = leaf.device, leaf.dtype
            sizes[kind] = max(sizes.get(kind, 0), part.numel())
        buffers = {
            (device, dtype): torch.empty(size, device=device, dtype=dtype)
            for (device, dtype), size in sizes.items()
        }
        self._terms = [
            (leaf, alpha, buffers[leaf.device, leaf.dtype].as_strided(part.shape, part.stride()))
            for leaf, alpha, part in parts
        ]
        entries = sum(leaf.numel() for leaf, _, _ in parts if _is_plain(leaf))
        self._in_one_pass = entries >= ONE_PASS_FROM and _one_pass() is not None

    @torch.no_grad()
    def add_to_gradients(self) -> None:
        """Add alpha·sign(w) to the gradient of each w."""
        for leaf, alpha, signs in self._terms:
            if leaf.grad is None:
                continue
            add = _one_pass() if self._in_one_pass and _is_plain(leaf) else None
            if add is not None and _is_plain(leaf.grad):
                add(leaf, leaf.grad, alpha)
                continue
            rows = len(signs)
            for part, grad in zip(leaf.split(rows), leaf.grad.split(rows), strict=True):
                grad.add_(torch.sign(part, out=signs[: len(part)]), alpha=alpha)
