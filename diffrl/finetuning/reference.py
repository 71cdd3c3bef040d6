"""Copies of a policy that its losses compare it with, and its weights as files keep them."""

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from diffrl.diffusion.pipelines.lora import has_lora
from diffrl.errors import InputError
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.training.checkpoints import CheckpointError

__all__ = ["References", "frozen_copy", "frozen_denoiser", "load_policy_weights", "policy_weights"]


def frozen_denoiser(denoiser: nn.Module) -> nn.Module:
    """The denoiser as it is now: with adapters its base, by its method `reference`, else a copy; without gradients."""
    own: Callable[[], nn.Module] | None = getattr(denoiser, "reference", None)
    return copy.deepcopy(denoiser).eval().requires_grad_(False) if own is None else own()


def frozen_copy(policy: DenoisingPolicy, denoiser: nn.Module | None = None) -> DenoisingPolicy:
    """The policy as it is now, for a reference: nothing that is done to the policy changes it; see `frozen_denoiser`.

    Args:
        policy: what is copied.
        denoiser: in place of its own.
    """
    return DenoisingPolicy(
        frozen_denoiser(policy.denoiser if denoiser is None else denoiser),
        policy.sampler,
        num_steps=policy.num_steps,
        reduction=policy.reduction,
        std_floor=policy.std_floor,
        noise_steps=policy.noise_steps,
        process=policy.process,
    )


class References:
    """The copies of a policy that losses ask for, by name, made when they are first asked for.

        "frozen"    as it was at the start
        "teacher"   the same, or the denoiser that was given for it
        "old"       as it was when the present rollout was collected
        "ema"       its moving average, moved after each rollout

    Args:
        policy: what is tuned.
        teacher: the denoiser that a method learns from; None: the policy's, as it was at the start.
        begin: denoisers that trained copies begin as, by the copy's name; others begin as the teacher.
    """

    def __init__(
        self,
        policy: DenoisingPolicy,
        teacher: nn.Module | None = None,
        begin: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.policy, self._begin = policy, dict(begin or {})
        self.frozen = frozen_copy(policy)
        self.teacher = self.frozen if teacher is None else frozen_copy(policy, teacher)
        """The policy with the teacher's denoiser."""
        self._moving: dict[str, DenoisingPolicy] = {}
        self._asked: dict[str, DenoisingPolicy] = {}
        self.twins: dict[str, DenoisingPolicy] = {}
        """Copies that are trained, by name."""

    def __call__(self, kind: str) -> DenoisingPolicy:
        """The copy of that name.

        Raises:
            ValueError: an unknown name, or a moving copy of a denoiser whose adapters share their base.
        """
        if kind not in ("frozen", "teacher", "old", "ema"):
            raise InputError(f"there is no reference {kind!r}: ask for 'frozen', 'teacher', 'old' or 'ema'")
        if kind in ("frozen", "teacher"):
            return self._asked.setdefault(kind, self.frozen if kind == "frozen" else self.teacher)
        if kind not in self._moving:
            network = getattr(self.policy.denoiser, "network", None)
            if isinstance(network, nn.Module) and has_lora(network):
                raise InputError(f"the reference is {kind!r}, but adapters share their base: take 'frozen'")
            self._moving[kind] = self._asked[kind] = frozen_copy(self.policy)
        return self._moving[kind]

    def twin(self, name: str) -> DenoisingPolicy:
        """A copy of the teacher, or of what it is to begin as, to be trained; saved with the moving copies.

        Raises:
            ValueError: adapters, which share their base.
        """
        if name not in self.twins:
            network = getattr(self.policy.denoiser, "network", None)
            if isinstance(network, nn.Module) and has_lora(network):
                raise InputError(f"{name} is a copy of the network, which adapters share: tune all weights")
            begin, like = (
                self._begin.get(name, self.teacher.denoiser),
                getattr(self.policy.denoiser, "like", None),
            )
            if like is not None and not hasattr(begin, "step_counts"):
                begin = like(begin)
            copied = frozen_copy(self.policy, begin)
            copied.denoiser.requires_grad_(True)
            self.twins[name] = self._asked[name] = copied
        return self.twins[name]

    @property
    def num_steps(self) -> int:
        """K of all copies."""
        return self.frozen.num_steps

    @num_steps.setter
    def num_steps(self, K: int) -> None:
        for copied in (self.frozen, self.teacher, *self._moving.values(), *self.twins.values()):
            copied.num_steps = K

    @property
    def nfe(self) -> int:
        """States forwarded by all copies that were asked for."""
        return sum(asked.nfe for asked in self._asked.values())

    @torch.no_grad()
    def before_updates(self) -> None:
        """Take the policy's weights into "old": a rollout was collected."""
        if "old" in self._moving:
            for theta_old, theta in self._pairs("old"):
                theta_old.copy_(theta)

    @torch.no_grad()
    def after_updates(self, decay: float) -> None:
        """Move "ema" towards the policy: θ_ref ← decay θ_ref + (1 - decay) θ."""
        if "ema" in self._moving:
            for theta_ref, theta in self._pairs("ema"):
                theta_ref.lerp_(theta, 1 - decay)

    def _pairs(self, kind: str) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self._moving[kind].denoiser.parameters(), self.policy.denoiser.parameters(), strict=True)

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Those of the moving copies, by name of a set."""
        kept = {**self._moving, **self.twins}
        return {f"reference_{kind}": p.denoiser.state_dict() for kind, p in kept.items()}

    def counts(self) -> dict[str, int]:
        """States forwarded by each copy."""
        return {kind: asked.nfe for kind, asked in self._asked.items()}

    def restore(self, weights: Mapping[str, dict[str, Tensor]], counts: Mapping[str, int]) -> None:
        """Continue from `weights` and `counts`."""
        for kind, moving in {**self._moving, **self.twins}.items():
            moving.denoiser.load_state_dict(weights[f"reference_{kind}"])
        for kind, asked in self._asked.items():
            asked.nfe = counts.get(kind, 0)


def policy_weights(policy: DenoisingPolicy) -> dict[str, Tensor]:
    """What is to be saved: of a denoiser with adapters those, by its method `trainable_state`, else all weights."""
    own: Callable[[], dict[str, Tensor]] | None = getattr(policy.denoiser, "trainable_state", None)
    return policy.denoiser.state_dict() if own is None else own()


def load_policy_weights(denoiser: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Take the weights that `policy_weights` gave into a policy's denoiser.

    Raises:
        CheckpointError: they are another network's.
    """
    load = getattr(denoiser, "load_trainable_state", denoiser.load_state_dict)
    try:
        load(weights)
    except (RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"checkpoint {path} is of another network: {reason}") from error
