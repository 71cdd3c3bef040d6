"""What can be tuned, and what a policy of it needs to know."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from diffrl.rewards.calls import Reward

__all__ = ["Tunable"]


@dataclass(frozen=True)
class Tunable:
    """A denoiser and what a policy of it needs to know.

    Args:
        denoiser: D, with a process; its parameters that require a gradient are tuned.
        event_shape: *E of a latent.
        conditions: what a condition is drawn from, [M, ...]; None: no condition.
        wrap_reward: makes a reward of samples into one of latents.
        name: for people.
        pictures: makes what people look at of latents [n, *E].
        export: writes what was tuned into a folder as others read it, where there is such a form: adapters of a
            pipeline as ``lora/pytorch_lora_weights.safetensors``, for diffusers' ``pipe.load_lora_weights``.
        show: writes what people look at as picture files, where what is tuned makes pictures: images [n, C, H, W] of
            `pictures`, their conditions [n], a folder, and the beginning of the files' names.
        teacher: the denoiser that methods of distillation learn from; None: this one, as it is before tuning.
        twins: denoisers that trained copies of the teacher begin as, by the copy's name; others begin as the teacher.
    """

    denoiser: nn.Module
    event_shape: tuple[int, ...]
    conditions: Tensor | None
    wrap_reward: Callable[[Reward], Reward]
    name: str
    pictures: Callable[[Tensor], Tensor] = field(default=lambda x: x)
    export: Callable[[Path], None] = field(default=lambda folder: None)
    show: Callable[[Tensor, Tensor | None, Path, str], None] = field(default=lambda *given: None)
    teacher: nn.Module | None = None
    twins: Mapping[str, nn.Module] = field(default_factory=dict)
