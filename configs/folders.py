"""The commands that work on a folder which others have written: report, evaluate, export."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from diffrl.configs.cli import check_numbers, check_words, one_line
from diffrl.configs.groups import register
from diffrl.configs.schema import schema
from diffrl.configs.words import Words
from diffrl.diffusion.pipelines.export import export_pipeline
from diffrl.diffusion.schedules.edm import EDM
from diffrl.errors import InputError
from diffrl.experiments.evaluate import evaluate_run
from diffrl.experiments.pretrained import save_pretrained
from diffrl.experiments.reports.anew import report_anew
from diffrl.experiments.reports.run_table import figure_rows
from diffrl.extras import require_installed
from diffrl.text_files import write_atomically
from diffrl.text_tables import text_table
from diffrl.training.evaluation import Evaluation
from diffrl.training.runs import load

__all__ = ["evaluate", "export", "report"]

WEIGHTS = "averaged, or not: ema, model, or of ema.also ema_500000 (ema)"


def report() -> None:
    """Write the report of a comparison anew, from its folder alone: of schemes, methods of tuning, or seeds."""
    with one_line("report"):
        parser = Words("report", report.__doc__)
        parser.add_argument(
            "folder", type=Path, help="what compare, finetune or train with several seeds wrote"
        )
        given = parser.parse_args()
        require_installed("matplotlib", extra="plot")
        print(f"report  {report_anew(given.folder)}")


def evaluate() -> None:
    """Measure the model of a finished run again, with other settings of eval; its folder is only read."""
    with one_line("evaluate"):
        given = _evaluate_words().parse_intermixed_args()
        if given.out is not None and given.out.suffix != ".json":
            raise InputError(f"--out is {str(given.out)!r}: give a name that ends with .json")
        found = evaluate_run(
            given.run_folder,
            eval_settings(given.words),
            objective=given.objective,
            weights=given.weights,
            device=given.device,
        )
        print(text_table([["", "found"], *figure_rows(found)]))
        if given.out is not None:
            write_atomically(given.out, json.dumps(found, indent=2))


def export() -> None:
    """Write the model of a run as a folder: for diffusers, or with a card for diffrl.from_pretrained."""
    with one_line("export"):
        parser = Words(
            "export",
            export.__doc__,
            "What diffusers samples from, experiment=diffusers_ddpm and diffusers_edm train; diffrl takes any.",
        )
        parser.add_argument(
            "run", type=Path, help="what a training run wrote, or a model file or folder of diffrl's"
        )
        parser.add_argument("folder", type=Path, help="a new folder")
        parser.add_argument(
            "--to", choices=("diffusers", "diffrl"), default="diffusers", help="for whom (diffusers)"
        )
        parser.add_argument("--objective", help="whose denoiser: td, denoising, ... (the run's main one)")
        parser.add_argument("--weights", default="ema", help=WEIGHTS)
        given = parser.parse_args()
        run = load(given.run, given.objective, weights=given.weights)
        if given.to == "diffrl":
            print(f"model  {save_pretrained(run, given.folder)}")
            return
        what = "unet and scheduler" if isinstance(run.denoiser.process, EDM) else "pipeline"
        print(f"{what}  {export_pipeline(run.denoiser, given.folder)}")


def eval_settings(words: Sequence[str]) -> dict[str, Any]:
    """The options of the group `eval` in words such as ``eval.samples=500``, checked as those of training are.

    Raises:
        InputError: a word that is about something else.
        OmegaConfBaseException: an unknown option, or a value of the wrong type.
    """
    register()
    config = OmegaConf.create({"eval": OmegaConf.structured(schema("eval", Evaluation, tag=False))})
    names = []
    for word in check_words(words):
        group, _, name = word.key_or_group.partition(".")
        if group != "eval" or not name or word.is_add() or word.is_delete():
            raise InputError(
                f"{word.input_line}: give settings of eval, such as 'eval.num_steps=[4,9]'; all else is the run's"
            )
        OmegaConf.update(config, word.key_or_group, word.value())
        names.append(name)
    found = OmegaConf.to_container(config)
    assert isinstance(found, dict)
    check_numbers(found)
    return {name: found["eval"][name] for name in names}


def _evaluate_words() -> argparse.ArgumentParser:
    options = ", ".join(f"eval.{name}" for name in Evaluation.__dataclass_fields__)
    parser = Words("evaluate", evaluate.__doc__, f"The settings are {options}.")
    parser.add_argument("run_folder", type=Path, help="what a training run wrote")
    parser.add_argument(
        "words", nargs="*", metavar="eval.NAME=VALUE", help="settings in place of the run's own"
    )
    parser.add_argument("--objective", help="whose denoiser: td, monte_carlo, ... (the run's main one)")
    parser.add_argument("--weights", default="ema", help=WEIGHTS)
    parser.add_argument("--device", default="cpu", help="where it is measured (cpu)")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures (none)")
    return parser
