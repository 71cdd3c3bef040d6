"""Copies of a policy that its losses compare it with, and its weights as files keep them."""

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffrl.errors import InputError, InputTypeError
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.training.checkpoints import CheckpointError

__all__ = [
    "References",
    "frozen_copy",
    "frozen_denoiser",
    "load_policy_weights",
    "policy_weights",
    "trainable_copy",
]


def frozen_denoiser(denoiser: nn.Module) -> nn.Module:
    """The denoiser as it is now, without gradients: by its method `reference`, if it has one, else a copy."""
    own: Callable[[], nn.Module] | None = getattr(denoiser, "reference", None)
    return copy.deepcopy(denoiser).eval().requires_grad_(False) if own is None else own()


def trainable_copy(denoiser: nn.Module) -> nn.Module:
    """A denoiser to be trained that begins as this one: by its method `twin`, if it has one, else a copy.

    That of a pipeline with adapters has adapters of its own on the same network.
    """
    own: Callable[[], nn.Module] | None = getattr(denoiser, "twin", None)
    return (copy.deepcopy(denoiser).eval() if own is None else own()).requires_grad_(True)


def frozen_copy(policy: DenoisingPolicy, denoiser: nn.Module | None = None) -> DenoisingPolicy:
    """The policy as it is now, for a reference: nothing that is done to the policy changes it; see `frozen_denoiser`.

    Args:
        policy: what is copied.
        denoiser: in place of its own.
    """
    return _policy_of(frozen_denoiser(policy.denoiser if denoiser is None else denoiser), policy)


def _policy_of(denoiser: nn.Module, policy: DenoisingPolicy) -> DenoisingPolicy:
    return DenoisingPolicy(
        denoiser,
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

    Raises:
        TypeError: a teacher or beginning that is no denoiser.
        ValueError: one of another process than the policy's.
    """

    def __init__(
        self,
        policy: DenoisingPolicy,
        teacher: nn.Module | None = None,
        begin: Mapping[str, nn.Module] | None = None,
    ) -> None:
        if not isinstance(begin, Mapping | None):
            raise InputTypeError(
                f"twins is a {type(begin).__name__}: give denoisers by name, such as {{'fake': ...}}"
            )
        if teacher is not None:
            _require_like("teacher", teacher, policy)
        for name, twin in (begin or {}).items():
            _require_like(f"twins[{name!r}]", twin, policy)
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
            ValueError: an unknown name.
        """
        if kind not in ("frozen", "teacher", "old", "ema"):
            raise InputError(f"there is no reference {kind!r}: ask for 'frozen', 'teacher', 'old' or 'ema'")
        if kind in ("frozen", "teacher"):
            return self._asked.setdefault(kind, self.frozen if kind == "frozen" else self.teacher)
        if kind not in self._moving:
            copied = trainable_copy(self.policy.denoiser).requires_grad_(False)
            self._moving[kind] = self._asked[kind] = _policy_of(copied, self.policy)
        return self._moving[kind]

    def twin(self, name: str) -> DenoisingPolicy:
        """A copy of the teacher, or of what it is to begin as, to be trained; saved with the moving copies."""
        if name not in self.twins:
            begin = self._begin.get(name, self.teacher.denoiser)
            like = getattr(self.policy.denoiser, "like", None)
            if like is not None and not hasattr(begin, "step_counts"):
                begin = like(begin)
            self.twins[name] = self._asked[name] = _policy_of(trainable_copy(begin), self.policy)
        return self.twins[name]

    def require_used(self) -> None:
        """Refuse what a trained copy was to begin as, where others are trained; a method without any takes none.

        Raises:
            ValueError: no copy of that name.
        """
        if self.twins and (unknown := self._begin.keys() - self.twins.keys()):
            raise InputError(
                f"twins has {', '.join(sorted(unknown))}, but what is trained is {', '.join(self.twins)}"
            )

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
        return sum(asked.nfe for asked in self.asked)

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
        own: Mapping[str, Tensor] = getattr(self.policy.denoiser, "adapters", {})
        moved = own.values() or self.policy.denoiser.parameters()
        return zip(self._moving[kind].denoiser.parameters(), moved, strict=True)

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Those of the moving copies, by name of a set."""
        kept = {**self._moving, **self.twins}
        return {f"reference_{kind}": p.denoiser.state_dict() for kind, p in kept.items()}

    @property
    def asked(self) -> tuple[DenoisingPolicy, ...]:
        """The copies that were asked for."""
        return tuple(self._asked.values())

    def counts(self) -> dict[str, int]:
        """States forwarded by each copy."""
        return {kind: asked.nfe for kind, asked in self._asked.items()}

    def restore(self, weights: Mapping[str, dict[str, Tensor]], counts: Mapping[str, int]) -> None:
        """Continue from `weights` and `counts`."""
        for kind, moving in {**self._moving, **self.twins}.items():
            moving.denoiser.load_state_dict(weights[f"reference_{kind}"])
        for kind, asked in self._asked.items():
            asked.nfe = counts.get(kind, 0)


def _require_like(what: str, given: Any, policy: DenoisingPolicy) -> None:
    """Refuse what is no denoiser, or one of another process, whose times mean something else."""
    if not isinstance(given, nn.Module) or isinstance(given, DenoisingPolicy):
        raise InputTypeError(f"{what} is a {type(given).__name__}: give a denoiser, as a policy has one")
    process = getattr(given, "process", None)
    if process is not None and repr(process) != repr(policy.process):
        raise InputError(
            f"{what} has the process {process!r}, but the policy {policy.process!r}: give one of the same"
        )


def policy_weights(policy: DenoisingPolicy) -> dict[str, Tensor]:
    """What is to be saved: of a denoiser with adapters those, by its method `trainable_state`, else all weights."""
    own: Callable[[], dict[str, Tensor]] | None = getattr(policy.denoiser, "trainable_state", None)
    return policy.denoiser.state_dict() if own is None else own()


def load_policy_weights(
    denoiser: nn.Module, weights: dict[str, Tensor], path: Path, *, whole: bool = False
) -> None:
    """Take the weights that `policy_weights` gave into a policy's denoiser.

    Args:
        denoiser: changed in place.
        weights: by name.
        path: where they are from.
        whole: they are the `state_dict` of a copy that was trained or moved, and not those of a policy.

    Raises:
        CheckpointError: they are another network's.
    """
    load = (
        denoiser.load_state_dict
        if whole
        else getattr(denoiser, "load_trainable_state", denoiser.load_state_dict)
    )
    try:
        load(weights)
    except (RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"checkpoint {path} is of another network: {reason}") from error
