"""Draw samples from a run folder, at a chosen number of network evaluations for each.

python examples/sample.py runs/... --nfe 9
python examples/sample.py runs/... --nfe 18 --objective monte_carlo --samples 100 --seed 1 --guidance-scale 2

It is the command `python -m diffrl sample`.
"""

from diffrl.__main__ import run

if __name__ == "__main__":
    run("sample")
