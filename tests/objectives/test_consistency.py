"""Consistency training and its TD term: formulas again in plain float64, targets, multistep sampling."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.objectives import SoftUpdate

from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.samplers.base import Model, Noise
from diffrl.diffusion.samplers.consistency import Multistep
from diffrl.diffusion.samplers.loop import sample, trajectory
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.vp import VP
from diffrl.diffusion.trajectories import sample_chain
from diffrl.objectives.consistency import METRICS, ConsistencyLoss, ct_loss, td_ct_loss
from diffrl.objectives.consistency_pairs import ConsistencyPairs, sample_consistency_pairs
from diffrl.objectives.value import ValueLoss
from tests.kit.consistency import SIGMA_DATA, SIGMA_MAX, SIGMA_MIN, Wave, consistency, level
from tests.kit.oracles import generator, randn

# The boundary form


def test_boundary_form() -> None:
    x = randn(64, 3)
    sigma = torch.logspace(math.log10(SIGMA_MIN), math.log10(SIGMA_MAX), 64, dtype=torch.float64)
    D_x, network = consistency()(x, sigma), Wave()
    for n in range(64):  # td.md, section 3, in plain numbers
        s = float(sigma[n])
        c_skip = SIGMA_DATA**2 / ((s - SIGMA_MIN) ** 2 + SIGMA_DATA**2)
        c_out = (s - SIGMA_MIN) * SIGMA_DATA / math.sqrt(s**2 + SIGMA_DATA**2)
        c_in = 1 / math.sqrt(s**2 + SIGMA_DATA**2)
        F_x = network(c_in * x[n : n + 1], torch.tensor([math.log(s) / 4], dtype=torch.float64), None)
        torch.testing.assert_close(D_x[n : n + 1], c_skip * x[n : n + 1] + c_out * F_x, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_identity_at_sigma_min(dtype: torch.dtype) -> None:
    x, process = randn(5, 1, 4, 4).to(dtype), EDM()
    sigma_min = process.time_grid(18)[17].to(torch.promote_types(dtype, torch.float32)).expand(5)
    assert torch.equal(sigma_min.double(), sigma_min.double()[:1].expand(5))
    for t in (sigma_min, torch.full((5,), SIGMA_MIN, dtype=sigma_min.dtype)):
        torch.testing.assert_close(
            consistency()(x, t), x, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0
        )


@pytest.mark.parametrize(
    ("time_input", "told"),
    [
        ("c_noise", lambda s: math.log(s) / 4),
        ("c_noise_x1000", lambda s: 250 * math.log(s)),
        ("t", lambda s: s),
    ],
)
def test_what_the_network_is_told(time_input: Any, told: Callable[[float], float]) -> None:  # noqa: ANN401
    seen = []

    class Listener(nn.Module):
        def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None) -> Tensor:
            seen.append(c_noise)
            return x

    sigma = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
    consistency(Listener(), time_input=time_input)(randn(3, 2), sigma)
    torch.testing.assert_close(seen[0], torch.tensor([told(float(s)) for s in sigma], dtype=torch.float64))


# The formula of the loss


def reference(  # td.md, section 3, one pair after another
    f: Denoiser,
    f_minus: Denoiser,
    x0: Tensor,
    noise: Tensor,
    index: Tensor,
    N: int,
    *,
    td: bool,
    c: float,
    kappa: str,
    stride: float,
    td_weight: str,
    metric: str,
    ct_weight: str,
) -> Tensor:
    def kappa_of(t: float, s: float) -> float:
        return (s / t) ** 2 if kappa == "markov" else s / t

    total = torch.zeros((), dtype=torch.float64)
    for b, i in enumerate(index.tolist()):
        t, t_next = level(i, N), level(i + 1, N)
        at = torch.tensor([t, t_next], dtype=torch.float64)
        x_t, x_next = x0[b] + t * noise[b], x0[b] + t_next * noise[b]
        y, target = f(x_t[None], at[:1])[0], f_minus(x_next[None], at[1:])[0].detach()
        u = y - target
        D = u.numel()
        if metric == "l2":
            d = (u**2).sum() / D
        elif metric == "l1":
            d = u.abs().sum() / D
        else:
            huber = 0.00054 * math.sqrt(D)
            d = (torch.sqrt((u**2).sum() + huber**2) - huber) / math.sqrt(D)
        L_CT = d * (1.0 if ct_weight == "uniform" else 1 / t**2 + 1 / SIGMA_DATA**2)
        if not td:
            total = total + L_CT
        elif i == N - 2:
            total = total + (1 + c) * L_CT
        else:
            A = 1 - kappa_of(t, level(i + stride, N))
            A_next = 1 - kappa_of(t_next, level(i + 1 + stride, N))
            delta = A * (x0[b] - y) - A_next * (x0[b] - target)
            w = 1 / max(A**2 + A_next**2 if td_weight == "sum_sq" else A + A_next, 0.01)
            total = total + w * (delta**2).sum() / D + c * L_CT
    return total / len(x0)


def parted(loss: ConsistencyLoss | ValueLoss) -> Denoiser:
    """Move the network away from its target; a denoiser that equals the target."""
    if loss.bootstrap == "target":
        SoftUpdate(loss, eps=0.9)  # begins with a copy
    online = copy.deepcopy(loss.denoiser)
    with torch.no_grad():
        loss.denoiser.network.scale.mul_(1.3)
        loss.denoiser.network.shift.add_(0.2)
    return online


@pytest.mark.parametrize("num_scales", [2, 3, 18, 151])
@pytest.mark.parametrize(
    "options",
    [
        {"td": False, "metric": "l2"},
        {"td": False, "metric": "l1", "ct_weight": "karras"},
        {"td": False, "metric": "pseudo_huber"},
        {"td": True, "metric": "l2"},
        {"td": True, "metric": "pseudo_huber", "td_weight": "sum", "c": 1.0},
        {"td": True, "metric": "l1", "kappa": "shared", "ct_weight": "karras"},
        {"td": True, "metric": "l2", "stride": 1.0, "c": 0.0},
        {"td": True, "metric": "l2", "stride": 2.5},  # one-step means at the end of the grid
    ],
    ids=lambda options: "-".join(str(v) for v in options.values()),
)
def test_loss_equals_the_published_formula(num_scales: int, options: dict[str, Any]) -> None:
    given = {
        "c": 0.5,
        "kappa": "markov",
        "stride": 0.25,
        "td_weight": "sum_sq",
        "ct_weight": "uniform",
    } | options
    B, N = 12, num_scales
    x0, noise = SIGMA_DATA * randn(B, 2, 3), randn(B, 2, 3, seed=1)
    index = torch.arange(B) % (N - 1)
    index[:2] = N - 2
    shared = {"metric": given["metric"], "ct_weight": given["ct_weight"]}
    loss = (
        td_ct_loss(consistency(), td_weight=given["td_weight"], consistency_coef=given["c"], **shared)
        if given["td"]
        else ct_loss(consistency(), **shared)
    )
    f_minus = parted(loss)
    pairs = sample_consistency_pairs(
        EDM(), x0, num_scales=N, stride=given["stride"], kappa=given["kappa"], index=index, noise=noise
    )
    out = loss(pairs)
    expected = reference(loss.denoiser, f_minus, x0, noise, index, N, **given)
    torch.testing.assert_close(out["loss_value"], expected, rtol=1e-12, atol=0)

    ours = torch.autograd.grad(out["loss_value"], list(loss.denoiser.parameters()))
    theirs = torch.autograd.grad(expected, list(loss.denoiser.parameters()))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_coefficients_at_their_ends() -> None:
    pairs = sample_consistency_pairs(EDM(), randn(64, 2), num_scales=8, generator=generator())
    pairs = pairs[pairs["valid"].squeeze(-1)].unsqueeze(1)
    parts = {}
    for b, c in ((1.0, 0.0), (0.0, 1.0), (1.0, 0.5), (2.0, 3.0)):
        loss = ConsistencyLoss(consistency(), td_coef=b, consistency_coef=c)
        parted(loss)
        parts[b, c] = loss(pairs)["loss_value"]
    L_TD, L_CT = parts[1.0, 0.0], parts[0.0, 1.0]
    torch.testing.assert_close(parts[1.0, 0.5], L_TD + 0.5 * L_CT)
    torch.testing.assert_close(parts[2.0, 3.0], 2 * L_TD + 3 * L_CT)


@pytest.mark.parametrize(("bootstrap", "label"), [("target", None), ("own", None), ("target", 4)])
def test_one_forward_of_the_target_serves_both_terms(bootstrap: Any, label: int | None) -> None:  # noqa: ANN401
    calls: list[tuple[int, bool]] = []

    class Counting(Wave):
        def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None) -> Tensor:
            calls.append((len(x), torch.is_grad_enabled()))
            assert cond is None if label is None else bool((cond == label).all())
            return super().forward(x, c_noise, cond)

    loss = td_ct_loss(consistency(Counting()), bootstrap=bootstrap)
    if bootstrap == "target":
        SoftUpdate(loss, eps=0.9)
    cond = None if label is None else torch.full((9,), label)
    pairs = sample_consistency_pairs(EDM(), randn(9, 2), num_scales=5, cond=cond, generator=generator())
    loss(pairs)["loss_value"].backward()
    assert calls == [(9, True), (9, False)] and loss.network_evaluations == 18


def test_gradient_stops_in_the_target() -> None:
    """With the network's own prediction too: the gradient is that of a constant target."""
    x0, index = randn(20, 2), torch.arange(20) % 7
    pairs = sample_consistency_pairs(EDM(), x0, num_scales=8, index=index, noise=randn(20, 2, seed=1))
    grads = []
    for bootstrap in ("own", "target"):
        loss = td_ct_loss(consistency(), bootstrap=bootstrap, metric="l2")
        if bootstrap == "target":
            SoftUpdate(loss, eps=0.9)
        loss(pairs)["loss_value"].backward()
        grads.append([p.grad for p in loss.denoiser.parameters()])
        teacher = [p for name, p in loss.named_parameters() if "target" in name]
        assert all(not p.requires_grad for p in teacher)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=0)
    loss = td_ct_loss(consistency(), bootstrap="own", metric="l2")
    f, f_next = (
        loss.denoiser(state["x_t"].squeeze(1), state["t"].flatten(), None) for state in (pairs, pairs["next"])
    )
    both = torch.autograd.grad((f - f_next).square().mean(), list(loss.denoiser.parameters()))
    ct = ct_loss(loss.denoiser, metric="l2", bootstrap="own")
    one = torch.autograd.grad(ct(pairs)["loss_value"], list(loss.denoiser.parameters()))
    assert not torch.allclose(both[0], one[0], rtol=1e-3)  # a gradient through both ends would be another


def test_target_stays_in_evaluation_mode_and_follows_softly() -> None:
    class Noisy(Wave):
        def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None) -> Tensor:
            assert self.training == torch.is_grad_enabled()
            return super().forward(x, c_noise, cond)

    loss = ct_loss(consistency(Noisy()))
    loss.train()
    before = parted(loss)
    loss(sample_consistency_pairs(EDM(), randn(4, 2), num_scales=3, generator=generator()))
    updater = SoftUpdate(loss, eps=0.75)
    teacher = loss.bootstrap_network.module.denoiser.network
    torch.testing.assert_close(teacher.scale.data, loss.denoiser.network.scale.data)
    with torch.no_grad():
        loss.denoiser.network.scale.copy_(before.network.scale)
    updater.step()
    assert float(teacher.scale) == pytest.approx(0.75 * 1.3 * 0.7 + 0.25 * 0.7, rel=1e-12)


def test_copies_and_casts_keep_the_networks_together() -> None:
    loss = td_ct_loss(consistency())
    parted(loss)
    pairs = sample_consistency_pairs(EDM(), randn(6, 2).float(), num_scales=4, generator=generator())
    expected = loss(pairs)["loss_value"]
    twin = copy.deepcopy(loss).float()
    torch.testing.assert_close(twin(pairs)["loss_value"].double(), expected.double(), rtol=1e-5, atol=1e-7)
    assert twin.denoiser.network.scale is not loss.denoiser.network.scale
    with torch.no_grad():
        twin.denoiser.network.scale.zero_()
    assert twin(pairs)["loss_value"].item() != pytest.approx(expected.item(), rel=1e-3)
    torch.testing.assert_close(loss(pairs)["loss_value"], expected)


# The map: consistency training is TD(0) of the 'clean' value under shared noise


@pytest.mark.parametrize("bootstrap", ["target", "own"])
def test_ct_is_td0_of_the_clean_value_under_shared_noise(bootstrap: Any) -> None:  # noqa: ANN401
    N, x0 = 12, SIGMA_DATA * randn(5, 3)
    chain = sample_chain(
        EDM(), x0, num_steps=N, coupling="shared", value="clean", generator=generator(), window=None
    )
    steps = chain[:, :-1].flatten()  # but for the step from σ_min, where f is the identity
    steps["next", "done"] = steps["next", "truncated"] = torch.ones(len(steps), 1, dtype=torch.bool)
    noise = (steps["x_t"] - steps["x0"]) / steps["t"]
    pairs = sample_consistency_pairs(
        EDM(), steps["x0"], num_scales=N, index=steps["index"].flatten(), noise=noise
    )
    torch.testing.assert_close(pairs["next", "x_t"].squeeze(1), steps["next", "x_t"], rtol=1e-9, atol=1e-12)

    ct = ct_loss(consistency(), metric="l2", bootstrap=bootstrap)
    value = ValueLoss(consistency(), n_steps=1, weight="none", bootstrap=bootstrap)
    for loss in (ct, value):
        parted(loss)
    ours, theirs = ct(pairs), value(steps)
    for key in ("loss_value", "td_error"):
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-9, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(ours["loss_value"], list(ct.denoiser.parameters())),
        torch.autograd.grad(theirs["loss_value"], list(value.denoiser.parameters())),
        rtol=1e-8,
        atol=0,
    )


# Sampling


def test_multistep_jumps_and_renoises() -> None:
    f, process = consistency(), EDM()
    for N in (1, 2, 4):
        model, z = Model(f, process, N), randn(N, 6, 2)
        like, feed = torch.empty(6, 2, dtype=torch.float64), iter(z)

        def noise(_: Tensor, feed: Any = feed) -> Tensor:
            return next(feed)

        states = list(trajectory(model, Multistep(), like, noise))
        assert model.nfe == N and len(states) == N + 1
        sigma = [level(i, N + 1) for i in range(N)]
        x = sigma[0] * z[0]
        for i in range(N):
            x = f(x, torch.full((6,), sigma[i], dtype=torch.float64))
            if i + 1 < N:
                x = x + math.sqrt(sigma[i + 1] ** 2 - SIGMA_MIN**2) * z[i + 1]
        torch.testing.assert_close(states[-1], x, rtol=1e-9, atol=1e-12)


def test_multistep_recovers_the_flow_map_of_normal_data() -> None:
    """The exact consistency function of N(0, 1) keeps quantiles: f(x, σ) = x √((1 + σ_min²)/(1 + σ²))."""

    def flow_map(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        return x * ((1 + SIGMA_MIN**2) / (1 + t[:, None] ** 2)).sqrt()

    for N, levels in ((1, None), (2, None), (3, (1.0, 0.3, 0.1))):
        x = sample(
            flow_map,
            (40_000, 1),
            sampler=Multistep(levels),
            num_steps=N,
            process=EDM(),
            noise=Noise(generator()),
            dtype=torch.float64,
        )
        # σ_max²/(1 + σ_max²): the start lacks the datum's own variance
        assert float(x.std()) == pytest.approx(1, abs=5 / math.sqrt(2 * 40_000))


@pytest.mark.parametrize(
    ("sampler", "num_steps", "process", "message"),
    [
        (Multistep(), 2, VP(), "EDM process, not on VP"),
        (Multistep((0.8,)), 3, EDM(), "only 1 levels"),
        (Multistep((0.3, 0.8)), 3, EDM(), "must fall"),
        (Multistep((90.0,)), 2, EDM(), "must fall"),
        (Multistep((0.002,)), 2, EDM(), "must fall"),
        (Multistep(), 0, EDM(), "num_steps is 0"),
    ],
)
def test_multistep_refuses(sampler: Multistep, num_steps: int, process: Any, message: str) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match=message):
        sample(lambda x, t, c: x, (2, 1), sampler=sampler, num_steps=num_steps, process=process, seed=0)


# What is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ct_loss(Denoiser(Wave(), EDM())), "denoiser.prediction_type=consistency, not edm"),
        (
            lambda: ct_loss(consistency(), metric="ssim"),
            "metric is 'ssim': give one of l2, l1, pseudo_huber, lpips",
        ),
        (lambda: ct_loss(consistency(), ct_weight="snr"), "ct_weight is 'snr'"),
        (lambda: ct_loss(consistency(), ct_weight="edm"), "'edm' is called 'karras' now"),
        (lambda: ct_loss(consistency(), bootstrap="residual"), "bootstrap is 'residual'"),
        (lambda: td_ct_loss(consistency(), consistency_coef=-1), "consistency_coef is -1"),
        (lambda: td_ct_loss(consistency(), td_weight="mean"), "weight is 'mean'"),
        (lambda: ConsistencyLoss(consistency(), td_coef=0, consistency_coef=0), "one must be > 0"),
        (lambda: Denoiser(Wave(), VP(), prediction_type="consistency"), "defined on EDM, not on VP"),
        (lambda: Denoiser(Wave(), EDM(), time_input="sigma"), "time_input is 'sigma'"),
        (lambda: ConsistencyPairs(VP()), "the EDM process, not on VP"),
        (lambda: ConsistencyPairs(EDM(), s_0=0), "s_0 is 0"),
        (lambda: ConsistencyPairs(EDM(), s_0=5, s_1=4), "s_0 is 5, but must be a whole number in \\[1, 4\\]"),
        (lambda: ConsistencyPairs(EDM(), mu_0=1.5), "mu_0 is 1.5"),
        (lambda: ConsistencyPairs(EDM(), stride=0), "stride is 0"),
        (lambda: ConsistencyPairs(EDM(), kappa="ddim"), "kappa is 'ddim'"),
        (lambda: sample_consistency_pairs(EDM(), randn(2, 1), num_scales=1), "num_scales is 1"),
    ],
)
def test_a_bad_argument_is_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match="x0 has dtype"):
        sample_consistency_pairs(EDM(), torch.zeros(2, 1, dtype=torch.int64), num_scales=3)


def test_metrics_agree_where_they_should() -> None:
    u = randn(3, 1, 4, 4)
    values = {name: metric(u) for name, metric in METRICS.items()}
    torch.testing.assert_close(values["l2"], u.square().flatten(2).mean(-1))
    torch.testing.assert_close(values["pseudo_huber"], values["l2"].sqrt(), rtol=1e-2, atol=0)  # far from 0
    small = METRICS["pseudo_huber"](1e-6 * u)  # near 0 a parabola
    torch.testing.assert_close(small, METRICS["l2"](1e-6 * u) / (2 * 0.00054), rtol=1e-4, atol=0)
    assert isinstance(values["l1"], Tensor) and isinstance(TensorDict(values), TensorDict)
