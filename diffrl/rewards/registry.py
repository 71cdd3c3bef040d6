"""The rewards that have a name, for configurations: those of the library, of plugins and of the user."""

from diffrl.registry import Registry

__all__ = ["REWARDS"]

REWARDS = Registry("reward", "diffrl.rewards", omit=("classifier", "index", "mixture"))
"""name → constructor of a `Reward`."""
