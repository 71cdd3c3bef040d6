"""Train `digits_cnn`, the feature network of the distance `fd_digits_cnn`, on the training digits.

    python examples/train_digits_features.py

About 20 seconds on one CPU core; expected test accuracy: at least 0.97. The weights that come with the
library were made by this script with its defaults.
"""

import argparse
import json
from pathlib import Path

import safetensors.torch
import torch
from torch.nn.functional import cross_entropy, pad

from diffrl.data.files import digits
from diffrl.diffusion.networks.digits_cnn import DIGITS_CNN_FILE, DigitsCNN


def main(out: Path, seed: int, epochs: int) -> float:
    """Train, print the test accuracy, save; returns the accuracy."""
    # Setup
    torch.manual_seed(seed)
    data = digits(conditional=True)
    assert data.train is not None and data.train_labels is not None and data.test_labels is not None
    network = DigitsCNN()
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    batch_size = 64
    grad_steps = epochs * (len(data.train) // batch_size)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, grad_steps)

    # Train: each image is shifted by up to one pixel, black beyond its border
    padded = pad(data.train, (1, 1, 1, 1), value=-1.0)
    for _ in range(epochs):
        order = torch.randperm(len(padded))
        for batch in order[: len(order) // batch_size * batch_size].split(batch_size):
            row, column = torch.randint(3, (2,)).tolist()
            logits = network(padded[batch, :, row : row + 8, column : column + 8])
            optimiser.zero_grad()
            cross_entropy(logits, data.train_labels[batch], label_smoothing=0.05).backward()
            optimiser.step()
            cosine.step()

    # Evaluate and save
    with torch.no_grad():
        accuracy = (network.eval()(data.test).argmax(1) == data.test_labels).float().mean().item()
    print(f"test accuracy {accuracy:.4f} on {len(data.test)} digits (expected: at least 0.97)")
    metadata = {
        "network": "digits_cnn",
        "test_accuracy": round(accuracy, 4),
        "split": "every fifth image of each class is test",
        "seed": seed,
        "epochs": epochs,
        "torch": torch.__version__,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    # one entry, as the order of several is not fixed: same seed, same file
    safetensors.torch.save_file(network.state_dict(), out, {"training": json.dumps(metadata)})
    out.chmod(0o644)
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=DIGITS_CNN_FILE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=60)
    arguments = parser.parse_args()
    main(arguments.out, arguments.seed, arguments.epochs)
