"""Fine-tuning in one call: check, then tune a policy for a reward by a recipe."""

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffrl.diffusion.pipelines.lora import export_lora
from diffrl.finetuning.finetuner import Finetuner, Iterations
from diffrl.finetuning.methods.registry import METHODS
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.recipe import Recipe
from diffrl.finetuning.run_checks import check_tuner
from diffrl.ranks import FIRST_TIMEOUT, RANK_TIMEOUT
from diffrl.rewards.calls import Reward
from diffrl.training.distributed import joined
from diffrl.training.optim import FinetuningOptim

__all__ = ["finetune"]


def finetune(
    policy: DenoisingPolicy,
    reward: Reward,
    recipe: Recipe | str,
    *,
    event_shape: tuple[int, ...],
    iterations: int = 100,
    lr: float = FinetuningOptim.lr,
    conditions: Tensor | None = None,
    seed: int = 0,
    folder: Path | None = None,
    teacher: torch.nn.Module | None = None,
    twins: Mapping[str, torch.nn.Module] | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
    extend: bool = False,
    accept_changes: bool = False,
    rank_timeout: float = RANK_TIMEOUT,
    first_timeout: float = FIRST_TIMEOUT,
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
        recipe: the method, e.g. `diffrl.finetuning.recipes.ddpo_is()`, or its name for the published pieces, "ddpo_is".
        event_shape: *E of a latent.
        iterations: rollouts in all.
        lr: learning rate of AdamW.
        conditions: what conditions are drawn from, [M, ...].
        seed: of everything random.
        folder: for checkpoints, from which a stopped run continues; at the end the adapters of a pipeline are written
            there too, as diffusers reads them (``lora/``). None keeps nothing.
        teacher: the denoiser that a method of distillation learns from; None: the policy's, as it is now.
        twins: see `diffrl.finetuning.Finetuner`.
        device: where to tune.
        progress: whether to show a bar, and the table of the self-checks before it.
        extend: whether the run in the folder may become longer than it was planned.
        accept_changes: whether it may go on with another policy, reward, recipe, seed or learning rate than before.
        rank_timeout: seconds that a process which torchrun started waits for another. Several share each rollout and
            update, all tune alike, and the first one writes and prints; see docs/many_processes.md.
        first_timeout: seconds that the others wait for what the first one does alone, such as a checkpoint.

    Returns:
        The counts before the first iteration, if it is the first, then one dict an iteration that was run now, in the
        first of several processes; docs/metrics.md defines the figures. There is no evaluation: see
        `diffrl.finetuning.evaluation.Judge`.

    Raises:
        CheckFailed: a self-check failed. What they note without failing, such as a random reward or equal rewards, is
            a warning.
        RunChanged: the folder holds another run, or one of fewer iterations.
        RankLost: another of several processes has ended.
        ValueError, NonFiniteLoss: see `Finetuner`.
    """
    recipe = METHODS[recipe]() if isinstance(recipe, str) else copy.deepcopy(recipe)  # its credit remembers
    rows: list[dict[str, float]] = []
    with joined(str(device), rank_timeout, first_timeout) as ranks:
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
            teacher=teacher,
            twins=twins,
            device=ranks.device(str(device)),
            ranks=ranks,
        )
        resumed = tuner.resume(extend=extend, accept_changes=accept_changes)
        if not resumed:
            report = check_tuner(tuner)
            if progress and ranks.first:
                print(report)
            for note in report.notes if ranks.first else ():
                warnings.warn(note, UserWarning, stacklevel=2)
        tuner.fit(report=rows.append, progress=progress)
        if folder is not None and ranks.first:
            export_lora(policy.denoiser, folder)
    return rows
