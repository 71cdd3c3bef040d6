"""The gradient of a batch that several processes share: each takes some rows, and all get that of the whole."""

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from diffrl import keys
from diffrl.errors import InputError
from diffrl.objectives.denoiser_loss import DenoiserLoss
from diffrl.training.distributed import Ranks, bounds_of_units

__all__ = ["Gradients"]

UNITS = 6  # rows, or groups, that are enough to see whether a loss takes a batch apart
APART = 1e-2  # of a gradient; what batches in float32 differ by is far less, what couples rows far more


class Gradients:
    """Leaves the gradient of a batch's loss in the parameters, by one process or several.

        ∇L(batch) = Σ_r w_r ∇L(rows of r),    w_r = rows of r / rows

    which DistributedDataParallel takes as the mean over N processes of N w_r ∇L(rows of r). It holds of a loss that is
    the mean of what rows, or groups of rows, come to by themselves; of others it is found out, see `check`.

    Args:
        loss: of the denoiser that is trained.
        ranks: the processes.
        learning: whether the losses of all states are wanted in them, under `diffrl.keys.LOSS`.
    """

    def __init__(self, loss: DenoiserLoss, ranks: Ranks, *, learning: bool = False) -> None:
        self.loss, self.ranks, self.learning = loss, ranks, learning
        self._shared: nn.Module | None = None

    def __call__(self, states: TensorDictBase, around: AbstractContextManager[Any]) -> tuple[float, float]:
        """The batch's ``loss_value`` and ``td_error``, root mean square over the shares.

        Args:
            states: the whole batch [B, K], the same in every process.
            around: what the loss is computed in.

        Raises:
            ValueError: see `check` and `Ranks.share`.
            RankLost: another process ended.
        """
        if self.ranks.size == 1:
            with around:
                out = self.loss(states)
            out["loss_value"].backward()
            return out["loss_value"].item(), out["td_error"].item()
        if self._shared is None:
            self._shared = self._wrapped(states)
        share, before = self.ranks.share(states), self.loss.network_evaluations
        part = states[share.rows]
        with around:
            loss, td_error = self._shared(part)
        with self.ranks.answered():
            (self.ranks.size * share.weight * loss).backward()
        loss_value, square, evaluations = self.ranks.sums(
            share.weight * loss.item(),
            share.weight * td_error.item() ** 2,
            self.loss.network_evaluations - before,
        )
        self.loss.network_evaluations = before + round(evaluations)
        if self.learning:
            states[keys.LOSS] = self.ranks.whole(part[keys.LOSS], share, len(states))
        return loss_value, math.sqrt(square)

    def _wrapped(self, states: TensorDictBase) -> nn.Module:
        unused = self.check(states)
        return self.ranks.parallel(_Figures(self.loss), unused=unused)

    def check(self, states: TensorDictBase) -> bool:
        """Refuse a loss, or a network, in which the rows of a batch do not stand for themselves.

        A few rows are asked for their gradient as a whole and in two parts. Each process does so by itself.

        Args:
            states: a batch [B, K].

        Returns:
            Whether there are parameters that the loss does not reach.

        Raises:
            ValueError: the gradients differ, or the batch cannot be shared.
        """
        self.ranks.share(states)
        bounds = bounds_of_units(states)
        end = bounds[min(UNITS, len(bounds) - 1)]
        cut = bounds[max(1, min(UNITS, len(bounds) - 1) // 3)]
        (whole, unused), (head, _), (tail, _) = (
            self._gradient(states[rows]) for rows in (slice(end), slice(cut), slice(cut, end))
        )
        apart = cut / end * head + (1 - cut / end) * tail - whole
        if float(apart.norm()) > APART * float(whole.norm()):  # what is not finite is refused by the step
            raise InputError(
                f"{type(self.loss).__name__}: the gradient of {end} rows is not the mean of those of {cut} and "
                f"{end - cut}, so that several processes would train something else than one: the loss or the network "
                "looks at a batch as a whole (as batch normalisation does); start it without torchrun"
            )
        return unused

    def _gradient(self, states: TensorDictBase) -> tuple[Tensor, bool]:
        """The gradient of the loss without dropout, in one row, and whether some parameters have none."""
        parameters = [p for p in self.loss.denoiser.parameters() if p.requires_grad]
        dropout = [m for m in self.loss.denoiser.modules() if isinstance(m, _DropoutNd) and m.training]
        spent = self.loss.network_evaluations
        for layer in dropout:
            layer.eval()
        try:
            loss = self.loss(states.clone())["loss_value"]
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
        finally:
            self.loss.network_evaluations = spent
            for layer in dropout:
                layer.train()
        rows = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        return torch.cat([g.flatten() for g in rows]), any(g is None for g in found)


class _Figures(nn.Module):
    """The loss as DistributedDataParallel sees it: plain tensors, and the parameters of the denoiser.

    The loss itself is no part of it: TorchRL registers the same parameters once more.
    """

    def __init__(self, loss: DenoiserLoss) -> None:
        super().__init__()
        self.denoiser = loss.denoiser
        self.__dict__["loss"] = loss

    def forward(self, states: TensorDictBase) -> tuple[Tensor, Tensor]:
        out = self.__dict__["loss"](states)
        return out["loss_value"], out["td_error"]
