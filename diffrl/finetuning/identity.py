"""What a fine-tuning run belongs to, as facts that its checkpoints keep: base, reward, pieces, conditions."""

import functools
import hashlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
from torch import Tensor, nn

from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.recipe import Recipe
from diffrl.rewards.black_box import BlackBox
from diffrl.rewards.decoded import DecodedReward
from diffrl.rewards.weighted_sum import WeightedSum
from diffrl.training.identity import fingerprint

__all__ = ["policy_facts", "recipe_facts", "reward_identity", "weights_identity"]

LOOKED_AT = 4096  # values of a tensor of weights, evenly spread: billions would take a minute
PLAIN = (bool, int, float, str, type(None))
MEMORY_ONLY = ("at_once", "micro_batch", "overlap")
"""Options that decide about memory and speed: another machine may need others."""


def policy_facts(policy: DenoisingPolicy) -> dict[str, Any]:
    """What is tuned, as it is now: its weights by a fingerprint of some values of each tensor."""
    denoiser: Any = policy.denoiser
    return {
        "model": type(denoiser).__name__,
        "model.weights": weights_identity(denoiser),
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
    if recipe.rollouts.fingerprint is not None:
        facts["rollouts.data"] = recipe.rollouts.fingerprint
    return facts


def reward_identity(reward: Any, above: tuple[Any, ...] = ()) -> str:
    """Name of a reward, with a digest of what decides its numbers: its code, its weights and the values in it.

    Values are plain ones, tensors, arrays and what can be called, and lists and dicts of them. A function has its
    defaults, and of its closure and the globals that it names all but lists and dicts, in which rewards note things; an
    object has those arguments of its constructor that it keeps under their names. What wraps a reward for calls or
    decodes for it is no part of it. `above` is what it is a part of: of what leads back there only the name counts.
    """
    if any(reward is whole for whole in above):
        return _name(type(reward))
    above = (*above, reward)
    if isinstance(reward, BlackBox | DecodedReward):
        return reward_identity(reward.reward, above)
    if isinstance(reward, WeightedSum):
        parts = (
            f"{reward.weights[name]} {reward_identity(part, above)}" for name, part in reward.parts.items()
        )
        return f"{reward.normalise} sum of {', '.join(parts)}"
    if isinstance(reward, functools.partial):
        given: dict[Any, Any] = {**dict(enumerate(reward.args)), **reward.keywords}
        return f"{reward_identity(reward.func, above)} given {_values(given, above)}"
    if isinstance(reward, MethodType):
        return f"{reward_identity(reward.__func__, above)} of {reward_identity(reward.__self__, above)}"
    if isinstance(reward, FunctionType):
        values = str(_values(_bound(reward), above)).encode()
        return f"{_name(reward)} {_digest(*_code(reward.__code__), values)}"
    if isinstance(reward, type | BuiltinFunctionType):
        return _name(reward)
    weights = f" {weights_identity(reward)}" if isinstance(reward, nn.Module) else ""
    return f"{_name(type(reward))}{weights} {_values(_kept(reward), above)}"


def weights_identity(module: nn.Module) -> str:
    """A fingerprint of some values of each tensor of weights."""
    tensors = (*module.parameters(), *module.buffers())
    return fingerprint(x.detach().flatten()[:: max(1, x.numel() // LOOKED_AT)] for x in tensors)


def _name(thing: Any) -> str:
    module = "__main__" if thing.__module__ == "__mp_main__" else thing.__module__
    return f"{module}.{thing.__qualname__}"


def _values(given: Mapping[Any, Any], above: tuple[Any, ...]) -> dict[Any, str]:
    """Those that decide a reward, by name, as text that is the same in every process."""
    found = {key: _value(value, above) for key, value in given.items()}
    return {key: text for key, text in found.items() if text is not None}


def _value(value: Any, above: tuple[Any, ...]) -> str | None:
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, Tensor):
        if value.is_meta:
            return str(tuple(value.shape))
        return fingerprint([(value.float() if value.is_floating_point() else value).to_dense()])
    if isinstance(value, np.ndarray):
        return _digest(f"{value.dtype}{value.shape}".encode(), value.tobytes())
    if isinstance(value, tuple | list):
        return str([_value(part, above) for part in value])
    if isinstance(value, Mapping):
        return str(_values(value, above))
    return reward_identity(value, above) if callable(value) or is_dataclass(value) else None


def _bound(function: FunctionType) -> dict[str, Any]:
    """What a function has from outside; of the functions among its globals only the names, as there may be many."""
    code, known = function.__code__, function.__globals__
    around = {name: known[name] for name in code.co_names if name in known}
    around = {k: _name(v) if isinstance(v, FunctionType) else v for k, v in around.items()}
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    around |= {name: cell.cell_contents for name, cell in cells if cell != CellType()}  # no empty ones
    around = {name: value for name, value in around.items() if not isinstance(value, list | dict)}  # notes
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items())
    return {"around": around, "defaults": defaults}


def _kept(thing: Any) -> dict[str, Any]:
    """Arguments of an object's constructor that it keeps under their names."""
    names = inspect.signature(type(thing).__init__).parameters
    return {name: value for name, value in getattr(thing, "__dict__", {}).items() if name in names}


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
