"""The fine-tuning loop: what it trains, what it counts, that it resumes bit for bit, what it refuses."""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffrl
from diffrl import keys, recipes
from diffrl.diffusion.networks.mlp import MLP
from diffrl.finetuning.check_report import CheckFailed
from diffrl.finetuning.credit.critic import LearnedCritic
from diffrl.finetuning.credit.group import GroupRelative
from diffrl.finetuning.credit.standardised import RewardsToGo, Standardised
from diffrl.finetuning.evaluation import EarlyStop, Judge, TuningEvaluation, chain_kl, diversity
from diffrl.finetuning.finetuner import Finetuner, Iterations
from diffrl.finetuning.methods.ddpo import PPOClip
from diffrl.finetuning.methods.sdpo import RewardDifference
from diffrl.finetuning.placement.dense import Dense
from diffrl.finetuning.placement.terminal import Terminal
from diffrl.finetuning.recipe import Recipe, Regulariser
from diffrl.finetuning.reference import frozen_copy
from diffrl.finetuning.rollouts.chains import Rollouts
from diffrl.finetuning.run_checks import check_tuner
from diffrl.finetuning.surrogate import scaled_clip_range
from diffrl.finetuning.updates.base import micro_batches
from diffrl.finetuning.updates.steps import Updates
from diffrl.rewards.black_box import BlackBox
from diffrl.rewards.weighted_sum import WeightedSum
from diffrl.training.checkpoints import CheckpointError
from diffrl.training.identity import RunChanged
from diffrl.training.loop import step_generator
from diffrl.training.optim import NonFiniteLoss, Optim
from tests.kit.policies import make_policy, right

SMALL = Rollouts(trajectories=16)
PAIRS = Rollouts(trajectories=16, pairs=True)


def tuner_of(recipe: Recipe, policy: diffrl.DenoisingPolicy | None = None, **options: Any) -> Finetuner:
    given = {"event_shape": (2,), "length": Iterations(4, eval_every=2, checkpoint_every=2), **options}
    return Finetuner(policy or make_policy(), given.pop("reward", right), recipe, **given)


def weights(tuner: Finetuner) -> Tensor:
    return torch.cat([p.detach().flatten() for p in tuner.policy.denoiser.parameters()])


METHODS = {
    "ddpo_sf": lambda: recipes.ddpo_sf(rollouts=SMALL),
    "ddpo_is": lambda: recipes.ddpo_is(rollouts=SMALL),
    "sdpo": lambda: recipes.sdpo(rollouts=PAIRS),
    "next": lambda: recipes.sdpo(rollouts=PAIRS, placement=Dense("all", timing="next")),
    "critic": lambda: recipes.ddpo_is(rollouts=SMALL, credit=LearnedCritic()),
    "group": lambda: recipes.ddpo_is(rollouts=Rollouts(16, group_size=4), credit=GroupRelative()),
    "kl": lambda: recipes.ddpo_is(rollouts=SMALL, regulariser=Regulariser(0.1)),
    "ema": lambda: recipes.ddpo_is(rollouts=SMALL, regulariser=Regulariser(0.1, "ema", 0.5)),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_was_stopped_ends_bit_for_bit_as_one_that_was_not(name: str, tmp_path: Path) -> None:
    whole = tuner_of(METHODS[name](), folder=tmp_path / "whole")
    rows: list[dict[str, float]] = []
    whole.fit(report=rows.append, progress=False)
    for _ in range(2):  # stopped after the second iteration, then continued by another process
        part = tuner_of(METHODS[name](), folder=tmp_path / "part")
        resumed = part.resume()
        ended = part.fit(stop=lambda tuner=part: tuner.step == 2, progress=False)  # type: ignore[misc]
    assert resumed and ended and torch.equal(weights(whole), weights(part))
    seconds = {"seconds": 0.0}
    assert whole.figures | seconds == part.figures | seconds
    assert not torch.equal(weights(whole), weights(tuner_of(METHODS[name]())))
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", METHODS)
def test_what_is_spent_is_counted(name: str) -> None:
    recipe = METHODS[name]()
    box = BlackBox(right)
    tuner = tuner_of(recipe, reward=box)
    tuner.fit(progress=False)
    # std_floor makes all 4 steps stochastic
    updates = {"ddpo_sf": 1, "sdpo": 8, "next": 8}.get(name, 2)
    assert tuner.figures["updates"] == 4 * updates == 4 * recipe.updates.count(4)
    queries = {"sdpo": 3, "next": 4}.get(name, 1) * 64
    if name == "sdpo":  # the first estimates of a pair are one sample
        queries -= 32
    assert tuner.figures["queries"] == box.queries == queries
    evaluations = 4 * 16 * 4 * 2  # collected, then trained on
    extra = evaluations // 2 if name in ("kl", "ema") else 0
    assert tuner.figures["network_evaluations"] == evaluations + extra
    assert tuner.figures["trajectories"] == 64


@pytest.mark.parametrize("name", ["ddpo_sf", "ddpo_is", "sdpo", "critic", "next"])
def test_the_reward_rises(name: str) -> None:
    sizes = {"rollouts": Rollouts(64, pairs=name in ("sdpo", "next"))}
    recipe = copy.deepcopy(METHODS[name]())
    pieces = {k: v for k, v in vars(recipe).items() if k != "rollouts"}
    tuner = tuner_of(Recipe(**{**pieces, **sizes}), length=Iterations(30), optim=Optim(3e-3, warmup_steps=0))
    judge = Judge(TuningEvaluation(64), tuner.base, right, event_shape=(2,))
    before = judge(tuner.policy)
    tuner.fit(progress=False)
    after = judge(tuner.policy)
    assert after["eval_reward"] > before["eval_reward"] + 0.3 * before["eval_reward_std"]
    assert (
        after["kl_to_base"] > 0 == before["kl_to_base"] == before["distance_to_base_sliced_w2@64_seed3141592"]
    )


def test_accumulation_changes_nothing() -> None:
    for make, rows in ((recipes.ddpo_is, SMALL), (recipes.sdpo, PAIRS)):
        ends = []
        for size in (1000, 8):
            order = "step" if rows.pairs else "trajectory"
            recipe = make(rollouts=rows, updates=Updates(order, micro_batch=size))
            tuner = tuner_of(recipe, policy=make_policy().double(), length=Iterations(1))
            tuner.fit(progress=False)
            ends.append(weights(tuner))
        torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-6)


def test_an_update_is_a_plain_step_of_adamw_on_the_mean_over_its_steps() -> None:
    tuner = tuner_of(recipes.ddpo_sf(rollouts=SMALL), length=Iterations(1))
    by_hand = copy.deepcopy(tuner.policy)
    rollout = tuner.collect(step_generator(0, 0))
    tuner = tuner_of(recipes.ddpo_sf(rollouts=SMALL), length=Iterations(1))
    tuner.fit(progress=False)
    R = rollout["next", "x_t"][:, -1, 0]
    A = ((R - R.mean()) / R.std(correction=0)).clamp(-5, 5)
    loss = torch.zeros(())
    for i in range(4):
        law = by_hand.law(rollout["x_t"][:, i], torch.full((16,), i))
        normal = torch.distributions.Normal(law.mean, law.std[:, None])
        loss = loss - (A * normal.log_prob(rollout["action"][:, i]).mean(1)).mean() / 4
    parameters = list(by_hand.denoiser.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=3e-4, weight_decay=1e-4)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimiser.step()
    theirs = torch.cat([p.detach().flatten() for p in parameters])
    torch.testing.assert_close(weights(tuner), theirs, rtol=1e-4, atol=1e-6)


def test_conditions_are_shared_by_a_group_and_reach_the_reward() -> None:
    seen: list[Tensor] = []

    def asked(x0: Tensor, cond: Any) -> Tensor:
        seen.append(cond)
        return x0[:, 0]

    policy = make_policy(num_classes=3)
    recipe = recipes.ddpo_is(rollouts=Rollouts(16, group_size=4), credit=GroupRelative())
    tuner = tuner_of(recipe, policy, reward=BlackBox(asked, cache=False), conditions=torch.tensor([0, 2]))
    rollout = tuner.collect(step_generator(1, 0))
    assert (seen[0].view(4, 4) == seen[0].view(4, 4)[:, :1]).all() and set(seen[0].tolist()) <= {0, 2}
    assert torch.equal(rollout[keys.COND][:, 0], seen[0])


def test_the_ema_reference_follows_and_the_frozen_one_stays() -> None:
    tuner = tuner_of(METHODS["ema"](), length=Iterations(1))
    before = copy.deepcopy(tuner.policy.denoiser)
    tuner.fit(progress=False)
    triples = zip(
        before.parameters(),
        tuner.policy.denoiser.parameters(),
        tuner.references("ema").denoiser.parameters(),
        strict=True,
    )
    for old, new, average in triples:
        torch.testing.assert_close(average.detach(), 0.5 * old.detach() + 0.5 * new.detach())
    for old, base in zip(before.parameters(), tuner.base.denoiser.parameters(), strict=True):
        assert torch.equal(old, base)


@pytest.mark.parametrize("name", METHODS)
def test_the_checks_run_and_leave_no_trace(name: str) -> None:
    def reward() -> WeightedSum:
        return WeightedSum({"right": (right, 1.0), "up": (lambda x, c: x[:, 1], 0.5)}, normalise="running")

    tuner = tuner_of(METHODS[name](), reward=reward())
    report = check_tuner(tuner)
    assert report.passed and tuner.figures["queries"] == 0 and tuner.figures["network_evaluations"] == 0
    fresh = tuner_of(METHODS[name](), reward=reward())
    fresh.fit(progress=False)
    tuner.fit(progress=False)
    assert torch.equal(weights(tuner), weights(fresh))


def test_a_failed_check_stops_before_the_first_update() -> None:
    class Moody(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.process, self.calls = inner, diffrl.EDM(), 0

        def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
            self.calls += 1
            return self.inner(x, t, cond) + 0.1 * self.calls

    policy = make_policy()
    policy.denoiser = Moody(policy.denoiser)
    with pytest.raises(CheckFailed, match="before the first update"):
        diffrl.finetune(policy, right, METHODS["ddpo_is"](), event_shape=(2,), iterations=1, progress=False)


def test_a_loss_that_is_not_finite_ends_the_run_and_spares_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuner = tuner_of(METHODS["ddpo_is"](), folder=tmp_path)
    for _ in tuner.steps():
        if tuner.step == 3:
            break
    before = weights(tuner)
    monkeypatch.setattr(Standardised, "__call__", lambda self, rollout, r: torch.full_like(r, math.nan))
    with pytest.raises(NonFiniteLoss, match="at iteration 3; last checkpoint: .*step_000002"):
        next(tuner.steps())
    assert torch.equal(weights(tuner), before)


def test_samples_far_from_any_data_end_the_run_and_no_reward_is_blamed() -> None:
    """In a rollout and in an evaluation alike; squares of such samples may overflow in a reward."""
    tuner = tuner_of(METHODS["ddpo_is"]())
    judge = Judge(TuningEvaluation(8), tuner.base, right, event_shape=(2,))
    with torch.no_grad():
        for parameter in tuner.policy.denoiser.parameters():
            parameter.mul_(1e4)
    with pytest.raises(NonFiniteLoss, match=r"samples are as large as .*Lower optim\.lr"):
        next(tuner.steps())
    with pytest.raises(NonFiniteLoss, match="samples are as large as"):
        judge(tuner.policy)


def test_in_bfloat16_the_loop_runs_and_log_probabilities_stay_float32() -> None:
    tuner = tuner_of(METHODS["ddpo_is"](), autocast=torch.bfloat16)
    rollout = tuner.collect(step_generator(0, 0))
    assert rollout[keys.ACTION_LOG_PROB].dtype == torch.float32 == rollout[keys.X_T].dtype
    exact = tuner_of(METHODS["ddpo_is"]()).collect(step_generator(0, 0))
    assert not torch.equal(rollout[keys.X0_HAT], exact[keys.X0_HAT])
    torch.testing.assert_close(rollout[keys.X0_HAT], exact[keys.X0_HAT], rtol=0.1, atol=0.1)
    asked: list[bool] = []

    def plain(x0: Tensor, cond: Any) -> Tensor:
        asked.append(torch.is_autocast_enabled("cpu"))
        return x0[:, 0]

    judge = Judge(TuningEvaluation(8), tuner.base, plain, event_shape=(2,), precision=tuner.precision)
    figures = judge(tuner.policy)
    assert figures["distance_to_base_sliced_w2@8_seed3141592"] == 0 == figures["kl_to_base"] and asked == [
        False
    ]
    tuner.fit(progress=False)
    assert weights(tuner).isfinite().all()


# What does not go together


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: recipes.sdpo(rollouts=SMALL), "set rollouts.pairs=true"),
        (lambda: recipes.ddpo_sf(updates=Updates()), "one update a rollout: set updates.minibatches=1"),
        (lambda: recipes.ddpo_sf(updates=Updates("step", minibatches=1)), "updates.order=trajectory"),
        (lambda: recipes.sdpo(regulariser=Regulariser(0.1)), "RewardDifference has no KL term"),
        (lambda: recipes.ddpo_is(credit=GroupRelative()), "set rollouts.group_size"),
        (lambda: recipes.ddpo_is(placement=Dense()), "dense rewards would only be summed"),
        (lambda: recipes.sdpo(rollouts=Rollouts(2, pairs=True)), "cannot make 2 minibatches"),
        (lambda: Rollouts(15, pairs=True), "a multiple of the group size, 2"),
        (lambda: Rollouts(16, group_size=4, pairs=True), "for pairs leave it at 1"),
        (lambda: Regulariser(-1.0), "regulariser.kl_coef is -1.0"),
        (lambda: Regulariser(reference="new"), "regulariser.reference is 'new'"),
        (lambda: Iterations(0), "loop.iterations is 0"),
        (
            lambda: tuner_of(METHODS["ddpo_is"](), make_policy(std_floor=0.0, num_steps=1)),
            "no step of the policy is stochastic",
        ),
    ],
)
def test_pieces_that_do_not_go_together_are_refused(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_one_step_whose_reward_is_of_where_it_starts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"give placement\.timing=next"):
        tuner_of(METHODS["sdpo"](), make_policy(num_steps=1))
    with pytest.raises(ValueError, match="a group of 4 is drawn together"):
        Rollouts(16, group_size=4, at_once=2)
    tuner_of(METHODS["next"](), make_policy(num_steps=1)).fit(progress=False)


def test_a_folder_of_another_recipe_is_refused(tmp_path: Path) -> None:
    tuner_of(METHODS["ddpo_is"](), folder=tmp_path).fit(progress=False)
    with pytest.raises(RunChanged, match="credit 'Standardised' → 'LearnedCritic'"):
        tuner_of(METHODS["critic"](), folder=tmp_path).resume()
    with pytest.raises(CheckpointError, match="lacks a part"):  # by word: but its state does not fit
        tuner_of(METHODS["critic"](), folder=tmp_path).resume(accept_changes=True)


@pytest.mark.parametrize("name", METHODS)
def test_the_largest_part_is_what_an_update_forwards(name: str) -> None:
    recipe = METHODS[name]()
    for size in (3, 8, 1000):
        u = dataclasses.replace(recipe.updates, micro_batch=size)
        tuner = tuner_of(dataclasses.replace(recipe, updates=u))
        rollout, entries = tuner.collect(step_generator(0, 0)), tuner.loss.in_keys
        shuffle = step_generator(0, 1)
        rows = recipe.rollouts.rows_together
        seen = [
            part.numel()
            for m in u(rollout, policy=tuner.policy, group_size=rows, generator=shuffle, entries=entries)
            for part in micro_batches(m, size, group_size=rows)
        ]
        assert max(seen) == u.largest_part(16, 4, group_size=rows)


def test_a_policy_without_trainable_parameters_is_refused() -> None:
    policy = make_policy()
    policy.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to tune"):
        tuner_of(METHODS["ddpo_is"](), policy)


def test_recipes_have_the_published_numbers() -> None:
    sdpo, ddpo = recipes.sdpo(), recipes.ddpo_is()
    assert sdpo.credit == RewardsToGo(gamma=0.99) and sdpo.surrogate == RewardDifference(0.99, 1.0, None, 5.0)
    assert (sdpo.rollouts.trajectories, sdpo.updates.order, sdpo.updates.minibatches) == (256, "step", 2)
    assert (
        ddpo.surrogate == PPOClip(None, 5.0)
        and ddpo.placement == Terminal()
        and ddpo.updates.minibatches == 2
    )
    assert scaled_clip_range(16_384, "mean") == pytest.approx(1e-4, rel=1e-3)
    assert scaled_clip_range(64, "sum") == pytest.approx(64 * scaled_clip_range(64, "mean"))
    assert tuner_of(METHODS["sdpo"]()).loss.clip_range == pytest.approx(0.0128 / math.sqrt(2))
    assert [line.split()[0] for line in str(sdpo).splitlines()] == list(vars(sdpo))


# Evaluation


def test_the_divergence_of_chains_is_that_of_torchs_normals() -> None:
    policy, base = make_policy(seed=1), make_policy(seed=2)
    judge = Judge(TuningEvaluation(8), base, right, event_shape=(2,))
    _, rollout = judge.draw(policy)
    found = chain_kl(policy, base, rollout)
    expected = torch.zeros(8)
    for i in range(4):
        laws = [p.law(rollout["x_t"][:, i], torch.full((8,), i)) for p in (policy, base)]
        normals = [torch.distributions.Normal(law.mean, law.std[:, None]) for law in laws]
        expected += torch.distributions.kl_divergence(*normals).sum(1)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)


def test_diversity_is_the_mean_distance_of_two_samples() -> None:
    x = torch.randn(5, 1, 2, 3)
    pairs = [(x[a] - x[b]).norm() / math.sqrt(6) for a in range(5) for b in range(a)]
    assert diversity(x) == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-5)


def test_the_judge_asks_without_counting_and_always_the_same() -> None:
    policy, box = make_policy(), WeightedSum({"right": (right, 2.0), "up": (lambda x, c: x[:, 1], 1.0)})
    judge = Judge(TuningEvaluation(8), frozen_copy(policy), box, heldout=right, event_shape=(2,))
    one, other = judge(policy), judge(policy)
    assert one == other and box.queries == 0 and policy.nfe == 0
    x, _ = judge.draw(policy)
    assert one["eval_reward"] == pytest.approx(float((2 * x[:, 0] + x[:, 1]).mean()), rel=1e-5)
    assert one["heldout_reward"] == pytest.approx(float(x[:, 0].mean()), rel=1e-5)


def rows(**columns: list[float]) -> list[dict[str, float]]:
    n = len(next(iter(columns.values())))
    base = {"kl_to_base": [0.0] * n, "diversity": [1.0] * n, "eval_reward": [0.0] * n}
    return [{name: values[i] for name, values in {**base, **columns}.items()} for i in range(n)]


@pytest.mark.parametrize(
    ("stop", "seen", "reason"),
    [
        (EarlyStop(), rows(eval_reward=[3, 2, 1, 0]), None),
        (
            EarlyStop(patience=2),
            rows(eval_reward=[1, 3, 2, 2.9]),
            "eval_reward had no new best in 2 evaluations",
        ),
        (EarlyStop(patience=2), rows(eval_reward=[1, 3, 2, 3.1]), None),
        (
            EarlyStop(patience=1),
            rows(eval_reward=[1, 2], heldout_reward=[1, 0.5]),
            "heldout_reward had no new best",
        ),
        (EarlyStop(max_kl=5), rows(kl_to_base=[0, 5]), None),
        (EarlyStop(max_kl=5), rows(kl_to_base=[0, 6]), "kl_to_base 6 is above stop.max_kl=5"),
        (EarlyStop(min_diversity=0.5), rows(diversity=[2, 0.9]), "diversity is 45% of the base's"),
    ],
)
def test_early_stop(stop: EarlyStop, seen: list[dict[str, float]], reason: str | None) -> None:
    found = stop.reason(seen)
    assert (found is None) == (reason is None) and (reason is None or reason in str(found))


def test_a_reason_ends_the_run() -> None:
    tuner = tuner_of(METHODS["ddpo_is"](), length=Iterations(10, eval_every=1))
    assert tuner.fit(finished=lambda row: "enough" if row["iteration"] == 3 else None, progress=False)
    assert tuner.step == 3


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: EarlyStop(patience=0), "stop.patience is 0"),
        (lambda: EarlyStop(max_kl=0), "stop.max_kl is 0"),
        (lambda: EarlyStop(min_diversity=1), "stop.min_diversity is 1"),
        (lambda: TuningEvaluation(samples=1), "evaluation.samples is 1"),
    ],
)
def test_evaluation_refuses(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_a_few_step_generator_is_a_policy_too() -> None:
    """Consistency sampling: every jump but the last is followed by fresh noise, which has a log-probability."""
    torch.manual_seed(0)
    denoiser = diffrl.Denoiser(MLP((2,), hidden=16, depth=1), diffrl.EDM(), prediction_type="consistency")
    policy = diffrl.DenoisingPolicy(denoiser, diffrl.Multistep(), num_steps=3, reduction="mean")
    recipe = recipes.ddpo_is(rollouts=Rollouts(64))
    tuner = tuner_of(recipe, policy, length=Iterations(30), optim=Optim(3e-3, warmup_steps=0))
    rollout = tuner.collect(step_generator(0, 0))
    assert rollout[keys.TRAINABLE][0, :, 0].tolist() == [True, True, False]
    judge = Judge(TuningEvaluation(64), tuner.base, right, event_shape=(2,))
    before = judge(tuner.policy)["eval_reward"]
    tuner.fit(progress=False)
    assert judge(tuner.policy)["eval_reward"] > before + 0.3
