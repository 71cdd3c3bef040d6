"""Priors like the data: noise whose mean and scale are those of the data, or of each class of them."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from diffrl.errors import InputError

__all__ = ["Prior", "PriorKind"]

PriorKind = Literal["standard", "data", "class"]
FLOOR = 0.1  # least std of a coordinate, relative to the root mean square of all


class Prior(nn.Module):
    """The prior N(m, S), S diagonal: what a chain starts from, and the law of its noise.

        x_t = α_t x0 + σ_t S^½ z,    start at α_T m + σ_T S^½ z
        u_t = S^-½ (x_t - α_t m) = α_t u0 + σ_t z,    u0 = S^-½ (x0 - m)

    The published state is x_t - α_t m, which holds the same. In u it is the standard process of standardised data, so
    that a denoiser of u is one of x, D = m + S^½ D_u, and every sampler draws from it, once its noise is S^½ z.

    Source: PriorGrad: Improving Conditional Denoising Diffusion Models with Data-Dependent Adaptive Prior (Lee et al.,
    2022), section 3, https://arxiv.org/abs/2106.06406. There m and S are statistics of a frame or phoneme.

    Args:
        kind: "data", one for all, or "class", one for each label and, where there is none, that of all.
        network: what the denoiser calls; its event_shape and num_classes are those of the prior.

    Attributes:
        mean, std: m and the root of S of each class and, last, of all data, shape [C+1, *E] (or [1, *E]).

    Raises:
        ValueError: another kind, a network that does not tell its event_shape, or classes of one without labels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, kind: str, network: nn.Module) -> None:
        super().__init__()
        if kind not in ("data", "class"):
            raise InputError(f"prior is {kind!r}: give 'standard', 'data' or 'class'")
        event_shape, classes = getattr(network, "event_shape", None), int(getattr(network, "num_classes", 0))
        if event_shape is None:
            raise InputError(f"prior is {kind!r}, but the network has no attribute event_shape: give it one")
        if kind == "class" and classes == 0:
            raise InputError("prior is 'class', but the network takes no labels: set data.conditional=true")
        self.kind, rows = kind, classes + 1 if kind == "class" else 1
        self.register_buffer("mean", torch.zeros(rows, *event_shape))
        self.register_buffer("std", torch.ones(rows, *event_shape))

    def fit(self, x0: Tensor, labels: Tensor | None = None) -> None:
        """Take the mean and the std of each coordinate, the latter at least 0.1 of the root mean square of all.

        Args:
            x0: data, shape [M, *E].
            labels: their classes, int64 [M], for the kind "class".

        Raises:
            ValueError: classes without labels, or a class of less than two data.
        """
        if self.kind == "class" and labels is None:
            raise InputError("prior is 'class', but these data have no labels: give them, or prior='data'")
        least = FLOOR * float(x0.double().var(0, correction=0).mean().sqrt())
        for c in range(len(self.mean)):
            own = x0.double() if labels is None or c == len(self.mean) - 1 else x0[labels == c].double()
            if len(own) < 2:
                raise InputError(f"class {c} has {len(own)} data: two at least have a standard deviation")
            self.mean[c] = own.mean(0)
            self.std[c] = own.std(0, correction=0).clamp(min=least)

    def of(self, cond: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean m and S^½ for states x [N, *E] with labels cond [N], or None: [N, *E] or [1, *E], of x's dtype."""
        if self.kind == "class" and cond is not None:
            return self.mean[cond].to(x), self.std[cond].to(x)
        return self.mean[-1:].to(x), self.std[-1:].to(x)

    def colour(self, noise: Callable[[Tensor], Tensor], cond: Tensor | None) -> Callable[[Tensor], Tensor]:
        """The source S^½ z of noise, from a source of z."""

        def coloured(x: Tensor) -> Tensor:
            return self.of(cond, x)[1] * noise(x)

        return coloured
