"""A gradient step elsewhere than on the processor: the meta device stands in a GPU's place, and mixes as little."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import diffrl
from diffrl.configs.cli import settings
from diffrl.experiments.train import TrainingJob
from diffrl.training import trainer as module
from diffrl.training.build import build_data
from tests.kit.configs import composed

aten = torch.ops.aten
META = torch.device("meta")
MAY_MIX = (aten._to_copy, aten.copy_, aten.index, aten._index_put_impl_)


class Elsewhere(TorchDispatchMode):
    """No operation takes tensors of both devices, but for numbers, copies and indices; what is read is 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [x for x in tensors if x.is_meta]
        packet = func.overloadpacket
        if there and packet not in MAY_MIX:
            strays = [tuple(x.shape) for x in tensors if not x.is_meta and x.ndim]
            assert not strays, f"{func} of the other device and of the processor's {strays}"
        if there and packet is aten._local_scalar_dense:
            return torch.ones((), dtype=there[0].dtype).item()
        if there and packet in (aten.is_set_to, aten.equal):
            return packet is aten.equal
        if there and packet is aten._to_copy and kwargs.get("device", META).type == "cpu":
            return torch.ones(there[0].shape, dtype=there[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def a_device_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device has no generators and no autocast, and takes the processor's."""
    drawn, autocast = module.step_generator, torch.autocast

    def there(kind: str, *given: Any, **options: Any) -> Any:
        return autocast("cpu" if kind == "meta" else kind, *given, **options)

    monkeypatch.setattr(module, "step_generator", lambda seed, step, device="cpu": drawn(seed, step))
    monkeypatch.setattr(torch, "autocast", there)


def job(*words: str) -> TrainingJob:
    """A training whose networks lie elsewhere."""
    given = ["data=rings", "device=meta", "trainer.batch_size=6", "chain.num_steps=4", *words]
    config = settings(composed(*given), given)
    with Elsewhere():
        return TrainingJob(config, build_data(config), config["objective"]["name"])


def descend(job: TrainingJob) -> None:
    x0, labels, generator = job.trainer.batch(0)
    with Elsewhere():
        states = job.trainer.objective.draw(x0, cond=labels, generator=generator)
        job.trainer.loss(states)["loss_value"].backward()
        for average in job.trainer.averages.values():
            average.update(6)


@pytest.mark.filterwarnings("ignore:No target network updater")
@pytest.mark.parametrize("words", [["edm"], ["td"], ["td_edm"], ["mean_flow", "network.second_time=true"]])
def test_a_step_stays_on_its_device(words: list[str]) -> None:
    there = job(f"objective={words[0]}", *words[1:])
    descend(there)
    assert all(p.grad is not None and p.grad.is_meta for p in there.trainer.parameters)


def test_a_tensor_that_is_left_behind_is_found() -> None:
    there = job("objective=edm")
    network = there.trainer.denoiser.network
    name, buffer = next(iter(network.named_buffers()))
    owner = network.get_submodule(name.rpartition(".")[0])
    setattr(owner, name.rpartition(".")[2], torch.zeros(buffer.shape))
    with pytest.raises(AssertionError, match="of the other device and of the processor's"):
        descend(there)


@pytest.mark.parametrize("sampler", [diffrl.Heun(), diffrl.Ancestral()])
def test_samples_are_drawn_on_their_device(sampler: Any) -> None:
    denoiser = job("objective=edm").average
    with Elsewhere():
        samples = diffrl.sample(
            denoiser, (3, 2), sampler=sampler, num_steps=4, noise=torch.randn_like, device="meta"
        )
    assert samples.is_meta and samples.shape == (3, 2)
