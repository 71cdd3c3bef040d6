"""The curves of variance-preserving processes: α_t for t ∈ [0, 1], with σ_t = √(1-α_t²); and the discrete ones."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from diffrl.errors import InputError
from diffrl.ranges import require_number

__all__ = ["Cosine", "Curve", "LinearBeta", "Scaled", "Sigmoid", "discrete_alphas_cumprod"]


class Curve(ABC):
    """α and σ, their derivatives, and the inverse of the log-SNR; all of t's shape and dtype."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """α_t: 1 at t = 0, falling."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """√(1-α_t²), to full precision near t = 0."""

    @abstractmethod
    def alpha_dot(self, t: Tensor) -> Tensor:
        """dα/dt."""

    @abstractmethod
    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        """The time at which log(α²/σ²) has this value."""

    def sigma_dot(self, t: Tensor) -> Tensor:
        """dσ/dt, from α² + σ² = 1."""
        return -self.alpha(t) * self.alpha_dot(t) / self.sigma(t)


@dataclass(frozen=True)
class LinearBeta(Curve):
    """α_t = exp(-½ (β_min t + ½ (β_max - β_min) t²)).

    Source: Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021),
    eqs. 11 and 33, https://arxiv.org/abs/2011.13456.

    Args:
        beta_min: β at t = 0, in [1e-6, 200].
        beta_max: β at t = 1, in [beta_min, 200], where α² is still a number in float32.

    Raises:
        ValueError: an argument outside its range.
    """

    beta_min: float
    beta_max: float

    def __post_init__(self) -> None:
        require_number("beta_min", self.beta_min, 1e-6, 200)
        require_number("beta_max", self.beta_max, self.beta_min, 200)

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -0.5 * (self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t**2)

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -0.5 * (self.beta_min + (self.beta_max - self.beta_min) * t) * self.alpha(t)

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        # -2 log α = softplus(-log SNR) = β_min t + ½ (β_max - β_min) t²
        c = torch.nn.functional.softplus(-log_snr)
        b, a = self.beta_min, 0.5 * (self.beta_max - self.beta_min)
        return 2 * c / (b + (b**2 + 4 * a * c).sqrt())


@dataclass(frozen=True)
class Cosine(Curve):
    """α_t = cos(½π t), that is log SNR = -2 log tan(½π t).

    Sources: Improved Denoising Diffusion Probabilistic Models (Nichol & Dhariwal, 2021), eq. 17 without
    offset, https://arxiv.org/abs/2102.09672; simple diffusion (Hoogeboom et al., 2023), section 3.1,
    https://arxiv.org/abs/2301.11093.
    """

    def alpha(self, t: Tensor) -> Tensor:
        return (t * (math.pi / 2)).cos().clamp(min=0)  # float32 rounds π/2 up: its cosine is < 0

    def sigma(self, t: Tensor) -> Tensor:
        return (t * (math.pi / 2)).sin()

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -(math.pi / 2) * (t * (math.pi / 2)).sin()

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.atan((-log_snr / 2).exp()) * (2 / math.pi)


@dataclass(frozen=True)
class Sigmoid(Curve):
    """α_t² is a piece of the logistic curve s, moved and stretched to run from 1 to 0.

        α_t² = (s(e) - s(u)) / (s(e) - s(b)),    u = b + t (e - b),    b = start/τ,    e = end/τ

    It is evaluated through s(x) - s(y) = s(x) s(-y) (1 - e^{y-x}), which does not cancel at either end.

    Source: On the Importance of Noise Scheduling for Diffusion Models (Chen, 2023), section 2.1,
    https://arxiv.org/abs/2301.10972.

    Args:
        start: of the piece.
        end: of the piece, > start.
        tau: τ > 0; smaller is steeper.

    Raises:
        ValueError: an argument outside its range.
    """

    start: float
    end: float
    tau: float

    def __post_init__(self) -> None:
        require_number("start", self.start, -1e3, 1e3)
        require_number("end", self.end, self.start, 1e3, "(]")
        require_number("tau", self.tau, 0, 1e3, "(]")
        if not self.tau > max(abs(self.start), abs(self.end)) / 500:
            raise InputError(f"tau is {self.tau}: VP's sigmoid is then a step; give more")

    @property
    def _ends(self) -> tuple[float, float]:
        return self.start / self.tau, self.end / self.tau

    @property
    def _height(self) -> float:
        """s(e) - s(b)."""
        b, e = self._ends
        return -_s(e) * _s(-b) * math.expm1(b - e)

    def alpha(self, t: Tensor) -> Tensor:
        b, e = self._ends
        u = b + t * (e - b)
        # (s(e) - s(u)) / (s(e) - s(b))
        return (torch.sigmoid(-u) / _s(-b) * (torch.expm1((t - 1) * (e - b)) / math.expm1(b - e))).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        b, e = self._ends
        u = b + t * (e - b)
        # (s(u) - s(b)) / (s(e) - s(b))
        return (torch.sigmoid(u) / _s(e) * (torch.expm1(t * (b - e)) / math.expm1(b - e))).sqrt()

    def alpha_dot(self, t: Tensor) -> Tensor:
        b, e = self._ends
        u = b + t * (e - b)
        return -(e - b) * torch.sigmoid(u) * torch.sigmoid(-u) / (2 * self._height * self.alpha(t))

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        b, e = self._ends
        q = torch.sigmoid(-log_snr) * self._height  # s(u) - s(b)
        g = torch.sigmoid(log_snr) * self._height  # s(e) - s(u)
        t = (torch.log1p(q / _s(b)) - torch.log1p(-q / _s(-b))) / (e - b)
        rest = (torch.log1p(g / _s(-e)) - torch.log1p(-g / _s(e))) / (e - b)
        return torch.where(log_snr > 0, t, 1 - rest)  # from the nearer end, which keeps full precision


@dataclass(frozen=True)
class Scaled(Curve):
    """Another curve with its log-SNR shifted by 2 log b: the scaled state α b x0 + σ ε, divided by its scale.

        α ← b α/n,    σ ← σ/n,    n = √(b² α² + σ²)

    Sources: On the Importance of Noise Scheduling for Diffusion Models (Chen, 2023), section 2.2,
    https://arxiv.org/abs/2301.10972; as b = d_noise/d_image, simple diffusion (Hoogeboom et al., 2023),
    section 3.1, https://arxiv.org/abs/2301.11093.

    Args:
        curve: α and σ.
        scale: b ∈ [0.001, 1000].

    Raises:
        ValueError: b outside its range.
    """

    curve: Curve
    scale: float

    def __post_init__(self) -> None:
        require_number("input_scale", self.scale, 1e-3, 1e3)

    def _norm(self, t: Tensor) -> Tensor:
        return torch.hypot(self.scale * self.curve.alpha(t), self.curve.sigma(t))

    def alpha(self, t: Tensor) -> Tensor:
        return self.scale * self.curve.alpha(t) / self._norm(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.curve.sigma(t) / self._norm(t)

    def _turn(self, t: Tensor) -> Tensor:
        """Rate of the angle over the scale: b (σ' α - σ α')/n³."""
        c = self.curve
        return self.scale * (c.sigma_dot(t) * c.alpha(t) - c.sigma(t) * c.alpha_dot(t)) / self._norm(t) ** 3

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -self.curve.sigma(t) * self._turn(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return self.scale * self.curve.alpha(t) * self._turn(t)

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        return self.curve.t_from_log_snr(log_snr - 2 * math.log(self.scale))


def discrete_alphas_cumprod(kind: str, T: int, beta_start: float, beta_end: float) -> Tensor:
    """ᾱ_t = Π_{s≤t} (1-β_s) for t = 0..T-1, float64, shape [T].

        linear:         β_t evenly spaced from beta_start to beta_end
        scaled_linear:  √β_t evenly spaced from √beta_start to √beta_end
        cosine:         β_t = min(1 - f(t+1)/f(t), 0.999),    f(t) = cos²(½π (t/T + 0.008)/1.008)

    Sources: linear: Denoising Diffusion Probabilistic Models (Ho et al., 2020), section 4,
    https://arxiv.org/abs/2006.11239; scaled_linear: High-Resolution Image Synthesis with Latent Diffusion Models
    (Rombach et al., 2022) and its code, https://arxiv.org/abs/2112.10752; cosine: Improved Denoising Diffusion
    Probabilistic Models (Nichol & Dhariwal, 2021), eq. 17, https://arxiv.org/abs/2102.09672.
    """
    if kind == "cosine":
        f = ((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * (math.pi / 2)).cos() ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    elif kind == "scaled_linear":
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64) ** 2
    else:
        betas = torch.linspace(beta_start, beta_end, T, dtype=torch.float64)
    return (1 - betas).cumprod(0)


def _s(x: float) -> float:
    """The logistic function, |x| < 500."""
    return 1 / (1 + math.exp(-x))
