"""MeanFlow: the average velocity learns from its own total derivative along the path."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from diffrl.diffusion.denoisers import Denoiser
from diffrl.objectives.maps.loss import MapLoss, MapRows, adaptive
from diffrl.objectives.maps.states import LogNormalPairs
from diffrl.objectives.place import Place
from diffrl.objectives.registry import OBJECTIVES
from diffrl.ranges import require_number
from diffrl.shapes import expand_like

__all__ = ["MeanFlowLoss"]


@OBJECTIVES.register(
    "mean_flow",
    also=LogNormalPairs,
    label="MeanFlow",
    place=Place("map", "states", "shared", "instant", "own", "forward"),
)
class MeanFlowLoss(MapLoss):
    """MeanFlow: u at (t, r) is pulled to what the identity of average velocities makes of it.

        L = w ‖u - sg[v - (t - r) du/dt]‖²,    du/dt = v ∂_x u + ∂_t u,    w = 1/sg(‖·‖² + c)^p

    The norm is the sum over all dims. At r = t it is flow matching with that weight. The identity holds with the ODE's
    velocity E[v | x] in place of v. As du/dt is linear in v, the target's mean given x is right at the exact u: its
    gradient is 0 on average, for p = 0.

    Source: Mean Flows for One-step Generative Modeling (Geng et al., 2025), Algorithm 1 and eqs. 9-11, 22,
    https://arxiv.org/abs/2505.13447. Defaults are those for CIFAR-10.

    Args:
        denoiser: D of two times, on `Flow` or `EDM`; trained in place.
        p: ≥ 0, of the weight; 0 is none.
        c: > 0, of the weight.
        anneal: as in `ValueLoss`; nothing can be annealed.

    Raises:
        ValueError: an argument outside its range, another process, a denoiser without a second time.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        p: float = 0.75,
        c: float = 1e-3,
        anneal: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        require_number("p", p, 0, 4)
        require_number("c", c, 0, ends="()")
        super().__init__(denoiser, anneal=anneal)
        self.p, self.c = p, c

    def _losses(self, s: MapRows) -> tuple[Tensor, Tensor]:
        u, du = self._u_along(s, s.v)
        target = s.v - expand_like(s.t - s.r, du) * du
        δ = u - target.detach()
        return adaptive(δ, self.p, self.c), δ
