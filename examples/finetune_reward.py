"""Tune a denoiser for a black-box reward, DDPO against SDPO: digits become sevens by a classifier's probability.

python examples/finetune_reward.py                              # three methods, three seeds, on two cores
python examples/finetune_reward.py reward.target=3 seeds=[1]
python examples/finetune_reward.py compare=[] recipe=sdpo model.path=runs/... reward=ink heldout_reward=none
python examples/finetune_reward.py resume=runs/...              # continue a single run where it stopped

With `compare` (the default) the same command continues where it stopped: finished runs are kept. Where model.path is
null, a small denoiser is trained first, and kept beside `out` for the next time.
"""

import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from diffrl.configs.cli import command
from diffrl.configs.tuning import base_run, plan_tuning
from diffrl.experiments.finetune import run_finetuning
from diffrl.experiments.reports.finetuning import tuning_table, write_tuning_report
from diffrl.experiments.tuning_comparison import run_tuning_comparison
from diffrl.extras import require_installed
from diffrl.training.table import aligned


@command("finetune")
def main(config: dict[str, Any]) -> None:
    """Train what is to be tuned, tune it, print tables, draw figures."""
    require_installed("matplotlib", "ot", "PIL", "scipy", "sklearn", "torchmetrics", extra="demo")
    out, path = Path(config["out"]), config["model"].get("path")
    if config["model"]["name"] == "run" and path is None and config["resume"] is None:
        path = str(base_run(config["pretrain"], out.parent))
        config["model"]["path"] = path
    if not config["compare"] or config["resume"] is not None:
        folder = run_finetuning(config)
        found = folder.results()["finetuning"]
        names = [name for name in found["final"] if name in found["base"]]
        rows = [[n, f"{found['base'][n]:.3g}", f"{found['final'][n]:.3g}"] for n in names]
        print(aligned([["", "base", "tuned"], [], *rows]))
        print(f"\nrun folder  {folder.path}")
        return
    if path is None:
        sys.exit("error: model.path is null: give what is to be tuned")
    cells = plan_tuning(config, HydraConfig.get().overrides.task, str(path))
    done = run_tuning_comparison(cells, out, workers=config["workers"])
    for cell, error in done.failed.items():
        print(f"failed  {cell}: {error}")
    if done.finished:
        print(f"{tuning_table(out)}\n\nreport  {write_tuning_report(out)}")
    if done.interrupted:
        sys.exit("interrupted: the same command continues")
    if done.failed:
        sys.exit(f"error: {len(done.failed)} runs failed; the same command runs them again")


if __name__ == "__main__":
    main()
