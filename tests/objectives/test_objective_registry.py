"""Objectives by name: their options, what draws their states, what is Monte Carlo, and what people call them."""

from dataclasses import fields
from typing import Any, get_type_hints

import pytest
from omegaconf import OmegaConf

from diffrl import registry
from diffrl.configs.schema import schema
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.schedules.edm import EDM
from diffrl.experiments.reports.run_table import objective_label
from diffrl.objectives.cdm import ShortRollouts
from diffrl.objectives.consistency_pairs import ConsistencyPairs
from diffrl.objectives.continuous_ct import sample_trigflow_states
from diffrl.objectives.denoising import sample_log_normal_states, sample_uniform_states
from diffrl.objectives.distillation import DistillationPairs
from diffrl.objectives.ect_pairs import ECTPairs
from diffrl.objectives.maps.improved_mean_flow import ImprovedMeanFlowPairs
from diffrl.objectives.maps.inductive_moments import MomentGroups
from diffrl.objectives.maps.self_distillation import ProgressivePairs, SelfDistillationPairs
from diffrl.objectives.maps.shortcut import ShortcutPairs
from diffrl.objectives.maps.states import LogNormalPairs
from diffrl.objectives.maps.td_map import MapChains
from diffrl.objectives.monte_carlo import is_monte_carlo
from diffrl.objectives.priorgrad import PriorStates
from diffrl.objectives.progressive import HalvingSteps
from diffrl.objectives.registry import OBJECTIVES
from diffrl.objectives.scheduled_sampling import RollbackStates
from diffrl.objectives.shortdf import sample_shortdf_pairs
from diffrl.objectives.stable_ct import StablePairs
from diffrl.objectives.target_choice import DEFAULT_LOOKAHEAD
from diffrl.objectives.td_edm import sample_td_edm_pairs
from diffrl.objectives.twins import TwinSteps
from diffrl.registry import Entry

ANNEALED = {"bootstrap_share": (float, 1.0), "anneal": (Any | None, None)}
WEIGHT = {"weight": (str, "edm"), "weight_options": (Any | None, None)}
TD = {
    **{"gamma": (float, 1.0), "bootstrap": (str, "own"), **WEIGHT},
    "denoising_coef": (float, 0.0),
    **ANNEALED,
}
STEP = {
    **{"transition": (str, "forward"), "teacher": (str | None, None)},
    **{"solver": (str, "heun"), "reference": (int, 0)},
}
CT = {
    **ANNEALED,
    **{"metric": (str, "pseudo_huber"), "metric_weights": (str | None, None)},
    **{"ct_weight": (str, "uniform"), "bootstrap": (str, "target")},
    **{
        "s_0": (int, 2),
        "s_1": (int, 150),
        "mu_0": (float, 0.9),
        "stride": (float, 0.25),
        "kappa": (str, "markov"),
    },
    **STEP,
}
NOISE_LAW = {"P_mean": (float, -1.2), "P_std": (float, 1.2)}
ECT = {
    **{**ANNEALED, "c": (float, 0.0), "ect_weight": (str, "gap"), "stages": (int, 8)},
    **{
        "P_mean": (float, -1.1),
        "P_std": (float, 2.0),
        "q": (float, 2.0),
        "k": (float, 8.0),
        "b": (float, 1.0),
    },
    **STEP,
}
OPTIONS: dict[str, dict[str, tuple[Any, Any]]] = {
    "td": {
        **{"lmbda": (float | None, None), "n_steps": (int | None, None), "lookahead": (float | None, None)},
        **{**TD, "bootstrap": (str | None, None)},
    },
    "td_lambda_schedule": {
        **{"low_noise": (float, 0.0), "high_noise": (float, 1.0)},
        **{"nsr_low": (float, 0.1), "nsr_high": (float, 10.0), **TD},
    },
    "td_adaptive": {
        **{"candidates": (list[float], [1.0, 0.5, 0.0]), "trials": (int, 4), "trial_steps": (float, 0.025)},
        **{"heldout": (int, 256), "bootstrap": (str, "own"), **WEIGHT, "denoising_coef": (float, 0.0)},
    },
    "monte_carlo": WEIGHT,
    "edm": {**WEIGHT, **NOISE_LAW},
    "denoising": {**WEIGHT, "num_steps": (int, 1000)},
    "td_edm": {
        **{**WEIGHT, **ANNEALED, "denoising_coef": (float, 0.5), "coupling": (float | str | int, "markov")},
        **{"num_steps": (int, 18), "span": (float, 3.0), "stride": (float, 0.2), **NOISE_LAW},
    },
    "double_sampling": {
        **{**WEIGHT, "residual_coef": (float, 1.0), "denoising_coef": (float, 0.0)},
        **{"source": (str, "posterior"), "rollout_steps": (int, 1)},
    },
    "cdm": {
        **{**WEIGHT, "weight": (str, "none"), "residual_coef": (float, 2.0), "denoising_coef": (float, 1.0)},
        **{**NOISE_LAW, "gap": (float, 0.05), "floor": (float, 0.002), "rollout_steps": (int, 5)},
    },
    "progressive": {**WEIGHT, "weight": (str, "trunc_snr"), "start": (int, 1024), "end": (int, 1)},
    "continuous_ct": {
        **{
            "c": (float, 0.1),
            "normalise": (bool, True),
            "warmup": (float, 0.025),
            "prior_weight": (bool, True),
        },
        **{"anneal": (Any | None, None), "P_mean": (float, -1.0), "P_std": (float, 1.4)},
    },
    "ct": CT,
    "ect": ECT,
    "stable_ct": {**ECT, "transition": (str, "reference")},
    "cd": {
        **{**CT, "metric": (str, "l2"), "transition": (str, "teacher")},
        **{"td_coef": (float, 0.0), "consistency_coef": (float, 1.0), "td_weight": (str, "sum_sq")},
        **{"num_scales": (int, 40), "mu": (float, 0.95)},
    },
    "scheduled_sampling": {
        **{**WEIGHT, "num_steps": (int, 1000)},
        **{"probs_start": (list[float], [0.0, 0.0]), "probs_end": (list[float], [0.2, 0.3])},
    },
    "shortdf": {**WEIGHT, "relax_coef": (float, 1.0), "margin": (float, 1e-4), "num_steps": (int, 1000)},
    "physics_residual": {
        **{
            "residual": (str, "sphere"),
            "residual_options": (Any | None, None),
            "residual_coef": (float, 0.1),
        },
        **{"estimate": (str, "mean"), **WEIGHT},
    },
    "priorgrad": {**WEIGHT, **NOISE_LAW},
    "hybrid": {**WEIGHT, "vlb_coef": (float, 0.001)},
    "alpha_flow": {
        "alpha": (float | None, None),
        "gamma": (float, 25.0),
        "clamp": (float, 0.005),
        "p": (float, 1.0),
        "c": (float, 0.001),
        "anneal": (Any | None, None),
        "P_mean": (float, -0.4),
        "P_std": (float, 1.0),
        "different": (float, 0.5),
    },
    "eulerian_map": {"bootstrap": (str, "own"), "anneal": (Any | None, None), "different": (float, 0.25)},
    "improved_mean_flow": {
        "p": (float, 1.0),
        "c": (float, 0.01),
        "anneal": (Any | None, None),
        "P_mean": (float, -0.4),
        "P_std": (float, 1.0),
        "different": (float, 0.5),
    },
    "inductive_moments": {
        "a": (float, 2.0),
        "b": (float, 4.0),
        "anneal": (Any | None, None),
        "group_size": (int, 4),
        "least": (float, 0.0),
        "most": (float, 0.994),
        "halvings": (int, 12),
    },
    "lagrangian_map": {"bootstrap": (str, "own"), "anneal": (Any | None, None), "different": (float, 0.25)},
    "mean_flow": {
        "p": (float, 0.75),
        "c": (float, 0.001),
        "anneal": (Any | None, None),
        "P_mean": (float, -0.4),
        "P_std": (float, 1.0),
        "different": (float, 0.75),
    },
    "progressive_map": {
        "bootstrap": (str, "own"),
        "anneal": (Any | None, None),
        "different": (float, 0.25),
        "cut": (str, "uniform"),
    },
    "shortcut": {
        "bootstrap": (str, "target"),
        "finest": (int, 128),
        "anneal": (Any | None, None),
        "bootstrap_every": (int, 8),
    },
    "td_map": {
        "lmbda": (float, 0.0),
        "bootstrap": (str, "target"),
        "map_weight": (str, "edm"),
        "anneal": (Any | None, None),
        "different": (float, 0.75),
    },
    "td_ct": {"td_weight": (str, "sum_sq"), "consistency_coef": (float, 0.5), **CT},
}
for option in ("s_0", "s_1", "mu_0"):
    del OPTIONS["cd"][option]
"""Type and default of every option, as of version 0.1: a changed one changes what old commands mean."""


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str) -> None:
    entry = OBJECTIVES.entry(name)
    node = schema(name, *entry.functions, omit=OBJECTIVES.omit)
    types, defaults = get_type_hints(node), OmegaConf.to_container(OmegaConf.structured(node))
    assert isinstance(defaults, dict)
    found = {f.name: (types[f.name], defaults[f.name]) for f in fields(node)}
    assert found.pop("name") == (str, name)
    assert found == OPTIONS[name]


def test_every_objective_is_in_the_table() -> None:
    assert {name for name in OBJECTIVES if OBJECTIVES.entry(name).module.startswith("diffrl.")} == set(
        OPTIONS
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_no_option_passes_unseen(name: str) -> None:
    consistency = "consistency" if name in ("ct", "cd", "td_ct") else "edm"
    network = MLP((2,), hidden=4, depth=1, variance=name == "hybrid")
    prior: Any = "data" if name == "priorgrad" else "standard"
    denoiser = Denoiser(network, EDM(), prediction_type=consistency, prior=prior)
    with pytest.raises(TypeError, match="lmda"):
        OBJECTIVES[name](denoiser, lmda=0.5)


def test_what_draws_the_states() -> None:
    own = {entry.name: entry.also for entry in OBJECTIVES.entries() if entry.name in OPTIONS and entry.also}
    assert own == {
        "edm": sample_log_normal_states,
        "denoising": sample_uniform_states,
        "td_edm": sample_td_edm_pairs,
        "double_sampling": TwinSteps,
        "priorgrad": PriorStates,
        "shortdf": sample_shortdf_pairs,
        "scheduled_sampling": RollbackStates,
        "ct": ConsistencyPairs,
        "ect": ECTPairs,
        "stable_ct": StablePairs,
        "cdm": ShortRollouts,
        "progressive": HalvingSteps,
        "continuous_ct": sample_trigflow_states,
        "cd": DistillationPairs,
        "td_ct": ConsistencyPairs,
        "mean_flow": LogNormalPairs,
        "improved_mean_flow": ImprovedMeanFlowPairs,
        "alpha_flow": ImprovedMeanFlowPairs,
        "shortcut": ShortcutPairs,
        "lagrangian_map": SelfDistillationPairs,
        "progressive_map": ProgressivePairs,
        "eulerian_map": SelfDistillationPairs,
        "inductive_moments": MomentGroups,
        "td_map": MapChains,
    }


def test_which_are_monte_carlo() -> None:
    assert {name for name in OPTIONS if is_monte_carlo(name)} == {
        *("monte_carlo", "edm", "denoising", "scheduled_sampling"),
    }
    with pytest.raises(ValueError, match="objective is 'tdd': give one of .*td_edm"):
        is_monte_carlo("tdd")


# Labels


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OBJECTIVES, "_entries", {e.name: e for e in OBJECTIVES.entries()})
    monkeypatch.setattr(registry, "_USERS", {})
    OBJECTIVES.register("mine", label=lambda options: f"Mine({options['mix']:g})")(lambda D, *, mix=0.5: D)


@pytest.mark.parametrize(
    ("name", "options", "label"),
    [
        ("td", {}, f"TD(lookahead={DEFAULT_LOOKAHEAD:g})"),
        ("td", {"lmbda": 0.25}, "TD(λ=0.25)"),
        ("td", {"lookahead": 0.125}, "TD(lookahead=0.125)"),
        ("td", {"n_steps": 2, "lmbda": None}, "2-step TD"),
        ("td", {"anneal": {"lmbda": [1, 0.5, 0]}}, "TD(λ=1→0.5→0)"),
        ("td", {"anneal": {"n_steps": [18, 1]}}, "18→1-step TD"),
        ("td", {"lmbda": 0, "bootstrap_share": 0.5}, "TD(0), bootstrap share 0.5"),
        ("td", {"n_steps": 1, "anneal": {"bootstrap_share": [0, 1]}}, "TD(0), bootstrap share 0→1"),
        ("td_lambda_schedule", {}, "TD(λ=0…1)"),
        ("td_lambda_schedule", {"anneal": {"high_noise": [1, 0.5]}}, "TD(λ=0…1→0.5)"),
        ("td_lambda_schedule", {"low_noise": 0.3}, "TD(λ=0.3…1)"),
        ("td_map", {"lmbda": 0.5}, "TD map(λ=0.5)"),
        ("td_map", {"anneal": {"lmbda": [1, 0]}}, "TD map(λ=1→0)"),
        ("ct", {"name": "ct"}, "CT"),
        ("monte_carlo", {"name": "td", "lmbda": 0.5}, "Monte Carlo"),
        ("of_another_version", {"name": "of_another_version"}, "of_another_version"),
    ],
)
def test_labels_need_no_option(name: str, options: dict[str, Any], label: str) -> None:
    assert objective_label(name, {"objective": options}) == label


def test_a_configuration_without_an_objective_has_labels() -> None:
    assert objective_label("td", {}) == f"TD(lookahead={DEFAULT_LOOKAHEAD:g})"


@pytest.mark.usefixtures("mine")
def test_the_label_of_a_method_of_ones_own() -> None:
    assert objective_label("mine", {"objective": {"mix": 0.25}}) == "Mine(0.25)"
    assert objective_label("mine", {}) == "Mine(0.5)"


def test_a_label_that_is_not_given_is_the_name() -> None:
    assert Entry("mine", dict).label_for({}) == "mine"
