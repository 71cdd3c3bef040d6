"""Exact denoisers E[x0 | x_t] of data whose law is known: a Gaussian, a mixture, a finite set of points."""

import torch
from torch import Tensor, nn

from diffrl.diffusion.denoisers import require_states
from diffrl.diffusion.schedules.base import Schedule
from diffrl.errors import InputError

__all__ = ["EmpiricalDenoiser", "GaussianDenoiser", "MixtureDenoiser"]

NUMBERS = 2**24  # distances that are held at once


class GaussianDenoiser(nn.Module):
    """Exact denoiser of x0 ~ N(m, C), any covariance.

        E[x0 | x_t] = m + α C (α² C + σ² I)⁻¹ (x_t - α m)

    It has a second time: with r it gives the average of this on the way of the probability-flow ODE from t to r. On an
    axis of variance v, n = α² v + σ² is that of the state, which the ODE scales by √(n_r/n_t) around its mean, so that

        D(x, t, r) = m + v (α_r σ_t + α_t σ_r)/(σ_t √(n_t n_r) + σ_r n_t) (x - α_t m)

    Source: Gaussian conditioning; Pattern Recognition and Machine Learning (Bishop, 2006), eq. 2.116.

    Args:
        process: noise schedule.
        mean: m, shape [D].
        covariance: C, symmetric and positive semi-definite, shape [D, D].
    """

    second_time = True
    mean: Tensor
    variances: Tensor
    axes: Tensor

    def __init__(self, process: Schedule, mean: Tensor, covariance: Tensor) -> None:
        super().__init__()
        self.process = process
        variances, axes = torch.linalg.eigh(covariance.double())
        self.register_buffer("mean", mean.double())
        self.register_buffer("variances", variances.clamp(min=0))
        self.register_buffer("axes", axes)

    def on(self, process: Schedule) -> "GaussianDenoiser":
        """The exact denoiser of the same data on another process."""
        return GaussianDenoiser(process, self.mean, self.axes * self.variances @ self.axes.T)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        """Posterior mean of states [N, D] at times [N], of x_t's dtype, or its average to times r [N]; cond is ignored.

        Raises:
            TypeError: x_t holds integers.
            ValueError: t or r is not one time for each state.
        """
        require_states(x_t, t)
        alpha, sigma = self.process.alpha(t.double())[:, None], self.process.sigma(t.double())[:, None]
        if r is None:
            gain = alpha * self.variances / (alpha**2 * self.variances + sigma**2)
        else:
            require_states(x_t, r, "r")
            gain = self._average_gain(alpha, sigma, r.double()[:, None])
        D_x = self.mean + ((x_t - alpha * self.mean) @ self.axes * gain) @ self.axes.T
        return D_x.to(x_t.dtype)

    def _average_gain(self, alpha_t: Tensor, sigma_t: Tensor, r: Tensor) -> Tensor:
        v, alpha_r, sigma_r = self.variances, self.process.alpha(r), self.process.sigma(r)
        n_t, n_r = alpha_t**2 * v + sigma_t**2, alpha_r**2 * v + sigma_r**2
        norm = sigma_t * (n_t * n_r).sqrt() + sigma_r * n_t
        # 0 where an axis without variance is followed to clean data
        return v * (alpha_r * sigma_t + alpha_t * sigma_r) / torch.where(norm > 0, norm, 1.0)

    def sample_posterior(
        self, x_t: Tensor, t: Tensor, draws: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draws of x0 given x_t.

            x0 | x_t ~ N(E[x0 | x_t], σ² C (α² C + σ² I)⁻¹)

        Args:
            x_t: states, shape [N, D].
            t: times, shape [N].
            draws: number of draws for each state.
            generator: source of randomness.

        Returns:
            Shape [N, draws, D], of x_t's dtype.
        """
        alpha, sigma = self.process.alpha(t.double())[:, None], self.process.sigma(t.double())[:, None]
        std = sigma * (self.variances / (alpha**2 * self.variances + sigma**2)).sqrt()
        shape = (len(x_t), draws, x_t.shape[1])
        z = torch.randn(shape, generator=generator, dtype=torch.float64, device=x_t.device)
        mean = self(x_t.double(), t)
        return (mean[:, None] + (std[:, None] * z) @ self.axes.T).to(x_t.dtype)


class MixtureDenoiser(nn.Module):
    """Exact denoiser of a mixture of isotropic Gaussians, any dimension.

        E[x0 | x_t] = Σ_c p(c | x_t) [ m_c + α s_c²/v_c (x_t - α m_c) ],    v_c = α² s_c² + σ²
        p(c | x_t) ∝ w_c v_c^{-D/2} exp(-|x_t - α m_c|²/(2 v_c))

    Source: Bayes' rule for a mixture; Pattern Recognition and Machine Learning (Bishop, 2006), eqs. 2.116
    and 9.13.

    Args:
        process: noise schedule.
        means: m_c, shape [C, *E].
        stds: s_c ≥ 0, shape [C].
        weights: w_c ≥ 0, shape [C]; they are divided by their sum.
        batch_size: number of states handled at once, at most; there are fewer where C is large, as memory holds a
            distance for each pair of them.

    Raises:
        ValueError: the numbers of means, stds and weights differ.
    """

    means: Tensor
    stds: Tensor
    log_weights: Tensor

    def __init__(
        self, process: Schedule, means: Tensor, stds: Tensor, weights: Tensor, batch_size: int = 4096
    ) -> None:
        super().__init__()
        if not (len(means) == len(stds) == len(weights)):
            raise InputError(
                f"a mixture needs as many means ({len(means)}) as stds ({len(stds)}) "
                f"and weights ({len(weights)})"
            )
        self.process, self.event_shape = process, means.shape[1:]
        self.batch_size = max(1, min(batch_size, NUMBERS // len(means)))
        self.register_buffer("means", means.double().flatten(1))
        self.register_buffer("stds", stds.double())
        self.register_buffer("log_weights", (weights.double() / weights.sum()).log())

    def on(self, process: Schedule) -> "MixtureDenoiser":
        """The exact denoiser of the same data on another process."""
        means = self.means.unflatten(1, self.event_shape)
        return MixtureDenoiser(process, means, self.stds, self.log_weights.exp(), self.batch_size)

    def responsibilities(self, x_t: Tensor, t: Tensor) -> Tensor:
        """p(c | x_t), shape [N, C], float64."""
        alpha, sigma = self.process.alpha(t.double())[:, None], self.process.sigma(t.double())[:, None]
        v = alpha**2 * self.stds**2 + sigma**2
        x = x_t.double().flatten(1)
        squares = (
            (x**2).sum(1, keepdim=True) - 2 * alpha * (x @ self.means.T) + alpha**2 * (self.means**2).sum(1)
        )
        D = x.shape[1]
        return (self.log_weights - squares / (2 * v) - 0.5 * D * v.log()).softmax(1)

    def _posterior_mean(self, x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.process.alpha(t.double())[:, None], self.process.sigma(t.double())[:, None]
        p = self.responsibilities(x_t, t)
        gain = alpha * self.stds**2 / (alpha**2 * self.stds**2 + sigma**2)
        x = x_t.double().flatten(1)
        D_x = (p * (1 - alpha * gain)) @ self.means + (p * gain).sum(1, keepdim=True) * x
        return D_x.view_as(x_t).to(x_t.dtype)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Posterior mean of states [N, *E] at times [N], of x_t's dtype; cond is ignored.

        Raises:
            TypeError: x_t holds integers.
            ValueError: t is not one time per state, or x_t has another event shape than the mixture.
        """
        require_states(x_t, t)
        if x_t.shape[1:] != self.event_shape:
            raise InputError(
                f"x_t has event shape {tuple(x_t.shape[1:])}, the mixture has {tuple(self.event_shape)}"
            )
        parts = zip(x_t.split(self.batch_size), t.split(self.batch_size), strict=True)
        return torch.cat([self._posterior_mean(x, s) for x, s in parts])

    def sample_posterior(
        self, x_t: Tensor, t: Tensor, draws: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draws of x0 given x_t: first a component by its posterior probability, then a point of its Gaussian.

            x0 | x_t, c ~ N(m_c + α s_c²/v_c (x_t - α m_c), s_c² σ²/v_c I)

        Args:
            x_t: states, shape [N, *E].
            t: times, shape [N].
            draws: number of draws for each state.
            generator: source of randomness.

        Returns:
            Shape [N, draws, *E], of x_t's dtype.
        """
        parts = zip(x_t.split(self.batch_size), t.split(self.batch_size), strict=True)
        return torch.cat([self._draw_posterior(x, s, draws, generator) for x, s in parts])

    def _draw_posterior(
        self, x_t: Tensor, t: Tensor, draws: int, generator: torch.Generator | None
    ) -> Tensor:
        N, x = len(x_t), x_t.double().flatten(1)[:, None]
        c = torch.multinomial(self.responsibilities(x_t, t), draws, replacement=True, generator=generator)
        alpha, sigma = self.process.alpha(t.double()), self.process.sigma(t.double())
        alpha, sigma = alpha[:, None, None], sigma[:, None, None]
        m, s = self.means[c], self.stds[c][..., None]
        v = alpha**2 * s**2 + sigma**2
        z = torch.randn(m.shape, generator=generator, dtype=torch.float64, device=x_t.device)
        x0 = m + alpha * s**2 / v * (x - alpha * m) + s * sigma / v.sqrt() * z
        return x0.view(N, draws, *x_t.shape[1:]).to(x_t.dtype)


def EmpiricalDenoiser(  # noqa: N802 (used like the classes beside it)
    process: Schedule, points: Tensor, batch_size: int = 4096
) -> MixtureDenoiser:
    """Exact denoiser of a finite data set: the softmax-weighted mean of its points.

        E[x0 | x_t] = Σ_j softmax_j(-|x_t - α x_j|²/(2σ²)) x_j

    A denoiser that is trained on these points, images or others, converges to it.

    Args:
        process: noise schedule.
        points: the data, shape [M, *E].
        batch_size: see `MixtureDenoiser`.
    """
    ones = torch.ones(len(points), device=points.device)
    return MixtureDenoiser(process, points, 0 * ones, ones, batch_size)
