"""The linear theory: which step is stable with momentum, and the eigenvalues of a network's own TD dynamics.

In network units, near weights θ, an error f of the outputs moves under the semi-gradient as f' = -K (I - P̂) f, where
K is the tangent kernel (with Adam's 1/√v inside) and (P̂ f)_i = ρ_i E[f_{i+1} | x_i], ρ_i = A_{i+1} c_{i+1}/(A_i c_i).
The nonzero eigenvalues μ of K (I - P̂) are those of S Jᵀ (I - P̂) J S, a matrix of the size of θ with S² = 1/√v, of
which only products with vectors are needed.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor
from torch.func import functional_call, jvp, vjp

from diffrl import keys
from stall.ground import Learner

Complex = NDArray[np.complex128]


def critical_rate(mu: Complex, beta: float) -> NDArray[np.float64]:
    """The largest stable step of f_{k+1} - f_k = β (f_k - f_{k-1}) - η (1-β) μ f_k, for each μ = a + ib.

        η < 2 c a/(b² + c² a²),    c = (1-β)/(1+β)

    From |p - β p̄| < 1 - β² with p = -(1 + β - η (1-β) μ), the condition that both roots of z² + p z + β lie inside the
    unit circle. With b = 0 it is η < 2/(c a): momentum widens it by 1/c, and narrows it by 1/c where |b| ≫ c a.
    """
    a, b, c = mu.real, mu.imag, (1 - beta) / (1 + beta)
    return np.where(a > 0, 2 * c * a / np.maximum(b**2 + (c * a) ** 2, 1e-300), 0.0)


def roots(mu: complex, rate: float, beta: float) -> Complex:
    """The two factors z by which the mode μ is multiplied in a step."""
    return np.roots([1, -(1 + beta - rate * (1 - beta) * mu), beta]).astype(complex)


class Dynamics:
    """S Jᵀ (I - P̂) J S of a learner at its weights, on the states of some chains.

    Args:
        learner: gives the network.
        chain: [B, K].
        moment: v̂, which makes S = v̂^{-1/4}; None: S = 1, for plain SGD.
    """

    def __init__(self, learner: Learner, chain: TensorDict, moment: Tensor | None) -> None:
        ground, net = learner.ground, learner.denoiser.network
        names = [name for name, p in net.named_parameters() if p.requires_grad]
        shapes = [p.shape for p in learner.optimiser.parameters]
        x, t = chain[keys.X_T], chain[keys.T]
        _, c_out, c_in = learner.denoiser.scalings(t)
        g = chain[keys.A] * c_out
        self.rho = g[:, 1:] / g[:, :-1]
        self.x, self.theta = x, learner.optimiser.theta.clone()
        states = (c_in * x).flatten(0, 1), ground.process.c_noise(t).flatten()

        def outputs(theta: Tensor) -> Tensor:
            parts = theta.split([s.numel() for s in shapes])
            weights = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
            return functional_call(net, weights, states).view_as(x)

        self.outputs = outputs
        self.vjp: Callable[[Tensor], tuple[Tensor]] = vjp(outputs, self.theta)[1]
        self.S = torch.ones_like(self.theta) if moment is None else (moment.sqrt() + 1e-8).rsqrt()
        self.scale = 2 / x.numel()

    def jvp(self, w: Tensor) -> Tensor:
        """J w, the change of the outputs with the weights: [B, K, D]."""
        found: Tensor = jvp(self.outputs, (self.theta,), (w,))[1]
        return found

    def next(self, u: Tensor) -> Tensor:
        """P̂ u by the states reached."""
        out = torch.zeros_like(u)
        out[:, :-1] = self.rho * u[:, 1:]
        return out

    def back(self, u: Tensor) -> Tensor:
        """P̂ᵀ u."""
        out = torch.zeros_like(u)
        out[:, 1:] = self.rho * u[:, :-1]
        return out

    @torch.no_grad()
    def td(self, w: Tensor) -> Tensor:
        """S Jᵀ (I - P̂) J S w."""
        u = self.jvp(self.S * w)
        return self.S * self.vjp(self.scale * (u - self.next(u)))[0]

    @torch.no_grad()
    def transposed(self, w: Tensor) -> Tensor:
        """Its transpose times w."""
        u = self.jvp(self.S * w)
        return self.S * self.vjp(self.scale * (u - self.back(u)))[0]

    @torch.no_grad()
    def regression(self, w: Tensor) -> Tensor:
        """S Jᵀ J S w: Monte Carlo, or a target that stands still."""
        return self.S * self.vjp(self.scale * self.jvp(self.S * w))[0]


def arnoldi(
    matvec: Callable[[Tensor], Tensor], start: Tensor, m: int
) -> tuple[Tensor, NDArray[np.float64], float]:
    """An orthonormal basis Q [n, m] of the Krylov space, H = Qᵀ M Q, and the norm of what leaves it."""
    Q, H = torch.zeros(m + 1, len(start)), np.zeros((m + 1, m))
    Q[0] = start / start.norm()
    for j in range(m):
        w = matvec(Q[j])
        for _ in range(2):  # twice is enough for orthogonality
            h = Q[: j + 1] @ w
            w = w - h @ Q[: j + 1]
            H[: j + 1, j] += h.numpy()
        H[j + 1, j] = float(w.norm())
        Q[j + 1] = w / w.norm()
    return Q[:m].T, H[:m], float(H[m, m - 1])


def eigenvalues(H: NDArray[np.float64], rest: float, tolerance: float = 0.03) -> Complex:
    """Ritz values of `arnoldi` whose residual is below `tolerance` |μ|."""
    mu, y = np.linalg.eig(H)
    residual = rest * np.abs(y[-1]) / np.linalg.norm(y, axis=0)
    found: Complex = mu[residual < tolerance * np.abs(mu)].astype(complex)
    return found


def delayed_radius(
    td: NDArray[np.float64], still: NDArray[np.float64], rate: float, beta: float, decay: float
) -> float:
    """Spectral radius of one step with momentum and a target network, of the dynamics projected on a basis.

        m ← β m + (1-β) (R y - (R - M) y⁻),    y ← y - η m,    y⁻ ← τ y⁻ + (1-τ) y

    Args:
        td: M, of TD from own predictions.
        still: R, of regression.
        rate: η.
        beta: β.
        decay: τ; 0 is own predictions.
    """
    n, I = len(td), np.eye(len(td))
    Z = np.zeros((n, n))
    m_row = np.hstack([beta * I, (1 - beta) * still, -(1 - beta) * (still - td)])
    y_row = np.hstack([Z, I, Z]) - rate * m_row
    slow = decay * np.hstack([Z, Z, I]) + (1 - decay) * y_row
    return float(np.abs(np.linalg.eigvals(np.vstack([m_row, y_row, slow]))).max())


def copied_radius(
    td: NDArray[np.float64], still: NDArray[np.float64], rate: float, beta: float, every: int
) -> float:
    """The same a step, of a target that is copied every so many steps."""
    n, I = len(td), np.eye(len(td))
    Z = np.zeros((n, n))
    m_row = np.hstack([beta * I, (1 - beta) * still, -(1 - beta) * (still - td)])
    y_row = np.hstack([Z, I, Z]) - rate * m_row
    step = np.vstack([m_row, y_row, np.hstack([Z, Z, I])])
    copy = np.vstack([np.hstack([I, Z, Z]), np.hstack([Z, I, Z]), np.hstack([Z, I, Z])])
    power = copy @ np.linalg.matrix_power(step, every)
    return float(np.abs(np.linalg.eigvals(power)).max() ** (1 / every))
