"""The config groups: `register` stores a schema for every name in the library's registries."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from diffrl.configs.plans import CompareConfig
from diffrl.configs.schema import schema
from diffrl.data.registry import DATASETS
from diffrl.diffusion.chains import Chain
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.networks.registry import NETWORKS
from diffrl.diffusion.samplers.registry import SAMPLERS
from diffrl.diffusion.schedules.registry import PROCESSES
from diffrl.diffusion.starts import STARTS
from diffrl.diffusion.trajectories import ChainSampler
from diffrl.finetuning.build import recipe_config
from diffrl.finetuning.credit.registry import CREDITS
from diffrl.finetuning.evaluation import EarlyStop, TuningEvaluation
from diffrl.finetuning.finetuner import Iterations
from diffrl.finetuning.methods.registry import METHODS
from diffrl.finetuning.models import MODELS
from diffrl.finetuning.placement.registry import PLACEMENTS
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.recipe import Recipe, Regulariser
from diffrl.finetuning.rollouts.registry import ROLLOUTS
from diffrl.finetuning.surrogate import SURROGATES
from diffrl.finetuning.updates import UPDATES
from diffrl.objectives.registry import OBJECTIVES
from diffrl.registry import Registry
from diffrl.rewards.black_box import BlackBox
from diffrl.rewards.registry import REWARDS
from diffrl.training.evaluation import Evaluation
from diffrl.training.optim import FinetuningOptim, Optim
from diffrl.training.trainer import Average, Length, Target

__all__ = ["FinetuneConfig", "TrainConfig", "register"]


GROUPS: tuple[Registry, ...] = (
    *(DATASETS, PROCESSES, NETWORKS, SAMPLERS, STARTS, OBJECTIVES),
    *(MODELS, REWARDS, ROLLOUTS, PLACEMENTS, CREDITS, UPDATES, SURROGATES),
)
"""Registries whose names are the options of a config group."""

SINGLE: tuple[tuple[str, str, tuple[Callable[..., Any], ...], tuple[str, ...]], ...] = (
    ("chain", "default", (Chain, ChainSampler), ("process", "offset", "chain", "starts")),
    ("denoiser", "default", (Denoiser,), ("network", "process")),
    ("optim", "default", (Optim,), ()),
    ("optim", "finetuning", (FinetuningOptim,), ()),
    ("ema", "default", (Average,), ()),
    ("target", "default", (Target,), ()),
    ("trainer", "default", (Length,), ()),
    ("eval", "default", (Evaluation,), ()),
    ("policy", "default", (DenoisingPolicy,), ("denoiser", "sampler", "process")),
    ("reward_calls", "default", (BlackBox,), ("reward",)),
    ("regulariser", "default", (Regulariser,), ()),
    ("loop", "default", (Iterations,), ()),
    ("evaluation", "default", (TuningEvaluation,), ()),
    ("stop", "default", (EarlyStop,), ()),
)
"""Groups of one constructor each: group, option, what the options go to, parameters that are no options."""


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


@dataclass
class FinetuneConfig:
    """What a fine-tuning run is made of; each `Any` is a group with a schema of its own."""

    model: Any = MISSING
    sampler: Any = MISSING
    policy: Any = MISSING
    reward: Any = MISSING
    reward_calls: Any = MISSING
    heldout_reward: Any = MISSING
    rollouts: Any = MISSING
    placement: Any = MISSING
    credit: Any = MISSING
    updates: Any = MISSING
    surrogate: Any = MISSING
    regulariser: Any = MISSING
    optim: Any = MISSING
    loop: Any = MISSING
    evaluation: Any = MISSING
    stop: Any = MISSING
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    logger: str = "csv"
    run_dir: str | None = None
    resume: str | None = None
    compare: list[str] = field(default_factory=list)
    """Names of methods to run beside each other; with none, one run is made."""
    methods: dict[str, list[str]] = field(default_factory=dict)
    """Methods that can be compared, each with its words for the command line."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Of a comparison."""
    out: str = MISSING
    """Folder of a comparison."""
    workers: int = 2
    """Processes of a comparison, with one thread each."""
    pretrain: list[str] = field(default_factory=list)
    """What to train where model.path is null: words for the command line of `examples/train_td_lambda.py`."""


def register() -> None:
    """Fill Hydra's store."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    store.store(name="finetune_schema", node=FinetuneConfig)
    store.store(name="compare_schema", node=CompareConfig)
    for registry in GROUPS:
        for entry in registry.entries():
            store.store(
                group=registry.kind,
                name=entry.name,
                node=schema(entry.name, *entry.functions, omit=registry.omit),
            )
    for option in REWARDS:
        node = schema(option, REWARDS[option], omit=REWARDS.omit)
        store.store(group="heldout_reward", name=option, node=node)
    store.store(group="heldout_reward", name="none", node=schema("none"))
    for name, make in METHODS.items():
        store.store(group=METHODS.kind, name=name, node=_recipe_node(make()), package="_global_")
    for group, option, functions, omit in SINGLE:
        store.store(group=group, name=option, node=schema(group, *functions, omit=omit, tag=False))


def _recipe_node(recipe: Recipe) -> dict[str, Any]:
    """The configuration that chooses the pieces of a recipe."""
    chosen, given = recipe_config(recipe)
    defaults = [{f"override /{group}": option} for group, option in chosen.items()]
    return {"defaults": defaults, **given}
