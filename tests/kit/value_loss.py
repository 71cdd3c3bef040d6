"""A small denoiser, chains of its data, and the gradient of a value loss at them."""

import math
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.trajectories import sample_chain
from diffrl.objectives import ValueLoss
from tests.kit.networks import Net

N, SD = 7, 0.6
SIGMA_MIN, SIGMA_MAX, RHO = 0.01, 20.0, 5.0
PROCESS = EDM(SIGMA_MIN, SIGMA_MAX, RHO)
Target = dict[str, float | int]
TARGETS: list[Target] = [
    *(Target(lmbda=lmbda) for lmbda in (0.0, 0.5, 1.0)),
    *(Target(n_steps=n) for n in (1, 3, N, N + 5)),
]


def denoiser(
    process: Schedule = PROCESS,
    prediction_type: Any = "edm",
    event_shape: tuple[int, ...] = (2,),
    dtype: torch.dtype = torch.float64,
    dropout: float = 0.0,
) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(Net(event_shape, dropout), process, SD, prediction_type).to(dtype)


def data(B: int = 3, event_shape: tuple[int, ...] = (2,), dtype: torch.dtype = torch.float64) -> Tensor:
    return SD * torch.randn(B, *event_shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def draw(process: Schedule = PROCESS, x0: Tensor | None = None, **options: Any) -> TensorDict:
    x0 = data() if x0 is None else x0
    generator = torch.Generator().manual_seed(2)
    return sample_chain(process, x0, **{"num_steps": N, "generator": generator, **options})


def gradient(loss: Tensor, network: nn.Module) -> Tensor:
    grads = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True, retain_graph=True)
    pairs = zip(grads, network.parameters(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def number(x: Tensor) -> float:
    return x.detach().item()


def distance(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm."""
    return number((a - b).norm() / b.norm())


def perturb(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def denoised_by_hand(
    network: nn.Module, x: Tensor, sigma: Tensor | float, cond: Tensor | None = None
) -> Tensor:
    """EDM's preconditioning: x [M, *E], σ a number or [M, 1...]."""
    sigma = torch.as_tensor(sigma, dtype=x.dtype).expand(len(x), *[1] * (x.ndim - 1))
    total = sigma**2 + SD**2
    F_x = network(x / total.sqrt(), sigma.flatten().log() / 4, cond)
    return SD**2 / total * x + sigma * SD / total.sqrt() * F_x


def level(index: float) -> float:
    """σ of the ρ-grid, 0 past its end."""
    if index > N - 1:
        return 0.0
    high, low = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    return (high + index / (N - 1) * (low - high)) ** RHO


def value_coefficients(index: float, stride: float, eta: float, value: str) -> tuple[float, float]:
    """A and κ by the textbook form of the posterior."""
    t, s = level(index), level(index + stride)
    if t == 0:
        return 0.0, 0.0
    if value == "clean" or s == 0:
        return 1.0, 0.0
    posterior_variance = (t**2 - s**2) * s**2 / t**2
    kappa = math.sqrt(s**2 - eta**2 * posterior_variance) / t
    return 1 - kappa, kappa


def loss_by_hand(
    chain: TensorDict,
    online: nn.Module,
    bootstrap: nn.Module,
    *,
    target: Target,
    gamma: float = 1.0,
    eta: float = 1.0,
    span: int = 1,
    stride: float = 1.0,
    value: str = "posterior_mean",
    semi_gradient: bool = True,
    weight: Callable[[float, float, float, float], float] | None = None,
) -> Tensor:
    """Closed forms where γ = 1, the recursion elsewhere; reads x0, the states and their index."""
    B, T = chain.shape
    total = torch.zeros((), dtype=torch.float64)
    for b in range(B):
        x0 = chain["x0"][b, 0]
        cond = chain["cond"][b, :1] if "cond" in chain.keys() else None
        states = [*chain["x_t"][b], chain["next", "x_t"][b, -1]]
        first = int(chain["index"][b, 0])
        places = [span * (first + j) for j in range(T + 1)]
        sigmas = [level(i) for i in places]
        AK = [value_coefficients(i, stride, eta, value) for i in places]
        mu = [A * x0 + k * x for (A, k), x in zip(AK, states, strict=True)]
        D_next, e, V = [], [], []
        for x, sigma, (A, k) in zip(states, sigmas, AK, strict=True):
            D = torch.zeros_like(x0) if sigma == 0 else denoised_by_hand(bootstrap, x[None], sigma, cond)[0]
            D = D.detach() if semi_gradient else D
            D_next.append(D)
            e.append(A * (x0 - D))
            V.append(A * D + k * x)
        for j in range(T):
            rest = T - j
            if gamma == 1 and "n_steps" in target:
                G = mu[j] - e[min(j + int(target["n_steps"]), T)]
            elif gamma == 1:
                lmbda = target["lmbda"]
                G = mu[j] - lmbda ** (rest - 1) * e[T]
                for n in range(1, rest):
                    G = G - (1 - lmbda) * lmbda ** (n - 1) * e[j + n]
            elif "n_steps" in target:
                n = min(int(target["n_steps"]), rest)
                G = gamma**n * V[j + n]
                for m in range(n):
                    G = G + gamma**m * (mu[j + m] - mu[j + m + 1])
            else:
                lmbda, G = target["lmbda"], V[T]
                for m in reversed(range(j, T)):
                    G = mu[m] - mu[m + 1] + gamma * ((1 - lmbda) * V[m + 1] + lmbda * G)
            (A, k), (A_next, _) = AK[j], AK[j + 1]
            sigma, sigma_next = sigmas[j], sigmas[j + 1]
            delta = G - A * denoised_by_hand(online, states[j][None], sigma, cond)[0] - k * states[j]
            c_out, c_next = (s * SD / math.sqrt(s**2 + SD**2) for s in (sigma, sigma_next))
            w = 1 / max(A**2 * c_out**2, 1e-8) if weight is None else weight(A, A_next, c_out, c_next)
            total = total + w * (delta**2).mean() / (B * T)
    return total


def check(loss: ValueLoss, chain: TensorDict, by_hand: Tensor) -> None:
    value = loss(chain)["loss_value"]
    torch.testing.assert_close(value, by_hand, rtol=1e-12, atol=0)
    assert distance(gradient(value, loss.denoiser), gradient(by_hand, loss.denoiser)) < 1e-11
