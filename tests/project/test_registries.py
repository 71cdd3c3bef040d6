"""What holds for every registered method, whichever it is: the general suite over the registries."""

import inspect
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffrl
from diffrl import keys, recipes
from diffrl.configs.groups import GROUPS
from diffrl.diffusion.networks.registry import NETWORKS
from diffrl.diffusion.samplers.base import GaussianSampler, Model, Noise
from diffrl.diffusion.samplers.registry import SAMPLERS
from diffrl.diffusion.schedules.registry import PROCESSES
from diffrl.errors import InputError
from diffrl.experiments.train import run_experiment
from diffrl.finetuning.build import build_recipe, recipe_config
from diffrl.finetuning.credit.registry import CREDITS
from diffrl.finetuning.finetuner import Finetuner, Iterations
from diffrl.finetuning.methods.registry import METHODS
from diffrl.finetuning.piece import Setting
from diffrl.finetuning.placement.registry import PLACEMENTS
from diffrl.finetuning.rollouts.chains import Rollouts, collect_rollout
from diffrl.finetuning.rollouts.registry import ROLLOUTS
from diffrl.finetuning.surrogate import SURROGATES
from diffrl.finetuning.updates.registry import UPDATES
from diffrl.objectives.registry import OBJECTIVES
from diffrl.registry import Registry, option_sources
from diffrl.rewards.black_box import BlackBox
from diffrl.rewards.by_name import DETECTORS
from diffrl.training.optim import FinetuningOptim
from tests.kit.configs import small
from tests.kit.maps import MAPS
from tests.kit.policies import make_policy, right

ENTRIES = [(registry, name) for registry in (*GROUPS, METHODS) for name in registry]
IDS = [f"{registry.kind}={name}" for registry, name in ENTRIES]


# All kinds


@pytest.mark.parametrize(("registry", "name"), ENTRIES, ids=IDS)
def test_an_entry_says_what_it_is_and_what_its_options_mean(registry: Registry, name: str) -> None:
    entry = registry.entry(name)
    assert entry.module.startswith("diffrl.") and entry.summary.endswith((".", ":")), entry.summary
    sources = [source for function in entry.functions for source in option_sources(function)]
    described = "".join(inspect.getdoc(f) or "" for f in (*entry.functions, *sources))
    for function in entry.functions:
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name in registry.omit or parameter.kind is inspect.Parameter.VAR_KEYWORD:
                continue
            assert re.search(rf"\b{parameter.name}\b", described), f"{parameter.name} is not described"


def test_an_unknown_name_is_answered_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in GROUPS:
        with pytest.raises(ValueError, match=f"{registry.kind} is 'nothing': give one of .*--import MODULE"):
            registry.entry("nothing")
    monkeypatch.setattr(DETECTORS, "_entries", {})
    with pytest.raises(ValueError, match=r"detector is 'nothing': give one of \(none is registered yet\); "):
        DETECTORS.entry("nothing")


# Processes


@pytest.mark.parametrize("name", PROCESSES)
def test_a_process_adds_noise_as_it_goes(name: str) -> None:
    process = PROCESSES[name]()
    grid = process.time_grid(12)
    alpha, sigma = process.alpha(grid), process.sigma(grid)
    assert grid.dtype == torch.float64 and grid.shape == (13,) and (grid.diff() < 0).all()
    assert alpha[-1] == 1 and sigma[-1] == 0 and (alpha >= 0).all() and (sigma[:-1] > 0).all()
    assert (process.log_snr(grid[:-1]).diff() > 0).all()  # less noise with every step
    index = torch.arange(12.0, dtype=torch.float64)
    torch.testing.assert_close(process.index(grid[:-1], 12), index, rtol=0, atol=1e-6)
    inner = grid[1:-1]
    found = process.t_from_log_snr(process.log_snr(inner))
    torch.testing.assert_close(found, inner, rtol=1e-6, atol=1e-6 if process.continuous else 0.5)


# Samplers


class Exact(diffrl.GaussianDenoiser):
    """With a second output too, for the sampler that needs one."""

    def with_variance(self, x_t: Any, t: Any, cond: Any = None) -> Any:
        return self(x_t, t), torch.zeros_like(x_t)


def process_for(sampler: Any) -> Any:
    """The first process that it works on."""
    for name in PROCESSES:
        process = PROCESSES[name]()
        exact = Exact(process, torch.zeros(2), torch.eye(2))
        try:
            diffrl.sample(exact, (1, 2), sampler=sampler, num_steps=3, seed=0)
        except ValueError:
            continue
        return process
    raise AssertionError(f"{sampler} works on no process")


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_draws_each_sample_by_its_seed(name: str) -> None:
    sampler: Any = SAMPLERS[name]()
    process = process_for(sampler)
    mean = torch.tensor([0.5, -0.3])
    exact = Exact(process, mean, 0.04 * torch.eye(2))
    options: dict[str, Any] = {"sampler": sampler, "num_steps": 12}
    x = diffrl.sample(exact, (400, 2), seed=0, **options)
    assert x.shape == (400, 2) and x.dtype == torch.float32 and x.isfinite().all()
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.1)
    torch.testing.assert_close(diffrl.sample(exact, (3, 2), seed=5, **options), x[5:8], rtol=1e-4, atol=1e-5)
    double = diffrl.sample(exact, (2, 2), seed=0, dtype=torch.float64, **options)
    assert double.dtype == torch.float64
    grid = sampler.grid(process, 4)
    assert grid.shape == (5,) and (grid.diff() < 0).all() and grid[-1] == process.t_clean


@pytest.mark.parametrize("name", [n for n in SAMPLERS if isinstance(SAMPLERS[n](), GaussianSampler)])
def test_a_samplers_law_is_what_its_step_draws_from(name: str) -> None:
    sampler: Any = SAMPLERS[name]()
    process = process_for(sampler)
    exact = Exact(process, torch.zeros(2), torch.eye(2))
    model = Model(exact, process, 4)
    t, s = sampler.grid(process, 4)[1:3]
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    law = sampler.kernel(model, x, t, s)
    drawn = sampler.step(model, x, t, s, Noise(torch.Generator().manual_seed(1)))
    torch.testing.assert_close(drawn, law.sample(Noise(torch.Generator().manual_seed(1))))
    if bool(law.stochastic.all()):
        witness = torch.distributions.Normal(law.mean, law.std.to(law.mean).reshape(-1, 1).expand(6, 2))
        torch.testing.assert_close(
            law.log_prob(drawn, "sum"), witness.log_prob(drawn).sum(1), rtol=1e-4, atol=1e-4
        )
    else:
        with pytest.raises(ValueError, match="std is 0"):
            law.log_prob(drawn, "sum")


# Objectives


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_trains_and_resumes_to_the_same_figures(name: str, tmp_path: Any) -> None:
    consistency = ["denoiser.prediction_type=consistency", "sampler=consistency", "eval.num_steps=[1,2]"]
    special = {
        "priorgrad": ["denoiser.prior=data"],
        "hybrid": ["network.variance=true", "sampler=ancestral_learned", "eval.num_steps=[2,3]"],
        "cd": [*consistency, "objective.teacher=exact"],
        "progressive": ["process=flow", "denoiser.prediction_type=velocity", "objective.start=4"],
        "ct": consistency,
        "td_ct": consistency,
        **dict.fromkeys(MAPS, ["network.second_time=true", "sampler=flow_map", "eval.num_steps=[1,2]"]),
    }
    words = [f"objective={name}", "compare=false", "trainer.grad_steps=12", *special.get(name, [])]
    whole = run_experiment(small(f"run_dir={tmp_path / 'whole'}", *words), progress=False)
    figures = whole.results()["objectives"][name]
    assert figures["grad_steps"] == 12 and figures["network_evaluations"] > 0
    assert all(0 < error < 1e4 for error in figures["value_error"].values())
    assert OBJECTIVES.entry(name).label_for(whole.config()["objective"])
    # continued from the checkpoint of step 10
    last = whole.checkpoints(name) / "step_000012"
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    (whole.path / "results.json").unlink()
    again = run_experiment({**whole.config(), "resume": str(whole.path)}, progress=False)
    assert again.results()["objectives"][name]["value_error"] == figures["value_error"]


# Networks


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("num_classes", [0, 3])
def test_a_network_gives_the_shape_that_it_takes(name: str, num_classes: int) -> None:
    network = NETWORKS[name](event_shape=(1, 8, 8), num_classes=num_classes)
    x, c_noise = torch.randn(5, 1, 8, 8), torch.randn(5)
    cond = torch.tensor([0, 1, 2, 3, 0]) if num_classes else None
    assert network(x, c_noise, cond).shape == x.shape


# Pieces of fine-tuning


def rollout(seed: int = 0) -> Any:
    return collect_rollout(
        make_policy(), (2,), batch_size=16, group_size=4, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("name", CREDITS)
def test_a_credit_gives_finite_advantages_and_remembers_by_its_state(name: str) -> None:
    def made() -> Any:
        credit: Any = CREDITS[name]()
        nothing: Any = None
        credit.prepare(
            Setting(
                make_policy(),
                (2,),
                None,
                FinetuningOptim(),
                0.0,
                None,
                nothing,
                nothing,
                0,
                torch.device("cpu"),
            )
        )
        return credit

    credit = made()
    for seed in range(3):
        td = rollout(seed)
        r = PLACEMENTS["terminal"]()(td, BlackBox(right))
        adv = credit(td, r)
        assert adv.shape == r.shape and adv.isfinite().all() and float(adv.std()) > 0 and credit.raw_std > 0
    other = made()
    other.load_state_dict(credit.state_dict())
    td = rollout(9)
    r = PLACEMENTS["terminal"]()(td, BlackBox(right))
    assert torch.equal(credit(td, r), other(td, r))
    assert made()(td, torch.zeros_like(r)).isfinite().all()  # equal rewards teach nothing, and break nothing
    assert credit.centred_over(one_condition=True) in (None, "group", "batch")


@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_placement_asks_as_often_as_it_says(name: str) -> None:
    placement: Any = PLACEMENTS[name]()
    box, td = BlackBox(right, cache=False), rollout()
    r = placement(td, box)
    assert r.shape == (16, 4, 1) and r.isfinite().all() and box.queries == 16 * placement.queries(4)
    assert placement.dense == bool(r[:, :-1].any())


@pytest.mark.parametrize("name", ROLLOUTS)
def test_a_plan_collects_whole_trajectories(name: str, tmp_path: Path) -> None:
    plan: Any = ROLLOUTS[name]()
    if name == "recorded_pairs":
        np.savez(tmp_path / "pairs.npz", preferred=np.ones((3, 2)), rejected=np.zeros((3, 2)))
        plan = ROLLOUTS[name](str(tmp_path / "pairs.npz"))
    nothing: Any = None
    plan.prepare(
        Setting(
            make_policy(), (2,), None, FinetuningOptim(), 0.0, None, nothing, nothing, 0, torch.device("cpu")
        )
    )
    n = 4 * plan.rows_of_a_group
    made = {"trajectories": n, "cond": None, "generator": torch.Generator(), "device": torch.device("cpu")}
    td = plan.collect(make_policy(), (2,), **made)
    assert td.shape[0] == n and td.get((keys.NEXT, keys.TERMINATED))[:, -1].all()
    assert td.get((keys.NEXT, keys.X_T)).isfinite().all()


@pytest.mark.parametrize("name", UPDATES)
def test_updates_are_as_many_as_they_say(name: str) -> None:
    plan: Any = UPDATES[name]()
    td = rollout().set(keys.ADVANTAGE, torch.ones(16, 4, 1))
    made = {"policy": make_policy(), "group_size": 1, "generator": torch.Generator(), "entries": [keys.X_T]}
    found = list(plan(td, **made))
    assert len(found) == plan.count(4) and all(plan.weight(part) == part.numel() for part in found)


NUMBERS = [
    (registry[name], field.name)
    for registry in (SURROGATES, UPDATES)
    for name in registry
    for field in fields(registry[name])
    if type(field.default) in (int, float)
]


@pytest.mark.parametrize("value", [math.nan, math.inf, True, "1"])
@pytest.mark.parametrize(("make", "name"), NUMBERS)
def test_a_number_of_a_piece_that_is_none_is_named(make: Any, name: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"\b{name} is "):
        make(**{name: value})


@pytest.mark.parametrize("name", METHODS)
def test_a_method_tunes_and_is_its_configuration(name: str) -> None:
    recipe = METHODS[name]()
    chosen, given = recipe_config(recipe)
    config: dict[str, Any] = {group: {"name": option} for group, option in chosen.items()} | {
        "regulariser": {}
    }
    for group, options in given.items():
        config[group] = {**config[group], **options}
    assert build_recipe(config) == recipe and getattr(recipes, name) is METHODS[name]
    assert all(piece in str(recipe) for piece in (field.name for field in fields(recipe)))

    plan = Rollouts(16, group_size=max(1, recipe.credit.min_group), pairs=recipe.rollouts.pairs)
    policy = make_policy()
    if recipe.updates.refuses(policy):
        policy = make_policy(diffrl.DDIM(), std_floor=0.0)
    if recipe.surrogate.refuses(policy):
        policy = make_policy(diffrl.CPS())
    tuner = Finetuner(policy, right, METHODS[name](rollouts=plan), event_shape=(2,), length=Iterations(2))
    before = [p.detach().clone() for p in tuner.policy.denoiser.parameters()]
    rows = list(tuner.steps())
    assert len(rows) == 2 and all(row["grad_norm"] > 0 for row in rows)
    assert any(not torch.equal(a, b) for a, b in zip(before, tuner.policy.denoiser.parameters(), strict=True))
