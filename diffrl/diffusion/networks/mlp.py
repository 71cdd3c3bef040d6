"""A multilayer perceptron for events of any shape, flattened: the network of 2-D sets and mixtures."""

import math

import torch
from torch import Tensor, nn

from diffrl.diffusion.networks.embeddings import FourierFeatures, LabelEmbedding, of_features
from diffrl.diffusion.networks.inputs import MAX_SIZE, check_event_shape, check_inputs, check_second_time
from diffrl.diffusion.networks.registry import NETWORKS, options_among
from diffrl.ranges import MAX_LAYERS, require_int, require_number

__all__ = ["MLP"]


@NETWORKS.register("mlp")
class MLP(nn.Module):
    """F_θ(x, c_noise, cond): `depth` hidden layers of `hidden` units, SiLU between them.

        h₁ = W₁ [x, φ(x), φ(c_noise)] + E[cond],    hᵢ₊₁ = Wᵢ₊₁ SiLU(hᵢ),    F = W SiLU(h_depth)

    with φ the random Fourier features and biases left out; a second time adds W_r φ(c_noise_r) to h₁. W and its bias
    are 0 at the start, so that F is 0, as in EDM. Parameters and frequencies are drawn from torch's global generator:
    seed it before building.

    Args:
        event_shape: *E, the shape of one event; it is flattened to D numbers.
        num_classes: number of labels; 0 builds no label table, and `cond` must then be None.
        hidden: units of a hidden layer, in [1, 65536].
        depth: number of hidden layers, in [1, 10,000].
        x_features: number of Fourier features of x, even; 0 is none. x itself enters in any case.
        noise_features: number of Fourier features of c_noise, even.
        x_scale: standard deviation in radians of the phases of x, for x of unit variance, as preconditioning
            leaves it. 2 to 4 resolves finer detail in 2-D, and errs more on 16-D mixtures.
        noise_scale: the same per unit of c_noise; EDM's c_noise = ln(σ)/4 spans 2.6 units from 0.002 to 80.
        second_time: whether it is told a second time r, that of the state which D(x, t, r) leads to. W_r is drawn last,
            so that all other parameters are those of the network without.
        variance: also predict a variance, by twice the first size of *E; see `diffrl.Denoiser.with_variance`.

    Raises:
        ValueError: a size outside its range.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        num_classes: int = 0,
        hidden: int = 128,
        depth: int = 3,
        x_features: int = 64,
        noise_features: int = 16,
        x_scale: float = 1.0,
        noise_scale: float = 4.0,
        second_time: bool = False,
        variance: bool = False,
    ) -> None:
        super().__init__()
        self.options = options_among(locals())
        self.event_shape = check_event_shape(event_shape, num_classes)
        self.num_classes, self.second_time, self.predicts_variance = num_classes, second_time, variance
        require_int("hidden", hidden, most=MAX_SIZE)
        require_int("depth", depth, most=MAX_LAYERS)
        require_int("x_features", x_features, 0, MAX_SIZE)
        require_number("x_scale", x_scale, 0, 1e6, "(]")
        D = math.prod(self.event_shape)
        with of_features("x"):
            self.x_embedding = FourierFeatures(D, x_features, x_scale) if x_features else None
        with of_features("noise"):
            self.noise_embedding = FourierFeatures(1, noise_features, noise_scale)
        self.label_embedding = LabelEmbedding(num_classes, hidden) if num_classes else None
        self.first = nn.Linear(D + x_features + noise_features, hidden)
        layers: list[nn.Module] = [nn.SiLU()]
        for _ in range(depth - 1):
            layers += [nn.Linear(hidden, hidden), nn.SiLU()]
        self.middle = nn.Sequential(*layers)
        first, *others = self.event_shape
        self.output_shape = (2 * first if variance else first, *others)
        self.last = nn.Linear(hidden, math.prod(self.output_shape))
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.second = nn.Linear(noise_features, hidden, bias=False) if second_time else None

    def forward(
        self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None, c_noise_r: Tensor | None = None
    ) -> Tensor:
        """Output of x's shape; with a variance, of twice its first event size.

        Args:
            x: the scaled state, shape [N, *E].
            c_noise: the noise level's code, shape [N].
            cond: integer labels in 0..num_classes, shape [N]; num_classes is the null label, None all null.
            c_noise_r: the code of the second time, shape [N]; None is c_noise, that is r = t.

        Raises:
            ValueError: an argument of another shape, or labels or a second time for a network without them.
        """
        check_inputs(x, c_noise, cond, self.event_shape, self.num_classes)
        check_second_time(x, c_noise_r, second_time=self.second_time)
        flat = x.flatten(1)
        inputs = [flat, self.noise_embedding(c_noise[:, None])]
        if self.x_embedding is not None:
            inputs.insert(1, self.x_embedding(flat))
        h = self.first(torch.cat(inputs, dim=1))
        if self.label_embedding is not None:
            h = h + self.label_embedding(cond)
        if self.second is not None:
            h = h + self.second(self.noise_embedding((c_noise if c_noise_r is None else c_noise_r)[:, None]))
        return self.last(self.middle(h)).view(len(x), *self.output_shape)
