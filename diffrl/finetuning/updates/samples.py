"""Updates on the clean samples of trajectories, each at fresh times and noise."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from tensordict import TensorDict, TensorDictBase
from torch import Generator

from diffrl import keys
from diffrl.errors import InputError
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.updates.base import RowUpdates
from diffrl.finetuning.updates.registry import UPDATES
from diffrl.objectives.denoising import sample_log_normal_states, sample_uniform_states

if TYPE_CHECKING:
    from diffrl.finetuning.recipe import Recipe

__all__ = ["SampleUpdates"]


@UPDATES.register("samples")
@dataclass(frozen=True)
class SampleUpdates(RowUpdates):
    """Minibatches of clean samples, each at fresh times with fresh noise: no step needs a log-probability.

        x_t = α_t x_K + σ_t ε,    with the advantage of the trajectory that ended in x_K

    Deterministic samplers can be tuned this way. A minibatch holds x_t, t, x0 (the sample), advantage, cond, group.

    Sources: updates of this kind are those of Advantage Weighted Matching (Xue et al., 2025),
    https://arxiv.org/abs/2509.25050, and of DiffusionNFT (Zheng et al., 2025), https://arxiv.org/abs/2509.16117.

    Args:
        times: law of t: "uniform" over a fine grid of the process, or "log_normal" as in EDM.
        draws: m, times that are drawn for each sample in each pass.
        minibatches: parts that the samples are split into.
        passes: over the rollout.
        micro_batch: most states forwarded at once; gradients are accumulated over them.

    Raises:
        ValueError: an argument outside its range.
    """

    unit: ClassVar[Literal["samples"]] = "samples"
    times: Literal["uniform", "log_normal"] = "uniform"
    draws: int = 1
    minibatches: int = 2
    passes: int = 1
    micro_batch: int = 256

    def __post_init__(self) -> None:
        self._check()
        if self.times not in ("uniform", "log_normal"):
            raise InputError(f"updates.times is {self.times!r}: give 'uniform' or 'log_normal'")

    def conflict(self, recipe: "Recipe") -> str | None:
        """Refuse rewards of single steps, which no sample has."""
        if recipe.placement.dense:
            return (
                "updates of samples take one advantage a trajectory, not one a step: take placement terminal"
            )
        return super().conflict(recipe)

    def __call__(
        self,
        rollout: TensorDictBase,
        *,
        policy: DenoisingPolicy,
        group_size: int,
        generator: Generator,
        entries: Iterable[str],
    ) -> Iterator[TensorDict]:
        """Samples [n, m] of each update, in order."""
        last = rollout[:, -1]
        data = {keys.X0: last.get((keys.NEXT, keys.X_T)), keys.ADVANTAGE: last.get(keys.ADVANTAGE)}
        data |= {key: last.get(key) for key in (keys.COND, keys.GROUP) if key in last.keys()}
        samples = TensorDict(data, [len(last)])
        draw = sample_uniform_states if self.times == "uniform" else sample_log_normal_states
        for _ in range(self.passes):
            for rows in self._rows(len(samples), group_size, generator):
                part = samples[rows.to(rollout.device).repeat_interleave(self.draws)]
                x0 = part.get(keys.X0)
                states = draw(policy.process, x0.cpu(), generator=generator).squeeze(1).to(x0.device)
                part.update(states.select(keys.X_T, keys.T))
                yield part.view(len(rows), self.draws)
