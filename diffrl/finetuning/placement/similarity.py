"""Rewards of every step of a chain from few queries: the reward of clean estimates, interpolated by similarity."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from diffrl.errors import InputError
from diffrl.rewards.calls import Reward
from diffrl.rewards.weighted_sum import as_reward

__all__ = ["DenseMode", "anchor_steps", "dense_queries", "predict_dense", "similarity_weighted"]

DenseMode = Literal["all", "anchor", "linear", "last"]


def dense_queries(mode: DenseMode, num_steps: int) -> int:
    """Reward queries of a trajectory of K = num_steps ≥ 1 steps: all K, anchor 3, linear 2, last 1, at most K.

    Raises:
        ValueError: an unknown mode, or K < 1.
    """
    if mode not in get_args(DenseMode):
        raise InputError(f"mode is {mode!r}: give one of {', '.join(get_args(DenseMode))}")
    if num_steps < 1:
        raise InputError(f"{num_steps} steps: a chain has at least one")
    return min(num_steps, {"all": num_steps, "anchor": 3, "linear": 2, "last": 1}[mode])


def anchor_steps(x0_hat: Tensor, *, interior: bool) -> Tensor:
    """The step whose clean estimate is least like the first and the last of its trajectory.

        k = argmin_i [cos(x̂_i, x̂_0) + cos(x̂_i, x̂_{K-1})],    cos(u, v) = ⟨u, v⟩/(|u| |v|)

    Similarities are of flattened estimates, not centred, in float32; of equal sums the earliest step counts.

    Args:
        x0_hat: x̂, clean estimates, shape [B, K, *E].
        interior: choose among 1..K-2 (as in the paper's figure; K ≥ 3); False: among all (as in its code), where
            an end may win, and its query is wasted.

    Returns:
        k, shape [B].
    """
    x = x0_hat.detach().flatten(2).float()
    s_F, s_L = cosine_similarity(x, x[:, :1], dim=2), cosine_similarity(x, x[:, -1:], dim=2)
    s = s_F + s_L
    return s[:, 1:-1].argmin(1) + 1 if interior else s.argmin(1)


def similarity_weighted(x0_hat: Tensor, k: Tensor, R: Tensor, *, guarded: bool) -> Tensor:
    """Rewards of all steps from those of the first, an anchor and the last, weighted by similarity.

        R̂_i = (w_F R_F + w_A R_A + w_L R_L)/(w_F + w_A + w_L),    w_j = cos(x̂_i, x̂_j)
        then R̂_0 = R_F, R̂_{K-1} = R_L, R̂_k = R_A, in this order

    A raw weight may be negative, so that a higher R_A lowers R̂_i, and the sum may vanish, so that R̂_i is
    unbounded. Guarded weights are max(w_j, 0) + 1e-8: R̂_i is a mean of the three rewards, their plain mean
    where no estimate is similar.

    Source: Aligning Few-Step Diffusion Models with Dense Reward Difference Learning (Zhang et al., 2024),
    https://arxiv.org/abs/2411.11727; guard and order of the last line: its code, and ours.

    Args:
        x0_hat: x̂, clean estimates, shape [B, K, *E].
        k: anchor steps, shape [B].
        R: R_F, R_A, R_L, shape [B, 3].
        guarded: guard the weights; False: raw, as published.

    Returns:
        R̂, float32 [B, K].

    Raises:
        ValueError: raw weights that sum to 0, or an estimate that is not finite.
    """
    x = x0_hat.detach().flatten(2).float()
    b = torch.arange(len(x), device=x.device)
    ends = x[:, 0], x[b, k], x[:, -1]
    w = torch.stack([cosine_similarity(x, end[:, None], dim=2) for end in ends], dim=2).double()
    if guarded:
        w = w.clamp(min=0) + 1e-8
    R_hat = (w * R.double()[:, None]).sum(2) / w.sum(2)
    R_F, R_A, R_L = R.double().unbind(1)
    R_hat[:, 0], R_hat[:, -1] = R_F, R_L
    R_hat[b, k] = R_A
    if not bool(R_hat.isfinite().all()):
        row, i = R_hat.isfinite().logical_not().nonzero()[0].tolist()
        raise InputError(
            f"the reward of trajectory {row}, step {i} is {float(R_hat[row, i])}: its estimate is not finite, or its "
            "raw weights sum to 0 (give guarded=True)"
        )
    return R_hat.float()


def _repeated(cond: Any, times: int) -> Any:
    if cond is None:
        return None
    if isinstance(cond, Tensor):
        return cond.repeat_interleave(times, dim=0)
    return [c for c in cond for _ in range(times)]


@torch.no_grad()
def predict_dense(
    x0_hat: Tensor,
    reward: Reward,
    cond: Tensor | Sequence[Any] | None = None,
    *,
    mode: DenseMode = "anchor",
    interior: bool = True,
    guarded: bool = True,
) -> Tensor:
    """Rewards of the clean estimates of every step, asked for or predicted from few.

    Each trajectory costs `dense_queries(mode, K)` queries, all made in one call of the reward:

    - "all": R̂_i = R(x̂_i);
    - "anchor": R at the first, the last and the `anchor_steps`, the others `similarity_weighted`. Up to K = 3
      (with interior=False up to 2) every R̂_i is R(x̂_i);
    - "linear": R̂_i = R_F + i/(K - 1) (R_L - R_F);
    - "last": R̂_i = R_L.

    A `BlackBox` with a cache scores equal estimates once, as the first ones of two trajectories from the same
    noise. Where estimates are latents, let the reward decode them: similarities are of what is given here.

    Source: "anchor": Aligning Few-Step Diffusion Models with Dense Reward Difference Learning (Zhang et al.,
    2024), https://arxiv.org/abs/2411.11727.

    Args:
        x0_hat: x̂, clean estimates from noise to data, shape [B, K, *E].
        reward: R; a callable that is no `BlackBox` is checked as one, but neither cached nor counted.
        cond: condition of each trajectory: tensor [B, ...], list of B, or None.
        mode: what to query.
        interior: where to look for the anchor (`anchor_steps`).
        guarded: guard the weights (`similarity_weighted`).

    Returns:
        R̂, float32 [B, K].

    Raises:
        ValueError: shapes that do not fit, an unknown mode, raw weights that sum to 0.
        RewardError: the reward failed.
    """
    if x0_hat.ndim < 3:
        raise InputError(f"x0_hat has shape {tuple(x0_hat.shape)}: give clean estimates [B, K, *E]")
    B, K = x0_hat.shape[:2]
    queries = dense_queries(mode, K)
    if cond is not None and len(cond) != B:
        raise InputError(f"{len(cond)} conditions for {B} trajectories: give one each, not one a step")
    first, last = torch.zeros(B, 1, dtype=torch.long), torch.full((B, 1), K - 1)
    k = anchor_steps(x0_hat, interior=interior) if mode == "anchor" and K >= 3 else None
    if k is not None:
        steps = torch.cat([first, k.cpu()[:, None], last], dim=1)
    elif queries == K:
        steps = torch.arange(K).expand(B, K)
    else:
        steps = last if mode == "last" else torch.cat([first, last], dim=1)
    x = x0_hat.detach()[torch.arange(B)[:, None], steps].flatten(0, 1)
    box = as_reward(reward, cache=False)
    R = box(x, _repeated(cond, queries)).view(B, queries)
    if k is not None:
        return similarity_weighted(x0_hat, k, R, guarded=guarded)
    if queries == K:
        return R
    if mode == "last":
        return R.expand(B, K).clone()
    i = torch.arange(K, device=R.device) / (K - 1)
    return torch.lerp(R[:, :1], R[:, 1:], i)
