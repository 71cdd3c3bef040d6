"""Denoising as reinforcement learning. The public names stand in `__init__.pyi`; each is imported on its first use."""

import sys

import gymnasium
import lazy_loader

from diffrl.moved import MovedModules

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]


def _register_environments() -> None:
    """Tells Gymnasium the ids; the entry points are strings, so no environment is imported here."""
    if "DiffusionMRP-v0" not in gymnasium.registry:
        gymnasium.register(
            id="DiffusionMRP-v0",
            entry_point="diffrl.envs.gymnasium_mrp:DiffusionMRPEnv",
            vector_entry_point="diffrl.envs.gymnasium_mrp:DiffusionMRPVectorEnv",
            disable_env_checker=True,  # it warns of vector rewards
        )
    if "DiffusionMDP-v0" not in gymnasium.registry:
        gymnasium.register(
            id="DiffusionMDP-v0",
            entry_point="diffrl.envs.gymnasium_mdp:DiffusionMDPEnv",
            vector_entry_point="diffrl.envs.gymnasium_mdp:DiffusionMDPVectorEnv",
        )


_register_environments()
sys.meta_path.append(MovedModules())  # asked last
