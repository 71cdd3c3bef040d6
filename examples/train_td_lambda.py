"""Train a denoiser by TD(λ) and by Monte Carlo on the same data, noise and evaluations, and compare them.

python examples/train_td_lambda.py                                       # digits
python examples/train_td_lambda.py data=gmm data.dim=16 objective.lmbda=0.5 trainer.grad_steps=2000 seed=0
python examples/train_td_lambda.py resume=runs/...                       # continue where it stopped
"""

from typing import Any

from diffrl.configs.cli import command
from diffrl.experiments.reports.run_figure import draw_summary
from diffrl.experiments.reports.run_table import summary_table
from diffrl.experiments.train import run_experiment
from diffrl.extras import require_installed


@command("train")
def main(config: dict[str, Any]) -> None:
    """Train, print the table, draw the figure."""
    require_installed("matplotlib", "ot", "PIL", "scipy", "sklearn", "torchmetrics", extra="demo")
    folder = run_experiment(config)
    print(summary_table(folder.results()))
    print(f"\nrun folder  {folder.path}\nfigure      {draw_summary(folder.path)}")


if __name__ == "__main__":
    main()
