"""A small UNet for images, such as 1x8x8, 1x28x28 or 3x32x32."""

import math
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
from diffrl.errors import InputError
from diffrl.ranges import MAX_LAYERS, require_int, require_number

__all__ = ["UNet"]


def _norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with at least 4 channels in each of at most 32 groups."""
    return nn.GroupNorm(math.gcd(channels // 4, 32), channels)


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _layers(features: int, embedding: int) -> nn.Sequential:
    """From features of a noise level to their embedding."""
    return nn.Sequential(nn.Linear(features, embedding), nn.SiLU(), nn.Linear(embedding, embedding))


class _Block(nn.Module):
    """Residual block; noise level and label scale and shift the output of its second norm.

    h = conv(SiLU(norm(x))),    x ← skip(x) + conv₀(dropout(SiLU((1 + a) norm(h) + b))),    [a, b] = W e
    """

    def __init__(self, channels_in: int, channels_out: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.norm_in, self.norm_out = _norm(channels_in), _norm(channels_out)
        self.conv_in = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.conv_out = _zero(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        self.modulation = nn.Linear(embedding, 2 * channels_out)
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.conv_in(F.silu(self.norm_in(x)))
        a, b = self.modulation(e)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(b, self.norm_out(h), 1 + a)
        return self.skip(x) + self.conv_out(self.dropout(F.silu(h)))


class _Attention(nn.Module):
    """Self-attention of one head over the pixels, added to them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).mT.chunk(3, dim=-1)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.mT.reshape(x.shape))


def _require_halves(event_shape: tuple[int, ...], resolutions: int) -> None:
    factor = 2 ** (resolutions - 1)
    if len(event_shape) != 3 or any(size % factor for size in event_shape[1:]):
        raise InputError(
            f"a UNet with {resolutions} multipliers needs events (C, H, W) with H and W divisible "
            f"by {factor}, not {event_shape}: pad the images or give fewer multipliers"
        )


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
            vector that is added to the embedding of c_noise, so that zeros are none. Drawn last of all; 0 builds none.

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
    ) -> None:
        super().__init__()
        self.options = options_among(locals())
        require_number("dropout", dropout, 0, 1, "[)")
        self.augment_dim = require_int("augment_dim", augment_dim, 0, MAX_SIZE)
        self.event_shape = check_event_shape(event_shape, num_classes)
        self.num_classes, self.blocks = num_classes, blocks
        self.second_time, self.predicts_variance = second_time, variance
        require_int("blocks", blocks, most=MAX_LAYERS)
        require_int("channels", channels, 4, MAX_SIZE)
        for multiplier in multipliers:
            require_int("a number of multipliers", multiplier, most=MAX_SIZE // channels)
        if channels % 4 or not multipliers:
            raise InputError(
                "a UNet needs channels that are a multiple of 4 and at least one of multipliers, "
                f"not channels={channels}, multipliers={tuple(multipliers)}"
            )
        _require_halves(self.event_shape, len(multipliers))
        embedding = 4 * channels
        with of_features("noise"):
            features = FourierFeatures(1, noise_features, noise_scale)
        self.noise_embedding = nn.Sequential(features, *_layers(noise_features, embedding))
        self.label_embedding = LabelEmbedding(num_classes, embedding) if num_classes else None
        widths = [channels * multiplier for multiplier in multipliers for _ in range(blocks)]
        self.first = nn.Conv2d(self.event_shape[0], channels, 3, padding=1)
        self.down = nn.ModuleList(_Block(a, b, embedding, dropout) for a, b in pairwise([channels, *widths]))
        self.middle = _Block(widths[-1], widths[-1], embedding, dropout)
        self.attention = _Attention(widths[-1]) if attention else nn.Identity()
        # a channels come from below, and b by the skip connection; the widths are those of the way down, reversed
        self.up = nn.ModuleList(
            _Block(a + b, b, embedding, dropout) for a, b in pairwise([widths[-1], *widths[::-1]])
        )
        self.norm = _norm(widths[0])
        self.last = _zero(nn.Conv2d(widths[0], (1 + variance) * self.event_shape[0], 3, padding=1))
        self.second_embedding = _layers(noise_features, embedding) if second_time else None
        self.augment_embedding = nn.Linear(augment_dim, embedding, bias=False) if augment_dim else None

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
            h = block(h, e)
            skips.append(h)
        h = self.attention(self.middle(h, e))
        for i, block in enumerate(self.up):
            if i > 0 and i % self.blocks == 0:
                h = F.interpolate(h, scale_factor=2.0, mode="nearest")
            h = block(torch.cat([h, skips.pop()], dim=1), e)
        return self.last(F.silu(self.norm(h)))
