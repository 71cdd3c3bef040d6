"""A small mixture, and chains of it in which something stands in for x0."""

from typing import Any

from diffrl.data.dataset import Data
from diffrl.data.synthetic import gmm
from diffrl.diffusion.chains import Chain
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.trajectories import ChainSampler
from diffrl.objectives import StandIn, StandInChains
from tests.kit.value_loss import PROCESS

DATA = gmm(dim=2, components=3, test_size=16)
UNKNOWN = Data("mine", test=DATA.test, draw=lambda n, generator: DATA.test[:n])


def chains(x0: str, reference: int = 0, *, process: Schedule = PROCESS, **options: Any) -> StandInChains:
    data = options.pop("data", DATA)
    sampler = ChainSampler(Chain(process, 6, options.pop("coupling", "markov")), **options)
    return StandInChains(sampler, StandIn(x0, reference), data)
