"""From the words of a command line to the cells of a fine-tuning comparison, and to the model that is tuned."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffrl.configs.cli import explain
from diffrl.experiments.train import run_experiment
from diffrl.experiments.tuning_comparison import TuningCell
from diffrl.training.runs import RunFolder

__all__ = ["base_run", "plan_tuning"]

COMMON = ("out", "run_dir", "resume", "compare", "seeds", "seed", "workers")


def _composed(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """A configuration, as a command would compose it."""
    # in a job, the job's own search path serves: it has the user's --config-dir too
    in_job = GlobalHydra.instance().is_initialized()
    with nullcontext() if in_job else initialize_config_module("diffrl.configs", version_base="1.3"):
        plain = OmegaConf.to_container(compose(name, list(overrides)), resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def base_run(pretrain: Sequence[str], root: Path, *, progress: bool = True) -> Path:
    """The folder of the training run that the words describe: trained now unless it is there.

    Args:
        pretrain: words for the command line of `examples/train_td_lambda.py`.
        root: where such runs lie, each in a folder named by its words.
        progress: whether to show the training's bar.

    Raises:
        ValueError: a word that is no setting.
    """
    name = hashlib.sha256("\n".join(pretrain).encode()).hexdigest()[:10]
    path = root / f"base_{name}"
    try:
        config = _composed("train", [*pretrain, "compare=false", "run_dir=base"])
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"pretrain: {explain(error)}") from error
    begun = (path / "config.yaml").exists()
    if not (begun and RunFolder.open(path).results().get("objectives")):
        stored = {**RunFolder.open(path).config(), "resume": str(path)} if begun else None
        run_experiment(stored or {**config, "run_dir": str(path)}, progress=progress)
    return path


def plan_tuning(config: Mapping[str, Any], words: Sequence[str], base: str) -> list[TuningCell]:
    """Cells of every method of ``config["compare"]`` and seed of ``config["seeds"]``.

    Args:
        config: what Hydra composed for the command.
        words: the command line's overrides, which hold for every method.
        base: the run folder that is tuned.

    Raises:
        ValueError: a method that is not known, or a word of it that is no setting, with the method's name.
    """
    # a group is chosen once: by the method, else by the command line
    cells = []
    for method in config["compare"]:
        if method not in config["methods"]:
            raise ValueError(f"compare: no method {method!r}: there are {', '.join(config['methods'])}")
        own = config["methods"][method]
        chosen = {word.partition("=")[0].lstrip("+") for word in own} | set(COMMON)
        kept = [word for word in words if word.partition("=")[0] not in chosen]
        try:
            composed = _composed("finetune", [*kept, *own, f"model.path='{base}'", "compare=[]", "out=cells"])
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(f"compare, {method}: {explain(error)}") from error
        composed |= {"methods": {}, "pretrain": []}  # what else could be run is no part of a cell
        cells += [TuningCell(method, seed, {**composed, "seed": seed}) for seed in config["seeds"]]
    return cells
