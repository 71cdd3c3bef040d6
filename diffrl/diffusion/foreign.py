"""Networks that were trained elsewhere, as denoisers."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.predictions import PredictionType
from diffrl.diffusion.schedules.base import Schedule
from diffrl.errors import InputTypeError
from diffrl.ranges import require_number

__all__ = ["ForeignNetwork", "wrap_network"]


class ForeignNetwork(nn.Module):
    """Calls a network as most are: ``network(x, t)``, or ``network(x, t, cond)`` where there is a condition.

    Args:
        network: returns a tensor, a tuple that begins with one, or an object with a tensor `sample`, as diffusers' do.
        time_scale: factor on t.
        whole_times: whether t is given as integers.
    """

    def __init__(self, network: Callable[..., Any], time_scale: float, *, whole_times: bool) -> None:
        super().__init__()
        self.network, self.time_scale, self.whole_times = network, time_scale, whole_times

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """The network's output, a tensor.

        Args:
            x: the state, shape [N, *E].
            t: its time, shape [N].
            cond: its condition, shape [N, ...], or None.

        Raises:
            TypeError: the network returns nothing that holds a tensor.
        """
        t = t * self.time_scale
        t = t.round().long() if self.whole_times else t
        found = self.network(x, t) if cond is None else self.network(x, t, cond)
        if isinstance(found, tuple):
            found = found[0]
        found = getattr(found, "sample", found) if not isinstance(found, Tensor) else found
        if not isinstance(found, Tensor):
            raise InputTypeError(
                f"the network returned a {type(found).__name__}: give one that returns a tensor"
            )
        return found


def wrap_network(
    network: Callable[..., Any],
    process: Schedule,
    prediction_type: PredictionType = "eps",
    *,
    sigma_data: float = 0.5,
    time_scale: float = 1.0,
) -> Denoiser:
    """A denoiser from a network that was trained elsewhere: it gets the states unscaled, and its own times.

    >>> import diffrl, torch
    >>> class Eps(torch.nn.Module):
    ...     def forward(self, x, t):
    ...         return x * t[:, None] / 1000
    >>> denoiser = diffrl.wrap_network(Eps(), diffrl.DDPM())  # ε, timesteps 0..999
    >>> x, t = torch.randn(3, 2).double(), torch.tensor([10.0, 500.0, 999.0]).double()
    >>> alpha, sigma = denoiser.process.alpha(t)[:, None], denoiser.process.sigma(t)[:, None]
    >>> torch.allclose(denoiser(x, t), (x - sigma * Eps()(x, t)) / alpha)
    True

    The same line takes a UNet of diffusers, ``diffrl.wrap_network(unet, diffrl.DDPM(1000, "linear"))``, with the betas
    of its scheduler; a velocity network of rectified flow, ``diffrl.wrap_network(net, diffrl.Flow(), "velocity")``; and
    EDM's own networks, which return D, ``diffrl.wrap_network(net, diffrl.EDM(), "x0")``.

    Args:
        network: called as ``network(x, t)``, or ``network(x, t, cond)`` where there is a condition; it returns a tensor
            of x's shape, or an object with such a tensor `sample`.
        process: the noise schedule that it was trained with.
        prediction_type: what it predicts.
        sigma_data: σd, standard deviation of the data; for the weights of losses, as it enters the estimate of no
            prediction type but "edm".
        time_scale: factor on the process's time, by which the network knows it: 1000 for a flow that was trained with
            timesteps of 0..1000, 999 for published VP networks. At 1, a process of discrete times gives integers.

    Raises:
        TypeError: no schedule, or a network that is neither a module nor a function.
        ValueError: an unknown prediction type, or a number outside its range.
    """
    if not isinstance(network, nn.Module) and not inspect.isroutine(network):
        raise InputTypeError(
            f"network is a {type(network).__name__}: give a module or a function, of a pipeline its pipe.unet"
        )
    require_number("time_scale", time_scale, 0, 1e6, "(]")
    whole = isinstance(process, Schedule) and not process.continuous and time_scale == 1
    foreign = ForeignNetwork(network, time_scale, whole_times=whole)
    return Denoiser(foreign, process, sigma_data, prediction_type, time_input="t", scale_input=False)
