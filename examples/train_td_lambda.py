"""Train a denoiser by TD(λ) and by Monte Carlo on the same data, noise and evaluations, and compare them.

python examples/train_td_lambda.py                                       # digits
python examples/train_td_lambda.py data=gmm data.dim=16 objective.lmbda=0.5 trainer.grad_steps=2000 seed=0
python examples/train_td_lambda.py resume=runs/...                       # continue where it stopped

It is the command `python -m diffrl train`.
"""

from diffrl.__main__ import run

if __name__ == "__main__":
    run("train")
