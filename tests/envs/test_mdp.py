"""The decision process: chains solved by hand, seeds, restarts, TorchRL's losses, what is refused."""

import math
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.envs import Compose, GymEnv, GymWrapper, RewardSum, StepCounter, TransformedEnv
from torchrl.envs.utils import check_env_specs, step_mdp
from torchrl.objectives import ClipPPOLoss

import diffrl
from diffrl import keys
from diffrl.data.image_files import DataError
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.samplers.ddim import DDIM, Ancestral
from diffrl.diffusion.samplers.sde import CPS, FlowSDE
from diffrl.diffusion.schedules.flow import Flow
from diffrl.envs import DiffusionMDP
from diffrl.finetuning.methods.ddpo import DDPOLoss
from diffrl.finetuning.rollouts.chains import collect_rollout
from diffrl.rewards.black_box import BlackBox
from diffrl.rewards.mode_distance import ModeDistance
from tests.kit.decision_process import ID, env_of, labelled, policy_of, squares
from tests.kit.environments import FLAGS
from tests.kit.networks import random_denoiser
from tests.kit.oracles import generator, randn

# A chain of two steps solved by hand. One dimension, rectified flow, levels 1 and 1/2, then clean; first noise 3:
# x = 3. R(x0) = -x0².
#
# Next latents 2 and 1/2: those are the states, rewards 0 and -1/4.
# Clean estimates 1 and 1/2. Without fresh noise ½·1 + ½ (3 - 0·1)/1 = 2, then ½: rewards 0 and -1/4.
#   With all noise afresh (at pure noise the posterior knows nothing of the state): ½·1 + ½·3 = 2, noise 3 again.
#   Dense rewards are those of the estimates, -1 and -1/4.
#   Flow SDE, a = 1: sd² = 1/(1-½) = 2, h = -½, v = (3-1)/1 = 2: 3 (1 - ½) - 2·½ + √2·√½·3 = 3.5;
#   then t = ½: sd² = 1, v = (3.5 - ½)/½ = 6: 3.5 (1 - ½) + 6 (1 + ½)(-½) + √½·3 = -2.75 + 3/√2.
LAST = -2.75 + 3 / 2**0.5
BY_HAND: dict[str, tuple[dict[str, Any], list[float], list[float], list[float]]] = {
    "next latent": ({}, [2, 0.5], [3, 2, 0.5], [0, -0.25]),
    "ddim": ({"action": "x0_hat", "sampler": DDIM(0.0)}, [1, 0.5], [3, 2, 0.5], [0, -0.25]),
    "ancestral": ({"action": "x0_hat", "sampler": Ancestral()}, [1, 0.5], [3, 2, 0.5], [0, -0.25]),
    "cps": ({"action": "x0_hat", "sampler": CPS(1.0)}, [1, 0.5], [3, 2, 0.5], [0, -0.25]),
    "flow sde": ({"action": "x0_hat", "sampler": FlowSDE(1.0)}, [1, 0.5], [3, 3.5, LAST], [0, -(LAST**2)]),
    "dense": (
        {"action": "x0_hat", "sampler": DDIM(0.0), "reward_placement": "dense"},
        [1, 0.5],
        [3, 2, 0.5],
        [-1, -0.25],
    ),
    "cut": ({"max_steps": 1}, [2], [3, 2], [0]),
}
Walk = tuple[list[float], list[float], list[bool], list[bool]]


def walk_gym(env: Any, actions: list[float], batched: bool) -> Walk:
    at: Callable[[Any], Any] = (lambda a: a[0]) if batched else (lambda a: a)
    observation, _ = env.reset()
    walked: Any = ([at(observation["x_t"]).item()], [], [], [])
    for action in actions:
        a = np.full(env.action_space.shape, action / 4, np.float32)
        observation, *outcome, _ = env.step(a)
        for column, entry in zip(walked, (observation["x_t"], *outcome), strict=True):
            column.append(np.asarray(at(entry)).item())
    return walked


def walk_torchrl(env: Any, actions: list[float], unit: float) -> Walk:
    td, steps = env.reset(), []
    for action in actions:
        a = torch.full(env.full_action_spec["action"].shape, action / unit)
        steps.append(env.step(td.set("action", a)))
        td = step_mdp(steps[-1])
    rollout = torch.stack(steps)
    columns = [rollout["next", key] for key in (keys.REWARD, keys.TERMINATED, keys.TRUNCATED)]
    x = [steps[0][keys.X_T], *(s["next", keys.X_T] for s in steps)]
    return [float(v) for v in x], *(c.flatten().tolist() for c in columns)  # type: ignore[return-value]


def walk(form: str, actions: list[float], **variant: Any) -> Walk:
    variant |= {"num_steps": 2, "noise": lambda x: torch.full_like(x, 3.0)}
    if form.startswith("native"):
        batch = [1, 1] if form == "native batch" else []
        env = DiffusionMDP(Flow(), squares, event_shape=(1,), batch_size=batch, **variant)
        return walk_torchrl(env, actions, 1.0)
    variant |= {
        "process": "flow",
        "data": "gmm",
        "data_kwargs": {"dim": 1},
        "reward": squares,
        "action_scale": 4.0,
    }
    if form == "gymnasium":
        return walk_gym(gymnasium.make(ID, **variant), actions, batched=False)
    if form == "gymnasium vector":
        return walk_gym(gymnasium.make_vec(ID, **variant), actions, batched=True)
    if form == "torchrl from gymnasium":
        return walk_torchrl(GymEnv(ID, **variant), actions, 4.0)
    return walk_torchrl(
        GymWrapper(gymnasium.make_vec(ID, autoreset_mode="Disabled", **variant)), actions, 4.0
    )


@pytest.mark.parametrize(
    "form",
    [
        "native",
        "native batch",
        "gymnasium",
        "gymnasium vector",
        "torchrl from gymnasium",
        "torchrl from vector",
    ],
)
@pytest.mark.parametrize("case", BY_HAND)
def test_chain_solved_by_hand(case: str, form: str) -> None:
    variant, actions, states, rewards = BY_HAND[case]
    x, r, terminated, truncated = walk(form, actions, **variant)
    np.testing.assert_allclose(x, states, rtol=1e-6)
    np.testing.assert_allclose(r, rewards, rtol=1e-6)
    ends = [False] * (len(rewards) - 1) + [True]
    never = [False] * len(rewards)
    assert (terminated, truncated) == ((never, ends) if case == "cut" else (ends, never))


SPECS: list[dict[str, Any]] = [
    {},
    {"batch_size": []},
    {"batch_size": [2, 3], "max_steps": 2},
    {"batch_size": [6], "pairs": True, "conditions": torch.arange(3)},
    {"conditions": randn(5, 2, 3, dtype=torch.float32)},
    {"event_shape": (1, 4, 4), "action": "x0_hat", "sampler": Ancestral()},
    {"reward_placement": "dense"},
    {"num_steps": 1, "sampler": CPS(0.5)},
]


@pytest.mark.parametrize("options", SPECS, ids=lambda o: ", ".join(o) or "plain")
def test_specs(options: dict[str, Any]) -> None:
    env = env_of(**options)
    check_env_specs(env)
    b, d = env.batch_size, env.decision_process
    assert env.reward_spec.shape == (*b, 1)
    assert env.full_action_spec["action"].shape == (*b, *d.event_shape)
    assert set(env.observation_spec.keys()) == {keys.X_T, keys.T, keys.INDEX, keys.GROUP} | (
        {keys.COND} if "conditions" in options else set()
    )


def test_seeds() -> None:
    def draw(seed: int | None) -> Tensor:
        return env_of(seed=seed, conditions=torch.arange(9), batch_size=[8]).reset()[keys.X_T]

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    env = env_of(seed=None, conditions=torch.arange(9), batch_size=[8])
    env.set_seed(1)
    first = env.reset()
    assert torch.equal(first[keys.X_T], draw(1))
    assert not torch.equal(first[keys.X_T], env.reset()[keys.X_T])
    before = torch.get_rng_state()
    env.reset()
    assert torch.equal(torch.get_rng_state(), before)  # none of the global stream is used
    torch.manual_seed(7)
    one = draw(None)
    torch.manual_seed(7)
    assert torch.equal(draw(None), one)


def random_steps(env: DiffusionMDP, td: TensorDictBase, n: int) -> TensorDictBase:
    for _ in range(n):
        td = step_mdp(env.step(td.set(keys.ACTION, torch.randn(4, 2, generator=generator(9)))))
    return td


def test_partial_reset_leaves_the_others() -> None:
    env = env_of(reward=labelled, conditions=torch.arange(50))
    td = random_steps(env, env.reset(), 3)
    mask = torch.tensor([True, False, False, True])
    again = env.reset(td.clone().set("_reset", mask.unsqueeze(-1)), set_state=False)
    assert again[keys.INDEX].flatten().tolist() == [0, 3, 3, 0]
    assert torch.equal(again[keys.X_T][~mask], td[keys.X_T][~mask])
    assert not torch.equal(again[keys.X_T][mask], td[keys.X_T][mask])
    assert torch.equal(again[keys.COND][~mask], td[keys.COND][~mask])
    assert again[keys.GROUP].flatten().tolist() == [0, 1, 2, 3]
    pairs = env_of(pairs=True)
    td = random_steps(pairs, pairs.reset(), 3)
    with pytest.raises(ValueError, match="groups of 2 rows start together"):
        pairs.reset(td.clone().set("_reset", mask.unsqueeze(-1)), set_state=False)
    whole = pairs.reset(
        td.clone().set("_reset", torch.tensor([True, True, False, False]).unsqueeze(-1)), set_state=False
    )
    assert torch.equal(whole[keys.X_T][0], whole[keys.X_T][1])
    assert torch.equal(whole[keys.X_T][2:], td[keys.X_T][2:])


def test_chains_out_of_step_restart_one_by_one() -> None:
    K = 4
    env = env_of(reward=labelled, num_steps=K, batch_size=[3], conditions=torch.arange(1, 9))
    policy = policy_of(Flow(), CPS(0.7), K=K)
    at = torch.tensor([[0], [1], [3]])
    start = env.reset(TensorDict({keys.X_T: torch.zeros(3, 2), keys.INDEX: at}, [3]), set_state=True)
    td = env.rollout(9, policy, auto_reset=False, tensordict=start, break_when_any_done=False)
    expected = (at + torch.arange(9)) % K
    assert torch.equal(td[keys.INDEX].squeeze(-1), expected)
    assert torch.equal(td["next", keys.TERMINATED].squeeze(-1), expected == K - 1)
    paid, clean = td["next", keys.REWARD].squeeze(-1), expected == K - 1
    torch.testing.assert_close(paid, torch.where(clean, td[keys.COND] + 0.01 * td[keys.ACTION].sum(-1), 0.0))


def test_set_state() -> None:
    env = env_of(reward=labelled, batch_size=[2], conditions=torch.arange(5))
    x = randn(2, 2, dtype=torch.float32)
    td = env.reset(TensorDict({keys.X_T: x, keys.COND: torch.tensor([3, 1])}, [2]), set_state=True)
    assert torch.equal(td[keys.X_T], x) and td[keys.COND].tolist() == [3, 1]
    assert td[keys.T].flatten().tolist() == [1.0, 1.0]
    whole = env.rollout(6, policy_of(Flow(), CPS(0.7), denoiser=random_denoiser(Flow(), 2, num_classes=5)))
    for k in range(6):  # every state of a rollout is a state to start from
        state = whole[:, k].select(*env.observation_spec.keys())
        again = env.reset(state.clone(), set_state=True)
        for key in env.observation_spec.keys():
            assert torch.equal(again[key], state[key])
    other = env.reset(TensorDict({keys.X_T: x}, [2]), set_state=False)
    assert not torch.equal(other[keys.X_T], x)
    cond = torch.tensor([4, 2])
    assert env.reset(TensorDict({keys.COND: cond}, [2]), set_state=True)[keys.COND].tolist() == [4, 2]


@pytest.mark.parametrize(
    ("state", "error", "says"),
    [
        ({keys.INDEX: torch.zeros(4, 1, dtype=torch.int64)}, ValueError, "no 'x_t' for that position"),
        ({keys.X_T: torch.zeros(4, 3)}, ValueError, r"x_t has shape \(4, 3\), but \(4, 2\)"),
        ({keys.X_T: torch.zeros(4, 2, dtype=torch.int64)}, TypeError, "x_t has dtype torch.int64"),
        ({keys.X_T: torch.full((4, 2), torch.nan)}, DataError, "x_t: sample 0"),
        ({keys.X_T: torch.zeros(4, 2), keys.INDEX: torch.full((4, 1), 6)}, ValueError, r"index in \[0, 5\]"),
        ({keys.COND: torch.zeros(4, dtype=torch.int64)}, ValueError, "the environment has no conditions"),
    ],
    ids=lambda p: str(p)[:40],
)
def test_states_that_cannot_be_set(state: dict[str, Tensor], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        env_of().reset(TensorDict(state, [4]), set_state=True)


def test_clean_data_stay_as_they_are() -> None:
    reward = BlackBox(squares)
    env = env_of(reward=reward)
    end = env.rollout(6, policy_of(Flow(), CPS(0.7)))[:, -1]["next"].exclude(keys.REWARD, *FLAGS)
    asked = reward.queries
    after = env.step(end.set(keys.ACTION, torch.ones(4, 2)))["next"]
    assert torch.equal(after[keys.X_T], end[keys.X_T])
    assert after[keys.TERMINATED].all() and not after[keys.REWARD].any() and reward.queries == asked


def test_device_follows_the_states() -> None:
    """Nothing in a step is tied to the CPU: a device without storage finds every tensor that is."""
    d = env_of(sampler=CPS(0.5)).decision_process
    x = torch.zeros(4, 2, device="meta")
    latents = d.start(x)
    assert latents.x.device.type == latents.t.device.type == latents.index.device.type == "meta"
    assert d.latents(latents.index, x).t.device.type == "meta"


def test_transforms_and_collector_of_torchrl() -> None:
    policy = policy_of(Flow(), CPS(0.7), K=5)
    env = TransformedEnv(env_of(num_steps=5), Compose(RewardSum(), StepCounter()))
    rollout = env.rollout(5, policy)
    torch.testing.assert_close(rollout["next", "episode_reward"][:, -1], rollout["next", "reward"].sum(1))
    collector = Collector(
        env_of(num_steps=5),
        policy,
        frames_per_batch=32,
        total_frames=64,
        auto_register_policy_transforms=False,
    )
    batches = list(collector)
    collector.shutdown()
    assert [b.shape for b in batches] == [(4, 8), (4, 8)]
    index = torch.cat(batches, 1)[keys.INDEX].squeeze(-1)
    assert torch.equal(index, (torch.arange(16) % 5).expand(4, 16))


def test_ppo_loss_of_torchrl() -> None:
    """The clipped surrogate is that of DDPO, gradients too; and its updates raise the reward."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = Denoiser(MLP((2,), hidden=32, depth=2), Flow())
    policy = policy_of(Flow(), CPS(0.7), K=4, denoiser=denoiser, reduction="sum")
    policy.generator = generator(1)
    env = env_of(reward=ModeDistance([0.5, 0.0]), num_steps=4, batch_size=[64])
    ppo = ClipPPOLoss(policy, critic_network=None, critic_coeff=None, entropy_bonus=False, clip_epsilon=0.2)
    ddpo = DDPOLoss(policy, clip_range=0.2, advantage_clip=1e9)

    def collect() -> TensorDictBase:
        with torch.no_grad():
            td = env.rollout(4, policy)
        r = td["next", keys.REWARD].sum(1, keepdim=True)
        td[keys.ADVANTAGE] = ((r - r.mean()) / r.std()).expand(64, 4, 1)
        return td[:, :3]  # all but the deterministic step

    td = collect()
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator(4)))
    ours, theirs = ddpo(td)["loss_policy"], ppo(td)["loss_objective"]
    torch.testing.assert_close(ours, theirs)
    expected = torch.autograd.grad(ours, list(policy.parameters()))
    optimiser = torch.optim.Adam(ppo.parameters(), lr=1e-2)
    theirs.backward()
    for parameter, gradient in zip(ppo.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    before = collect_rollout(policy, (2,), batch_size=512, generator=generator(5))
    for _ in range(25):
        td = collect()
        for _ in range(2):
            optimiser.zero_grad()
            ppo(td)["loss_objective"].backward()
            optimiser.step()
    after = collect_rollout(policy, (2,), batch_size=512, generator=generator(6))
    rewards = [env.reward(t["next", keys.X_T][:, -1], None) for t in (before, after)]
    error = math.sqrt(math.fsum(float(r.var()) for r in rewards) / 512)
    assert float(rewards[1].mean() - rewards[0].mean()) > 4 * error


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"num_step": 3}, TypeError, "num_step"),
        ({"process": "flow"}, TypeError, "process is 'flow': give a schedule"),
        ({"reward": 3.0}, TypeError, "reward is 3.0: give a callable"),
        ({"action": "x0"}, ValueError, "action is 'x0': give 'next_latent' or 'x0_hat'"),
        ({"action": "x0_hat"}, ValueError, "'x0_hat' needs a sampler"),
        ({"reward_placement": "sparse"}, ValueError, "reward_placement is 'sparse'"),
        ({"sampler": diffrl.Heun()}, TypeError, r"Heun\(\) has steps without a law"),
        ({"num_steps": 0}, ValueError, "num_steps is 0"),
        ({"max_steps": 0}, ValueError, "max_steps is 0"),
        ({"group_size": 0}, ValueError, "group_size is 0"),
        ({"pairs": True, "group_size": 3}, ValueError, "group_size is 3.*for pairs leave it out"),
        ({"pairs": True, "batch_size": [3]}, ValueError, r"batch_size is \[3\]: groups of 2 rows"),
        ({"group_size": 2, "batch_size": [2, 2]}, ValueError, "groups of 2 rows need one dim"),
        ({"conditions": torch.zeros(0)}, ValueError, "conditions have shape"),
    ],
    ids=lambda p: str(p)[:40],
)
def test_arguments_that_are_refused(change: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        env_of(**change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 7, "pairs": True}, "batch_size is 7: give a multiple of the group size, 2"),
        ({"group_size": 3, "pairs": True}, "for pairs leave it out"),
        ({"cond": torch.arange(3)}, "3 conditions for 8 groups"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        collect_rollout(policy_of(Flow(), CPS(0.7)), (2,), **{"batch_size": 8, **change})
