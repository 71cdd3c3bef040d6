"""The probability that a classifier gives to a class, as a reward."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffrl.diffusion.networks.digits_cnn import digits_cnn
from diffrl.errors import InputError
from diffrl.rewards.registry import REWARDS

__all__ = ["ClassProbability", "logits_of"]


@REWARDS.register("class_probability")
@dataclass(frozen=True, eq=False)
class ClassProbability:
    """Probability that a classifier gives to a class: p(y | x) = softmax(logits(x))_y, in (0, 1), or its log.

    Args:
        target: y; None takes each sample's own condition, its label [N].
        log: give log p(y | x) ≤ 0, which still tells samples apart where p is near 0.
        classifier: x [N, *E] → logits [N, C], in the mode it is in; None: `digits_cnn`, for images [N, 1, 8, 8].

    Raises:
        ValueError: a target outside the classifier's classes; when called, no label to take.
    """

    target: int | None = None
    log: bool = False
    classifier: nn.Module | None = None

    def __post_init__(self) -> None:
        if self.target is not None and self.target < 0:
            raise InputError(f"target is {self.target}: classes are numbered from 0")

    def __call__(self, x0: Tensor, cond: Any = None) -> Tensor:
        """Rewards of samples [N, *E]: floats [N]."""
        if self.target is not None:
            y = torch.full((len(x0),), self.target, device=x0.device)
        elif (
            isinstance(cond, Tensor)
            and cond.shape in ((len(x0),), (len(x0), 1))
            and not cond.is_floating_point()
        ):
            y = cond.reshape(-1).to(x0.device)
        else:
            raise InputError(
                "no class to take the probability of: give target, or labels [N] as the condition"
            )
        log_p = logits_of(self.classifier, x0).log_softmax(-1)
        if len(x0) and not 0 <= int(y.min()) <= int(y.max()) < log_p.shape[1]:
            raise InputError(
                f"the classifier has classes 0..{log_p.shape[1] - 1}, not all of {y.unique().tolist()}"
            )
        log_p_y = log_p.gather(1, y.long()[:, None])[:, 0]
        return log_p_y if self.log else log_p_y.exp()


def logits_of(classifier: nn.Module | None, x0: Tensor) -> Tensor:
    """Logits [N, C] of samples by a classifier; None: `digits_cnn`, in float32."""
    return digits_cnn(x0.device)(x0.float()) if classifier is None else classifier(x0)
