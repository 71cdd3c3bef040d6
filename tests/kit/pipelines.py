"""Tiny pipelines with random weights, made on the spot: Stable Diffusion (3), latent consistency, Z-Image."""

import string
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen3Config,
    Qwen3Model,
)

PROMPTS = ["a cat", "two dogs", "red"]
TOKENS = 16
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def tokenizer() -> CLIPTokenizer:
    """Letters, one token each."""
    tokens = [*string.ascii_lowercase, *(c + "</w>" for c in string.ascii_lowercase)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS)


def text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=54,
        hidden_size=8,
        intermediate_size=16,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        eos_token_id=53,
        bos_token_id=52,
    )


def vae(**options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        **options,
    ).eval()


def unet(**options: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        **options,
    )


def lively(network: nn.Module, seed: int) -> None:
    """Random weights that make an output of order one, which depends on every input."""
    torch.manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.1)


def _sd(cls: Any, scheduler: Any, seed: int, **options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text, network = CLIPTextModel(text_config()).eval(), unet(**options).eval()
        lively(network, seed)
        pipe = cls(
            vae=vae(),
            text_encoder=text,
            tokenizer=tokenizer(),
            unet=network,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion(
    prediction_type: str = "epsilon", seed: int = 0, **options: Any
) -> StableDiffusionPipeline:
    scheduler = DDIMScheduler(
        **STABLE_DIFFUSION,
        clip_sample=False,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    return _sd(StableDiffusionPipeline, scheduler, seed, **options)


def latent_consistency() -> LatentConsistencyModelPipeline:
    """Its time scale is so small that the boundary condition is seen; at the published one, 10, it is near 1e-6."""
    scheduler = LCMScheduler(**STABLE_DIFFUSION, timestep_scaling=0.002)
    return _sd(LatentConsistencyModelPipeline, scheduler, 1, time_cond_proj_dim=8)


def stable_diffusion_3(shift: float = 3.0) -> StableDiffusion3Pipeline:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        text, text_2 = (CLIPTextModelWithProjection(text_config()).eval() for _ in range(2))
        network = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=4,
            num_attention_heads=2,
            joint_attention_dim=24,
            caption_projection_dim=8,
            pooled_projection_dim=16,
            pos_embed_max_size=8,
        ).eval()
        lively(network, 2)
        pipe = StableDiffusion3Pipeline(
            transformer=network,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
            vae=vae(shift_factor=0.06, scaling_factor=1.5),
            text_encoder=text,
            tokenizer=tokenizer(),
            text_encoder_2=text_2,
            tokenizer_2=tokenizer(),
            text_encoder_3=None,
            tokenizer_3=None,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def z_image(shift: float = 3.0) -> ZImagePipeline:
    chat = tokenizer()
    chat.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        text = Qwen3Model(
            Qwen3Config(
                vocab_size=54,
                hidden_size=8,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=4,
            )
        ).eval()
        network = ZImageTransformer2DModel(
            in_channels=4,
            dim=16,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=8,
            axes_dims=[4, 2, 2],
            axes_lens=[128, 16, 16],
        ).eval()
        lively(network, 3)
        pipe = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
            vae=vae(shift_factor=0.06, scaling_factor=1.5),
            text_encoder=text,
            tokenizer=chat,
            transformer=network,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe
