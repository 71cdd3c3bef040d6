"""A learned critic V(x_t, t) of denoising states, and the advantages over it: TD(λ) over denoising steps."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from diffrl import keys
from diffrl.diffusion.networks.embeddings import FourierFeatures, LabelEmbedding
from diffrl.diffusion.predictions import scalings
from diffrl.diffusion.schedules.base import Schedule
from diffrl.errors import InputError
from diffrl.finetuning.credit.base import Credit
from diffrl.finetuning.credit.registry import CREDITS
from diffrl.finetuning.piece import Setting
from diffrl.ranges import MAX_REPEATS, require_int, require_number
from diffrl.rl.advantages import critic_advantages, spread

__all__ = ["Critic", "LearnedCritic"]


class Critic(nn.Module):
    """V(x_t, t, c), one number a state: two hidden layers of SiLU on the preconditioned state.

        V = w SiLU(W₂ SiLU(W₁ [c_in x, φ(c_noise)] + E[c]))

    w is 0 at the start, so that V is.

    Args:
        event_shape: *E of a state.
        process: its noise schedule.
        hidden: units of a layer.
        num_labels: conditions 0..C-1; 0 for none.
        sigma_data: standard deviation of data, for c_in.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        process: Schedule,
        *,
        hidden: int,
        num_labels: int,
        sigma_data: float,
    ) -> None:
        super().__init__()
        self.process, self.sigma_data = process, sigma_data
        self.noise_embedding = FourierFeatures(1, 16, 4.0)
        self.label_embedding = LabelEmbedding(num_labels, hidden) if num_labels else None
        self.first = nn.Linear(math.prod(event_shape) + 16, hidden)
        last = nn.Linear(hidden, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.rest = nn.Sequential(nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), last)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """V of states [N, *E] at times [N] with labels [N]: shape [N]."""
        c_in = scalings(self.process, t.double(), "edm", self.sigma_data).c_in.to(x_t)
        c_noise = self.process.c_noise(t.double()).to(x_t)
        inputs = [c_in[:, None] * x_t.flatten(1), self.noise_embedding(c_noise[:, None])]
        h = self.first(torch.cat(inputs, 1))
        if self.label_embedding is not None:
            h = h + self.label_embedding(cond)
        return self.rest(h)[:, 0]


@CREDITS.register("critic")
@dataclass
class LearnedCritic(Credit):
    """Advantages over a critic that is learned beside the policy, by TD(λ) over denoising steps.

        G_i = r_i + γ [(1-λ) V(x_{i+1}) + λ G_{i+1}],    adv_i = (G_i - V(x_i))/(std + 1e-6)

    λ = 1 is reward-to-go with V as baseline, λ = 0 the one-step error. Rewards are first shifted and scaled by the mean
    and standard deviation of the returns of the first rollout that has any spread; std is of the rollout's
    advantages. The critic learns from a rollout only after it has judged it.

    Source: High-Dimensional Continuous Control Using Generalized Advantage Estimation (Schulman et al., 2016), eq. 16,
    https://arxiv.org/abs/1506.02438; over denoising steps it is ours.

    Args:
        lmbda: λ ∈ [0, 1].
        gamma: γ ∈ [0, 1].
        lr: of its Adam.
        passes: gradient steps on the whole rollout.
        hidden: units of a layer.

    Raises:
        ValueError: an argument outside its range; when called, conditions that are no integers.
    """

    lmbda: float = 0.9
    gamma: float = 1.0
    lr: float = 3e-3
    passes: int = 16
    hidden: int = 64
    critic: Critic | None = field(init=False, default=None, repr=False, compare=False)
    raw_std: float = field(init=False, default=math.nan, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_number("credit.lmbda", self.lmbda, 0, 1)
        require_number("credit.gamma", self.gamma, 0, 1)
        require_number("credit.lr", self.lr, 0, ends="()")
        require_int("credit.passes", self.passes, 1, MAX_REPEATS)
        require_int("credit.hidden", self.hidden)
        self._scale = (0.0, 0.0)  # mean and std of the returns of the first rollout that has any spread

    def prepare(self, setting: Setting) -> None:
        """Build the critic."""
        policy = setting.policy
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setting.seed)
            critic = Critic(
                setting.event_shape,
                policy.process,
                hidden=self.hidden,
                num_labels=setting.num_labels,
                sigma_data=float(getattr(policy.denoiser, "sigma_data", 1.0)),
            )
        self.critic = critic.to(setting.device)
        self._optimiser = torch.optim.Adam(self.critic.parameters(), lr=self.lr)

    def __call__(self, rollout: TensorDictBase, reward: Tensor) -> Tensor:
        """Advantages of the rollout, by the critic as it is; then the critic learns."""
        if self.critic is None:
            raise RuntimeError("the critic has no network yet: call prepare first")
        B, K = rollout.shape
        R = reward.double().sum((1, 2))
        if self._scale[1] == 0 and spread(R) > 0:  # equal rewards have no scale: wait
            self._scale = float(R.mean()), spread(R)
        m, s = self._scale if self._scale[1] > 0 else (float(R.mean()), 1.0)
        r = reward.double()  # a large mean takes no digits away
        r[:, -1] -= m
        r = (r / s).to(reward)
        states = rollout.select(keys.X_T, keys.T, keys.COND, strict=False).flatten()
        cond = states.get(keys.COND, None)
        if cond is not None and (cond.ndim != 1 or cond.is_floating_point()):
            raise InputError(f"the critic takes integer conditions, not {cond.dtype} {list(cond.shape[1:])}")
        x_t, t = states.get(keys.X_T).float(), states.get(keys.T)[:, 0]
        labels = cond if self.critic.label_embedding is not None else None
        with torch.no_grad():
            V = self.critic(x_t, t, labels).view(B, K, 1)
        adv, G = critic_advantages(r, V, lmbda=self.lmbda, gamma=self.gamma)
        for _ in range(self.passes):
            loss = (self.critic(x_t, t, labels) - G.flatten()).square().mean()
            loss.backward()
            self._optimiser.step()
            self._optimiser.zero_grad()
        std = float(adv.std(correction=0))
        self.raw_std = std * s
        return adv / (std + 1e-6)

    def state_dict(self) -> dict[str, Any]:
        """Critic, optimiser, scale of rewards."""
        assert self.critic is not None
        return {
            "critic": self.critic.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "scale": list(self._scale),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        assert self.critic is not None
        self.critic.load_state_dict(state["critic"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._scale = tuple(state["scale"])
