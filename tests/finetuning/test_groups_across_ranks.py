"""A group whose members lie on several processes is compared as on one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import nn

from diffrl import keys
from diffrl.finetuning.methods.group_preference import GroupPreferenceLoss, group_sums
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.rollouts.chains import collect_rollout
from diffrl.finetuning.updates.preferences import PREFERENCE, PreferenceUpdates
from diffrl.training.distributed import joined
from tests.kit.four_modes import generator_policy
from tests.kit.pairs import in_pair

APART = (
    5.7e-3  # between the mean distances of the two processes, so that only their common mean decides alike
)
ROWS = 8  # two groups of four; each process has two members of either


def moved(seed: int) -> DenoisingPolicy:
    policy = generator_policy(seed=seed)
    nn.init.normal_(policy.denoiser.network[-1].weight, std=0.1)
    return policy


def minibatch() -> TensorDict:
    policy, g = generator_policy(), torch.Generator().manual_seed(0)
    rollout = collect_rollout(policy, (2,), batch_size=ROWS, group_size=4, generator=g)
    adv = torch.randn(ROWS, generator=g)
    rollout.set(keys.ADVANTAGE, adv[:, None, None].expand(*rollout.shape, 1))
    given = {"policy": policy, "group_size": 4, "generator": g, "entries": ()}
    return next(iter(PreferenceUpdates(draws=2)(rollout, **given)))


def of_rows(rows: Any, ranks: dist.ProcessGroup | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Figure z [n, m] and the gradient of some rows of the minibatch."""
    policy, other, part = moved(1), generator_policy(), minibatch()[rows]
    loss = GroupPreferenceLoss(
        policy, old=other, reference=other, teacher=other, beta=9.0, ranks=ranks, runaway=APART
    )
    loss.prepare(part, 3)
    found = torch.autograd.grad(loss(part)["loss_preference"], policy.denoiser.network.parameters())
    assert float(part.get(PREFERENCE).get("apart").std()) == 0  # one guard for the whole update
    return part.get(PREFERENCE).get("z")[..., 0], torch.cat([g.flatten() for g in found])


def member(rank: int, folder: Path, meet: Callable[[], None]) -> None:
    meet()
    with joined("cpu", 100):
        z, grad = of_rows(slice(rank, None, 2), dist.group.WORLD)
        dist.all_reduce(grad)
    torch.save({"z": z, "grad": grad / 2}, folder / f"{rank}.pt")


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_z_and_gradient_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    z, grad = of_rows(slice(None), None)
    assert in_pair(member, tmp_path, meetings=1) == [0, 0]
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["z"], z[rank::2], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found["grad"], grad, rtol=1e-3, atol=1e-6)
    alone, _ = of_rows(slice(0, None, 2), None)
    assert not torch.allclose(alone, z[0::2], rtol=0.05)  # half of a group has another z


def test_sums_of_one_process_are_those_of_a_plain_loop() -> None:
    values, group = torch.arange(12.0).view(6, 2), torch.tensor([5, 2, 5, 2, 9, 9])
    expected = torch.stack([values[group == g].mean(0) for g in group])
    torch.testing.assert_close(group_sums(values, group), expected)
