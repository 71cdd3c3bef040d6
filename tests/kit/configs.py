"""Small configurations, composed in this process as a command would compose them."""

from dataclasses import fields
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffrl.configs.cli import OF_FILES, settings
from diffrl.configs.groups import COMMANDS, register

FINETUNING = {
    "digits_tdm",
    "digits_tdm_r1",
    "finetune_credit",
    "finetune_credit_student",
    "finetune_critic",
    "finetune_rings",
    "lcm_ddpo",
    "sd15_ddpo",
    "sd35_flow_grpo",
    "sd35_tdm",
    "sd35_tdm_r1",
    "sd_turbo_sdpo",
    "zimage_tdm_r1",
}
"""Experiments of the command `finetune`."""

IMAGE_RECIPES = {"cifar10_edm", "cifar10_short", "cifar10_td_ct", "cifar10_td_edm", "folder64", "mnist"}
"""Experiments of the command `train` that want images, and mostly a GPU."""

SMALL = (
    "data=rings",
    "data.test_size=64",
    "network=mlp",
    "network.hidden=16",
    "network.depth=1",
    "chain.num_steps=6",
    "trainer.grad_steps=30",
    "trainer.batch_size=8",
    "trainer.report_every=4",
    "trainer.eval_every=10",
    "trainer.checkpoint_every=10",
    "eval.sigmas=[0.3,1]",
    "eval.points=32",
    "eval.num_steps=[2,4]",
    "eval.samples=40",
)

TINY = [
    "data=gmm", "network=mlp",
    "data.dim=2", "data.components=3", "data.test_size=64", "network.hidden=8", "network.depth=1",
    "network.x_features=4", "network.noise_features=4", "chain.num_steps=4", "chain.coupling=1.0",
    "trainer.grad_steps=6", "trainer.batch_size=4", "trainer.eval_every=2", "trainer.report_every=2",
    "trainer.checkpoint_every=2", "optim.warmup_steps=1",
    "eval.points=16", "eval.samples=16", "eval.num_steps=[2,3]",
]  # fmt: skip
"""Overrides of an experiment that trains for an instant on a mixture."""

MC, TD = ["objective=monte_carlo"], ["objective.lmbda=0"]


_BASES: dict[tuple[str, ...], tuple[list[Any], DictConfig]] = {}
"""What Hydra composed of choices of groups, with the nodes of its store at that time."""


def composed(*overrides: str, name: str = "train") -> DictConfig:
    """What Hydra composes; choices of groups are composed once in a process for all that share them."""
    register()
    GlobalHydra.instance().clear()
    try:
        words = OverridesParser.create().parse_overrides([*overrides])
        values = [word for word in words if _is_value(word, name)]
        config = _base(name, *(str(word.input_line) for word in words if word not in values)).copy()
        for word in values:
            OmegaConf.update(config, word.key_or_group, word.value(), merge=True)
        return config
    except (HydraException, OmegaConfBaseException):
        pass
    return _hydra_s(name, *overrides)  # which says in its own words what is wrong


def _is_value(word: Override, name: str) -> bool:
    key = word.key_or_group
    of_a_group = key in OF_FILES or isinstance(ConfigStore.instance().repo.get(key), dict)
    known = "." in key or key in {field.name for field in fields(COMMANDS[name])}
    return word.type == OverrideType.CHANGE and known and not of_a_group and not word.is_sweep_override()


def _base(*words: str) -> DictConfig:
    store = ConfigStore.instance().repo.values()
    nodes = [node for part in store for node in (part.values() if isinstance(part, dict) else (part,))]
    made_of, config = _BASES.get(words, ([], None))
    if config is None or [*map(id, made_of)] != [*map(id, nodes)]:  # a test may have registered a method
        _BASES[words] = nodes, (config := _hydra_s(*words))
    return config


def _hydra_s(name: str, *words: str) -> DictConfig:
    with initialize_config_module("diffrl.configs", version_base="1.3"):
        return compose(name, overrides=[*words])


def small(*overrides: str) -> dict[str, Any]:
    """Configuration of a run that takes a fraction of a second; a chosen group keeps its own options."""
    chosen = {override.partition("=")[0] for override in overrides}
    given = [word for word in SMALL if word.partition(".")[0] not in chosen or "." not in word]
    given = [word for word in given if word.partition("=")[0] not in chosen] + list(overrides)
    return settings(composed(*given), given)
