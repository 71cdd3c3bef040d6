"""Cost of a training step over the same step by hand, and over the network evaluations that it consists of."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import by_hand
import torch
from report import Row
from tensordict import TensorDict
from timing import Ratio, interleave
from torch import Generator, Tensor, nn
from trainer_step import CLIP, EMA_HALFLIFE, LR, trainer_step

from diffrl import keys, objectives
from diffrl.data.dataset import Data
from diffrl.diffusion.chains import Chain
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.networks.unet import UNet
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.trajectories import ChainSampler
from diffrl.objectives import SoftUpdate, ValueLoss, sample_td_edm_pairs, td_edm_loss
from diffrl.objectives.monte_carlo import monte_carlo_loss
from diffrl.objectives.scheme import Objective
from diffrl.training.ema import EMA

__all__ = ["SIZES", "Size", "step_cost"]

NUM_STEPS, LMBDA, TARGET_DECAY = 16, 0.5, 0.999
EMA_DECAY = 0.99
PROCESS = EDM()
Step = Callable[[], object]


@dataclass(frozen=True)
class Size:
    """A network, and how many states a step trains it on."""

    name: str
    network: Callable[[], nn.Module]
    event_shape: tuple[int, ...]
    states: int
    promise: str
    repeats: int


SIZES = (
    Size("MLP 3x128 on 2-D", lambda: MLP((2,)), (2,), 256, promise="≤ 1.15", repeats=4),
    Size("UNet on 1x16x16", lambda: UNet((1, 16, 16)), (1, 16, 16), 64, promise="≤ 1.02", repeats=1),
)


_Drawn = tuple[by_hand.Chains, Tensor]


@dataclass(frozen=True)
class Method:
    """A way to train, in diffrl and by hand; `batch` data make the states of one step.

    Args:
        loss: diffrl's, of a denoiser.
        draw: diffrl's states of x0.
        plain_draw: the same states by hand.
        unpack: of diffrl's states, what `plain_draw` gives.
        by_hand: (network, target network, denoise, drawn, x0) → loss.
        target_states: how many states the target network evaluates.
    """

    name: str
    batch: int
    loss: Callable[[Denoiser], ValueLoss]
    draw: Callable[..., TensorDict]
    plain_draw: Callable[[Tensor, Generator], object]
    unpack: Callable[[TensorDict], object]
    by_hand: Callable[..., Tensor]
    target_states: int = 0


def _methods(size: Size) -> tuple[Method, ...]:
    batch, dims = size.states // NUM_STEPS, len(size.event_shape)
    chain = Chain(PROCESS, num_steps=NUM_STEPS, coupling="markov")
    fixed = by_hand.Chains(batch, by_hand.levels(NUM_STEPS), dims)

    def draw_fixed(x0: Tensor, generator: Generator) -> _Drawn:
        return fixed, fixed.draw(x0, generator)

    def unpack_fixed(states: TensorDict) -> _Drawn:
        return fixed, states[keys.X_T]

    def draw_shifted(x0: Tensor, generator: Generator) -> _Drawn:
        offset = float(torch.rand((), generator=generator)) - 0.5
        chains = by_hand.Chains(batch, by_hand.levels(NUM_STEPS, offset), dims)
        return chains, chains.draw(x0, generator)

    def unpack_shifted(states: TensorDict) -> _Drawn:
        return by_hand.Chains(batch, states[keys.T][0, :, 0].double(), dims), states[keys.X_T]

    def on_chains(
        name: str,
        loss: Callable[[Denoiser], ValueLoss],
        hand: Callable[..., Tensor],
        n: int = 0,
        *,
        shifted: bool = False,
    ) -> Method:
        by_hand_too = (draw_shifted, unpack_shifted) if shifted else (draw_fixed, unpack_fixed)
        return Method(name, batch, loss, ChainSampler(chain, jitter=shifted), *by_hand_too, hand, n)

    def monte_carlo(
        network: nn.Module, _: nn.Module, denoise: by_hand.Denoise, drawn: _Drawn, x0: Tensor
    ) -> Tensor:
        return by_hand.monte_carlo(network, denoise, *drawn, x0)

    def own(network: nn.Module, _: nn.Module, denoise: by_hand.Denoise, drawn: _Drawn, x0: Tensor) -> Tensor:
        chains, x = drawn
        return by_hand.td_lambda(network, None, denoise, chains, LMBDA, x, x0)

    def target(
        network: nn.Module, target: nn.Module, denoise: by_hand.Denoise, drawn: _Drawn, x0: Tensor
    ) -> Tensor:
        chains, x = drawn
        return by_hand.td_lambda(network, target, denoise, chains, LMBDA, x, x0)

    td = partial(ValueLoss, lmbda=LMBDA)
    return (
        on_chains("Monte Carlo", monte_carlo_loss, monte_carlo),
        on_chains("TD(λ), own", td, own),
        on_chains("TD(λ), target", partial(td, bootstrap="target"), target, size.states - batch),
        Method(
            "TD-EDM",
            size.states,
            td_edm_loss,
            partial(sample_td_edm_pairs, PROCESS),
            by_hand.draw_pairs,
            _pairs,
            by_hand.td_edm,
            size.states,
        ),
        on_chains("TD(λ), own, on shifted grids", td, own, shifted=True),
    )


def _pairs(states: TensorDict) -> by_hand.Pairs:
    def of(states: TensorDict) -> tuple[Tensor, Tensor, Tensor]:
        return states[keys.X_T].squeeze(1), states[keys.T].flatten(), states[keys.A].flatten()

    return by_hand.Pairs(*of(states), *of(states[keys.NEXT]), states[keys.VALID].flatten())


def step_cost(size: Size, *, rounds: int) -> list[Row]:
    """A row for each method at this size, and two for the trainer."""
    methods, rows = _methods(size), []
    for method in methods:
        x0 = 0.5 * torch.randn(method.batch, *size.event_shape)
        _require_agreement(size, method, x0)
        rows.append(_row(size, method.name, _variants(size, method, x0, _step), rounds))
    data = Data(
        "noise", test=torch.randn(64, *size.event_shape), train=torch.randn(4096, *size.event_shape) / 2
    )
    for method in (methods[1], methods[-1]):
        variants = _variants(size, method, data, _step_of_trainer)
        rows.append(_row(size, f"{method.name}, by Trainer", variants, rounds))
    return rows


def _variants(size: Size, method: Method, data: Tensor | Data, step: Callable[..., Step]) -> dict[str, Step]:
    def draw_parts(x0: Tensor, generator: Generator) -> object:
        return method.unpack(method.draw(x0, cond=None, generator=generator))

    parts = Denoiser(_network(size), PROCESS)
    return {
        "diffrl": step(size, method, data),
        "plain torch": _step_by_hand(method, _network(size), method.plain_draw, by_hand.denoise, data),
        "same parts": _step_by_hand(method, parts, draw_parts, lambda D, x, t: D(x, t), data),
        "by TensorDict": step(size, method, data, fuse=False),
        "bare": _evaluations(size, method),
    }


def _row(size: Size, name: str, variants: Mapping[str, Step], rounds: int) -> Row:
    seconds = interleave(variants, rounds=rounds, repeats=size.repeats)
    ratios = {other: Ratio.of(seconds, "diffrl", other) for other in list(variants)[1:]}
    return Row(name, Row.milliseconds_of(seconds["diffrl"]), ratios, size.promise)


def _network(size: Size) -> nn.Module:
    """The same for every variant, and not at its start, where its output is 0."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = size.network()
        for p in network.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return network


def _loss(size: Size, method: Method) -> tuple[ValueLoss, SoftUpdate | None]:
    loss = method.loss(Denoiser(_network(size), PROCESS))
    return loss, SoftUpdate(loss, eps=TARGET_DECAY) if loss.bootstrap == "target" else None


def _step(size: Size, method: Method, x0: Tensor, *, fuse: bool = True) -> Step:
    loss, target = _loss(size, method)
    optimiser = torch.optim.AdamW(loss.denoiser.parameters(), lr=LR, fused=True)
    ema, generator = EMA(loss.denoiser, EMA_HALFLIFE), Generator().manual_seed(0)
    fused = objectives.fused(loss, method.draw)
    assert fused is not None

    def step() -> None:
        if fuse:
            value, _ = fused(x0, cond=None, generator=generator)
        else:
            value = loss(method.draw(x0, cond=None, generator=generator))["loss_value"]
        value.backward()
        optimiser.step()
        optimiser.zero_grad()
        if target is not None:
            target.step()
        ema.update(len(x0))

    return step


def _step_by_hand(
    method: Method,
    network: nn.Module,
    draw: Callable[[Tensor, Generator], object],
    denoise: by_hand.Denoise,
    data: Tensor | Data,
) -> Step:
    """With a data set, a step does what the trainer's does: draws a batch, clips, schedules, reads the loss."""
    generator, target, average = Generator().manual_seed(0), copy.deepcopy(network), copy.deepcopy(network)
    parameters, averages, targets = (list[Tensor](n.parameters()) for n in (network, average, target))
    optimiser = torch.optim.AdamW(parameters, lr=LR, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 10**6)

    def backward(x0: Tensor) -> Tensor:
        loss = method.by_hand(network, target, denoise, draw(x0, generator), x0)
        loss.backward()
        return loss.detach()

    def update() -> None:
        optimiser.step()
        optimiser.zero_grad()
        if method.target_states:
            by_hand.follow(targets, parameters, TARGET_DECAY)
        by_hand.follow(averages, parameters, EMA_DECAY)

    def step() -> None:
        assert isinstance(data, Tensor)
        backward(data)
        update()

    def step_on_data() -> tuple[float, float]:
        assert isinstance(data, Data) and data.train is not None
        loss = backward(data.train[torch.randint(len(data.train), (method.batch,), generator=generator)])
        norm = nn.utils.clip_grad_norm_(parameters, CLIP, error_if_nonfinite=True, foreach=True)
        update()
        schedule.step()
        return float(loss), float(norm)

    return step if isinstance(data, Tensor) else step_on_data


def _step_of_trainer(size: Size, method: Method, data: Data, *, fuse: bool = True) -> Step:
    loss = method.loss(Denoiser(_network(size), PROCESS))

    def hidden(x0: Tensor, *, cond: Tensor | None, generator: Generator) -> TensorDict:
        return method.draw(x0, cond=cond, generator=generator)  # a draw that is not known is not fused

    return trainer_step(Objective(method.name, loss, method.draw if fuse else hidden), data, method.batch)


def _evaluations(size: Size, method: Method) -> Step:
    """Forward and backward on the states of a step, forward on those of its target network."""
    network, x, c = _network(size), torch.randn(size.states, *size.event_shape), torch.randn(size.states)

    def evaluate() -> None:
        if method.target_states:
            with torch.no_grad():
                network(x[: method.target_states], c[: method.target_states])
        network(x, c).mean().backward()
        network.zero_grad()

    return evaluate


def _require_agreement(size: Size, method: Method, x0: Tensor) -> None:
    """Both sides compute the same loss of the same numbers, or the comparison means nothing."""
    loss, _ = _loss(size, method)
    network, generator = _network(size), Generator()
    ours = loss(method.draw(x0, cond=None, generator=generator.manual_seed(1)))["loss_value"]
    drawn = method.plain_draw(x0, generator.manual_seed(1))
    witness = method.by_hand(network, copy.deepcopy(network), by_hand.denoise, drawn, x0)
    if not torch.allclose(ours, witness, rtol=1e-3):
        raise RuntimeError(
            f"{method.name}: the loss is {ours:g} in diffrl and {witness:g} by hand: one is wrong"
        )
