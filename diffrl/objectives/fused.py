"""Training steps without a TensorDict: the numbers of ``loss(draw(x0))``, sooner, but for what rounding leaves.

Beside a small network, TensorDicts, their checks, rewards that no target reads and the graph of the loss take as long
as the network. What runs here instead is `ValueLoss`'s arithmetic on plain tensors. The loss is quadratic in what the
network predicts, so its gradient there is written down; what all chains of a batch have in common is computed once for
the batch, and on a grid that stays once and for all.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from diffrl import keys
from diffrl.diffusion.chains import Chain
from diffrl.diffusion.denoisers import Conditioning, Denoiser
from diffrl.diffusion.trajectories import ChainSampler, by_time, draw_states
from diffrl.objectives.lookahead import Lookahead
from diffrl.objectives.td_edm import Pairs, draw_pairs, sample_td_edm_pairs
from diffrl.objectives.value import ValueLoss
from diffrl.objectives.weights import ChainTerms
from diffrl.rl.estimators import ESTIMATORS
from diffrl.rl.returns import mixed_returns
from diffrl.shapes import expand_like, require_data, require_finite

__all__ = ["FusedStep", "fused"]

Figures = tuple[Tensor, Tensor]
"""The loss, and the root mean square of δ: scalars."""


def fused(loss: object, draw: object) -> "FusedStep | None":
    """What takes the place of ``loss(draw(x0, cond=cond, generator=generator))`` in a training loop, if anything does.

    >>> import diffrl, torch
    >>> from diffrl.diffusion import Chain, ChainSampler
    >>> loss = diffrl.objectives.ValueLoss(diffrl.Denoiser(diffrl.networks.MLP((2,)), diffrl.EDM()), lmbda=0.5)
    >>> draw = ChainSampler(Chain(diffrl.EDM(), num_steps=18, coupling="markov"))
    >>> step, x0 = fused(loss, draw), 0.5 * torch.randn(8, 2)
    >>> loss_value, td_error = step(x0, cond=None, generator=torch.Generator().manual_seed(0))
    >>> out = loss(draw(x0, cond=None, generator=torch.Generator().manual_seed(0)))
    >>> torch.allclose(loss_value, out["loss_value"]) and torch.allclose(td_error, out["td_error"])
    True

    Args:
        loss: a loss of a denoiser.
        draw: what draws its states.

    Returns:
        A fused step for a `ValueLoss` on whole chains, or on the pairs of TD-EDM, with γ = 1; None for all else, and
        for subclasses, whose arithmetic is not known here.
    """
    for kind in (FusedChains, FusedPairs):
        if kind.takes(loss, draw):
            return kind(loss, draw)
    return None


class FusedStep(ABC):
    """A draw and a loss in one: `ValueLoss` in error coordinates, e_i = A_i (x0 - D(x_i)), see `fused`.

    Args:
        loss: of the denoiser.
        draw: of its states.
    """

    def __init__(self, loss: Any, draw: Any) -> None:  # noqa: ANN401 (what `takes` lets through)
        self.of: ValueLoss = loss
        self._draw, self._begun = draw, False

    @staticmethod
    @abstractmethod
    def takes(loss: Any, draw: Any) -> bool:  # noqa: ANN401
        """Whether it takes the place of that loss on what is drawn so."""

    @abstractmethod
    def draw(self, x0: Tensor, *, cond: Tensor | None, generator: Generator) -> Any:  # noqa: ANN401
        """States of data x0 [B, *E], of the same random numbers as those that it stands for."""

    @abstractmethod
    def loss(self, drawn: Any) -> Figures:  # noqa: ANN401
        """The figures of states drawn here."""

    @property
    def fits(self) -> bool:
        """Whether it takes that place still: another estimator, or a hook, may have come."""
        return self.takes(self.of, self._draw)

    def __call__(
        self,
        x0: Tensor,
        *,
        cond: Tensor | None,
        generator: Generator,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Figures:
        """The loss of a batch, and the root mean square of its δ: scalars.

        Args:
            x0: clean data, shape [B, *E].
            cond: condition of each datum, shape [B, ...].
            generator: source of randomness.
            around: what the loss is computed in, after its states are drawn: an autocast, for example.

        Raises:
            TypeError, ValueError: as draw and loss.
        """
        if not self._begun:
            self._begin(x0)
            self._begun = True
        drawn = self.draw(x0, cond=cond, generator=generator)
        with around():
            return self.loss(drawn)

    def _begin(self, x0: Tensor) -> None:
        """What is done once, before the first step."""
        for hook in self.of._forward_pre_hooks.values():  # TorchRL's looks for a forgotten updater
            hook(self.of, ())

    def _denoise(
        self, denoiser: Denoiser, x: Tensor, by: Conditioning, cond: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """F [B K, *E] of a network, and D [B, K, *E] without gradient, at states x whose conditions are [B, K, ...]."""
        (code, *_), cond = by.codes, None if cond is None else cond.flatten(0, 1)
        self.of.network_evaluations += len(code)
        F_x = denoiser.predicted((by.c_in * x).flatten(0, 1), by.codes, cond)[0]
        return F_x, by.c_skip * x + by.c_out * F_x.detach().view_as(x)

    @torch.no_grad()
    def _denoise_next(self, x: Tensor, by: Conditioning, cond: Tensor | None) -> Tensor:
        """D⁻ of the target network."""
        return self._denoise(self.of.bootstrap_network.module.denoiser, x, by, cond)[1]

    def _terms(self, x: Tensor, steps: Mapping[str, Any], c_out: Tensor) -> "_Terms":
        """Of states x [B, K, *E], whose c_out is [B or 1, K, *1]."""
        terms = ChainTerms(steps, self.of.denoiser, c_out=c_out.view(*steps[keys.T].shape))
        w, q = self.of.coefficients(steps, terms)
        A, w, slope = expand_like(terms.A, x), expand_like(w, x), 2 / x.numel() * c_out
        q = None if q is None else expand_like(q, x)
        return _Terms(A, w, q, -slope * (w * A), None if q is None else slope * q)

    @property
    def _bootstraps(self) -> bool:
        return self.of.bootstrap_share > 0 and not self.of.is_monte_carlo


class _Terms(NamedTuple):
    """Numbers of states [B, K], ready to multiply states [B, K, *E]."""

    A: Tensor
    w: Tensor
    """The weights of ‖δ‖² and of ‖x0 - D‖², see `ValueLoss.coefficients`."""
    q: Tensor | None
    by_δ: Tensor
    """The slope of the loss in F is by_δ δ + by_error (D - x0):  by_δ = -2 w A c_out/(B K dim(E))."""
    by_error: Tensor | None
    """2 q c_out/(B K dim(E))."""

    def figures(self, F_x: Tensor, δ: Tensor, error: Tensor) -> Figures:
        """The loss, as a function of F [B K, *E], and the root mean square of δ; the error is D - x0."""
        square = δ.square()
        loss, slope = self.w * square, self.by_δ * δ
        if self.q is not None and self.by_error is not None:
            loss.addcmul_(self.q, error.square())
            slope.addcmul_(self.by_error, error)
        return _WithSlope.apply(F_x, loss.mean(), slope.reshape(F_x.shape)), square.mean().sqrt()


class _WithSlope(Function):
    """A loss whose gradient in x is known, in place of the nodes of its formula."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, slope: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(slope)
        return loss.view_as(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None


class _Levels(NamedTuple):
    """What all chains of a batch of B have in common, K steps of each."""

    table: Tensor
    """As `draw_states` wants it."""
    left: Conditioning
    """Of the states left: [K, *1], and the codes [B K]."""
    reached: Conditioning | None
    """Of the states reached, without the clean one, where a target network looks at them: [K-1, *1] and [B (K-1)]."""
    A_next: Tensor
    """Of the states reached, [1, K, *1]."""
    next: dict[str, Any]
    """t and A of the states reached."""
    terms: _Terms


class _Chains(NamedTuple):
    x0: Tensor
    """[B, *E]."""
    x: Tensor
    """The states left, [B, K, *E]."""
    cond: Tensor | None
    """[B, K, ...]."""
    levels: _Levels


class FusedChains(FusedStep):
    """On the whole chains of a `ChainSampler`."""

    def __init__(self, loss: Any, draw: Any) -> None:  # noqa: ANN401
        super().__init__(loss, draw)
        self._kept: tuple[tuple[Any, ...], _Levels] | None = None

    @staticmethod
    def takes(loss: Any, draw: Any) -> bool:  # noqa: ANN401
        if type(draw) is not ChainSampler or not draw.whole or not _is_plain(loss):
            return False
        lmbda = getattr(loss.value_estimator, "lmbda", None)
        return loss.bootstrap != "residual" and (not callable(lmbda) or isinstance(lmbda, Lookahead))

    def draw(self, x0: Tensor, *, cond: Tensor | None, generator: Generator) -> _Chains:
        require_data(x0, cond)
        levels = self._levels(self._draw.next_chain(generator), x0)
        B, K, *E = len(x0), levels.table.shape[1] - 1, *x0.shape[1:]
        noise = torch.randn(B, K, *E, generator=generator, device=x0.device, dtype=x0.dtype)
        x = draw_states(levels.table, x0, noise)[:-1].transpose(0, 1)
        if cond is not None:
            cond = cond.unsqueeze(1).expand(B, K, *cond.shape[1:])
        return _Chains(x0, x, cond, levels)

    def loss(self, drawn: _Chains) -> Figures:
        """The loss of the chains, and the root mean square of their δ_i = e_i - G_i, with G of the e that follow."""
        x0, x, cond, levels = drawn[0].unsqueeze(1), *drawn[1:]
        self.of.look_at(x, x0, cond)
        e_next = self._errors_next(x0, x, cond, levels) if self._bootstraps else None
        F_x, D_x = self._denoise(self.of.denoiser, x, levels.left, cond)
        error = D_x - x0
        δ = e = levels.terms.A * -error
        if self._bootstraps:
            if e_next is None:  # the state reached is the one left by the next step
                e_next = e.roll(-1, 1)
            G = self.of.value_estimator.returns(None, e_next, None, None, levels.next)
            δ = e - mixed_returns(G, self.of.bootstrap_share, None, None)
        return levels.terms.figures(F_x, δ, error)

    def _errors_next(self, x0: Tensor, x: Tensor, cond: Tensor | None, levels: _Levels) -> Tensor | None:
        """Errors e of the states reached, by the target network if there is one; 0 where they are clean."""
        K = x.shape[1]
        if levels.reached is None:
            return None
        D_next = torch.zeros_like(x)
        if K > 1 and not self.of.value_estimator.is_monte_carlo(K):
            later = None if cond is None else cond[:, 1:]
            D_next[:, :-1] = self._denoise_next(x[:, 1:], levels.reached, later)
        return levels.A_next * (x0 - D_next)

    def _levels(self, chain: Chain, x0: Tensor) -> _Levels:
        loss, denoiser = self.of, self.of.denoiser
        key = (chain, loss._weight, loss.denoising_coef, x0.shape, x0.dtype, x0.device, *_settings(denoiser))
        if self._kept is not None and self._kept[0] == key:
            return self._kept[1]
        B, K, table = len(x0), chain.num_transitions, chain.table.to(x0)
        t, A, *_ = table.unbind()

        def row(k: slice) -> dict[str, Any]:
            return {keys.T: t[k].view(1, K, 1), keys.A: A[k].view(1, K, 1)}

        left, following = row(slice(-1)), row(slice(1, None))
        by = denoiser.conditioning(x0, t[:-1])
        reached = by.rows(slice(1, None)) if loss.bootstrap == "target" else None
        states = x0.unsqueeze(1).expand(B, K, *x0.shape[1:])
        levels = _Levels(
            by_time(table[:, None, :, None], x0),
            _repeated(by, B),
            None if reached is None else _repeated(reached, B),
            expand_like(following[keys.A], states),
            following,
            self._terms(states, {**left, keys.NEXT: following, keys.X0: x0}, by.c_out[None]),
        )
        stays = chain is self._draw.chain and not torch.is_inference_mode_enabled()
        self._kept = (key, levels) if stays else None
        return levels


def _repeated(by: Conditioning, B: int) -> Conditioning:
    """Of B times as many states: the numbers broadcast, the codes do not."""
    return by._replace(codes=tuple(c.repeat(B) for c in by.codes))


class _Drawn(NamedTuple):
    x0: Tensor
    """[B, 1, *E]."""
    pairs: Pairs
    cond: Tensor | None
    """[B, 1, ...]."""


class FusedPairs(FusedStep):
    """On the pairs of `sample_td_edm_pairs`, given with its process and perhaps options."""

    def __init__(self, loss: Any, draw: Any) -> None:  # noqa: ANN401
        super().__init__(loss, draw)
        given = signature(draw.func).bind_partial(*draw.args, **draw.keywords)
        given.apply_defaults()
        names = signature(draw_pairs).parameters.keys() - {"x0", "generator"}
        self._options = {name: value for name, value in given.arguments.items() if name in names}

    @staticmethod
    def takes(loss: Any, draw: Any) -> bool:  # noqa: ANN401
        if not isinstance(draw, partial) or draw.func is not sample_td_edm_pairs or len(draw.args) > 1:
            return False
        return (
            _is_plain(loss)
            and loss.bootstrap == "target"
            and getattr(loss.value_estimator, "n_steps", 0) == 1
        )

    def _begin(self, x0: Tensor) -> None:
        super()._begin(x0)
        self._draw(x0[:1], generator=Generator(x0.device))  # refuses options

    def draw(self, x0: Tensor, *, cond: Tensor | None, generator: Generator) -> _Drawn:
        require_data(x0, cond)
        require_finite("x0", x0)
        pairs = draw_pairs(x0=x0, generator=generator, **self._options)
        return _Drawn(x0.unsqueeze(1), pairs, None if cond is None else cond.unsqueeze(1))

    def loss(self, drawn: _Drawn) -> Figures:
        """The loss of the pairs, and the root mean square of their δ = e - e'."""
        x0, pairs, cond = drawn
        B, loss = len(x0), self.of
        loss.look_at(pairs.x, x0, cond)
        by = loss.denoiser.conditioning(x0, torch.cat([pairs.t, pairs.t_next]).flatten())
        left, reached = by.rows(slice(B)), by.rows(slice(B, None))
        steps: dict[str, Any] = {keys.T: pairs.t, keys.A: pairs.A, keys.X0: x0, keys.VALID: pairs.valid}
        steps[keys.NEXT] = {keys.T: pairs.t_next, keys.A: pairs.A_next}
        terms = self._terms(pairs.x, steps, left.c_out)
        e_next = None
        if self._bootstraps:
            D_next = self._denoise_next(pairs.x_next, reached, cond)
            e_next = loss.bootstrap_share * (expand_like(pairs.A_next, x0) * (x0 - D_next))
        F_x, D_x = self._denoise(loss.denoiser, pairs.x, left, cond)
        error = D_x - x0
        e = terms.A * -error
        return terms.figures(F_x, e if e_next is None else e - e_next, error)


def _is_plain(loss: Any) -> bool:
    """Whether the arithmetic of a loss and of its denoiser is that of this library, at γ = 1."""
    if type(loss) is not ValueLoss or type(loss.denoiser) is not Denoiser or _is_watched(loss):
        return False
    estimator, denoiser = loss.value_estimator, loss.denoiser
    fixed = denoiser.prior is None and not isinstance(denoiser.process, nn.Module)
    return fixed and type(estimator) in ESTIMATORS.values() and estimator.gamma == 1


def _is_watched(loss: ValueLoss) -> bool:
    """Whether a call that is left out has been replaced, or is listened to (TorchRL itself looks for an updater)."""
    network = loss.value_network
    for m, hooks in ((loss, 1), (network, 0), (network.module, 0), (network.module.denoiser, 0)):
        if "forward" in vars(m) or m._forward_hooks or len(m._forward_pre_hooks) > hooks:
            return True
    return False


def _settings(denoiser: Denoiser) -> tuple[Any, ...]:
    """What the conditioning follows from beside the times."""
    return (
        denoiser.process,
        denoiser.prediction_type,
        denoiser.sigma_data,
        denoiser.scale_input,
        denoiser.time_input,
    )
