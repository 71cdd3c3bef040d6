"""`diffrl.finetune` in one call: what it says, what it refuses, what it leaves, and which folder it continues."""

import functools
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffrl
from diffrl import recipes
from diffrl.errors import InputError, InputTypeError
from diffrl.finetuning.check_report import CheckFailed
from diffrl.finetuning.credit.group import GroupRelative
from diffrl.finetuning.finetuner import Finetuner
from diffrl.finetuning.identity import recipe_facts, reward_identity
from diffrl.finetuning.recipe import Recipe
from diffrl.rewards.black_box import BlackBox
from diffrl.rewards.calls import RewardError
from diffrl.rewards.decoded import DecodedReward
from diffrl.rewards.mode_distance import ModeDistance
from diffrl.rewards.weighted_sum import WeightedSum
from diffrl.training.identity import RunChanged
from diffrl.training.optim import NonFiniteLoss
from tests.kit.policies import make_policy, right

SMALL = recipes.Rollouts(trajectories=16)


def tune(reward: Any = right, recipe: Recipe | str | None = None, **options: Any) -> list[dict[str, float]]:
    given: dict[str, Any] = {"policy": make_policy(), "iterations": 2, "progress": False, **options}
    recipe = recipes.ddpo_is(rollouts=SMALL) if recipe is None else recipe
    return diffrl.finetune(given.pop("policy"), reward, recipe, event_shape=(2,), **given)


def offset(by: Any, scale: float = 1.0) -> Any:
    return lambda x0, cond: by + scale * x0[:, 0]


# What it says

GROUPS = functools.partial(
    recipes.ddpo_is, rollouts=recipes.Rollouts(24, group_size=24), credit=GroupRelative()
)
KINDS = {
    "ddpo": lambda: recipes.ddpo_is(rollouts=SMALL),
    "group": GROUPS,
    "sdpo": lambda: recipes.sdpo(rollouts=recipes.Rollouts(16, pairs=True)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_that_cannot_teach_is_told(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match="all advantages are 0, as rewards.*nothing is learned from them"):
        tune(offset(1234.567, 0.0), KINDS[kind]())
    torch.manual_seed(0)
    random = BlackBox(lambda x0, cond: torch.randn(len(x0)), cache=False)
    with pytest.warns(UserWarning, match="it is random: the same samples got rewards up to"):
        tune(random, KINDS[kind]())
    assert capsys.readouterr().out == ""
    with pytest.warns(UserWarning, match="nothing is learned"):
        tune(offset(1.0, 0.0), KINDS[kind](), progress=True)
    shown = capsys.readouterr().out
    assert "stored log π" in shown and shown.count("nothing is learned") == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("by", "scale"), [(1e6, 1.0), (1e7, 1e6), (-1e9, 1e4), (0.0, 1e-12)])
def test_rewards_of_any_size_pass_the_checks_in_silence(kind: str, by: float, scale: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(tune(offset(by, scale), KINDS[kind]())) == 3


# What it takes and refuses


def test_a_recipe_may_be_given_by_its_name() -> None:
    by_name = tune(recipe="sdpo", iterations=1)
    assert by_name[-1]["queries"] <= 3 * 256 and by_name[-1]["updates"] == 2 * 4
    with pytest.raises(InputError, match="recipe is 'spdo': give one of .*sdpo"):
        tune(recipe="spdo")


@pytest.mark.parametrize("device", ["cuda:77", "nowhere"])
def test_a_device_that_is_not_here_is_named(device: str) -> None:
    with pytest.raises(InputError, match=f"device is '{device}', which cannot be used") as caught:
        tune(device=device)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lr", [1e3, 1e10, 1e38])
def test_too_large_a_learning_rate_is_named_and_no_sample_blamed(lr: float) -> None:
    with pytest.raises(NonFiniteLoss, match=r"(approx_kl|ratio|samples|overflows).*Lower optim\.lr"):
        tune(lr=lr, iterations=8)


def test_a_policy_that_is_not_finite_fails_the_checks() -> None:
    policy = make_policy()
    with torch.no_grad():
        next(policy.denoiser.parameters()).fill_(torch.inf)
    with pytest.raises(CheckFailed, match="before the first update, the policy's samples hold NaN"):
        tune(policy=policy)


# Which folder it continues


def left(x0: Tensor, cond: Any = None) -> Tensor:
    return -x0[:, 0]


CHANGES: dict[str, dict[str, Any]] = {
    "model.weights": {"policy": lambda: make_policy(seed=1)},
    "policy.num_steps": {"policy": lambda: make_policy(num_steps=5)},
    "policy.std_floor": {"policy": lambda: make_policy(std_floor=0.1)},
    "sampler": {"policy": lambda: make_policy(diffrl.DDIM(eta=0.5))},
    "reward": {"reward": left},
    "seed": {"seed": 1},
    "optim.lr": {"lr": 1e-3},
    "surrogate.advantage_clip": {
        "recipe": recipes.ddpo_is(rollouts=SMALL, surrogate=diffrl.finetuning.methods.ddpo.PPOClip(None, 2.0))
    },
    "rollouts.trajectories": {"recipe": recipes.ddpo_is(rollouts=recipes.Rollouts(32))},
    "loop.iterations": {"iterations": 1},
}


@pytest.mark.parametrize("changed", CHANGES)
def test_a_folder_of_another_run_is_refused_by_what_differs(changed: str, tmp_path: Path) -> None:
    tune(folder=tmp_path)
    options = {k: v() if k == "policy" else v for k, v in CHANGES[changed].items()}
    with pytest.raises(RunChanged, match=rf"{changed} .* → .*say `accept_changes` to go on all the same"):
        tune(folder=tmp_path, **options)


def test_by_word_a_changed_run_goes_on_and_a_longer_one_ends_as_if_it_had_been_planned_so(
    tmp_path: Path,
) -> None:
    policies = {name: make_policy() for name in ("whole", "short", "longer")}
    tune(policy=policies["whole"], folder=tmp_path / "whole", iterations=4)
    tune(policy=policies["short"], folder=tmp_path / "run")
    with pytest.raises(RunChanged, match="loop.iterations 2 → 4; to train on for more steps, say `extend`"):
        tune(folder=tmp_path / "run", iterations=4)
    rows = tune(policy=policies["longer"], folder=tmp_path / "run", iterations=4, extend=True)
    assert [row["iteration"] for row in rows] == [3, 4]
    whole, longer = (nn.utils.parameters_to_vector(policies[n].parameters()) for n in ("whole", "longer"))
    assert torch.equal(whole, longer)
    rows = tune(left, folder=tmp_path / "run", iterations=5, seed=3, accept_changes=True)
    assert [row["iteration"] for row in rows] == [5]


def test_what_only_memory_depends_on_may_change(tmp_path: Path) -> None:
    tune(folder=tmp_path)
    plan = recipes.Rollouts(16, at_once=4)
    assert (
        tune(folder=tmp_path, recipe=recipes.ddpo_is(rollouts=plan, updates=recipes.Updates(micro_batch=8)))
        == []
    )
    assert "updates.micro_batch" not in recipe_facts(recipes.ddpo_is())


def test_a_recipe_is_as_new_for_every_run() -> None:
    recipe = recipes.ddpo_is(rollouts=SMALL)
    first, second = ([row["reward"] for row in tune(recipe=recipe)[1:]] for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"recipe": recipes.sdpo}, "give one made by diffrl.recipes"),
        ({"policy": nn.Linear(2, 2)}, "policy is a Linear: give a diffrl.DenoisingPolicy"),
        ({"conditions": [1, 2]}, "conditions are a list"),
        ({"conditions": torch.zeros(0, 1)}, "at least one"),
    ],
)
def test_what_is_of_another_kind_is_named(given: dict[str, Any], told: str) -> None:
    with pytest.raises((InputError, InputTypeError), match=told):
        tune(**given)


# Rewards by what they are


@dataclass
class Scaled:
    scale: float

    def __call__(self, x0: Tensor, cond: Any = None) -> Tensor:
        return self.scale * x0[:, 0]


class Along:
    """Counts its calls, which are no part of what it is."""

    def __init__(self, direction: Tensor) -> None:
        self.direction, self.calls = direction, 0

    def __call__(self, x0: Tensor, cond: Any = None) -> Tensor:
        self.calls += 1
        return x0 @ self.direction


SLOPE = torch.ones(2)


def steep(x0: Tensor, cond: Any = None) -> Tensor:
    return x0 @ SLOPE


def test_a_reward_is_another_one_where_a_global_that_it_reads_is_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = reward_identity(steep)
    monkeypatch.setitem(globals(), "SLOPE", torch.zeros(2))
    assert reward_identity(steep) != before
    monkeypatch.setitem(globals(), "SLOPE", torch.ones(2))
    assert reward_identity(steep) == before


def test_a_reward_that_has_been_asked_stays_the_same() -> None:
    reward = Along(torch.ones(2))
    before = reward_identity(reward)
    reward(torch.ones(3, 2))
    assert reward_identity(reward) == before


def test_a_reward_that_leads_back_to_itself_has_an_identity() -> None:
    reward = Along(torch.ones(2))
    reward.direction = reward  # type: ignore[assignment]

    def first(x0: Tensor, cond: Any = None) -> Tensor:
        return second(x0)

    def second(x0: Tensor, cond: Any = None) -> Tensor:
        return first(x0)

    assert len({reward_identity(reward), reward_identity(first), reward_identity(second)}) == 3


def test_rewards_that_differ_have_other_identities_and_wrapped_ones_the_same() -> None:
    torch.manual_seed(0)
    rewards: list[Any] = [
        right,
        left,
        lambda x0, cond: x0[:, 0],
        lambda x0, cond: x0[:, 1],
        lambda x0, cond: x0[:, 0] + 1,
        lambda x0, cond: x0[:, 0] - 1,
        offset(1.0),
        offset(2.0),
        Scaled(1.0),
        Scaled(2.0),
        functools.partial(right, cond=1),
        functools.partial(right, cond=2),
        functools.partial(right, cond=torch.zeros(1)),
        Along(torch.zeros(2)),
        Along(torch.ones(2)),
        Along(torch.zeros(2)).__call__,
        Along(torch.ones(2)).__call__,
        offset(torch.zeros(2)),
        offset(torch.ones(2)),
        offset(Along(torch.ones(2))),
        ModeDistance([0.0, 1.0]),
        ModeDistance([1.0, 0.0]),
        ModeDistance(index=0, mixture=diffrl.data.rings().mixture),
        ModeDistance(index=0, mixture=diffrl.data.gmm(dim=2).mixture),
        nn.Linear(2, 1),
        nn.Linear(2, 1),
        WeightedSum({"a": (right, 1.0)}),
        WeightedSum({"a": (right, 2.0)}),
        WeightedSum({"a": (right, 2.0)}, normalise="running"),
    ]
    found = [reward_identity(reward) for reward in rewards]
    assert len(set(found)) == len(found)
    assert found == [reward_identity(reward) for reward in rewards]
    wrapped = BlackBox(DecodedReward(right, lambda z: z), retries=2, cache=False)
    assert reward_identity(wrapped) == reward_identity(right)
    assert reward_identity(offset(2.0)) == reward_identity(offset(2.0)) and "0x" not in "".join(found)


# Pipelines


@pytest.mark.parametrize("kind", ["unet", "transformer"])
def test_a_tuned_pipeline_is_loaded_by_stock_diffusers(kind: str, tmp_path: Path) -> None:
    """The adapters in the folder, in a fresh pipeline: its network gives the tuned policy's estimates."""
    from diffrl.diffusion.pipelines.lora import add_lora
    from tests.kit.oracles import generator
    from tests.kit.pipeline_policies import EACH, SHAPE, P, denoiser_of, differ, policy_of
    from tests.kit.pipelines import stable_diffusion, stable_diffusion_3

    make, sampler, t = {
        "unet": (stable_diffusion, diffrl.Ancestral(), 500.0),
        "transformer": (stable_diffusion_3, diffrl.FlowSDE(), 0.5),
    }[kind]
    tuned = denoiser_of(make(), w=2.0)
    add_lora(tuned, 2, 4.0, generator=generator(1))
    diffrl.finetune(
        policy_of(tuned, sampler),
        lambda z, cond: z.mean((1, 2, 3)),
        recipes.ddpo_is(rollouts=recipes.Rollouts(8)),
        event_shape=SHAPE,
        conditions=EACH,
        iterations=3,
        lr=3e-2,
        folder=tmp_path,
        progress=False,
    )
    x = torch.randn(P, *SHAPE, generator=generator())
    stock = make()
    before = denoiser_of(stock, w=2.0)(x, torch.full((P,), t), EACH)
    stock.load_lora_weights(tmp_path / "lora")
    with torch.no_grad():
        loaded, expected = (d(x, torch.full((P,), t), EACH) for d in (denoiser_of(stock, w=2.0), tuned))
    torch.testing.assert_close(loaded, expected, rtol=1e-5, atol=1e-5)
    assert differ(before, expected)


# Rewards beside sampling


@pytest.mark.parametrize("name", ["ddpo_is", "sdpo"])
def test_rewards_asked_while_the_next_part_is_drawn_change_no_figure(name: str) -> None:
    rows = []
    for overlap in (False, True):
        plan = recipes.Rollouts(16, pairs=name == "sdpo", at_once=4, overlap=overlap)
        found = tune(recipe=getattr(recipes, name)(rollouts=plan), iterations=3)
        rows.append([{k: v for k, v in row.items() if k != "seconds"} for row in found])
    assert rows[0] == rows[1]


def test_a_part_is_judged_before_the_next_one_is_drawn_whole() -> None:
    """The second part does not begin before the reward was asked about the first: else this waits for ever."""
    policy, answered = make_policy(), threading.Event()
    act, asked = policy.act, 0

    def watched(*args: Any, **options: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 5:  # the first of the second part's four steps
            assert answered.wait(60), "the reward was not asked while sampling went on"
        return act(*args, **options)

    def reward(x0: Tensor, cond: Any = None) -> Tensor:
        answered.set()
        return right(x0)

    policy.act = watched  # type: ignore[method-assign]
    plan = recipes.Rollouts(8, at_once=4, overlap=True)
    tuner = Finetuner(policy, reward, recipes.ddpo_is(rollouts=plan), event_shape=(2,))
    assert next(tuner.steps())["reward_std"] > 0 and asked == 8


def test_what_does_not_overlap_is_refused() -> None:
    with pytest.raises(InputError, match=r"set rollouts\.at_once"):
        recipes.Rollouts(overlap=True)
    plan = recipes.Rollouts(16, at_once=4, overlap=True)
    running = WeightedSum({"a": (right, 1.0)}, normalise="running")
    with pytest.raises(InputError, match=r"depends on how they are asked: set rollouts\.overlap=false"):
        tune(running, recipes.ddpo_is(rollouts=plan))
    with pytest.raises(RewardError, match="failed for sample"):
        tune(lambda x0, cond: x0[:, 0] * torch.nan, recipes.ddpo_is(rollouts=plan))
