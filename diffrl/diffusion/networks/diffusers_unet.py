"""The network `diffusers_unet`: a UNet of the library diffusers, built from its own options."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffrl.diffusion.networks.diffusers_options import built, further_options, told_options
from diffrl.diffusion.networks.inputs import MAX_SIZE, check_event_shape, check_inputs
from diffrl.diffusion.networks.registry import NETWORKS, options_among
from diffrl.errors import InputError
from diffrl.ranges import MAX_LAYERS, require_int, require_number

__all__ = ["DiffusersUNet"]

BY_US = ("sample_size", "in_channels", "out_channels", "num_class_embeds", "class_embed_type")
"""Options of diffusers' that follow from the shape and the labels of the data."""


@NETWORKS.register("diffusers_unet")
class DiffusersUNet(nn.Module):
    """F_θ(x, c_noise, cond) of an image: diffusers' `UNet2DModel`, with c_noise as its timestep.

    Its sines of the timestep are made for numbers up to 1000, so give it those: ``denoiser.time_input=t`` with the
    process `ddpm`, whose times are the whole numbers that diffusers' schedulers give, ``c_noise_x1000`` with others.
    c_noise reaches it as it is, neither rounded nor scaled. With ``denoiser.scale_input=false`` and a prediction type
    of diffusers' it is trained as diffusers trains it, and `diffrl.diffusion.pipelines.export_pipeline` hands it over;
    ``experiment=diffusers_ddpm`` sets all of these.

    Labels have diffusers' table of vectors, with one more row for none. Its last convolution is 0 at the start, so that
    F is 0, as in `UNet`. Parameters are drawn from torch's global generator: seed it before building.

    Args:
        event_shape: (C, H, W); H and W divisible by 2^(len(block_out_channels) - 1).
        num_classes: number of labels; 0 builds no label table, and `cond` must then be None.
        block_out_channels: width of each resolution, multiples of norm_num_groups.
        layers_per_block: residual blocks at each resolution on the way down, one more on the way up.
        down_block_types: a name of diffusers for each resolution, such as "DownBlock2D" or "AttnDownBlock2D"; none of
            them is "DownBlock2D" for all.
        up_block_types: the same on the way up, the lowest resolution first; none is "UpBlock2D" for all.
        add_attention: whether there is self-attention at the lowest resolution, in the middle.
        attention_head_dim: channels of a head of attention, of which the widths that have attention are multiples;
            None: one head of the whole width.
        norm_num_groups: of the group norms.
        norm_eps: ε of the group norms, in (0, 1].
        dropout: share of a block's inner activations that training sets to 0, in [0, 1).
        more: further options of `UNet2DModel` by its names, such as {flip_sin_to_cos: false, freq_shift: 1} of the
            UNets of DDPM; None: diffusers' defaults.

    Raises:
        MissingExtra: diffusers is not installed.
        ValueError: an event shape that cannot be halved so often, a size outside its range, or options that diffusers
            refuses together.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        num_classes: int = 0,
        block_out_channels: tuple[int, ...] = (32, 64),
        layers_per_block: int = 1,
        down_block_types: tuple[str, ...] = (),
        up_block_types: tuple[str, ...] = (),
        add_attention: bool = True,
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 8,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.options = options_among(locals())
        self.event_shape, self.num_classes = check_event_shape(event_shape, num_classes), num_classes
        require_int("layers_per_block", layers_per_block, most=MAX_LAYERS)
        require_int("norm_num_groups", norm_num_groups, most=MAX_SIZE)
        require_number("norm_eps", norm_eps, 0, 1, "(]")
        require_number("dropout", dropout, 0, 1, "[)")
        widths = [require_int("a width in block_out_channels", w, most=MAX_SIZE) for w in block_out_channels]
        if not widths or any(width % norm_num_groups for width in widths):
            raise InputError(
                f"block_out_channels is {widths}: give multiples of norm_num_groups, which is {norm_num_groups}"
            )
        _require_halves(self.event_shape, len(widths))
        if attention_head_dim is not None:
            require_int("attention_head_dim", attention_head_dim, most=MAX_SIZE)
            _require_heads(widths, down_block_types, up_block_types, add_attention, attention_head_dim)
        C, H, W = self.event_shape
        self.unet = _built(
            sample_size=H if H == W else (H, W),
            in_channels=C,
            out_channels=C,
            num_class_embeds=num_classes + 1 if num_classes else None,
            block_out_channels=tuple(widths),
            layers_per_block=layers_per_block,
            down_block_types=tuple(down_block_types) or ("DownBlock2D",) * len(widths),
            up_block_types=tuple(up_block_types) or ("UpBlock2D",) * len(widths),
            add_attention=add_attention,
            attention_head_dim=attention_head_dim,
            norm_num_groups=norm_num_groups,
            norm_eps=norm_eps,
            dropout=dropout,
            **further_options(more, "UNet2DModel", {*self.options, *BY_US}),
        )
        nn.init.zeros_(self.unet.conv_out.weight)
        nn.init.zeros_(self.unet.conv_out.bias)

    @classmethod
    def of(cls, unet: Any) -> "DiffusersUNet":
        """The network of a `UNet2DModel` that was made elsewhere, without labels; it is taken, and not copied.

        Raises:
            ValueError: it does not tell the size of its images, or is of a form that this network does not know.
        """
        told, size = dict(unet.config), unet.config.sample_size
        if size is None:
            raise InputError("this UNet tells no sample_size: set it in its config")
        sizes = (size, size) if isinstance(size, int) else tuple(size)
        named = {name: told[name] for name in inspect.signature(cls).parameters if name in told}
        more = told_options(told, "UNet2DModel", {*named, *BY_US})
        with torch.device("meta"):  # the place of its UNet is taken
            found = cls((unet.config.in_channels, *sizes), **named, more=more)
        found.unet = unet
        return found

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
        """Output of x's shape.

        Args:
            x: the state, shape [N, C, H, W].
            c_noise: the timestep, shape [N].
            cond: labels 0..num_classes-1, integers [N]; num_classes, as well as None, is no label.

        Raises:
            TypeError: cond holds no whole numbers.
            ValueError: another shape than that the network was built for.
        """
        check_inputs(x, c_noise, cond, self.event_shape, self.num_classes)
        if self.num_classes and cond is None:
            cond = c_noise.new_full(c_noise.shape, self.num_classes).long()
        if self.unet.config.time_embedding_type == "learned":  # a table
            c_noise = c_noise.round().long()
        F_x: Tensor = self.unet(x, c_noise, class_labels=cond, return_dict=False)[0]
        return F_x


def _require_halves(event_shape: tuple[int, ...], resolutions: int) -> None:
    factor = 2 ** (resolutions - 1)
    if len(event_shape) != 3 or any(size % factor for size in event_shape[1:]):
        raise InputError(
            f"diffusers_unet with {resolutions} widths in block_out_channels needs events (C, H, W) with H and W "
            f"divisible by {factor}, not {event_shape}: pad the images or give fewer widths"
        )


def _require_heads(
    widths: list[int], down: tuple[str, ...], up: tuple[str, ...], middle: bool, head_dim: int
) -> None:
    """Refuse heads that do not fill a width with attention: diffusers would leave channels out, or fail."""
    down_widths, up_widths = zip(widths, down, strict=False), zip(widths[::-1], up, strict=False)
    attended = {width for width, name in (*down_widths, *up_widths) if "Attn" in name}
    if wrong := [width for width in {*attended, *widths[-1:] * middle} if width % head_dim]:
        raise InputError(
            f"attention_head_dim is {head_dim}, but a width with attention is {wrong[0]}: give a divisor of it"
        )


def _built(**options: Any) -> Any:
    """Diffusers' UNet; what it refuses, with its reason in one line."""
    for name, types in (("down", options["down_block_types"]), ("up", options["up_block_types"])):
        if len(types) != len(options["block_out_channels"]):
            raise InputError(
                f"{name}_block_types has {len(types)} names: give one for each of the "
                f"{len(options['block_out_channels'])} widths in block_out_channels, or none"
            )
    return built("UNet2DModel", "see its documentation for the names of blocks", **options)
