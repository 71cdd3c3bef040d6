"""The config groups: `register` stores a schema for every name in the library's registries."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from diffrl.chains import Chain
from diffrl.configs.plans import CompareConfig
from diffrl.configs.schema import schema
from diffrl.data import DATASETS
from diffrl.denoisers import Denoiser
from diffrl.evaluation import Evaluation
from diffrl.networks import NETWORKS
from diffrl.objectives.schemes import OBJECTIVES
from diffrl.samplers import SAMPLERS
from diffrl.schedules import PROCESSES
from diffrl.starts import STARTS
from diffrl.trainer import Average, Length, Optim, Target
from diffrl.trajectories import ChainSampler

__all__ = ["TrainConfig", "register"]


@dataclass
class TrainConfig:
    """What a training run is made of; each `Any` is a group with a schema of its own."""

    data: Any = MISSING
    process: Any = MISSING
    chain: Any = MISSING
    starts: Any = MISSING
    network: Any = MISSING
    denoiser: Any = MISSING
    objective: Any = MISSING
    sampler: Any = MISSING
    optim: Any = MISSING
    ema: Any = MISSING
    target: Any = MISSING
    trainer: Any = MISSING
    eval: Any = MISSING
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    logger: str = "csv"
    guidance_scale: float = 1.0
    compare: bool = True
    run_dir: str | None = None
    resume: str | None = None


def register() -> None:
    """Fill Hydra's store."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    store.store(name="compare_schema", node=CompareConfig)

    def group(name: str, registry: Mapping[str, Callable[..., Any]], omit: tuple[str, ...] = ()) -> None:
        for option, function in registry.items():
            store.store(group=name, name=option, node=schema(option, function, omit=omit))

    group("data", DATASETS)
    group("process", PROCESSES)
    group("network", NETWORKS, omit=("event_shape", "num_classes"))
    group("sampler", SAMPLERS)
    group("starts", STARTS)
    drawn = ("denoiser", "process", "x0", "cond", "sigma", "noise", "fresh_noise", "generator")
    for option, scheme in OBJECTIVES.items():
        functions = [f for f in (scheme.loss, scheme.draw) if f is not None]
        store.store(group="objective", name=option, node=schema(option, *functions, omit=drawn))

    def single(name: str, *functions: Callable[..., Any], omit: tuple[str, ...] = ()) -> None:
        store.store(group=name, name="default", node=schema(name, *functions, omit=omit, tag=False))

    single("chain", Chain, ChainSampler, omit=("process", "offset", "chain", "starts"))
    single("denoiser", Denoiser, omit=("network", "process"))
    single("optim", Optim)
    single("ema", Average)
    single("target", Target)
    single("trainer", Length)
    single("eval", Evaluation)
