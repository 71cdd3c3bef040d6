"""TDM: a many-step denoiser becomes a generator of few deterministic steps, without data and without a reward."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives.common import LossModule

from diffrl import keys
from diffrl.diffusion.renoising import marginal_target, renoise, target_noise
from diffrl.errors import InputError
from diffrl.finetuning.credit.standardised import Standardised
from diffrl.finetuning.guidance import Teacher, teacher_of
from diffrl.finetuning.methods.matching import output_scalings
from diffrl.finetuning.methods.registry import METHODS
from diffrl.finetuning.piece import Setting
from diffrl.finetuning.placement.unpaid import Unpaid
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.recipe import Recipe
from diffrl.finetuning.rollouts.chains import Rollouts
from diffrl.finetuning.surrogate import SURROGATES, Role, Surrogate
from diffrl.finetuning.updates.boundaries import BoundaryUpdates
from diffrl.ranges import require_int, require_number
from diffrl.shapes import column, expand_like
from diffrl.training.optim import Optim

__all__ = ["DistillationLoss", "FakeScoreLoss", "TrajectoryMatching", "pull", "tdm"]

NO_SMALLER = 1e-6  # of a normaliser


class FakeScoreLoss(LossModule):
    """Teaches D_ξ the clean estimates of what the student makes: its score is that of the student's own samples.

        "dsm":  L = mean w ‖(D_ξ(x_t) - D*)/c_out‖²,   D* and w of `diffrl.diffusion.renoising`, from x_{k+1}
        "x0":   L = mean ‖(D_ξ(x_t) - D_θ(x_k))/c_out‖²
        plus anchor_coef · mean ‖(D_ξ(x_t) - D_T(x_t))/c_out‖²

    with squared norms that are means over the event dims. "dsm" has the right mean at every boundary; "x0", as the
    authors train, is biased unless x_{k+1} is clean, and has much less noise.

    Sources: Learning Few-Step Diffusion Models by Trajectory Distribution Matching (Luo et al., 2025), eq. 7,
    https://arxiv.org/abs/2503.06674; the anchor is that of the code of TDM-R1 (Luo et al., 2026),
    https://arxiv.org/abs/2603.07700.

    Args:
        fake: D_ξ, trained in place.
        teacher: D_T, for the anchor.
        fake_target: "dsm" or "x0".
        anchor_coef: ≥ 0.

    Raises:
        ValueError: an argument outside its range.
    """

    out_keys = ["loss_fake"]

    def __init__(
        self,
        fake: DenoisingPolicy,
        teacher: Teacher | None = None,
        *,
        fake_target: Literal["dsm", "x0"] = "dsm",
        anchor_coef: float = 0.0,
    ) -> None:
        super().__init__()
        if fake_target not in ("dsm", "x0"):
            raise InputError(f"fake_target is {fake_target!r}: give 'dsm' or 'x0'")
        if not anchor_coef >= 0:
            raise InputError(f"anchor_coef is {anchor_coef}: it is a weight >= 0")
        if anchor_coef > 0 and teacher is None:
            raise InputError("anchor_coef needs a teacher to hold on to")
        self.fake, self.fake_target, self.anchor_coef = fake, fake_target, anchor_coef
        self.__dict__["teacher"] = teacher  # not a part of what is trained or saved

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries of the boundaries that the loss reads; cond where present."""
        return [keys.X0_HAT, (keys.NEXT, keys.X_T), (keys.NEXT, keys.T), keys.RENOISE_T, keys.NOISE]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss of boundaries [N] or [n, m]."""
        b = Boundary(tensordict, self.fake)
        c_skip, c_out, _ = output_scalings(self.fake, b.t)
        if self.fake_target == "dsm":
            target = marginal_target(b.process, b.x_s, b.s, b.t, b.noise)
            weight = target_noise(b.process, b.s, b.t, c_skip) / c_out**2
        else:
            target, weight = b.x0_hat, 1 / c_out**2
        D = self.fake.denoise(b.x_t, b.t, b.cond)
        loss = column(weight, D) * (D - target).square()
        if self.anchor_coef > 0:
            D_T = self.__dict__["teacher"].conditional(b.x_t, b.t, b.cond)
            loss = loss + self.anchor_coef * column(1 / c_out**2, D) * (D - D_T).square()
        return TensorDict({"loss_fake": loss.mean()})


class DistillationLoss(LossModule):
    """Moves the student's clean estimates from where its samples are too likely to where the teacher's are likelier.

        d = D_T(x_t) - D_ξ(x_t),    c = mean |D_θ(x_k) - D_T(x_t)|
        L = mean ‖D_θ(x_k) - sg(D_θ(x_k) + d)‖²/c

    Its gradient is that of the reverse KL from the law of x_t to the teacher's, by one step of the student: x_k is
    given, and d and c have no gradient. D_T is guided.

    Source: Learning Few-Step Diffusion Models by Trajectory Distribution Matching (Luo et al., 2025), eqs. 5-6 and its
    code, https://arxiv.org/abs/2503.06674.

    Args:
        student: the policy, trained in place.
        fake: D_ξ.
        teacher: D_T with its guidance.
        huber: h ≥ 0 of the pseudo-Huber form √(‖·‖² + h²) - h of each element, 1e-3 in the code; 0: squares.
    """

    out_keys = ["loss_policy", "direction"]

    def __init__(
        self, student: DenoisingPolicy, fake: DenoisingPolicy, teacher: Teacher, *, huber: float = 0.0
    ) -> None:
        super().__init__()
        if not huber >= 0:
            raise InputError(f"huber is {huber}: it is a width >= 0")
        self.student, self.huber = student, huber
        self.__dict__["fake"], self.__dict__["teacher"] = fake, teacher

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries of the boundaries that the loss reads; cond where present."""
        return [keys.X_T, keys.INDEX, (keys.NEXT, keys.T), keys.RENOISE_T, keys.NOISE]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss of boundaries [N] or [n, m], and the root mean square of d."""
        D_x, b = student_step(self.student, tensordict)
        with torch.no_grad():
            D_T = self.__dict__["teacher"](b.x_t, b.t, b.cond)
            d = D_T - self.__dict__["fake"].denoise(b.x_t, b.t, b.cond)
        loss = pull(D_x, d, D_T, self.huber).mean()
        return TensorDict({"loss_policy": loss, "direction": d.square().mean().sqrt()})


class Boundary:
    """A batch of boundaries, flat, with what is added to them.

    Args:
        tensordict: [N] or [n, m], see `BoundaryUpdates`.
        policy: whose process it is.
        x_s: the states reached; those of the TensorDict if None.
    """

    def __init__(
        self, tensordict: TensorDictBase, policy: DenoisingPolicy, x_s: Tensor | None = None
    ) -> None:
        flat = tensordict.reshape(-1)
        self.process, index = policy.process, flat.get(keys.INDEX).flatten()
        self.index = index
        self.x_s = flat.get((keys.NEXT, keys.X_T)).float() if x_s is None else x_s
        self.s = flat.get((keys.NEXT, keys.T)).flatten().double()
        self.t = flat.get(keys.RENOISE_T).flatten().double()
        self.noise, self.x0_hat = flat.get(keys.NOISE).to(self.x_s), flat.get(keys.X0_HAT, None)
        self.cond = flat.get(keys.COND, None)
        self.x_t = renoise(self.process, self.x_s, self.s, self.t, self.noise)


def student_step(student: DenoisingPolicy, tensordict: TensorDictBase) -> tuple[Tensor, Boundary]:
    """The student's clean estimate at x_k, with its gradient, and the boundary that it leads to, without."""
    flat = tensordict.reshape(-1)
    x_k, index = flat.get(keys.X_T).float(), flat.get(keys.INDEX).flatten()
    D_x = student.estimate(x_k, index, flat.get(keys.COND, None))
    x_s = student.law_of_estimate(x_k, index, D_x.detach()).mean
    clean = flat.get((keys.NEXT, keys.T)).flatten() == student.process.t_clean
    return D_x, Boundary(tensordict, student, torch.where(expand_like(clean, D_x), D_x.detach(), x_s))


def pull(D_x: Tensor, d: Tensor, towards: Tensor, huber: float = 0.0) -> Tensor:
    """‖D - sg(D + d)‖²/c of each state, as means over the event dims, with c = mean |D - towards|: shape [N].

    Args:
        D_x: clean estimates with a gradient, shape [N, *E].
        d: where they are to go, of D's shape.
        towards: what the normaliser is the distance to, of D's shape.
        huber: h; 0: squares.
    """
    c = (D_x.detach() - towards).abs().flatten(1).mean(1).clamp(min=NO_SMALLER)
    square = (D_x - (D_x + d).detach()).square()
    each = square if huber == 0 else (square + huber**2).sqrt() - huber
    return (each / expand_like(c, D_x)).flatten(1).mean(1)


@SURROGATES.register("trajectory_matching")
@dataclass(frozen=True)
class TrajectoryMatching(Surrogate):
    """The student against the teacher by a fake score, at every boundary: TDM. See `FakeScoreLoss`, `DistillationLoss`.

    Args:
        fake_target: "dsm", exact, or "x0", as the authors train.
        guidance_scale: w of the teacher; 1 is without guidance.
        fake_updates: n, updates of the fake score for each of the student. With n times the trajectories in n
            minibatches each has new ones, which "dsm" gains from; with n passes all have the same.
        fake_lr: learning rate of the fake score.
        betas: of Adam, for both networks.
        huber: see `DistillationLoss`.
    """

    reads: ClassVar[Literal["boundaries"]] = "boundaries"
    fake_target: Literal["dsm", "x0"] = "dsm"
    guidance_scale: float = 1.0
    fake_updates: int = 1
    fake_lr: float = 2e-5
    betas: tuple[float, float] = (0.0, 0.95)
    huber: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))  # a configuration has a list
        require_number("surrogate.guidance_scale", self.guidance_scale, 1)
        require_int("surrogate.fake_updates", self.fake_updates)
        require_number("surrogate.fake_lr", self.fake_lr, 0, ends="()")
        require_number("surrogate.huber", self.huber, 0)

    def loss(self, setting: Setting) -> DistillationLoss:
        """That of the student."""
        teacher = teacher_of(setting, setting.reference("teacher"), self.guidance_scale)
        return DistillationLoss(setting.policy, setting.twin("fake"), teacher, huber=self.huber)

    def roles(self, setting: Setting) -> dict[str, Role]:
        """The fake score first, then the student."""
        fake = setting.twin("fake")
        optim = Optim(self.fake_lr, betas=self.betas, weight_decay=1e-2, warmup_steps=50, decay="none")
        return {
            "fake": Role(fake.denoiser, FakeScoreLoss(fake, fake_target=self.fake_target), optim),
            "policy": Role(setting.policy.denoiser, self.loss(setting), every=self.fake_updates),
        }

    def conflict(self, recipe: Recipe) -> str | None:
        """Refuse a number of updates that the student would miss."""
        u = recipe.updates
        if u.passes * u.minibatches % self.fake_updates:
            return (
                f"the student is updated on every {self.fake_updates}th minibatch, of {u.passes * u.minibatches}: set "
                "updates.passes to surrogate.fake_updates"
            )
        return super().conflict(recipe)


@METHODS.register("tdm", label="TDM")
def tdm(**pieces: Any) -> Recipe:
    """TDM: distils a denoiser into a generator of few deterministic steps. The reward is never asked.

    The numbers are those of the code's PixArt demo, but for the exact target of the fake score, which is ours, and the
    student's learning rate, which is the run's (there 4e-6, a fifth of the fake score's). The importance weight and the
    clipped SNR, by which the demo weighs its "x0" target, are left out, as TDM-R1's code leaves them out.

    Source: Learning Few-Step Diffusion Models by Trajectory Distribution Matching (Luo et al., 2025) and its code,
    https://arxiv.org/abs/2503.06674.

    Args:
        **pieces: of `Recipe`, in place of the published ones.
    """
    published = {
        "rollouts": Rollouts(),
        "placement": Unpaid(),
        "credit": Standardised(),
        "updates": BoundaryUpdates(),
        "surrogate": TrajectoryMatching(),
    }
    return Recipe(**{**published, **pieces})
