"""One denoiser for samplers of several lengths: it is told how many steps are taken."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffrl.diffusion.schedules.base import Schedule
from diffrl.errors import InputError, InputTypeError
from diffrl.ranges import require_int

__all__ = ["StepConditioned"]

LAYERS = ("first", "noise_embedding.3", "time_embedding.linear_2", "timestep_embedder.linear_2")
"""Where the networks that we know add up what they are told besides the state: MLP, UNet, diffusers' networks."""


class _Around(nn.Module):
    """What a denoiser tells of itself, told by a module around it."""

    denoiser: nn.Module

    @property
    def process(self) -> Schedule:
        """Noise schedule of the denoiser."""
        inner: Any = self.denoiser
        process: Schedule = inner.process
        return process

    @property
    def network(self) -> nn.Module:
        """That of the denoiser."""
        inner: Any = self.denoiser
        network: nn.Module = inner.network
        return network

    @property
    def evaluations(self) -> int:
        """Network evaluations for each state."""
        return int(getattr(self.denoiser, "evaluations", 1))

    @property
    def scalings(self) -> Any:
        """See `diffrl.Denoiser.scalings`."""
        return self.denoiser.scalings

    @property
    def null_condition(self) -> Any:
        """See `diffrl.Denoiser.null_condition`."""
        return self.denoiser.null_condition


class StepConditioned(_Around):
    """A denoiser D(x_t, t, cond, K) that is told the number K of steps that its sampler takes.

        h ← h + e_K,    e_K = 0 at the start

    h is the output of one linear layer of the network, that in which the noise level enters, so that the denoiser
    begins as the one that it is made of. A generator of few steps answers differently at the same noise level if
    one step is left or four: with e_K one set of weights can serve 1, 2 and 4 steps.

    Source: Learning Few-Step Diffusion Models by Trajectory Distribution Matching (Luo et al., 2025), eq. 8,
    https://arxiv.org/abs/2503.06674; where e_K enters is ours.

    >>> import diffrl
    >>> from diffrl.diffusion.step_counts import StepConditioned
    >>> denoiser = diffrl.Denoiser(diffrl.networks.MLP((2,)), diffrl.Flow())
    >>> several = StepConditioned(denoiser, [1, 2, 4])
    >>> several(torch.randn(3, 2), torch.full((3,), 0.5), num_steps=4).shape
    torch.Size([3, 2])

    Args:
        denoiser: with its process; copied.
        step_counts: values of K that it is told apart by, each once.
        layer: end of the name of a linear layer of the denoiser; None: the one in which our networks and those of
            diffusers take up the noise level.

    Raises:
        TypeError: a denoiser whose adapters are trained, of which nothing else is kept, or one that is told numbers of
            steps already; step counts that are no sequence.
        ValueError: step counts that are no positive integers or repeat, or no single layer of that name.
    """

    def __init__(self, denoiser: nn.Module, step_counts: Sequence[int], layer: str | None = None) -> None:
        super().__init__()
        if hasattr(denoiser, "trainable_state"):
            raise InputTypeError(
                f"{type(denoiser).__name__} trains adapters, which hold no embedding of a number of steps: give it "
                "one number of steps"
            )
        if hasattr(denoiser, "step_counts"):
            raise InputTypeError("this denoiser is told its number of steps already: give the one inside it")
        if not isinstance(step_counts, Sequence):
            raise InputTypeError(f"step_counts is {step_counts!r}: give a list of numbers of steps")
        self.step_counts = tuple(require_int("step_counts", count) for count in step_counts)
        if not self.step_counts or len(set(self.step_counts)) < len(self.step_counts):
            raise InputError(
                f"step_counts is {list(step_counts)}: give different numbers of steps, at least one"
            )
        self.denoiser, self.layer = copy.deepcopy(denoiser), layer
        linear = _layer(self.denoiser, layer)
        like = linear.weight
        self.embedding = nn.Parameter(
            torch.zeros(len(self.step_counts), linear.out_features, dtype=like.dtype, device=like.device)
        )
        self._row = 0
        linear.register_forward_hook(self._add)

    def like(self, denoiser: nn.Module) -> "StepConditioned":
        """Another denoiser told the same numbers, from the start."""
        return StepConditioned(denoiser, self.step_counts, self.layer)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, *, num_steps: int) -> Tensor:
        """Clean estimate D of states [N, *E] at times [N], of x_t's shape, for a sampler of `num_steps` steps.

        Raises:
            ValueError: a number of steps that it does not know.
        """
        if num_steps not in self.step_counts:
            raise InputError(f"num_steps is {num_steps}: this denoiser knows {list(self.step_counts)}")
        self._row = self.step_counts.index(num_steps)
        D_x: Tensor = self.denoiser(x_t, t, cond)
        return D_x

    def at(self, num_steps: int) -> "AtSteps":
        """The denoiser D(x_t, t, cond) of one number of steps, with the same weights: what samplers call."""
        return AtSteps(self, num_steps)

    def _add(self, layer: nn.Module, inputs: Any, h: Tensor) -> Tensor:
        return h + self.embedding[self._row]


class AtSteps(_Around):
    """A `StepConditioned` denoiser at one number of steps.

    Raises:
        ValueError: a number of steps that it does not know.
    """

    def __init__(self, denoiser: StepConditioned, num_steps: int) -> None:
        super().__init__()
        if num_steps not in denoiser.step_counts:
            raise InputError(f"num_steps is {num_steps}: this denoiser knows {list(denoiser.step_counts)}")
        self.denoiser, self.num_steps = denoiser, num_steps

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Clean estimate D of states [N, *E] at times [N], of x_t's shape."""
        D_x: Tensor = self.denoiser(x_t, t, cond, num_steps=self.num_steps)
        return D_x


def _layer(denoiser: nn.Module, name: str | None) -> nn.Linear:
    """The linear layer whose name ends in `name`, or in one of those that are known."""
    linear = {path: module for path, module in denoiser.named_modules() if isinstance(module, nn.Linear)}
    wanted = LAYERS if name is None else (name,)
    found = [path for path in linear if any(path == end or path.endswith(f".{end}") for end in wanted)]
    if len(found) != 1:
        raise InputError(
            f"{len(found)} linear layers of this denoiser have a name that ends in {' or '.join(wanted)}: give "
            f"layer, one of {', '.join(linear)}"
        )
    return linear[found[0]]
