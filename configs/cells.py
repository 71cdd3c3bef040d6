"""From a plan to the cells of a comparison, each with the configuration that Hydra composes for it."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffrl.configs.cli import explain
from diffrl.configs.groups import register
from diffrl.experiments.comparison import PLACE, Cell, Comparison, Study, grid_scheme

__all__ = ["plan_comparison"]


def plan_comparison(plan: Mapping[str, Any]) -> Comparison:
    """Studies and cells of a plan.

    Args:
        plan: what `diffrl.configs.plans.PlanConfig` describes.

    Raises:
        ValueError: a name or an override that is not known, with the study, case and scheme it stands in.
    """
    register()  # a launcher's worker process has but copies of the schemas, which do not compose
    studies, cells = [], []
    for name, given in plan["studies"].items():
        schemes = dict(given["schemes"])
        axes: dict[str, tuple[str, ...]] = {}
        if given["axes"]:
            keys, axes = _axes(name, given["axes"])
            for values in itertools.product(*axes.values()):
                scheme = grid_scheme(dict(zip(axes, values, strict=True)))
                schemes[scheme] = [f"{key}={value}" for key, value in zip(keys, values, strict=True)]
        cases, seeds = tuple(given["cases"]), tuple(given["seeds"])
        study = Study(
            name, given["title"], given["baseline"], given["matched"], cases, tuple(schemes), seeds, axes
        )
        studies.append(study)
        for case, (scheme, overrides) in itertools.product(cases, schemes.items()):
            where = f"study {name}, case {case}, scheme {scheme}"
            if case not in plan["cases"]:
                raise ValueError(
                    f"study {name}: no case {case!r} in the plan: there are {', '.join(plan['cases'])}"
                )
            words = [*plan["cases"][case], *given["overrides"], *overrides]
            words = [w.replace("{seed}", "${seed}").replace("{data_dir}", plan["data_dir"]) for w in words]
            for seed, identity, config in _configs(where, words, seeds):
                cells.append(Cell(name, case, scheme, seed, identity, config))
    sigmas = tuple(f"{sigma:g}" for sigma in plan["score_sigmas"])
    return Comparison(plan["name"], sigmas, tuple(studies), tuple(cells))


def _axes(study: str, axes: Mapping[str, str]) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """Keys of the axes, and values by their labels."""
    keys, values = [], {}
    for label, words in axes.items():
        key, equals, listed = words.partition("=")
        if not equals or not all(listed.split(",")):
            raise ValueError(f"study {study}: axis {label} is {words!r}: write key=value,value,...")
        keys.append(key)
        values[label] = tuple(value.strip() for value in listed.split(","))
    return keys, values


def _configs(
    where: str, overrides: Sequence[str], seeds: Sequence[int]
) -> list[tuple[int, str, dict[str, Any]]]:
    """Seed, identity and configuration of each seed."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        if swept := [override.input_line for override in parsed if override.is_sweep_override()]:
            raise ValueError(f"{where}: {swept[0]} has several values: write a scheme for each, or an axis")
        values = [o for o in parsed if "." in o.key_or_group and o.type == OverrideType.CHANGE]
        config = _compose(tuple(str(o.input_line) for o in parsed if o not in values)).copy()
        for override in values:
            OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
        found = []
        for seed in seeds:
            config.seed = seed
            plain = OmegaConf.to_container(config, resolve=True)
            assert isinstance(plain, dict)
            deviations = json.dumps(_deviations(config), sort_keys=True)
            identity = hashlib.sha256(deviations.encode()).hexdigest()[:10]
            found.append((seed, identity, {str(k): v for k, v in plain.items() if k not in PLACE}))
        return found
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"{where}: {explain(error)}") from error


@cache
def _compose(overrides: tuple[str, ...]) -> DictConfig:
    """The `train` configuration of a choice of groups, which takes a tenth of a second."""
    # in a job, the job's own search path serves: it has the user's --config-dir too
    in_job = GlobalHydra.instance().is_initialized()
    with nullcontext() if in_job else initialize_config_module("diffrl.configs", version_base="1.3"):
        return compose("train", [*overrides, "compare=false", "run_dir=cell"])


def _deviations(config: DictConfig) -> dict[str, Any]:
    """What differs from the code's defaults: an option that the code gains later changes nothing here."""
    default = OmegaConf.structured(OmegaConf.get_type(config))
    found = {}
    for key in config:
        if key in PLACE:
            continue
        value, usual = config[key], default._get_node(key)
        if isinstance(value, DictConfig):
            usual = OmegaConf.structured(OmegaConf.get_type(value))
            value, usual = (OmegaConf.to_container(c, resolve=True) for c in (value, usual))
            assert isinstance(value, dict) and isinstance(usual, dict)
            found[str(key)] = {k: v for k, v in value.items() if k == "name" or v != usual.get(k)}
        elif usual is None or value != usual._value():
            found[str(key)] = value
    return found
