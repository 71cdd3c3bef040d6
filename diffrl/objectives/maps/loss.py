"""What the losses of flow maps share: a denoiser of two times, asked for its average velocity."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torch import Tensor, nn

from diffrl import keys
from diffrl.diffusion.denoisers import Denoiser, require_second_time
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.errors import InputError
from diffrl.objectives.chain_value import value_module
from diffrl.objectives.denoiser_loss import DenoiserLoss, rows
from diffrl.shapes import event_mean, expand_like

__all__ = [
    "MapLoss",
    "MapRows",
    "TwoTimeLoss",
    "adaptive",
    "jump",
    "map_rows",
    "require_straight",
    "square_mean",
]


class MapRows(NamedTuple):
    """States with a second time each, one a row.

    x: states [N, *E]. t, r: their times and second ones, [N]. x0: data. v: velocity of the path of datum and noise
    through x, `(x - x0)/t`. cond: conditions [N, ...] or None. s: times between r and t, [N], and group: index of a
    group of rows, [N], where what draws the states gives them.
    """

    x: Tensor
    t: Tensor
    r: Tensor
    x0: Tensor
    v: Tensor
    cond: Tensor | None
    s: Tensor | None = None
    group: Tensor | None = None

    def pick(self, where: Tensor) -> "MapRows":
        """Those rows where a mask [N] holds."""
        return MapRows(*(None if entry is None else entry[where] for entry in self))  # type: ignore[arg-type]


class TwoTimeLoss(DenoiserLoss):
    """A loss of a two-time denoiser; a scheme gives `_of_states`.

    On a process with σ(t) = t and α linear in t, `Flow` and `EDM`, the path of a datum and a noise is straight, and

        v = (x_t - x0)/t             velocity of that path; E[v | x_t] is that of the ODE
        u = (x_t - D(x_t, t, r))/t   average velocity of the ODE from t to r,    X_{t→r} = x_t - (t - r) u

    so that one formula in u, as papers write it for flow matching, holds on both. u at r = t is the ODE's velocity.

    Args:
        denoiser: D of two times, on `Flow` or `EDM`; trained in place.
        bootstrap: what u⁻ comes from: "own", the network itself without gradient, or "target", a target network.
        anneal: options that change along the training, as in `ValueLoss`.

    Raises:
        TypeError: it is no denoiser.
        ValueError: another bootstrap, a denoiser without a second time, or another process.
    """

    out_keys = ["loss_value", "td_error"]

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        bootstrap: Literal["own", "target"] = "own",
        anneal: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        if bootstrap not in ("own", "target"):
            raise InputError(f"bootstrap is {bootstrap!r}: give 'own' or 'target'")
        require_second_time(denoiser)
        super().__init__(value_module(denoiser), target=bootstrap == "target", anneal=anneal)
        require_straight(denoiser.process)
        self.bootstrap = bootstrap

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss of a batch of states [*b, K]; unless the scheme says so, each stands for itself.

        Args:
            tensordict: what the function or class draws that the scheme names.

        Returns:
            TensorDict with the scalars ``loss_value`` and ``td_error``, the root mean square of what is compared.

        Raises:
            KeyError: an entry is missing.
            ValueError: the batch is empty; a network that takes labels, without any.
        """
        with self._telling_what_is_missing(tensordict):
            states = rows(tensordict)
            self._require_entries(states)
        self._first_look(states[keys.X0].flatten(0, 1), states.get(keys.COND, None))
        loss, δ = self._of_states(states)
        loss = self._by_importance(tensordict, states, loss)
        return TensorDict({"loss_value": loss.mean(), "td_error": δ.detach().square().mean().sqrt()})

    @abstractmethod
    def _of_states(self, states: TensorDictBase) -> tuple[Tensor, Tensor]:
        """The loss of each state of a batch [B, K], B K numbers, and the difference that it is a norm of, [N, *E]."""

    def _u(self, x: Tensor, t: Tensor, r: Tensor, cond: Tensor | None) -> Tensor:
        """u(x, t, r) of the network that is trained."""
        self.network_evaluations += len(t)
        return _average_velocity(self.denoiser, x, t, r, cond)

    @torch.no_grad()
    def _u_boot(self, x: Tensor, t: Tensor, r: Tensor, cond: Tensor | None) -> Tensor:
        """u⁻(x, t, r): of the target network where there is one, else of the network itself, without gradient."""
        self.network_evaluations += len(t)
        network: nn.Module = self.bootstrap_network.module
        return _average_velocity(network.denoiser, x, t, r, cond)


class MapLoss(TwoTimeLoss):
    """A loss of a two-time denoiser on states that stand each for itself; a scheme gives `_losses`.

    Args, formulas and errors are those of `TwoTimeLoss`.
    """

    fed_with = "diffrl.objectives.maps.states.map_states"

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries of the states that the loss reads; cond, importance, group and next.t are read where present."""
        return [keys.X_T, keys.T, keys.R, keys.X0, keys.V]

    def target(self, states: TensorDictBase) -> Tensor:
        """What D(x, t, r) is pulled to, x - t y with y = u - δ, without gradient: [N, *E] of states [*b, 1].

        Of a scheme that moves more than u by its gradient, as LSD does, y is what its condition says that u is.
        """
        s = map_rows(rows(states))
        with torch.no_grad():
            y = self._u(s.x, s.t, s.r, s.cond) - self._losses(s)[1]
        return s.x - expand_like(s.t, y) * y

    def _of_states(self, states: TensorDictBase) -> tuple[Tensor, Tensor]:
        return self._losses(map_rows(states))

    @abstractmethod
    def _losses(self, s: MapRows) -> tuple[Tensor, Tensor]:
        """The loss of each row, [N], and the difference that it is a norm of, [N, *E]."""

    def _u_along(self, s: MapRows, dx: Tensor, dt: float = 1.0, dr: float = 0.0) -> tuple[Tensor, Tensor]:
        """u(x, t, r), and its derivative along (dx, dt, dr), by one Jacobian-vector product; both have a gradient.

        du = dx·∇_x u + dt ∂_t u + dr ∂_r u
        """
        return self._along(self.denoiser, s, dx, dt, dr)

    @torch.no_grad()
    def _u_boot_along(
        self, s: MapRows, dx: Tensor, dt: float = 1.0, dr: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """u⁻(x, t, r) and its derivative along (dx, dt, dr), without gradient."""
        network: nn.Module = self.bootstrap_network.module
        u, du = self._along(network.denoiser, s, dx, dt, dr)
        return u.detach(), du.detach()

    def _along(self, denoiser: Any, s: MapRows, dx: Tensor, dt: float, dr: float) -> tuple[Tensor, Tensor]:
        self.network_evaluations += len(s.t)

        def u(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
            return _average_velocity(denoiser, x, t, r, s.cond)

        tangents = (dx, torch.full_like(s.t, dt), torch.full_like(s.r, dr))
        value, derivative = torch.func.jvp(u, (s.x, s.t, s.r), tangents)[:2]
        return value, derivative


def map_rows(states: TensorDictBase) -> MapRows:
    """States [B, 1] as rows."""
    x, t, r, x0, v = (states[key].flatten(0, 1) for key in (keys.X_T, keys.T, keys.R, keys.X0, keys.V))
    cond, s, group = (states.get(key, None) for key in (keys.COND, (keys.NEXT, keys.T), keys.GROUP))
    cond = None if cond is None else cond.flatten(0, 1)
    s, group = (None if entry is None else entry.flatten() for entry in (s, group))
    return MapRows(x, t.flatten(), r.flatten(), x0, v, cond, s, group)


def jump(x: Tensor, t: Tensor, r: Tensor, u: Tensor) -> Tensor:
    """X_{t→r} = x - (t - r) u: states [N, *E] at times t [N], moved to times r [N] by average velocities u."""
    return x - expand_like(t - r, x) * u


def require_straight(process: Schedule) -> None:
    """Refuse a process on which the path of a datum and a noise is no straight line in t with σ = t.

    Raises:
        ValueError: another process than `Flow` and `EDM`.
    """
    if not isinstance(process, EDM | Flow):
        raise InputError(
            f"flow maps are trained on straight paths, and those of {type(process).__name__} are none: set "
            "process=flow or process=edm"
        )


def _average_velocity(denoiser: Any, x: Tensor, t: Tensor, r: Tensor, cond: Tensor | None) -> Tensor:
    return (x - denoiser(x, t, cond, r)) / expand_like(t, x)


def square_mean(δ: Tensor) -> Tensor:
    """‖δ‖²/dim(E) of each row, [N, *E] → [N]."""
    return event_mean(δ.square(), 1)


def adaptive(δ: Tensor, p: float, c: float) -> Tensor:
    """Weighted squares w ‖δ‖² of each row, with w = 1/sg(‖δ‖² + c)^p and norms that sum over all dims: [N, *E] → [N].

    Source: Mean Flows for One-step Generative Modeling (Geng et al., 2025), eq. 22, https://arxiv.org/abs/2505.13447.
    """
    square = δ.square().flatten(1).sum(1)
    return square / (square.detach() + c) ** p
