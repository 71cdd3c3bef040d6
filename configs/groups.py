"""The config groups: `register` stores a schema for every name in the library's registries."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from diffrl.configs.plans import CompareConfig
from diffrl.configs.schema import schema
from diffrl.data.dataset_all import DATASETS
from diffrl.diffusion.chains import Chain
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.networks import NETWORKS
from diffrl.diffusion.samplers.loop import SAMPLERS
from diffrl.diffusion.schedules.all import PROCESSES
from diffrl.diffusion.starts import STARTS
from diffrl.diffusion.trajectories import ChainSampler
from diffrl.experiments.finetune import RewardCalls
from diffrl.finetuning.credit.standardised import CREDITS
from diffrl.finetuning.evaluation import EarlyStop, TuningEvaluation
from diffrl.finetuning.finetuner import Iterations
from diffrl.finetuning.models import MODELS
from diffrl.finetuning.placement.terminal import PLACEMENTS
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.recipes import Rollouts
from diffrl.finetuning.surrogate import SURROGATES, Regulariser
from diffrl.finetuning.updates import Updates
from diffrl.objectives.schemes import OBJECTIVES
from diffrl.rewards.shipped import REWARDS
from diffrl.training.evaluation import Evaluation
from diffrl.training.optim import Optim
from diffrl.training.trainer import Average, Length, Target

__all__ = ["FinetuneConfig", "TrainConfig", "register"]


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

    def group(name: str, registry: Mapping[str, Callable[..., Any]], omit: tuple[str, ...] = ()) -> None:
        for option, function in registry.items():
            store.store(group=name, name=option, node=schema(option, function, omit=omit))

    group("data", DATASETS)
    group("process", PROCESSES)
    group("network", NETWORKS, omit=("event_shape", "num_classes"))
    group("sampler", SAMPLERS)
    group("starts", STARTS)
    group("model", MODELS, omit=("device", "seed"))
    group("placement", PLACEMENTS)
    group("credit", CREDITS)
    group("surrogate", SURROGATES)
    for name in ("reward", "heldout_reward"):
        group(name, REWARDS, omit=("classifier", "index", "mixture"))
    store.store(group="heldout_reward", name="none", node=schema("none"))
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
    single("policy", DenoisingPolicy, omit=("denoiser", "sampler", "process"))
    single("reward_calls", RewardCalls)
    single("rollouts", Rollouts)
    single("updates", Updates)
    single("regulariser", Regulariser)
    single("loop", Iterations)
    single("evaluation", TuningEvaluation)
    single("stop", EarlyStop)
