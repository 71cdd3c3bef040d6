"""Momentum with and without Adam's step, and three corrections for gradients that are stale, on one flat vector.

With weights w_i = (1-β) β^{t-i}, m_t = Σ_i w_i g_i averages gradients that were taken at θ_i, not at θ_t, and against
targets of θ_i too. The average that is meant is Σ_i w_i g_i(θ_t) ≈ m_t + Σ_i w_i Z_i (θ_t - θ_i), where Z_i is the
Jacobian of the whole semi-gradient, target included; in TD it is not symmetric.

Sources: Correcting Momentum in Temporal Difference Learning (Bengio et al., 2021), https://arxiv.org/abs/2106.03955;
implicit transport: Reducing the variance in online optimization by transporting past gradients (Arnold et al., 2019),
https://arxiv.org/abs/1906.03532.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

Correction = Literal["none", "diagonal", "first order", "transport"]


class Optimiser:
    """θ ← θ - η m̂/(√v̂ + ε), or θ ← θ - η m̂ without `normalise`; hats as in Adam.

    | correction | m̂ gets |
    |---|---|
    | "none" | nothing |
    | "diagonal" | the published recursion e ← β e + β ζ u, ζ ← β ζ + (1-β) diag Z, u the last step taken |
    | "first order" | g(θ) - g(θ̄) with θ̄ = Σ w_i θ_i: the full Z, of this minibatch; one more gradient a step |
    | "transport" | nothing, but gradients are taken at θ + β/(1-β) u: exact where Z is constant, at no cost |

    Args:
        module: whose parameters become views of one vector, `theta`.
        beta1: β.
        correction: as above.
        normalise: whether to divide by √v̂, β2 = 0.999.
    """

    def __init__(self, module: nn.Module, beta1: float, correction: Correction, normalise: bool) -> None:
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.theta = torch.cat([p.data.flatten() for p in self.parameters])
        sizes = [p.numel() for p in self.parameters]
        for p, part in zip(self.parameters, self.theta.split(sizes), strict=True):
            p.data = part.view_as(p)
        self.beta1, self.beta2, self.correction, self.normalise = beta1, 0.999, correction, normalise
        self.forget()

    def forget(self) -> None:
        """Begin with empty averages."""
        self.m, self.v, self.e, self.zeta, self.mean, self.u = (
            torch.zeros_like(self.theta) for _ in range(6)
        )
        self.steps = 0

    def gradient(self, scalar: Tensor, keep: bool = False) -> Tensor:
        """Of a scalar, flat; its graph may be kept for another."""
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(scalar, self.parameters, retain_graph=keep)]
        )

    def at(self, theta: Tensor, loss: Callable[[], Tensor]) -> Tensor:
        """The gradient of a loss at other weights."""
        here = self.theta.clone()
        self.theta.copy_(theta)
        g = self.gradient(loss())
        self.theta.copy_(here)
        return g

    def second_moment(self) -> Tensor:
        """v̂."""
        return self.v / (1 - self.beta2**self.steps)

    def step(
        self,
        rate: float,
        loss: Callable[[], Tensor],
        probe: Callable[[], tuple[Tensor, Tensor]],
        moment: Tensor | None = None,
    ) -> float:
        """One step of size `rate`; `moment` takes the place of v̂. Returns the loss."""
        beta, value = self.beta1, loss()
        moved = self.correction == "transport" and self.steps > 0
        g = self.at(self.theta + beta / (1 - beta) * self.u, loss) if moved else self.gradient(value)
        self.steps += 1
        unbias = 1 - beta**self.steps
        self.m.lerp_(g, 1 - beta)
        self.v.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
        direction = self.m / unbias
        if self.correction == "diagonal":
            left, right = (self.gradient(scalar, keep=True) for scalar in probe())
            self.e = beta * (self.e + self.zeta * self.u)
            self.zeta.lerp_(left * right, 1 - beta)
            direction += self.e / unbias
        elif self.correction == "first order":
            self.mean.lerp_(self.theta, 1 - beta)
            direction += g - self.at(self.mean / unbias, loss)
        if self.normalise:
            direction = direction / ((self.second_moment() if moment is None else moment).sqrt() + 1e-8)
        self.u = -rate * direction
        self.theta += self.u
        return float(value.detach())
