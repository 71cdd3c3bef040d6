"""The soft update over all tensors at once, with TorchRL's as witness."""

import copy

import pytest
import torch
import torchrl.objectives

from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.schedules.edm import EDM
from diffrl.objectives.soft_update import SoftUpdate
from diffrl.objectives.value import ValueLoss

network = MLP((2,), hidden=8, depth=2)


def moved(update: type, steps: int = 3, **rate: float) -> dict[str, torch.Tensor]:
    """State of a loss after some updates, with the network changed before each."""
    loss = ValueLoss(Denoiser(copy.deepcopy(network), EDM()), bootstrap="target")
    updater, generator = update(loss, **rate), torch.Generator().manual_seed(0)
    for _ in range(steps):
        with torch.no_grad():
            for p in loss.denoiser.parameters():
                p.add_(torch.randn(p.shape, generator=generator))
        updater.step()
    return loss.state_dict()


@pytest.mark.parametrize("rate", [{"eps": 0.9}, {"tau": 0.001}, {"eps": 1.0}, {"tau": 1.0}])
@pytest.mark.filterwarnings("ignore:Found an eps value < 0.5")
def test_equals_torchrl(rate: dict[str, float]) -> None:
    ours, witness = moved(SoftUpdate, **rate), moved(torchrl.objectives.SoftUpdate, **rate)
    assert ours.keys() == witness.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, witness[name], rtol=0, atol=0)
    moving = [name for name in ours if name.startswith("target_") and "first.weight" in name]
    source = moving[0].removeprefix("target_")
    assert torch.equal(ours[moving[0]], ours[source]) == (rate == {"tau": 1.0})
