"""EDM's augmentation of images, and the nine labels that tell a network what was done to each."""

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from diffrl.errors import InputError
from diffrl.ranges import require_number

__all__ = ["AUGMENT_LABELS", "augment", "augment_labels", "draw_augmentation", "transformed"]

AUGMENT_LABELS = 9
"""Labels of an image."""
SCALE = ANISO = 0.2  # log2 of the factors by which a2 = 1 and a5 = 1 stretch
TRANS = 1 / 8  # of width and height, by which a6 = 1 and a7 = 1 shift


def augment(x0: Tensor, p: float, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
    """Images that are randomly flipped, scaled, rotated, stretched and shifted, and what was done to each.

    A network that gets the labels learns the images as they are where its labels are 0, and does not leak the others
    into its samples.

    Source: Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), Appendix F.2,
    https://arxiv.org/abs/2206.00364. The released code differs in that it stretches half of its images along the axes
    (a4 = 0), and filters around a bilinear look-up; see `transformed` for ours.

    >>> import torch
    >>> x, labels = augment(torch.zeros(2, 3, 8, 8), 0.12, torch.Generator().manual_seed(0))
    >>> x.shape, labels.shape
    (torch.Size([2, 3, 8, 8]), torch.Size([2, 9]))

    Args:
        x0: images in [-1, 1], floating dtype, shape [N, C, H, W], on the CPU.
        p: probability of each change but the left-right flip, in [0, 1]; published are 0.12 for CIFAR-10, and 0.15
            for FFHQ and AFHQv2.
        generator: of the CPU.

    Returns:
        Images of x0's shape and dtype, and labels [N, 9] of its dtype, see `augment_labels`.

    Raises:
        ValueError: p is outside [0, 1], or x0 are no images.
    """
    require_number("p", p, 0, 1)
    a = draw_augmentation(len(x0), p, generator)
    return transformed(x0, a), augment_labels(a).to(x0.dtype)


def draw_augmentation(N: int, p: float, generator: Generator | None = None) -> Tensor:
    """Parameters a0 ... a7 of N images, independent: float64 [N, 8]; those of what is not done are 0.

        flip left-right     a0 ~ U{0, 1}, always
        flip top-bottom     a1 ~ U{0, 1}, with probability p
        scale               a2 ~ N(0, 1), with probability p
        rotate              a3 ~ U(-π, π), with probability p
        stretch             a4 ~ U(-π, π), the direction, and a5 ~ N(0, 1), together with probability p
        shift               a6, a7 ~ N(0, 1), together with probability p

    Args:
        N: images.
        p: in [0, 1].
        generator: of the CPU.
    """
    coins = torch.randint(2, (2, N), generator=generator).double()
    normal = torch.randn(4, N, generator=generator, dtype=torch.float64)
    angle = math.pi * (2 * torch.rand(2, N, generator=generator, dtype=torch.float64) - 1)
    done = (torch.rand(5, N, generator=generator, dtype=torch.float64) < p).double()
    flip, scale, rotate, stretch, shift = done
    return torch.stack(
        [
            *(coins[0], flip * coins[1], scale * normal[0], rotate * angle[0]),
            *(stretch * angle[1], stretch * normal[1], shift * normal[2], shift * normal[3]),
        ],
        dim=1,
    )


def augment_labels(a: Tensor) -> Tensor:
    """What a network is told: a0, a1, a2, cos a3 - 1, sin a3, a5 cos a4, a5 sin a4, a6, a7: 0 if nothing is done.

    Args:
        a: a0 ... a7, shape [N, 8].

    Returns:
        Labels [N, 9].
    """
    a0, a1, a2, a3, a4, a5, a6, a7 = a.unbind(1)
    return torch.stack(
        [a0, a1, a2, a3.cos() - 1, a3.sin(), a5 * a4.cos(), a5 * a4.sin(), a6, a7],
        dim=1,
    )


def transformed(x0: Tensor, a: Tensor) -> Tensor:
    """Images after flips, and after the change of place G of their pixels: y(p) = x(G⁻¹ p), p from the centre.

        G = T A R S,    S = 2^(0.2 a2),    R = rotate(-a3),
        A = rotate(a4) diag(2^(0.2 a5), 2^(-0.2 a5)) rotate(-a4),    T: p ↦ p + (W a6, H a7)/8

    with p = (x, y), x to the right and y downwards. Flips are exact, and an image with a2 ... a7 = 0 is not
    interpolated. Between pixels values are bicubic, which may leave [-1, 1] a little; beyond the edge the image is
    mirrored.

    Args:
        x0: images, floating dtype, shape [N, C, H, W].
        a: a0 ... a7, shape [N, 8].

    Raises:
        ValueError: x0 are no images, or a does not fit.
    """
    if x0.ndim != 4 or a.shape != (len(x0), 8):
        raise InputError(
            f"x0 has shape {tuple(x0.shape)} and a {tuple(a.shape)}: augmentation takes images [N, C, H, W], and 8 "
            "parameters for each"
        )
    x = torch.where(a[:, 0].bool()[:, None, None, None], x0.flip(3), x0)
    x = torch.where(a[:, 1].bool()[:, None, None, None], x.flip(2), x)
    moved = a[:, 2:].any(1)
    if bool(moved.any()):
        theta = _inverse(a[moved], *x.shape[2:]).to(x)
        grid = F.affine_grid(theta, list(x[moved].shape), align_corners=False)
        x[moved] = F.grid_sample(
            x[moved], grid, mode="bicubic", padding_mode="reflection", align_corners=False
        )
    return x


def _inverse(a: Tensor, H: int, W: int) -> Tensor:
    """[L | -L τ] for G⁻¹ p = L (p - τ), L = S⁻¹ R⁻¹ A⁻¹, in units of half the width and height: [N, 2, 3]."""
    _, _, a2, a3, a4, a5, a6, a7 = a.unbind(1)
    s = torch.exp2(ANISO * a5)
    A_inv = _rotate(a4) @ torch.diag_embed(torch.stack([1 / s, s], 1)) @ _rotate(-a4)
    L = torch.exp2(-SCALE * a2)[:, None, None] * _rotate(a3) @ A_inv
    tau = TRANS * torch.stack([W * a6, H * a7], 1)[:, :, None]
    half = a.new_tensor([W / 2, H / 2])
    return torch.cat([L * half, -L @ tau], dim=2) / half[:, None]


def _rotate(angle: Tensor) -> Tensor:
    """[[cos, -sin], [sin, cos]] of angles [N]: [N, 2, 2]."""
    c, s = angle.cos(), angle.sin()
    return torch.stack([torch.stack([c, -s], 1), torch.stack([s, c], 1)], 1)
