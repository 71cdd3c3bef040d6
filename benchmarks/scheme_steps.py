"""Training steps of TD and TD-EDM over those of plain EDM, with the same network and as many states."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from report import Row
from tensordict import TensorDict
from timing import Ratio, Seconds, interleave
from torch import nn
from trainer_step import trainer_step

from diffrl.data.dataset import Data
from diffrl.diffusion.chains import Chain
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.networks.unet import UNet
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.trajectories import ChainSampler
from diffrl.objectives import ValueLoss, sample_td_edm_pairs, td_edm_loss
from diffrl.objectives.denoising import sample_log_normal_states
from diffrl.objectives.monte_carlo import monte_carlo_loss
from diffrl.objectives.scheme import Objective

__all__ = ["scheme_steps"]

EVENT_SHAPE, STATES, NUM_STEPS = (1, 16, 16), 64, 16
PROCESS = EDM()


class Scheme(NamedTuple):
    """A way to train; `target_states` are evaluated by a target network too, without a backward pass."""

    name: str
    loss: Callable[[Denoiser], ValueLoss]
    draw: Callable[..., TensorDict]
    batch: int
    target_states: int
    promise: str


def _schemes() -> tuple[Scheme, ...]:
    chains, data = ChainSampler(Chain(PROCESS, NUM_STEPS, "markov"), jitter=False), STATES // NUM_STEPS
    own = partial(ValueLoss, lmbda=0.5)
    target = partial(ValueLoss, lmbda=0.5, bootstrap="target")
    return (
        Scheme("EDM", monte_carlo_loss, partial(sample_log_normal_states, PROCESS), STATES, 0, ""),
        Scheme("TD(λ), own", own, chains, data, 0, "≤ 1.03"),
        Scheme("TD(λ), target", target, chains, data, STATES - data, ""),
        Scheme("TD-EDM", td_edm_loss, partial(sample_td_edm_pairs, PROCESS), STATES, STATES, "≤ 1.40"),
    )


def scheme_steps(*, rounds: int) -> list[Row]:
    """A row for each scheme but EDM: steps of the trainer, from a batch of data to the average of the weights.

    Beside the ratio of times stands that of bare evaluations, forward and backward on the states and forward on those
    of a target network, over those of EDM: no way to train with as many evaluations costs less.
    """
    schemes = _schemes()
    steps: dict[str, Callable[[], object]] = {s.name: _step(s) for s in schemes}
    bare: dict[str, Callable[[], object]] = {_bare_name(n): _evaluations(n) for n in _counts(schemes)}
    seconds = interleave(steps | bare, rounds=rounds, warm_up=2)
    return [_row(s, seconds) for s in schemes[1:]]


def _row(scheme: Scheme, seconds: Seconds) -> Row:
    ratios = {"EDM": Ratio.of(seconds, scheme.name, "EDM")}
    ratios["of evaluations"] = Ratio.of(seconds, _bare_name(scheme.target_states), _bare_name(0))
    return Row(scheme.name, Row.milliseconds_of(seconds[scheme.name]), ratios, scheme.promise)


def _counts(schemes: tuple[Scheme, ...]) -> list[int]:
    return sorted({s.target_states for s in schemes})


def _bare_name(target_states: int) -> str:
    return f"evaluations, {target_states} of them of a target network"


def _network() -> nn.Module:
    """The same for every variant, and not at its start, where its output is 0."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = UNet(EVENT_SHAPE)
        for p in network.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return network


def _step(scheme: Scheme) -> Callable[[], object]:
    data = Data("noise", test=torch.randn(64, *EVENT_SHAPE), train=torch.randn(4096, *EVENT_SHAPE) / 2)
    loss = scheme.loss(Denoiser(_network(), PROCESS))
    return trainer_step(Objective(scheme.name, loss, scheme.draw), data, scheme.batch)


def _evaluations(target_states: int) -> Callable[[], object]:
    network, x, c = _network(), torch.randn(STATES, *EVENT_SHAPE), torch.randn(STATES)

    def evaluate() -> None:
        if target_states:
            with torch.no_grad():
                network(x[:target_states], c[:target_states])
        network(x, c).mean().backward()
        network.zero_grad()

    return evaluate
