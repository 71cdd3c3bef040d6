"""λ-returns of whole images against TorchRL's two versions of them."""

import torch
from report import Row
from timing import Ratio, interleave
from torchrl.objectives.value.functional import td_lambda_return_estimate, vec_td_lambda_return_estimate

from diffrl.rl.returns import lambda_returns

__all__ = ["cost_of_lambda_returns"]

LMBDA = 0.5


def cost_of_lambda_returns(shape: tuple[int, int, int], *, rounds: int) -> Row:
    """Time of TorchRL's vectorised version and of its loop over that of `lambda_returns`, all of [B, K, D].

    TorchRL wants flags of the reward's shape: they are expanded views.
    """
    reward, value = torch.randn(shape), torch.randn(shape)
    terminated = torch.zeros(*shape[:2], 1, dtype=torch.bool)
    terminated[:, -1] = True
    flags = terminated.expand(shape)
    variants = {
        "diffrl": lambda: lambda_returns(reward, value, terminated, lmbda=LMBDA),
        "vectorised": lambda: vec_td_lambda_return_estimate(1.0, LMBDA, value, reward, flags, flags),
        "loop": lambda: td_lambda_return_estimate(1.0, LMBDA, value, reward, flags, flags),
    }
    for other in ("vectorised", "loop"):
        torch.testing.assert_close(variants[other](), variants["diffrl"](), rtol=1e-4, atol=1e-4)
    seconds = interleave(variants, rounds=rounds, warm_up=0)
    ratios = {f"TorchRL, {other}": Ratio.of(seconds, other, "diffrl") for other in ("vectorised", "loop")}
    name = f"[{', '.join(map(str, shape))}]"
    return Row(name, Row.milliseconds_of(seconds["diffrl"]), ratios, "≥ 10")
