"""A diffusion model as an implicit reward, learnt from groups of samples whose rewards differ."""

import torch
import torch.distributed as dist
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives.common import LossModule

from diffrl import keys
from diffrl.diffusion.renoising import marginal_target
from diffrl.errors import InputError
from diffrl.finetuning.methods.matching import output_distance
from diffrl.finetuning.methods.tdm import Boundary
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.updates.preferences import PREFERENCE

__all__ = ["GroupPreferenceLoss", "group_sums"]


class GroupPreferenceLoss(LossModule):
    """Group Bradley-Terry loss of a surrogate φ: samples of high advantage become likelier than under the reference.

        l_i = mean ‖(D(x_t,i) - D*_i)/c_out‖²,    z_g = (β/G) Σ_{i∈g} adv_i (l_φ,i - l_ref,i)
        L_BT = (1/β) mean_g softplus(z_g),    whose gradient is that of  mean_i σ(sg z_g(i)) adv_i l_φ,i
        L = coef · mean (j+1)/K [ σ(sg z) adv l_φ + anchor_coef ‖(D_φ - D_T)/c_out‖² ]

    D* is the exact target from boundary x_{j+1}. z is that of whole groups, all at one time with one noise: `prepare`
    computes it for a minibatch before any part of it is trained on. l_φ,i has no gradient where
    - the trust region is left: adv > 0 and ρ > 1+ε, or adv ≤ 0 and ρ < 1-ε, with ρ = exp(l_old - l_φ);
    - the whole batch has run away, mean ‖(D_φ - D_T)/c_out‖² > runaway, and the sample is already past D_T in the
      direction of its advantage.

    Sources: TDM-R1 (Luo et al., 2026), eqs. 7-9, https://arxiv.org/abs/2603.07700, and its code; the group loss:
    Reinforcing Diffusion Models by Direct Group Preference Optimization (Luo et al., 2025), eqs. 8-17,
    https://arxiv.org/abs/2510.08425.

    Args:
        surrogate: φ, trained in place.
        old: the policy before, of ρ; with a dynamic reference also ref.
        reference: ref.
        teacher: D_T of anchor and guard.
        beta: β > 0; it belongs to means over the event dims.
        clip_range: ε ≥ 0; 0 does not clip.
        anchor_coef: ≥ 0.
        runaway: of the guard; None: no guard.
        coef: what L is multiplied by: with β the gradient is that of mean_g softplus(z_g) itself.
        ranks: processes that have rows of the same groups; None: groups are whole here. Numbers of groups, times and
            noise are then those of all of them, and each has as many rows.

    Raises:
        ValueError: an argument outside its range.
    """

    out_keys = ["loss_preference", "preference", "clip_fraction", "anchor"]

    def __init__(
        self,
        surrogate: DenoisingPolicy,
        *,
        old: DenoisingPolicy,
        reference: DenoisingPolicy,
        teacher: DenoisingPolicy,
        beta: float = 1.0,
        clip_range: float = 1e-3,
        anchor_coef: float = 1e-3,
        runaway: float | None = 0.05,
        coef: float = 1.0,
        ranks: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if not (beta > 0 and coef > 0 and clip_range >= 0 and anchor_coef >= 0):
            raise InputError("beta and coef must be > 0, and clip_range and anchor_coef >= 0")
        self.surrogate, self.beta, self.clip_range = surrogate, beta, clip_range
        self.anchor_coef, self.runaway, self.coef, self.ranks = anchor_coef, runaway, coef, ranks
        for name, policy in (("old", old), ("reference", reference), ("teacher", teacher)):
            self.__dict__[name] = policy  # not a part of what is trained or saved

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries of the boundaries that the loss reads; cond where present."""
        return [PREFERENCE]

    def error(self, policy: DenoisingPolicy, b: Boundary, D: Tensor | None = None) -> Tensor:
        """L of boundaries, shape [N]."""
        D = policy.denoise(b.x_t, b.t, b.cond) if D is None else D
        target = marginal_target(b.process, b.x_s, b.s, b.t, b.noise)
        return output_distance(self.surrogate, b.t, D, target)

    @torch.no_grad()
    def prepare(self, minibatch: TensorDictBase, at_once: int) -> None:
        """Ask each network about every boundary of a minibatch [n, m] once, and write what is to be known into it.

        That is z of whole groups, l_old, D_T, and how far φ is from it on the mean.

        Args:
            minibatch: with whole groups of rows.
            at_once: most states forwarded side by side.
        """
        phi = self.surrogate
        old, ref, teacher = (self.__dict__[name] for name in ("old", "reference", "teacher"))
        compared, parts = minibatch.get(PREFERENCE), []
        for part in compared.reshape(-1).split(at_once):
            b = Boundary(part, phi)
            asked = dict.fromkeys((phi, ref, teacher, *((old,) if self.clip_range > 0 else ())))
            D = {policy: policy.denoise(b.x_t, b.t, b.cond) for policy in asked}
            l = {policy: self.error(policy, b, D[policy]) for policy in asked}
            known = {"difference": l[phi] - l[ref], "l_old": l.get(old, l[phi]), "D_T": D[teacher]}
            known["apart"] = output_distance(phi, b.t, D[phi], D[teacher])
            parts.append(TensorDict(known, part.shape))
        found = TensorDict.cat(parts).view(minibatch.shape)
        adv, group = compared.get(keys.ADVANTAGE)[..., 0], compared.get(keys.GROUP)[:, 0, 0]
        z = self.beta * group_sums(adv * found.get("difference"), group, self.ranks)
        apart = found.get("apart") if self.ranks is None else _of_all(found.get("apart"), self.ranks)
        known = {"z": z, "l_old": found.get("l_old"), "apart": apart.mean().expand_as(z)}
        compared.update({name: value.unsqueeze(-1) for name, value in known.items()})
        compared.set("D_T", found.get("D_T"))

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss of boundaries [n, m] that were prepared, with σ(z), the share without gradient, and the anchor."""
        flat = tensordict.get(PREFERENCE).reshape(-1)
        b, adv, D_T = Boundary(flat, self.surrogate), flat.get(keys.ADVANTAGE).flatten(), flat.get("D_T")
        D = self.surrogate.denoise(b.x_t, b.t, b.cond)
        l_phi = self.error(self.surrogate, b, D)
        anchor = output_distance(self.surrogate, b.t, D, D_T)
        stopped = self._outside(adv, l_phi.detach(), flat.get("l_old").flatten())
        if self.runaway is not None and float(flat.get("apart")[0]) > self.runaway:
            l_T = self.error(self.__dict__["teacher"], b, D_T)
            stopped |= torch.where(adv > 0, l_phi.detach() < l_T, l_phi.detach() > l_T)
        l_phi = torch.where(stopped, l_phi.detach(), l_phi)
        weight = (b.index + 1).to(D) / self.surrogate.num_steps
        sigma = flat.get("z").flatten().sigmoid()
        loss = self.coef * weight * (sigma * adv * l_phi + self.anchor_coef * anchor)
        return TensorDict(
            {
                "loss_preference": loss.mean(),
                "preference": sigma.mean(),
                "clip_fraction": stopped.float().mean(),
                "anchor": anchor.detach().mean(),
            }
        )

    def _outside(self, adv: Tensor, l_phi: Tensor, l_old: Tensor) -> Tensor:
        if self.clip_range == 0:
            return torch.zeros_like(adv, dtype=torch.bool)
        rho, eps = (l_old - l_phi).exp(), self.clip_range
        return torch.where(adv > 0, rho > 1 + eps, rho < 1 - eps)


def group_sums(values: Tensor, group: Tensor, ranks: dist.ProcessGroup | None = None) -> Tensor:
    """(1/G) Σ_{i∈g} v_i of each row's group, shape [n, m].

    Args:
        values: v, shape [n, m].
        group: group of each row, integers, shape [n]; all groups have G rows.
        ranks: processes that have n rows each of the same groups; None: this one has them all.
    """
    n, first = len(values), 0
    if ranks is not None:
        values, group = _of_all(values, ranks), _of_all(group, ranks)
        first = n * dist.get_rank(ranks)
    _, member, counts = group.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), values.shape[1], dtype=values.dtype, device=values.device)
    sums.index_add_(0, member, values)
    return (sums / counts[:, None])[member[first : first + n]]


def _of_all(x: Tensor, ranks: dist.ProcessGroup) -> Tensor:
    """The rows of all processes, in the order of their ranks."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(ranks))]
    dist.all_gather(parts, x.contiguous(), group=ranks)
    return torch.cat(parts)
