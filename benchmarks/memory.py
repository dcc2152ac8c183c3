"""The most memory that a computation holds at once, on a CPU or a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all tensors that live, backward passes and optimizer states included.

    A tensor counts from the first operation that returns or takes it until its storage is freed;
    views of one storage count once. What a kernel needs inside is not seen.

    Attributes
    ----------
    peak : int
        The most bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation and count what lives after it."""
        result = func(*args, **(kwargs or {}))
        self._count(tree_leaves((args, kwargs, result)))
        return result

    def _count(self, values: Iterable[Any]) -> None:
        # Freed ones go first: another storage may have one's address.
        self._live = {key: kept for key, kept in self._live.items() if not kept[0].expired()}
        for value in values:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Run something and return the most bytes on a device that it held at once.

    On a CUDA device it is what torch's allocator handed out beyond what was there before; on a CPU
    all tensors that `run` makes or uses (see `LiveBytes`).
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return int(torch.cuda.max_memory_allocated(device)) - before
    live = LiveBytes()
    with live:
        run()
    return live.peak
