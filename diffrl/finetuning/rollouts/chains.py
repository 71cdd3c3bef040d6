"""Rollouts of a denoising policy without an environment's overhead: what fine-tuning collects."""

from collections.abc import Sequence

import torch
from tensordict import TensorDict
from torch import Generator, Tensor

from diffrl import keys
from diffrl.diffusion.samplers.base import Noise
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.rewards.black_box import Reward, as_reward

__all__ = ["collect_rollout"]


@torch.no_grad()
def collect_rollout(
    policy: DenoisingPolicy,
    event_shape: Sequence[int],
    *,
    batch_size: int,
    group_size: int = 1,
    pairs: bool = False,
    cond: Tensor | None = None,
    reward: Reward | None = None,
    generator: Generator | Sequence[Generator] | None = None,
    device: torch.device | str = "cpu",
    at_once: int | None = None,
) -> TensorDict:
    """Chains that a policy draws from noise to data: `DiffusionMDP.rollout(K, policy)`, the same TensorDict.

    Latents are held once: `x_t`, `action` and the next `x_t` are views of one tensor, so write into none of them.
    Put the policy in eval mode first: dropout would make its log-probabilities unrepeatable.

    >>> import diffrl, torch
    >>> exact = diffrl.GaussianDenoiser(diffrl.Flow(), torch.zeros(2), torch.eye(2))
    >>> policy = diffrl.DenoisingPolicy(exact, diffrl.Ancestral(), num_steps=8, reduction="mean")
    >>> collect_rollout(policy, (2,), batch_size=16, pairs=True)["action"].shape
    torch.Size([16, 8, 2])

    Args:
        policy: what acts, on its own grid of K steps.
        event_shape: *E of a latent.
        batch_size: B, the chains.
        group_size: G ≥ 1, rows of one group, which share their condition; B is a multiple of it.
        pairs: groups are pairs: rows 2p and 2p+1 share their first latent too.
        cond: condition of each group, shape [B/G, ...], or None.
        reward: R, asked once for all clean samples, which pays the last step; None leaves rewards out.
        generator: of the first noise and then of each step's; a sequence has one for each row, which does not go
            with pairs; None: torch's global one.
        device: where chains live.
        at_once: most chains drawn side by side, in whole groups; the others follow, with the numbers that come next.

    Returns:
        TensorDict [B, K] with the keys of `DiffusionMDP`'s rollouts: x_t, t, index, group, cond, action,
        action_log_prob, x0_hat, trainable, the flags, and under "next" what was reached.

    Raises:
        ValueError: sizes that do not fit.
    """
    G = 2 if pairs else group_size
    if group_size < 1 or (pairs and group_size not in (1, 2)):
        raise ValueError(f"group_size is {group_size}: give at least 1, and for pairs leave it out")
    if batch_size < 1 or batch_size % G:
        raise ValueError(f"batch_size is {batch_size}: give a multiple of the group size, {G}")
    if cond is not None and len(cond) != batch_size // G:
        raise ValueError(f"{len(cond)} conditions for {batch_size // G} groups: give one each")
    if at_once is not None and max(at_once, G) < batch_size:
        parts, size = [], max(at_once // G, 1) * G
        for first in range(0, batch_size, size):
            n = min(size, batch_size - first)
            part = collect_rollout(
                policy,
                event_shape,
                batch_size=n,
                group_size=group_size,
                pairs=pairs,
                cond=None if cond is None else cond[first // G : (first + n) // G],
                reward=reward,
                generator=generator[first : first + n] if isinstance(generator, Sequence) else generator,
                device=device,
            )
            for steps in (part, part[keys.NEXT]):
                steps.set(keys.GROUP, steps.get(keys.GROUP) + first // G)
            parts.append(part)
        return torch.cat(parts)
    B, K, noise = batch_size, policy.num_steps, Noise(generator)
    c = None if cond is None else cond.to(device).repeat_interleave(G, 0)
    x = torch.empty(K + 1, B, *event_shape, device=device).transpose(
        0, 1
    )  # the latents of a step lie together
    eps = noise(torch.empty(B // 2 if pairs else B, *event_shape, device=device))
    x[:, 0] = policy.process.sigma(policy.grid[0]) * (eps.repeat_interleave(2, 0) if pairs else eps)
    acts = []
    for i in range(K):
        action, law = policy.act(x[:, i], torch.full((B,), i), c, noise=noise)
        x[:, i + 1] = action
        acts.append((policy.log_prob(law, action), law.x0_hat, law.std > 0))
    log_prob, x0_hat, trainable = (torch.stack(column, 1) for column in zip(*acts, strict=True))
    t, index = policy.grid.to(x), torch.arange(K + 1, device=device)
    over = torch.zeros(B, K + 1, 1, dtype=torch.bool, device=device)
    over[:, -1] = True
    never = torch.zeros(B, K, 1, dtype=torch.bool, device=device)
    same = {keys.GROUP: torch.arange(B, device=device).div(G, rounding_mode="floor")}
    same |= {} if c is None else {keys.COND: c}
    state = {key: value[:, None].expand(B, K, *value.shape[1:]) for key, value in same.items()}
    state[keys.GROUP] = state[keys.GROUP].unsqueeze(-1)

    def at(steps: slice) -> dict[str, Tensor]:
        ended = over[:, steps]
        return {
            keys.X_T: x[:, steps],
            keys.T: t[steps].expand(B, K).unsqueeze(-1),
            keys.INDEX: index[steps].expand(B, K).unsqueeze(-1),
            **state,
            keys.TERMINATED: ended,
            keys.TRUNCATED: never,
            keys.DONE: ended,
        }

    reached = at(slice(1, None))
    if reward is not None:
        paid = torch.zeros(B, K, 1, device=device)
        paid[:, -1, 0] = as_reward(reward)(x[:, -1], c).to(paid)
        reached[keys.REWARD] = paid
    chosen = {
        keys.ACTION: x[:, 1:],
        keys.ACTION_LOG_PROB: log_prob,
        keys.X0_HAT: x0_hat,
        keys.TRAINABLE: trainable.unsqueeze(-1),
    }
    root = {**at(slice(0, K)), **chosen, keys.NEXT: TensorDict(reached, [B, K], device=device)}
    return TensorDict(root, [B, K], device=device, names=[None, "time"])
