"""The network `diffusers_unet`: diffusers' own UNet, told the timesteps that diffusers would tell it."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor

import diffrl
from diffrl.diffusion.networks import DiffusersUNet
from diffrl.errors import InputError
from diffrl.extras import MissingExtra
from tests.kit.diffusers_unets import tiny_unet

SHAPE = (1, 8, 8)


def test_its_output_is_that_of_the_unet_of_diffusers() -> None:
    """Built by hand from the same options and weights, and given integers for timesteps."""
    network = tiny_unet((3, 8, 16))
    witness = UNet2DModel(
        sample_size=(8, 16),
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    witness.load_state_dict(network.unet.state_dict())
    x, t = torch.randn(4, 3, 8, 16), torch.tensor([0, 1, 500, 999])
    with torch.no_grad():
        assert torch.equal(network(x, t.float()), witness(x, t).sample)
        assert not torch.equal(network(x, t.float() + 0.5), witness(x, t).sample)


def test_it_is_told_the_timesteps_of_diffusers() -> None:
    seen: list[Tensor] = []
    network = tiny_unet(SHAPE)
    network.unet.register_forward_pre_hook(lambda module, given: seen.append(given[1].clone()))
    denoiser = diffrl.Denoiser(
        network, diffrl.DDPM(), prediction_type="eps", time_input="t", scale_input=False
    )
    diffrl.sample(denoiser, (2, *SHAPE), sampler=diffrl.Ancestral(), num_steps=10, seed=0)
    scheduler = DDPMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    assert torch.equal(torch.stack(seen), scheduler.timesteps[:, None].expand(10, 2).float())


def test_labels_and_none() -> None:
    network = tiny_unet(SHAPE, num_classes=3)
    x, t = torch.randn(2, *SHAPE), torch.tensor([3.0, 3.0])
    with torch.no_grad():
        none = network(x, t, None)
        assert torch.equal(none, network(x, t, torch.tensor([3, 3])))
        assert not torch.equal(none, network(x, t, torch.tensor([0, 1])))
    assert network.unet.class_embedding.num_embeddings == 4
    with pytest.raises(ValueError, match="a network without labels"):
        tiny_unet(SHAPE)(x, t, torch.tensor([0, 1]))


def test_it_is_zero_at_the_start_and_every_parameter_learns() -> None:
    network = DiffusersUNet(SHAPE, block_out_channels=(8, 16), norm_num_groups=4)
    x, t = torch.randn(2, *SHAPE), torch.tensor([3.0, 400.0])
    assert not network(x, t).any()
    drawn = tiny_unet(SHAPE)
    drawn(x, t).square().sum().backward()
    assert [name for name, p in drawn.named_parameters() if p.grad is None] == []


def test_other_blocks() -> None:
    network = DiffusersUNet(
        SHAPE,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        add_attention=False,
    )
    assert network(torch.randn(1, *SHAPE), torch.ones(1)).shape == (1, *SHAPE)
    assert len(network.unet.down_blocks[1].attentions) == 1 and list(network.unet.mid_block.attentions) == [
        None
    ]


def test_a_model_file_has_its_options(tmp_path: Path) -> None:
    saved = diffrl.Denoiser(tiny_unet(SHAPE), diffrl.DDPM(), prediction_type="v", time_input="t")
    loaded = diffrl.load(diffrl.save(saved, tmp_path / "model.safetensors")).denoiser
    x, t = torch.randn(2, *SHAPE), torch.tensor([3.0, 400.0])
    with torch.no_grad():
        assert torch.equal(loaded(x, t), saved.eval()(x, t))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_out_channels": (8, 18)}, "block_out_channels is .8, 18.: give multiples of norm_num_groups"),
        ({"block_out_channels": ()}, "block_out_channels is "),
        ({"block_out_channels": (8, 8, 8, 8, 8)}, "divisible by 16"),
        ({"down_block_types": ("DownBlock2D",)}, "down_block_types has 1 names: give one for each of the 2"),
        ({"up_block_types": ("Nope", "UpBlock2D")}, "diffusers refuses this UNet2DModel .*Nope"),
        (
            {"more": {"nope": 1}},
            "more is .'nope': 1.: give options of diffusers' UNet2DModel by name, of .*act_fn",
        ),
        ({"more": {"in_channels": 1}}, "more is .'in_channels': 1.: give options"),
        ({"more": 3}, "more is 3: give options"),
        ({"more": {"act_fn": "nope"}}, "diffusers refuses this UNet2DModel .*nope"),
        ({"attention_head_dim": 64}, "attention_head_dim is 64, but a width with attention is 16"),
    ],
)
def test_what_cannot_be_built_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        DiffusersUNet(SHAPE, **{"block_out_channels": (8, 16), "norm_num_groups": 4, **options})
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="needs events"):
        DiffusersUNet((2,), block_out_channels=(8, 16), norm_num_groups=4)


def test_without_diffusers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtra, match=r"^diffusers is missing: pip install 'diffrl\[diffusers\]'$"):
        DiffusersUNet(SHAPE)
