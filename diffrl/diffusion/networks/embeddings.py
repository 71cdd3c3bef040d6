"""How scalars and labels enter a network: random Fourier features, and a table of label vectors."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diffrl.diffusion.networks.inputs import MAX_SIZE
from diffrl.errors import InputError
from diffrl.ranges import require_int, require_number

__all__ = ["FourierFeatures", "LabelEmbedding", "of_features"]


class FourierFeatures(nn.Module):
    """Random Fourier features: cosines and sines of fixed random projections.

        φ(x) = √2 [cos(B x), sin(B x)],    B_ij ~ N(0, scale² / in_features)

    The phases B x of an input with unit variance have standard deviation `scale` (radians) whatever its
    dimension. √2 gives the features unit mean square. B is drawn once and kept in the state_dict as the
    buffer `frequencies` [num_features / 2, in_features]; it is never trained.

    Source: Fourier Features Let Networks Learn High Frequency Functions in Low Dimensional Domains (Tancik et
    al., 2020), eq. 5, https://arxiv.org/abs/2006.10739; there B has a factor 2π, and the features have no factor √2.

    Args:
        in_features: D, the size of the input.
        num_features: number of outputs, even, in [2, 65536]: half cosines, half sines.
        scale: standard deviation of a phase in radians, for an input of unit variance; in (0, 1e6].
        generator: source of B; None is torch's global one, as for every other initialisation.

    Raises:
        ValueError: `num_features` is odd, or one of them outside its range.
    """

    frequencies: Tensor

    def __init__(
        self, in_features: int, num_features: int, scale: float, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        require_int("num_features", num_features, 2, MAX_SIZE)
        if num_features % 2:
            raise InputError(
                f"num_features is {num_features}, but Fourier features come in pairs: give an even number"
            )
        require_number("scale", scale, 0, 1e6, "(]")
        frequencies = torch.randn(num_features // 2, in_features, generator=generator)
        self.register_buffer("frequencies", frequencies * (scale / math.sqrt(in_features)))

    def forward(self, x: Tensor) -> Tensor:
        """Features of x [N, in_features], shape [N, num_features], in the dtype of `frequencies`."""
        # bfloat16 has 8 bits: a phase rounded by autocast would be noise.
        with torch.autocast(x.device.type, enabled=False):
            phase = x.to(self.frequencies.dtype) @ self.frequencies.mT
            return math.sqrt(2) * torch.cat([phase.cos(), phase.sin()], dim=-1)


@contextmanager
def of_features(what: str) -> Iterator[None]:
    """Name the numbers of `FourierFeatures` in errors as a network does: ``scale`` becomes ``noise_scale``."""
    try:
        yield
    except InputError as error:
        text = str(error).replace("num_features", "features", 1)
        raise InputError(f"{what}_{text}") from error


class LabelEmbedding(nn.Module):
    """One learned vector per label, and one for "no label": the null label `num_classes`.

    Args:
        num_classes: number of labels, at least 1; the null label has the last row.
        features: size of a vector.
    """

    def __init__(self, num_classes: int, features: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.weight = nn.Parameter(torch.randn(num_classes + 1, features) / math.sqrt(features))

    def forward(self, cond: Tensor | None) -> Tensor:
        """Vectors [N, features] of integer labels cond [N]; None gives the null label's, [1, features].

        Raises:
            ValueError: a label outside 0..num_classes, on a CPU. A GPU reports it later, as an error of its own.
        """
        if cond is None:
            return self.weight[self.num_classes :]
        try:
            return nn.functional.embedding(cond, self.weight)
        except IndexError:
            raise InputError(f"cond holds a label outside 0..{self.num_classes}") from None
