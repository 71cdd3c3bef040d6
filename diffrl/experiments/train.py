"""One experiment from a configuration: train, with Monte Carlo beside it, evaluate, keep the figures."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from diffrl.data.dataset import Data
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.pipelines.export import refusal_of_export
from diffrl.errors import InputError
from diffrl.experiments.evaluate import errors_of
from diffrl.experiments.resuming import continued
from diffrl.experiments.run import (
    AUTOCAST,
    Interrupted,
    Job,
    check_settings,
    interruptible,
    left_when,
    made_of,
    processes,
    shown,
    started_folder,
)
from diffrl.experiments.schemes import planned_objectives, registered_name, settings_of
from diffrl.metrics.map_error import map_keys
from diffrl.objectives.scheme import build_objective
from diffrl.objectives.solutions import solution_of
from diffrl.registry import accepted
from diffrl.shell_words import setting
from diffrl.training.arithmetic import Arithmetic
from diffrl.training.build import build_data, build_denoiser, build_oracle, build_sampler
from diffrl.training.distributed import ALONE, Ranks
from diffrl.training.ema import Average
from diffrl.training.evaluation import SAMPLE_SEED, Evaluation, draw_samples
from diffrl.training.identity import fingerprint
from diffrl.training.loop import Unfinished
from diffrl.training.optim import Optim
from diffrl.training.provenance import versions
from diffrl.training.quality import by_columns, for_results, measure_samples, quality_columns
from diffrl.training.runs import RunFolder
from diffrl.training.starting import keep_start, start_from, take_kept_start
from diffrl.training.step_cost import forward_equivalents
from diffrl.training.teachers import keep_teacher, load_teacher, named_teacher
from diffrl.training.trainer import Length, Target, Trainer

__all__ = ["TrainingJob", "run_experiment"]

WORSE = 10  # times the error before the first step; training that learns lowers it


def run_experiment(config: Mapping[str, Any], *, progress: bool = True) -> RunFolder:
    """Train and evaluate what a configuration says, continuing whatever a resumed folder holds already.

    With ``compare`` Monte Carlo is trained too, and every scheme of ``beside``: on the same data for the same gradient
    steps, with the same random numbers in each and the same first weights.

    Several processes that torchrun started share the run: ``trainer.batch_size`` data a step in all, whatever their
    number, the first one writes and evaluates, and all return its folder. See docs/many_processes.md.

    Args:
        config: what `diffrl.configs` composes.
        progress: whether to show progress bars.

    Returns:
        The run's folder, with all its results.

    Raises:
        ValueError, DataError, MissingExtra: something in the configuration cannot be; no folder is made.
        RunFolderError, RunChanged, FileError: see `RunFolder.start` and `continued`.
        NonFiniteLoss, CheckpointError: see `Trainer`.
        Interrupted: the run is saved, and can be resumed.
        RankLost: another of several processes has ended.
    """
    config = continued(config, "trainer", "grad_steps")
    with processes(config) as ranks:
        here = {**config, "device": ranks.device(config["device"])}
        check_settings(here)
        data = build_data(here)
        objectives, teachers = planned_objectives(here), {}
        for name in objectives:
            job = TrainingJob(here, data, name, ranks)
            job.compare()
            job.check()  # now, and not at the end of training
            teachers[name] = job.teacher
        if ranks.first and (refusal := refusal_of_export(job.trainer.denoiser)) is not None:
            warnings.warn(f"{refusal}; experiment=diffusers_ddpm and diffusers_edm do", stacklevel=2)
        with started_folder(config, ranks) as folder, interruptible() as interrupted:
            if ranks.first:
                _keep_sources(folder, config, job.trainer.denoiser, teachers)
            results = ranks.from_first(folder.results, "the results so far") or {"objectives": {}}
            for name in objectives:
                known = results["objectives"].get(name, {})
                job = TrainingJob(here, data, name, ranks)
                if known.get("grad_steps") == job.trainer.length.total:
                    job.tidy(folder)
                    continue
                results["objectives"][name] = job.run(folder, interrupted, progress)
                if ranks.first:
                    head = {"config": folder.config(), "seed": config["seed"], "versions": versions()}
                    head |= {} if data.split is None else {"split": asdict(data.split)}
                    folder.write_results({**head, "objectives": results["objectives"]})
    return folder


def _keep_sources(
    folder: RunFolder, config: Mapping[str, Any], start: Denoiser, teachers: Mapping[str, Denoiser | None]
) -> None:
    """Write what a run begins with into its folder, before its first step, so that it goes on without the sources."""
    if config.get("init") is not None:
        keep_start(folder, start)
    for name, teacher in teachers.items():
        keep_teacher(folder, name, teacher)


def opened(config: Mapping[str, Any]) -> "TrainingJob":
    """The main objective of a run in no folder, to try its pace."""
    return TrainingJob(config, build_data(config), config["objective"]["name"])


def _started(denoiser: Denoiser, config: Mapping[str, Any]) -> dict[str, str]:
    """Let a denoiser start from ``config["init"]``, or from the copy of a resumed run; the fact that says from what."""
    if config.get("init") is None:
        return {}
    if config["resume"] is None or not take_kept_start(denoiser, Path(config["resume"])):
        start_from(denoiser, config["init"], config["init_weights"])
    return {"init.fingerprint": fingerprint(denoiser.state_dict().values())}


def _teacher(denoiser: Denoiser, own: Mapping[str, Any], name: str) -> tuple[Denoiser | None, dict[str, str]]:
    """What ``own["objective"]["teacher"]`` names, if it names anything, and the fact that says what that is."""
    source = named_teacher(own["objective"])
    if source is None:
        return None, {}
    kept = None if own["resume"] is None else Path(own["resume"])
    teacher = load_teacher(source, denoiser, kept=kept, name=name)
    return teacher, {"objective.teacher.fingerprint": fingerprint(teacher.state_dict().values())}


def _of_trainer(config: Mapping[str, Any]) -> tuple[Length, Arithmetic]:
    """What ``config["trainer"]`` says: how long, and how a step is computed."""
    of_length = accepted(Length, config["trainer"])
    others = {key: value for key, value in config["trainer"].items() if key not in of_length}
    return (
        made_of("trainer", Length, {"trainer": of_length}),
        made_of("trainer", Arithmetic, {"trainer": others}),
    )


_Look = tuple[dict[str, dict[str, float]], dict[str, Tensor]]


class TrainingJob(Job):
    """One objective of an experiment: its trainer, and how it is evaluated.

    Args:
        config: of the run.
        data: what it is trained on.
        name: one of `planned_objectives`: the run's objective, a scheme beside it, or Monte Carlo.
        ranks: the processes that share it.
    """

    count: ClassVar[str] = "grad_steps"

    def __init__(self, config: Mapping[str, Any], data: Data, name: str, ranks: Ranks = ALONE) -> None:
        own = settings_of(config, name)
        dtype = torch.float64 if config["dtype"] == "float64" else torch.float32
        denoiser = build_denoiser(config, data).to(config["device"], dtype)
        start = _started(denoiser, config)
        baseline = name != config["objective"]["name"] and name not in (config.get("beside") or {})
        self.teacher, taught = _teacher(denoiser, own, name)
        objective = build_objective(own, denoiser, data=data, teacher=self.teacher, baseline=baseline)
        self.solution = solution_of(objective.name)
        objective = replace(objective, name=name)
        length, arithmetic = _of_trainer(config)
        self.trainer = Trainer(
            objective,
            data,
            seed=config["seed"],
            folder=None,
            length=length,
            optim=made_of("optim", Optim, config),
            average=made_of("ema", Average, config),
            target=made_of("target", Target, own),
            device=config["device"],
            autocast=AUTOCAST[config["dtype"]],
            arithmetic=arithmetic,
            identity={**start, **taught},
            ranks=ranks,
        )
        super().__init__(config, objective.name, self.trainer)
        self.data, self.sampler = data, build_sampler(config)
        self.evaluation = made_of("eval", Evaluation, config)
        self.reference = self.evaluation.reference(data, config["device"])
        every, look = self.evaluation.quality_every, length.eval_every
        if every % look:
            raise InputError(
                f"eval.quality_every is {every}: give a multiple of trainer.eval_every, {look}, or 0 for no looks"
            )
        self._look: tuple[int, _Look] | None = None
        self.oracle = build_oracle(data, denoiser.process)
        if self.oracle is not None:
            self.oracle.to(config["device"])

    @property
    def columns(self) -> tuple[str, ...]:
        """Counts, figures of the loss, errors."""
        names = [*self.tag, *self.trainer.figures, "loss_value", "td_error", "grad_norm", "lr"]
        names += [] if self.trainer.optimiser.loss_scale is None else ["loss_scale"]
        errors = ["denoising_error"] if self.oracle is None else ["value_error", "denoising_error"]
        levels = [f"{error}_{sigma:g}" for error in errors for sigma in self.evaluation.sigmas]
        maps = (f"map_error_{key}" for key in self._map_keys())
        guided = self.config["guidance_scale"] not in (0, 1)
        process, calls = self.average.process, 2 if guided else 1
        return (*names, *levels, *maps, *quality_columns(self.evaluation, self.sampler, process, calls))

    def _map_keys(self) -> list[str]:
        """Of the maps of all objectives of the run, which share a table."""
        found: list[str] = []
        for name in planned_objectives(self.config):
            solution = solution_of(registered_name(self.config, name))
            pairs = self.evaluation.pairs_for(solution, self.data)
            found += map_keys(self.average, pairs, to_clean=solution == "to_clean")
        return list(dict.fromkeys(found))

    @property
    def tag(self) -> dict[str, str]:
        """The objective, as several share a table."""
        return {"objective": self.name}

    @property
    def evaluated(self) -> Sequence[nn.Module]:
        """All averages."""
        return [average.module for average in self.trainer.averages.values()]

    @property
    def average(self) -> Denoiser:
        """The averaged denoiser: what is evaluated."""
        return cast(Denoiser, self.trainer.ema.module)

    def check(self) -> None:
        """Try everything once, at little cost."""
        trainer = self.trainer
        x0, labels, generator = trainer.batch(0)
        trainer.objective.set_progress(0, trainer.length.grad_steps)
        states = trainer.objective.draw(x0, cond=labels, generator=generator)
        with torch.no_grad(), trainer.precision(), trainer.arithmetic.compiling():
            for part in trainer.arithmetic.parts(states):
                trainer.loss(part)
        if trainer.ranks.size > 1:
            trainer.gradients.check(states)
        self.evaluation.check(self.average, self.oracle, self.data, self._draw)

    def errors(self, denoiser: Denoiser | None = None) -> dict[str, dict[str, float]]:
        """Of a denoiser, the averaged one if None, see `errors_of`."""
        return errors_of(
            self.evaluation,
            self.average if denoiser is None else denoiser,
            self.oracle,
            self.data,
            self.solution,
        )

    def evaluate(self) -> dict[str, float]:
        """The errors, by column; at steps of `quality_every` the measures of samples too."""
        errors = self.errors().items()
        row = {f"{name}_{sigma}": error for name, found in errors for sigma, error in found.items()}
        step, every = self.trainer.step, self.evaluation.quality_every
        if every and (step % every == 0 or step == self.trainer.length.total):
            row |= by_columns(self.evaluation, self._quality(self.average)[0])
        return row

    def run(self, folder: RunFolder, interrupted: Callable[[], bool], progress: bool) -> dict[str, Any]:
        """Train to the end, or raise `Interrupted`; the figures for results.json, which one process makes."""
        self.resume(folder)
        self.run_loop(folder, interrupted, progress)

        def results() -> dict[str, Any] | None:
            with suppress(Unfinished), left_when(interrupted, self.evaluated):
                return self._results(folder)
            return None

        if (found := self.trainer.ranks.from_first(results, f"the results of {self.name}")) is None:
            raise Interrupted(
                f"stopped in the evaluation at the end of {self.name}; its steps are saved, continue with "
                f"{setting('resume', folder.path)}"
            )
        return found

    def _results(self, folder: RunFolder) -> dict[str, Any]:
        found, samples = self._measured(self.average)
        folder.write_samples("data", {"0": shown(self.data.test)})
        folder.write_samples(self.name, samples)
        for nfe, x in samples.items():
            step = self.trainer.step
            self.log(folder).sheet(self.name, x, nfe=nfe, seed=SAMPLE_SEED, step=step)
        self._warn_of_divergence(folder)
        others = {name: ema.module for name, ema in self.trainer.averages.items() if name != "ema"}
        averages = {name: self._measured(cast(Denoiser, module))[0] for name, module in others.items()}
        batch_size = self.trainer.length.batch_size
        targets = self.evaluation.target_error(self.trainer.objective, self.oracle, self.data, batch_size)
        cost = {}
        if self.trainer.ranks.size == 1:  # a step of several takes all of them, and is another thing
            cost["forward_equivalents"] = round(forward_equivalents(self.trainer), 2)
        return {
            **self.trainer.figures,
            **cost,
            **found,
            **({"averages": averages} if averages else {}),
            **({"target_error": targets} if targets else {}),
            **({} if self.trainer.trials is None else {"trials": self.trainer.trials.history}),
        }

    def _measured(self, denoiser: Denoiser) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Errors and distances of samples, for results.json, and samples to show, by network evaluations."""
        found, samples = self._quality(denoiser)
        return {**self.errors(denoiser), **for_results(self.evaluation, found)}, samples

    def _quality(self, denoiser: Denoiser) -> _Look:
        """All measures of a denoiser's samples, by measure and network evaluations, and those to show.

        The last look while training is that of the results too.
        """
        step = self.trainer.step
        if denoiser is self.average and self._look is not None and self._look[0] == step:
            return self._look[1]
        samples: dict[str, Tensor] = {}
        found = measure_samples(
            self.evaluation,
            self.reference,
            lambda num_steps: self._draw(num_steps, self.evaluation.samples, denoiser),
            broken=lambda num_steps: self.trainer.not_finite("samples that hold NaN or infinity"),
            each=lambda nfe, x: samples.update({nfe: shown(x)}),
        )
        if denoiser is self.average:
            self._look = step, (found, samples)
        return found, samples

    def _warn_of_divergence(self, folder: RunFolder) -> None:
        """Say so if the network is far worse at the end than it was before its first step."""
        mine = [row for row in self.table(folder).rows() if row["objective"] == self.name]
        if not mine:  # the table was lost since
            return
        columns = [name for name in self.columns if name.startswith("denoising_error")]
        first, last = (sum(float(row[name] or 0) for name in columns) for row in (mine[0], mine[-1]))
        if last > WORSE * first > 0:
            warnings.warn(
                f"{self.name} has diverged: its denoising error is {last / first:.0e} times that of the untrained "
                "network. Lower optim.lr, or clip with optim.clip_norm",
                RuntimeWarning,
                stacklevel=2,
            )

    def _draw(self, num_steps: int, samples: int, denoiser: Denoiser | None = None) -> tuple[Tensor, int]:
        return draw_samples(
            self.average if denoiser is None else denoiser,
            self.data,
            self.sampler,
            num_steps=num_steps,
            samples=samples,
            seed=self.evaluation.seed,
            guidance_scale=self.config["guidance_scale"],
            batch_size=self.evaluation.at_once,
            streams=self.evaluation.streams,
        )
