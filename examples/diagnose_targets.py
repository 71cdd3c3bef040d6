"""Bias and variance of targets beside what training with them came to, over the grid of a comparison.

python examples/compare_bootstrapping.py studies=[map]
python examples/diagnose_targets.py runs/compare_default
python examples/diagnose_targets.py runs/compare_default --study map_coarse --case rings

The targets are taken at the networks that Monte Carlo trained, against the exact denoiser. Writes
targets_STUDY_CASE.json, .png and .pdf beside the comparison's other figures.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from diffrl.experiments.findings import Findings
from diffrl.experiments.reports.agreement import draw_agreement, target_outcomes
from diffrl.extras import MissingExtra
from diffrl.training.checkpoints import CheckpointError
from diffrl.training.runs import RunFolderError, write_atomically


def main(arguments: argparse.Namespace) -> Path:
    """Measure, write, draw; returns the picture's path."""
    torch.set_num_threads(arguments.threads)
    found = target_outcomes(
        Findings(arguments.comparison),
        study=arguments.study,
        case=arguments.case,
        states=arguments.states,
        draws=arguments.draws,
    )
    path = arguments.comparison / "figures" / f"targets_{arguments.study}_{arguments.case}"
    path.parent.mkdir(exist_ok=True)
    write_atomically(path.with_suffix(".json"), json.dumps(found, indent=1, ensure_ascii=False))
    return draw_agreement(found, path)


def parser() -> argparse.ArgumentParser:
    """What can be given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("comparison", type=Path, help="what compare_bootstrapping.py wrote")
    parser.add_argument("--study", default="map", help="with the axes λ and η (map)")
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
