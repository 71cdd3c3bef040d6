"""A small UNet for images, such as 1x8x8, 1x28x28 or 3x32x32."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffrl.diffusion.networks.embeddings import FourierFeatures, LabelEmbedding, of_features
from diffrl.diffusion.networks.inputs import (
    MAX_SIZE,
    check_event_shape,
    check_inputs,
    check_second_time,
    split_labels,
)
from diffrl.diffusion.networks.registry import NETWORKS, options_among
from diffrl.diffusion.networks.unet_blocks import Attention, ResidualBlock, group_norm, zero
from diffrl.errors import InputError
from diffrl.ranges import MAX_LAYERS, require_int, require_number

__all__ = ["UNet"]


def _layers(features: int, embedding: int) -> nn.Sequential:
    """From features of a noise level to their embedding."""
    return nn.Sequential(nn.Linear(features, embedding), nn.SiLU(), nn.Linear(embedding, embedding))


def _require_halves(event_shape: tuple[int, ...], resolutions: int) -> None:
    factor = 2 ** (resolutions - 1)
    if len(event_shape) != 3 or any(size % factor for size in event_shape[1:]):
        raise InputError(
            f"a UNet with {resolutions} multipliers needs events (C, H, W) with H and W divisible "
            f"by {factor}, not {event_shape}: pad the images or give fewer multipliers"
        )


def _require_widths(channels: int, multipliers: tuple[int, ...]) -> None:
    require_int("channels", channels, 4, MAX_SIZE)
    for multiplier in multipliers:
        require_int("a number of multipliers", multiplier, most=MAX_SIZE // channels)
    if channels % 4 or not multipliers:
        raise InputError(
            "a UNet needs channels that are a multiple of 4 and at least one of multipliers, "
            f"not channels={channels}, multipliers={tuple(multipliers)}"
        )


def _attentions(
    widths: list[int], heights: list[int], wanted: tuple[int, ...], head_channels: int | None
) -> nn.ModuleList:
    """What follows each block: attention at the heights that are wanted."""
    if head_channels is not None:
        require_int("head_channels", head_channels)  # where there is no attention too
    if unknown := [height for height in wanted if height not in heights]:
        raise InputError(
            f"attention_resolutions has {unknown[0]}, but images in this UNet have heights of "
            f"{', '.join(map(str, dict.fromkeys(heights)))}: give some of these"
        )
    places = zip(widths, heights, strict=True)
    return nn.ModuleList(Attention(w, head_channels) if h in wanted else nn.Identity() for w, h in places)


@NETWORKS.register("unet")
class UNet(nn.Module):
    """F_θ(x, c_noise, cond) of an image: residual blocks at several resolutions, each half the one before.

    Down: `blocks` blocks at each resolution, each leaving a skip connection, then means over 2x2 pixels. At
    the lowest resolution one more block, and attention if asked for. Up: as many blocks as down, each fed one
    skip connection, then every pixel doubled. The last convolution is 0 at the start, so that F is 0, as in
    EDM. Parameters and frequencies are drawn from torch's global generator: seed it before building.

    Args:
        event_shape: (C, H, W); H and W divisible by 2^(len(multipliers) - 1).
        num_classes: number of labels; 0 builds no label table, and `cond` must then be None.
        channels: width of the first resolution, a multiple of 4.
        multipliers: width of each resolution over `channels`; (1, 2) goes 28 → 14, (1, 2, 2) 28 → 14 → 7.
        blocks: residual blocks at each resolution on the way down, and again on the way up.
        attention: add self-attention at the lowest resolution.
        noise_features: number of Fourier features of c_noise, even.
        noise_scale: standard deviation of their phases in radians per unit of c_noise, as in `MLP`.
        dropout: share of a block's inner activations that training sets to 0, in [0, 1).
        second_time: whether it is told a second time r, as in `MLP`: two more layers on the features of c_noise_r,
            added to the embedding of c_noise and drawn last.
        variance: also predict a variance, by twice the first size of *E; see `diffrl.Denoiser.with_variance`.
        augment_dim: A, labels of augmentation that it can be told, 9 for `trainer.augment`: A numbers, each times a
            vector that is added to the embedding of c_noise, so that zeros are none. Drawn last but for attention at
            resolutions; 0 builds none.
        attention_resolutions: heights of images in pixels, such as (16,) for 32 → 16 → 8, at which each block is
            followed by self-attention, on the way down and on the way up. Drawn last of all.
        head_channels: channels of a head of attention, of which the widths with attention are multiples; None: one head
            of the whole width. Given, attention runs by a GPU's fused kernels.

    Raises:
        ValueError: an event shape that cannot be halved so often, or a size outside its range.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        num_classes: int = 0,
        channels: int = 32,
        multipliers: tuple[int, ...] = (1, 2),
        blocks: int = 1,
        attention: bool = False,
        noise_features: int = 16,
        noise_scale: float = 4.0,
        dropout: float = 0.0,
        second_time: bool = False,
        variance: bool = False,
        augment_dim: int = 0,
        attention_resolutions: tuple[int, ...] = (),
        head_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.options = options_among(locals())
        require_number("dropout", dropout, 0, 1, "[)")
        self.augment_dim = require_int("augment_dim", augment_dim, 0, MAX_SIZE)
        self.event_shape = check_event_shape(event_shape, num_classes)
        self.num_classes, self.blocks = num_classes, blocks
        self.second_time, self.predicts_variance = second_time, variance
        require_int("blocks", blocks, most=MAX_LAYERS)
        _require_widths(channels, multipliers)
        _require_halves(self.event_shape, len(multipliers))
        embedding = 4 * channels
        with of_features("noise"):
            features = FourierFeatures(1, noise_features, noise_scale)
        self.noise_embedding = nn.Sequential(features, *_layers(noise_features, embedding))
        self.label_embedding = LabelEmbedding(num_classes, embedding) if num_classes else None
        widths = [channels * multiplier for multiplier in multipliers for _ in range(blocks)]
        self.first = nn.Conv2d(self.event_shape[0], channels, 3, padding=1)
        self.down = nn.ModuleList(
            ResidualBlock(a, b, embedding, dropout) for a, b in pairwise([channels, *widths])
        )
        self.middle = ResidualBlock(widths[-1], widths[-1], embedding, dropout)
        self.attention = Attention(widths[-1], head_channels) if attention else nn.Identity()
        # a channels come from below, and b by the skip connection; the widths are those of the way down, reversed
        self.up = nn.ModuleList(
            ResidualBlock(a + b, b, embedding, dropout) for a, b in pairwise([widths[-1], *widths[::-1]])
        )
        self.norm = group_norm(widths[0])
        self.last = zero(nn.Conv2d(widths[0], (1 + variance) * self.event_shape[0], 3, padding=1))
        self.second_embedding = _layers(noise_features, embedding) if second_time else None
        self.augment_embedding = nn.Linear(augment_dim, embedding, bias=False) if augment_dim else None
        heights = [self.event_shape[1] // 2**i for i in range(len(multipliers)) for _ in range(blocks)]
        self.attend_down = _attentions(widths, heights, attention_resolutions, head_channels)
        self.attend_up = _attentions(widths[::-1], heights[::-1], attention_resolutions, head_channels)

    def forward(
        self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None, c_noise_r: Tensor | None = None
    ) -> Tensor:
        """Output of x's shape; with a variance, of twice its channels.

        Args:
            x: the scaled images, shape [N, C, H, W].
            c_noise: the noise level's code, shape [N].
            cond: integer labels in 0..num_classes, shape [N]; num_classes is the null label, None all null. With
                augment_dim also what `joined_labels` makes of them and of labels of augmentation.
            c_noise_r: the code of the second time, shape [N]; None is c_noise, that is r = t.

        Raises:
            ValueError: an argument of another shape, or labels or a second time for a network without them.
        """
        cond, augment = split_labels(cond, self.num_classes, self.augment_dim)
        check_inputs(x, c_noise, cond, self.event_shape, self.num_classes)
        check_second_time(x, c_noise_r, second_time=self.second_time)
        e = self.noise_embedding(c_noise[:, None])
        if self.label_embedding is not None:
            e = e + self.label_embedding(cond)
        if self.second_embedding is not None:
            features = self.noise_embedding[0]
            e = e + self.second_embedding(features((c_noise if c_noise_r is None else c_noise_r)[:, None]))
        if self.augment_embedding is not None and augment is not None:
            e = e + self.augment_embedding(augment.to(e.dtype))
        e = F.silu(e)

        h, skips = self.first(x), []
        for i, block in enumerate(self.down):
            if i > 0 and i % self.blocks == 0:
                h = F.avg_pool2d(h, 2)
            h = self.attend_down[i](block(h, e))
            skips.append(h)
        h = self.attention(self.middle(h, e))
        for i, block in enumerate(self.up):
            if i > 0 and i % self.blocks == 0:
                h = F.interpolate(h, scale_factor=2.0, mode="nearest")
            h = self.attend_up[i](block(torch.cat([h, skips.pop()], dim=1), e))
        return self.last(F.silu(self.norm(h)))
