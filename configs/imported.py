"""To train on from a pipeline of diffusers by one word, `init=FOLDER`: its network, process and form come with it."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from diffrl.diffusion.pipelines.unconditional import import_pipeline
from diffrl.diffusion.schedules.registry import PROCESSES
from diffrl.shell_words import override
from diffrl.text_files import read_json

__all__ = ["with_imported_model"]

INDEX = "model_index.json"
FORM = ("prediction_type", "time_input", "scale_input")


def with_imported_model(words: Sequence[str]) -> list[str]:
    """Words for `train`; of a start in a folder of diffusers, those of its model stand first, and yours hold.

    Of a group that you choose yourself none is added; what does not fit the weights is refused later, by its name. The
    configuration of the run is whole, so that it needs the folder no more.

    Args:
        words: overrides, such as ``init=my_ddpm``.

    Raises:
        NoPipeline, InputError, MissingExtra: see `import_pipeline`.
    """
    given = {word.partition("=")[0]: word for word in words}
    if "init" not in given or "resume" in given:
        return [*words]
    start = OverridesParser.create().parse_override(given["init"]).value()
    if not isinstance(start, str) or not start or not (Path(start) / INDEX).is_file():
        return [*words]
    folder = Path(start)
    denoiser, scheduler = import_pipeline(folder), read_json(folder / INDEX)["scheduler"][-1]
    process: Any = denoiser.process
    options = {
        "network": {"name": "diffusers_unet", **denoiser.network.options},  # type: ignore[dict-item]
        "process": {
            "name": PROCESSES.name_of(process),
            **{f.name: getattr(process, f.name) for f in fields(process) if f.init},
        },
        "denoiser": {name: getattr(denoiser, name) for name in FORM},
        "sampler": {"name": "ancestral" if scheduler == "DDPMScheduler" else "ddim"},
    }
    return [*_words({group: told for group, told in options.items() if group not in given}), *words]


def _words(groups: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A word for the choice in each group, and one for each of its options."""
    found = []
    for group, options in groups.items():
        found += [f"{group}={options['name']}"] if "name" in options else []
        found += [f"{group}.{name}={_value(value)}" for name, value in options.items() if name != "name"]
    return found


def _value(value: Any) -> str:
    """A value as Hydra's grammar writes it."""
    if isinstance(value, str):
        return override("", value).removeprefix("=")
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_value(v)}" for key, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_value, value)) + "]"
    return "null" if value is None else str(value)
