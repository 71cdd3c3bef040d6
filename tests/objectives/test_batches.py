"""What a batch dimension means to a loss: the last one is time, `done` ends a chain, single transitions are [N, 1]."""

import warnings
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

import diffrl.envs
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.networks import MLP
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.trajectories import sample_chain
from diffrl.errors import InputError, InputKeyError, InputTypeError
from diffrl.objectives import ConsistencyLoss, SoftUpdate, ValueLoss, sample_consistency_pairs
from tests.kit.value_loss import TARGETS, Target, data, denoiser, draw, number

STEPS = 6
EVERY: list[dict[str, Any]] = [*TARGETS, {"lmbda": 0.5, "bootstrap": "target"}, {"n_steps": 3, "gamma": 0.9}]


def rollout(frames: int, batch: list[int] | None = None) -> TensorDict:
    """Successive frames of one environment, or of several; chains of six steps follow one another."""
    points = data(50).float()
    env = diffrl.envs.DiffusionMRP(EDM(), points, num_steps=STEPS, batch_size=batch or [], seed=0)
    return env.rollout(frames, break_when_any_done=False)


def value(states: TensorDict, **options: Any) -> float:
    torch.manual_seed(0)
    D = Denoiser(MLP((2,), hidden=8), EDM())
    nn.init.normal_(D.network.last.weight)  # it is 0 at the start, which makes many targets alike
    loss = ValueLoss(D, **options)
    if options.get("bootstrap") == "target":
        SoftUpdate(loss, eps=0.9)
        nn.init.normal_(loss.bootstrap_network.module.denoiser.network.last.weight)
    return number(loss(states)["loss_value"])


@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize("hidden", [False, True], ids=["x0", "no x0"])
def test_a_single_environments_rollout_is_one_row_of_time(target: Target, hidden: bool) -> None:
    states = rollout(60)
    states = states.exclude("x0") if hidden else states
    assert states.batch_size == (60,)
    wanted = value(states.unsqueeze(0), **target)
    assert value(states, **target) == wanted
    chains = states.reshape(10, STEPS)  # which is how it falls into chains
    assert value(chains, **target) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    "targets", [[{"lmbda": x} for x in (0.0, 0.5, 1.0)], [{"n_steps": n} for n in (1, 3, 6)]]
)
def test_targets_differ_on_one_chain(targets: list[Target]) -> None:
    states = rollout(STEPS)
    losses = [value(states, **target) for target in targets]
    assert losses == [value(states.unsqueeze(0), **target) for target in targets]
    assert len({round(x, 4) for x in losses}) == 3


def test_a_cut_row_bootstraps_where_it_is_cut() -> None:
    """Nine frames: a chain, and half of the next, whose last state is bootstrapped by a forward pass of its own."""
    states, one = rollout(9), {"n_steps": 1}
    single = [value(states[k : k + 1].unsqueeze(-1), **one) for k in range(9)]
    assert value(states, **one) == pytest.approx(sum(single) / 9, rel=1e-5)


@pytest.mark.parametrize("target", EVERY)
def test_single_transitions_are_asked_for_by_shape(target: Target) -> None:
    """In any order; as a row they would be no chain, which is said and not guessed."""
    states = rollout(12)
    mixed = states[torch.randperm(12, generator=torch.Generator().manual_seed(3))]
    assert value(mixed.unsqueeze(-1), **target) == pytest.approx(
        value(states.unsqueeze(-1), **target), rel=1e-5
    )
    with pytest.raises(InputError, match=r"single transitions as \[N, 1\]"):
        value(mixed, **target)


def test_entries_as_keywords_have_the_batch_of_their_times() -> None:
    """Also for events of one number, whose entries all end in a dim of size 1."""
    chain, loss = draw(x0=data(3, (1,))), ValueLoss(denoiser(event_shape=(1,)), lmbda=0.5)
    names = ["_".join(key) if isinstance(key, tuple) else key for key in loss.in_keys]
    found, _ = loss(**{name: chain[key] for name, key in zip(names, loss.in_keys, strict=True)})
    assert number(found) == pytest.approx(number(loss(chain)["loss_value"]), rel=1e-11)


def test_pairs_stand_for_themselves_in_every_batch_size() -> None:
    D = Denoiser(MLP((2,), hidden=8), EDM(), prediction_type="consistency")
    nn.init.normal_(D.network.last.weight)
    loss = ConsistencyLoss(D, td_coef=1.0, consistency_coef=0.5, bootstrap="own")
    pairs = sample_consistency_pairs(EDM(), data(8).float(), num_scales=20)
    wanted = number(loss(pairs)["loss_value"])
    for same in (pairs.squeeze(1), pairs.reshape(2, 4), pairs.reshape(2, 2, 2)):
        assert number(loss(same)["loss_value"]) == pytest.approx(wanted, rel=1e-6)


# What a loss is not fed with


def test_a_loss_wants_chains() -> None:
    loss = ValueLoss(denoiser())
    with pytest.raises(InputKeyError, match=r"^t, A, .* missing .*give the states of diffrl\.sample_chain"):
        loss(data())
    consistent = ConsistencyLoss(
        Denoiser(MLP((2,)), EDM(), prediction_type="consistency"),
        td_coef=1.0,
        consistency_coef=0.5,
        bootstrap="own",
    )
    with pytest.raises(InputKeyError, match=r"^valid missing .*sample_consistency_pairs"):
        consistent(draw())
    for states in (draw()[:0], draw()[:, :0]):
        with pytest.raises(InputError, match="the batch is empty"):
            loss(states)
    with pytest.raises(InputError, match=r"batch size \[\]: the last dim must be time"):
        loss(draw()[0, 0])
    named = draw()
    named.names = ["time", "env"]
    with pytest.raises(InputError, match="the last dim must be time"):
        loss(named)


def test_a_key_error_of_ones_own_network_stays() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as error:
        ValueLoss(Denoiser(Broken(), EDM()))(draw(EDM()))
    assert not isinstance(error.value, InputKeyError)


@pytest.mark.parametrize(
    "make", [ValueLoss, lambda net: ConsistencyLoss(net, td_coef=1.0, consistency_coef=0.5)]
)
def test_a_bare_network_is_no_denoiser(make: Any) -> None:
    with pytest.raises(InputTypeError, match=r"Loss trains a denoiser, not a MLP: give diffrl\.Denoiser\("):
        make(MLP((2,)))


def test_a_network_with_labels_wants_labels() -> None:
    D, x0 = Denoiser(MLP((2,), num_classes=3), EDM()), data(8).float()
    with pytest.raises(InputError, match=r"takes labels \(num_classes=3\), but cond is missing"):
        ValueLoss(D)(sample_chain(EDM(), x0, num_steps=3))
    none = torch.full((8,), 3)
    ValueLoss(D)(sample_chain(EDM(), x0, num_steps=3, cond=none))


@pytest.mark.parametrize(
    ("scale", "said"), [(2000.0, "is 1"), (1e-3, "is 0.000"), (1.0, None), (1.75, None), (4.0, "is 2.")]
)
def test_a_scale_of_the_data_far_from_sigma_data_is_said_once(scale: float, said: str | None) -> None:
    x0, loss = scale * data(64).float(), ValueLoss(Denoiser(MLP((2,)), EDM()))
    chain = sample_chain(EDM(), x0, num_steps=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss(chain)
        loss(chain)
    texts = [str(w.message) for w in caught]
    assert len(texts) == (said is not None)
    assert all(f"sigma_data is 0.5, but the data's standard deviation {said}" in text for text in texts)
