"""The error of a flow map: what it is, for which denoisers, that exact answers are kept, and that a run measures it."""

import csv
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffrl.data.synthetic import gmm
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.exact import MixtureDenoiser
from diffrl.diffusion.exact_maps import ExactFlowMap
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.ddpm import DDPM
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.errors import InputError
from diffrl.experiments.train import TrainingJob, run_experiment
from diffrl.metrics.distances import evaluation_noise
from diffrl.metrics.map_error import _exact, map_error, map_keys
from diffrl.training.build import build_data
from tests.kit.configs import small

DATA = gmm(dim=3, components=4)
PAIRS = [(10.0, 0.0), (10.0, 0.5), (0.5, 0.1)]
processes = pytest.mark.parametrize("process", [EDM(), Flow(), DDPM()], ids=lambda p: type(p).__name__)


def oracle(process: Schedule) -> MixtureDenoiser:
    law = DATA.mixture
    assert law is not None
    return MixtureDenoiser(process, law.means, law.stds, law.weights)


class Off(nn.Module):
    """The exact denoiser of two times, and a step aside."""

    second_time = True

    def __init__(self, process: Schedule, by: float, rtol: float = 1e-6) -> None:
        super().__init__()
        self.exact, self.process, self.by = ExactFlowMap(oracle(process), rtol=rtol), process, by

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        return self.exact(x, t, cond, r) + self.by


# --- the figure


@processes
def test_the_exact_map_has_none_and_one_that_is_off_has_what_it_moves_the_state_by(process: Schedule) -> None:
    x0 = DATA.test[:20]
    exact = map_error(Off(process, 0.0), oracle(process), x0, PAIRS)
    found = map_error(Off(process, 0.3), oracle(process), x0, PAIRS)
    assert list(found) == ["10->0", "10->0.5", "0.5->0.1"]
    for (t, r), key in zip(PAIRS, found, strict=True):
        assert exact[key] < 1e-8  # states are float32
        # x/α moves by (1 - s_r/s_t) times the step aside
        nearest = 0.02 if process.continuous is False else 1e-4
        assert found[key] == pytest.approx((0.3 * (1 - r / t)) ** 2, rel=nearest)


def test_in_float64_the_exact_map_has_no_error_in_batches_of_any_size() -> None:
    x0 = DATA.test[:20].double()
    found = map_error(Off(EDM(), 0.0, 1e-9), oracle(EDM()), x0, PAIRS)
    assert max(found.values()) < 1e-17
    plain = Denoiser(MLP((3,), second_time=True), EDM()).double()
    one, other = (map_error(plain, oracle(EDM()), x0, PAIRS, batch_size=n) for n in (7, 100))
    assert one == pytest.approx(other, rel=1e-12)


def test_a_map_to_clean_data_is_compared_with_where_the_ode_ends() -> None:
    denoiser = Denoiser(MLP((3,)), EDM(), prediction_type="consistency").eval()
    found = map_error(denoiser, oracle(EDM()), DATA.test[:50], PAIRS)
    assert list(found) == ["10->0"] == map_keys(denoiser, PAIRS)
    x0, t = DATA.test[:50].double(), torch.full((50,), 10.0).double()
    states = _exact_states(x0)
    end = ExactFlowMap(oracle(EDM())).map(states, t, 0 * t)
    witness = (denoiser(states.float(), t.float()) - end).square().mean()
    assert found["10->0"] == pytest.approx(witness.item(), rel=1e-5)


def _exact_states(x0: Tensor) -> Tensor:
    return x0 + 10 * evaluation_noise(x0, 0)


def test_a_denoiser_of_one_time_has_no_map() -> None:
    assert map_error(Denoiser(MLP((3,)), EDM()), oracle(EDM()), DATA.test[:5], PAIRS) == {}
    assert map_keys(Denoiser(MLP((3,), second_time=True), EDM()), PAIRS) == ["10->0", "10->0.5", "0.5->0.1"]


# --- exact answers are kept


def test_an_exact_answer_is_computed_once_for_what_it_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    inner = ExactFlowMap.map

    def counted(self: ExactFlowMap, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        calls.append(len(x))
        return inner(self, x, t, r)

    monkeypatch.setattr(ExactFlowMap, "map", counted)
    _exact.cache_clear()
    denoiser = Denoiser(MLP((3,), second_time=True), EDM())

    def integrations(**changed: Any) -> int:
        calls.clear()
        given = {"oracle": oracle(EDM()), "x0": DATA.test[:8], "pairs": PAIRS, **changed}
        map_error(denoiser, **given)
        return len(calls)

    assert integrations() == 3
    assert integrations() == integrations(pairs=PAIRS[::-1]) == integrations(x0=DATA.test[:8].clone()) == 0
    law = oracle(EDM())
    law.stds *= 2
    for changed in ({"seed": 1}, {"x0": DATA.test[1:9]}, {"oracle": law}):
        assert integrations(**changed) == 3
    assert integrations(pairs=PAIRS[:1]) == 1


# --- pairs that are none


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([(0.5, 0.5)], r"map_pairs holds \(0.5, 0.5\): give pairs"),
        ([(1.0,)], r"map_pairs holds \(1.0,\): give pairs"),
        ([(3.0, 1.0, 0.0)], "give pairs"),
        ([3.0, 0.0], "map_pairs holds 3.0: give pairs"),
        (["80"], "map_pairs holds '80': give pairs"),
        ([(1.0, -0.1)], "map_pairs is -0.1"),
        ([(float("inf"), 0.0)], "map_pairs is inf"),
        ([(1.0, 0.0), (1, 0)], "map_pairs holds 1->0 twice"),
    ],
)
def test_what_is_no_pair_is_refused(pairs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        map_error(Off(EDM(), 0.0), oracle(EDM()), DATA.test[:2], pairs)


# --- in a run

WORDS = ("objective=monte_carlo", "compare=false", "network.second_time=true", "sampler=flow_map")


def test_a_run_measures_its_map_where_it_is_asked_to(tmp_path: Any) -> None:
    pairs = "eval.map_pairs=[[80,0],[1,0.3]]"
    folder = run_experiment(small(f"run_dir={tmp_path / 'run'}", *WORDS, pairs), progress=False)
    found = folder.results()["objectives"]["monte_carlo"]
    assert list(found["map_error"]) == ["80->0", "1->0.3"] and min(found["map_error"].values()) > 0
    assert list(found["sample_distance"]["by_nfe"]) == ["2", "4"]  # of flow_map: one evaluation a step
    with (folder.path / "metrics.csv").open(encoding="utf-8") as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["map_error_80->0"]) == pytest.approx(found["map_error"]["80->0"])


def test_a_run_that_is_not_asked_measures_none() -> None:
    job = TrainingJob(config := small(*WORDS), build_data(config), "monte_carlo")
    assert "map_error" not in job.errors() and not any("map" in name for name in job.columns)


def test_a_run_without_a_known_law_says_so_at_its_start() -> None:
    config = small(
        "data=checkerboard",
        "data.test_size=64",
        "compare=false",
        "network.second_time=true",
        "eval.map_pairs=[[1,0]]",
    )
    with pytest.raises(
        InputError, match="eval.map_pairs asks for the exact flow map, but the law of checkerboard"
    ):
        TrainingJob(config, build_data(config), "td").check()


def test_an_option_that_is_no_pair_is_named_as_it_is_typed() -> None:
    config = small(*WORDS, "eval.map_pairs=[[0,1]]")
    with pytest.raises(InputError, match=r"eval\.map_pairs holds \[0, 1\]"):
        TrainingJob(config, build_data(config), "monte_carlo")


def test_a_sampler_of_maps_refuses_a_network_without_them_at_the_start() -> None:
    config = small("compare=false", "sampler=flow_map")
    with pytest.raises(InputError, match="has no second time r"):
        TrainingJob(config, build_data(config), "td").check()
