"""Plans of what is collected for one iteration, by name."""

from diffrl.registry import Registry

__all__ = ["ROLLOUTS"]

ROLLOUTS = Registry("rollouts", "diffrl.finetuning.rollouts")
