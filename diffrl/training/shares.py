"""The gradient of a batch that several processes share: each takes some rows, and all get that of the whole."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DistributedDataParallel

from diffrl import keys
from diffrl.errors import InputError
from diffrl.objectives.denoiser_loss import DenoiserLoss
from diffrl.training.arithmetic import Arithmetic
from diffrl.training.distributed import Ranks, bounds_of_units
from diffrl.training.optim import Optimiser
from diffrl.training.sharding import Sharding

__all__ = ["Gradients"]

UNITS = 6  # rows, or groups, that are enough to see whether a loss takes a batch apart
APART = 1e-2  # of a gradient; what batches in float32 differ by is far less, what couples rows far more


class Gradients:
    """Leaves the gradient of a batch's loss in the parameters, by one process or several, each in one part or more.

        ∇L(batch) = Σ_r Σ_p w_rp ∇L(part p of the rows of r),    w_rp = rows of the part / rows

    DistributedDataParallel, and FSDP2, take it as the mean over N processes of N times what each has. It holds of a
    loss that is the mean of what rows, or groups of rows, come to by themselves; others are found out, see `check`.

    Args:
        loss: of the denoiser that is trained.
        optimiser: what descends it.
        arithmetic: in how many parts a process takes its rows.
        ranks: the processes.
        factor: of the loss in what is descended.
    """

    def __init__(
        self,
        loss: DenoiserLoss,
        optimiser: Optimiser,
        arithmetic: Arithmetic,
        ranks: Ranks,
        *,
        factor: float = 1.0,
    ) -> None:
        self.loss, self.optimiser, self.arithmetic, self.ranks = loss, optimiser, arithmetic, ranks
        self.factor = factor
        self._shared: DistributedDataParallel | None = None
        self.sharding: Sharding | None = None
        """What the processes cut among them; else each has all of it, and DistributedDataParallel sums."""

    def __call__(
        self,
        states: TensorDict,
        around: Callable[[], AbstractContextManager[Any]],
        *,
        learning: bool = False,
    ) -> dict[str, float]:
        """The batch's ``loss_value`` and ``td_error``, root mean square over the parts.

        Args:
            states: the whole batch [B, K], the same in every process.
            around: what the loss of a part is computed in.
            learning: whether the losses of all states are wanted in them, under `diffrl.keys.LOSS`.

        Raises:
            ValueError: see `check`, `Ranks.share` and `Arithmetic.parts`.
            RankLost: another process ended.
        """
        several = self.ranks.size > 1
        if several and self._shared is None and self.sharding is None:
            self._shared = self.ranks.parallel(_Figures(self.loss), unused=self.check(states))
        share, before = self.ranks.share(states), self.loss.network_evaluations
        parts = self.arithmetic.parts(states[share.rows] if several else states)
        loss, square = 0.0, 0.0
        with nullcontext() if self.sharding is None else self.sharding.bootstrapping():
            for part in parts:
                weight = len(part) / len(states)
                with self._summing(last=part is parts[-1]):
                    with around():
                        loss_value, td_error = self._figures(part)
                    self.optimiser.backward(loss_value, self.ranks.size * weight * self.factor)
                loss += weight * loss_value.item()
                square += weight * td_error.item() ** 2
        own = self.loss.network_evaluations - before
        loss, square, evaluations = self.ranks.sums(loss, square, own)
        self.loss.network_evaluations = before + round(evaluations)
        if learning and (several or len(parts) > 1):
            found = torch.cat([part[keys.LOSS] for part in parts])
            states[keys.LOSS] = self.ranks.whole(found, share.rows, len(states))
        return {"loss_value": loss, "td_error": square**0.5}

    def _figures(self, part: TensorDict) -> tuple[Tensor, Tensor]:
        """Loss and TD error of a part."""
        if self._shared is not None:
            found: tuple[Tensor, Tensor] = self._shared(part)
            return found
        out = self.loss(part)
        return out["loss_value"], out["td_error"]

    @contextmanager
    def _summing(self, *, last: bool) -> Iterator[None]:
        """Where a part's gradient is taken: with the last one the processes sum theirs."""
        if self.sharding is not None:
            self.sharding.syncing(last)
        waiting = nullcontext() if self._shared is None or last else self._shared.no_sync()
        with self.ranks.answered(), waiting:
            yield

    def check(self, states: TensorDict) -> bool:
        """Refuse a loss, or a network, in which the rows of a batch do not stand for themselves.

        A few rows are asked for their gradient as a whole and in two parts. Each process does so by itself.

        Args:
            states: a batch [B, K].

        Returns:
            Whether there are parameters that the loss does not reach.

        Raises:
            ValueError: the gradients differ, or the batch cannot be shared, or a share not be taken in parts.
        """
        for rank in range(self.ranks.size):  # all refuse what one cannot do
            self.arithmetic.parts(states[Ranks(rank, self.ranks.size).share(states).rows])
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
