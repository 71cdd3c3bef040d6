"""The self-checks of a fine-tuning run, before its first update."""

import copy

import torch

from diffrl.finetuning.check_report import CheckFailed, Report
from diffrl.finetuning.checks import check
from diffrl.finetuning.finetuner import Finetuner
from diffrl.training.loop import step_generator
from diffrl.training.optim import NonFiniteLoss

__all__ = ["check_tuner"]


def check_tuner(tuner: Finetuner) -> Report:
    """`diffrl.check` of a run that has not begun, on a rollout of its own in the run's batch shapes and precision.

    The reward is asked about that rollout too, without being counted. The run is afterwards as it was before.

    Args:
        tuner: the run.

    Raises:
        CheckFailed: a check failed, with the likely cause.
    """
    recipe, u, plan = tuner.recipe, tuner.recipe.updates, tuner.recipe.rollouts
    nfe, remembered, credit = tuner.policy.nfe, tuner.reward.state_dict(), copy.deepcopy(recipe.credit)
    size = min(plan.at_once or plan.trajectories, plan.trajectories)
    size -= size % plan.rows_of_a_group
    # recorded samples may be judged by their record alone
    asked = plan.fingerprint is None and recipe.placement.queries(tuner.policy.num_steps) > 0
    try:
        with torch.random.fork_rng(devices=[]):  # rewards may draw random numbers
            generator = step_generator(tuner.seed, 2**31, tuner.device)
            try:
                rollout = tuner.collect(generator, trajectories=size, credit=credit)
            except NonFiniteLoss as error:
                raise CheckFailed(
                    f"before the first update, {error}: the denoiser overflows, a step divides by a std of 0, or "
                    "policy.std_floor is far too large"
                ) from error
        ranks = tuner.ranks
        mine = -(-plan.trajectories // ranks.size // recipe.rows_together) * recipe.rows_together
        report = ranks.from_first(
            lambda: check(
                tuner.policy,
                tuner.loss if u.unit == "steps" else None,
                rollout,
                batch_rows=u.largest_part(mine, tuner.num_trainable, group_size=recipe.rows_together),
                rollout_rows=-(-size // ranks.size),
                reward=tuner.reward if asked else None,
                reference=tuner.base,
                autocast=tuner.autocast,
                centred=credit.centred_over(one_condition=tuner.conditions is None),
            ),
            "the self-checks",
        )
    finally:
        tuner.policy.nfe = nfe
        tuner.reward.load_state_dict(remembered)
    if recipe.placement.queries(tuner.policy.num_steps) == 0:  # nobody pays, so there is nothing to credit
        report = Report(tuple(c for c in report.checks if not c.name.startswith("advantages")))
    report.raise_if_failed()
    return report
