"""The study of the stall: its linear theory against brute force, its losses and optimisers against the library's."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from diffrl.errors import FileError
from tests.kit.examples import example
from tests.kit.paths import EXAMPLES

pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)  # of torch.func


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(EXAMPLES))
    yield example("why_td_stalls")
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def learner(script: ModuleType) -> Any:
    """A small one after some steps, so that no weight is 0."""
    from stall.tangent import snapshot

    return snapshot(replace(script.OWN, dim=3, width=8, batch=6, steps=40, lr=1e-2), 20)[0]


@pytest.mark.parametrize("mu", [1 + 2j, 3 + 0j, 0.2 + 1j, 5 + 0.1j])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_the_critical_rate_is_where_a_root_leaves_the_unit_circle(
    script: ModuleType, mu: complex, beta: float
) -> None:
    from stall.spectrum import critical_rate, roots

    (rate,) = critical_rate(np.array([mu]), beta)
    assert abs(roots(mu, 0.999 * rate, beta)).max() < 1 < abs(roots(mu, 1.001 * rate, beta)).max()


def test_a_mode_that_grows_has_no_stable_rate(script: ModuleType) -> None:
    from stall.spectrum import critical_rate

    assert critical_rate(np.array([-0.1 + 1j]), 0.0) == 0


def test_the_dynamics_is_the_derivative_of_the_semi_gradient(learner: Any) -> None:
    from stall.ground import exact_loss
    from stall.spectrum import Dynamics

    # exact targets at a network that is right: the TD error is 0, so that the kernel is all of the derivative
    ground, chain = learner.ground, learner.ground.chain(3, 4)
    right, theta = ground.exact, learner.optimiser.theta.clone()
    frozen = learner.denoiser(chain["x_t"].flatten(0, 1), chain["t"].flatten()).detach()
    ground.exact = lambda x, t: frozen
    try:
        w = torch.randn(len(theta), generator=torch.Generator().manual_seed(0))
        steps = []
        for sign in (1, -1):
            learner.optimiser.theta.copy_(theta + sign * 1e-3 * w)
            steps.append(learner.optimiser.gradient(exact_loss(ground, learner.denoiser, chain, True)))
    finally:
        ground.exact = right
        learner.optimiser.theta.copy_(theta)
    dynamics = Dynamics(learner, chain, None)
    expected = (steps[0] - steps[1]) / 2e-3
    assert torch.allclose(dynamics.td(w), expected, atol=0.01 * float(expected.abs().max()))
    v = torch.randn(len(theta), generator=torch.Generator().manual_seed(1))
    assert float(v @ dynamics.td(w)) == pytest.approx(float(w @ dynamics.transposed(v)), rel=1e-3)


def test_with_x0_for_its_mean_the_exact_loss_is_the_librarys(learner: Any) -> None:
    from stall.ground import exact_loss

    ground, chain = learner.ground, learner.ground.chain(5, 4)
    right, ground.exact = ground.exact, lambda x, t: chain["x0"].flatten(0, 1)
    try:
        mine = exact_loss(ground, learner.denoiser, chain, True)
    finally:
        ground.exact = right
    assert float(mine.detach()) == pytest.approx(float(learner.loss(chain)["loss_value"].detach()), rel=1e-5)


def test_the_tangent_is_the_network_at_first_and_has_its_gradient(learner: Any) -> None:
    from stall.tangent import Tangent

    ground, chain = learner.ground, learner.ground.chain(7)
    tangent = Tangent(learner, learner.optimiser.second_moment())
    assert torch.allclose(ground.errors(tangent.predict), ground.errors(learner.denoiser), rtol=1e-3)
    tangent.step(7, 0.0, 0.0, "own")
    g = learner.optimiser.gradient(learner.loss(chain)["loss_value"])
    assert torch.allclose(tangent.m, g, atol=1e-5 * float(g.abs().max()))


def test_arnoldi_finds_the_leading_eigenvalues_and_no_lag_is_own_predictions(learner: Any) -> None:
    from stall.spectrum import Dynamics, arnoldi, copied_radius, delayed_radius, eigenvalues, roots

    dynamics = Dynamics(learner, learner.ground.chain(9, 16), None)
    n = len(dynamics.S)
    M = torch.stack([dynamics.td(e) for e in torch.eye(n)], 1).double().numpy()
    Q, H, rest = arnoldi(dynamics.td, torch.ones(n), 40)
    leading = np.linalg.eigvals(M)[np.abs(np.linalg.eigvals(M)).argmax()]
    found = eigenvalues(H, rest)
    assert abs(found[np.abs(found).argmax()]) == pytest.approx(abs(leading), rel=1e-3)
    still = (Q.T @ torch.stack([dynamics.regression(q) for q in Q.T], 1)).double().numpy()
    alone = max(abs(roots(mu, 2.0, 0.9)).max() for mu in np.linalg.eigvals(H))
    assert delayed_radius(H, still, 2.0, 0.9, 0.0) == pytest.approx(alone, rel=1e-6)
    assert copied_radius(H, still, 2.0, 0.9, 1) == pytest.approx(alone, rel=1e-6)


class Quadratic(torch.nn.Module):
    """Semi-gradient Z θ with a Z that is not symmetric, as TD has it."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
        self.Z = torch.tensor([[1.0, 2.0, 0.0], [-2.0, 1.0, 0.5], [0.3, 0.0, 2.0]])

    def loss(self) -> torch.Tensor:
        return self.theta @ (self.Z @ self.theta.detach())


@pytest.mark.parametrize("correction", ["first order", "transport"])
def test_corrected_momentum_is_todays_gradient_where_the_dynamics_is_linear(
    script: ModuleType, correction: Any
) -> None:
    from stall.optimisers import Optimiser

    paths = []
    for beta, corrected in ((0.9, correction), (0.0, "none")):
        model = Quadratic()
        optimiser = Optimiser(model, beta, corrected, normalise=False)
        for _ in range(30):
            optimiser.step(0.05, model.loss, lambda: (torch.zeros(()), torch.zeros(())))
        paths.append(model.theta.detach())
    if correction == "first order":  # implicit transport begins with an average that is not yet full
        assert torch.allclose(paths[0], paths[1], atol=1e-4)
    assert float(paths[0].norm()) < 0.6 and float(paths[1].norm()) < 0.6


def test_without_correction_it_is_torchs_adam(script: ModuleType) -> None:
    from stall.optimisers import Optimiser

    mine, theirs = Quadratic(), Quadratic()
    optimiser, adam = Optimiser(mine, 0.9, "none", normalise=True), torch.optim.Adam(theirs.parameters(), 0.1)
    for _ in range(10):
        optimiser.step(0.1, mine.loss, lambda: (torch.zeros(()), torch.zeros(())))
        adam.zero_grad()
        theirs.loss().backward()
        adam.step()
    assert torch.allclose(mine.theta, theirs.theta, atol=1e-5)


def test_levels_apart_share_no_parameter(script: ModuleType) -> None:
    from stall.ground import Ground

    ground = Ground(replace(script.OWN, dim=3, width=8, levels="apart"))
    denoiser, chain = ground.denoiser(), ground.chain(0, 4)
    torch.nn.init.normal_(denoiser.network.weights[-1])
    D = denoiser(chain["x_t"].flatten(0, 1), chain["t"].flatten()).view(4, 18, 3)
    (g,) = torch.autograd.grad(D[:, 5].sum(), denoiser.network.weights[1])
    moved = g.abs().sum((1, 2)) > 0
    assert moved.tolist() == [k == 5 for k in range(18)]


def test_a_part_runs_is_kept_and_reported(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from stall import runs

    small = {"dim": 2, "width": 8, "batch": 4, "steps": 3}
    monkeypatch.setitem(runs.PARTS, "lag", [replace(run, **small) for run in runs.PARTS["lag"][::5]])
    arguments = script.parser().parse_args(["--part", "lag", "--out", str(tmp_path)])
    script.main(arguments)
    assert len(capsys.readouterr().out.splitlines()) == 2
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "decay=0.5" in page and "every=2" in page
    script.main(arguments)
    assert capsys.readouterr().out == ""  # nothing is run again

    file = tmp_path / "runs.jsonl"
    whole = file.read_text(encoding="utf-8")
    file.write_text(whole[:-20], encoding="utf-8")  # stopped while it wrote
    assert [*runs.Kept(file).rows.values()] == [json.loads(whole.splitlines()[0])]
    assert file.read_text(encoding="utf-8") == whole.splitlines(keepends=True)[0]
    file.write_text("{\n" + whole, encoding="utf-8")
    with pytest.raises(
        FileError, match=r"runs.jsonl, line 1 is damaged: remove it, and its run is made again"
    ):
        runs.Kept(file)
