"""What diffrl costs: one table of ratios, also written to benchmarks/results.json and results/README.md.

python benchmarks/run.py            # about six minutes
python benchmarks/run.py --quick    # below a minute: fewer rounds and wider intervals; writes nothing

A ratio of processor times is the median over rounds in which all variants run in turn, with its 95 % bootstrap
interval. A training step draws its states, goes forward and backward, and updates weights, target network and
average.

plain torch    the step by hand from the first line to the last (`by_hand.py`): no checks, nothing but EDM, what stays
               is computed once. The promises are about this one.
same parts     a loop by hand with diffrl's denoiser and chains in TensorDicts
by TensorDict  diffrl's own loss(draw(x0)), which `diffrl.objectives.fused` takes the place of
bare           the network evaluations alone, forward and backward
"""

import argparse
import json
import os
import platform
import time

os.environ.setdefault("RL_WARNINGS", "0")

import torch
from chain_drawing import chain_drawing
from env_steps import env_steps
from finetune_cost import finetune_cost
from lambda_returns import cost_of_lambda_returns
from report import Row, as_json, table
from scheme_steps import scheme_steps
from speed_table import RESULTS, write
from step_cost import SIZES, step_cost

from diffrl.text_files import write_atomically
from diffrl.training.provenance import versions


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds; nothing is written")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    start, parts = time.time(), {}

    def show(title: str, direction: str, rows: list[Row]) -> None:
        print(table(title, direction, rows), flush=True)
        parts[title] = {"reads": direction, "rows": as_json(rows)}

    for size, rounds in zip(SIZES, (30, 7) if quick else (120, 24), strict=True):
        show(f"step: {size.name}, {size.states} states", "time over", step_cost(size, rounds=rounds))
    show("step over EDM's: UNet on 1x16x16, 64 states", "time over", scheme_steps(rounds=7 if quick else 24))
    rows = [chain_drawing(batch, rounds=15 if quick else 150) for batch in (64, 1024)]
    show("chains drawn in 2-D", "times as fast as", rows)
    over_hand, over_tensors = env_steps(rounds=30 if quick else 100)
    show("step of a Gymnasium environment of one chain, 2-D", "time over", over_hand)
    show("the same step in plain numbers", "times as fast as", over_tensors)
    title = "fine-tuning iteration: UNet on 1x16x16, 32 chains of 8 steps"
    show(title, "time over", finetune_cost(rounds=5 if quick else 40))
    shape = (32, 18, 3072) if quick else (256, 18, 3072)
    show("λ-returns", "times as fast as", [cost_of_lambda_returns(shape, rounds=5 if quick else 9)])
    seconds = time.time() - start
    print(f"processor time on one thread: medians and 95 % intervals of interleaved rounds; {seconds:.0f} s")
    if not quick:
        machine = {"processor": platform.processor() or platform.machine(), "threads": 1}
        about = {"command": "python benchmarks/run.py", "versions": versions(), "machine": machine}
        write_atomically(RESULTS, json.dumps(about | {"results": parts}, indent=2, ensure_ascii=False) + "\n")
        write()


if __name__ == "__main__":
    main()
