"""What the commands do: train, check, finetune, compare, sample; those on folders stand beside."""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from hydra.core.hydra_config import HydraConfig

from diffrl.configs.cells import base_run, plan_comparison, plan_finetuning, plan_seeds
from diffrl.configs.cli import command, one_line
from diffrl.configs.folders import evaluate, export, report
from diffrl.configs.words import Words
from diffrl.diffusion.samplers.base import Streams
from diffrl.diffusion.samplers.counting import grid_for
from diffrl.errors import DiffrlError, InputError
from diffrl.experiments.check_run import check_run
from diffrl.experiments.comparison import Execution, run_cells
from diffrl.experiments.finetune import run_finetuning
from diffrl.experiments.reports.finetuning import methods_table, write_methods_report
from diffrl.experiments.reports.quality_figure import draw_quality
from diffrl.experiments.reports.run_figure import draw_samples, draw_summary
from diffrl.experiments.reports.run_table import objective_label, split_line, summary_table
from diffrl.experiments.reports.run_words import in_words
from diffrl.experiments.reports.seeds import seeds_table, write_seeds_report
from diffrl.experiments.reports.training import write_report
from diffrl.experiments.reports.tuning_figure import draw_tuning
from diffrl.experiments.schemes import planned_objectives, settings_of
from diffrl.experiments.studies import run_comparison
from diffrl.experiments.train import run_experiment
from diffrl.extras import require_installed
from diffrl.finetuning.methods.registry import METHODS
from diffrl.finetuning.surrogate import SURROGATES
from diffrl.ranges import require_int
from diffrl.ranks import own_rank, refuse_several_processes
from diffrl.text_tables import text_table
from diffrl.training.identity import require_kind
from diffrl.training.model_files import SUFFIX
from diffrl.training.runs import RunFolder, load

__all__ = ["COMMANDS"]

MAIN_JOB = "experiment=bootstrapping"
"""What is trained where no word says what."""
PICTURES = (".png", ".pdf", ".svg", ".jpg")


def _require_demo() -> None:
    require_installed("matplotlib", "ot", "PIL", "scipy", "sklearn", "torchmetrics", extra="demo")


@command("train", MAIN_JOB, shared=True)
def train(config: dict[str, Any]) -> None:
    """Train, print the table, draw the figure; of several seeds one table with intervals."""
    _require_demo()
    if config.get("seeds") and config["resume"] is None:
        refuse_several_processes("a table over seeds")
        cells, out = plan_seeds(config, HydraConfig.get().overrides.task)
        done = run_cells(cells, out, workers=config["workers"])
        if done.finished:
            print(f"{seeds_table(out)}\n\nruns    {out / 'cells'}\nreport  {write_seeds_report(out)}")
        _end(done)
        return
    folder = run_experiment(config)
    if own_rank() > 0:
        return
    results = folder.results()
    print("\n\n".join(filter(None, (summary_table(results), in_words(results), split_line(results)))))
    print(f"\nrun folder  {folder.path}\nfigure      {draw_summary(folder.path)}")
    if (quality := draw_quality(folder.path)) is not None:
        print(f"quality     {quality}")


@command("train", MAIN_JOB)
def check(config: dict[str, Any]) -> None:
    """Check a training run before it is started, each of its schemes, and print what was found."""
    main, failed = config["objective"]["name"], 0
    for name in planned_objectives(config):
        if name == main or name in config["beside"]:
            report = check_run(settings_of(config, name))
            print(f"{name}\n{report}\n" if config["beside"] else report)
            failed += len(report.failed)
    if failed:
        sys.exit(f"error: {failed} checks failed")
    print("\nthe run is right as far as can be told: start it by the command train with the same words")


@command("finetune", shared=True)
def finetune(config: dict[str, Any]) -> None:
    """Train what is to be tuned, tune it, print tables, draw figures."""
    _require_demo()
    out, path = _out(config), config["model"].get("path")
    if config["resume"] is None and config["compare"]:
        refuse_several_processes("a comparison of methods (compare=[] makes one run)")
    if config["model"]["name"] == "run" and path is None and config["resume"] is None:
        refuse_several_processes("training what is to be tuned (model.path=RUN names one that is trained)")
        path = str(base_run(config["pretrain"], out.parent))
        config["model"]["path"] = path
    if path is not None and config["model"]["name"] == "run":
        require_kind(
            Path(path), RunFolder.open(Path(path)).config(), "train"
        )  # once, and not in every worker
    if not config["compare"] or config["resume"] is not None:
        folder = run_finetuning(config, method=_recipe(config))
        if own_rank() > 0:
            return
        found = folder.results()["finetuning"]
        names = [name for name in found["final"] if name in found["base"]]
        rows = [[n, f"{found['base'][n]:.3g}", f"{found['final'][n]:.3g}"] for n in names]
        print(text_table([["", "base", "tuned"], *rows]))
        if found.get("untaught"):
            print(f"\n{found['untaught']}")
        print(f"\nrun folder  {folder.path}\nfigure      {draw_tuning(folder.path)}")
        return
    if path is None:
        raise InputError("model.path is null: give what is to be tuned")
    cells = plan_finetuning(config, HydraConfig.get().overrides.task, str(path))
    done = run_cells(cells, out, workers=config["workers"])
    if done.finished:
        print(f"{methods_table(out)}\n\nreport  {write_methods_report(out)}")
    _end(done)


def _recipe(config: Mapping[str, Any]) -> str | None:
    """The recipe that was chosen, if its surrogate is still the one; None: the configuration is of another method."""
    name = HydraConfig.get().runtime.choices["recipe"]
    changed = name in METHODS and SURROGATES.name_of(METHODS[name]().surrogate) != config["surrogate"]["name"]
    return None if changed else name


@command("compare")
def compare(config: dict[str, Any]) -> None:
    """Run what is not finished yet, write the report, list what failed."""
    _require_demo()
    out = _out(config)
    if config["report"]:
        print(f"report  {write_report(out)}")
        return
    comparison = plan_comparison(config["plan"])
    done = run_comparison(comparison, out, studies=config["studies"], workers=config["workers"])
    print(f"{done.finished} of {done.total} cells are finished\nreport  {write_report(out)}")
    _end(done)


def _out(config: Mapping[str, Any]) -> Path:
    """The folder of a comparison; an empty name would be the folder that one stands in."""
    if not config["out"]:
        raise InputError("out is empty: give a folder, as in out=runs/mine, or leave it out")
    return Path(config["out"])


def _end(done: Execution) -> None:
    """Say what failed or was interrupted, and exit accordingly."""
    for cell, error in done.failed.items():
        print(f"failed  {cell}: {error}")
    if done.interrupted:
        raise KeyboardInterrupt("interrupted: the same command continues")
    if done.failed:
        raise DiffrlError(f"{len(done.failed)} cells failed; the same command runs them again")


def sample() -> None:
    """Draw samples from a run or a model, at a chosen number of network evaluations for each."""
    with one_line("sample"):
        print(_sample(_sample_words().parse_args()))


def _sample(arguments: argparse.Namespace) -> Path:
    """Load, sample, draw; returns the picture's path."""
    ranges = (("nfe", 1, 10_000), ("samples", 1, 10**6), ("seed", 0, 2**62), ("at_once", 1, 10**6))
    for name, least, most in ranges:
        require_int(f"--{name.replace('_', '-')}", getattr(arguments, name), least, most)
    if arguments.out is not None and arguments.out.suffix.lower() not in PICTURES:
        raise InputError(f"--out is {str(arguments.out)!r}: give a name that ends with {', '.join(PICTURES)}")
    path = Path(arguments.run_folder)
    run = load(path, arguments.objective)
    guided = run.events.num_classes > 0 and arguments.guidance_scale not in (0, 1)  # two evaluations a call
    calls, rest = divmod(arguments.nfe, 2 if guided else 1)
    if rest:
        raise InputError(f"guidance evaluates the network twice a call: --nfe {arguments.nfe} must be even")
    num_steps = grid_for(run.sampler, run.denoiser.process, calls)
    x = run.sample(
        arguments.samples,
        num_steps=num_steps,
        seed=arguments.seed,
        guidance_scale=arguments.guidance_scale,
        at_once=arguments.at_once,
        streams=arguments.streams,
    )
    if not bool(x.isfinite().all()):
        raise InputError(f"samples of {path} hold NaN or infinity: get the model again, or train anew")
    of_run = bool(run.objective)
    label = objective_label(run.objective, run.config) if of_run else "model"
    of = f"{run.objective or run.name.removesuffix(SUFFIX)}_nfe{arguments.nfe}"
    seed = f"{'seed' if arguments.streams == 'added' else 'key'}{arguments.seed}"
    name = f"samples_{of}_{seed}.png"
    out = arguments.out or (path / "plots" / name if of_run else Path(name))
    out.parent.mkdir(parents=True, exist_ok=True)
    title = f"{run.name}, {label}, NFE {arguments.nfe}, seed {arguments.seed}"
    real = RunFolder(path).samples().get("data", {}) if of_run else {}  # the data need not be there any more
    return draw_samples(x, out, title=title, data=real.get("0"))


def _sample_words() -> argparse.ArgumentParser:
    """What can be given."""
    parser = Words("sample", sample.__doc__)
    parser.add_argument("run_folder", help="what a training run wrote, or a model file or folder")
    parser.add_argument("--nfe", type=int, default=35, help="network evaluations of each sample (35)")
    parser.add_argument("--samples", type=int, default=64, help="how many (64)")
    parser.add_argument("--seed", type=int, default=0, help="of the first sample; each has its own (0)")
    parser.add_argument("--at-once", type=int, default=1000, help="drawn side by side; changes none (1000)")
    parser.add_argument(
        "--streams",
        choices=get_args(Streams),
        default="added",
        help="keyed: no two seeds share a sample (added)",
    )
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="1 is off; needs labels (1)")
    parser.add_argument("--objective", help="whose denoiser: td, monte_carlo, ... (the run's main one)")
    parser.add_argument("--out", type=Path, help="the picture (of a run RUN_FOLDER/plots/samples_...png)")
    return parser


COMMANDS: dict[str, Callable[[], None]] = {
    "train": train,
    "check": check,
    "finetune": finetune,
    "compare": compare,
    "sample": sample,
    "report": report,
    "evaluate": evaluate,
    "export": export,
}
