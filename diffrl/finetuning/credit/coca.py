"""One return shared out over steps by how much nearer each brings the clean estimate to the sample: CoCA."""

from dataclasses import dataclass

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.nn.functional import cosine_similarity

from diffrl import keys
from diffrl.errors import InputError
from diffrl.finetuning.credit.registry import CREDITS
from diffrl.finetuning.credit.standardised import Standardised
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.ranges import require_int, require_number

__all__ = ["CosineGains", "cosine_shares"]


def cosine_shares(x0_hat: Tensor, x_K: Tensor, *, window: int = 1) -> Tensor:
    """The part that each step has in bringing the clean estimate to the sample.

        w_i = (c̄_{⌊i/W⌋+1} - c̄_{⌊i/W⌋})/(W Σ),    c_i = cos(x̂_i, x_K), x̂_K = x_K,    Σ_i w_i = 1
        c̄_0 = c_0, c̄_m the mean of the m-th W of c_1 .. c_K, Σ = c̄_{K/W} - c_0

    With W = 1 it is w_i = (c_{i+1} - c_i)/(1 - c_0). A step that leads away has w_i < 0. Where no estimate differs from
    the sample, Σ = 0, every w_i is 1/K.

    Args:
        x0_hat: x̂, clean estimates, shape [B, K, *E].
        x_K: samples, shape [B, *E].
        window: W, a divisor of K.

    Returns:
        w, float32 [B, K].

    Raises:
        ValueError: a window that does not divide the steps, of which rollouts may have others than the policy.
    """
    K = x0_hat.shape[1]
    if K % window:
        raise InputError(
            f"credit.window is {window}, but these chains have {K} steps: give a divisor of that"
        )
    x = torch.cat([x0_hat, x_K[:, None]], 1).detach().flatten(2).double()
    c = cosine_similarity(x, x[:, -1:], dim=2)
    c_bar = torch.cat([c[:, :1], c[:, 1:].unflatten(1, (K // window, window)).mean(2)], 1)
    gain = c_bar.diff(dim=1)
    total = gain.sum(1, keepdim=True)
    w = torch.where(total.abs() > 1e-12, gain / total, window / K) / window
    return w.repeat_interleave(window, 1).float()


@CREDITS.register("coca")
@dataclass
class CosineGains(Standardised):
    """The standardised return times the part of it that is still to be earned, then standardised over all steps.

        Ã = clip((R - mean)/(std + 1e-6)),    A_i = Ã (α + (1-α) Σ_{j≥i} w_j),    w of `cosine_shares`
        adv_i = (A_i - mean)/(std + 1e-6),    mean and std over all steps of the rollout

    It asks for no reward but the sample's. The return is standardised *before* it is shared out, so that equal returns
    give no advantage however their chains went; that is why it is a credit, and not a placement.

    Source: Step-level Reward for Free in RL-based T2I Diffusion Model Fine-tuning (Liao et al., 2025) and its code,
    https://arxiv.org/abs/2505.19196. For the second standardisation the code keeps statistics by prompt too; ours are
    of the rollout.

    Args:
        buffer: as of `Standardised`; so are min_count and per.
        alpha: α ∈ [0, 1], the part that all steps have alike; published 0.
        window: W, steps that share alike; published 5 of 50 steps.
        clip: bound of Ã; published 5.

    Raises:
        ValueError: an argument outside its range; when called, conditions that are no integers.
    """

    alpha: float = 0.0
    window: int = 1
    clip: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("credit.alpha", self.alpha, 0, 1)
        require_int("credit.window", self.window)
        require_number("credit.clip", self.clip, 0, ends="()")

    def __call__(self, rollout: TensorDictBase, reward: Tensor) -> Tensor:
        """Advantages, each step's own."""
        A_all = super().__call__(rollout, reward).clamp(-self.clip, self.clip)[..., 0]
        w = cosine_shares(
            rollout.get(keys.X0_HAT), rollout.get((keys.NEXT, keys.X_T))[:, -1], window=self.window
        )
        to_go = w.flip(1).cumsum(1).flip(1)
        A = (A_all * (self.alpha + (1 - self.alpha) * to_go)).double()
        std = float(A.std(correction=0))
        self.raw_std *= std / (float(A_all.std(correction=0)) + 1e-6)
        return ((A - A.mean()) / (std + 1e-6)).to(reward)[..., None]

    def refuses(self, policy: DenoisingPolicy) -> str | None:
        """Refuse a window that does not divide the steps."""
        if policy.num_steps % self.window:
            return f"credit.window is {self.window}: give a divisor of the policy's {policy.num_steps} steps"
        return None

    def centred_over(self, *, one_condition: bool) -> None:
        """Steps are centred together, none by itself."""
