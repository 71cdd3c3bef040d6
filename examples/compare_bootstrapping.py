"""Compare bootstrapping schemes: value error and few-step samples, over data sets and seeds, with intervals.

python examples/compare_bootstrapping.py                       # configs/plan/default.yaml, on two cores
python examples/compare_bootstrapping.py plan=quick            # a smoke test of three minutes
python examples/compare_bootstrapping.py plan=full studies=[paper] workers=8
python examples/compare_bootstrapping.py report=true out=runs/compare_default      # draw the report anew

The same command continues where it stopped: finished cells are kept. A plan is a list of studies, a scheme
is one line of it: see configs/plan.
"""

import sys
from pathlib import Path
from typing import Any

from diffrl.configs.cells import plan_comparison
from diffrl.configs.cli import command
from diffrl.experiments.comparison import run_comparison
from diffrl.experiments.reports.training import write_report
from diffrl.extras import require_installed


@command("compare")
def main(config: dict[str, Any]) -> None:
    """Run what is not finished yet, write the report, list what failed."""
    require_installed("matplotlib", "ot", "PIL", "scipy", "sklearn", "torchmetrics", extra="demo")
    out = Path(config["out"])
    if config["report"]:
        print(f"report  {write_report(out)}")
        return
    comparison = plan_comparison(config["plan"])
    done = run_comparison(comparison, out, studies=config["studies"], workers=config["workers"])
    print(f"{done.finished} of {done.total} cells are finished\nreport  {write_report(out)}")
    for cell, error in done.failed.items():
        print(f"failed  {cell}: {error}")
    if done.interrupted:
        sys.exit("interrupted: the same command continues")
    if done.failed:
        sys.exit(f"error: {len(done.failed)} cells failed; the same command runs them again")


if __name__ == "__main__":
    main()
