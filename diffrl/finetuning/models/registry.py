"""The registry of what can be tuned, and how a configuration becomes one of them."""

from diffrl.finetuning.models.base import Tunable
from diffrl.registry import Config, Registry, accepted, as_tuples

__all__ = ["MODELS", "build_model"]

MODELS = Registry("model", "diffrl.finetuning.models", omit=("device", "seed"))


def build_model(options: Config, *, device: str, seed: int) -> Tunable:
    """The model that a configuration's group ``model`` describes.

    Args:
        options: ``name`` and options.
        device: the run's, for models that take one.
        seed: the run's, likewise.
    """
    run = accepted(MODELS[options["name"]], {"device": device, "seed": seed})
    model: Tunable = MODELS.build(as_tuples(options), **run)
    return model
