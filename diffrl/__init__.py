"""Denoising as reinforcement learning: the public names, each imported on its first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import gymnasium

__version__ = "0.1.0"

# name → the module that defines it; "" marks a submodule
_HOMES = {
    "CPS": "sde_samplers",
    "DDIM": "samplers",
    "DDPM": "schedules",
    "EDM": "schedules",
    "VP": "schedules",
    "Ancestral": "samplers",
    "Denoiser": "denoisers",
    "DenoisingPolicy": "policies",
    "EDMStochastic": "samplers",
    "EmpiricalDenoiser": "denoisers",
    "Euler": "samplers",
    "Flow": "schedules",
    "FlowSDE": "sde_samplers",
    "GaussianDenoiser": "denoisers",
    "Heun": "samplers",
    "MixtureDenoiser": "denoisers",
    "Multistep": "consistency_sampler",
    "check": "checks",
    "finetune": "finetuning",
    "load": "runs",
    "load_tuned": "tuning_experiment",
    "sample": "samplers",
    "sample_chain": "trajectories",
    "data": "",
    "diagnostics": "",
    "envs": "",
    "metrics": "",
    "networks": "",
    "objectives": "",
    "recipes": "",
    "returns": "",
    "rewards": "",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from diffrl import data as data
    from diffrl import diagnostics as diagnostics
    from diffrl import envs as envs
    from diffrl import metrics as metrics
    from diffrl import networks as networks
    from diffrl import objectives as objectives
    from diffrl import recipes as recipes
    from diffrl import returns as returns
    from diffrl import rewards as rewards
    from diffrl.checks import check as check
    from diffrl.consistency_sampler import Multistep as Multistep
    from diffrl.denoisers import Denoiser as Denoiser
    from diffrl.denoisers import EmpiricalDenoiser as EmpiricalDenoiser
    from diffrl.denoisers import GaussianDenoiser as GaussianDenoiser
    from diffrl.denoisers import MixtureDenoiser as MixtureDenoiser
    from diffrl.finetuning import finetune as finetune
    from diffrl.policies import DenoisingPolicy as DenoisingPolicy
    from diffrl.runs import load as load
    from diffrl.samplers import DDIM as DDIM
    from diffrl.samplers import Ancestral as Ancestral
    from diffrl.samplers import EDMStochastic as EDMStochastic
    from diffrl.samplers import Euler as Euler
    from diffrl.samplers import Heun as Heun
    from diffrl.samplers import sample as sample
    from diffrl.schedules import DDPM as DDPM
    from diffrl.schedules import EDM as EDM
    from diffrl.schedules import VP as VP
    from diffrl.schedules import Flow as Flow
    from diffrl.sde_samplers import CPS as CPS
    from diffrl.sde_samplers import FlowSDE as FlowSDE
    from diffrl.trajectories import sample_chain as sample_chain
    from diffrl.tuning_experiment import load_tuned as load_tuned
else:  # hidden from type checkers, which would take any name for granted

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'diffrl' has no attribute {name!r}")
        home = _HOMES[name]
        value = getattr(import_module(f"diffrl.{home}"), name) if home else import_module(f"diffrl.{name}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)


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
