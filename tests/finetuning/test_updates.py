"""Minibatches of a rollout: every step once a pass, pairs together, parts of a minibatch."""

from typing import Any

import pytest
import torch
from tensordict import TensorDict

from diffrl import keys
from diffrl.finetuning.updates.base import micro_batches
from diffrl.finetuning.updates.steps import Updates


def numbered(B: int, K: int, deterministic: tuple[int, ...] = ()) -> TensorDict:
    """Steps whose x_t says where they stand: (row, step)."""
    row, step = torch.meshgrid(torch.arange(B), torch.arange(K), indexing="ij")
    trainable = torch.ones(B, K, 1, dtype=torch.bool)
    trainable[:, list(deterministic)] = False
    return TensorDict({keys.X_T: torch.stack([row, step], -1), keys.TRAINABLE: trainable}, [B, K])


def seen(updates: Updates, steps: TensorDict, group_size: int = 1, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    policy: Any = None  # steps are what they are, whatever drew them
    options = {"policy": policy, "group_size": group_size, "generator": generator, "entries": [keys.X_T]}
    return [m[keys.X_T] for m in updates(steps, **options)]


@pytest.mark.parametrize("order", ["trajectory", "step"])
@pytest.mark.parametrize(("B", "group_size"), [(12, 1), (12, 2), (2, 2), (1, 1)])
def test_every_stochastic_step_is_seen_once_a_pass(order: Any, B: int, group_size: int) -> None:
    minibatches = min(3, B // group_size)
    updates = Updates(order, minibatches=minibatches, passes=2)
    found = seen(updates, numbered(B, 5, deterministic=(4,)), group_size)
    assert len(found) == 2 * minibatches * (4 if order == "step" else 1)
    for part in (found[: len(found) // 2], found[len(found) // 2 :]):
        places = sorted(tuple(place) for m in part for place in m.flatten(0, 1).tolist())
        assert places == [(b, i) for b in range(B) for i in range(4)]


def test_a_trajectorys_steps_are_in_one_update_and_a_steps_update_mixes_times() -> None:
    steps = numbered(16, 6)
    for m in seen(Updates("trajectory", minibatches=4), steps):
        assert m.shape == (4, 6, 2) and (m[:, :1, 0] == m[..., 0]).all()
        assert (m[..., 1].sort(1).values == torch.arange(6)).all()
    mixed = seen(Updates("step", minibatches=2), steps)
    assert all(m.shape == (8, 1, 2) for m in mixed)
    assert sum(len(m[..., 1].unique()) > 1 for m in mixed) >= len(mixed) - 1


def test_pairs_stay_together_at_one_step() -> None:
    for order in ("trajectory", "step"):
        for m in seen(Updates(order, minibatches=2), numbered(12, 5), group_size=2):
            assert (m[1::2, :, 0] == m[0::2, :, 0] + 1).all() and (m[0::2, :, 0] % 2 == 0).all()
            assert (m[1::2, :, 1] == m[0::2, :, 1]).all()


def test_selection() -> None:
    steps = numbered(4, 10, deterministic=(9,))
    last = seen(Updates(minibatches=1, last=3), steps)[0]
    assert (last[..., 1].sort(1).values == torch.tensor([6, 7, 8])).all()
    some = seen(Updates(minibatches=1, fraction=0.5), steps)[0]
    assert some.shape == (4, 4, 2)  # ⌊9/2⌋
    assert seen(Updates(minibatches=1, fraction=0.01), steps)[0].shape == (4, 1, 2)
    again = seen(Updates(minibatches=1, fraction=0.5), steps, seed=1)[0]
    assert not torch.equal(some, again)


@pytest.mark.parametrize("size", [1, 3, 4, 12, 13, 99])
@pytest.mark.parametrize("group_size", [1, 2])
def test_parts_are_whole_groups_of_at_most_so_many_states(size: int, group_size: int) -> None:
    parts = list(micro_batches(numbered(10, 4), size, group_size=group_size))
    assert max(part.numel() for part in parts) <= max(size, group_size)
    assert all(len(part) % group_size == 0 for part in parts)
    places = sorted(tuple(place) for part in parts for place in part[keys.X_T].flatten(0, 1).tolist())
    assert places == [(b, i) for b in range(10) for i in range(4)]
    if size >= 40:
        assert len(parts) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"order": "random"}, "updates.order is 'random'"),
        ({"minibatches": 0}, "updates.minibatches is 0"),
        ({"last": 0}, "updates.last is 0"),
        ({"fraction": 0.0}, "updates.fraction is 0.0"),
        ({"micro_batch": 0}, "updates.micro_batch is 0"),
    ],
)
def test_arguments_outside_their_range(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Updates(**options)


def test_a_rollout_that_cannot_be_trained_on_is_refused() -> None:
    with pytest.raises(ValueError, match="no step is stochastic"):
        seen(Updates(), numbered(4, 3, deterministic=(0, 1, 2)))
    with pytest.raises(ValueError, match="2 trajectories or pairs cannot make 3 minibatches"):
        seen(Updates(minibatches=3), numbered(4, 3), group_size=2)
