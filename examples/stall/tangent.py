"""What the linear theory says of a run: eigenvalues on the way, the tangent trained alone, the leading mode in time."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call, jvp, vjp

from diffrl import keys
from stall.ground import Learner, Run, train
from stall.spectrum import (
    Complex,
    Dynamics,
    arnoldi,
    copied_radius,
    critical_rate,
    delayed_radius,
    eigenvalues,
    roots,
)

LOOK_AT = (50, 200, 500, 1000, 1500)
CHAINS, KRYLOV = 64, 120
FROM = {0.9: 500, 0.5: 200}  # where both runs, by β1, have about the same error
DECAYS, COPIES = (0.0, 0.5, 0.8, 0.9, 0.98), (2, 3, 5, 20)


def _rate(learner: Learner, k: int) -> float:
    return learner.run.lr * learner.schedule.factor(k, learner.run.steps)


def _start(n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(1))


def spectrum(learner: Learner, k: int) -> dict[str, Any]:
    """Eigenvalues of own TD at these weights, and the step that they allow; fresh chains, v̂ of the moment."""
    dynamics = Dynamics(learner, learner.ground.chain(10**6 + k, CHAINS), learner.optimiser.second_moment())
    Q, H, rest = arnoldi(dynamics.td, _start(len(dynamics.S)), KRYLOV)
    still = (Q.T @ torch.stack([dynamics.regression(q) for q in Q.T], 1)).double().numpy()
    mu, rate = eigenvalues(H, rest), _rate(learner, k)
    worst = {f"{beta:g}": int(critical_rate(mu, beta).argmin()) for beta in (0.5, 0.9)}
    lag = {f"decay {d:g}": delayed_radius(H, still, rate, 0.9, d) for d in DECAYS}
    lag |= {f"every {n}": copied_radius(H, still, rate, 0.9, n) for n in COPIES}
    return {
        "step": k,
        "rate": rate,
        "mu": [[float(m.real), float(m.imag)] for m in mu],
        "regression": float(np.linalg.eigvalsh((still + still.T) / 2).max()),
        "allowed": {b: float(critical_rate(mu, float(b))[i]) / rate for b, i in worst.items()},
        "worst": {b: [float(mu[i].real), float(mu[i].imag)] for b, i in worst.items()},
        "radius": {f"{b:g}": delayed_radius(H, still, rate, b, 0.0) for b in (0.0, 0.5, 0.9)},
        "radius_lag": lag,
    }


def spectra(run: Run) -> list[dict[str, Any]]:
    """`spectrum` at some steps of a run."""
    found = []

    def watch(k: int, learner: Learner) -> None:
        if k in LOOK_AT:
            found.append(spectrum(learner, k))

    train(run, watch, until=min(max(LOOK_AT) + 1, run.steps))
    return found


def snapshot(run: Run, k: int) -> tuple[Learner, Tensor]:
    """The learner of a run before step k, and its v̂."""
    kept: list[tuple[Learner, Tensor]] = []

    def watch(step: int, learner: Learner) -> None:
        if step == k:
            kept.append((learner, learner.optimiser.second_moment().clone()))

    train(run, watch, until=k + 1)
    learner, moment = kept[0]
    return learner, moment


class Tangent:
    """F(x; θ₀) + J S² q: a network that is linear in its parameters, trained by the minibatches with v frozen.

    Args:
        learner: the network and θ₀.
        moment: v̂; S² = 1/√v̂.
    """

    def __init__(self, learner: Learner, moment: Tensor) -> None:
        net, self.learner = learner.denoiser.network, learner
        names = [name for name, p in net.named_parameters() if p.requires_grad]
        shapes = [p.shape for p in learner.optimiser.parameters]
        self.theta, self.shift = learner.optimiser.theta.clone(), torch.zeros_like(moment)
        self.m, self.step_size = torch.zeros_like(moment), 1 / (moment.sqrt() + 1e-8)

        def outputs(theta: Tensor, x: Tensor, t: Tensor) -> Tensor:
            parts = theta.split([s.numel() for s in shapes])
            weights = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
            _, _, c_in = learner.denoiser.scalings(t)
            code = learner.ground.process.c_noise(t)
            return functional_call(net, weights, (c_in[:, None] * x, code))

        self.outputs = outputs

    @torch.no_grad()
    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        """D of states [N, D]."""
        F, dF = jvp(lambda theta: self.outputs(theta, x, t), (self.theta,), (self.shift,))[:2]
        c_skip, c_out, _ = (c[:, None] for c in self.learner.denoiser.scalings(t))
        found: Tensor = c_skip * x + c_out * (F + dF)
        return found

    @torch.no_grad()
    def step(self, k: int, rate: float, beta: float, target: str, exact: bool = False) -> None:
        """One step on minibatch k; `exact` as in `ground.exact_loss`."""
        chain = self.learner.ground.chain(k)
        B, K = chain.batch_size
        x, t = chain[keys.X_T].flatten(0, 1), chain[keys.T].flatten()
        g = (chain[keys.A] * self.learner.denoiser.scalings(chain[keys.T]).c_out).view(B, K, 1)
        truth = self.learner.ground.exact(x, t).view(B, K, -1) if exact else chain[keys.X0]
        error = chain[keys.A] * (truth - self.predict(x, t).view(B, K, -1))
        delta = error.clone()
        if target == "own":
            delta[:, :-1] -= error[:, 1:]
        pull = vjp(lambda theta: self.outputs(theta, x, t), self.theta)[1]
        gradient = -2 / x.numel() * pull((delta / g).flatten(0, 1))[0]
        self.m.lerp_(gradient, 1 - beta)
        self.shift -= rate * self.step_size * self.m


def tangent_runs(run: Run, steps: int = 300) -> list[dict[str, Any]]:
    """Errors of the tangent at a step of a run, trained on by each β and target with and without noise."""
    k = FROM[run.beta1]
    learner, moment = snapshot(run, k)
    found = []
    for target, beta, exact in (
        ("own", 0.9, False), ("own", 0.5, False), ("monte_carlo", 0.9, False), ("own", 0.9, True), ("own", 0.5, True)
    ):  # fmt: skip
        tangent, curve = Tangent(learner, moment), []
        for j in range(steps + 1):
            if j % 30 == 0:
                curve.append((j, learner.ground.figure(learner.ground.errors(tangent.predict))))
            if j < steps:
                tangent.step(2 * 10**6 + j, _rate(learner, k), beta, target, exact=exact)
        found.append({"target": target, "beta1": beta, "exact": exact, "curve": curve})
    return found


def leading(learner: Learner, k: int) -> tuple[complex, Complex]:
    """The mode that the least step would make unstable at β = .9.

    Returns:
        Its μ; its left eigenvector in the units of θ, scaled so that one is the size of the mode that moves the outputs
        by one (root of the sum over dims of the mean square over states).
    """
    dynamics = Dynamics(learner, learner.ground.chain(10**6 + k, CHAINS), learner.optimiser.second_moment())
    start = _start(len(dynamics.S))
    (Q, H, rest), (P, G, _) = arnoldi(dynamics.transposed, start, KRYLOV), arnoldi(dynamics.td, start, KRYLOV)
    (mu, left), (same, right) = np.linalg.eig(H), np.linalg.eig(G)
    good = rest * np.abs(left[-1]) < 0.03 * np.abs(mu)
    i = int(np.where(good & (mu.imag > 0), critical_rate(mu.astype(complex), 0.9), np.inf).argmin())
    w, r = Q.numpy() @ left[:, i], P.numpy() @ right[:, np.abs(same - mu[i]).argmin()]
    parts = [
        dynamics.jvp(dynamics.S * torch.from_numpy(part.astype(np.float32))) for part in (r.real, r.imag)
    ]
    moved = 2 * sum(float(u.square().sum(-1).mean()) for u in parts)  # of the pair, at all its phases
    return complex(mu[i]), w / (w @ r) * moved**0.5 / dynamics.S.numpy()


def mode_in_time(run: Run, k: int = 500, window: int = 200) -> dict[str, Any]:
    """The weights projected on the leading mode (found in the window's middle), over a window of steps."""
    thetas: list[Tensor] = []
    modes: list[tuple[complex, Complex, float, float]] = []

    def watch(step: int, learner: Learner) -> None:
        if step >= k:
            thetas.append(learner.optimiser.theta.clone())
        if step == k + window // 2:
            error = learner.ground.figure(learner.ground.errors(learner.denoiser))
            modes.append((*leading(learner, step), _rate(learner, step), error))

    train(run, watch, until=k + window)
    mu, w, rate, error = modes[0]
    path: NDArray[np.complex128] = torch.stack(thetas).numpy() @ w
    steps = np.arange(len(path))
    drift = np.polyfit(steps, path.real, 2), np.polyfit(steps, path.imag, 2)
    path = path - np.polyval(drift[0], steps) - 1j * np.polyval(drift[1], steps)
    z = roots(mu, rate, run.beta1)
    main = z[np.abs(z).argmax()]
    turn = np.angle(np.sum(path[1:] * path[:-1].conj()))
    return {
        "mu": [mu.real, mu.imag],
        "rate": rate,
        "error": error,
        "predicted_turn": float(np.angle(main)),
        "predicted_factor": float(np.abs(main)),
        "turn": float(turn),
        "amplitude": float(np.sqrt(np.mean(np.abs(path) ** 2))),
        "correlation": [_correlation(path, lag) for lag in range(3 * window // 5)],
        "path": [[float(p.real), float(p.imag)] for p in path],
    }


def _correlation(path: NDArray[np.complex128], lag: int) -> float:
    """Autocorrelation of a path's real part."""
    x = path.real
    return float((x[lag:] * x[: len(x) - lag]).mean() / (x * x).mean())
