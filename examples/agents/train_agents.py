"""Agents from outside learn to denoise for a reward: PPO, A2C and SAC of Stable-Baselines3, and TorchRL's PPO.

python examples/agents/train_agents.py                       # all four, three seeds: some minutes on one core
python examples/agents/train_agents.py --agents sac --seeds 1 --out runs/agents

The environment is `DiffusionMDP-v0` as it is by default: 10 steps of rectified flow from noise to a point of the plane,
paid by minus its squared distance to one mode of a ring. No agent knows what diffusion is. The table goes to
OUT/README.md, its numbers to OUT/agents.json.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

import diffrl
from diffrl.envs import DiffusionMDP, sb3_vec_env
from diffrl.extras import require

ID = "diffrl:DiffusionMDP-v0"
CHAINS = 1000  # of an evaluation
COMMAND = "python examples/agents/train_agents.py --agents"
HEAD = ("agent", "form", "settings", "steps", "random", "before", "after", "after, mean actions", "command")


class Agent(Protocol):
    """What is asked of an agent."""

    def act(self, seen: dict[str, Any], noisy: bool) -> np.ndarray:
        """Actions for the observations of many chains, drawn from the policy or its mean."""

    def learn(self, steps: int) -> None:
        """Train for so many steps of the environment."""


class RandomAgent:
    """Actions uniform in the action space."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def act(self, seen: dict[str, Any], noisy: bool) -> np.ndarray:
        """Its actions know nothing of what is seen."""
        return self.rng.uniform(-1, 1, seen["x_t"].shape).astype(np.float32)


class SB3:
    """An agent of Stable-Baselines3, with its own defaults but for the settings."""

    form = "make_vec, sb3_vec_env"

    def __init__(self, seed: int, *, name: str, chains: int, **settings: Any) -> None:
        env = sb3_vec_env(gymnasium.make_vec(ID, num_envs=chains, autoreset_mode="SameStep"))
        make = getattr(require("stable_baselines3", "agents"), name)
        self.agent = make("MultiInputPolicy", env, seed=seed, device="cpu", **settings)

    def act(self, seen: dict[str, Any], noisy: bool) -> np.ndarray:
        """Actions, clipped to the action space."""
        return self.agent.predict(seen, deterministic=not noisy)[0]

    def learn(self, steps: int) -> None:
        """Train."""
        self.agent.learn(steps)


class Network(nn.Module):
    """Numbers of a latent and its time."""

    def __init__(self, out: int, last: nn.Module) -> None:
        super().__init__()
        layers = [nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, out), last]
        self.layers = nn.Sequential(*layers)

    def forward(self, x_t: Tensor, t: Tensor) -> Any:
        """`last` of [*b, out], for x_t [*b, 2] and t [*b, 1]."""
        return self.layers(torch.cat([x_t, t], -1))


class TorchRLPPO:
    """Clipped PPO from TorchRL's parts, on the native environment with the units of the Gymnasium form."""

    form = "DiffusionMDP(action_scale='level')"

    def __init__(self, seed: int, *, chains: int, epochs: int, batch_size: int, learning_rate: float) -> None:
        torch.manual_seed(seed)
        self.epochs, self.batch_size = epochs, batch_size
        reward = diffrl.rewards.ModeDistance(index=0, mixture=diffrl.data.rings().mixture)
        shape: dict[str, Any] = {"event_shape": (2,), "num_steps": 10, "batch_size": [chains]}
        self.env = DiffusionMDP(diffrl.Flow(), reward, action_scale="level", seed=seed, **shape)
        law = TensorDictModule(Network(4, NormalParamExtractor()), ["x_t", "t"], ["loc", "scale"])
        options: dict[str, Any] = {"distribution_class": TanhNormal, "return_log_prob": True}
        self.actor = ProbabilisticActor(law, in_keys=["loc", "scale"], spec=self.env.action_spec, **options)
        critic = ValueOperator(Network(1, nn.Identity()), in_keys=["x_t", "t"])
        self.advantage = GAE(gamma=1.0, lmbda=0.95, value_network=critic)
        self.loss = ClipPPOLoss(self.actor, critic, entropy_bonus=False)
        self.optimiser = torch.optim.Adam(self.loss.parameters(), lr=learning_rate)

    def act(self, seen: dict[str, Any], noisy: bool) -> np.ndarray:
        """Actions within the action space."""
        td = TensorDict({key: torch.as_tensor(seen[key]) for key in ("x_t", "t")}, [len(seen["t"])])
        kind = ExplorationType.RANDOM if noisy else ExplorationType.DETERMINISTIC
        with torch.no_grad(), set_exploration_type(kind):
            return self.actor(td)["action"].numpy()

    def learn(self, steps: int) -> None:
        """Collect whole chains and step the loss on them."""
        for _ in range(max(1, steps // (self.env.batch_size.numel() * self.env.num_transitions))):
            with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
                chains = self.advantage(self.env.rollout(self.env.num_transitions, self.actor)).flatten()
            for _ in range(self.epochs):
                for rows in torch.randperm(len(chains)).split(self.batch_size):
                    losses = self.loss(chains[rows])
                    self.optimiser.zero_grad()
                    (losses["loss_objective"] + losses["loss_critic"]).backward()
                    self.optimiser.step()


AGENTS: dict[str, tuple[type[Any], dict[str, Any], float]] = {  # the last: its share of the steps
    "ppo": (SB3, {"name": "PPO", "chains": 8, "n_steps": 256}, 1.0),
    "a2c": (SB3, {"name": "A2C", "chains": 1}, 1.0),
    "sac": (SB3, {"name": "SAC", "chains": 4, "gradient_steps": 2, "learning_rate": 1e-3}, 0.5),
    "torchrl_ppo": (TorchRLPPO, {"chains": 64, "epochs": 8, "batch_size": 128, "learning_rate": 1e-3}, 1.0),
}


def reward_of(agent: Agent | RandomAgent, noisy: bool = True) -> float:
    """Mean reward of the chains that an agent makes."""
    env = gymnasium.make_vec(ID, num_envs=CHAINS, autoreset_mode="Disabled")
    (seen, _), total, ended = env.reset(seed=12345), np.zeros(CHAINS), False
    while not ended:
        seen, reward, terminated, _, _ = env.step(agent.act(seen, noisy))
        total, ended = total + reward, bool(terminated.all())
    return float(total.mean())


def train(name: str, seed: int, steps: int) -> dict[str, float]:
    """Rewards of a random policy, and of one agent before and after its training."""
    make, settings, share = AGENTS[name]
    agent = make(seed, **settings)
    rewards = {"random": reward_of(RandomAgent(seed)), "before": reward_of(agent)}
    agent.learn(int(share * steps))
    return rewards | {"after": reward_of(agent), "after, mean actions": reward_of(agent, noisy=False)}


def table(found: dict[str, Any]) -> str:
    """The results as a table: means over seeds, and the smallest and largest."""
    lines = [HEAD, ["---"] * len(HEAD)]
    for name, runs in found["agents"].items():
        make, settings, share = AGENTS[name]
        said = ", ".join(f"{key}={value}" for key, value in settings.items() if key != "name")
        columns = [[run[key] for run in runs.values()] for key in HEAD[4:8]]
        numbers = [f"{statistics.mean(c):.2f} [{min(c):.2f}, {max(c):.2f}]" for c in columns]
        who = f"SB3 {settings['name']}" if make is SB3 else "TorchRL PPO"
        lines.append(
            [who, f"`{make.form}`", said, f"{int(share * found['steps']):,}", *numbers, f"`{COMMAND} {name}`"]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(found: dict[str, Any], out: Path) -> None:
    """The numbers and the table, as files."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "agents.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    seeds = max(len(runs) for runs in found["agents"].values())
    text = (
        "# Agents from outside\n\nMean reward of a chain of `DiffusionMDP-v0` with its defaults; in brackets the\n"
        f"lowest and highest over seeds ({seeds}), {found['chains']} chains each. The best possible is 0.\n"
        f"*random* acts uniformly in the action space, *before* is the untrained agent.\n\n{table(found)}\n"
    )
    (out / "README.md").write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print the table and write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--agents", nargs="+", choices=AGENTS, default=list(AGENTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument(
        "--steps", type=int, default=20_000, help="of the environment; SAC takes half of them"
    )
    parser.add_argument("--out", type=Path, default=Path("results/agents"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    runs = {name: {str(s): train(name, s, options.steps) for s in options.seeds} for name in options.agents}
    found = {"environment": ID, "steps": options.steps, "chains": CHAINS, "agents": runs}
    write(found, options.out)
    print(table(found))


if __name__ == "__main__":
    main()
