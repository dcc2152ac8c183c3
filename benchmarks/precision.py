"""Forward passes in bfloat16, on any device at a speed worth having.

Where a CPU has no instructions for bfloat16, torch's kernels for it are several to tens of times
slower than those for float32. The product of two bfloat16 numbers is exact in float32, so that
float32 kernels on operands rounded to bfloat16 do the same arithmetic, if the result is rounded as
well. Only the order of the sums differs, as it does between any two devices.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

PRODUCTS: frozenset[Callable[..., Any]] = frozenset(
    {
        F.linear,
        F.conv1d,
        F.conv2d,
        F.conv3d,
        torch.matmul,
        Tensor.matmul,
        Tensor.__matmul__,
        torch.mm,
        torch.bmm,
        torch.addmm,
    }
)
"""What `Float32Kernels` computes; the rest of autocast's list keeps its slow kernels."""


INSTRUCTIONS = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
"""What `torch.cpu` tells of instructions for bfloat16 on x86, of which a CPU needs one."""


class Float32Kernels(TorchFunctionMode):
    """Within autocast to bfloat16: sums of products by float32 kernels, on rounded operands.

    Results are bfloat16 tensors, and so is all that autocast leaves in that type between them. The
    rounding is a conversion to bfloat16 and back, whose derivative rounds too: gradients with
    respect to operands are rounded just as autocast's own.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch, a sum of products with rounded operands."""
        kwargs = kwargs or {}
        if func not in PRODUCTS or not _eligible(args[0]):
            return func(*args, **kwargs)
        rounded = [_rounded(value) for value in args]
        named = {name: _rounded(value) for name, value in kwargs.items()}
        with torch.autocast(args[0].device.type, enabled=False):
            return func(*rounded, **named).bfloat16()


def _eligible(operand: Tensor) -> bool:
    # As in autocast, float64 and integers are left alone.
    return operand.is_floating_point() and operand.dtype != torch.float64


def _rounded(value: Any) -> Any:
    return value.bfloat16().float() if isinstance(value, Tensor) else value


@cache
def has_fast_bf16(device: torch.device) -> bool:
    """Return whether torch's own bfloat16 kernels are fast on a device.

    On a CPU they are if it has instructions for bfloat16. oneDNN takes them where AVX512 is all
    that there is, and is slower by it than float32 is: 4 times in the permuted-MNIST network. What
    it refuses runs in plain loops. NVIDIA's GPUs before Ampere emulate bfloat16, and have no
    convolutions for it.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if x86 and all(hasattr(torch.cpu, name) for name in INSTRUCTIONS):  # not in every torch
        return any(getattr(torch.cpu, name)() for name in INSTRUCTIONS)
    return True


def bf16_kernels(device: torch.device) -> str:
    """Return what computes in bfloat16 on a device: ``"native"`` or ``"fp32 kernels"``."""
    return "native" if has_fast_bf16(device) else "fp32 kernels"


@contextmanager
def bf16(device: torch.device) -> Iterator[None]:
    """Autocast to bfloat16, by `Float32Kernels` where a device has no fast kernels of its own."""
    with torch.autocast(device.type, torch.bfloat16):
        if has_fast_bf16(device):
            yield
        else:
            with Float32Kernels():
                yield
