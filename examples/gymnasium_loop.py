"""DiffusionMRP-v0 with the exact denoiser as its value function: python examples/gymnasium_loop.py [PNG]."""

import sys
from typing import Any

import gymnasium
import numpy as np
import torch

import diffrl
from diffrl.extras import require


def main(out: str = "gymnasium_loop.png", *, process: str = "flow", num_steps: int = 16) -> None:
    """Step one chain, print and plot its rewards and values; compare values with returns over many."""
    # Setup: Gaussians on a ring; their law is known, and so is the value V(x_t) = A E[x0 | x_t] + κ x_t
    data: Any = diffrl.data.rings()
    make: Any = {"id": "diffrl:DiffusionMRP-v0", "data": data, "process": process, "num_steps": num_steps}
    env: Any = gymnasium.make(**make)
    many = gymnasium.make_vec(num_envs=4000, **make)
    denoiser = diffrl.MixtureDenoiser(env.unwrapped.reward_process.chain.process, **vars(data.mixture))

    def value(seen: dict[str, Any], info: dict[str, Any]) -> Any:
        x_t, t = torch.tensor(seen["x_t"]).view(-1, 2), torch.tensor(seen["t"]).view(-1)
        A, kappa = (np.reshape(info[key], (-1, 1)) for key in ("A", "kappa"))
        return A * denoiser(x_t, t).numpy() + kappa * x_t.numpy()

    # Step one chain; 0, to wait, is the only action
    seen, info = env.reset(seed=0)
    x, V, terminated = [seen["x_t"]], [*value(seen, info)], False
    r: list[Any] = []
    while not terminated:
        seen, reward, terminated, _, info = env.step(0)
        x, V, r = [*x, seen["x_t"]], [*V, *value(seen, info)], [*r, reward]
    G = np.cumsum(r[::-1], 0)[::-1]  # the return from each state on
    table = ("".join(f"{number:<10.3f}" for number in row) for row in np.hstack([r, G, V[:-1]]))
    print("reward              return from here    V(x_k)", *table, sep="\n")
    print(f"sum of rewards + V(end) = {(G[0] + V[-1]).round(3)}, V(start) = {V[0].round(3) + 0.0}")

    # Step many: by the luck of its datum a chain earns more or less than V(start), on average exactly that
    luck = sum([-value(*many.reset(seed=0)), *(many.step(np.zeros(4000, int))[1] for _ in r)])
    print(f"difference over 4000 chains: {luck.mean(0).round(4)} ± {(luck.std(0) / 4000**0.5).round(4)}")

    # Plot
    plt = require("matplotlib.pyplot", "plot")
    figure, (plane, values, rewards) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    plane.scatter(*data.test[:1000].T, s=3, c="0.8")
    plane.plot(*np.transpose(x), c="0.5", lw=0.6)
    plane.scatter(*np.transpose(x), c=range(len(x)), cmap="viridis_r", s=30, zorder=3)
    plane.set(title="states x_k, from noise (yellow) to data (violet)", aspect="equal", adjustable="datalim")
    for d in (0, 1):
        values.plot(np.array(V)[:-1, d], "o", c=f"C{d}", label=f"V(x_k), coordinate {d + 1}")
        values.plot(G[:, d], "--", c=f"C{d}", label="return from k on")
        rewards.bar(np.arange(len(r)) + 0.4 * d - 0.2, np.array(r)[:, d], 0.4, color=f"C{d}")
    values.set(title="values, and the returns that they expect", xlabel="k")
    rewards.set(title="rewards; the last one pays what is left", xlabel="k")
    values.legend(fontsize=8)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    main(*sys.argv[1:2])
