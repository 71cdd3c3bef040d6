"""Denoisers D(x_t, t) ≈ E[x0 | x_t]: what they are called with, and a network with its preconditioning.

A denoiser is any callable (x_t [N, *E], t [N], cond [N, ...] or None) → [N, *E]. One with a *second time* takes a
fourth argument r [N], has an attribute ``second_time = True``, and tells where the probability-flow ODE leads:
D(x, t, r) is the average clean estimate on the way from t to r, see `diffrl.diffusion.flow_maps`.
"""

import inspect
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from diffrl.diffusion.predictions import PredictionType, Scalings, boundary_scalings, scalings
from diffrl.diffusion.priors import Prior, PriorKind
from diffrl.diffusion.schedules.base import Schedule
from diffrl.errors import InputError, InputTypeError
from diffrl.ranges import require_number
from diffrl.shapes import expand_like, require_floating

__all__ = ["Conditioning", "Denoiser", "DenoiserFn", "require_second_time", "require_states"]

DenoiserFn = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Conditioning(NamedTuple):
    """What the times of N states come to in D = c_skip x_t + c_out F(c_in x_t, c_noise, cond, c_noise_r)."""

    c_skip: Tensor
    """[N, *1], as the next two."""
    c_out: Tensor
    c_in: Tensor
    codes: tuple[Tensor, ...]
    """c_noise [N], and c_noise_r [N] where the network is told a second time."""

    def rows(self, rows: slice) -> "Conditioning":
        """The same of some of the states."""
        c_skip, c_out, c_in, codes = self
        return Conditioning(c_skip[rows], c_out[rows], c_in[rows], tuple(c[rows] for c in codes))


class Denoiser(nn.Module):
    """A network with preconditioning: D(x_t, t) = c_skip x_t + c_out F(c_in x_t, c_noise, cond).

    What scales what: c_in scales the network's input to unit variance, for every prediction type; c_skip and c_out turn
    its output into a clean estimate. σd enters c_in always, and c_skip and c_out of "edm" and "consistency" only. A
    network that was trained on unscaled states, as published ε- and velocity-networks are, must get them unscaled: that
    is ``scale_input=False``, and `diffrl.wrap_network` makes such a denoiser in one line.

    A network of your own is a module with ``forward(x, c_noise, cond)``, x [N, *E], c_noise [N], cond [N, ...] or None,
    that returns a tensor of x's shape:

    >>> import diffrl, torch
    >>> class Mine(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layers = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.SiLU(), torch.nn.Linear(64, 2))
    ...
    ...     def forward(self, x, c_noise, cond=None):
    ...         return self.layers(torch.cat([x, c_noise[:, None]], 1))
    >>> denoiser = diffrl.Denoiser(Mine(), diffrl.EDM())
    >>> denoiser(torch.randn(5, 2), torch.full((5,), 0.3)).shape
    torch.Size([5, 2])

    A network with an attribute ``second_time = True`` is called as ``network(x, c_noise, cond, c_noise_r)`` and makes
    the denoiser one of two times, D(x_t, t, r) = c_skip x_t + c_out F(c_in x_t, c_noise(t), cond, c_noise(r)), with
    c_skip, c_out and c_in at t. At r = t it is the denoiser, and losses that know nothing of r train it there; with
    prediction_type "velocity" on `Flow`, F is MeanFlow's average velocity u(x, t, r). For derivatives in x, t and r
    there is ``torch.func.jvp``. Clean r is coded as the process' least noisy level, see `Schedule.c_noise_end`.

    Source: Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), eq. 7,
    https://arxiv.org/abs/2206.00364.

    Args:
        network: F, any module (x [N, *E], c_noise [N], cond) → [N, *E].
        process: noise schedule.
        sigma_data: σd, standard deviation of the data, in (0, 1e6].
        prediction_type: what F predicts, see `diffrl.diffusion.predictions.scalings`; or "consistency", the form of
            consistency models, for which D(x, σ_min) = x, see `diffrl.diffusion.predictions.boundary_scalings`.
        time_input: the form in which the network gets t: "c_noise" (≈ ln(σ/α)/4, of order one, as `diffrl.networks`
            want it), "c_noise_x1000" (250 ln σ, as consistency models of 64×64 images were published, for networks
            that embed timesteps up to 1000), "t" itself, or "none": F gets 0 and has to see the noise level in its
            input. c_skip, c_out and c_in know t still. What such a network can learn at best is the mean of the targets
            over the levels that its input may have, E[F* | c_in x_t], which is biased where few dims leave the level
            open: of data N(0, I) in a variance-preserving process ε̂ = E[σ_t] x_t, in place of σ_t x_t. With the types
            "edm", "v" and "velocity" it degrades gracefully; ε-networks with a deterministic sampler are published to
            fail. Source: Is Noise Conditioning Necessary for Denoising Generative Models? (Sun et al., 2025),
            https://arxiv.org/abs/2502.13129.
        scale_input: whether F gets c_in x_t; False gives it x_t.
        prior: "standard", noise N(0, I); or the noise of a prior like the data, N(m, S), of all "data" or of each
            "class", which ``denoiser.prior.fit`` measures: see `diffrl.diffusion.priors`. All of the above then holds
            of standardised states and data, so that σd is about 1. It is trained by the objective `priorgrad`.

    Raises:
        TypeError: a network that cannot be called so, or a process that is no schedule.
        ValueError: an unknown prediction type or time input, or sigma_data outside its range.
    """

    def __init__(
        self,
        network: nn.Module,
        process: Schedule,
        sigma_data: float = 0.5,
        prediction_type: PredictionType | Literal["consistency"] = "edm",
        time_input: Literal["c_noise", "c_noise_x1000", "t", "none"] = "c_noise",
        scale_input: bool = True,
        prior: PriorKind = "standard",
    ) -> None:
        super().__init__()
        if not isinstance(process, Schedule):
            raise InputTypeError(f"process is {process!r}: give a schedule such as diffrl.EDM()")
        require_number("sigma_data", sigma_data, 0, 1e6, "(]")
        if time_input not in ("c_noise", "c_noise_x1000", "t", "none"):
            raise InputError(f"time_input is {time_input!r}: give 'c_noise', 'c_noise_x1000', 't' or 'none'")
        if not isinstance(scale_input, bool):
            raise InputError(f"scale_input is {scale_input!r}: give true or false")
        _require_contract(network)
        self.network, self.process, self.sigma_data = network, process, sigma_data
        self.prediction_type, self.time_input, self.scale_input = prediction_type, time_input, scale_input
        self.prior = None if prior == "standard" else Prior(prior, network)
        self.scalings(process.time_grid(1)[:1])  # refuses an unknown type now, not later in training

    def scalings(self, t: Tensor) -> Scalings:
        """c_skip, c_out and c_in at times t; c_in is 1 without scaling of the input."""
        if self.prediction_type == "consistency":
            found = boundary_scalings(self.process, t, self.sigma_data)
        else:
            found = scalings(self.process, t, self.prediction_type, self.sigma_data)
        return found if self.scale_input else found._replace(c_in=torch.ones_like(found.c_in))

    @property
    def predicts_variance(self) -> bool:
        """Whether the network has a second output, of a variance: its attribute of the same name says so."""
        return bool(getattr(self.network, "predicts_variance", False))

    def null_condition(self, cond: Tensor) -> Tensor:
        """The condition that stands for none, of the shape of `cond`: the label after the last.

        Raises:
            ValueError: the network takes no labels.
        """
        num_classes = int(getattr(self.network, "num_classes", 0))
        if num_classes == 0:
            raise InputError("this network takes no labels, so there is none to leave out")
        return torch.full_like(cond, num_classes)

    @property
    def second_time(self) -> bool:
        """Whether the network is told a second time r."""
        return bool(getattr(self.network, "second_time", False))

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        """Clean estimate of noisy states; with r the average one on the way of the probability-flow ODE from t to r.

        Args:
            x_t: states, floating dtype, shape [N, *E].
            t: times, shape [N].
            cond: condition of each state, shape [N, ...], or None.
            r: second times, not noisier than t, clean ones included, shape [N]; None is r = t.

        Returns:
            D, of x_t's shape and dtype.

        Raises:
            TypeError: x_t is no tensor or holds integers, its dtype is not that of the network, or the network returns
                something else than a tensor.
            ValueError: t or r is not one time per state, r is given to a network without a second time, or the network
                returns another shape.
        """
        return self._outputs(x_t, t, cond, r)[0]

    def with_variance(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The clean estimate D and the network's second output v, by one evaluation, each of x_t's shape.

        v places the variance of a reverse step between two bounds, see `diffrl.diffusion.learned_variance`. A network
        with such an output returns [N, 2 E_1, *E[1:]] for states [N, E_1, *E[1:]], F first, and has the attribute
        ``predicts_variance = True``. Args and errors are those of `forward`.

        Raises:
            ValueError: the network predicts no variance.
        """
        if not self.predicts_variance:
            raise InputError("this network predicts no variance: build it with network.variance=true")
        D_x, v = self._outputs(x_t, t, cond)
        return D_x, v

    def _outputs(self, x_t: Tensor, t: Tensor, cond: Tensor | None, r: Tensor | None = None) -> list[Tensor]:
        """D, and v where the network has one."""
        require_states(x_t, t)
        if self.prior is None:
            return self._standard_outputs(x_t, t, cond, r)
        mean, std = self.prior.of(cond, x_t)
        u_t = (x_t - expand_like(self.process.alpha(t).to(x_t.dtype), x_t) * mean) / std
        D_u, *v = self._standard_outputs(u_t, t, cond, r)
        return [mean + std * D_u, *v]

    def _standard_outputs(
        self, x_t: Tensor, t: Tensor, cond: Tensor | None, r: Tensor | None
    ) -> list[Tensor]:
        """As `_outputs`, of states whose noise is N(0, I)."""
        if r is not None:
            require_second_time(self)
            require_states(x_t, r, "r")
        c_skip, c_out, c_in, codes = self.conditioning(x_t, t, r)
        F_x, *v = self.predicted(c_in * x_t, codes, cond)
        return [c_skip * x_t + c_out * F_x, *v]

    def conditioning(self, x: Tensor, t: Tensor, r: Tensor | None = None) -> Conditioning:
        """What follows from the times t [N], and r, alone, for states of x's dtype and event dims."""
        c_skip, c_out, c_in = (expand_like(c.to(x.dtype), x) for c in self.scalings(t))
        codes = [self._code(self.process.c_noise, t, x.dtype)]
        if self.second_time:
            codes.append(self._code(self.process.c_noise_end, t if r is None else r, x.dtype))
        return Conditioning(c_skip, c_out, c_in, tuple(codes))

    def predicted(self, x_in: Tensor, codes: tuple[Tensor, ...], cond: Tensor | None) -> tuple[Tensor, ...]:
        """F of scaled states [N, *E], by the codes of their times, and v where the network has one."""
        F_x = self._predict(x_in, cond, *codes).to(x_in.dtype)
        return F_x.chunk(2, dim=1) if self.predicts_variance else (F_x,)

    def _code(self, c_noise: Callable[[Tensor], Tensor], t: Tensor, dtype: torch.dtype) -> Tensor:
        """How the network is told a time."""
        if self.time_input == "none":
            return torch.zeros_like(t)
        if self.time_input == "t":
            return t
        # float32 at least: in half precision, different noise levels would become one
        code = c_noise(t).to(torch.promote_types(dtype, torch.float32))
        return 1000 * code if self.time_input == "c_noise_x1000" else code

    def _predict(self, x: Tensor, cond: Tensor | None, c_noise: Tensor, *c_noise_r: Tensor) -> Tensor:
        """F, a tensor of x's shape; F and v, one behind the other, where the network has both."""
        try:
            F_x = self.network(x, c_noise, cond, *c_noise_r)
        except RuntimeError as error:
            weights = next(self.network.parameters(), x)
            if "dtype" not in str(error) or weights.dtype == x.dtype:
                raise
            raise InputTypeError(
                f"x_t has dtype {x.dtype}, but the network's weights have {weights.dtype}: convert the data by "
                f"x0.to({weights.dtype}), or the network by denoiser.to({x.dtype})"
            ) from error
        if not isinstance(F_x, Tensor):
            raise InputTypeError(
                f"the network returned a {type(F_x).__name__}, not a tensor: give one that returns its prediction, "
                "or wrap it by diffrl.wrap_network(network, process)"
            )
        outputs = 2 if self.predicts_variance else 1
        if F_x.shape != (len(x), outputs * x.shape[1], *x.shape[2:]):
            wanted = "the same" if outputs == 1 else "twice as much in the first event dim"
            raise InputError(
                f"the network returned shape {tuple(F_x.shape)} for states of shape {tuple(x.shape)}: it must be "
                f"{wanted}; of a network that predicts a variance too, return the first half of the channels, or set "
                "its attribute predicts_variance = True"
            )
        return F_x


def _require_contract(network: nn.Module) -> None:
    """Refuse a network that cannot be called with x, c_noise and cond, as far as its signature tells."""
    try:
        signature = inspect.signature(network.forward)
    except (AttributeError, TypeError, ValueError):  # a plain function, or compiled code
        return
    second = bool(getattr(network, "second_time", False))
    names = ("x", "c_noise", "cond", *(["c_noise_r"] if second else []))
    try:
        signature.bind(*names)
    except TypeError:
        raise InputTypeError(
            f"{type(network).__name__}.forward{signature} cannot be called as network({', '.join(names)}), with "
            f"x [N, *E], c_noise [N], cond [N, ...] or None{', c_noise_r [N]' if second else ''}: give it these "
            "arguments, or wrap a network that was trained elsewhere by diffrl.wrap_network(network, process)"
        ) from None


def require_second_time(denoiser: object) -> None:
    """Check that a denoiser takes a second time r.

    Raises:
        ValueError: it does not.
    """
    if not getattr(denoiser, "second_time", False):
        raise InputError(
            f"this {type(denoiser).__name__} has no second time r: build its network with second_time=True (in a "
            "configuration network.second_time=true), or leave r out"
        )


def require_states(x_t: Tensor, t: Tensor, name: str = "t") -> None:
    """Check the arguments of a denoiser: states x_t [N, *E] and their times t [N], which errors call `name`.

    Raises:
        TypeError: x_t holds integers.
        ValueError: t is not one time for each state.
    """
    require_floating([("x_t", x_t)])
    if t.shape != x_t.shape[:1]:
        raise InputError(
            f"{name} has shape {tuple(t.shape)}, but there are {x_t.shape[0]} states: give [{x_t.shape[0]}]"
        )
