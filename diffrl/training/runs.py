"""A run and its folder: config, versions, metrics.csv, results.json, checkpoints, samples, plots."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import safetensors.torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from torch import Tensor, nn
from yaml import YAMLError

from diffrl.data.dataset import Data
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.samplers.base import Sampler, Streams
from diffrl.diffusion.samplers.ddim import DDIM
from diffrl.errors import FileError, InputError
from diffrl.registry import user_modules
from diffrl.shell_words import setting
from diffrl.text_files import file_errors, read_json, read_text, remedy, write_atomically
from diffrl.training.build import Events, build_data, build_denoiser, build_sampler
from diffrl.training.checkpoints import (
    CheckpointError,
    latest_checkpoint,
    load_weights,
    read_identity,
    weight_sets,
)
from diffrl.training.evaluation import draw_samples
from diffrl.training.identity import ACCEPT, Facts, flat, identity_of, refuse_changes, require_kind
from diffrl.training.lock import RunFolderError, folder_lock
from diffrl.training.model_files import SUFFIX, events_of, read_model, read_tensors
from diffrl.training.model_folders import FILES, is_model_folder, read_folder
from diffrl.training.provenance import command_line, versions

__all__ = ["Run", "RunFolder", "RunFolderError", "load"]

GROUPS_SINCE_0_2 = {"rollouts": "chains", "updates": "steps"}
"""Groups without a choice in diffrl 0.1, and the option that runs of then had."""


@dataclass(frozen=True)
class RunFolder:
    """Where everything of a run lies.

    Args:
        path: the folder.
    """

    path: Path

    @classmethod
    @contextmanager
    def start(cls, config: Mapping[str, Any], label: str | None = None) -> Iterator["RunFolder"]:
        """Hold the folder to work in as its only writer: with ``resume`` an old run's, else a new one's.

        A new run's gets its configuration, command and the versions it runs on.

        Args:
            config: the run's configuration.
            label: what a new run is about, in the name of a folder that was not chosen; data and objective if None.

        Raises:
            RunFolderError: there is another run in the folder, or none to resume; or somebody else writes there.
            FileError: the folder cannot be written to.
        """
        if config["resume"] is not None:
            folder = cls.reopen(Path(config["resume"]))
            with folder_lock(folder.path):
                if identity_of(config) != identity_of(folder.config()):
                    folder._write_config(config)
                yield folder
            return
        label = label or f"{config['data']['name']}_{config['objective']['name']}"
        folder = cls(_new_folder(config["run_dir"], f"{label}_s{config['seed']}"))
        with folder_lock(folder.path):
            folder._begin(config)
            yield folder

    def _begin(self, config: Mapping[str, Any]) -> None:
        path = self.path
        if self.config_file.exists():
            raise RunFolderError(
                f"{path} already holds a run: continue it with {setting('resume', path)}, or choose another run_dir"
            )
        write_atomically(path / "versions.json", json.dumps(versions(), indent=2))
        write_atomically(path / "command.txt", command_line() + "\n")
        if modules := user_modules():
            write_atomically(path / "modules.json", json.dumps(modules))
        self._write_config(config)

    def _write_config(self, config: Mapping[str, Any]) -> None:
        whole = {**config, "run_dir": str(self.path), "resume": None, ACCEPT: False}
        write_atomically(self.config_file, OmegaConf.to_yaml(OmegaConf.create(whole)))

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """The folder of a run that was started.

        Raises:
            RunFolderError: it holds none.
        """
        folder = cls(path)
        if not folder.config_file.is_file():
            raise RunFolderError(f"{path} holds no run: there is no {folder.config_file.name} in it")
        return folder

    @classmethod
    def reopen(cls, path: Path) -> "RunFolder":
        """The folder of a run that is to be continued or loaded.

        Its methods must be known already: a file never names code to run.

        Raises:
            RunFolderError: it holds no run, or one that was made with modules that are not imported now.
        """
        folder, file = cls.open(path), path / "modules.json"
        made_with = read_json(file, list) if file.exists() else []
        if not all(isinstance(module, str) for module in made_with):
            raise folder._damaged(file, "a name of a module is no text")
        if missing := [module for module in made_with if module not in user_modules()]:
            raise RunFolderError(
                f"{path} was made with methods of {', '.join(missing)}: give --import {missing[0]}, or in "
                "Python import it first"
            )
        return folder

    @property
    def config_file(self) -> Path:
        """The whole configuration, written before anything else happens."""
        return self.path / "config.yaml"

    def config(self) -> dict[str, Any]:
        """The run's configuration.

        Raises:
            FileError: config.yaml cannot be read, or holds something else.
        """
        text = read_text(self.config_file)
        try:
            found = OmegaConf.to_container(OmegaConf.create(yaml.safe_load(text)), throw_on_missing=True)
        except (YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
            raise self._damaged(self.config_file, str(error)) from error
        config = {str(k): v for k, v in found.items()} if isinstance(found, dict) else {}
        if missing := [key for key in ("seed", "dtype") if key not in config]:
            raise self._damaged(self.config_file, f"there is no {' and no '.join(missing)} in it")
        for group, only in GROUPS_SINCE_0_2.items():
            if isinstance(config.get(group), dict):
                config[group] = {"name": only, **config[group]}
        return config

    def _damaged(self, file: Path, why: str) -> FileError:
        return FileError(f"{file} is not a run's ({' '.join(why.split())}): restore it from a copy")

    def results(self) -> dict[str, Any]:
        """What results.json holds so far; empty before the first objective is done.

        Raises:
            FileError: it cannot be read, or holds something else.
        """
        file = self.path / "results.json"
        if not file.exists():
            return {}
        results: dict[str, Any] = read_json(file)
        found = results.get("objectives", {"finetuning": results.get("finetuning")})
        if not isinstance(found, dict) or not all(isinstance(figures, dict) for figures in found.values()):
            raise self._damaged(file, "it holds figures neither of objectives nor of finetuning")
        for kind, errors in (pair for figures in found.values() for pair in _errors(figures)):
            numbers = errors.values() if isinstance(errors, dict) else [None]
            if not all(isinstance(number, int | float) for number in numbers):
                raise self._damaged(file, f"its {kind} is not made of numbers")
        return results

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Replace results.json at once."""
        write_atomically(self.path / "results.json", json.dumps(results, indent=2))

    def checkpoints(self, objective: str) -> Path:
        """Folder of an objective's checkpoints."""
        return self.path / "checkpoints" / objective

    def all_checkpoints(self) -> list[Path]:
        """Folders of checkpoints, one an objective."""
        return sorted(path for path in (self.path / "checkpoints").glob("*") if path.is_dir())

    def samples(self) -> dict[str, dict[str, Tensor]]:
        """Samples to look at: objective → network evaluations of each → [n, *E]; "data" → "0" → real ones."""
        return {f.stem: _load_samples(f) for f in sorted((self.path / "samples").glob("*.safetensors"))}

    def write_samples(self, objective: str, by_nfe: Mapping[str, Tensor]) -> None:
        """Replace the samples of an objective at once."""
        file = self.path / "samples" / f"{objective}.safetensors"
        tensors = {nfe: x.cpu().contiguous() for nfe, x in by_nfe.items()}
        with file_errors(file, "written"):
            file.parent.mkdir(exist_ok=True)
            temporary = file.with_name(file.name + ".tmp")
            temporary.write_bytes(safetensors.torch.save(tensors))
            os.replace(temporary, file)


def _errors(figures: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What was measured at noise levels or numbers of evaluations, by its kind, as results.json has it."""
    kinds = ("value_error", "denoising_error", "map_error")
    yield from ((kind, figures[kind]) for kind in kinds if kind in figures)
    if (distance := figures.get("sample_distance")) is not None:
        yield "sample_distance", distance.get("by_nfe") if isinstance(distance, dict) else None
    quality = figures.get("quality", {})
    yield from (("quality", by_nfe) for by_nfe in (quality.values() if isinstance(quality, dict) else [None]))


def _load_samples(file: Path) -> dict[str, Tensor]:
    with file_errors(file):
        raw = file.read_bytes()
    try:
        return safetensors.torch.load(raw)
    except SafetensorError as error:
        raise FileError(f"{file} is damaged ({error}): restore it from a copy, or remove it") from error


@dataclass(frozen=True, repr=False)
class Run:
    """A run loaded from its folder, or a model from its file or folder.

    Args:
        denoiser: the averaged denoiser, in eval mode.
        config: the run's configuration; of a model its description.
        results: what results.json holds; of a model nothing.
        objective: name of the objective that trained the denoiser; of a model nothing.
        events: shape and number of classes of a sample.
        name: of the data; of a model its own.
        unaveraged: reads the weights of the last step, where those of the denoiser are averaged and both are kept.
    """

    denoiser: Denoiser
    config: dict[str, Any]
    results: dict[str, Any]
    objective: str
    events: Events
    name: str
    unaveraged: Callable[[], dict[str, Tensor]] | None = None

    def __repr__(self) -> str:
        shape, classes, _ = self.events
        return f"Run({self.name!r}, samples {shape}, {classes} classes)"

    @cached_property
    def data(self) -> Data:
        """The run's data set, built when it is first asked for.

        Raises:
            DataError: it is not there any more.
            InputError: a model tells nothing of data.
        """
        if "data" not in self.config:
            raise InputError(f"{self.name} is a model file or folder, and tells nothing of data")
        return build_data(self.config)

    @property
    def sampler(self) -> Sampler:
        """The reverse step that it is sampled with: the run's; of a model the one that it tells, else DDIM."""
        return build_sampler(self.config) if "sampler" in self.config else DDIM()

    def sample(
        self,
        samples: int,
        *,
        num_steps: int,
        seed: int = 0,
        guidance_scale: float = 1.0,
        sampler: Sampler | None = None,
        at_once: int = 1000,
        streams: Streams = "added",
    ) -> Tensor:
        """Samples [samples, *E] on a grid of `num_steps` levels, each with noise of its own.

        Args:
            samples: how many.
            num_steps: noise levels N.
            seed: ≥ 0; by default sample j comes from a generator seeded by seed + j.
            guidance_scale: see `diffrl.diffusion.guidance.GuidedDenoiser`; 1 is off.
            sampler: the reverse step; None: its own, `sampler`.
            at_once: drawn side by side; this changes no sample.
            streams: see `diffrl.diffusion.samplers.Noise.of_rows`.
        """
        return draw_samples(
            self.denoiser,
            self.events,
            sampler or self.sampler,
            num_steps=num_steps,
            samples=samples,
            seed=seed,
            guidance_scale=guidance_scale,
            batch_size=at_once,
            streams=streams,
        )[0]


def load(
    path: str | Path,
    objective: str | None = None,
    *,
    network: nn.Module | None = None,
    weights: str = "ema",
) -> Run:
    """Load a model, or the averaged denoiser, configuration and results of a run folder.

    A model is a file of `diffrl.save`, a folder of `diffrl.save_pretrained`, or that of a diffusers pipeline of images.
    Of a run folder neither the data nor the state of the optimiser is needed. Nothing that a file says is run.

    Args:
        path: the file or the folder.
        objective: of a run folder, which objective's denoiser; the run's main one if None.
        network: of a model, the network that its weights go into: needed for one of your own.
        weights: "ema", of what has both "model", without the average, or of a run "ema_500000", of that half-life in
            `ema.also`.

    Raises:
        RunFolderError: the folder holds no training run.
        RunChanged: config.yaml says another model than the checkpoint's.
        CheckpointError: there is no checkpoint of that objective, or it is damaged.
        FileError: a file is missing or damaged, or no model of diffrl.
        InputError: the run kept no such weights.
    """
    path = Path(path)
    if is_model_folder(path):
        denoiser, description = read_folder(path, weights, network)
        file = path / FILES["model"]
        last = partial(_weights_in, file) if weights != "model" and file.is_file() else None
        return Run(denoiser, description, {}, "", events_of(description), path.resolve().name, last)
    if path.is_file() or network is not None or path.suffix == SUFFIX:
        denoiser, description = read_model(path, network)
        return Run(denoiser.eval(), description, {}, "", events_of(description), path.name)
    folder = RunFolder.reopen(path)
    config = folder.config()
    require_kind(path, config, "train")
    objective = objective or config["objective"]["name"]
    newest = latest_checkpoint(folder.checkpoints(objective))
    if newest is None:
        raise CheckpointError(
            f"{folder.checkpoints(objective)} holds no checkpoint: has {objective} been trained?"
        )
    known, kept = read_identity(newest), [name for name in weight_sets(newest) if name != "target"]
    if weights not in kept:
        raise InputError(f"weights is {weights!r}, but {newest} has {', '.join(kept)}: give one of them")
    _refuse_another_model(known, config, newest)
    if "data.event_shape" in known:
        shape, shares = known["data.event_shape"], known.get("data.class_shares", ())
        events, name = Events(tuple(shape), known["data.num_classes"], tuple(shares)), known["data.title"]
    else:  # of diffrl 0.2 and before
        data = build_data(config)
        events, name = Events(data.event_shape, data.num_classes, data.class_shares), data.name
    denoiser = build_denoiser(config, events)
    try:
        denoiser.load_state_dict(load_weights(newest, weights))
    except RuntimeError as error:
        if isinstance(error, CheckpointError):
            raise
        reason = " ".join(str(error).split())
        raise CheckpointError(f"checkpoint {newest} is of another network: {reason}") from error
    last = partial(load_weights, newest, "model") if weights != "model" else None
    return Run(denoiser.eval(), config, folder.results(), objective, events, name, last)


def _weights_in(file: Path) -> dict[str, Tensor]:
    return read_tensors(file)[0]


def _refuse_another_model(known: Facts, config: Mapping[str, Any], checkpoint: Path) -> None:
    """The weights of a checkpoint mean something in the model only that they were trained in."""
    of_model = ("process.", "network.", "denoiser.", "dtype")
    now = {key: value for key, value in flat(config).items() if key.startswith(of_model)}
    kept = {key: value for key, value in known.items() if key in now}
    refuse_changes(kept, now, of=checkpoint, steps="")


def _new_folder(chosen: str | None, name: str) -> Path:
    """The folder that was chosen, or one of that name that nobody else has: runs of the same second are numbered."""
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    path = first = Path("runs") / f"{now}_{name}" if chosen is None else Path(chosen)
    number = 1
    while True:
        try:
            path.mkdir(parents=True, exist_ok=chosen is not None)
        except OSError as error:
            if not (isinstance(error, FileExistsError) and chosen is None):
                raise RunFolderError(
                    f"{path} cannot be made a run folder ({error.strerror}): {remedy(error)}; run_dir is its place"
                ) from error
            number += 1
            path = first.with_name(f"{first.name}_{number}")
        else:
            return path
