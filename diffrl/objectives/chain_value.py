"""The denoiser as the value function of a chain: V(x_t) = A D(x_t, t) + κ x_t."""

from collections.abc import Mapping

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from diffrl import keys
from diffrl.shapes import expand_like

__all__ = ["ChainValue", "state_value", "value_module"]


class ChainValue(nn.Module):
    """V(x_t) = A D(x_t, t) + κ x_t on chains of any batch shape: the denoiser as a value function.

    Args:
        denoiser: D.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def denoise(self, x_t: Tensor, t: Tensor, cond: Tensor | None, *r: Tensor) -> Tensor:
        """D for states [*b, *E], times [*b, 1], conditions [*b, ...] and, of a denoiser of two times, r [*b, 1]."""
        b = t.ndim - 1
        cond = None if cond is None else cond.flatten(0, b - 1)
        ends = (end.flatten() for end in r)
        return self.denoiser(x_t.flatten(0, b - 1), t.flatten(), cond, *ends).view_as(x_t)

    def forward(self, x_t: Tensor, t: Tensor, A: Tensor, kappa: Tensor, cond: Tensor | None = None) -> Tensor:
        """V, shape [*b, *E]; the arguments are the chain's entries of the same names."""
        states = {keys.X_T: x_t, keys.A: A, keys.KAPPA: kappa}
        return state_value(states, self.denoise(x_t, t, cond))


def value_module(denoiser: nn.Module) -> TensorDictModule:
    """V of a denoiser, as losses are given it: it reads the state and writes its value."""
    inputs = [keys.X_T, keys.T, keys.A, keys.KAPPA]
    return TensorDictModule(ChainValue(denoiser), inputs, [keys.STATE_VALUE])


def state_value(states: TensorDictBase | Mapping[str, Tensor], D_x: Tensor) -> Tensor:
    """V = A D + κ x, for predictions D_x of the shape of x; with the datum for D it is the potential Φ."""
    A, kappa, x_t = states[keys.A], states[keys.KAPPA], states[keys.X_T]
    return expand_like(A, x_t) * D_x + expand_like(kappa, x_t) * x_t
