"""Estimators by name: in losses of TorchRL and in a loss of one's own, beside TorchRL's estimators."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictParams
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.modules import IndependentNormal, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss, DDPGLoss, LossModule, SoftUpdate, TD3Loss, ValueEstimators
from torchrl.objectives.utils import dispatch_value_estimator, get_value_estimator_entry
from torchrl.objectives.value import TD0Estimator, TD1Estimator, TDLambdaEstimator
from torchrl.objectives.value.functional import td_lambda_return_estimate

from diffrl.rl.estimators import ESTIMATORS, MonteCarlo, NStep, TDLambda, VectorEstimator, VectorEstimators
from diffrl.rl.returns import lambda_returns

B, K, D = 5, 6, 3


class Counted(nn.Module):
    """A linear layer that counts its calls."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.calls = 0

    def forward(self, *inputs: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(torch.cat(inputs, -1))


def vector_value() -> TensorDictModule:
    """A value of the shape of the state."""
    torch.manual_seed(0)
    return TensorDictModule(Counted(D, D), in_keys=["x_t"], out_keys=["state_value"]).double()


def chains(
    batch: tuple[int, ...] = (B, K), reward: tuple[int, ...] = (D,), ending: str = "cut inside"
) -> TensorDict:
    """Chains that are left open, terminate at the last step, or end anywhere ("cut inside")."""
    generator = torch.Generator().manual_seed(1)
    terminated = torch.zeros(*batch, 1, dtype=torch.bool)
    done = terminated.clone()
    if ending == "terminal":
        terminated[..., -1, :] = True
    if ending == "cut inside":
        terminated = torch.rand(*batch, 1, generator=generator) < 0.2
        done = torch.rand(*batch, 1, generator=generator) < 0.2

    def draw(*shape: int) -> Tensor:
        return torch.randn(*batch, *shape, generator=generator, dtype=torch.float64)

    return TensorDict(
        {
            "x_t": draw(D),
            "action": draw(2).tanh(),
            "action_log_prob": draw(),
            "next": {
                "x_t": draw(D),
                "reward": draw(*reward),
                "terminated": terminated,
                "done": terminated | done,
            },
        },
        batch,
    )


class ValueRegression(LossModule):
    """The least loss that has a value network, a target network and an estimator."""

    @dataclass
    class _AcceptedKeys:
        value: NestedKey = "state_value"

    default_value_estimator = VectorEstimators.MONTE_CARLO
    value_network: TensorDictModule
    value_network_params: TensorDictParams
    target_value_network_params: TensorDictParams

    def __init__(self, value_network: TensorDictModule) -> None:
        super().__init__()
        self.convert_to_functional(value_network, "value_network", create_target_params=True)

    def make_value_estimator(
        self, value_type: str | type | None = None, **hyperparams: Any
    ) -> "ValueRegression":
        value_type = self.default_value_estimator if value_type is None else value_type
        if isinstance(value_type, type):
            return super().make_value_estimator(value_type, **hyperparams)
        supported = (*ValueEstimators, *VectorEstimators)
        dispatch_value_estimator(self, value_type, supported=supported, tensor_keys={}, **hyperparams)
        return self

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        prediction = tensordict.select("x_t")
        with self.value_network_params.to_module(self.value_network):
            self.value_network(prediction)
        target = self.value_estimator.value_estimate(
            tensordict, target_params=self.target_value_network_params
        )
        return TensorDict({"loss_value": (prediction["state_value"] - target).square().mean()})


def ready(loss: LossModule) -> LossModule:
    """With the target network that TorchRL expects, moved away from the online one."""
    SoftUpdate(loss, eps=0.9)
    for name, target in loss.named_buffers():
        if name.startswith("target_"):
            target.mul_(0.9)
    return loss


def ddpg() -> LossModule:
    torch.manual_seed(0)
    actor = TensorDictModule(nn.Linear(D, 2), in_keys=["x_t"], out_keys=["action"]).double()
    value = ValueOperator(Counted(D + 2, 1), in_keys=["x_t", "action"]).double()
    return ready(DDPGLoss(actor, value, delay_actor=True))


def td3() -> LossModule:
    torch.manual_seed(0)
    actor = TensorDictModule(nn.Sequential(nn.Linear(D, 2), nn.Tanh()), ["x_t"], ["action"]).double()
    value = ValueOperator(Counted(D + 2, 1), in_keys=["x_t", "action"]).double()
    return ready(TD3Loss(actor, value, bounds=(-1.0, 1.0), policy_noise=0.0))


def ppo() -> LossModule:
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Linear(D, 4), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(policy, ["x_t"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        out_keys=["action"],
        distribution_class=IndependentNormal,
        return_log_prob=True,
    ).double()
    return ClipPPOLoss(actor, ValueOperator(Counted(D, 1), in_keys=["x_t"]).double())


def test_names_select_these_and_leave_torchrl_its_own() -> None:
    loss = ValueRegression(vector_value())
    for name, estimator, options in (
        ("td_lambda", TDLambda, {"lmbda": 0.5}),
        ("n_step", NStep, {"n_steps": 3}),
        ("monte_carlo", MonteCarlo, {}),
        ("TD_LAMBDA", TDLambda, {"lmbda": 0.5}),
        (VectorEstimators.N_STEP, NStep, {"n_steps": 3}),
        ("td0", TD0Estimator, {}),
        ("td1", TD1Estimator, {}),
        ("tdlambda", TDLambdaEstimator, {}),
    ):
        loss.make_value_estimator(name, **options)
        assert type(loss.value_estimator) is estimator
    assert ESTIMATORS == {"td_lambda": TDLambda, "n_step": NStep, "monte_carlo": MonteCarlo}
    torchrl_names = {member.name.lower() for member in ValueEstimators}
    assert not torchrl_names & set(ESTIMATORS)
    for member in ValueEstimators:
        assert not issubclass(get_value_estimator_entry(member).cls, VectorEstimator)


def test_what_has_no_default_must_be_given() -> None:
    loss = ValueRegression(vector_value())
    with pytest.raises(TypeError, match="lmbda"):
        loss.make_value_estimator("td_lambda")
    with pytest.raises(TypeError, match="n_steps"):
        loss.make_value_estimator("n_step")
    loss.make_value_estimator("monte_carlo")
    assert loss.value_estimator.gamma == 1.0
    with pytest.raises(KeyError, match="monte_carlo"):
        loss.make_value_estimator("montecarlo")  # the message lists the names
    for name, options in (
        ("td_lambda", {"lmbda": 1.5}),
        ("n_step", {"n_steps": 0}),
        ("monte_carlo", {"gamma": 2}),
    ):
        with pytest.raises(ValueError, match="must"):
            loss.make_value_estimator(name, **options)
    with pytest.raises(TypeError, match="lambda_"):
        loss.make_value_estimator("td_lambda", lmbda=0.5, lambda_=0.5)


@pytest.mark.parametrize("make", [ddpg, td3, ppo])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (("td_lambda", {"lmbda": 0.6}), ("tdlambda", {"lmbda": 0.6})),
        (("n_step", {"n_steps": 1}), ("td0", {})),
        (("monte_carlo", {}), ("td1", {})),
    ],
)
def test_losses_of_torchrl_give_the_same_with_either(
    make: Callable[[], LossModule], ours: tuple[str, dict[str, Any]], theirs: tuple[str, dict[str, Any]]
) -> None:
    results = []
    for name, options in (ours, theirs):
        loss = make()
        loss.make_value_estimator(name, gamma=0.9, **options)
        out = loss(chains(reward=(1,)))
        total = sum(value for key, value in out.items() if key.startswith("loss_"))
        total.backward()
        gradients = {key: p.grad for key, p in loss.named_parameters() if p.grad is not None}
        assert gradients
        results.append((out.select(*(key for key in out.keys() if key.startswith("loss_"))), gradients))
    torch.testing.assert_close(dict(results[0][0]), dict(results[1][0]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("lmbda", [0.0, 0.5, 1.0])
def test_a_vector_value_beside_done_of_one_flag_a_step(lmbda: float, gamma: float) -> None:
    loss, td = ready(ValueRegression(vector_value())), chains()
    loss.make_value_estimator("td_lambda", lmbda=lmbda, gamma=gamma)
    ours = loss(td)["loss_value"]
    flags = {key: td["next", key].expand(B, K, D) for key in ("done", "terminated")}
    target = loss.target_value_network_params
    next_value = (
        td["next", "x_t"] @ target["module", "linear", "weight"].T + target["module", "linear", "bias"]
    )
    theirs = td_lambda_return_estimate(gamma, lmbda, next_value.detach(), td["next", "reward"], **flags)
    online = loss.value_network_params
    assert not torch.equal(online["module", "linear", "weight"], target["module", "linear", "weight"])
    value = td["x_t"] @ online["module", "linear", "weight"].T + online["module", "linear", "bias"]
    torch.testing.assert_close(ours, (value - theirs).square().mean(), rtol=1e-12, atol=0.0)


def test_a_given_next_value_replaces_the_network() -> None:
    network, td = vector_value(), chains()
    next_value = torch.randn(B, K, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    estimator = TDLambda(value_network=network, lmbda=0.5, gamma=0.9)
    target = estimator.value_estimate(td, next_value=next_value)
    assert network.module.calls == 0
    nxt = td["next"]
    expected = lambda_returns(nxt["reward"], next_value, nxt["terminated"], nxt["done"], lmbda=0.5, gamma=0.9)
    assert torch.equal(target, expected)
    without_network = TDLambda(value_network=None, lmbda=0.5, gamma=0.9)
    td["next", "state_value"] = next_value
    assert torch.equal(without_network.value_estimate(td), expected)


@pytest.mark.parametrize(
    "estimator",
    [
        lambda network: MonteCarlo(value_network=network),
        lambda network: TDLambda(value_network=network, lmbda=1.0),
        lambda network: NStep(value_network=network, n_steps=K),
    ],
)
def test_monte_carlo_evaluates_no_network_if_every_chain_terminates(
    estimator: Callable[[TensorDictModule], VectorEstimator],
) -> None:
    network = vector_value()
    target = estimator(network).value_estimate(chains(ending="terminal"))
    assert network.module.calls == 0
    reward = chains(ending="terminal")["next", "reward"]
    torch.testing.assert_close(target, reward.flip(1).cumsum(1).flip(1), rtol=0.0, atol=1e-12)
    for ending in ("open", "cut inside"):
        network.module.calls = 0
        estimator(network).value_estimate(chains(ending=ending))
        assert network.module.calls == 1


def test_bootstrapping_evaluates_the_network_once() -> None:
    network = vector_value()
    for estimator in (
        TDLambda(value_network=network, lmbda=0.99),
        TDLambda(value_network=network, lmbda=torch.ones(1, K, 1)),
        NStep(value_network=network, n_steps=K - 1),
    ):
        network.module.calls = 0
        estimator.value_estimate(chains(ending="terminal"))
        assert network.module.calls == 1


@pytest.mark.parametrize("frozen", ["weight", "bias", "both"])
@pytest.mark.parametrize("functional", [False, True])
def test_frozen_parameters_stay_frozen(frozen: str, functional: bool) -> None:
    network = vector_value()
    for name, parameter in network.module.linear.named_parameters():
        parameter.requires_grad_(frozen not in {name, "both"})
    before = [p.requires_grad for p in network.parameters()]
    params = TensorDict.from_module(network).data if functional else None
    for estimator in (
        NStep(value_network=network, n_steps=2),
        NStep(value_network=network, n_steps=2, differentiable=True),
    ):
        estimator.value_estimate(chains(), target_params=params)
        estimator(chains(), params=params)
        assert [p.requires_grad for p in network.parameters()] == before


def test_gradients_reach_the_target_only_on_demand() -> None:
    network, td = vector_value(), chains()
    plain = NStep(value_network=network, n_steps=2).value_estimate(td)
    assert not plain.requires_grad
    assert not NStep(value_network=network, n_steps=2)(td)["advantage"].requires_grad
    next_value = torch.randn(B, K, D, dtype=torch.float64, requires_grad=True)
    estimate = NStep(value_network=network, n_steps=2).value_estimate
    assert not estimate(td, next_value=next_value).requires_grad

    differentiable = NStep(value_network=network, n_steps=2, differentiable=True)
    target = differentiable.value_estimate(td)
    assert torch.equal(target, plain)
    target.sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    held = TensorDict.from_module(network).data
    assert not differentiable.value_estimate(td, target_params=held).requires_grad
    with torch.no_grad():
        assert not differentiable.value_estimate(td).requires_grad


def test_target_parameters_are_used_and_put_back() -> None:
    network, td = vector_value(), chains()
    own = [p.clone() for p in network.parameters()]
    params = TensorDict.from_module(network).data.apply(lambda p: 2 * p)
    estimator = NStep(value_network=network, n_steps=1)
    target = estimator.value_estimate(td, target_params=params)
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), own, strict=True))
    nxt = td["next"]
    value = 2 * network.module.linear(nxt["x_t"])
    torch.testing.assert_close(target, nxt["reward"] + value.masked_fill(nxt["terminated"], 0.0))


def test_forward_writes_target_and_advantage() -> None:
    network, td = vector_value(), chains()
    estimator = TDLambda(value_network=network, lmbda=0.5)
    target, value = estimator.value_estimate(td), network.module.linear(td["x_t"])
    assert estimator(td) is td
    assert torch.equal(td["value_target"], target)
    torch.testing.assert_close(td["advantage"], target - value.detach(), rtol=0.0, atol=1e-12)
    assert "state_value" not in td["next"].keys()

    twice = TensorDict.from_module(network).data.apply(lambda p: 2 * p)
    thrice = TensorDict.from_module(network).data.apply(lambda p: 3 * p)
    estimator(td, params=twice, target_params=thrice)
    expected = estimator.value_estimate(td, target_params=thrice)
    torch.testing.assert_close(td["value_target"], expected, rtol=0.0, atol=1e-12)
    torch.testing.assert_close(td["advantage"], expected - 2 * value.detach(), rtol=0.0, atol=1e-12)
    estimator(td, params=twice)
    torch.testing.assert_close(td["value_target"], estimator.value_estimate(td, target_params=twice))


def test_keys_can_be_renamed() -> None:
    td, network = chains(), vector_value()
    expected = NStep(value_network=network, n_steps=2).value_estimate(td)
    renamed = NStep(value_network=network, n_steps=2)
    renamed.set_keys(reward="cumulant", done="over", terminated="clean", value_target="G")
    for old, new in (("reward", "cumulant"), ("done", "over"), ("terminated", "clean")):
        td["next"].rename_key_(old, new)
    assert torch.equal(renamed(td)["G"], expected)


def test_done_stands_for_a_missing_terminated() -> None:
    td, network = chains(), vector_value()
    td["next", "terminated"] = td["next", "done"]
    expected = MonteCarlo(value_network=network).value_estimate(td)
    del td["next", "terminated"]
    assert torch.equal(MonteCarlo(value_network=network).value_estimate(td), expected)


def test_any_number_of_batch_dims_before_time() -> None:
    td = chains((2, B, K))
    estimator = TDLambda(value_network=vector_value(), lmbda=0.5)
    targets = estimator.value_estimate(td)
    for i in range(2):
        torch.testing.assert_close(targets[i], estimator.value_estimate(td[i]))
        torch.testing.assert_close(targets[i, 0], estimator.value_estimate(td[i, 0]))


def test_a_value_per_step_or_row_of_lambda() -> None:
    td, network = chains(), vector_value()
    lmbda = torch.linspace(0, 1, K, dtype=torch.float64).view(1, K, 1)
    by_step = TDLambda(value_network=network, lmbda=lmbda).value_estimate(td)
    by_row = TDLambda(value_network=network, lmbda=lmbda.expand(B, K, 1)).value_estimate(td)
    assert torch.equal(by_step, by_row)
    last = TDLambda(value_network=network, lmbda=1.0).value_estimate(td)
    torch.testing.assert_close(by_step[:, -1], last[:, -1])


def test_refuses_what_does_not_fit() -> None:
    estimator = NStep(value_network=vector_value(), n_steps=2)
    multi_step = chains().set("steps_to_next_obs", torch.ones(B, K, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="give single steps"):
        estimator.value_estimate(multi_step)
    time_first = chains()
    time_first.names = ["time", None]
    with pytest.raises(ValueError, match="last dim must be time"):
        estimator.value_estimate(time_first)
    with pytest.raises(ValueError, match="last dim must be time"):
        estimator.value_estimate(chains()[0, 0])
    with pytest.raises(ValueError, match="next_value has shape"):
        estimator.value_estimate(chains(reward=(1,)))
    incomplete = chains()
    del incomplete["next", "x_t"]
    with pytest.raises(KeyError, match="x_t"):
        estimator.value_estimate(incomplete)
