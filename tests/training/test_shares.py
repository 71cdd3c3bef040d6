"""A batch that processes share: a row is one's, and gradients of the parts make that of the whole, or it is refused."""

import copy
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from diffrl import EDM, Denoiser, keys
from diffrl.diffusion.networks.mlp import MLP
from diffrl.errors import InputError
from diffrl.objectives import ValueLoss
from diffrl.objectives.denoiser_loss import DenoiserLoss
from diffrl.objectives.scheme import Objective, build_objective
from diffrl.objectives.td_adaptive import AdaptiveLoss, TrialPlan
from diffrl.training.arithmetic import Arithmetic
from diffrl.training.build import build_data, build_denoiser
from diffrl.training.distributed import RankLost, Ranks
from diffrl.training.loss_scale import LossScale
from diffrl.training.optim import Optim, Optimiser
from diffrl.training.sharding import require_shardable
from diffrl.training.shares import Gradients
from tests.kit.configs import small
from tests.kit.maps import MAPS
from tests.kit.schemes import NAMES
from tests.kit.trainers import make

ROWS = 12


@pytest.fixture(scope="module")
def base() -> dict[str, Any]:
    return small("data=gmm", "data.dim=2", "data.components=3")


def batch(base: dict[str, Any], name: str, dtype: torch.dtype) -> tuple[Objective, TensorDict]:
    """An objective with its own options, on weights that are not 0, and a batch of its states."""
    network = {**base["network"], "second_time": name in MAPS, "variance": name == "hybrid"}
    denoiser = {**base["denoiser"], "prior": "data" if name == "priorgrad" else "standard"}
    if name in ("ct", "td_ct", "cd"):
        denoiser["prediction_type"] = "consistency"
    process = {"name": "flow"} if name == "progressive" else base["process"]
    config = {
        **base,
        "objective": {"name": name},
        "network": network,
        "denoiser": denoiser,
        "process": process,
    }
    data = build_data(config)
    trained = build_denoiser(config, data).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for p in trained.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator, dtype=dtype)
    teacher = copy.deepcopy(trained) if name == "cd" else None
    objective = build_objective(config, trained, data=data, teacher=teacher)
    objective.set_progress(3, 30)
    x0, _ = data.batch(ROWS, generator)
    return objective, objective.draw(x0.to(dtype), cond=None, generator=generator)


def gradient(objective: Objective, states: TensorDictBase) -> Tensor:
    loss = objective.loss(states)["loss_value"]
    found = torch.autograd.grad(loss, [p for p in objective.loss.denoiser.parameters() if p.requires_grad])
    return torch.cat([g.flatten() for g in found])


def gradients(loss: DenoiserLoss, rank: int = 0, accumulate: int = 1) -> Gradients:
    """What one of two processes leaves."""
    parameters = [p for p in loss.denoiser.parameters() if p.requires_grad]
    return Gradients(loss, Optimiser(parameters, Optim(), 1), Arithmetic(accumulate), Ranks(rank, 2))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_each_row_is_one_processs_and_groups_are_whole(size: int) -> None:
    rows = TensorDict({"x": torch.arange(17).view(17, 1)}, [17, 1])
    grouped = rows.clone()
    grouped[keys.GROUP] = torch.tensor([4] * 3 + [2] * 3 + [7] * 3 + [0] * 3 + [9] * 3 + [1] * 2).view(
        17, 1, 1
    )
    for states, most in ((rows, 1), (grouped, 3)):
        shares = [Ranks(rank, size).share(states) for rank in range(size)]
        parts = [states[share.rows] for share in shares]
        assert torch.equal(torch.cat([part["x"] for part in parts]), states["x"])
        lengths = [len(part) for part in parts]
        assert max(lengths) - min(lengths) <= most
        assert [share.weight for share in shares] == [length / 17 for length in lengths]
        if states is grouped:
            found = [set(part[keys.GROUP].flatten().tolist()) for part in parts]
            assert sum(map(len, found)) == 6  # no group in two


def test_too_few_rows_or_groups_that_lie_apart_are_refused() -> None:
    states = TensorDict({"x": torch.zeros(4, 1)}, [4, 1])
    with pytest.raises(InputError, match=r"a batch has 4 rows for 5 processes: raise trainer\.batch_size"):
        Ranks(0, 5).share(states)
    states[keys.GROUP] = torch.tensor([0, 0, 1, 1]).view(4, 1, 1)
    with pytest.raises(InputError, match="a batch has 2 groups for 3 processes"):
        Ranks(0, 3).share(states)
    states[keys.GROUP] = torch.tensor([0, 1, 0, 1]).view(4, 1, 1)
    with pytest.raises(InputError, match="the rows of a group do not follow each other"):
        Ranks(0, 2).share(states)


@pytest.mark.filterwarnings("ignore:No target network updater")
def test_no_objective_of_diffrl_is_refused(base: dict[str, Any]) -> None:
    """In float32; of chains, and of groups, parts for three processes make the whole in float64."""
    for name in NAMES:
        objective, states = batch(base, name, torch.float32)
        assert gradients(objective.loss, 1).check(states) is False, name
    for name in ("td", "inductive_moments"):
        objective, states = batch(base, name, torch.float64)
        whole, shares = gradient(objective, states), [Ranks(rank, 3).share(states) for rank in range(3)]
        parts = [weight * gradient(objective, states[rows].clone()) for rows, weight in shares]
        torch.testing.assert_close(sum(parts), whole, rtol=0, atol=1e-12 * float(whole.norm()), msg=name)


class OfTheWhole(ValueLoss):
    """A loss in units of its own mean: its value tells nothing of the batch, its gradient everything."""

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        out = super().forward(tensordict)
        out["loss_value"] = out["loss_value"] / out["loss_value"].detach()
        return out


class Normed(MLP):
    """A network with batch normalisation."""

    def __init__(self) -> None:
        super().__init__((2,), hidden=8, depth=1)
        nn.init.normal_(self.last.weight)
        self.norm = nn.BatchNorm1d(2)

    def forward(self, *args: Any, **more: Any) -> Tensor:
        return self.norm(super().forward(*args, **more))


def test_what_looks_at_a_batch_as_a_whole_is_refused_by_name() -> None:
    trainer = make()
    states = trainer.objective.draw(
        trainer.batch(0)[0], cond=None, generator=torch.Generator().manual_seed(0)
    )
    for loss in (OfTheWhole(trainer.denoiser), ValueLoss(Denoiser(Normed(), EDM()))):
        with pytest.raises(
            InputError, match=f"^{type(loss).__name__}: the gradient of 6 rows is not the mean of"
        ):
            gradients(loss).check(states)
        assert loss.network_evaluations == 0


def test_what_is_not_shown_to_be_the_same_when_it_is_cut_is_refused_by_name() -> None:
    def of() -> Denoiser:
        return Denoiser(MLP((2,), hidden=8, depth=1), EDM())

    denoiser, frozen, wider = of(), of(), of()
    frozen.network.last.bias.requires_grad_(False)
    wider.more = nn.Linear(2, 2)
    loss, plain = ValueLoss(denoiser), Arithmetic(sharded=True)
    require_shardable(loss, plain, None)
    require_shardable(ValueLoss(denoiser, bootstrap="target"), plain, None)
    denoiser.network.scale = nn.Parameter(torch.tensor(1.0))
    for given, text in (
        ((AdaptiveLoss(of(), TrialPlan()), plain, None), "td_adaptive"),
        ((ValueLoss(of()), Arithmetic(compile=True), None), r"trainer\.compile"),
        ((ValueLoss(of()), Arithmetic(channels_last=True), None), r"trainer\.channels_last"),
        ((ValueLoss(of()), plain, LossScale()), "dtype=float16"),
        ((ValueLoss(frozen), plain, None), "a parameter that is not trained"),
        ((ValueLoss(wider), plain, None), "a parameter of the denoiser outside its network"),
        ((loss, plain, None), "a parameter that is a single number"),
    ):
        with pytest.raises(
            InputError,
            match=rf"^{text} does not go with trainer\.sharded: .*; set trainer\.sharded to false$",
        ):
            require_shardable(*given)


def test_dropout_and_unused_parameters_are_no_hindrance() -> None:
    network = MLP((2,), hidden=8, depth=1)
    nn.init.normal_(network.last.weight)
    network.unused = nn.Linear(2, 2)
    network.last = nn.Sequential(nn.Dropout(0.5), network.last)  # type: ignore[assignment]
    loss = ValueLoss(Denoiser(network, EDM()))
    trainer = make()
    states = trainer.objective.draw(
        trainer.batch(0)[0], cond=None, generator=torch.Generator().manual_seed(0)
    )
    assert gradients(loss).check(states) is True
    assert network.last[0].training
    with pytest.raises(InputError, match=r"trainer\.accumulate is 5, but there are 4 rows"):
        gradients(loss, accumulate=5).check(states)


def test_errors_of_torch_about_others_are_told_apart_from_its_own() -> None:
    ranks = Ranks(1, 4, timeout=7)
    for text in (
        "Connection closed by peer",
        "Timed out waiting 7ms for recv",
        "NCCL communicator was aborted",
    ):
        with pytest.raises(
            RankLost, match=r"process 1 of 4 lost another one, .* within 7 s \(rank_timeout\)"
        ):
            with ranks.answered():
                raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="^not enough memory$"), ranks.answered():
        raise RuntimeError("not enough memory")
