"""λ by the length of the chain: TD(λ) that looks the same share of every chain ahead."""

from collections.abc import Mapping
from dataclasses import dataclass

from tensordict import TensorDictBase
from torch import Tensor

from diffrl import keys
from diffrl.ranges import require_number

__all__ = ["Lookahead"]


@dataclass(frozen=True)
class Lookahead:
    """λ of chains of K steps, such that a λ-return looks a share h of the chain ahead, on average.

        λ = max(0, 1 - 1/(h K))

    A λ-return is a mixture of n-step returns, n geometric with mean 1/(1-λ) steps; here that is h K. Chains of any
    length then bootstrap across the same part of the chain. With one λ for all they do not: with λ = 0 on 100 levels,
    a target moves an error that all levels share by a few per cent of it. Chains of K ≤ 1/h steps have TD(0).

    Source: the mean length of a λ-return: Reinforcement Learning: An Introduction, 2nd ed. (Sutton & Barto, 2018),
    §12.1, http://incompleteideas.net/book/the-book-2nd.html; tying it to the chain is ours.

    Args:
        share: h in (0, 1].

    Raises:
        ValueError: h outside its range.
    """

    share: float

    def __post_init__(self) -> None:
        require_number("lookahead", self.share, 0, 1, "(]")

    def lmbda(self, num_steps: int) -> float:
        """λ of chains of so many steps, K ≥ 1.

        >>> [round(Lookahead(0.125).lmbda(K), 3) for K in (1, 8, 16, 100)]
        [0.0, 0.0, 0.5, 0.92]
        """
        h, K = self.share, num_steps
        return max(0.0, 1 - 1 / (h * K))

    def __call__(self, states: Mapping[str, Tensor] | TensorDictBase) -> float:
        """λ of the states of rows of time, K of them in each: of steps [B, K] with their times [B or 1, K, 1]."""
        return self.lmbda(states[keys.T].shape[1])
