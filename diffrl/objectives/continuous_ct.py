"""Continuous-time consistency training (sCT): the limit of neighbouring states, by a Jacobian-vector product."""

from collections.abc import Mapping, Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torch import Tensor

from diffrl import keys
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.schedules.edm import EDM
from diffrl.errors import InputError
from diffrl.objectives.chain_value import value_module
from diffrl.objectives.denoiser_loss import DenoiserLoss, rows
from diffrl.objectives.denoising import sample_log_normal_states
from diffrl.objectives.place import Place
from diffrl.objectives.registry import OBJECTIVES
from diffrl.ranges import require_number
from diffrl.shapes import event_mean, expand_like

__all__ = ["ContinuousConsistencyLoss", "sample_trigflow_states"]


def sample_trigflow_states(
    process: EDM,
    x0: Tensor,
    *,
    P_mean: float = -1.0,
    P_std: float = 1.4,
    cond: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> TensorDict:
    """One noisy state of each datum: ln σ ~ N(P_mean, P_std²), in TrigFlow's time t = arctan(σ/σd).

    They are those of `sample_log_normal_states` at the law that was published for CIFAR-10.

    Source: Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models (Lu & Song, 2025), Algorithm 1,
    https://arxiv.org/abs/2410.11081.

    Args:
        process: EDM.
        x0: clean data, floating dtype, shape [B, *E].
        P_mean: mean of ln σ, in [-15, 15].
        P_std: its standard deviation, in [0, 5].
        cond: condition of each datum, shape [B, ...].
        noise: ε to use, of x0's shape.
        generator: source of randomness; drawn in the order σ, ε.

    Raises:
        ValueError: another process, or a number outside its range.
        TypeError: x0 is no tensor, or holds integers.
    """
    _require_edm(process)
    return sample_log_normal_states(
        process, x0, P_mean=P_mean, P_std=P_std, cond=cond, noise=noise, generator=generator
    )


@OBJECTIVES.register(
    "continuous_ct",
    also=sample_trigflow_states,
    label="sCT",
    place=Place("to_clean", "states", "shared", "instant", "own", "forward"),
)
class ContinuousConsistencyLoss(DenoiserLoss):
    """sCT in TrigFlow's letters, to be fed with single states: one datum and one noise, no second state.

        t = arctan(σ/σd),    x = cos t x_σ = cos t x0 + sin t z,    z = σd ε,    dx/dt = cos t z - sin t x0
        D = cos t x - sin t σd F(x/σd, t),    dF/dt = dx/dt ∇_x F + ∂_t F
        g = -cos² t (σd F⁻ - dx/dt) - ρ cos t sin t (x + σd dF⁻/dt),    g ← g/(‖g‖ + c)
        L = w ‖F - sg(F + g)‖²/dim(E)

    With ρ = 1, before it is normalised, g = cos t dD/dt, and F + g moves D along its trajectory towards clean data:
    TD(0) of the 'clean' value under shared noise, as the step goes to 0. On `EDM` with prediction_type "edm" F is the
    network's output up to its sign; of any other form it is what the form's D amounts to. As g is linear in dx/dt,
    without normalisation its mean given x is 0 at the exact consistency function; with it the target is biased where g
    scatters. ρ warms up from 0, where g pulls F towards dx/dt as denoising does.

    The published loss has a learned weight too, w(t) of a small network, which is not here.

    Source: Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models (Lu & Song, 2025), eqs. 6-8 and
    Algorithm 1, https://arxiv.org/abs/2410.11081.

    Args:
        denoiser: D, on an EDM process; trained in place.
        c: > 0, of the normalisation.
        normalise: whether g is normalised; the norm is that of the whole event.
        warmup: share of the training in which ρ rises linearly from 0 to 1, in [0, 1]; outside of a training ρ is 1.
            The paper's is 10,000 steps of 400,000.
        prior_weight: whether w = 1/σ, or 1.
        anneal: as in `ValueLoss`; nothing can be annealed.

    Raises:
        ValueError: an argument outside its range, or another process.
    """

    fed_with = "diffrl.objectives.continuous_ct.sample_trigflow_states"
    out_keys = ["loss_value", "td_error"]
    bootstrap = "own"

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        c: float = 0.1,
        normalise: bool = True,
        warmup: float = 0.025,
        prior_weight: bool = True,
        anneal: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        require_number("c", c, 0, ends="()")
        require_number("warmup", warmup, 0, 1)
        super().__init__(value_module(denoiser), target=False, anneal=anneal)
        _require_edm(denoiser.process)
        self.c, self.normalise, self.warmup, self.prior_weight = c, normalise, warmup, prior_weight
        self.ramp = 1.0
        """ρ at present."""

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries of the states that the loss reads; cond is read where present."""
        return [keys.X_T, keys.T, keys.X0]

    def set_progress(self, step: int, grad_steps: int) -> None:
        """Give ρ its value at gradient step `step`, counted from 0, of `grad_steps`."""
        super().set_progress(step, grad_steps)
        steps = self.warmup * grad_steps
        self.ramp = min(1.0, step / steps) if steps > 0 else 1.0

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss of a batch of states [*b, 1].

        Args:
            tensordict: what `sample_trigflow_states` gives.

        Returns:
            TensorDict with the scalars ``loss_value`` and ``td_error``, the root mean square of g before it is
            normalised.

        Raises:
            KeyError: an entry is missing.
            ValueError: the batch is empty; a network that takes labels, without any.
        """
        with self._telling_what_is_missing(tensordict):
            states = rows(tensordict)
            x0 = states[keys.X0].flatten(0, 1)
        self._first_look(x0, states.get(keys.COND, None))
        F, g, raw = self._direction(states)
        self.network_evaluations += 2 * len(x0)
        loss = event_mean((F - (F + g).detach()).square(), 1)
        if self.prior_weight:
            loss = loss / states[keys.T].flatten()
        return TensorDict({"loss_value": loss.mean(), "td_error": raw.square().mean().sqrt()})

    @torch.no_grad()
    def target(self, states: TensorDictBase) -> Tensor:
        """What D is pulled to as F is to F + g, D - σd sin t g: [N, *E] of states [*b, 1].

        It stands at g's distance from D, a step along the trajectory: of what D is off by it moves a part.
        """
        given = rows(states)
        x_sigma, sigma = given[keys.X_T].flatten(0, 1), given[keys.T].flatten()
        F, g, _ = self._direction(given)
        kept = self.denoiser.sigma_data / torch.hypot(sigma, sigma.new_tensor(self.denoiser.sigma_data))
        cos, σd_sin = expand_like(kept, F), expand_like(sigma * kept, F)
        return cos**2 * x_sigma - σd_sin * (F + g)

    def _direction(self, states: TensorDictBase) -> tuple[Tensor, Tensor, Tensor]:
        """F, g, and g before it is normalised, both without gradient: [N, *E] each."""
        x_sigma, sigma, x0 = (states[key].flatten(0, 1) for key in self.in_keys)
        cond = states.get(keys.COND, None)
        cond, sigma = None if cond is None else cond.flatten(0, 1), sigma.flatten()
        σd = self.denoiser.sigma_data
        t = torch.atan2(sigma, torch.full_like(sigma, σd))
        cos, sin = expand_like(t.cos(), x0), expand_like(t.sin(), x0)
        x, z = cos * x_sigma, σd * (x_sigma - x0) / expand_like(sigma, x0)
        dx = cos * z - sin * x0
        with torch.random.fork_rng([t.device] if t.is_cuda else []), torch.no_grad():
            dF = self._derivative(x, t, dx, cond)  # the pass that trains begins where this one began
        F = self._output(x, t, cond)
        g = -(cos**2) * (σd * F.detach() - dx) - self.ramp * (cos * sin * x + σd * dF)
        raw = g
        if self.normalise:
            g = g / (expand_like(g.flatten(1).norm(dim=1), g) + self.c)
        return F, g, raw

    def _output(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        """TrigFlow's F(x/σd, t) = (cos t x - D)/(σd sin t)."""
        cos, sin = expand_like(t.cos(), x), expand_like(t.sin(), x)
        D = self.denoiser(x / cos, self.denoiser.sigma_data * t.tan(), cond)
        F: Tensor = (cos * x - D) / (self.denoiser.sigma_data * sin)
        return F

    def _derivative(self, x: Tensor, t: Tensor, dx: Tensor, cond: Tensor | None) -> Tensor:
        """The product cos t sin t dF/dt, by tangents that have that factor already: they stay finite at both ends."""
        factor = t.cos() * t.sin()
        tangents = expand_like(factor, dx) * dx, factor
        derivative: Tensor = torch.func.jvp(lambda x, t: self._output(x, t, cond), (x, t), tangents)[1]
        return derivative


def _require_edm(process: object) -> None:
    if not isinstance(process, EDM):
        raise InputError(
            f"the process is {type(process).__name__}: sCT is defined here on EDM, set process=edm"
        )
