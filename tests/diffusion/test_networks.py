import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffrl.diffusion.networks.embeddings import FourierFeatures, LabelEmbedding
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.networks.registry import NETWORKS
from diffrl.diffusion.networks.unet import UNet

OBLONG = {
    "channels": 8,
    "multipliers": (2, 1, 3),
    "blocks": 2,
    "attention_resolutions": (2,),
    "head_channels": 4,
}
CASES = [
    pytest.param(MLP, (2,), {}, id="mlp-2"),
    pytest.param(MLP, (16,), {"x_features": 0, "depth": 1}, id="mlp-16-plain"),
    pytest.param(MLP, (1, 4, 4), {"hidden": 32, "num_classes": 3}, id="mlp-image-labels"),
    pytest.param(UNet, (1, 8, 8), {"channels": 8, "num_classes": 3}, id="unet-8-labels"),
    pytest.param(UNet, (1, 16, 16), {"channels": 8, "blocks": 2, "attention": True}, id="unet-16-attention"),
    pytest.param(UNet, (1, 28, 28), {"channels": 4, "multipliers": (1, 2, 2)}, id="unet-28"),
    pytest.param(UNet, (3, 32, 32), {"channels": 4, "multipliers": (1,)}, id="unet-32-flat"),
    pytest.param(UNet, (2, 4, 12), OBLONG, id="unet-oblong"),
]
networks = pytest.mark.parametrize(("kind", "shape", "options"), CASES)


def build(kind: type[nn.Module], shape: tuple[int, ...], options: dict, *, seed: int = 0) -> nn.Module:
    """A network whose zero-initialised layers are drawn too, so that its output says something."""
    torch.manual_seed(seed)
    network = kind(shape, **options)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def inputs(network: Any, N: int = 5, *, seed: int = 1) -> tuple[Tensor, Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(seed)
    cond = torch.randint(network.num_classes + 1, (N,), generator=g) if network.num_classes else None
    return torch.randn(N, *network.event_shape, generator=g), torch.randn(N, generator=g), cond


def test_registry() -> None:
    assert NETWORKS["mlp"] is MLP and NETWORKS["unet"] is UNet
    assert isinstance(NETWORKS["auto"]((1, 8, 8)), UNet) and isinstance(NETWORKS["auto"]((64,)), MLP)


def test_import_is_light() -> None:
    code = "import sys; from diffrl import networks; sys.exit('torchrl' in sys.modules or 'tensordict' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@networks
def test_output_is_zero_at_the_start_and_of_the_shape_of_x(
    kind: type[nn.Module], shape: tuple[int, ...], options: dict
) -> None:
    network = kind(shape, **options)
    x, c_noise, cond = inputs(network)
    torch.testing.assert_close(network(x, c_noise, cond), torch.zeros_like(x), rtol=0, atol=0)
    assert network(x[:1], c_noise[:1], None).shape == (1, *shape)
    assert network(x[:0], c_noise[:0], None).shape == (0, *shape)


@networks
def test_gradient_reaches_every_parameter_and_input(
    kind: type[nn.Module], shape: tuple[int, ...], options: dict
) -> None:
    network = build(kind, shape, options)
    x, c_noise, _ = inputs(network)
    cond = torch.arange(5) % (network.num_classes + 1) if network.num_classes else None
    x.requires_grad_(), c_noise.requires_grad_()
    network(x, c_noise, cond).square().sum().backward()
    missing = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []
    # each row's output depends on its own x and noise level
    assert (x.grad.flatten(1).abs().sum(1) > 0).all() and (c_noise.grad.abs() > 0).all()


@networks
def test_the_zero_start_is_left_by_every_parameter(
    kind: type[nn.Module], shape: tuple[int, ...], options: dict
) -> None:
    torch.manual_seed(0)
    network = kind(shape, **options).double()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    x, c_noise, _ = inputs(network)
    cond = torch.arange(5) % (network.num_classes + 1) if network.num_classes else None
    for _ in range(3):  # the last layer moves first, then the zero layers of the blocks, then the others
        optimiser.zero_grad()
        (network(x.double(), c_noise.double(), cond) - x).square().mean().backward()
        optimiser.step()
    assert [name for name, p in network.named_parameters() if torch.equal(p, before[name])] == []


@networks
def test_rows_do_not_mix(kind: type[nn.Module], shape: tuple[int, ...], options: dict) -> None:
    network = build(kind, shape, options).double()
    x, c_noise, cond = inputs(network)
    x, c_noise = x.double(), c_noise.double()
    y = network(x, c_noise, cond)
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = network(x[order], c_noise[order], None if cond is None else cond[order])
    torch.testing.assert_close(shuffled, y[order])
    alone = network(x[2:3], c_noise[2:3], None if cond is None else cond[2:3])
    torch.testing.assert_close(alone, y[2:3])


@networks
def test_state_dict_round_trip_is_exact(kind: type[nn.Module], shape: tuple[int, ...], options: dict) -> None:
    network, other = build(kind, shape, options), build(kind, shape, options, seed=5)
    x, c_noise, cond = inputs(network)
    assert not torch.equal(network(x, c_noise, cond), other(x, c_noise, cond))
    other.load_state_dict(network.state_dict())
    assert torch.equal(network(x, c_noise, cond), other(x, c_noise, cond))


@networks
def test_seed_fixes_parameters_and_frequencies(
    kind: type[nn.Module], shape: tuple[int, ...], options: dict
) -> None:
    one, same = build(kind, shape, options), build(kind, shape, options)
    for name, x in one.state_dict().items():
        assert torch.equal(x, same.state_dict()[name]), name
    assert any("frequencies" in name for name in one.state_dict())


@networks
def test_float64_agrees_with_float32(kind: type[nn.Module], shape: tuple[int, ...], options: dict) -> None:
    network = build(kind, shape, options)
    x, c_noise, cond = inputs(network)
    y = network(x, c_noise, cond)
    y64 = network.double()(x.double(), c_noise.double(), cond)
    assert y64.dtype == torch.float64
    torch.testing.assert_close(y.double(), y64, rtol=1e-4, atol=1e-4 * y64.abs().max().item())


@networks
def test_autocast_keeps_the_shape_and_roughly_the_numbers(
    kind: type[nn.Module], shape: tuple[int, ...], options: dict
) -> None:
    network = build(kind, shape, options)
    x, c_noise, cond = inputs(network)
    with torch.autocast("cpu", torch.bfloat16):
        y16 = network(x, c_noise, cond)
    assert y16.shape == x.shape
    y = network(x, c_noise, cond)
    assert (y16.float() - y).norm() < 0.1 * y.norm()


@pytest.mark.parametrize("kind", [MLP, UNet])
def test_labels(kind: type[nn.Module]) -> None:
    network = build(kind, (1, 8, 8), {"num_classes": 3})
    x = torch.randn(1, 1, 8, 8).expand(4, -1, -1, -1)
    c_noise = torch.zeros(4)
    y = network(x, c_noise, torch.arange(4))
    differ = (y[:, None] - y[None]).flatten(2).norm(dim=-1) > 1e-3
    assert torch.equal(differ, ~torch.eye(4, dtype=torch.bool))  # labels 0, 1, 2 and null are four things
    null = network(x, c_noise, torch.full((4,), 3))
    torch.testing.assert_close(network(x, c_noise, None), null)
    torch.testing.assert_close(network(x, c_noise, torch.arange(4, dtype=torch.int32)), y)
    with pytest.raises(ValueError, match=r"label outside 0\.\.3"):
        network(x, c_noise, torch.full((4,), 4))


def test_null_label_is_trained_by_none() -> None:
    table = LabelEmbedding(2, 4)
    table(None).sum().backward()
    assert table.weight.shape == (3, 4)
    assert torch.equal(table.weight.grad != 0, torch.tensor([[False], [False], [True]]).expand(3, 4))


def test_unet_sees_the_whole_image_and_attention_joins_far_pixels() -> None:
    far = {}
    for attention in (False, True):
        network = build(UNet, (1, 32, 32), {"channels": 4, "multipliers": (1, 1), "attention": attention})
        network = network.double()
        # without GroupNorm, whose means join all pixels, the reach is that of the convolutions
        for module in network.modules():
            for name, child in module.named_children():
                if isinstance(child, nn.GroupNorm):
                    setattr(module, name, nn.Identity())
        x = torch.randn(1, 1, 32, 32, dtype=torch.float64, requires_grad=True)
        network(x, torch.zeros(1, dtype=torch.float64))[0, 0, 0, 0].backward()
        assert x.grad[0, 0, 8, 8] != 0
        far[attention] = x.grad[0, 0, 31, 31].item()
    assert far[False] == 0 and far[True] != 0


def test_fourier_features_are_cosines_and_sines_of_unit_mean_square() -> None:
    features = FourierFeatures(3, 8, 2.0, generator=torch.Generator().manual_seed(0)).double()
    x = torch.tensor([[0.5, -1.0, 2.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    expected = []
    for row in x.tolist():
        phases = [
            sum(b * value for b, value in zip(B, row, strict=True)) for B in features.frequencies.tolist()
        ]
        trigonometric = [math.cos(p) for p in phases] + [math.sin(p) for p in phases]
        expected.append([math.sqrt(2) * value for value in trigonometric])
    torch.testing.assert_close(features(x), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(features(x).square().mean(1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("D", [1, 2, 64])
def test_phases_have_the_standard_deviation_asked_for_in_any_dimension(D: int) -> None:
    g = torch.Generator().manual_seed(0)
    features = FourierFeatures(D, 2000, 1.5, generator=g)
    assert torch.equal(features.frequencies, FourierFeatures(D, 2000, 1.5, g.manual_seed(0)).frequencies)
    phase = torch.randn(2000, D, generator=g) @ features.frequencies.mT
    assert phase.std().item() == pytest.approx(1.5, rel=0.1)


def test_fourier_features_ignore_autocast() -> None:
    features, x = FourierFeatures(2, 16, 4.0), 10 * torch.randn(8, 2)
    with torch.autocast("cpu", torch.bfloat16):
        inside = features(x)
    assert inside.dtype == torch.float32 and torch.equal(inside, features(x))


def test_mlp_is_the_formula() -> None:
    network = build(
        MLP, (2,), {"hidden": 8, "depth": 2, "x_features": 4, "noise_features": 2, "num_classes": 1}
    )
    x, c_noise, cond = inputs(network)
    w = network.state_dict()
    phase_x, phase_c = (
        x @ w["x_embedding.frequencies"].T,
        c_noise[:, None] @ w["noise_embedding.frequencies"].T,
    )
    root = math.sqrt(2)
    known = [x, root * phase_x.cos(), root * phase_x.sin(), root * phase_c.cos(), root * phase_c.sin()]
    h = torch.cat(known, 1) @ w["first.weight"].T + w["first.bias"] + w["label_embedding.weight"][cond]
    h = F.silu(h) @ w["middle.1.weight"].T + w["middle.1.bias"]
    torch.testing.assert_close(network(x, c_noise, cond), F.silu(h) @ w["last.weight"].T + w["last.bias"])


def test_sizes() -> None:
    def count(network: nn.Module) -> int:
        return sum(p.numel() for p in network.parameters())

    D, hidden = 16, 128
    assert count(MLP((D,))) == (D + 64 + 16 + 1) * hidden + 2 * (hidden + 1) * hidden + (hidden + 1) * D
    assert count(MLP((4, 4), num_classes=10)) == count(MLP((D,))) + 11 * hidden
    assert count(UNet((1, 8, 8))) == count(UNet((1, 28, 28))) == 395_521


@pytest.mark.parametrize(
    ("kind", "shape", "options", "message"),
    [
        (MLP, (), {}, "event_shape"),
        (MLP, (2, 0), {}, "event_shape"),
        (MLP, (2,), {"num_classes": -1}, "num_classes"),
        (MLP, (2,), {"depth": 0}, "depth"),
        (MLP, (2,), {"hidden": 0}, "hidden"),
        (MLP, (2,), {"x_features": 5}, "even"),
        (MLP, (2,), {"noise_features": 0}, r"noise_features is 0, but must be a whole number in \[2, "),
        (MLP, (2,), {"x_scale": 0.0}, "scale"),
        (UNet, (2,), {}, r"\(C, H, W\)"),
        (UNet, (1, 7, 8), {}, r"divisible by 2, not \(1, 7, 8\)"),
        (UNet, (1, 28, 28), {"multipliers": (1, 2, 2, 2)}, "divisible by 8"),
        (UNet, (1, 8, 8), {"multipliers": ()}, "multipliers"),
        (UNet, (1, 8, 8), {"multipliers": (1, 0)}, "multipliers"),
        (UNet, (1, 8, 8), {"channels": 6}, "channels"),
        (UNet, (1, 8, 8), {"blocks": 0}, "blocks"),
    ],
)
def test_wrong_sizes_are_refused_when_built(
    kind: type[nn.Module], shape: tuple[int, ...], options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind(shape, **options)


@pytest.mark.parametrize("kind", [MLP, UNet])
def test_wrong_arguments_are_refused(kind: type[nn.Module]) -> None:
    network, x, c_noise = kind((1, 8, 8), num_classes=2), torch.zeros(3, 1, 8, 8), torch.zeros(3)
    with pytest.raises(ValueError, match=r"x must have shape \[N, 1, 8, 8\], not \[3, 1, 8, 9\]"):
        network(torch.zeros(3, 1, 8, 9), c_noise)
    with pytest.raises(ValueError, match=r"c_noise must have shape \[3\], .* not \[3, 1\]"):
        network(x, c_noise[:, None])
    with pytest.raises(ValueError, match=r"cond must have shape \[3\], .* not \[1\]"):
        network(x, c_noise, torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="without labels"):
        kind((1, 8, 8))(x, c_noise, torch.zeros(3, dtype=torch.long))
