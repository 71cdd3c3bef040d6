"""Fine-tuning in one call: check, then tune a policy for a reward by a recipe."""

from pathlib import Path

import torch
from torch import Tensor

from diffrl.finetuning.finetuner import Finetuner, Iterations
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.recipe import Recipe
from diffrl.finetuning.run_checks import check_tuner
from diffrl.rewards.calls import Reward
from diffrl.training.optim import FinetuningOptim

__all__ = ["finetune"]


def finetune(
    policy: DenoisingPolicy,
    reward: Reward,
    recipe: Recipe,
    *,
    event_shape: tuple[int, ...],
    iterations: int = 100,
    lr: float = FinetuningOptim.lr,
    conditions: Tensor | None = None,
    seed: int = 0,
    folder: Path | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> list[dict[str, float]]:
    """Check, then tune a policy for a reward, in place; returns the figures of every iteration.

    >>> import diffrl, torch
    >>> from diffrl import networks, recipes
    >>> denoiser = diffrl.Denoiser(networks.MLP((2,)), diffrl.EDM())
    >>> policy = diffrl.DenoisingPolicy(denoiser, diffrl.Ancestral(), num_steps=6, reduction="mean")
    >>> recipe = recipes.ddpo_is(rollouts=recipes.Rollouts(trajectories=32))
    >>> rows = diffrl.finetune(policy, lambda x0, cond: x0[:, 0], recipe, event_shape=(2,), iterations=2,
    ...                        progress=False)
    >>> rows[-1]["trajectories"], rows[-1]["queries"], rows[-1]["updates"]
    (64, 64, 4)

    Args:
        policy: what is tuned.
        reward: R.
        recipe: the method, e.g. `diffrl.finetuning.recipes.ddpo_is()`.
        event_shape: *E of a latent.
        iterations: rollouts in all.
        lr: learning rate of AdamW.
        conditions: what conditions are drawn from, [M, ...].
        seed: of everything random.
        folder: for checkpoints, from which a stopped run continues; None keeps none.
        device: where to tune.
        progress: whether to show a bar.

    Returns:
        The counts before the first iteration, if it is the first, then one dict an iteration that was run now;
        docs/metrics.md defines the figures. There is no evaluation: see `diffrl.finetuning.evaluation.Judge`.

    Raises:
        CheckFailed: a self-check failed.
        ValueError, NonFiniteLoss: see `Finetuner`.
    """
    tuner = Finetuner(
        policy,
        reward,
        recipe,
        event_shape=event_shape,
        conditions=conditions,
        seed=seed,
        folder=folder,
        length=Iterations(iterations, eval_every=iterations),
        optim=FinetuningOptim(lr=lr),
        device=device,
    )
    check_tuner(tuner)
    tuner.resume()
    rows: list[dict[str, float]] = []
    tuner.fit(report=rows.append, progress=progress)
    return rows
