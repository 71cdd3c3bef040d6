"""States with two times, for losses of flow maps: noisy data at t, and a time r ≤ t where a jump from there leads."""

import torch
from tensordict import TensorDict
from torch import Tensor

from diffrl import keys
from diffrl.diffusion.schedules.base import Schedule
from diffrl.errors import InputError
from diffrl.objectives.maps.loss import require_straight
from diffrl.ranges import require_number
from diffrl.shapes import expand_like, require_data, require_finite

__all__ = ["LogNormalPairs", "UniformPairs", "map_states"]


def map_states(
    process: Schedule,
    x0: Tensor,
    t: Tensor,
    r: Tensor,
    *,
    cond: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> TensorDict:
    """Noisy data at times t, each with a second time r.

        x_t = α_t x0 + t ε,    v = α' x0 + ε

    Args:
        process: `Flow` or `EDM`, on which σ(t) = t.
        x0: clean data, floating dtype, shape [B, *E].
        t: times, not clean, shape [B].
        r: second times, 0 ≤ r ≤ t, shape [B].
        cond: conditions, shape [B, ...].
        noise: ε to use, of x0's shape.
        generator: source of ε.

    Returns:
        TensorDict of batch size [B, 1].

    Raises:
        ValueError: another process, a tensor of another shape, or an r outside [0, t].
        TypeError: x0 is no tensor, or holds integers.
    """
    require_straight(process)
    require_data(x0, cond)
    require_finite("x0", x0)
    for name, times in (("t", t), ("r", r)):
        if times.shape != x0.shape[:1]:
            raise InputError(
                f"{name} has shape {tuple(times.shape)}, expected ({len(x0)},): one for each datum"
            )
    if not bool(((r >= 0) & (r <= t) & (t > 0)).all()):
        raise InputError("r must lie in [0, t], and t above 0, in every row: a jump leads towards the data")
    if noise is None:
        noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=x0.device)
    elif noise.shape != x0.shape:
        raise InputError(f"noise has shape {tuple(noise.shape)}, expected {tuple(x0.shape)}")
    alpha, slope = (expand_like(c.to(x0.dtype), x0) for c in (process.alpha(t), process.alpha_dot(t)))
    states = {
        keys.X_T: alpha * x0 + expand_like(t.to(x0.dtype), x0) * noise,
        keys.T: t.unsqueeze(-1),
        keys.R: r.unsqueeze(-1),
        keys.X0: x0,
        keys.V: slope * x0 + noise,
    }
    if cond is not None:
        states[keys.COND] = cond
    return TensorDict(states, [len(x0)]).unsqueeze(1)


class LogNormalPairs:
    """States whose two times are drawn from one log-normal law of σ/α, the noisier one first.

        ln(σ/α) ~ N(P_mean, P_std²), twice;    r = t in a share 1 - different of the rows

    On `Flow` it is the logit-normal law of t.

    Source: Mean Flows for One-step Generative Modeling (Geng et al., 2025), Table 1 and appendix A,
    https://arxiv.org/abs/2505.13447.

    Args:
        process: `Flow` or `EDM`.
        P_mean: mean of ln(σ/α), in [-15, 15].
        P_std: its standard deviation, in [0, 5].
        different: share of rows with r < t, in [0, 1].

    Raises:
        ValueError: another process, or a number outside its range.
    """

    def __init__(
        self, process: Schedule, *, P_mean: float = -0.4, P_std: float = 1.0, different: float = 0.75
    ) -> None:
        require_straight(process)
        require_number("P_mean", P_mean, -15, 15)
        require_number("P_std", P_std, 0, 5)
        require_number("different", different, 0, 1)
        self.process, self.P_mean, self.P_std, self.different = process, P_mean, P_std, different

    def __call__(self, x0: Tensor, *, cond: Tensor | None = None, generator: torch.Generator) -> TensorDict:
        """States of data x0 [B, *E]; drawn in the order times, which rows differ, noise."""
        z = torch.randn(2, len(x0), generator=generator, dtype=x0.dtype, device=x0.device)
        return _drawn(self, self.P_mean + self.P_std * z, x0, cond, generator)


class UniformPairs:
    """States whose two times are uniform in t on `Flow`, the noisier one first; on `EDM` at the same σ/α.

        t/(1-t) = σ/α,    t ~ U(0, 1), twice;    r = t in a share 1 - different of the rows

    Source: How to build a consistency model: Learning flow maps via self-distillation (Boffi et al., 2025),
    https://arxiv.org/abs/2505.18825.

    Args:
        process: `Flow` or `EDM`.
        different: share of rows with r < t, in [0, 1].

    Raises:
        ValueError: another process, or a number outside its range.
    """

    def __init__(self, process: Schedule, *, different: float = 0.75) -> None:
        require_straight(process)
        require_number("different", different, 0, 1)
        self.process, self.different = process, different

    def __call__(self, x0: Tensor, *, cond: Tensor | None = None, generator: torch.Generator) -> TensorDict:
        """States of data x0 [B, *E]; drawn in the order times, which rows differ, noise."""
        u = torch.rand(2, len(x0), generator=generator, dtype=x0.dtype, device=x0.device)
        return _drawn(self, u.clamp(1e-6, 1 - 1e-6).logit(), x0, cond, generator)


def _drawn(
    law: LogNormalPairs | UniformPairs,
    log_nsr: Tensor,
    x0: Tensor,
    cond: Tensor | None,
    generator: torch.Generator,
) -> TensorDict:
    """States at two times of each datum, [2, B] as ln(σ/α)."""
    times = law.process.t_from_log_snr(-2 * log_nsr)
    t, r = times.amax(0), times.amin(0)
    differs = torch.rand(len(x0), generator=generator, device=x0.device) < law.different
    return map_states(law.process, x0, t, torch.where(differs, r, t), cond=cond, generator=generator)
