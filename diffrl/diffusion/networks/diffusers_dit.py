"""The network `diffusers_dit`: a diffusion transformer of the library diffusers, on pixels."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffrl.diffusion.networks.diffusers_options import built, further_options, told_options
from diffrl.diffusion.networks.inputs import MAX_SIZE, check_event_shape, check_inputs
from diffrl.diffusion.networks.registry import NETWORKS, options_among
from diffrl.errors import InputError
from diffrl.ranges import MAX_LAYERS, require_int, require_number

__all__ = ["DiffusersDiT"]

MODEL = "DiTTransformer2DModel"
BY_US = ("sample_size", "in_channels", "out_channels", "num_embeds_ada_norm", "norm_type")
"""Options of diffusers' that follow from the shape and the labels of the data, or have one value that works."""


@NETWORKS.register("diffusers_dit")
class DiffusersDiT(nn.Module):
    """F_θ(x, c_noise, cond) of a square image: diffusers' `DiTTransformer2DModel`, with c_noise as its timestep.

    Its sines of the timestep are made for numbers up to 1000, so give it those, as `DiffusersUNet` is given them:
    ``denoiser.time_input=c_noise_x1000``, or ``t`` with the process `ddpm`. Its layer norms are zero modulations at the
    start, so that each block is the identity, and its last layer is 0, so that F is 0. Labels have diffusers' table of
    vectors, whose last row is none; which labels are dropped in training is `trainer.label_dropout`'s to say, and not
    the model's, whose own dropping is turned off. Each block has such a table and an embedding of the timestep.
    Parameters are drawn from torch's global generator: seed it before building.

    Source: Scalable Diffusion Models with Transformers (Peebles & Xie, 2023), https://arxiv.org/abs/2212.09748; that is
    on latents of 32×32×4, and predicts a variance.

    Args:
        event_shape: (C, H, H); H divisible by patch_size.
        num_classes: number of labels; 0 is unconditional, and `cond` must then be None.
        num_layers: blocks; 28 published, and 12 in its smallest model.
        num_attention_heads: of each block; 16 published.
        attention_head_dim: channels of a head; 72 published. The width, heads × channels, is divisible by 4.
        patch_size: side of the squares of pixels that become one token.
        dropout: share of a block's inner activations that training sets to 0, in [0, 1).
        variance: also predict a variance, by twice the channels; see `diffrl.Denoiser.with_variance`.
        more: further options of `DiTTransformer2DModel` by its names; None: diffusers' defaults.

    Raises:
        MissingExtra: diffusers is not installed.
        ValueError: no square images, a size outside its range, or options that diffusers refuses.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        num_classes: int = 0,
        num_layers: int = 4,
        num_attention_heads: int = 4,
        attention_head_dim: int = 16,
        patch_size: int = 2,
        dropout: float = 0.0,
        variance: bool = False,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.options = options_among(locals())
        self.event_shape, self.num_classes = check_event_shape(event_shape, num_classes), num_classes
        self.predicts_variance = variance
        require_int("num_layers", num_layers, most=MAX_LAYERS)
        require_int("num_attention_heads", num_attention_heads, most=MAX_SIZE)
        require_int("attention_head_dim", attention_head_dim, most=MAX_SIZE // num_attention_heads)
        require_number("dropout", dropout, 0, 1, "[)")
        if num_attention_heads * attention_head_dim % 4:
            raise InputError(
                f"diffusers_dit has a width of {num_attention_heads} heads × {attention_head_dim} channels: its places "
                "have sines and cosines along two axes, so give a multiple of 4"
            )
        _require_patches(self.event_shape, require_int("patch_size", patch_size))
        C, H, _ = self.event_shape
        self.transformer = built(
            MODEL,
            "see its documentation",
            sample_size=H,
            in_channels=C,
            out_channels=(1 + variance) * C,
            num_embeds_ada_norm=num_classes,  # and one row more, for none
            num_layers=num_layers,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            patch_size=patch_size,
            dropout=dropout,
            **further_options(more, MODEL, {*self.options, *BY_US}),
        )
        _ours(self.transformer)
        modulations = [block.norm1.linear for block in self.transformer.transformer_blocks]
        for layer in (*modulations, self.transformer.proj_out_1, self.transformer.proj_out_2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @classmethod
    def of(cls, transformer: Any) -> "DiffusersDiT":
        """The network of a `DiTTransformer2DModel` that was made elsewhere; it is taken, and not copied.

        It drops no labels any more, and has the places of its patches among its weights. Twice as many channels out as
        in are a variance, as published models have it.

        Raises:
            ValueError: another number of channels out.
        """
        told = dict(transformer.config)
        C, C_out = told["in_channels"], told["out_channels"] or told["in_channels"]
        if C_out not in (C, 2 * C):
            raise InputError(
                f"this DiT has in_channels={C} and out_channels={C_out}: give one with {C}, or with {2 * C} for a "
                "variance beside what it predicts"
            )
        own = ("num_layers", "num_attention_heads", "attention_head_dim", "patch_size", "dropout")
        shape, num_classes = (C, *[told["sample_size"]] * 2), told["num_embeds_ada_norm"]
        with torch.device("meta"):  # the place of its transformer is taken
            found = cls(
                shape,
                num_classes,
                **{k: told[k] for k in own},
                variance=C_out > C,
                more=told_options(told, MODEL, {*own, *BY_US}),
            )
        _ours(transformer)
        found.transformer = transformer
        return found

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
        """Output of x's shape; with a variance, of twice its channels.

        Args:
            x: the state, shape [N, C, H, H].
            c_noise: the timestep, shape [N].
            cond: labels 0..num_classes-1, integers [N]; num_classes, as well as None, is no label.

        Raises:
            TypeError: cond holds no whole numbers.
            ValueError: another shape than that the network was built for.
        """
        check_inputs(x, c_noise, cond, self.event_shape, self.num_classes)
        if cond is None:
            cond = c_noise.new_full(c_noise.shape, self.num_classes, dtype=torch.int64)
        F_x: Tensor = self.transformer(x, timestep=c_noise, class_labels=cond, return_dict=False)[0]
        return F_x


def _require_patches(event_shape: tuple[int, ...], patch_size: int) -> None:
    if len(event_shape) != 3 or event_shape[1] != event_shape[2] or event_shape[1] % patch_size:
        raise InputError(
            f"diffusers_dit needs square images (C, H, H) with H divisible by patch_size={patch_size}, not "
            f"{event_shape}: crop or pad the images, or give another patch_size"
        )


def _ours(transformer: Any) -> None:
    """Let it draw nothing of its own, and keep the places of its patches among its weights.

    diffusers drops a tenth of the labels in training, by torch's global generator, and makes the places anew where a
    model is built, so that a model which is built without memory and then given its weights would have none.
    """
    for block in transformer.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    patches = transformer.pos_embed
    patches.register_buffer("pos_embed", patches.pos_embed, persistent=True)
