"""Chains that a policy draws side by side, from noise to data or from a state on the way."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from tensordict import TensorDict
from torch import Generator, Tensor

from diffrl import keys
from diffrl.diffusion.samplers.base import Noise
from diffrl.errors import InputError
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.rollouts.base import RolloutPlan
from diffrl.finetuning.rollouts.registry import ROLLOUTS
from diffrl.ranges import require_int
from diffrl.training.optim import NonFiniteLoss

__all__ = ["Rollouts", "Start", "collect_rollout", "require_sound"]

FAR = 1e9  # no data come near: a sample of this size is of a policy that has diverged


@ROLLOUTS.register("chains")
@dataclass(frozen=True)
class Rollouts(RolloutPlan):
    """Whole chains from fresh noise, alone, in groups that share a condition, or in pairs that share the noise too.

    Args:
        trajectories: B; the published numbers are 256 (of 4 and of 8 GPUs together).
        group_size: G, trajectories that share a condition.
        pairs: groups are pairs that share their first latent too; group_size is then left at 1.
        at_once: most trajectories drawn side by side; None: all.
        overlap: ask the reward about each part of `at_once` while the next one is drawn. The figures are the same for a
            reward and a placement that judge each trajectory by itself; it pays where the reward waits for something
            else than this machine's cores, such as a server, another device or `reward_calls` with processes.

    Raises:
        ValueError: sizes that do not fit.
    """

    shared: ClassVar[bool] = True
    trajectories: int = 256
    group_size: int = 1
    pairs: bool = False
    at_once: int | None = None
    overlap: bool = False

    def __post_init__(self) -> None:
        require_int("rollouts.group_size", self.group_size)
        require_int("rollouts.trajectories", self.trajectories)
        if self.pairs and self.group_size not in (1, 2):
            raise InputError(f"rollouts.group_size is {self.group_size}: for pairs leave it at 1")
        if self.trajectories % self.rows_of_a_group:
            raise InputError(
                f"rollouts.trajectories is {self.trajectories}: give a multiple of the group size, "
                f"{self.rows_of_a_group}"
            )
        if self.at_once is not None and require_int("rollouts.at_once", self.at_once) < self.rows_of_a_group:
            raise InputError(
                f"rollouts.at_once is {self.at_once}: a group of {self.rows_of_a_group} is drawn together; give at "
                "least that, or null for all"
            )
        if self.overlap and self.at_once is None:
            raise InputError(
                "rollouts.overlap asks about a part while the next is drawn: set rollouts.at_once"
            )

    @property
    def rows_of_a_group(self) -> int:
        """2 for pairs, else G."""
        return 2 if self.pairs else self.group_size

    @property
    def rows_together(self) -> int:
        """2 for pairs, else 1."""
        return 2 if self.pairs else 1

    def collect(
        self,
        policy: DenoisingPolicy,
        event_shape: tuple[int, ...],
        *,
        trajectories: int,
        cond: Tensor | None,
        generator: Generator,
        device: torch.device,
        each: Callable[[TensorDict], object] = lambda part: None,
    ) -> TensorDict:
        """`collect_rollout` of whole chains."""
        return collect_rollout(
            policy,
            event_shape,
            batch_size=trajectories,
            group_size=self.group_size,
            pairs=self.pairs,
            cond=cond,
            generator=generator,
            device=device,
            at_once=self.at_once,
            each=each,
        )


class Start(NamedTuple):
    """Where chains begin that do not begin at pure noise."""

    x_t: Tensor
    """States, shape [B, *E]."""
    step: int
    """The step of the policy that they take first, 0..K-1."""


def collect_rollout(
    policy: DenoisingPolicy,
    event_shape: Sequence[int],
    *,
    batch_size: int,
    group_size: int = 1,
    pairs: bool = False,
    cond: Tensor | None = None,
    start: Start | None = None,
    stochastic: Tensor | None = None,
    keep_gradient: bool = False,
    generator: Generator | Sequence[Generator] | None = None,
    device: torch.device | str = "cpu",
    at_once: int | None = None,
    each: Callable[[TensorDict], object] = lambda part: None,
) -> TensorDict:
    """Chains that a policy draws: `DiffusionMDP.rollout(K, policy)`, the same TensorDict without stepping.

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
        start: where the chains begin, instead of at pure noise; they have K - start.step steps.
        stochastic: which steps of which chain keep their noise, bool [B, steps]; the others are deterministic, and
            not trained. It comes after the policy's floor on std. None: all steps that have noise.
        keep_gradient: keep what backpropagation through the chain needs; else nothing is kept.
        generator: of the first noise and then of each step's; a sequence has one for each row, which does not go
            with pairs; None: torch's global one.
        device: where chains live.
        at_once: most chains drawn side by side, in whole groups; the others follow, with the numbers that come next.
        each: called with every part [b, steps] of `at_once` chains as soon as it is drawn, in order.

    Returns:
        TensorDict [B, steps] with the keys of `DiffusionMDP`'s rollouts: x_t, t, index, group, cond, action,
        action_log_prob, x0_hat, trainable, the flags, and under "next" what was reached.

    Raises:
        ValueError: sizes that do not fit.
    """
    G = _group_size(batch_size, group_size, pairs, cond)
    _check(policy, batch_size, event_shape, start, stochastic)
    c = None if cond is None else cond.to(device).repeat_interleave(G, 0)
    size = batch_size if at_once is None else max(at_once // G, 1) * G
    parts = []
    with nullcontext() if keep_gradient else torch.no_grad():
        for first in range(0, batch_size, size):
            rows = slice(first, min(first + size, batch_size))
            noise = Noise(generator[rows] if isinstance(generator, Sequence) else generator)
            n = rows.stop - rows.start
            begin = (
                _first_latents(policy, (n, *event_shape), pairs, noise, device)
                if start is None
                else start.x_t[rows]
            )
            walk = _walk(
                policy,
                begin,
                0 if start is None else start.step,
                None if c is None else c[rows],
                noise,
                None if stochastic is None else stochastic[rows].to(device),
            )
            group = torch.arange(first, first + n, device=device).div(G, rounding_mode="floor")
            parts.append(_rollout(policy, walk, group, None if c is None else c[rows]))
            each(parts[-1])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def require_sound(rollout: TensorDict) -> None:
    """Refuse a rollout [B, K] of a policy that has diverged, before a reward is asked about it.

    Raises:
        NonFiniteLoss: a state is not finite, or a sample is larger than any data.
    """
    x = rollout.get((keys.NEXT, keys.X_T)).detach()
    if not bool(x.isfinite().all()):
        raise NonFiniteLoss("the policy's samples hold NaN or infinity")
    if (size := float(x[:, -1].abs().max())) > FAR:
        raise NonFiniteLoss(f"the policy's samples are as large as {size:.0e}")


def _group_size(batch_size: int, group_size: int, pairs: bool, cond: Tensor | None) -> int:
    require_int("group_size", group_size)
    require_int("batch_size", batch_size)
    G = 2 if pairs else group_size
    if pairs and group_size not in (1, 2):
        raise InputError(f"group_size is {group_size}: for pairs leave it out")
    if batch_size % G:
        raise InputError(f"batch_size is {batch_size}: give a multiple of the group size, {G}")
    if cond is not None and len(cond) != batch_size // G:
        raise InputError(f"{len(cond)} conditions for {batch_size // G} groups: give one each")
    return G


def _check(
    policy: DenoisingPolicy,
    batch_size: int,
    event_shape: Sequence[int],
    start: Start | None,
    stochastic: Tensor | None,
) -> None:
    steps = policy.num_steps
    if start is not None:
        if start.x_t.shape != (batch_size, *event_shape):
            raise InputError(
                f"start.x_t has shape {list(start.x_t.shape)}: give {[batch_size, *event_shape]}"
            )
        if not 0 <= start.step < steps:
            raise InputError(f"start.step is {start.step}: the policy's steps are 0..{steps - 1}")
        steps -= start.step
    if stochastic is not None and stochastic.shape != (batch_size, steps):
        raise InputError(f"stochastic has shape {list(stochastic.shape)}: give {[batch_size, steps]}")


def _first_latents(
    policy: DenoisingPolicy, shape: Sequence[int], pairs: bool, noise: Noise, device: torch.device | str
) -> Tensor:
    """σ ε of the noisiest level, ε shared in pairs."""
    eps = noise(torch.empty(shape[0] // 2 if pairs else shape[0], *shape[1:], device=device))
    return policy.process.sigma(policy.grid[0]) * (eps.repeat_interleave(2, 0) if pairs else eps)


class _Walk(NamedTuple):
    """K steps of B chains."""

    first: int
    """The step taken first."""
    x: Tensor
    """States, [B, K+1, *E]; those of a step lie together in memory."""
    log_prob: Tensor
    x0_hat: Tensor
    trainable: Tensor


def _walk(
    policy: DenoisingPolicy,
    x: Tensor,
    index: int,
    cond: Tensor | None,
    noise: Noise,
    stochastic: Tensor | None,
) -> _Walk:
    states, acts = [x], []
    for k, i in enumerate(range(index, policy.num_steps)):
        keep = None if stochastic is None else stochastic[:, k]
        at = torch.full((len(x),), i)
        action, law, x0_hat = policy.act(states[-1], at, cond, noise=noise, stochastic=keep)
        states.append(action)
        acts.append((policy.log_prob(law, action), x0_hat, law.stochastic))
    log_prob, x0_hat, trainable = (torch.stack(column, 1) for column in zip(*acts, strict=True))
    return _Walk(index, torch.stack(states).transpose(0, 1), log_prob, x0_hat, trainable)


def _rollout(policy: DenoisingPolicy, walk: _Walk, group: Tensor, cond: Tensor | None) -> TensorDict:
    """The TensorDict of a walk."""
    x, device = walk.x, walk.x.device
    B, K = len(x), x.shape[1] - 1
    t, index = policy.grid[walk.first :].to(x), torch.arange(walk.first, walk.first + K + 1, device=device)
    over = torch.zeros(B, K + 1, 1, dtype=torch.bool, device=device)
    over[:, -1] = True
    never = torch.zeros(B, K, 1, dtype=torch.bool, device=device)
    state = {keys.GROUP: group[:, None, None].expand(B, K, 1)}
    if cond is not None:
        state[keys.COND] = cond[:, None].expand(B, K, *cond.shape[1:])

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

    chosen = {
        keys.ACTION: x[:, 1:],
        keys.ACTION_LOG_PROB: walk.log_prob,
        keys.X0_HAT: walk.x0_hat,
        keys.TRAINABLE: walk.trainable.unsqueeze(-1),
    }
    reached = TensorDict(at(slice(1, None)), [B, K], device=device)
    root = {**at(slice(0, K)), **chosen, keys.NEXT: reached}
    return TensorDict(root, [B, K], device=device, names=[None, "time"])
