"""TDM-R1: a few-step generator is tuned for any reward, by way of a surrogate that learns the reward."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torchrl.objectives.common import LossModule

from diffrl import keys
from diffrl.diffusion.renoising import renoise
from diffrl.errors import InputError
from diffrl.finetuning.credit.group import GroupRelative
from diffrl.finetuning.guidance import Teacher, teacher_of
from diffrl.finetuning.methods.group_preference import GroupPreferenceLoss
from diffrl.finetuning.methods.registry import METHODS
from diffrl.finetuning.methods.tdm import FakeScoreLoss, pull, student_step
from diffrl.finetuning.piece import Setting
from diffrl.finetuning.placement.terminal import Terminal
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.recipe import Recipe
from diffrl.finetuning.rollouts.chains import Rollouts
from diffrl.finetuning.surrogate import SURROGATES, Role, Surrogate
from diffrl.finetuning.updates.preferences import REWARD_NOISE, REWARD_T, PreferenceUpdates
from diffrl.ranges import MAX_STEPS, require_int, require_number
from diffrl.training.optim import Optim

__all__ = ["LearntReward", "RewardedDistillationLoss", "slow_decay", "tdm_r1"]


class RewardedDistillationLoss(LossModule):
    """The student follows the teacher, and what the surrogate φ has learnt beyond the teacher.

        d_kl = D_T,c(x_t) - D_ξ(x_t),    d_cfg = (w_T - 1)(D_T,c - D_T,∅)(x_t),    d_rl = D_φ(x_t') - D_T,c(x_t')
        L = kl_weight ℓ(d_kl, c_1) + w ℓ(d_cfg, c_1) + reward_weight ℓ(d_rl, c_2),    ℓ(d, c) = ‖D_θ - sg(D_θ + d)‖²/c

    c_1 = mean |D_θ - D_T| with guidance, c_2 = mean |D_θ - D_φ|; x_t and x_t' are the boundary with two noises. From
    step `truncated` on there is no reward: L = w (kl_weight ℓ(d_kl, c_1) + ℓ(d_cfg, c_1)). Nothing but D_θ(x_k)
    has a gradient. Without guidance and with x_t' = x_t, d_kl + d_rl = D_φ - D_ξ: the distillation of φ.

    Source: TDM-R1 (Luo et al., 2026), eqs. 10-11, https://arxiv.org/abs/2603.07700, and its code.

    Args:
        student: the policy, trained in place.
        fake: D_ξ.
        teacher: D_T with its guidance w_T.
        surrogate: D_φ with its own guidance.
        tdm_weight: w ∈ [0, 1].
        kl_weight: ≥ 0.
        reward_weight: ≥ 0; None: 1 - w.
        truncated: first step without a reward; None: all steps have it.

    Raises:
        ValueError: an argument outside its range.
    """

    out_keys = ["loss_policy", "kl_direction", "reward_direction"]

    def __init__(
        self,
        student: DenoisingPolicy,
        *,
        fake: DenoisingPolicy,
        teacher: Teacher,
        surrogate: Teacher,
        tdm_weight: float = 0.3,
        kl_weight: float = 1.0,
        reward_weight: float | None = None,
        truncated: int | None = None,
    ) -> None:
        super().__init__()
        if not (0 <= tdm_weight <= 1 and kl_weight >= 0 and (reward_weight is None or reward_weight >= 0)):
            raise InputError("tdm_weight lies in [0, 1], and kl_weight and reward_weight are >= 0")
        self.student, self.tdm_weight, self.kl_weight = student, tdm_weight, kl_weight
        self.reward_weight = 1 - tdm_weight if reward_weight is None else reward_weight
        self.truncated = MAX_STEPS if truncated is None else truncated
        for name, other in (("fake", fake), ("teacher", teacher), ("surrogate", surrogate)):
            self.__dict__[name] = other

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries of the boundaries that the loss reads; cond where present."""
        return [keys.X_T, keys.INDEX, (keys.NEXT, keys.T), keys.RENOISE_T, keys.NOISE, REWARD_T, REWARD_NOISE]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss of boundaries [N] or [n, m], with the root mean squares of d_kl and d_rl."""
        teacher, surrogate = self.__dict__["teacher"], self.__dict__["surrogate"]
        D_x, b = student_step(self.student, tensordict)
        flat = tensordict.reshape(-1)
        t, noise = flat.get(REWARD_T).flatten().double(), flat.get(REWARD_NOISE).to(b.x_s)
        with torch.no_grad():
            D_c = teacher.conditional(b.x_t, b.t, b.cond)
            d_kl = D_c - self.__dict__["fake"].denoise(b.x_t, b.t, b.cond)
            w_T = teacher.guidance_scale
            d_cfg = (
                (w_T - 1) * teacher.emphasis(D_c, b.x_t, b.t, b.cond) if w_T > 1 else torch.zeros_like(D_c)
            )
            x_r = renoise(b.process, b.x_s, b.s, t, noise)
            D_phi = surrogate(x_r, t, b.cond)
            d_rl = D_phi - teacher.conditional(x_r, t, b.cond)
        kl, cfg = pull(D_x, d_kl, D_c + d_cfg), pull(D_x, d_cfg, D_c + d_cfg)
        rewarded = self.kl_weight * kl + self.tdm_weight * cfg + self.reward_weight * pull(D_x, d_rl, D_phi)
        plain = self.tdm_weight * (self.kl_weight * kl + cfg)
        loss = torch.where(b.index.to(D_x.device) < self.truncated, rewarded, plain)
        return TensorDict(
            {
                "loss_policy": loss.mean(),
                "kl_direction": d_kl.square().mean().sqrt(),
                "reward_direction": d_rl.square().mean().sqrt(),
            }
        )


def slow_decay(n: int) -> float:
    """d_n = min(0.3, 0.001 + 0.001 n) of the surrogate's slow copy after its n-th step, n counted from 0."""
    return min(0.3, 0.001 + 0.001 * n)


@SURROGATES.register("learnt_reward")
@dataclass(frozen=True)
class LearntReward(Surrogate):
    """A surrogate learns the reward from groups; the student follows it and the teacher: TDM-R1.

    See `GroupPreferenceLoss` and `RewardedDistillationLoss`.

    Args:
        reference: of z: "ema", the surrogate's slow copy (the paper), or "frozen", the teacher (the released code).
        beta: β.
        clip_range: ε of the trust region.
        anchor_coef: of the surrogate to the teacher.
        runaway: guard of the surrogate; None: none.
        surrogate_lr: learning rate of the surrogate.
        surrogate_guidance: of D_φ in the student's loss; 1 is without.
        fake_target: of the fake score, see `FakeScoreLoss`.
        fake_anchor_coef: of the fake score to the teacher.
        fake_lr: learning rate of the fake score.
        guidance_scale: w_T; 1 is without.
        tdm_weight: w.
        kl_weight: of d_kl.
        reward_weight: of d_rl; None: 1 - w.
        truncated: first step without a reward; None: all have it.
    """

    reads: ClassVar[Literal["preferences"]] = "preferences"
    whole_groups: ClassVar[bool] = True
    reference: Literal["ema", "frozen"] = "ema"
    beta: float = 1.0
    clip_range: float = 1e-3
    anchor_coef: float = 1e-3
    runaway: float | None = 0.05
    surrogate_lr: float = 3e-4
    surrogate_guidance: float = 1.0
    fake_target: Literal["dsm", "x0"] = "dsm"
    fake_anchor_coef: float = 0.02
    fake_lr: float = 3e-4
    guidance_scale: float = 1.0
    tdm_weight: float = 0.3
    kl_weight: float = 1.0
    reward_weight: float | None = None
    truncated: int | None = None

    def __post_init__(self) -> None:
        if self.reference not in ("ema", "frozen"):
            raise InputError(f"surrogate.reference is {self.reference!r}: give 'ema' or 'frozen'")
        for name in ("beta", "surrogate_lr", "fake_lr"):
            require_number(f"surrogate.{name}", getattr(self, name), 0, ends="()")
        for name in ("clip_range", "anchor_coef", "fake_anchor_coef", "kl_weight"):
            require_number(f"surrogate.{name}", getattr(self, name), 0)
        for name in ("surrogate_guidance", "guidance_scale"):
            require_number(f"surrogate.{name}", getattr(self, name), 1)
        require_number("surrogate.tdm_weight", self.tdm_weight, 0, 1)
        for name in ("runaway", "reward_weight"):
            if getattr(self, name) is not None:
                require_number(f"surrogate.{name}", getattr(self, name), 0)
        if self.truncated is not None:
            require_int("surrogate.truncated", self.truncated, 0)

    def loss(self, setting: Setting) -> RewardedDistillationLoss:
        """That of the student."""
        teacher = setting.reference("teacher")
        return RewardedDistillationLoss(
            setting.policy,
            fake=setting.twin("fake"),
            teacher=teacher_of(setting, teacher, self.guidance_scale),
            surrogate=teacher_of(setting, setting.twin("surrogate"), self.surrogate_guidance),
            tdm_weight=self.tdm_weight,
            kl_weight=self.kl_weight,
            reward_weight=self.reward_weight,
            truncated=self.truncated,
        )

    def roles(self, setting: Setting) -> dict[str, Role]:
        """Fake score, surrogate, student: the order of the released code."""
        teacher, fake = setting.reference("teacher"), setting.twin("fake")
        surrogate, slow = setting.twin("surrogate"), setting.twin("slow")
        preference = GroupPreferenceLoss(
            surrogate,
            old=slow,
            reference=slow if self.reference == "ema" else teacher,
            teacher=teacher,
            beta=self.beta,
            clip_range=self.clip_range,
            anchor_coef=self.anchor_coef,
            runaway=self.runaway,
        )
        fake_loss = FakeScoreLoss(
            fake, Teacher(teacher), fake_target=self.fake_target, anchor_coef=self.fake_anchor_coef
        )

        @torch.no_grad()
        def follow(steps: int) -> None:
            d = slow_decay(steps - 1)
            for p, q in zip(slow.denoiser.parameters(), surrogate.denoiser.parameters(), strict=True):
                p.lerp_(q, 1 - d)

        return {
            "fake": Role(fake.denoiser, fake_loss, self._optim(self.fake_lr, 0.0)),
            "surrogate": Role(
                surrogate.denoiser,
                preference,
                self._optim(self.surrogate_lr, 0.9),
                prepare=preference.prepare,
                after_step=follow,
            ),
            "policy": Role(setting.policy.denoiser, self.loss(setting)),
        }

    def _optim(self, lr: float, beta1: float) -> Optim:
        return Optim(lr, betas=(beta1, 0.999), weight_decay=1e-4, warmup_steps=0, decay="none")


@METHODS.register("tdm_r1", label="TDM-R1")
def tdm_r1(**pieces: Any) -> Recipe:
    """TDM-R1: a generator of few deterministic steps is tuned for any reward, in groups of 24 for each prompt.

    The numbers are those of the released code, whose reference is frozen; the default here is the paper's. The
    student's learning rate is the run's (there 7.5e-5).

    Noise is added on the "reverse" interval, as released, where a fake score that is not told the step is biased. On
    mixtures samples left the data there and stayed with "trajectory"; on digits it was the other way round.

    Source: TDM-R1 (Luo et al., 2026), https://arxiv.org/abs/2603.07700, and its code.

    Args:
        **pieces: of `Recipe`, in place of the published ones.
    """
    published = {
        "rollouts": Rollouts(trajectories=48 * 24, group_size=24),
        "placement": Terminal(),
        "credit": GroupRelative(std="global"),
        "updates": PreferenceUpdates(),
        "surrogate": LearntReward(),
    }
    return Recipe(**{**published, **pieces})
