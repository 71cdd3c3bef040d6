"""Small configurations, composed in this process as a command would compose them."""

from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from diffrl.configs.cli import settings
from diffrl.configs.groups import register

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


def composed(*overrides: str, name: str = "train") -> DictConfig:
    """What Hydra composes."""
    register()
    GlobalHydra.instance().clear()
    with initialize_config_module("diffrl.configs", version_base="1.3"):
        return compose(name, overrides=list(overrides))


def small(*overrides: str) -> dict[str, Any]:
    """Configuration of a run that takes a fraction of a second; a chosen group keeps its own options."""
    chosen = {override.partition("=")[0] for override in overrides}
    given = [word for word in SMALL if word.partition(".")[0] not in chosen or "." not in word]
    given = [word for word in given if word.partition("=")[0] not in chosen] + list(overrides)
    return settings(composed(*given), given)
