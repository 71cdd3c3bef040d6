"""Improved MeanFlow: MeanFlow as a regression on the data's velocity, with the bootstrap inside the prediction."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.schedules.base import Schedule
from diffrl.objectives.maps.loss import MapRows, adaptive
from diffrl.objectives.maps.mean_flow import MeanFlowLoss
from diffrl.objectives.maps.states import LogNormalPairs
from diffrl.objectives.place import Place
from diffrl.objectives.registry import OBJECTIVES
from diffrl.shapes import expand_like

__all__ = ["ImprovedMeanFlowLoss", "ImprovedMeanFlowPairs"]


class ImprovedMeanFlowPairs(LogNormalPairs):
    """`LogNormalPairs` with the settings of improved MeanFlow: r < t in half of the rows.

    Source: Improved Mean Flows: On the Challenges of Fastforward Generative Models (Geng et al., 2025),
    https://arxiv.org/abs/2512.02012, and its released code.

    Args:
        process: `Flow` or `EDM`.
        P_mean: mean of ln(σ/α), in [-15, 15].
        P_std: its standard deviation, in [0, 5].
        different: share of rows with r < t, in [0, 1].
    """

    def __init__(
        self, process: Schedule, *, P_mean: float = -0.4, P_std: float = 1.0, different: float = 0.5
    ) -> None:
        super().__init__(process, P_mean=P_mean, P_std=P_std, different=different)


@OBJECTIVES.register(
    "improved_mean_flow",
    also=ImprovedMeanFlowPairs,
    label="Improved MeanFlow",
    place=Place(
        "map",
        "states",
        "shared",
        "instant",
        "own",
        "own",
        note="along the velocity that the network predicts",
    ),
)
class ImprovedMeanFlowLoss(MeanFlowLoss):
    """Improved MeanFlow: a prediction V made of u and its derivative is regressed on the data's velocity v.

        L = w ‖V - v‖²,    V = u(x, t, r) + (t - r) sg[du/dt],    du/dt = u(x, t, t)·∂_x u + ∂_t u,
        w = 1/sg(‖V - v‖² + c)^p

    It differs from `MeanFlowLoss` in the direction of the derivative: the velocity that the network predicts, without
    gradient, in place of v. V is then a function of x, t and r alone, and v no more than noisy data for it: at the
    exact map the gradient is 0 on average for p = 0. At r = t it is flow matching with that weight. Of the
    release, the head that predicts u(x, t, t) apart, and guidance, are left out.

    Source: Improved Mean Flows: On the Challenges of Fastforward Generative Models (Geng et al., 2025),
    https://arxiv.org/abs/2512.02012, and its released code, whose p and c are the defaults.

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
        p: float = 1.0,
        c: float = 0.01,
        anneal: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        super().__init__(denoiser, p=p, c=c, anneal=anneal)

    def _losses(self, s: MapRows) -> tuple[Tensor, Tensor]:
        u, du = self._u_along(s, self._u_boot(s.x, s.t, s.t, s.cond))
        V = u + expand_like(s.t - s.r, du) * du.detach()
        δ = V - s.v
        return adaptive(δ, self.p, self.c), δ
