"""A small network of VGG-16's shape, and weights of LPIPS on it."""

import torch
from torch import Tensor, nn

WIDTHS = (2, 3, 4, 3, 2)
VGG = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")  # its table


def vgg(pool: type[nn.Module], generator: torch.Generator) -> nn.Sequential:
    """VGG-16's layers in their order, with few channels."""
    layers: list[nn.Module] = []
    width, stage = 3, 0
    for entry in VGG:
        if entry == "M":
            layers.append(pool(2))
            stage += 1
        else:
            layers += [nn.Conv2d(width, WIDTHS[stage], 3, padding=1), nn.ReLU()]
            width = WIDTHS[stage]
    made = nn.Sequential(*layers)
    for p in made.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.6
    return made


def lpips_weights(made: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Of that network and of its features, by the names that they have in the published files."""
    found = {f"features.{name}": x for name, x in made.state_dict().items()}
    linear = {
        f"lin{l}.model.1.weight": torch.rand(1, c, 1, 1, generator=generator) for l, c in enumerate(WIDTHS)
    }
    return found | linear
