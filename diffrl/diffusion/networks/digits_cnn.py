"""The classifier of scikit-learn's digits: features for the distance `fd_digits_cnn`, and a reward."""

from functools import cache
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from diffrl.errors import InputError

__all__ = ["DIGITS_CNN_FILE", "DigitsCNN", "digits_cnn", "load_digits_cnn"]

DIGITS_CNN_FILE = Path(__file__).parent / "assets" / "digits_cnn.safetensors"


class DigitsCNN(nn.Module):
    """Three convolutions and two linear layers, 72,842 parameters, for images [N, 1, 8, 8] in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, 10)

    def features(self, x: Tensor) -> Tensor:
        """Features before the last layer, ≥ 0, shape [N, 64].

        Raises:
            ValueError: x is not [N, 1, 8, 8].
        """
        if x.ndim != 4 or x.shape[1:] != (1, 8, 8):
            raise InputError(f"x has shape {tuple(x.shape)}, but digits_cnn takes images [N, 1, 8, 8]")
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the digits 0..9, shape [N, 10]."""
        return self.head(self.features(x))


def load_digits_cnn(path: str | Path = DIGITS_CNN_FILE) -> DigitsCNN:
    """The trained classifier that comes with the library, in evaluation mode, its weights frozen.

    It was trained on the training part of `diffrl.data.digits` by examples/train_digits_features.py.

    Raises:
        FileNotFoundError: the weights are missing.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing: examples/train_digits_features.py writes it")
    with torch.device("meta"):  # draws no initial weights, so the global random state stays
        network = DigitsCNN()
    network.load_state_dict(safetensors.torch.load_file(path), assign=True)
    return network.eval().requires_grad_(False)


@cache
def digits_cnn(device: torch.device) -> DigitsCNN:
    """The trained classifier on a device. There is one copy, which every caller shares: do not change it.

    Raises:
        FileNotFoundError: the weights are missing.
    """
    return load_digits_cnn().to(device)
