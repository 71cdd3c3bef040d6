"""All that is trained, and what follows it, cut among processes by PyTorch's FSDP2, and how it becomes whole again."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._pytree import tree_map
from torchrl.objectives import HardUpdate

from diffrl.diffusion.denoisers import Denoiser
from diffrl.errors import InputError
from diffrl.objectives.denoiser_loss import DenoiserLoss
from diffrl.objectives.soft_update import SoftUpdate, follow, moved_by
from diffrl.objectives.td_adaptive import AdaptiveLoss
from diffrl.training.arithmetic import Arithmetic
from diffrl.training.checkpoints import CheckpointError
from diffrl.training.distributed import Ranks
from diffrl.training.ema import EMA
from diffrl.training.loss_scale import LossScale
from diffrl.training.optim import Optimiser
from diffrl.training.packed import MARK, Shapes

__all__ = ["Sharding", "part_of", "require_shardable"]


UNSHOWN = "no test shows that the result is the same"
WriteParts = Callable[[Path | None], Shapes]


def part_of(x: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def require_shardable(loss: DenoiserLoss, arithmetic: Arithmetic, scale: LossScale | None) -> None:
    """Refuse by name what cannot be cut, or is not shown to be the same when it is, and say why.

    Raises:
        ValueError: there is something.
    """
    network = loss.denoiser.network
    parameters = [*network.parameters()]
    others = len(parameters) != len([*loss.denoiser.parameters()])
    refused = (
        (
            isinstance(loss, AdaptiveLoss),
            "td_adaptive",
            "its trials go back to a state that no process has all of",
        ),
        (arithmetic.compile, "trainer.compile", UNSHOWN),
        (arithmetic.channels_last, "trainer.channels_last", "FSDP2 takes tensors in the usual order only"),
        (scale is not None, "dtype=float16", UNSHOWN),
        (
            not all(p.requires_grad for p in parameters),
            "a parameter that is not trained",
            "moments are matched with the parts by their order",
        ),
        (others, "a parameter of the denoiser outside its network", "FSDP2 has the network alone"),
        (any(p.ndim == 0 for p in parameters), "a parameter that is a single number", "FSDP2 cannot cut it"),
    )
    for there, what, why in refused:
        if there:
            raise InputError(f"{what} does not go with trainer.sharded: {why}; set trainer.sharded to false")


def _no_view(module: nn.Module, inputs: object, out: Tensor) -> Tensor:
    """FSDP2 warns of an output that is a view of another tensor: changed in place, it would not be waited for."""
    return out.clone() if out._is_view() else out


class Sharding:
    """A denoiser in training that is cut among processes, along the first dim of each tensor.

    Between steps each process holds its part of the weights, of the moments of the optimiser, of every average and of a
    target network. For a step the networks are put together, and the gradient is summed and cut again. For evaluations
    weights and averages are whole; to a checkpoint each writes its part.

    Args:
        denoiser: in training; its network becomes FSDP2's in place.
        optimiser: of its parameters, so far.
        averages: of its weights, by name.
        target: what moves a target network, which becomes FSDP2's too; None where there is none.
        ranks: the processes.
        device: where they work.

    Attributes:
        optimiser: of the parts, with the moments and steps of the one that was given.
        parameters: the parts.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        optimiser: Optimiser,
        averages: Mapping[str, EMA],
        target: SoftUpdate | HardUpdate | None,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        known = [*denoiser.network.parameters()]
        self.ranks = ranks
        self._whole = {name: dict(ema.module.named_parameters()) for name, ema in averages.items()}
        state = optimiser.state_dict()
        with ranks.answered():
            self._mesh = init_device_mesh(device.type, (ranks.size,))
            self.network = self._fully_sharded(denoiser.network)
            self.parameters = [*denoiser.parameters()]
            self._shards = {
                name: {key: self._cut(x.data) for key, x in whole.items()}
                for name, whole in self._whole.items()
            }
            moments = {
                i: {name: x if x.ndim == 0 else self._cut(x) for name, x in kept.items()}
                for i, kept in state["state"].items()
            }
        for name, ema in averages.items():
            ema.follow(self.parameters, [*self._shards[name].values()])
        self.target: FSDPModule | None = None
        self._registered: list[Tensor] = []  # those of the target network, once more, in the loss
        if target is not None:
            self._cut_target(target, dict(zip(map(id, known), self.parameters, strict=True)))
        self.optimiser = Optimiser(self.parameters, optimiser.optim, optimiser.total, vectorised=True)
        self.optimiser.load_state_dict({**state, "state": moments}, optimiser.steps)
        self.scatter()

    def _fully_sharded(self, network: nn.Module) -> FSDPModule:
        known = [*network.parameters()]
        network.register_forward_hook(_no_view)
        made = fully_shard(network, mesh=self._mesh, reshard_after_forward=False)
        for p in known:
            p.data = p.new_empty(0)  # a loss registers them too
        return made

    def _cut_target(self, updater: SoftUpdate | HardUpdate, parts: Mapping[int, Tensor]) -> None:
        """Cut a target network as the network is, and let its parts follow those of the parameters, by their ids."""
        network = updater.loss_module.bootstrap_network
        with self.ranks.answered():
            self.target = self._fully_sharded(network.module.denoiser.network)
        named = {f"value_network_params.{name}": p for name, p in network.named_parameters()}
        sources, targets = moved_by(updater)
        self._registered = [targets[f"target_{name}"] for name in named]
        self._shards["target"] = {f"target_{name}": p for name, p in named.items()}
        follow(updater, {name: parts[id(sources[name])] for name in named}, self._shards["target"])

    def _cut(self, x: Tensor) -> DTensor:
        """The part of a tensor that all processes hold whole."""
        return distribute_tensor(x, self._mesh, [Shard(0)], src_data_rank=None)

    def gather(self) -> None:
        """Make networks and averages whole, in all processes."""
        with self.ranks.answered():
            self.network.unshard()
            for name, averages in self._whole.items():
                for key, x in averages.items():
                    x.data = self._shards[name][key].full_tensor()
            if self.target is not None:
                self.target.unshard()
                whole = cast(nn.Module, self.target).parameters()
                for registered, p in zip(self._registered, whole, strict=True):
                    registered.data = p.data

    def scatter(self) -> None:
        """Let go of what others hold."""
        self.network.reshard()
        if self.target is not None:
            self.target.reshard()
        for x in (*self._registered, *(x for whole in self._whole.values() for x in whole.values())):
            x.data = x.new_empty(0)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Whole within."""
        self.gather()
        yield
        self.scatter()

    @contextmanager
    def bootstrapping(self) -> Iterator[None]:
        """The target network is whole within: how often it is asked depends on the rows, which others do not have."""
        if self.target is None:
            yield
            return
        with self.ranks.answered():
            self.target.unshard()
        yield
        self.target.reshard()

    def apart(
        self, weights: Mapping[str, Mapping[str, Tensor]], training: Mapping[str, Any]
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any], WriteParts]:
        """What one process writes of sets of weights and a training state, and what has all of them write their parts.

        That takes a folder, which the first process gives, and tells the shapes of the whole tensors.
        """
        parts: dict[str, DTensor] = {}
        rest: dict[str, dict[str, Tensor]] = {}
        for name, held in weights.items():
            tensors = {**held, **self._shards.get(name, {})}
            parts |= {f"{name}.{key}": x for key, x in tensors.items() if isinstance(x, DTensor)}
            rest[name] = {key: x for key, x in tensors.items() if not isinstance(x, DTensor)}

        def marked(x: Any) -> Any:
            if not isinstance(x, DTensor):
                return x
            parts[f"training.{len(parts)}"] = x
            return f"{MARK}{len(parts) - 1}"

        left: dict[str, Any] = tree_map(marked, dict(training))
        return rest, left, partial(self._write, parts)

    def _write(self, parts: Mapping[str, DTensor], folder: Path | None) -> Shapes:
        place = self.ranks.from_first(lambda: str(folder), "the folder of a checkpoint")
        writer = HuggingFaceStorageWriter(place, save_distributed=True)  # safetensors: the other one pickles
        try:
            with self.ranks.answered():
                dcp.save(dict(parts), storage_writer=writer)
        except CheckpointException as error:
            raise _unwritten(error, place) from error
        for number, path in enumerate(sorted(Path(place).glob("shard-*.safetensors")) if folder else (), 1):
            path.rename(path.with_name(f"part_{number:05d}.safetensors"))
        return {name: x.shape for name, x in parts.items()}

    def syncing(self, last: bool) -> None:
        """Whether the next gradient is summed over the processes: that of the last part of a batch."""
        self.network.set_requires_gradient_sync(last)


def _unwritten(error: CheckpointException, place: str) -> CheckpointError:
    """The same in all processes: whose part is not written, to which file, and why."""
    rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
    file = getattr(cause, "filename", None) or f"{place}/part_{rank + 1:05d}.safetensors"
    reason = " ".join((getattr(cause, "strerror", None) or f"{type(cause).__name__}: {cause}").split())
    return CheckpointError(
        f"process {rank} could not write its part of a checkpoint, {file} ({reason[:300]}): make room there, or let "
        "it write to that folder; earlier checkpoints are as they were"
    )
