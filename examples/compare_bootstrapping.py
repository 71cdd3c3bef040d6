"""Compare bootstrapping schemes: value error and few-step samples, over data sets and seeds, with intervals.

python examples/compare_bootstrapping.py                       # configs/plan/default.yaml, on two cores
python examples/compare_bootstrapping.py plan=quick            # a smoke test of two minutes
python examples/compare_bootstrapping.py plan=full 'studies=[paper]' workers=8
python examples/compare_bootstrapping.py report=true out=runs/compare_default      # draw the report anew

The same command continues where it stopped: finished cells are kept. A plan is a list of studies, a scheme
is one line of it: see configs/plan. Each scheme is tuned first, on seeds that are not reported. It is the
command `python -m diffrl compare`.
"""

from diffrl.__main__ import run

if __name__ == "__main__":
    run("compare")
