"""Every number of every method: what cannot be used is refused at construction, by the name of the option."""

import inspect
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, get_type_hints

import pytest
import torch

from diffrl.data.synthetic import gmm
from diffrl.diffusion.chains import Chain
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.networks.registry import NETWORKS
from diffrl.diffusion.samplers.registry import SAMPLERS
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.registry import PROCESSES
from diffrl.diffusion.starts import STARTS
from diffrl.diffusion.trajectories import ChainSampler
from diffrl.errors import InputError
from diffrl.objectives.registry import OBJECTIVES
from diffrl.objectives.stand_ins import StandIn
from diffrl.objectives.weights import WEIGHTS, weight_function
from tests.kit.maps import MAPS

Case = tuple[str, Callable[..., Any], str, bool]
X0 = torch.zeros(4, 2)
SUPPLIED = {
    "sampler": ChainSampler(Chain(EDM(), 6, "markov")),
    "data": gmm(dim=2, test_size=4),
    "denoiser": Denoiser(MLP((2,), hidden=4, second_time=True), EDM()),
}
NO_FLOATS = [math.nan, -math.inf, "1", True, [1.0], 10**400, -1e30]
NO_INTS = [math.nan, math.inf, 5.5, "5", True, [1], -1]
# infinity is a published setting of these: every level, and the value "clean"
ENDLESS = {("edm_stochastic", "S_max"), ("chain", "stride")}


def denoiser_for(objective: str) -> Denoiser:
    network = MLP((2,), hidden=4, variance=objective == "hybrid", second_time=objective in MAPS)
    prior: Any = "data" if objective == "priorgrad" else "standard"
    return Denoiser(network, EDM(), prediction_type="consistency", prior=prior)


def makers() -> Iterator[tuple[str, Callable[..., Any], Callable[..., Any]]]:
    """Name, the function whose signature has the options, and a call that takes them."""
    for registry in (PROCESSES, SAMPLERS, STARTS):
        for name, make in registry.items():
            yield name, make, make
    for name, make in NETWORKS.items():
        yield name, make, partial(make, (1, 8, 8))
    for entry in OBJECTIVES.entries():
        yield (
            entry.name,
            entry.make,
            lambda entry=entry, **options: entry.make(denoiser_for(entry.name), **options),
        )
        also: Any = entry.also
        if also is not None:
            given = (EDM(),) if inspect.isclass(also) else (EDM(), X0)
            asked = inspect.signature(also).parameters
            more = {name: part for name, part in SUPPLIED.items() if name in asked}
            if entry.name == "cd":
                more["teacher"] = SUPPLIED["denoiser"]
            yield f"{entry.name} states", also, partial(also, *given, **more)
    yield "chain", Chain, lambda **options: Chain(EDM(), **{"num_steps": 6, "coupling": "markov", **options})
    chain = Chain(EDM(), 6, "markov")
    yield "stand-in", StandIn, partial(StandIn, "reference")
    yield "chain sampler", ChainSampler, partial(ChainSampler, chain)
    yield "denoiser", Denoiser, partial(Denoiser, MLP((2,), hidden=4), EDM())
    for name, weight in WEIGHTS.items():
        yield f"weight {name}", weight, lambda name=name, **options: weight_function(name, options)


def cases() -> Iterator[Case]:
    for name, function, make in makers():
        hints = get_type_hints(function.__init__ if inspect.isclass(function) else function)
        for option in inspect.signature(function).parameters:
            kinds = re.findall(r"\b(?:int|float)\b", str(hints.get(option)))
            if kinds and "tuple" not in str(hints[option]):
                yield name, make, option, "float" not in kinds


CASES = list(cases())
IDS = [f"{name} {option}" for name, _, option, _ in CASES]


def test_all_kinds_are_tried() -> None:
    assert len(CASES) > 80
    assert {"edm sigma_max", "ddim eta", "td lmbda", "td_edm states span", "ct states s_1"} <= set(IDS)


@pytest.mark.parametrize(("name", "make", "option", "whole"), CASES, ids=IDS)
def test_a_number_that_cannot_be_used_is_named(
    name: str, make: Callable[..., Any], option: str, whole: bool
) -> None:
    for value in NO_INTS if whole else NO_FLOATS:
        with pytest.raises(InputError) as error:
            make(**{option: value})
        text = str(error.value)
        assert option in text and "\n" not in text, f"{value!r}: {text}"
    for value in [10**30] if whole else [math.inf, 1e38]:  # the huge ones may mean something
        if (name, option) in ENDLESS and value == math.inf:
            continue
        try:
            make(**{option: value})
        except InputError as refused:
            assert option in str(refused)
        else:
            assert math.isfinite(value), "infinity was taken"
