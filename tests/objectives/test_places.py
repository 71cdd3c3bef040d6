"""Coordinates of the objectives: each has them, and the losses do what they say."""

from dataclasses import replace
from functools import cache
from inspect import isclass, signature
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from diffrl import keys
from diffrl.objectives.maps.loss import TwoTimeLoss
from diffrl.objectives.maps.td_map import MapChains
from diffrl.objectives.place import Place
from diffrl.objectives.registry import OBJECTIVES
from diffrl.objectives.scheme import Objective, build_objective
from diffrl.objectives.soft_update import SoftUpdate
from diffrl.rl.estimators import MonteCarlo
from diffrl.training.build import build_data, build_denoiser
from tests.kit.configs import small
from tests.kit.schemes import CONSISTENCY, NAMES, WORDS

PLACES: dict[str, Place] = {name: OBJECTIVES.entry(name).place for name in NAMES}
BATCH = 32


@cache
def settings(*words: str) -> dict[str, Any]:
    return small(*words)


# What it is tried on


class Scheme:
    """An objective in the middle of its training, with a network whose last layer is not 0, in float64."""

    def __init__(self, name: str, *words: str, step: int = 50) -> None:
        config = settings(f"objective={name}", *WORDS.get(name, ()), *words)
        torch.manual_seed(0)
        data = build_data(config)
        denoiser = build_denoiser(config, data).double()
        for parameter in denoiser.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        self.asked: list[tuple[float, ...]] | None = None
        self.threshold, self.shift = -torch.inf, 0.0
        denoiser.network.register_forward_hook(
            lambda *given: self._hook(*given)
        )  # of a copy too, a target network
        self.objective: Objective = build_objective(config, denoiser, data=data)
        self.objective.set_progress(step, 100)
        self.loss, self.denoiser, self.data = self.objective.loss, denoiser, data
        if self.loss.bootstrap_network is not self.loss.value_network:
            SoftUpdate(self.loss, eps=0.9)
        if step and hasattr(self.loss, "plan"):
            self.loss.lmbda = self.loss.plan.candidates[1]  # as after a trial

    def _hook(self, network: object, given: tuple[Any, ...], out: Tensor) -> Tensor:
        """Note what the network is asked about; at low noise shift what it says, which nothing learns then."""
        x, c_noise = given[:2]
        if self.asked is not None:
            self.asked += [(*row, level) for row, level in zip(x.tolist(), c_noise.tolist(), strict=True)]
        if self.threshold == -torch.inf:
            return out
        low = (c_noise < self.threshold).view(-1, *[1] * (out.ndim - 1))
        return torch.where(low, out.detach() + self.shift, out)

    def draw(self, batch: int = BATCH) -> TensorDict:
        generator = torch.Generator().manual_seed(0)
        x0, _ = self.data.batch(batch, generator=generator)
        return self.objective.draw(x0.double(), cond=None, generator=generator)

    def value(self, states: TensorDict) -> Tensor:
        torch.manual_seed(0)
        value: Tensor = self.loss(states.clone())["loss_value"]
        return value

    def gradient(self, states: TensorDict) -> Tensor:
        parameters = [p for p in self.denoiser.parameters() if p.requires_grad]
        grads = torch.autograd.grad(self.value(states), parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in grads])

    def states_asked_about(self, states: TensorDict) -> set[tuple[float, ...]]:
        self.asked = []
        self.value(states)
        asked, self.asked = {tuple(round(x, 9) for x in row) for row in self.asked}, None
        return asked

    def hangs_on_less_noise(self, states: TensorDict) -> bool:
        """Whether what is learnt at high noise depends on what the networks say at low noise."""
        t = states[keys.T].flatten()
        self.threshold = float(self.denoiser.process.c_noise(t.median()))
        try:
            before = self.gradient(states)
            self.shift = 1.0
            return not torch.allclose(self.gradient(states), before, rtol=1e-9, atol=1e-12)
        finally:
            self.threshold, self.shift = -torch.inf, 0.0

    def move(self, *modules: torch.nn.Module) -> None:
        with torch.no_grad():
            for module in modules:
                for i, parameter in enumerate(module.parameters()):
                    noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
                    parameter.add_(noise, alpha=0.1)


@cache
def scheme(name: str) -> Scheme:
    return Scheme(name)


def test_every_objective_of_the_library_has_coordinates() -> None:
    assert {name for name, place in PLACES.items() if not isinstance(place, Place)} == set()


def test_a_wrong_coordinate_is_named() -> None:
    place = PLACES["ct"]
    with pytest.raises(ValueError, match="learns is 'love': give one of denoiser, to_clean, to_next, map"):
        replace(place, learns="love")
    with pytest.raises(ValueError, match="begins is 'late': give one of end, n_steps"):
        replace(place, begins="late")
    with pytest.raises(ValueError, match="look is 'end' and bootstrap 'target'"):
        replace(place, look="end")


@pytest.mark.parametrize("name", NAMES)
def test_maps_are_what_needs_a_second_time(name: str) -> None:
    made = OBJECTIVES.entry(name).make
    is_map = isclass(made) and issubclass(made, TwoTimeLoss)
    assert (PLACES[name].learns == "map") == is_map
    if is_map:
        with pytest.raises(ValueError, match=r"second.time"):
            Scheme(name, "network.second_time=false")


def test_what_has_the_form_of_a_consistency_function_learns_one() -> None:
    assert {PLACES[name].learns for name, words in WORDS.items() if words[:1] == CONSISTENCY} == {"to_clean"}


@pytest.mark.parametrize("name", NAMES)
def test_chains_are_what_has_no_states_of_its_own(name: str) -> None:
    entry, place = OBJECTIVES.entry(name), PLACES[name]
    assert (place.states == "chains") == (entry.also in (None, MapChains))
    on_chains = entry.also is None or "sampler" in signature(entry.also).parameters
    assert (place.coupling == "any") == on_chains
    assert (place.coupling == "none") == (place.states == "states" and place.look == "end")


@pytest.mark.parametrize("name", NAMES)
def test_as_many_states_are_asked_about_as_it_says(name: str) -> None:
    states = scheme(name).draw()
    asked = len(scheme(name).states_asked_about(states))
    if PLACES[name].states == "pairs":
        assert BATCH < asked
    else:
        valid = states.get(keys.VALID, torch.ones(states.batch_size))
        assert asked == valid.sum()  # levels past the second time of a chain are not asked about
        assert (states.batch_size[1] > 1) == (PLACES[name].states == "chains")


@pytest.mark.parametrize("name", NAMES)
def test_what_looks_to_the_end_hears_nothing_of_less_noise(name: str) -> None:
    place, made = PLACES[name], scheme(name)
    elsewhere = place.states != "states"  # n → 0 at the state itself asks about it alone
    assert made.hangs_on_less_noise(made.draw(128)) == (place.bootstrap != "nothing" and elsewhere)


@pytest.mark.parametrize("name", NAMES)
def test_what_it_bootstraps_from(name: str) -> None:
    """A gradient that stops in the own prediction is no derivative of the loss; every other is."""
    made, bootstrap = Scheme(name), PLACES[name].bootstrap
    states, h = made.draw(), 1e-6
    has_target = made.loss.bootstrap_network is not made.loss.value_network
    assert has_target == (bootstrap in ("target", "teacher"))
    if not isinstance(made.loss._value_estimator, MonteCarlo):  # which asks no network
        assert made.loss.bootstrap == ("target" if bootstrap == "teacher" else bootstrap)
    v = torch.randn(made.gradient(states).shape, generator=torch.Generator().manual_seed(1)).double()
    along = float(made.gradient(states) @ v)
    parameters = [p for p in made.denoiser.parameters() if p.requires_grad]
    start, ends = torch.nn.utils.parameters_to_vector(parameters).detach(), []
    for sign in (1, -1):
        torch.nn.utils.vector_to_parameters(start + sign * h * v, parameters)
        ends.append(float(made.value(states).detach()))
    derivative = (ends[0] - ends[1]) / (2 * h)
    stopped = derivative != pytest.approx(along, rel=1e-4, abs=1e-8)
    assert stopped == (bootstrap == "own" or name == "hybrid")  # which holds D in the loss of the variance
    torch.nn.utils.vector_to_parameters(start, parameters)
    if has_target:
        before = made.gradient(states)
        made.move(made.loss.bootstrap_network)
        assert not torch.allclose(made.gradient(states), before)


@pytest.mark.parametrize("name", NAMES)
def test_where_the_next_state_comes_from(name: str) -> None:
    """States that the networks made move with them; those of the forward process, of data or of a teacher do not."""
    place, made = PLACES[name], Scheme(name)
    if place.look == "instant" and place.states == "states":
        return  # there is a direction, and no further state
    first = made.states_asked_about(made.draw())
    made.move(made.loss.bootstrap_network, made.denoiser)
    moved = made.states_asked_about(made.draw()) != first
    assert moved == (place.next_state == "own" or place.bootstrap == "teacher")


PAIRS = [
    name
    for name, place in PLACES.items()
    if place.next_state == "forward" and place.states == "pairs" and place.learns != "map"
]


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_share_their_noise_where_it_says_so(name: str) -> None:
    states = scheme(name).draw()
    x, t, x0 = states[keys.X_T], states[keys.T], states[keys.X0]
    x_next, s = states[keys.NEXT, keys.X_T], states[keys.NEXT, keys.T]
    one_line = torch.allclose(x_next, torch.lerp(x0, x, s / t), atol=1e-9)
    assert one_line == (PLACES[name].coupling == "shared")


@pytest.mark.parametrize("name", NAMES)
def test_a_teacher_is_asked_for_where_it_says_so(name: str) -> None:
    place = PLACES[name]
    if place.bootstrap == "teacher":
        assert place.next_state == "teacher" and scheme(name).objective.target_decay == 1  # it stands still
    elif place.next_state == "teacher":
        with pytest.raises(ValueError, match="teacher is None"):
            Scheme(name, "objective.teacher=null")
    else:
        assert "teacher=exact" not in "".join(WORDS.get(name, ()))


@pytest.mark.parametrize("name", [name for name, place in PLACES.items() if place.begins is not None])
def test_what_begins_otherwise_begins_as_monte_carlo(name: str) -> None:
    assert PLACES[name].begins == "end"
    begun, later = Scheme(name, step=0), Scheme(name, step=99)
    if not name.endswith("ct"):
        assert not begun.hangs_on_less_noise(begun.draw(128))
        return
    shares = [float(made.draw(512)[keys.VALID].double().mean()) for made in (begun, later)]
    assert shares[0] < 0.3 and shares[1] > 0.9  # of the pairs that do not end at the datum
