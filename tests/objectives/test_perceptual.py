"""LPIPS: its formula by plain loops on a small network of VGG-16's shape, its weights, and training by it."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from diffrl.errors import FileError, InputError
from diffrl.objectives.consistency import ct_loss
from diffrl.objectives.consistency_metrics import distance, l2
from diffrl.objectives.consistency_pairs import sample_consistency_pairs
from diffrl.objectives.perceptual import LPIPS, read_tensors
from tests.kit.consistency import consistency
from tests.kit.lpips import lpips_weights, vgg

G = torch.Generator().manual_seed(5)


def network(pool: type[nn.Module]) -> nn.Sequential:
    return vgg(pool, G)


def weights(made: nn.Module) -> dict[str, Tensor]:
    return lpips_weights(made, G)


def by_loops(made: nn.Sequential, w: dict[str, Tensor], x: Tensor, y: Tensor) -> float:
    """Of two images [C, H, W], pixel by pixel, from the layers that stand before a pooling."""
    total, stage, pair = 0.0, 0, [x, y]
    means, stds = (
        torch.tensor(v, dtype=torch.float64)[:, None, None]
        for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    pair = [(((z + 1) / 2) - means) / stds for z in pair]
    for layer, after in zip(made, [*made][1:], strict=False):
        pair = [layer(z[None])[0] for z in pair]
        if type(after).__name__.endswith("Pool2d"):
            _, H, W = pair[0].shape
            for i in range(H):
                for j in range(W):
                    a, b = (z[:, i, j] / (z[:, i, j].norm() + 1e-10) for z in pair)
                    total += float((w[f"lin{stage}.model.1.weight"].flatten() * (a - b) ** 2).sum()) / (H * W)
            stage += 1
    return total


@pytest.mark.parametrize(("pooling", "pool"), [("mean", nn.AvgPool2d), ("max", nn.MaxPool2d)])
def test_it_is_the_formula(pooling: Any, pool: type[nn.Module]) -> None:
    made = network(pool)
    d = LPIPS(weights(made), pooling=pooling, resize=False)
    w = {name: x.double() for name, x in d._weights.items()}
    made.double()
    x, y = (torch.rand(2, 2, 1, 3, 16, 16, generator=G, dtype=torch.float64) * 2 - 1).unbind()
    found = d(x, y)
    assert found.shape == (2, 1) and found.dtype == torch.float64
    with torch.no_grad():
        expected = [[by_loops(made, w, a[0], b[0])] for a, b in zip(x, y, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(d(y, x), found)
    assert torch.equal(d(x, x), torch.zeros(2, 1, dtype=torch.float64))
    # along a line, by finite differences; and where features are 0 or equal
    v, h = torch.randn(x.shape, generator=G, dtype=torch.float64), 1e-6
    point = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(d(point, y).sum(), point)
    torch.testing.assert_close(
        (slope * v).sum(), (d(x + h * v, y) - d(x - h * v, y)).sum() / (2 * h), rtol=1e-4, atol=1e-8
    )
    (slope,) = torch.autograd.grad(d(point, x).sum(), point)
    assert bool(slope.isfinite().all())


def test_small_images_are_resized_and_gray_ones_have_three_channels() -> None:
    d = LPIPS(weights(network(nn.AvgPool2d)))
    x, y = (torch.rand(2, 1, 1, 1, 8, 8, generator=G) * 2 - 1).unbind()
    large = [nn.functional.interpolate(z[0], size=(224, 224), mode="bilinear")[None] for z in (x, y)]
    torch.testing.assert_close(d(x, y), d(*large))  # 224 stays as it is
    torch.testing.assert_close(d(x, y), d(*(z.expand(1, 1, 3, 8, 8) for z in (x, y))))
    with pytest.raises(InputError, match=r"takes images of 1 or 3 channels, not samples of \(2,\)"):
        d(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2))


def test_weights_come_from_a_folder_and_what_they_lack_is_named(tmp_path: Path) -> None:
    found = weights(network(nn.AvgPool2d))
    linear = {name: x for name, x in found.items() if name.startswith("lin")}
    torch.save({name: x for name, x in found.items() if name not in linear}, tmp_path / "vgg16.pth")
    with pytest.raises(
        FileError, match=r"LPIPS lacks lin0.model.1.weight: give the weights of torchvision's"
    ):
        distance("lpips", str(tmp_path))
    safetensors.torch.save_file(linear, tmp_path / "vgg.safetensors")
    x = torch.rand(2, 1, 1, 3, 8, 8, generator=G)
    assert torch.equal(distance("lpips", str(tmp_path))(*x), LPIPS(found)(*x))
    (tmp_path / "vgg.safetensors").write_bytes(b"torn")
    with pytest.raises(FileError, match=r"vgg.safetensors is damaged or holds no tensors .*: copy it again"):
        LPIPS.load(tmp_path)
    with pytest.raises(
        FileError, match=r"empty holds no .pth or .safetensors: put VGG-16's .* downloads nothing"
    ):
        LPIPS.load(tmp_path / "empty")
    with pytest.raises(InputError, match="`metric` lpips needs `metric_weights`.*nothing is downloaded"):
        distance("lpips")
    with pytest.raises(InputError, match="`metric_weights` is given, but `metric` is 'l2'"):
        distance("l2", "somewhere")
    with pytest.raises(
        InputError, match=r"lin1.model.1.weight of shape \(1, 2, 1, 1\): it takes 3 numbers ≥ 0"
    ):
        LPIPS(found | {"lin1.model.1.weight": torch.ones(1, 2, 1, 1)})


def test_the_published_weights_have_these_names() -> None:
    package = find_spec("torchmetrics")  # importing it takes seconds
    if package is None or package.origin is None:
        pytest.skip("torchmetrics, which brings them, is not installed")
    found = read_tensors(Path(package.origin).parent / "functional/image/lpips_models/vgg.pth")
    shapes = {f"lin{l}.model.1.weight": (1, c, 1, 1) for l, c in enumerate((64, 128, 256, 512, 512))}
    assert {name: tuple(x.shape) for name, x in found.items()} == shapes
    assert all(bool((x >= 0).all()) for x in found.values())


def test_a_consistency_function_is_trained_by_it_and_by_a_function_of_ones_own() -> None:
    denoiser = consistency()
    x0 = torch.rand(3, 1, 8, 8, generator=G, dtype=torch.float64) * 2 - 1
    pairs = sample_consistency_pairs(
        denoiser.process, x0, num_scales=4, generator=torch.Generator().manual_seed(0)
    )
    own, named = (ct_loss(denoiser, metric=m, bootstrap="own") for m in (lambda x, y: l2(x - y), "l2"))
    assert torch.equal(own(pairs)["loss_value"], named(pairs)["loss_value"])
    d = LPIPS(weights(network(nn.AvgPool2d)))
    loss = ct_loss(denoiser, metric=d, bootstrap="own")
    found = loss(pairs)["loss_value"]
    with torch.no_grad():
        f = denoiser(pairs["x_t"][:, 0], pairs["t"][:, 0, 0])[:, None]
        f_next = denoiser(pairs["next", "x_t"][:, 0], pairs["next", "t"][:, 0, 0])[:, None]
        torch.testing.assert_close(found.detach(), d(f, f_next).mean())
    gradients = torch.autograd.grad(found, [*denoiser.parameters()], allow_unused=True)
    assert any(g is not None and float(g.abs().sum()) > 0 for g in gradients)
