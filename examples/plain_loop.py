"""Temporal-difference learning in a training loop of your own: plain PyTorch, only the loss is another.

python examples/plain_loop.py            # TD(0): ends at a value error of about 0.53
python examples/plain_loop.py 1          # λ = 1, Monte Carlo, on the same data and noise: about 0.86
"""

import sys

import torch

import diffrl
from diffrl.metrics.distances import value_error


def main(lmbda: float = 0.0, *, grad_steps: int = 2000) -> float:
    """Train on a mixture whose exact denoiser is known; returns the last value error, mean over σ."""
    # Setup: your data, your network
    torch.manual_seed(0)
    data, process = diffrl.data.gmm(dim=16), diffrl.EDM()
    denoiser = diffrl.Denoiser(diffrl.networks.MLP(data.event_shape), process, sigma_data=0.5)
    loss = diffrl.objectives.ValueLoss(denoiser, lmbda=lmbda)
    optimiser = torch.optim.AdamW(denoiser.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, grad_steps)
    exact = diffrl.MixtureDenoiser(process, **vars(data.mixture))

    # Train: the chain takes the place of x0 + σ ε, the value loss that of ‖D - x0‖²
    mean_error = float("nan")
    for step in range(1, grad_steps + 1):
        x0, _ = data.batch(32)
        chain = diffrl.sample_chain(process, x0, num_steps=18, coupling="markov")
        loss_value = loss(chain)["loss_value"]
        optimiser.zero_grad()
        loss_value.backward()
        optimiser.step()
        decay.step()
        if step % 200 == 0 or step == grad_steps:
            errors = value_error(denoiser, exact, data.test, process, (0.1, 0.3, 1.0), sigma_data=0.5)
            mean_error = sum(errors.values()) / len(errors)
            print(f"step {step:5}  loss {loss_value.item():.3f}  value error {mean_error:.3f}")
    return mean_error


if __name__ == "__main__":
    main(*map(float, sys.argv[1:2]))
