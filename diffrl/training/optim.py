"""An optimiser with a schedule and clipping: one optimiser step of one trained module."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from diffrl.errors import DiffrlError, InputError
from diffrl.ranges import require_int, require_number
from diffrl.training.loss_scale import LossScale

__all__ = ["FinetuningOptim", "NonFiniteLoss", "Optim", "Optimiser"]


class NonFiniteLoss(DiffrlError, RuntimeError):
    """The loss or its gradient became NaN or infinite."""


FUSED = ("adamw", "adam", "sgd")
"""Algorithms that PyTorch has a fused kernel of; it has a foreach kernel of the others."""
MOMENTS = {"betas", "alpha", "momentum"}
"""Options that tell by their presence what an algorithm keeps of past gradients."""


@dataclass(frozen=True)
class Optim:
    """An optimiser of PyTorch with warm-up and decay of the learning rate.

    | name | step, but for the correction of Adam's moments at the start | weight decay |
    |---|---|---|
    | adamw, radam | θ ← θ - lr m/(√v + 1e-8), m ← β1 m + (1-β1) g, v ← β2 v + (1-β2) g² | decoupled |
    | adam | the same | λ θ is added to g |
    | rmsprop | θ ← θ - lr b, b ← β1 b + g/(√v + 1e-8), v as above, uncorrected | λ θ is added to g |
    | sgd | θ ← θ - lr b, b ← β1 b + g | λ θ is added to g |

    So with β1 > 0 sgd and rmsprop go 1/(1-β1) times as far as lr says.

    Sources: Decoupled Weight Decay Regularization (Loshchilov & Hutter, 2019), https://arxiv.org/abs/1711.05101; On the
    Variance of the Adaptive Learning Rate and Beyond (Liu et al., 2020), https://arxiv.org/abs/1908.03265.

    Args:
        lr: greatest learning rate.
        betas: β1 and β2, decay rates of the moments of the gradient g; sgd has no β2.
        weight_decay: λ ≥ 0.
        warmup_steps: gradient steps of linear rise from 0.
        decay: "cosine" to 0 at the last step, or "none".
        clip_norm: greatest gradient norm; None does not clip.
        name: "adamw", "adam", "radam", "rmsprop" or "sgd".

    Raises:
        ValueError: an argument outside its range.
    """

    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 100
    decay: Literal["cosine", "none"] = "cosine"
    clip_norm: float | None = 1.0
    name: Literal["adamw", "adam", "radam", "rmsprop", "sgd"] = "adamw"

    def __post_init__(self) -> None:
        require_number("optim.lr", self.lr, 0, ends="()")
        if len(self.betas) != 2:
            raise InputError(f"optim.betas is {self.betas}: give two decay rates in [0, 1)")
        for beta in self.betas:
            require_number("optim.betas", beta, 0, 1, "[)")
        require_number("optim.weight_decay", self.weight_decay, 0)
        require_int("optim.warmup_steps", self.warmup_steps, 0)
        if self.decay not in ("cosine", "none"):
            raise InputError(f"optim.decay is {self.decay!r}: give 'cosine' or 'none'")
        if self.clip_norm is not None:
            require_number("optim.clip_norm", self.clip_norm, 0, ends="()")
        if self.name not in ALGORITHMS:
            raise InputError(f"optim.name is {self.name!r}: give one of {', '.join(ALGORITHMS)}")

    def factor(self, step: int, grad_steps: int) -> float:
        """Share of `lr` at gradient step `step`, counted from 0, of `grad_steps`."""
        warmup = min((step + 1) / self.warmup_steps, 1.0) if self.warmup_steps > 0 else 1.0
        if self.decay == "none":
            return warmup
        progress = max(step - self.warmup_steps, 0) / max(grad_steps - self.warmup_steps, 1)
        return warmup * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


@dataclass(frozen=True)
class FinetuningOptim(Optim):
    """`Optim` with the defaults of fine-tuning, those of DDPO's code: a constant rate, made for adapters.

    Its lr 3e-4, betas, weight decay 1e-4 and clip_norm 1 are equal; for all weights its paper has lr 1e-5. SDPO's code
    differs by lr 1e-4.

    Source: Training Diffusion Models with Reinforcement Learning (Black et al., 2024) and its code, config/base.py,
    https://arxiv.org/abs/2305.13301.
    """

    lr: float = 3e-4
    weight_decay: float = 1e-4
    warmup_steps: int = 0
    decay: Literal["cosine", "none"] = "none"


ALGORITHMS: dict[str, Callable[[Optim], tuple[type[torch.optim.Optimizer], dict[str, Any]]]] = {
    "adamw": lambda optim: (torch.optim.AdamW, {"betas": optim.betas}),
    "adam": lambda optim: (torch.optim.Adam, {"betas": optim.betas}),
    "radam": lambda optim: (torch.optim.RAdam, {"betas": optim.betas, "decoupled_weight_decay": True}),
    "rmsprop": lambda optim: (
        torch.optim.RMSprop,
        {"momentum": optim.betas[0], "alpha": optim.betas[1], "eps": 1e-8},
    ),
    "sgd": lambda optim: (torch.optim.SGD, {"momentum": optim.betas[0]}),
}
"""What makes each algorithm, but for the options that all share."""


class Optimiser:
    """Steps the parameters of one module, along a schedule that ends after `total` steps.

    Args:
        parameters: what is trained.
        optim: learning rate, decay and clipping.
        total: steps until the schedule ends.
        vectorised: use PyTorch's fused and foreach kernels, which sum in another order.
        loss_scale: of gradients that are computed in float16; `backward` brings it in, `step` takes it out.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        optim: Optim,
        total: int,
        *,
        vectorised: bool = False,
        loss_scale: LossScale | None = None,
    ) -> None:
        self.parameters, self.optim, self.total = list(parameters), optim, total
        self.loss_scale = loss_scale
        self._foreach = True if vectorised else None
        make, options = ALGORITHMS[optim.name](optim)
        if vectorised:
            options["fused" if optim.name in FUSED else "foreach"] = True
        self.algorithm = make(self.parameters, lr=optim.lr, weight_decay=optim.weight_decay, **options)  # type: ignore[call-arg]
        self.steps = 0
        """Steps so far."""
        self._set_schedule()

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self.algorithm.param_groups

    def _set_schedule(self) -> None:
        for group in self._groups:
            group["initial_lr"] = self.optim.lr
        self.schedule = LambdaLR(
            self.algorithm, lambda step: self.optim.factor(step, self.total), last_epoch=self.steps - 1
        )

    def backward(self, loss: Tensor, factor: float = 1.0) -> None:
        """Add the gradient of factor · loss to those at hand."""
        if self.loss_scale is not None:
            factor *= self.loss_scale.value
        (loss if factor == 1 else factor * loss).backward()

    def step(self, loss: float) -> dict[str, float]:
        """Take the step that the gradients at hand ask for, and clear them.

        With a loss scale, a step whose gradient is not finite is skipped: it counts, but leaves the weights alone.

        Args:
            loss: whose gradient it is.

        Returns:
            ``grad_norm`` before clipping, ``lr``, and ``loss_scale`` where there is one.

        Raises:
            NonFiniteLoss: loss or gradient are not finite, and nothing is changed but the gradients, which are cleared;
                or the learning rate is so large that the update cannot be computed.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        scale, scaling = self.loss_scale, {}
        if scale is not None:
            torch._foreach_mul_(gradients, 1 / scale.value)
            scaling = {"loss_scale": scale.value}
        norm = torch.nn.utils.get_total_norm(gradients, foreach=self._foreach)
        known = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of parts, what all have
        figures = {"grad_norm": known.item(), "lr": self._groups[0]["lr"], **scaling}
        if not math.isfinite(loss + figures["grad_norm"]):
            self.algorithm.zero_grad()
            if scale is not None and math.isfinite(loss) and scale.shrink():
                self.steps += 1
                self._set_schedule()
                return figures
            raise NonFiniteLoss(f"loss {loss:g} with gradient norm {figures['grad_norm']:g}")
        if self.optim.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(
                self.parameters, self.optim.clip_norm, norm, foreach=self._foreach
            )
        try:
            self.algorithm.step()
        except RuntimeError as error:
            if "overflow" not in str(error):
                raise
            raise NonFiniteLoss(f"an update by the learning rate {figures['lr']:g} overflows") from error
        self.algorithm.zero_grad()
        if scale is not None:
            scale.grow()
        self.steps += 1
        self.schedule.step()
        return figures

    def state_dict(self) -> dict[str, Any]:
        """Moments and options of the algorithm; the schedule is a function of the step."""
        return self.algorithm.state_dict()

    def load_state_dict(self, state: dict[str, Any], steps: int) -> None:
        """Continue from `state_dict`, after so many steps, with the options of now.

        Raises:
            InputError: it is that of an algorithm with other moments.
        """
        now = [{key: group[key] for key in group if key != "params"} for group in self._groups]
        if MOMENTS & state["param_groups"][0].keys() != MOMENTS & now[0].keys():
            raise InputError(
                f"optim.name is {self.optim.name}, but the checkpoint holds the moments of another optimiser: "
                "set it back, or begin a new run with init=..."
            )
        self.algorithm.load_state_dict(state)
        for group, options in zip(self._groups, now, strict=True):
            group.update(options)
        self.steps = steps
        self._set_schedule()
