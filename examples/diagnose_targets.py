"""Bias and variance of targets: of one run by noise level, or of a comparison beside what training came to.

python examples/diagnose_targets.py runs/RUN_FOLDER
python examples/compare_bootstrapping.py 'studies=[map]'
python examples/diagnose_targets.py runs/compare_default
python examples/diagnose_targets.py runs/compare_default --study map_coarse --case rings

Targets are judged against the exact denoiser, at the network of the run; in a comparison, at those that Monte Carlo
trained. Writes plots/targets.json, .png and .pdf in a run folder; in the folder of a comparison
figures/targets_STUDY_CASE.json, .png and .pdf.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from diffrl.experiments.reports.agreement import draw_agreement, target_outcomes
from diffrl.experiments.reports.target_figure import draw_target_errors, run_target_errors
from diffrl.experiments.study_findings import StudyFindings
from diffrl.extras import MissingExtra
from diffrl.text_files import write_atomically
from diffrl.training.checkpoints import CheckpointError
from diffrl.training.runs import RunFolderError, load


def main(arguments: argparse.Namespace) -> Path:
    """Measure, write, draw; returns the path of the picture."""
    torch.set_num_threads(arguments.threads)
    folder, counts = arguments.folder, {"states": arguments.states, "draws": arguments.draws}
    if (folder / "config.yaml").exists():
        path = folder / "plots" / "targets"
        errors = run_target_errors(load(folder), **counts)
        write_numbers(path, errors)
        return draw_target_errors(errors, path)
    study, case = arguments.study, arguments.case
    path = folder / "figures" / f"targets_{study}_{case}"
    found = target_outcomes(StudyFindings(folder), study=study, case=case, **counts)
    write_numbers(path, found)
    return draw_agreement(found, path)


def write_numbers(path: Path, found: dict[str, Any]) -> None:
    """Write what was found beside where the picture will be."""
    path.parent.mkdir(exist_ok=True)
    write_atomically(path.with_suffix(".json"), json.dumps(found, indent=1, ensure_ascii=False))


def parser() -> argparse.ArgumentParser:
    """What can be given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of a training run or of a comparison")
    parser.add_argument("--study", default="map", help="of a comparison, with the axes λ and η (map)")
    parser.add_argument("--case", default="gmm16", help="of that study (gmm16)")
    parser.add_argument("--states", type=int, default=200, help="noisy states looked at (200)")
    parser.add_argument("--draws", type=int, default=32, help="continuations of each (32)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (1)")
    return parser


if __name__ == "__main__":
    try:
        print(main(parser().parse_args()))
    except (CheckpointError, MissingExtra, RunFolderError, ValueError) as error:
        sys.exit(f"error: {error}")
