"""The config groups: `register` stores a schema for every name in the library's registries."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.default_element import ConfigDefault, GroupDefault
from hydra.core.global_hydra import GlobalHydra
from omegaconf import MISSING, OmegaConf

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
from diffrl.finetuning.models.registry import MODELS
from diffrl.finetuning.placement.registry import PLACEMENTS
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.recipe import Recipe, Regulariser
from diffrl.finetuning.rollouts.registry import ROLLOUTS
from diffrl.finetuning.surrogate import SURROGATES
from diffrl.finetuning.updates.registry import UPDATES
from diffrl.objectives.registry import OBJECTIVES
from diffrl.objectives.stand_ins import StandIn
from diffrl.ranks import FIRST_TIMEOUT, RANK_TIMEOUT
from diffrl.registry import Registry
from diffrl.rewards.black_box import BlackBox
from diffrl.rewards.registry import REWARDS
from diffrl.training.arithmetic import Arithmetic
from diffrl.training.ema import Average
from diffrl.training.evaluation import Evaluation
from diffrl.training.optim import FinetuningOptim, Optim
from diffrl.training.trainer import Length, Target

__all__ = ["FinetuneConfig", "TrainConfig", "commands_with", "register"]


GROUPS: tuple[Registry, ...] = (
    *(DATASETS, PROCESSES, NETWORKS, SAMPLERS, STARTS, OBJECTIVES),
    *(MODELS, REWARDS, ROLLOUTS, PLACEMENTS, CREDITS, UPDATES, SURROGATES),
)
"""Registries whose names are the options of a config group."""

SINGLE: tuple[tuple[str, str, tuple[Callable[..., Any], ...], tuple[str, ...]], ...] = (
    ("chain", "default", (Chain, ChainSampler, StandIn), ("process", "offset", "chain", "starts")),
    ("denoiser", "default", (Denoiser,), ("network", "process")),
    ("optim", "default", (Optim,), ()),
    ("optim", "finetuning", (FinetuningOptim,), ()),
    ("ema", "default", (Average,), ()),
    ("target", "default", (Target,), ()),
    ("trainer", "default", (Length, Arithmetic), ()),
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
class DiscreteTimes:
    """Of a process without derivatives: it chooses a sampler that asks for none, where no word chooses another."""

    defaults: list[Any] = field(default_factory=lambda: [{"override /sampler@_global_.sampler": "ddim"}])


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
    """Whether Monte Carlo and the schemes of `beside` are trained too."""
    beside: dict[str, Any] = field(default_factory=dict)
    """Further schemes by name, each with its settings that differ, such as {chain: {coupling: shared}}."""
    init: str | None = None
    """To start from: a run folder, a model of `diffrl.save` or `save_pretrained`, or a diffusers pipeline of images,
    which brings its network, process and form along; the run keeps a copy of the weights."""
    init_weights: str = "ema"
    """Of a run to start from: its averaged weights, "ema", or "ema_500000" of ema.also, or its last ones, "model"."""
    run_dir: str | None = None
    resume: str | None = None
    """Folder of a run to go on with."""
    extend: int | None = None
    """With `resume`: steps in all, more than the run was started with."""
    accept_changes: bool = False
    """With `resume`: whether settings, data and methods may differ from those of the checkpoint."""
    seeds: list[int] = field(default_factory=list)
    """Of several runs, for a table with intervals; with none, one run is made with `seed`."""
    workers: int = 2
    """Processes of several seeds, with one thread each."""
    rank_timeout: float = RANK_TIMEOUT
    """Seconds that a process which torchrun started waits for a sign of life of another."""
    first_timeout: float = FIRST_TIMEOUT
    """Seconds that the others wait for what the first one does alone, longer than any evaluation."""


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
    """Folder of a run to go on with."""
    extend: int | None = None
    """With `resume`: steps in all, more than the run was started with."""
    accept_changes: bool = False
    """With `resume`: whether settings, data and methods may differ from those of the checkpoint."""
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
    rank_timeout: float = RANK_TIMEOUT
    """Seconds that a process which torchrun started waits for a sign of life of another."""
    first_timeout: float = FIRST_TIMEOUT
    """Seconds that the others wait for what the first one does alone, longer than any evaluation."""


COMMANDS = {"train": TrainConfig, "finetune": FinetuneConfig, "compare": CompareConfig}
"""What each command's configuration must look like."""


def commands_with(key: str) -> list[str]:
    """The commands whose configuration has that key at its top."""
    return [name for name, made in COMMANDS.items() if key in {f.name for f in fields(made)}]


def register() -> None:
    """Fill Hydra's store with what is not there yet."""
    for name, made in COMMANDS.items():
        _fill(None, f"{name}_schema", (made,), partial(OmegaConf.structured, made))
    for registry in GROUPS:
        for entry in registry.entries():
            discrete = registry is PROCESSES and not getattr(entry.make, "continuous", True)
            bases = (DiscreteTimes,) if discrete else ()
            _fill_with_schema(registry.kind, entry.name, entry.functions, omit=registry.omit, bases=bases)
    for option, make in REWARDS.items():
        _fill_with_schema("heldout_reward", option, (make,), omit=REWARDS.omit)
    _fill_with_schema("heldout_reward", "none", ())
    for name, make in METHODS.items():
        _fill(METHODS.kind, name, (make,), partial(_recipe_node, make), package="_global_")
    for group, option, functions, omit in SINGLE:
        _fill_with_schema(group, option, functions, name=group, omit=omit, tag=False)
    OmegaConf.register_new_resolver("options_of", _options_of, replace=True)


_FILLED: dict[tuple[str | None, str], tuple[tuple[Callable[..., Any], ...], Any]] = {}
"""What `register` stored: for each group and option, the functions and the store's node."""


def _fill(
    group: str | None,
    option: str,
    functions: tuple[Callable[..., Any], ...],
    make: Callable[[], Any],
    package: str | None = None,
) -> None:
    """Store an option, unless the store holds it: all of them take longer than to compose a configuration."""
    store = ConfigStore.instance()
    folder = store.repo if group is None else store.repo.setdefault(group, {})
    place, file = (group, option), f"{option}.yaml"
    of, node = _FILLED.get(place, ((), None))
    if (
        of == functions and node is not None and folder.get(file) is node
    ):  # and no copy that a launcher sent along
        return
    store.store(group=group, name=option, node=make(), package=package)
    _FILLED[place] = functions, folder[file]


def _fill_with_schema(
    group: str,
    option: str,
    functions: tuple[Callable[..., Any], ...],
    *,
    name: str | None = None,
    omit: tuple[str, ...] = (),
    tag: bool = True,
    bases: tuple[type, ...] = (),
) -> None:
    make = partial(schema, name or option, *functions, omit=omit, tag=tag, bases=bases)
    _fill(group, option, functions, make)


def _options_of(command: str, choices: Mapping[str, Any]) -> str:
    """For a command's help: the options of the groups that it chooses from, a line for each group."""
    loader = GlobalHydra.instance().config_loader()
    groups = [group for group in choices if not group.startswith("hydra/")]
    known = {*groups, "defaults", *(f.name for f in fields(COMMANDS[command]))}

    def fits(experiment: str) -> bool:
        """Whether an experiment is one of this command: it and what it builds on set nothing that the command lacks."""
        found = loader.repository.load_config(f"experiment/{experiment}")  # type: ignore[attr-defined]
        chosen = {str(d.group).lstrip("/") for d in found.defaults_list if isinstance(d, GroupDefault)}
        built_on = [
            str(d.path) for d in found.defaults_list if isinstance(d, ConfigDefault) and not d.is_self()
        ]
        return {*found.config, *chosen} <= known and all(map(fits, built_on))

    options = {group: sorted(loader.get_group_options(group)) for group in sorted(groups)}
    if "experiment" in options:
        options["experiment"] = [*filter(fits, options["experiment"])]
    return "\n".join(f"{group}: {', '.join(names)}" for group, names in options.items())


def _recipe_node(make: Callable[[], Recipe]) -> dict[str, Any]:
    """The configuration that chooses the pieces of a recipe."""
    chosen, given = recipe_config(make())
    defaults = [{f"override /{group}": option} for group, option in chosen.items()]
    return {"defaults": defaults, **given}
