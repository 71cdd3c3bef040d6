"""Rewards of images and prompts, made into rewards of latents and prompt numbers."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffrl.errors import InputError, InputTypeError
from diffrl.ranges import require_int
from diffrl.rewards.calls import Reward, takes_cond

__all__ = ["DecodedReward", "LatentDecoder"]


@dataclass(frozen=True, eq=False)
class LatentDecoder:
    """The autoencoder of a pipeline: latents z → images = decode(z/scaling_factor + shift_factor).

    Args:
        vae: a diffusers autoencoder, e.g. ``pipe.vae``; it decodes in its own dtype.

    Raises:
        ValueError: an autoencoder whose latents are standardised otherwise.
    """

    vae: nn.Module

    def __post_init__(self) -> None:
        if self._config("latents_mean") is not None:
            raise InputError(
                f"{type(self.vae).__name__} standardises latents by channel: give a decode function"
            )

    def _config(self, name: str) -> Any:
        return getattr(self.vae.config, name, None)

    @torch.no_grad()
    def __call__(self, z: Tensor) -> Tensor:
        """Images, float32 in [-1, 1], shape [n, 3, H, W], of latents [n, C, h, w]."""
        weight = next(self.vae.parameters())
        z = z.to(weight.device, torch.float32)
        z = z / float(self._config("scaling_factor") or 1) + float(self._config("shift_factor") or 0)
        images: Tensor = self.vae.decode(z.to(weight.dtype), return_dict=False)[0]  # type: ignore[operator]
        return images.float().clamp(-1, 1)


class DecodedReward:
    """A reward of images and prompts, made into a reward of latents and prompt numbers, as a latent policy needs it.

    A `BlackBox` around it remembers rewards by the bytes of the latents, and counts each sample once.

    Args:
        reward: (images [n, *I], prompts) → n numbers. Images of a `LatentDecoder` are float32 [n, 3, H, W] in [-1, 1];
            prompts are n strings, or the condition as it is where no `prompts` are given here.
        decode: latents [n, *E] → images, e.g. `LatentDecoder`; called without gradients.
        prompts: those that conditions number, in the order of the denoiser's: ``denoiser.prompts``.
        batch_size: most latents decoded at once; the reward gets all images of a call together.
        metadata: one mapping a prompt, which a reward with a parameter of that name gets as the keyword ``metadata``,
            a list of n. (What a reward has to say beyond its number, it keeps itself: it is an object of yours.)

    Raises:
        TypeError: a reward or decoder that cannot be called so, or one string for prompts.
        ValueError: batch_size < 1, or a sum with running statistics, which no cache may wrap; when called, prompt
            numbers that are missing or unknown, or images that are not one a latent.
    """

    def __init__(
        self,
        reward: Reward,
        decode: Callable[[Tensor], Tensor],
        prompts: Sequence[str] | None = None,
        batch_size: int = 8,
        *,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        if not (callable(reward) and callable(decode)):
            raise InputTypeError(
                "reward and decode must be callables: (images, prompts) -> numbers, latents -> images"
            )
        if isinstance(prompts, str):
            raise InputTypeError(f"prompts is the string {prompts!r}: give a list of strings")
        require_int("batch_size", batch_size)
        if getattr(reward, "normalise", "none") != "none":
            raise InputError(
                "a running sum of rewards depends on what came before, which no cache may remember: decode inside the "
                "sum, WeightedSum({name: (DecodedReward(reward, ...), weight)})"
            )
        self.reward, self.decode, self.batch_size = reward, decode, batch_size
        self.prompts = None if prompts is None else list(prompts)
        has_metadata = _takes_metadata(reward)
        self.metadata = metadata if has_metadata else None
        self._takes_prompts = takes_cond(reward, *(["metadata"] if has_metadata else []))
        if self.metadata is not None and len(self.metadata) != len(self.prompts or ()):
            raise InputError(
                f"{len(self.metadata)} metadata for {len(self.prompts or ())} prompts: give one each"
            )
        self.__name__ = str(
            getattr(reward, "name", None) or getattr(reward, "__name__", type(reward).__name__)
        )

    @torch.no_grad()
    def __call__(self, x0: Tensor, cond: Any = None) -> Any:
        """What the reward says of latents [n, *E] under prompt numbers, integers [n] or [n, 1]."""
        rows = self._rows(cond, len(x0))
        images = torch.cat([self.decode(part) for part in x0.split(self.batch_size)])
        if len(images) != len(x0):
            raise InputError(f"decode gave {len(images)} images for {len(x0)} latents: give one each")
        prompts = cond if self.prompts is None else [self.prompts[row] for row in rows]
        given = (images, prompts) if self._takes_prompts else (images,)
        ask: Any = self.reward
        if self.metadata is None:
            return ask(*given)
        return ask(*given, metadata=[self.metadata[row] for row in rows])

    def _rows(self, cond: Any, n: int) -> list[int]:
        """The number of each sample's prompt; none where there are no prompts."""
        if self.prompts is None:
            return []
        known = len(self.prompts)
        if cond is None and known == 1:
            return [0] * n
        if not isinstance(cond, Tensor) or cond.is_floating_point() or cond.numel() != n:
            raise InputError(f"conditions must number the {known} prompts: give integers, shape [{n}]")
        rows = cond.flatten().tolist()
        if any(not 0 <= row < known for row in rows):
            raise InputError(f"prompts are numbered 0..{known - 1}, not {sorted(set(rows))}")
        return rows


def _takes_metadata(reward: Reward) -> bool:
    """Whether a reward has a parameter `metadata`; objects without a signature have none."""
    try:
        return "metadata" in inspect.signature(reward).parameters
    except (TypeError, ValueError):
        return False
