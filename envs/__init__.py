"""Environments over the denoising chain, for TorchRL and Gymnasium; imported as diffrl.envs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ != "diffrl.envs":
    raise ImportError(f"this package is not {__name__!r}: import it as diffrl.envs")

# name → the module that defines it
_HOMES = {
    "DiffusionMDP": "mdp",
    "DiffusionMDPEnv": "gymnasium_mdp",
    "DiffusionMDPVectorEnv": "gymnasium_mdp",
    "DiffusionMRP": "mrp",
    "DiffusionMRPEnv": "gymnasium_mrp",
    "DiffusionMRPVectorEnv": "gymnasium_mrp",
}

__all__ = [*_HOMES]

if TYPE_CHECKING:
    from diffrl.envs.gymnasium_mdp import DiffusionMDPEnv as DiffusionMDPEnv
    from diffrl.envs.gymnasium_mdp import DiffusionMDPVectorEnv as DiffusionMDPVectorEnv
    from diffrl.envs.gymnasium_mrp import DiffusionMRPEnv as DiffusionMRPEnv
    from diffrl.envs.gymnasium_mrp import DiffusionMRPVectorEnv as DiffusionMRPVectorEnv
    from diffrl.envs.mdp import DiffusionMDP as DiffusionMDP
    from diffrl.envs.mrp import DiffusionMRP as DiffusionMRP
else:  # hidden from type checkers, which would take any name for granted

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'diffrl.envs' has no attribute {name!r}")
        value = getattr(import_module(f"diffrl.envs.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
