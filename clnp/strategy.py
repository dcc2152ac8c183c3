"""CLNP as a ready strategy of Avalanche's."""

from collections.abc import Mapping, Sequence
from typing import Any

from avalanche.training.templates import SupervisedTemplate
from torch import Tensor, nn
from torch.optim import Optimizer

from clnp.finetune import FineTune
from clnp.plugin import CLNPPlugin
from clnp.sparsity import Alphas


class CLNP(SupervisedTemplate):
    """A ready strategy: plain training with a :class:`CLNPPlugin`.

    Parameters
    ----------
    model, optimizer, criterion
        As in every Avalanche strategy.
    margin, l1, thresholds, valid_stream, example_input, heads, head_bias, seed
        As in :class:`CLNPPlugin`.
    keep_epoch, finetune, expand, below_margin
        As in :class:`CLNPPlugin`.
    **base
        What every Avalanche strategy takes: train_mb_size, train_epochs, eval_mb_size, device,
        plugins, evaluator, eval_every, ...

    Attributes
    ----------
    clnp : CLNPPlugin
        The plugin: ``strategy.clnp.subnetwork(task)``, ``strategy.clnp.capacity()``.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        criterion: Any = None,
        margin: float | Sequence[float] = 0.0005,
        l1: Alphas = 1e-5,
        thresholds: str = "per-layer",
        valid_stream: Any = None,
        example_input: Tensor | None = None,
        heads: str = "auto",
        head_bias: str = "shared",
        seed: int = 0,
        keep_epoch: str = "last",
        finetune: FineTune | None = None,
        expand: Mapping[str, tuple[int, int]] | None = None,
        below_margin: str = "harmless",
        plugins: Sequence[Any] | None = None,
        **base: Any,
    ) -> None:
        self.clnp = CLNPPlugin(
            margin,
            l1,
            thresholds,
            valid_stream,
            example_input,
            heads,
            head_bias,
            seed,
            keep_epoch,
            finetune,
            expand,
            below_margin,
        )
        super().__init__(
            model=model,
            optimizer=optimizer,
            criterion=nn.CrossEntropyLoss() if criterion is None else criterion,
            plugins=[*(plugins or []), self.clnp],
            **base,
        )
