"""Show what bootstrapping does to a denoiser and its samples, or train a scheme of yours beside Monte Carlo.

python examples/train_td_lambda.py                                       # digits: Monte Carlo and two kinds of TD
python examples/train_td_lambda.py data=gmm data.dim=16 objective.lmbda=0.5 trainer.grad_steps=2000 seed=0
python examples/train_td_lambda.py resume=runs/...                       # continue where it stopped

Where no word says what to train, it is configs/experiment/bootstrapping.yaml; else the scheme of your words, and Monte
Carlo on the same data, noise and evaluations. It is the command `python -m diffrl train`.
"""

from diffrl.__main__ import run

if __name__ == "__main__":
    run("train")
