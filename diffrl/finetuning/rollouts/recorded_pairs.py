"""Recorded samples in place of the policy's own: pairs of which one was preferred."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict
from torch import Generator, Tensor

from diffrl import keys
from diffrl.data.image_files import MAX_GIB
from diffrl.data.preferences import Pairs, read_pairs
from diffrl.errors import InputError
from diffrl.finetuning.piece import Setting
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.rollouts.base import RolloutPlan
from diffrl.finetuning.rollouts.registry import ROLLOUTS
from diffrl.ranges import require_int, require_number
from diffrl.training.identity import fingerprint

if TYPE_CHECKING:
    from diffrl.finetuning.recipe import Recipe

__all__ = ["RecordedPairs"]


@ROLLOUTS.register("recorded_pairs")
@dataclass
class RecordedPairs(RolloutPlan):
    """Pairs of a file, drawn anew in each iteration: rows 2p and 2p+1 are one pair, the preferred one first.

    Each row has one step, the policy's last, which ends in the recorded sample: times and noise are the updates' own,
    and the policy draws nothing. The step pays 1 for the preferred sample and 0 for the other, see `Recorded`. No pair
    is drawn twice before all were drawn once in the iteration. docs/preferences.md has the format.

    Args:
        path: an npz file, or a jsonl table next to its files: see `diffrl.data.preferences.read_pairs`.
        trajectories: B, twice the pairs of an iteration; the published number of pairs is 2,048.
        size: crop image files at their centre and resize them to size × size; None: all must be of one size.
        max_gib: GiB of memory that the samples may take.

    Raises:
        ValueError: an argument outside its range.
    """

    path: str | None = None
    trajectories: int = 4096
    size: int | None = None
    max_gib: float = MAX_GIB
    _data: tuple[Tensor, Tensor | None] | None = field(init=False, repr=False, compare=False, default=None)
    """Samples [N, 2, *E] and conditions [N]."""

    def __post_init__(self) -> None:
        if require_int("rollouts.trajectories", self.trajectories) % 2:
            raise InputError(f"rollouts.trajectories is {self.trajectories}: pairs need an even number")
        if self.size is not None:
            require_int("rollouts.size", self.size)
        require_number("rollouts.max_gib", self.max_gib, 0, ends="()")

    @property
    def rows_of_a_group(self) -> int:
        """2."""
        return 2

    def conflict(self, recipe: "Recipe") -> str | None:
        """Refuse methods that need steps or states of the policy, and several times for the one step that there is."""
        if not recipe.surrogate.takes_samples:
            name = type(recipe.surrogate).__name__
            return f"{name} needs steps of the policy, which recorded pairs lack: set rollouts=chains"
        if recipe.updates.unit == "preferences" and getattr(recipe.updates, "draws", 1) > 1:
            return "a recorded sample has one step: set updates.draws=1, and updates.passes for more times"
        return None

    def prepare(self, setting: Setting) -> None:
        """Read the pairs, and refuse those that are none of what the model makes."""
        if self.path is None:
            raise InputError(
                "rollouts.path is null: give the file of recorded pairs; or set rollouts=chains and "
                "rollouts.group_size=2, so that the policy draws them"
            )
        pairs = read_pairs(self.path, self.size, self.max_gib)
        if pairs.event_shape != tuple(setting.event_shape):
            raise InputError(
                f"{pairs.where}: its samples are {list(pairs.event_shape)}, but those of the model "
                f"{list(setting.event_shape)}; images need rollouts.size, latents are recorded as arrays"
            )
        self._data = torch.stack([pairs.preferred, pairs.rejected], 1), _conditions(pairs, setting)
        self.fingerprint = fingerprint(part for part in self._data if part is not None)

    def collect(
        self,
        policy: DenoisingPolicy,
        event_shape: tuple[int, ...],
        *,
        trajectories: int,
        cond: Tensor | None,
        generator: Generator,
        device: torch.device,
    ) -> TensorDict:
        """Pairs [B, 1] by the generator; conditions are those that were recorded, not the ones given."""
        if self._data is None:
            raise InputError("the pairs were not read: call prepare first, as diffrl.finetune does")
        samples, labels = self._data
        P, N, at = trajectories // 2, len(samples), generator.device
        rounds = [torch.randperm(N, generator=generator, device=at).cpu() for _ in range(-(-P // N))]
        rows = torch.cat(rounds)[:P]
        x0 = samples[rows].flatten(0, 1).unsqueeze(1).to(device)
        label = None if labels is None else labels[rows].repeat_interleave(2, 0).unsqueeze(1).to(device)
        return _last_steps(policy, x0, label)


def _last_steps(policy: DenoisingPolicy, x0: Tensor, cond: Tensor | None) -> TensorDict:
    """The last step of each of B rows [B, 1], which ends in x0 [B, 1, *E]."""
    B, last, device = len(x0), policy.num_steps - 1, x0.device
    flag = torch.ones(B, 1, 1, dtype=torch.bool, device=device)
    zero = torch.zeros(B, 1, 1, device=device)
    state: dict[str, Any] = {
        keys.GROUP: torch.arange(B, device=device).div(2, rounding_mode="floor")[:, None, None]
    }
    state |= {} if cond is None else {keys.COND: cond}

    def at(index: int, over: Tensor) -> dict[str, Any]:
        return {
            keys.X_T: x0,
            keys.T: zero + policy.grid[index].to(x0),
            keys.INDEX: torch.full_like(zero, index, dtype=torch.long),
            **state,
            keys.TERMINATED: over,
            keys.TRUNCATED: ~flag,
            keys.DONE: over,
        }

    preferred = (torch.arange(B, device=device) % 2 == 0).to(x0)[:, None, None]
    reached = TensorDict({**at(last + 1, flag), keys.REWARD: preferred}, [B, 1], device=device)
    step = {
        **at(last, ~flag),
        keys.ACTION: x0,
        keys.ACTION_LOG_PROB: zero[..., 0],
        keys.X0_HAT: x0,
        keys.TRAINABLE: ~flag,
        keys.NEXT: reached,
    }
    return TensorDict(step, [B, 1], device=device, names=[None, "time"])


def _conditions(pairs: Pairs, setting: Setting) -> Tensor | None:
    """The model's condition of each pair, [N]; None for a model without conditions."""
    known, recorded = setting.conditions, "prompts" if pairs.prompts is not None else "labels"
    if known is None:
        if pairs.labels is None and pairs.prompts is None:
            return None
        raise InputError(f"{pairs.where}: has {recorded}, but the model has no conditions; leave them out")
    if known.ndim != 1 or known.is_floating_point():
        raise InputError(
            "recorded pairs need a model whose conditions are numbers: of classes, or of prompts"
        )
    labels = pairs.labels
    if pairs.prompts is not None:
        labels = _numbers_of_prompts(pairs, getattr(setting.policy.denoiser, "prompts", None))
    if labels is None:
        raise InputError(
            f"{pairs.where}: its pairs have no condition, but the model does; give each a label or prompt"
        )
    unknown = ~torch.isin(labels, known.cpu())
    if bool(unknown.any()):
        i = int(unknown.nonzero()[0])
        raise InputError(
            f"{pairs.where}, {pairs.rows[i]}: the model has no label {int(labels[i])}; it has "
            f"{', '.join(map(str, sorted(set(known.tolist()))))}"
        )
    return labels.to(known.dtype)


def _numbers_of_prompts(pairs: Pairs, known: Sequence[str] | None) -> Tensor:
    """The number of each pair's prompt among those of the model."""
    if known is None:
        raise InputError(f"{pairs.where}: has prompts, but the model knows classes; give labels")
    numbers = {text: i for i, text in reversed([*enumerate(known)])}
    found = []
    for text, row in zip(pairs.prompts or (), pairs.rows, strict=True):
        if text not in numbers:
            raise InputError(
                f"{pairs.where}, {row}: prompt {text!r:.80} is not among the model's; add it to model.prompts, or give "
                "this table as model.prompts_file too"
            )
        found.append(numbers[text])
    return torch.tensor(found)
