"""What a fine-tuning run belongs to, as facts that its checkpoints keep: base, reward, pieces, conditions."""

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.recipe import Recipe
from diffrl.rewards.black_box import BlackBox
from diffrl.rewards.decoded import DecodedReward
from diffrl.rewards.weighted_sum import WeightedSum
from diffrl.training.identity import fingerprint

__all__ = ["policy_facts", "recipe_facts", "reward_identity"]

LOOKED_AT = 4096  # values of a tensor of weights, evenly spread: billions would take a minute
PLAIN = (bool, int, float, str, type(None))
MEMORY_ONLY = ("at_once", "micro_batch", "overlap")
"""Options that decide about memory and speed: another machine may need others."""


def policy_facts(policy: DenoisingPolicy) -> dict[str, Any]:
    """What is tuned, as it is now: its weights by a fingerprint of some values of each tensor."""
    denoiser: Any = policy.denoiser
    return {
        "model": type(denoiser).__name__,
        "model.weights": _weights(denoiser),
        "model.trainable": sum(p.numel() for p in denoiser.parameters() if p.requires_grad),
        "model.prompts": _digest(str(getattr(denoiser, "prompts", ())).encode()),
        "model.guidance_scale": getattr(denoiser, "guidance_scale", 1.0),
        "process": repr(policy.process),
        "sampler": repr(policy.sampler),
        "policy.num_steps": policy.num_steps,
        "policy.reduction": policy.reduction,
        "policy.std_floor": policy.std_floor,
        "policy.noise_steps": policy.noise_steps,
    }


def recipe_facts(recipe: Recipe) -> dict[str, Any]:
    """Every piece and its options, as ``surrogate.clip_range``, but for those that only memory depends on."""
    facts: dict[str, Any] = {}
    for name, piece in vars(recipe).items():
        facts[name] = type(piece).__name__
        options = fields(piece) if is_dataclass(piece) else ()
        for option in options:
            if option.init and option.name not in MEMORY_ONLY:
                value = getattr(piece, option.name)
                facts[f"{name}.{option.name}"] = value if isinstance(value, PLAIN) else repr(value)
    return facts


def reward_identity(reward: Any) -> str:
    """Name of a reward, with its options where they are plain, and a digest of its code or weights.

    What wraps it for calls or decodes for it is no part of it. Objects are known by their class, and by their fields if
    they are dataclasses.
    """
    if isinstance(reward, BlackBox | DecodedReward):
        return reward_identity(reward.reward)
    if isinstance(reward, WeightedSum):
        parts = (f"{reward.weights[name]} {reward_identity(part)}" for name, part in reward.parts.items())
        return f"{reward.normalise} sum of {', '.join(parts)}"
    if isinstance(reward, functools.partial):
        given: dict[Any, Any] = {**dict(enumerate(reward.args)), **reward.keywords}
        return f"{reward_identity(reward.func)} given {_plain(given)}"
    if isinstance(reward, FunctionType):
        return f"{_name(reward)} {_digest(*_code(reward.__code__), *_bound(reward))}"
    if isinstance(reward, nn.Module):
        return f"{_name(type(reward))} {_weights(reward)}"
    if is_dataclass(reward):
        return f"{_name(type(reward))} {_plain({f.name: getattr(reward, f.name) for f in fields(reward)})}"
    return _name(type(reward))


def _weights(module: nn.Module) -> str:
    return fingerprint(p.detach().flatten()[:: max(1, p.numel() // LOOKED_AT)] for p in module.parameters())


def _name(thing: Any) -> str:
    module = "__main__" if thing.__module__ == "__mp_main__" else thing.__module__
    return f"{module}.{thing.__qualname__}"


def _plain(values: dict[Any, Any]) -> dict[Any, Any]:
    return {key: value for key, value in values.items() if isinstance(value, PLAIN)}


def _bound(function: FunctionType) -> Iterator[bytes]:
    """Plain values that a function has from outside: defaults and its closure's."""
    values = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    values += [cell.cell_contents for cell in function.__closure__ or ()]
    yield from (repr(value).encode() for value in values if isinstance(value, PLAIN))


def _code(code: CodeType) -> Iterator[bytes]:
    """Instructions, names and constants, of functions inside too."""
    yield code.co_code
    yield repr(code.co_names).encode()
    for value in code.co_consts:
        if isinstance(value, CodeType):
            yield from _code(value)
        else:
            yield repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value).encode()


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
