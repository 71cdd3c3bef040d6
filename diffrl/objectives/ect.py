"""Easy Consistency Tuning (ECT): a trained denoiser becomes a consistency model, from Monte Carlo towards TD(0)."""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torch import Tensor

from diffrl import keys
from diffrl.diffusion.denoisers import Denoiser
from diffrl.errors import InputError
from diffrl.objectives.annealing import Ranges
from diffrl.objectives.chain_value import value_module
from diffrl.objectives.denoiser_loss import DenoiserLoss, rows
from diffrl.objectives.ect_pairs import ECTPairs
from diffrl.objectives.place import Place
from diffrl.objectives.registry import OBJECTIVES
from diffrl.ranges import require_number
from diffrl.shapes import expand_like

__all__ = ["ECTLoss"]

ECT_WEIGHTS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "gap": lambda t, r, sigma_data: 1 / (t - r),
    "snr": lambda t, r, sigma_data: (t**2 + sigma_data**2) / (t * sigma_data) ** 2,
}
"""w(t, r, σd): "gap" is the version for CIFAR-10, "snr" that for ImageNet, which has q = 4 too."""


@OBJECTIVES.register(
    "ect",
    also=ECTPairs,
    label="ECT",
    place=Place("to_clean", "pairs", "shared", "one_step", "own", "forward", begins="end"),
)
class ECTLoss(DenoiserLoss):
    """Consistency training from the network's own prediction, to be fed with `ECTPairs`.

        L = w(t, r) (√(‖D(x_t) - y‖² + c²) - c),    y = sg D(x_r),    y = x0 where r = 0
        y stands for (1-s) x0 + s y

    The norm is that of the whole event, as published. Both passes of the network have the same dropout. With the stage
    of the pairs r rises from 0, plain denoising with another metric, towards t; there is no target network. While a
    batch has r > 0 somewhere, and s > 0, all of it is evaluated twice, as published. The fixed point is a consistency
    function as r → t: on the two ends of one trajectory of the probability flow it has L = 0 at any gap; on the pairs
    that training draws, which share a noise but no trajectory, D(x_t) - y has mean 0 given x_t up to order (t-r)².

    It is made to start from a trained denoiser, with RAdam: ``init=runs/... optim.name=radam optim.lr=1e-4``.

    Source: Consistency Models Made Easy (Geng et al., 2024), https://arxiv.org/abs/2406.14548, and its released code.

    Args:
        denoiser: D, on an EDM process, in any form; trained in place.
        c: ≥ 0, of the pseudo-Huber metric; 0 is the plain norm, as the released command has it.
        ect_weight: w, "gap" or "snr".
        bootstrap_share: s ∈ [0, 1].
        anneal: options that change along the training, as in `ValueLoss`: bootstrap_share.

    Raises:
        ValueError: an argument outside its range.
    """

    fed_with = "diffrl.objectives.ECTPairs"
    out_keys = ["loss_value", "td_error"]
    annealable: ClassVar[Ranges] = {"bootstrap_share": (0, 1)}
    bootstrap = "own"

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        c: float = 0.0,
        ect_weight: str = "gap",
        bootstrap_share: float = 1.0,
        anneal: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        require_number("c", c, 0)
        require_number("bootstrap_share", bootstrap_share, 0, 1)
        if ect_weight not in ECT_WEIGHTS:
            raise InputError(f"ect_weight is {ect_weight!r}: give one of {', '.join(ECT_WEIGHTS)}")
        super().__init__(value_module(denoiser), target=False, anneal=anneal)
        self.c, self.ect_weight, self.bootstrap_share = c, ect_weight, bootstrap_share
        self.set_progress(0, 1)

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries of the pairs that the loss reads; cond is read where present."""
        return [keys.X_T, keys.T, keys.X0, keys.VALID, (keys.NEXT, keys.X_T), (keys.NEXT, keys.T)]

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss of a batch of pairs [B, 1]; as each pair stands for itself, another batch size means the same.

        Args:
            tensordict: what `ECTPairs` or `sample_ect_pairs` gives.

        Returns:
            TensorDict with the scalars ``loss_value`` and ``td_error``, the root mean square of D(x_t) - y.

        Raises:
            KeyError: an entry is missing.
            ValueError: the batch is empty; a network that takes labels, without any.
        """
        with self._telling_what_is_missing(tensordict):
            return self._loss(rows(tensordict))

    def _loss(self, pairs: TensorDictBase) -> TensorDictBase:
        x_t, t, x0, _, _, r = (pairs[key] for key in self.in_keys)
        cond = pairs.get(keys.COND, None)
        self._first_look(x0, cond)
        self._count_drawing(pairs)
        y = self._target(pairs)  # first: see there
        u = self.value_network.module.denoise(x_t, t, cond) - y
        self.network_evaluations += t.numel()
        norm = torch.linalg.vector_norm(u.flatten(2), dim=-1, keepdim=True)  # its gradient at 0 is 0
        d = norm if self.c == 0 else (norm.square() + self.c**2).sqrt() - self.c
        loss = ECT_WEIGHTS[self.ect_weight](t, r, self.denoiser.sigma_data) * d
        return TensorDict({"loss_value": loss.mean(), "td_error": u.detach().square().mean().sqrt()})

    def target(self, states: TensorDictBase) -> Tensor:
        """What D(x_t) is pulled to, y, without gradient: [N, *E] of pairs [*b, 1]."""
        return self._target(rows(states)).flatten(0, 1)

    def _target(self, pairs: TensorDictBase) -> Tensor:
        """Y = (1-s) x0 + s D(x_r), and x0 where r = 0."""
        x_t, t, x0, valid, x_r, r = (pairs[key] for key in self.in_keys)
        s, denoise = self.bootstrap_share, self.value_network.module.denoise
        if s == 0 or not bool(valid.any()):
            return x0
        # the pass that trains begins where this one began, so it draws the same dropout
        with torch.no_grad(), torch.random.fork_rng([t.device] if t.is_cuda else []):
            # no network is asked about noise 0
            at = torch.where(expand_like(valid, x0), x_r, x_t), torch.where(valid, r, t)
            D_r = denoise(*at, pairs.get(keys.COND, None))
        self.network_evaluations += t.numel()
        return torch.where(expand_like(valid, x0), D_r if s == 1 else torch.lerp(x0, D_r, s), x0)
