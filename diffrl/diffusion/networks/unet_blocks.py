"""What a UNet consists of: residual blocks, self-attention, and group norms that are safe in half precision."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffrl.errors import InputError
from diffrl.ranges import require_int

__all__ = ["Attention", "GroupNorm", "ResidualBlock", "group_norm", "zero"]

HALVES = (torch.bfloat16, torch.float16)


class GroupNorm(nn.GroupNorm):
    """y = γ (x - mean)/√(var + ε) + β, with mean and variance over the pixels and channels of a group.

    Of half-precision x they are computed and applied in float32, on every device, and y is rounded once. A GPU's
    kernel rounds them to the precision of x in between: a mean of 300 is then known to ±1 in bfloat16.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Of x [N, C, ...], in its shape and dtype."""
        if x.dtype not in HALVES:
            return super().forward(x)
        weight, bias = self.weight.float(), self.bias.float()
        return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)


def group_norm(channels: int) -> GroupNorm:
    """With at least 4 channels in each of at most 32 groups."""
    return GroupNorm(math.gcd(channels // 4, 32), channels)


def zero(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer, which begins as 0."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """Residual block; noise level and label scale and shift the output of its second norm.

    h = conv(SiLU(norm(x))),    x ← skip(x) + conv₀(dropout(SiLU((1 + a) norm(h) + b))),    [a, b] = W e

    Args:
        channels_in: of x.
        channels_out: of the result.
        embedding: size of e.
        dropout: share of inner activations that training sets to 0.
    """

    def __init__(self, channels_in: int, channels_out: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.norm_in, self.norm_out = group_norm(channels_in), group_norm(channels_out)
        self.conv_in = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.conv_out = zero(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        self.modulation = nn.Linear(embedding, 2 * channels_out)
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """Of x [N, channels_in, H, W] and e [N, embedding]: [N, channels_out, H, W]."""
        h = self.conv_in(F.silu(self.norm_in(x)))
        a, b = self.modulation(e)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(b, self.norm_out(h), 1 + a)
        return self.skip(x) + self.conv_out(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """Self-attention over the pixels, added to them: x + W₀ softmax(q kᵀ/√d) v, for each head of d channels.

    Args:
        channels: of x.
        head_channels: d, a divisor of them; None is one head of them all.

    Raises:
        ValueError: head_channels is no divisor.
    """

    def __init__(self, channels: int, head_channels: int | None = None) -> None:
        super().__init__()
        if head_channels is not None and channels % require_int("head_channels", head_channels):
            raise InputError(
                f"head_channels is {head_channels}, but a width with attention is {channels}: give a divisor of it"
            )
        self.head_channels = head_channels
        self.heads = 1 if head_channels is None else channels // head_channels
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Of x [N, channels, H, W], of its shape."""
        q, k, v = self.qkv(self.norm(x)).flatten(2).mT.chunk(3, dim=-1)
        if self.head_channels is None:
            h = F.scaled_dot_product_attention(q, k, v)
        else:  # [N, heads, H W, d], of which GPUs have fused kernels
            q, k, v = (a.unflatten(-1, (-1, self.head_channels)).transpose(1, 2) for a in (q, k, v))
            h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        return x + self.out(h.mT.reshape(x.shape))
