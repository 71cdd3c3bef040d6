"""Draw samples from a run folder, at a chosen number of network evaluations for each.

python examples/sample.py runs/... --nfe 9
python examples/sample.py runs/... --nfe 18 --objective monte_carlo --samples 100 --seed 1 --guidance-scale 2
"""

import argparse
import sys
from pathlib import Path

import diffrl
from diffrl.experiments.reports.run_figure import draw_samples
from diffrl.experiments.reports.run_table import objective_label
from diffrl.extras import MissingExtra
from diffrl.training.build import build_sampler
from diffrl.training.checkpoints import CheckpointError
from diffrl.training.evaluation import grid_for
from diffrl.training.runs import RunFolderError


def main(arguments: argparse.Namespace) -> Path:
    """Load, sample, draw; returns the picture's path."""
    run = diffrl.load(arguments.run_folder, arguments.objective)
    guided = run.data.num_classes > 0 and arguments.guidance_scale not in (0, 1)  # two evaluations a call
    calls, rest = divmod(arguments.nfe, 2 if guided else 1)
    if rest:
        raise ValueError(f"guidance evaluates the network twice a call: --nfe {arguments.nfe} must be even")
    num_steps = grid_for(build_sampler(run.config), run.denoiser.process, calls)
    x = run.sample(
        arguments.samples,
        num_steps=num_steps,
        seed=arguments.seed,
        guidance_scale=arguments.guidance_scale,
    )
    name = f"samples_{run.objective}_nfe{arguments.nfe}_seed{arguments.seed}.png"
    out = arguments.out or Path(arguments.run_folder) / "plots" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    label = objective_label(run.objective, run.config)
    title = f"{run.data.name}, {label}, NFE {arguments.nfe}, seed {arguments.seed}"
    return draw_samples(x, out, title=title, data=run.data.test[:1000])


def parser() -> argparse.ArgumentParser:
    """What can be given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_folder", help="what a training run wrote")
    parser.add_argument("--nfe", type=int, default=35, help="network evaluations of each sample (35)")
    parser.add_argument("--samples", type=int, default=64, help="how many (64)")
    parser.add_argument("--seed", type=int, default=0, help="of the first sample; each has its own (0)")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="1 is off; needs labels (1)")
    parser.add_argument("--objective", help="whose denoiser: td, monte_carlo, ... (the run's main one)")
    parser.add_argument("--out", type=Path, help="the picture (RUN_FOLDER/plots/samples_...png)")
    return parser


if __name__ == "__main__":
    try:
        print(main(parser().parse_args()))
    except (CheckpointError, MissingExtra, RunFolderError, ValueError) as error:
        sys.exit(f"error: {error}")
