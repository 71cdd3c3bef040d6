"""The network `auto`, which is chosen by the shape of the data."""

from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.networks.registry import NETWORKS
from diffrl.diffusion.networks.unet import UNet
from diffrl.ranges import require_int

__all__ = ["auto"]


@NETWORKS.register("auto")
def auto(
    event_shape: tuple[int, ...],
    num_classes: int = 0,
    channels: int = 16,
    hidden: int = 128,
    second_time: bool = False,
    variance: bool = False,
) -> MLP | UNet:
    """A small network that fits the data: a UNet for images (C, H, W), an MLP for everything else.

    Args:
        event_shape: *E, the shape of one event.
        num_classes: number of labels; 0 is unconditional.
        channels: of the UNet.
        hidden: units of the MLP's layers.
        second_time: whether it is told a second time, see `MLP`.
        variance: also predict a variance, see `diffrl.Denoiser.with_variance`.
    """
    require_int("channels", channels)  # of the one that is not made, too
    require_int("hidden", hidden)
    if len(event_shape) == 3:
        return UNet(event_shape, num_classes, channels=channels, second_time=second_time, variance=variance)
    return MLP(event_shape, num_classes, hidden=hidden, second_time=second_time, variance=variance)
