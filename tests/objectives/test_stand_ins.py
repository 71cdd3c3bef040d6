"""What stands in for x0 along a chain: targets by hand, by words, and the same states as without it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.objectives import SoftUpdate

from diffrl.data.dataset import Data
from diffrl.diffusion.chains import Chain
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.exact import MixtureDenoiser
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.starts import LossAwareStarts
from diffrl.diffusion.trajectories import ChainSampler
from diffrl.errors import InputError
from diffrl.experiments.reports.run_table import objective_label
from diffrl.experiments.train import run_experiment
from diffrl.objectives import (
    StandIn,
    StandInChains,
    ValueLoss,
    reference_mean,
    with_x0_mean,
)
from diffrl.objectives.scheme import Objective, build_objective
from tests.kit.configs import small
from tests.kit.oracles import Estimate, assert_within, every_process, generator, randn
from tests.kit.stand_ins import DATA, UNKNOWN, chains
from tests.kit.trainers import make
from tests.kit.value_loss import PROCESS, TARGETS, Target, denoiser, draw, gradient, number

S = 0.3 * randn(3, 7, 2, seed=9)


def with_mean(**options: Any) -> TensorDict:
    return with_x0_mean(draw(**options), S[:, : options.get("window", 7)].clone())


def by_hand(chain: TensorDict, D: Tensor, target: Target, gamma: float) -> Tensor:
    """δ of unshaped values: reward A_i S_i + κ_i x_i - (A_{i+1} S_i + κ_{i+1} x_{i+1}), and returns by recursion."""
    reached, K = chain["next"], chain.shape[1]
    r = (chain["A"] - reached["A"]) * chain["x0_mean"] + chain["kappa"] * chain["x_t"]
    r = r - reached["kappa"] * reached["x_t"]
    V = chain["A"] * D + chain["kappa"] * chain["x_t"]
    G = [torch.zeros_like(V[:, 0])] * (K + 1)
    if "lmbda" in target:
        lmbda = target["lmbda"]
        for i in reversed(range(K)):
            V_next = V[:, i + 1] if i + 1 < K else torch.zeros_like(G[0])
            G[i] = r[:, i] + gamma * ((1 - lmbda) * V_next + lmbda * G[i + 1])
    else:
        for i in range(K):
            last = min(i + int(target["n_steps"]), K)
            G[i] = gamma ** (last - i) * V[:, last] if last < K else torch.zeros_like(G[0])
            for j in range(i, last):
                G[i] = G[i] + gamma ** (j - i) * r[:, j]
    return torch.stack(G[:K], 1) - V


@pytest.mark.parametrize("value", ["posterior_mean", "clean"])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("target", TARGETS)
def test_targets_by_hand(target: Target, gamma: float, value: str) -> None:
    """With x0, in error coordinates, and without it, from the rewards of the chain."""
    model, chain = denoiser(), with_mean(value=value)
    D = model(chain["x_t"].flatten(0, 1), chain["t"].flatten()).view_as(S).detach()
    wanted = by_hand(chain, D, target, gamma).square().mean()
    loss = ValueLoss(model, gamma=gamma, weight="none", **target)
    torch.testing.assert_close(loss(chain)["loss_value"], wanted, rtol=1e-11, atol=0)
    torch.testing.assert_close(loss(chain.exclude("x0"))["loss_value"], wanted, rtol=1e-9, atol=0)
    if gamma == 1:
        torchrl = ValueLoss(model, weight="none").make_value_estimator("td0", gamma=1.0)
        of_td0 = by_hand(chain, D, {"n_steps": 1}, 1.0).square().mean()
        torch.testing.assert_close(torchrl(chain.exclude("x0"))["loss_value"], of_td0, rtol=1e-5, atol=0)


def test_the_target_of_td_0() -> None:
    """δ = 0 where D(x_t) = (1 - A'/A) S(x_t) + (A'/A) D⁻(x')."""
    model, chain = denoiser(), with_mean()
    A, A_next = chain["A"], chain["next", "A"]
    D = model(chain["x_t"].flatten(0, 1), chain["t"].flatten()).view_as(S).detach()
    D_next = torch.cat([D[:, 1:], torch.zeros_like(D[:, :1])], 1)
    target = (1 - A_next / A) * S + A_next / A * D_next
    wanted = (A * (target - D)).square().mean()
    found = ValueLoss(model, lmbda=0.0, weight="none")(chain)["loss_value"]
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=0)


def test_monte_carlo_regresses_on_it_and_lambda_1_telescopes() -> None:
    model, chain = denoiser(), with_mean()
    D = model(chain["x_t"].flatten(0, 1), chain["t"].flatten()).view_as(S).detach()
    plain = (chain["A"] * (S - D)).square().mean()
    loss = ValueLoss(model, weight="none")
    for given in (chain, chain.exclude("x0")):
        found = loss.make_value_estimator("monte_carlo")(given)["loss_value"]
        torch.testing.assert_close(found, plain, rtol=1e-11, atol=0)
    paid = (chain["A"] - chain["next", "A"]) * S
    telescoped = (paid.flip(1).cumsum(1).flip(1) - chain["A"] * D).square().mean()
    found = ValueLoss(model, weight="none", lmbda=1.0)(chain)["loss_value"]
    torch.testing.assert_close(found, telescoped, rtol=1e-11, atol=0)
    assert abs(number(telescoped / plain) - 1) > 1e-3


@pytest.mark.parametrize("bootstrap", ["own", "target", "residual"])
@pytest.mark.parametrize("window", [None, 3])
def test_the_datum_as_its_own_stand_in_changes_nothing(bootstrap: Any, window: int | None) -> None:
    model, options = denoiser(), {"lmbda": 0.5, "bootstrap": bootstrap, "denoising_coef": 0.3}
    plain, chain = draw(window=window), draw(window=window)
    chain = with_x0_mean(chain, chain["x0"].clone())
    assert torch.equal(chain["next", "reward"], plain["next", "reward"])
    loss = ValueLoss(model, **options)
    if bootstrap == "target":
        SoftUpdate(loss, eps=0.9)
    losses = [loss(c)["loss_value"] for c in (plain, chain)]
    assert torch.equal(*(gradient(loss, model) for loss in losses))


def test_the_denoising_loss_regresses_on_it_too() -> None:
    model, chain = denoiser(), with_mean()
    D = model(chain["x_t"].flatten(0, 1), chain["t"].flatten()).view_as(S)
    L_den = ((D - S).square().mean(-1, keepdim=True) / model.scalings(chain["t"]).c_out ** 2).mean()
    a, b = (ValueLoss(model, lmbda=0.5, denoising_coef=c)(chain)["loss_value"] for c in (0.0, 2.0))
    torch.testing.assert_close(b - a, 2 * L_den, rtol=1e-10, atol=0)


def test_a_stand_in_of_another_shape_is_refused() -> None:
    with pytest.raises(InputError, match=r"x0_mean has shape \(3, 2\), expected that of x0, \(3, 7, 2\)"):
        with_x0_mean(draw(), S[:, 0])


# What is drawn


@pytest.mark.parametrize("reference", [0, 20])
@every_process
def test_reference_batches_leave_the_states_alone(process: Schedule, reference: int) -> None:
    x0, _ = DATA.batch(5, generator(1))
    drawer = chains("reference", reference, process=process)
    plain = drawer.sampler(x0, cond=None, generator=generator(2))
    g = generator(2)
    drawn = drawer(x0, cond=None, generator=g)
    for name in ("x_t", "t", "x0", ("next", "x_t")):
        assert torch.equal(drawn[name], plain[name]), name
    again = generator(2)
    drawer.sampler(x0, cond=None, generator=again)
    more, _ = DATA.batch(15, again)
    rows = torch.cat([x0, more]) if reference else x0
    wanted = reference_mean(process, plain["x_t"].flatten(0, 1), plain["t"].flatten(), rows)
    assert torch.equal(drawn["x0_mean"].flatten(0, 1), wanted)
    if reference:
        assert torch.equal(torch.rand(3, generator=g), torch.rand(3, generator=again))


def test_the_exact_mean_is_the_oracles() -> None:
    x0, _ = DATA.batch(5, generator(1))
    drawn = chains("exact")(x0, cond=None, generator=generator(2))
    m = DATA.mixture
    assert m is not None
    exact = MixtureDenoiser(PROCESS, m.means, m.stds, m.weights)
    assert torch.equal(
        drawn["x0_mean"].flatten(0, 1), exact(drawn["x_t"].flatten(0, 1), drawn["t"].flatten())
    )
    delta = ValueLoss(Denoiser(MLP((2,), hidden=4), PROCESS), lmbda=0.0)(drawn)["td_error"]
    assert number(delta) > 0


def test_the_targets_of_a_reference_batch_are_unbiased() -> None:
    """Every λ, bootstrapped from the exact denoiser: E[δ φ(x_t)] = 0 at each level, own batch of 4."""
    m, M, n = DATA.mixture, 1500, 4
    assert m is not None
    exact = MixtureDenoiser(PROCESS, m.means, m.stds, m.weights)
    drawer, g = chains("reference", jitter=False), generator(3)
    parts = [drawer(DATA.batch(n, g)[0].double(), cond=None, generator=g) for _ in range(M)]
    chain = torch.cat(parts)
    D = exact(chain["x_t"].flatten(0, 1), chain["t"].flatten()).view_as(chain["x_t"])
    spread = []
    for target in ({"lmbda": 0.0}, {"lmbda": 0.5}, {"lmbda": 1.0}):
        delta = by_hand(chain, D, target, 1.0)
        for phi in (torch.ones_like(chain["x_t"]), chain["x_t"]):
            mean = (delta * phi).view(M, n, -1, 2).mean(1)
            assert_within(Estimate(mean.mean(0), mean.std(0) / M**0.5), 0.0)
        spread.append(float(delta[:, 2].var()))
    datum = chain["A"] * (chain["x0"] - D)
    of_datum, plain = float(datum[:, 2].var()), chain["A"] * (chain["x0_mean"] - D)
    assert spread[0] < spread[1] < of_datum
    assert float(plain[:, 2].var()) < of_datum


# Labels, refusals


def test_labels_choose_the_rows() -> None:
    x, labels = randn(12, 2, dtype=torch.float32), torch.arange(12) % 3
    data = Data("mine", test=x, test_labels=labels, train=x, train_labels=labels, num_classes=3)
    sampler = ChainSampler(Chain(EDM(), 5, "markov"))
    drawer = StandInChains(sampler, StandIn("exact"), data, num_classes=3)
    cond = torch.tensor([0, 2, 3])
    drawn = drawer(x[[0, 2, 1]], cond=cond, generator=generator())
    for k, seen in enumerate([x[labels == 0], x[labels == 2], x]):
        wanted = reference_mean(EDM(), drawn["x_t"][k], drawn["t"][k, :, 0], seen)
        torch.testing.assert_close(drawn["x0_mean"][k], wanted)
    own = StandInChains(sampler, StandIn("reference", 9), data, num_classes=3)
    assert bool(own(x[:3], cond=cond, generator=generator())["x0_mean"].isfinite().all())


@pytest.mark.parametrize(
    ("make_it", "says"),
    [
        (lambda: StandIn("mean"), "x0 is 'mean': give one of datum, reference"),
        (lambda: StandIn("datum", 4), "reference is 4, but x0=datum uses no reference batch"),
        (lambda: StandIn("exact", 4), "reference is 4, but x0=exact"),
        (lambda: StandIn("reference", -1), "reference is -1"),
        (lambda: chains("reference", 20, data=None), "reference=20 needs the data"),
        (lambda: chains("exact", data=None), "x0=exact needs the data"),
        (lambda: chains("exact", data=UNKNOWN), "the law of mine is not known"),
        (
            lambda: chains("redrawn", window=2, starts=LossAwareStarts()),
            "starts that learn need chain.window=1",
        ),
        (
            lambda: chains("reference", 4)(DATA.test, cond=None, generator=generator()),
            "reference is 4, but a batch has 16 rows",
        ),
        (
            lambda: chains("reference", 99, data=Data("few", test=DATA.test, train=DATA.test))(
                DATA.test, cond=None, generator=generator()
            ),
            "reference is 99, but few has 16 training rows: set x0=exact",
        ),
    ],
)
def test_what_is_refused(make_it: Any, says: str) -> None:
    with pytest.raises(InputError) as error:
        make_it()
    assert str(error.value).startswith(says) or says in str(error.value)
    assert "\n" not in str(error.value)


# By words


def build(*words: str, baseline: bool = False, data: Data | None = DATA) -> Objective:
    config = small("data=gmm", "data.dim=2", "compare=false", *words)
    model = Denoiser(MLP((2,), hidden=4), EDM())
    return build_objective(config, model, data=data, baseline=baseline)


REFERENCE = ("chain.x0=reference", "chain.reference=20")


def test_words_combine_with_every_objective_of_chains() -> None:
    for words in (["objective=monte_carlo"], ["objective.lmbda=0"], ["objective=td_lambda_schedule"]):
        objective = build(*words, *REFERENCE)
        chain = objective.draw(DATA.test[:8], cond=None, generator=generator())
        assert "x0_mean" in chain.keys()
        assert number(objective.loss(chain)["loss_value"]) > 0
    plain = build("objective.lmbda=0", *REFERENCE, baseline=True)
    assert plain.name == "monte_carlo" and isinstance(plain.draw, ChainSampler)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["chain.x0=redrawn", "objective.lmbda=0.5"], "chain.x0=redrawn makes steps of their own"),
        (["chain.x0=redrawn", "objective.anneal={n_steps: [1, 3]}"], "and anneal neither that nor n_steps"),
        (
            ["chain.x0=exact", "objective=td_edm"],
            "objective td_edm knows no stand-in for x0: set chain.x0=datum",
        ),
        (["chain.x0=mean"], "chain.x0 is 'mean'"),
        (["chain.reference=8"], "chain.reference is 8"),
    ],
)
def test_words_that_do_not_combine(words: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        build(*words)
    with pytest.raises(InputError, match=r"^chain\.reference=20 needs the data|reference=20 needs the data"):
        build("objective.lmbda=0", *REFERENCE, data=None)


@pytest.mark.parametrize(
    ("words", "label"),
    [
        (["objective=monte_carlo", *REFERENCE], "STF 20"),
        (["objective=monte_carlo", "chain.x0=reference"], "STF own batch"),
        (["objective=monte_carlo", "chain.x0=exact"], "Exact denoiser (floor)"),
        (["objective.lmbda=0", *REFERENCE], "TD(0) + STF 20"),
        (["objective.lmbda=0.5", "chain.x0=exact"], "TD(λ=0.5) + exact mean"),
        (["objective.lmbda=0", "chain.x0=redrawn"], "TD(0), x0 redrawn from own batch"),
        (["objective.lmbda=0", "chain.x0=plug_in", "chain.reference=20"], "TD(0), plug-in step of STF 20"),
        (["objective.lmbda=0"], "TD(0)"),
    ],
)
def test_labels_for_people(words: list[str], label: str) -> None:
    config = small("data=gmm", *words)
    assert objective_label(config["objective"]["name"], config) == label
    if config["objective"]["name"] == "td":
        assert objective_label("monte_carlo", config) == "Monte Carlo"


def test_a_checkpoint_knows_its_stand_in() -> None:
    trainer = make()
    assert trainer.facts["chain.x0"] == "datum" and trainer.facts["chain.reference"] == 0
    object.__setattr__(trainer.objective, "draw", chains("reference", 20))
    assert trainer.facts["chain.x0"] == "reference" and trainer.facts["chain.reference"] == 20


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    words = [
        "data=gmm",
        "data.dim=2",
        "compare=false",
        "optim.decay=none",
        "objective=monte_carlo",
        *REFERENCE,
    ]
    words += ["eval.num_steps=[2]", "trainer.checkpoint_every=4", "trainer.eval_every=4"]
    whole = run_experiment(
        small(*words, "trainer.grad_steps=8", f"run_dir={tmp_path / 'whole'}"), progress=False
    )
    short = small(*words, "trainer.grad_steps=4", f"run_dir={tmp_path / 'short'}")
    run_experiment(short, progress=False)
    gone_on = run_experiment({**short, "resume": str(tmp_path / "short"), "extend": 8}, progress=False)
    a, b = (folder.results()["objectives"]["monte_carlo"] for folder in (whole, gone_on))
    assert a["grad_steps"] == 8 and a["value_error"] == b["value_error"]
    assert a["network_evaluations"] == b["network_evaluations"]
