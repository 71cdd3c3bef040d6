"""The network `diffusers_dit`: diffusers' own transformer, with labels, a variance, and none of its own chance."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel

import diffrl
from diffrl.diffusion.networks import DiffusersDiT
from diffrl.errors import InputError
from diffrl.extras import MissingExtra

SHAPE = (2, 4, 4)
TINY: dict[str, Any] = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 4}


def tiny_dit(num_classes: int = 3, **options: Any) -> DiffusersDiT:
    """One whose zero layers are drawn too, so that its output says something."""
    torch.manual_seed(0)
    network = DiffusersDiT(SHAPE, num_classes, **{**TINY, **options})
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network


def test_its_output_is_that_of_the_model_of_diffusers() -> None:
    """With labels, with the row after the last for none, and with a variance in the second half of its channels."""
    network = tiny_dit(variance=True).eval()
    witness = DiTTransformer2DModel(
        **TINY, sample_size=4, in_channels=2, out_channels=4, num_embeds_ada_norm=3, patch_size=2
    ).eval()
    left = witness.load_state_dict(network.transformer.state_dict(), strict=False)
    assert left.missing_keys == [] and left.unexpected_keys == ["pos_embed.pos_embed"]  # places are computed
    x, t, labels = torch.randn(4, *SHAPE), torch.tensor([0, 1, 500, 999]), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        assert torch.equal(network(x, t.float(), labels), witness(x, t, labels).sample)
        assert torch.equal(network(x, t.float()), witness(x, t, torch.full((4,), 3)).sample)
        denoiser = diffrl.Denoiser(network, diffrl.DDPM(), prediction_type="v", time_input="t")
        D, v = denoiser.with_variance(x, t.float(), labels)
    assert D.shape == v.shape == x.shape
    taken = DiffusersDiT.of(witness)
    assert taken.options == network.options and torch.equal(
        taken.eval()(x, t.float(), labels), network(x, t.float(), labels)
    )


def test_training_draws_nothing_of_its_own_and_begins_at_zero() -> None:
    network = tiny_dit().train()
    x, t, labels = torch.randn(64, *SHAPE), torch.ones(64), torch.arange(64) % 3
    before = torch.get_rng_state()
    first = network(x, t, labels)
    assert torch.equal(first, network(x, t, labels)) and torch.equal(before, torch.get_rng_state())
    first.square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []
    fresh = DiffusersDiT(SHAPE, **TINY)
    assert not fresh(x, t).any()
    hidden = fresh.transformer.pos_embed(x)
    labels = torch.zeros(64, dtype=torch.int64)  # the only row, none
    for block in fresh.transformer.transformer_blocks:
        assert torch.equal(block(hidden, timestep=t, class_labels=labels), hidden)
    with pytest.raises(ValueError, match="a network without labels"):
        fresh(x, t, labels)


def test_a_model_file_has_its_options(tmp_path: Path) -> None:
    saved = diffrl.Denoiser(tiny_dit(0, patch_size=1), diffrl.EDM(), time_input="c_noise_x1000")
    loaded = diffrl.load(diffrl.save(saved, tmp_path / "model.safetensors")).denoiser
    x, t = torch.randn(2, *SHAPE), torch.tensor([0.1, 3.0])
    with torch.no_grad():
        assert torch.equal(loaded(x, t), saved.eval()(x, t))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"event_shape": (2, 4, 6)}, r"needs square images .* divisible by patch_size=2, not \(2, 4, 6\)"),
        ({"event_shape": (4,)}, "needs square images"),
        ({"patch_size": 3}, "divisible by patch_size=3"),
        ({"num_attention_heads": 1, "attention_head_dim": 6}, "1 heads × 6 channels: .* multiple of 4"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"more": {"sample_size": 4}}, "more is .* DiTTransformer2DModel by name, of .*attention_bias"),
        ({"more": {"activation_fn": "nope"}}, "diffusers refuses this DiTTransformer2DModel"),
    ],
)
def test_what_cannot_be_built_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        DiffusersDiT(**{"event_shape": SHAPE, **TINY, **options})
    assert "\n" not in str(error.value)


def test_other_channels_and_a_missing_extra_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    other = DiTTransformer2DModel(**TINY, sample_size=4, in_channels=2, out_channels=3, num_embeds_ada_norm=3)
    with pytest.raises(InputError, match="in_channels=2 and out_channels=3: give one with 2, or with 4"):
        DiffusersDiT.of(other)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtra, match=r"^diffusers is missing: pip install 'diffrl\[diffusers\]'$"):
        DiffusersDiT(SHAPE)
