"""One optimiser step of one network on one minibatch, part by part."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from tensordict import TensorDict
from torch import Tensor

from diffrl.finetuning.shares import Shares
from diffrl.finetuning.surrogate import Role
from diffrl.finetuning.updates.base import UpdatePlan, micro_batches
from diffrl.training.optim import NonFiniteLoss, Optimiser

__all__ = ["role_step"]

TELLING = ("ratio", "approx_kl")  # figures that only a policy far from the one that acted makes infinite


def role_step(
    role: Role,
    optimiser: Optimiser,
    minibatch: TensorDict,
    *,
    plan: UpdatePlan,
    shares: Shares,
    precision: Callable[[], AbstractContextManager[Any]],
) -> dict[str, float]:
    """Descend a role's loss of a minibatch [n, k], its gradient summed over parts and processes; the figures of it.

    Args:
        role: the network and its loss.
        optimiser: of the network.
        minibatch: of an iteration.
        plan: says how large a part may be, and how much it weighs.
        shares: of the processes, each of which takes some rows; rows that belong together are not parted.
        precision: context of the network's arithmetic.

    Raises:
        NonFiniteLoss: see `Optimiser.step`; or a figure that tells of a policy far from the one that acted.
    """
    total: dict[str, Tensor] = {}
    whole = plan.weight(minibatch)
    with precision():
        role.prepare(minibatch, plan.micro_batch)
    for part in micro_batches(shares.part(minibatch), plan.micro_batch, group_size=shares.rows_together):
        share = plan.weight(part) / whole
        if share == 0:  # deterministic steps only
            continue
        with precision():
            out = role.loss(part)
        loss = sum(value for key, value in out.items() if key.startswith("loss_"))
        (share * loss).backward()
        for key, value in out.items():
            total[key] = total.get(key, 0) + share * value.detach()
    figures = shares.summed({key: float(value) for key, value in total.items()}, role.loss.out_keys)
    shares.add_up_gradients(optimiser.parameters)
    for key in (k for k in TELLING if not math.isfinite(figures.get(k, 0.0))):
        optimiser.algorithm.zero_grad()
        raise NonFiniteLoss(f"{key} is {figures[key]:g}")
    stepped = optimiser.step(sum(value for key, value in figures.items() if key.startswith("loss_")))
    return figures | {"grad_norm": stepped["grad_norm"]}
