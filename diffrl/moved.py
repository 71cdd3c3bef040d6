"""Import paths of diffrl 0.1: four are aliases still, the others are refused with the new path."""

from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["MovedModules"]

ALIASES = {
    "diagnostics": "metrics.diagnostics",
    "networks": "diffusion.networks",
    "recipes": "finetuning.recipes",
    "returns": "rl.returns",
}
MOVED = {
    "advantages": "rl.advantages",
    "agreement": "experiments.reports.agreement",
    "build": "training.build",
    "chains": "diffusion.chains",
    "checkpoints": "training.checkpoints",
    "checks": "finetuning.checks",
    "comparison": "experiments.comparison",
    "consistency_sampler": "diffusion.samplers.consistency",
    "credit": "finetuning.credit",
    "critics": "finetuning.credit.critic",
    "denoisers": "diffusion.denoisers",
    "dense_rewards": "finetuning.placement.similarity",
    "diagnostic_plots": "experiments.reports.target_figure",
    "ema": "training.ema",
    "estimators": "rl.estimators",
    "evaluation": "training.evaluation",
    "experiment": "experiments.train",
    "findings": "experiments.study_findings",
    "finetuner": "finetuning.finetuner",
    "image_files": "data.image_files",
    "kernels": "diffusion.samplers.base",
    "latent_rewards": "rewards.decoded",
    "lora": "diffusion.pipelines.lora",
    "mixtures": "data.mixtures",
    "objectives.ddpo": "finetuning.methods.ddpo",
    "objectives.networks": "objectives.denoiser_loss",
    "objectives.sdpo": "finetuning.methods.sdpo",
    "objectives.surrogates": "finetuning.surrogate",
    "pipeline_parts": "diffusion.pipelines.parts",
    "pipelines": "diffusion.pipelines.denoiser",
    "planar": "data.synthetic",
    "plots": "experiments.reports.run_figure",
    "policies": "finetuning.policy",
    "predictions": "diffusion.predictions",
    "processes": "diffusion.posterior",
    "references": "finetuning.reference",
    "report": "experiments.reports.training",
    "report_figures": "experiments.reports.training_figures",
    "reward_cache": "rewards.cache",
    "reward_placement": "finetuning.placement",
    "reward_workers": "rewards.calls",
    "rollouts": "finetuning.rollouts.chains",
    "runs": "training.runs",
    "samplers": "diffusion.samplers",
    "schedules": "diffusion.schedules",
    "sde_samplers": "diffusion.samplers.sde",
    "shipped_rewards": "rewards",
    "starts": "diffusion.starts",
    "statistics": "metrics.seeds",
    "summary": "experiments.reports.run_table",
    "tables": "training.table",
    "trainer": "training.trainer",
    "trajectories": "diffusion.trajectories",
    "tunable_models": "finetuning.models",
    "tuner_checks": "finetuning.run_checks",
    "tuning_comparison": "experiments.comparison",
    "tuning_evaluation": "finetuning.evaluation",
    "tuning_experiment": "experiments.finetune",
    "tuning_figures": "experiments.reports.finetuning_figures",
    "tuning_findings": "experiments.method_findings",
    "tuning_report": "experiments.reports.finetuning",
    "updates": "finetuning.updates.steps",
    "vp_curves": "diffusion.schedules.curves",
}


class MovedModules(MetaPathFinder):
    """Finds modules by the names that they had: an alias, or an error that names the new path."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of an alias; None for all that is not ours.

        Raises:
            ModuleNotFoundError: the module has moved.
        """
        old = fullname.removeprefix("diffrl.")
        if old == fullname:
            return None
        if old in ALIASES:
            return ModuleSpec(fullname, _Alias(f"diffrl.{ALIASES[old]}"))
        if old in MOVED:
            raise ModuleNotFoundError(f"{fullname} is diffrl.{MOVED[old]} since version 0.2", name=fullname)
        return None


class _Alias(Loader):
    """Gives the module of another name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(self.name)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # it is loaded already, by its own name
